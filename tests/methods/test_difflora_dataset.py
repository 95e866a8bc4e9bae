"""From folders of pictures to shards: filter, one expert each and never twice, one layout, two processes as
one.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleKeyError, MoleStateError, MoleValueError, MoleWarning
from mole_kernels.io import load_expert, save_expert
from mole_kernels.methods.difflora.dataset import (
    HasFace,
    MinimumSize,
    find_targets,
    identity_folders,
    keep_pictures,
    pictures_of,
    train_identities,
)
from mole_kernels.methods.difflora.manifest import tensors_of
from mole_kernels.methods.difflora.shards import LoRADataset, pack_shards
from mole_kernels.training.processes import as_only_process, processes

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
from difflora_data import TRAINING, make_set, write_people  # noqa: E402
from selma_pipeline import tiny_pipeline  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder with people and work, the data set) of five people."""
    root = tmp_path_factory.mktemp("set")
    return root, make_set(write_people(root / "people"), root / "work")


def test_the_filter_keeps_what_can_be_read_and_is_large_enough(tmp_path):
    write_people(tmp_path, "a")
    Image.new("RGB", (16, 9)).save(tmp_path / "a" / "small.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no picture")
    (tmp_path / "a" / "1.txt").write_text("said of the second")
    kept = keep_pictures(tmp_path / "a", tmp_path / "out", MinimumSize(16), "one")
    assert kept.names == ["0.png", "1.png"]
    assert (
        "9 pixels" in kept.left_out["small.png"]
        and "no picture that can be read" in kept.left_out["broken.png"]
    )
    lines = [json.loads(line) for line in (tmp_path / "out/metadata.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["one", "said of the second"]
    with pytest.raises(
        MoleFileError, match=r"no picture is left of this identity \(0\.png: its shorter side has 16"
    ):
        keep_pictures(tmp_path / "a", tmp_path / "none", MinimumSize(64), "one")
    assert not (tmp_path / "none").exists()


def test_pictures_without_a_face_are_left_out():
    class Faces:
        dim = 3

        def __call__(self, pictures):
            if pictures[0].size == (1, 1):
                raise MoleValueError("Faces", expected="a face in every picture", got="none in picture 0")
            return torch.ones(1, 3)

    accept = HasFace(Faces())
    assert accept(Image.new("RGB", (2, 2))) is None and "none in picture 0" in accept(
        Image.new("RGB", (1, 1))
    )


def test_shards_hold_every_expert_exactly(made):
    root, data = made
    assert data.names == list("abcde") and sorted(p.name for p in (root / "work/shards").glob("shard*")) == [
        f"shard-0000{i}.safetensors" for i in range(3)
    ]
    vectors = data.vectors(["d", "a"])
    for name, vector in zip("da", vectors):
        expert = load_expert(root / "work/experts" / f"{name}.safetensors")
        back = tensors_of(data.manifest.expert(vector))
        assert all(torch.equal(back[key], tensor) for key, tensor in tensors_of(expert).items())
    assert not torch.equal(vectors[0], vectors[1]) and vectors.abs().max() < 1
    assert torch.equal(torch.cat(list(data.parts(2))), data.vectors())
    # experts begin at one point: what their factors share is far more than what tells them apart
    away = data.vectors() - data.vectors().mean(0)
    assert away.norm() < 0.2 * data.vectors().norm()
    assert [picture.size for picture in pictures_of(root / "work", "a")] == [(16, 16)] * 2


def test_a_restart_trains_none_twice_and_other_settings_are_refused(made):
    root, data = made
    files = {name: root / "work/experts" / f"{name}.safetensors" for name in "abcde"}
    before = {name: (path.read_bytes(), path.stat().st_mtime_ns) for name, path in files.items()}
    files["c"].unlink()
    pipe = tiny_pipeline()
    train_identities(pipe, root / "people", root / "work", TRAINING, accept=MinimumSize(16), progress=False)
    assert files["c"].read_bytes() == before["c"][0]
    assert all(path.stat().st_mtime_ns == before[name][1] for name, path in files.items() if name != "c")
    with pytest.raises(MoleStateError, match="rank: expected 2 as when the set began, got 3"):
        train_identities(pipe, root / "people", root / "work", replace(TRAINING, rank=3), progress=False)
    # packing is free to change, and a part of the people may be packed
    train_identities(
        pipe,
        root / "people",
        root / "work",
        replace(TRAINING, per_shard=10),
        accept=MinimumSize(16),
        progress=False,
    )
    part = pack_shards(root / "work", ["e", "b"])
    assert part.names == ["e", "b"] and len(list((root / "work/shards").glob("shard*"))) == 1
    train_identities(pipe, root / "people", root / "work", TRAINING, accept=MinimumSize(16), progress=False)
    assert torch.equal(pack_shards(root / "work").vectors(), data.vectors())


def test_a_person_without_pictures_is_passed_over(tmp_path):
    write_people(tmp_path / "people", "ab", pictures=1)
    Image.new("RGB", (3, 3)).save(tmp_path / "people/b/0.png")
    seen = []
    with pytest.warns(MoleWarning, match="no picture is left .* passed over"):
        files = train_identities(
            tiny_pipeline(),
            tmp_path / "people",
            tmp_path / "work",
            TRAINING,
            accept=MinimumSize(16),
            progress=False,
            on_identity=lambda name, expert: seen.append((name, expert is None)),
        )
    assert list(files) == ["a"] and seen == [("a", False), ("b", True)]


def test_bad_sets_are_named(made, tmp_path):
    root, data = made
    with pytest.raises(MoleFileError, match="no folders in it"):
        identity_folders(tmp_path)
    with pytest.raises(MoleKeyError, match="has no identity nobody"):
        data.vectors(["a", "nobody"])
    with pytest.raises(MoleKeyError, match="1 are not there: nobody"):
        pack_shards(root / "work", ["nobody"])
    with pytest.raises(MoleFileError, match=r"got no index\.json"):
        LoRADataset(tmp_path)
    with pytest.raises(MoleValueError, match="layers called to_x"):
        find_targets(tiny_pipeline(), ["to_x"])
    index = json.loads((root / "work/shards/index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(MoleFileError, match="of its 3 shards are not there: shard-00000"):
        LoRADataset(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": "another"}))
    with pytest.raises(MoleFileError, match="got another"):
        LoRADataset(tmp_path)
    # an expert of another rank has no place in the layout
    (tmp_path / "experts").mkdir()
    (tmp_path / "settings.json").write_text((root / "work/settings.json").read_text())
    for i, name in enumerate("xy"):
        expert = load_expert(root / "work/experts/a.safetensors")
        if i:
            path, layer = next(iter(expert.layers.items()))
            expert.layers[path] = replace(layer, down=layer.down[:1], up=layer.up[:, :1])
        save_expert(expert, tmp_path / "experts" / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"to_q\.down: expected \[2, \d+\]"):
        pack_shards(tmp_path)


def test_alone_gives_the_other_processes_back():
    state = processes()
    before = dict(state.__dict__)
    try:
        state.__dict__.update(num_processes=7, process_index=3)
        with as_only_process():
            assert (processes().num_processes, processes().process_index, processes().is_main_process) == (
                1,
                0,
                True,
            )
        assert (processes().num_processes, processes().process_index) == (7, 3)
    finally:
        state.__dict__.update(before)


@pytest.mark.slow
def test_two_processes_share_the_people_and_make_the_set_of_one(made, tmp_path):
    _, data = made
    write_people(tmp_path / "people")
    options = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(HERE / "difflora_data.py"), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["world"] for rank in ranks] == [2, 2] and [rank["made"] for rank in ranks] == [
        ["a", "c", "e"],
        ["b", "d"],
    ]
    found = LoRADataset(tmp_path / "work/shards")
    assert found.names == data.names and torch.equal(found.vectors(), data.vectors())
