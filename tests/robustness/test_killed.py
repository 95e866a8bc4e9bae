"""76: kill -9 at every system call of a piece of work: what was there before loads, whole, and the work can
be done again.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mole_kernels.errors import MoleError, MoleWarning
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.writer import atomic_save, write_json
from mole_kernels.io import save_expert
from mole_kernels.io.bank import load_bank
from mole_kernels.io.experts import load_expert
from mole_kernels.io.merge import merge_files
from mole_kernels.methods.difflora import dataset
from mole_kernels.methods.difflora.shards import LoRADataset, pack_shards
from mole_kernels.methods.mix_of_show import folder as fusions
from mole_kernels.methods.selma.merging import save_merged, skill_bank
from mole_kernels.methods.selma.project import Project
from mole_kernels.methods.selma.prompts import PromptSettings, kept_requests, write_prompts
from mole_kernels.methods.selma.skills import Skill
from mole_kernels.training.checkpoint import list_checkpoints, load_latest
from mole_kernels.training.store import Store
from tests.fuzz.faults import Fault
from tests.training import test_fit as training

MOST_CALLS = 400
# of the longest work every third call
STEPS = {"training": 3}


def expert(seed: int, rank: int = 2) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    return Expert(
        {
            "unet.x.to_q": LowRank(
                torch.randn(rank, 6, generator=generator), torch.randn(4, rank, generator=generator), 0.5
            )
        }
    )


def plain(found: Expert) -> dict[str, Any]:
    return {
        path: (layer.down.tolist(), layer.up.tolist(), layer.scale) for path, layer in found.layers.items()
    }


@dataclass(frozen=True)
class Work:
    """`before` lays the folder out, `work` is killed in the middle, `found` reads what is there (None:
    nothing yet).
    """

    before: Callable[[Path], object]
    work: Callable[[Path], object]
    found: Callable[[Path], Any]


def of_bank(path: Path) -> Any:
    return {name: plain(one) for name, one in load_bank(path / "bank.safetensors")[0].experts.items()}


def train(path: Path) -> nn.Module:
    return training.run(run_dir=path / "run", resume=True)[0]


def of_run(path: Path) -> Any:
    """The step that a resume would begin at; its checkpoint is read whole."""
    latest = load_latest(path / "run") if (path / "run").exists() else None
    assert latest is None or latest.step == list_checkpoints(path / "run")[-1][0] == len(latest.losses)
    return None if latest is None else latest.step


def four_people(path: Path) -> None:
    (path / "experts").mkdir()
    for seed, name in enumerate("abcd"):
        save_expert(expert(seed), path / "experts" / f"{name}.safetensors")
    write_json(path / "settings.json", {"format": dataset.FORMAT, "training": {"per_shard": 2}})
    pack_shards(path, ["a", "b", "c"])


def of_shards(path: Path) -> Any:
    data = LoRADataset(path / "shards")
    return data.names, data.vectors().tolist(), data.manifest.to_json()


class Answers:
    name = "answers"

    def write(self, request: str, number: int, seed: int) -> str:
        return "\n".join(f"{i}. word{number}x{i} only{number}x{i}" for i in range(4, 8))


SKILL = Skill("colours", ("a red ball", "a blue cup", "a green hat"))


def of_prompts(path: Path) -> Any:
    """As many as are kept: a beginning of the whole list."""
    kept = [text for row in kept_requests(Project(path), SKILL.name) for text in row["accepted"]]
    assert kept == ALL_PROMPTS[: len(kept)]
    return len(kept)


def two_skills(path: Path) -> None:
    project = Project(path)
    project.add_skills([SKILL, Skill("owls", ("one owl", "two owls", "three owls"))])
    for seed, name in enumerate(("colours", "owls")):
        project.folder(name).mkdir(parents=True, exist_ok=True)
        save_expert(expert(seed), project.expert_file(name))
    atomic_save(
        {"unet.x.to_q.lora_A.weight": torch.ones(1, 6), "unet.x.to_q.lora_B.weight": torch.ones(4, 1)},
        project.merged_file,
    )


def merge_skills(path: Path) -> None:
    project = Project(path)
    bank = skill_bank(project)
    save_merged(project, bank.experts[bank.names[0]])


class Tokens:
    def __init__(self, said: str) -> None:
        self.said = said

    def config(self) -> list[str]:
        return [self.said]


@dataclass
class Fused:
    """What `save_fused` reads of a fusion."""

    seed: int
    layers: tuple = ()

    @property
    def expert(self) -> Expert:
        return expert(self.seed)

    @property
    def embeddings(self) -> dict[str, dict[str, torch.Tensor]]:
        return {"<a>": {"text_encoder": torch.full((2, 3), float(self.seed))}}

    @property
    def tokens(self) -> Tokens:
        return Tokens(f"<a> of {self.seed}")

    def totals(self) -> dict[str, int]:
        return {"seed": self.seed}


def of_fusion(path: Path) -> Any:
    """(expert, embedding, names, report), all of one fusion."""
    at = lambda name: fusions._place(path, name)  # noqa: E731
    row = plain(load_expert(at(fusions.EXPERT)))
    embedding = fusions.load_embeddings(at(fusions.EMBEDDINGS))["<a>"]["text_encoder"]
    seed = int(embedding[0, 0])
    assert row == plain(expert(seed)) and json.loads(at(fusions.REPORT).read_text())["totals"] == {
        "seed": seed
    }
    assert json.loads(at(fusions.CONFIG).read_text()) == [f"<a> of {seed}"]
    return seed


def cache(path: Path, keys: str) -> None:
    store = Store(path / "cache")
    for key in keys:
        if key not in store:
            store.add(key, {"latent": torch.full((3,), float(ord(key)))})
            store.flush()


def of_cache(path: Path) -> Any:
    store = Store(path / "cache")
    found = "".join(key for key in "abc" if key in store)
    assert all(store.get(key)["latent"].eq(ord(key)).all() for key in found)
    return found


def two_files(path: Path) -> None:
    for seed in (0, 1):
        save_expert(expert(seed), path / f"{seed}.safetensors")
    save_expert(expert(7), path / "merged.safetensors")


ALL_PROMPTS: list[str] = []
SIX = PromptSettings(count=10, more=4, wait=0.0, attempts=1)
WORKS = {
    "bank": Work(
        lambda path: ExpertBank({"a": expert(0)}).save(path / "bank.safetensors"),
        lambda path: ExpertBank({"a": expert(1), "b": expert(2)}).save(path / "bank.safetensors"),
        of_bank,
    ),
    "merge": Work(
        two_files,
        lambda path: merge_files(
            [path / "0.safetensors", path / "1.safetensors"], path / "merged.safetensors"
        ),
        lambda path: plain(load_expert(path / "merged.safetensors")),
    ),
    "training": Work(lambda path: None, train, of_run),
    "shards": Work(four_people, lambda path: pack_shards(path), of_shards),
    "pictures-cache": Work(lambda path: cache(path, "a"), lambda path: cache(path, "abc"), of_cache),
    "selma-prompts": Work(
        lambda path: None, lambda path: write_prompts(Project(path), SKILL, Answers(), SIX), of_prompts
    ),
    "selma-merge": Work(two_skills, merge_skills, lambda path: plain(load_expert(Project(path).merged_file))),
    "fusion": Work(
        lambda path: fusions.save_fused(Fused(1), path),
        lambda path: fusions.save_fused(Fused(2), path),
        of_fusion,
    ),
}


def killed_at(at: int, work: Callable[[], object]) -> bool:
    """Do the work in a child that kills itself at system call number `at`; whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            with warnings.catch_warnings(), Fault("kill", at):
                warnings.simplefilter("ignore")
                work()
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work itself failed"
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("name", WORKS)
def test_76_kill_9_at_every_system_call(name: str, tmp_path: Path):
    work = WORKS[name]
    if name == "selma-prompts" and not ALL_PROMPTS:
        (tmp_path / "all").mkdir()
        ALL_PROMPTS.extend(write_prompts(Project(tmp_path / "all"), SKILL, Answers(), SIX))
    whole = tmp_path / "whole"
    whole.mkdir()
    work.before(whole)
    old = work.found(whole)
    assert not killed_at(-1, lambda: work.work(whole))
    new = work.found(whole)
    assert new != old
    seen = set()
    for at in range(0, MOST_CALLS, STEPS.get(name, 1)):
        place = tmp_path / f"at-{at}"
        place.mkdir()
        work.before(place)
        again = killed_at(at, partial(work.work, place))
        now = work.found(place)
        # these go forward step by step; of all others there is the old state or the new one
        assert now in (old, new) or name in ("training", "selma-prompts", "pictures-cache"), at
        seen.add(json.dumps(now))
        if not again:
            break
        work.work(place)
        assert work.found(place) == new, at
        shutil.rmtree(place)
    else:
        raise AssertionError(f"more than {MOST_CALLS} system calls")
    assert at > 3 and {json.dumps(old), json.dumps(new)} <= seen


