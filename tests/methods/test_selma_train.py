"""Stages 3 and 4: experts from folders of pictures, base untouched, resumed as unbroken; the merge is 1/T
exactly.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError, MoleWarning
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import load_expert
from mole_kernels.methods.selma.merging import merge_skills, patch_unmerged, save_merged, skill_bank
from mole_kernels.methods.selma.pictures import PictureSettings, make_pictures
from mole_kernels.methods.selma.project import Project, read_lines, write_lines
from mole_kernels.methods.selma.skills import Skill
from mole_kernels.methods.selma.train import (
    PRESETS,
    MirroredFolder,
    SkillTraining,
    join_pictures,
    skill_targets,
    train_skill,
)
from mole_kernels.patching.apply import patch
from mole_kernels.training.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parent))
from selma_pipeline import tiny_pipeline

CONFIG = TrainConfig(steps=4, lr=1e-2, seed=42, checkpoint_every=2)
TRAINING = SkillTraining(CONFIG, rank=3, alpha=3.0, resolution=16, batch_size=2, multiple=2)
PROMPTS = {"low": ["one two", "three", "zero four one"], "high": ["five six", "seven", "nine eight"]}


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def drawn(pipe, tmp_path_factory):
    """A project after stage 2."""
    project = Project(tmp_path_factory.mktemp("drawn"))
    project.add_skills([Skill(name, ("a b", "c d", "e f")) for name in PROMPTS])
    for name, prompts in PROMPTS.items():
        write_lines(project.prompts_file(name), ({"prompt": text} for text in prompts))
        make_pictures(project, name, pipe, PictureSettings(batch=3, options={"num_inference_steps": 1}))
    return project


@pytest.fixture
def project(drawn, tmp_path):
    """A copy to train in."""
    import shutil

    shutil.copytree(drawn.root, tmp_path / "run")
    return Project(tmp_path / "run")


@pytest.fixture(scope="module")
def trained(drawn, pipe, tmp_path_factory):
    import shutil

    root = tmp_path_factory.mktemp("trained") / "run"
    shutil.copytree(drawn.root, root)
    for name in PROMPTS:
        train_skill(Project(root), name, pipe, TRAINING, progress=False)
    return Project(root)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def factors(expert):
    return {
        f"{path}.{part}": getattr(layer, part)
        for path, layer in expert.layers.items()
        for part in ("down", "up")
    }


def output(pipe):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        return pipe.unet(torch.randn(2, 4, 8, 8, generator=g), 500, torch.randn(2, 5, 64, generator=g)).sample


def test_training_leaves_the_base_bit_for_bit_and_adapts_attention_alone(trained, pipe):
    before = bits(tiny_pipeline().unet)
    assert same(before, bits(pipe.unet)) and not any(p.requires_grad is False for p in pipe.unet.parameters())
    for name in PROMPTS:
        expert = load_expert(trained.expert_file(name))
        assert expert.ranks() == {3} and expert.scales() == {1.0}
        assert {path.removeprefix("unet.") for path in expert.layers} == set(skill_targets(pipe))
        assert {path.split(".attn")[1][2:] for path in expert.layers} == {"to_q", "to_k", "to_v", "to_out.0"}
        assert all(layer.up.any() for layer in expert.layers.values())
        assert trained.noted("train", name)["steps"] == 4


def test_a_run_broken_off_goes_on_and_ends_as_an_unbroken_one(trained, project, pipe):
    before = bits(pipe.unet)

    def stop(step, loss):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_skill(project, "low", pipe, TRAINING, progress=False, on_step=stop)
    assert same(before, bits(pipe.unet)) and not project.expert_file("low").exists()
    steps = []
    resumed = train_skill(
        project, "low", pipe, TRAINING, progress=False, on_step=lambda step, loss: steps.append(step)
    )
    assert steps == [3, 4] and same(factors(resumed), factors(load_expert(trained.expert_file("low"))))
    # trained already: read, not trained again
    again = train_skill(
        project, "low", pipe, TRAINING, progress=False, on_step=lambda step, loss: steps.append(step)
    )
    assert len(steps) == 2 and same(factors(again), factors(resumed))
    longer = replace(TRAINING, config=replace(CONFIG, steps=5))
    train_skill(project, "low", pipe, longer, progress=False, on_step=lambda step, loss: steps.append(step))
    assert steps == [3, 4, 5] and project.noted("train", "low")["steps"] == 5


def test_a_cache_on_the_disk_changes_nothing(trained, project, pipe, tmp_path):
    cached = train_skill(project, "low", pipe, TRAINING, progress=False, cache=tmp_path / "cache")
    assert list((tmp_path / "cache").rglob("*.safetensors"))
    assert same(factors(cached), factors(load_expert(trained.expert_file("low"))))


def test_what_a_resume_and_a_start_refuse(project, pipe):
    train_skill(project, "low", pipe, TRAINING, progress=False)
    with pytest.raises(MoleStateError, match="train of low, rank: expected 3 as before, got 4"):
        train_skill(project, "low", pipe, replace(TRAINING, rank=4), progress=False)
    (project.pictures_folder("high") / "metadata.jsonl").unlink()
    with pytest.raises(MoleStateError, match="its pictures are not all made"):
        train_skill(project, "high", pipe, TRAINING, progress=False)
    (project.pictures_folder("high") / "metadata.jsonl").write_text("")
    with pytest.raises(MoleFileError, match="has no caption"):
        train_skill(project, "high", pipe, TRAINING, progress=False)
    with pytest.raises(MoleStateError, match=r"no expert yet for high.*\n.*train selma"):
        skill_bank(project)
    with pytest.raises(MoleValueError, match="targets"):
        skill_targets(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("steps", [3, 4])
def test_a_resume_with_another_caption_is_refused(project, pipe, steps):
    """In the middle of a run, and where the expert would only be read."""

    def stop(step, loss):
        if step == steps:
            raise KeyboardInterrupt

    if steps < TRAINING.config.steps:
        with pytest.raises(KeyboardInterrupt):
            train_skill(project, "low", pipe, TRAINING, progress=False, on_step=stop)
    else:
        train_skill(project, "low", pipe, TRAINING, progress=False)
    metadata = project.pictures_folder("low") / "metadata.jsonl"
    rows = read_lines(metadata)
    write_lines(metadata, [rows[0] | {"text": "another caption"}, *rows[1:]])
    with pytest.raises(MoleStateError, match="caption"):
        train_skill(project, "low", pipe, TRAINING, progress=False)
    write_lines(metadata, rows)
    train_skill(project, "low", pipe, TRAINING, progress=False)
    # pictures may go once the expert is there
    metadata.unlink()
    train_skill(project, "low", pipe, TRAINING, progress=False)


def test_one_prompt_for_all_pictures_is_remarked_and_trains(project, pipe):
    rows = read_lines(project.pictures_folder("low") / "metadata.jsonl")
    write_lines(project.pictures_folder("low") / "metadata.jsonl", [row | {"text": "one"} for row in rows])
    with pytest.warns(MoleWarning, match="one and the same caption"):
        train_skill(project, "low", pipe, replace(TRAINING, config=replace(CONFIG, steps=1)), progress=False)
    bank = skill_bank(project, ["low"])
    assert {layer.scale for layer in merge_skills(bank).layers.values()} == {1.0}


def test_flipped_pictures_are_pixels_exchanged_not_latents(tmp_path):
    image = Image.new("RGB", (4, 4))
    image.putdata([(k * 15, 0, 255 - k) for k in range(16)])
    image.save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a gradient")
    folder = MirroredFolder(tmp_path, 4, multiple=2)
    assert (
        len(folder) == 2
        and torch.equal(folder.pixels(1), folder.pixels(0).flip(-1))
        and not torch.equal(*map(folder.pixels, (0, 1)))
    )
    assert folder[0].digest != folder[1].digest and folder[0].caption == folder[1].caption
    assert torch.equal(folder.time_ids(0), folder.time_ids(1))


def test_joint_training_sees_the_pictures_of_all_skills_once(project, pipe):
    for _ in range(2):
        join_pictures(project, ["low", "high"])
    folder = MirroredFolder(project.pictures_folder("joint"), 16, multiple=2)
    assert (
        sorted({p.caption for p in folder.pictures}) == sorted(PROMPTS["low"] + PROMPTS["high"])
        and len(folder) == 12
    )
    expert = train_skill(
        project, "joint", pipe, replace(TRAINING, config=replace(CONFIG, steps=1)), progress=False
    )
    assert expert.ranks() == {3} and list(project.skills()) == ["low", "high"]
    with pytest.raises(MoleStateError, match="have no pictures"):
        join_pictures(project, ["none"])


# -- the merge
# ------------------------------------------------------------------------------------------------------------------------


def experts(T, rank=2, seed=0):
    g = torch.Generator().manual_seed(seed)

    def layer(n, k):
        return LowRank(torch.randn(rank, k, generator=g), torch.randn(n, rank, generator=g), 1.0)

    return ExpertBank({f"skill{e}": Expert({"unet.a": layer(6, 5), "unet.b": layer(4, 7)}) for e in range(T)})


def delta(layer):
    return layer.scale * layer.up.double() @ layer.down.double()


@pytest.mark.parametrize("T", [1, 2, 3, 5, 7])
def test_the_weights_are_one_over_the_number_of_experts(T):
    bank = experts(T)
    merged = merge_skills(bank)
    for path in bank.paths():
        wanted = sum(delta(layer) for layer in bank.layer(path).values()) / T
        assert (delta(merged.layers[path]) - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    # nothing else decides: not a model's name, not the experts' names
    named = ExpertBank({f"a-much-longer-name-{name}": expert for name, expert in bank.experts.items()})
    assert same(factors(merge_skills(named)), factors(merged))
    assert merged.metadata == {"method": "selma", "merge": "delta_mean", "experts": ", ".join(bank.names)}


def test_merged_is_unmerged_and_comes_off_again(trained, pipe, tmp_path):
    before, plain = bits(pipe.unet), output(pipe)
    bank = skill_bank(trained)
    assert bank.names == ("low", "high")
    with patch_unmerged(pipe, bank) as handle:
        assert handle.scales == {"low": 0.5, "high": 0.5}
        apart = output(pipe)
    save_merged(trained, merge_skills(bank))
    with patch(pipe, {"merged": load_expert(trained.merged_file)}):
        together = output(pipe)
    assert (apart - together).abs().max() <= 1e-5 and (apart - plain).abs().max() > 1e-3
    assert same(before, bits(pipe.unet)) and torch.equal(output(pipe), plain)


def test_diffusers_reads_the_merged_file_and_agrees(trained):
    save_merged(trained, merge_skills(skill_bank(trained)))
    other = tiny_pipeline()
    other.load_lora_weights(str(trained.root), weight_name="merged.safetensors")
    with patch(pipe := tiny_pipeline(), {"merged": load_expert(trained.merged_file)}):
        assert (output(pipe) - output(other)).abs().max() <= 1e-5


def test_presets_hold_the_papers_settings():
    for name, steps, images, resolution, every in (
        ("sd", 5000, 64, 512, 500),
        ("sdxl", 10_000, 32, 1024, 2000),
    ):
        preset = PRESETS[name]
        config = preset.config
        assert (preset.rank, preset.alpha, preset.resolution, preset.flip) == (128, 128.0, resolution, True)
        assert (config.steps, config.lr, config.schedule, config.optimiser, config.seed) == (
            steps,
            3e-4,
            "constant",
            "adamw",
            42,
        )
        assert preset.batch_size * config.accumulation == images and config.checkpoint_every == every


def test_the_experts_of_a_step_are_those_of_a_run_that_ended_there(trained, pipe, project):
    short = replace(TRAINING, config=replace(CONFIG, steps=2))
    for name in PROMPTS:
        train_skill(project, name, pipe, short, progress=False)
    bank, early = skill_bank(trained, step=2), skill_bank(project)
    assert bank.names == early.names
    for name in PROMPTS:
        assert set(bank.experts[name].layers) == set(early.experts[name].layers)
        for path, layer in early.experts[name].layers.items():
            torch.testing.assert_close(bank.experts[name].layers[path].delta(), layer.delta())
            assert not torch.equal(layer.delta(), skill_bank(trained).experts[name].layers[path].delta())
    with pytest.raises(MoleStateError, match="expected one of 2, 4, got 3"):
        skill_bank(trained, step=3)