def test_76_a_resumed_run_is_the_run_that_was_never_killed(tmp_path: Path):
    model, _ = training.run(run_dir=tmp_path / "whole")
    for at in (9, 23, 31):
        place = tmp_path / str(at)
        place.mkdir()
        assert killed_at(at, partial(train, place))
        assert training.same(train(place), model)
        assert [p.name for p in (place / "run").iterdir() if p.name.startswith(".")] == []


def tmpfs(path: Path) -> bool:
    """A file system of 64 kB at `path`, where this process may have one."""
    import subprocess

    path.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    return (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(path)], capture_output=True
        ).returncode
        == 0
    )


def test_76_a_disk_that_is_full_leaves_the_old_file_and_says_so(tmp_path: Path):
    """A small tmpfs; RLIMIT_FSIZE, in test_interrupted, stands for it where none can be mounted."""
    import subprocess

    disk = tmp_path / "disk"
    if not tmpfs(disk):
        pytest.skip("no tmpfs can be mounted here; test_interrupted.py does it with RLIMIT_FSIZE")
    try:
        ExpertBank({"a": expert(0)}).save(disk / "bank.safetensors")
        before = (disk / "bank.safetensors").read_bytes()
        large = Expert({"unet.x.to_q": LowRank(torch.ones(2, 20_000), torch.ones(4, 2))})
        with pytest.raises(MoleError, match="No space left on device"):
            ExpertBank({"a": large}).save(disk / "bank.safetensors")
        assert (disk / "bank.safetensors").read_bytes() == before and os.listdir(disk) == ["bank.safetensors"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", [name for name in WORKS if name != "pictures-cache"])
@pytest.mark.parametrize("room", [60, 300])
def test_76_no_room_while_it_works(name: str, room: int, tmp_path: Path):
    """RLIMIT_FSIZE: the work stops with the cause in its message, what was there is whole, and with room
    again it goes on.
    """
    work = WORKS[name]
    if not ALL_PROMPTS:
        (tmp_path / "all").mkdir()
        ALL_PROMPTS.extend(write_prompts(Project(tmp_path / "all"), SKILL, Answers(), SIX))
    place = tmp_path / "place"
    place.mkdir()
    work.before(place)
    old = work.found(place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with (
            pytest.raises(MoleError, match=r"(?i)file too large|no space|could not be written"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore", MoleWarning)
            work.work(place)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    # prompts are kept request by request, as far as there was room
    assert work.found(place) == old or name == "selma-prompts"
    work.work(place)
    assert work.found(place) not in (old, None)
