"""`mole-kernels train CONFIG` and `train-many CONFIG`: from a YAML file to LoRA files, and what stops them."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from mole_kernels.cli import app
from mole_kernels.errors import MoleFileError, MoleStateError, MoleValueError
from mole_kernels.io import load_expert
from mole_kernels.training.recipe import read_many, read_recipe

# bit-for-bit promises are made for a CPU
os.environ["ACCELERATE_USE_CPU"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from pipelines import flux_pipeline, sd3_pipeline, sd_pipeline


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("config")
    sd_pipeline().save_pretrained(root / "sd")
    sd3_pipeline().save_pretrained(root / "sd3")
    flux_pipeline().save_pretrained(root / "flux")
    (root / "set").mkdir()
    for i, word in enumerate(("one", "two", "three", "four")):
        Image.new("RGB", (16 + 16 * (i % 2), 16), (60 * i, 9, 90)).save(root / "set" / f"{word}.png")
        (root / "set" / f"{word}.txt").write_text(word)
    return root


@pytest.fixture
def cli(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mole-kernels", *map(str, arguments)])
        try:
            app.app(standalone_mode=False)
        finally:
            printed.append(capsys.readouterr().out)

    printed: list[str] = []
    run.printed = printed
    yield run
    torch.set_num_threads(threads)


def one(work, base, name="own", **train):
    return {
        "base": str(work / base),
        "out": str(work / f"{base}-{name}.safetensors"),
        "data": {"folder": str(work / "set"), "resolution": 16, "multiple": 8, "batch_size": 2},
        "expert": {"name": name, "rank": 2},
        "train": {"steps": 3, "lr": "1e-2", **train},
    }


def written(path, values):
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize("base", ["sd", "sd3", "flux"])
def test_a_file_becomes_an_expert(work, cli, tmp_path, base):
    config = one(work, base)
    cli("train", written(tmp_path / "run.yaml", config), "--dry-run")
    assert "nothing trained" in cli.printed[-1] and not Path(config["out"]).exists()
    cli("train", written(tmp_path / "run.yaml", config))
    expert = load_expert(config["out"])
    prefix = "unet." if base == "sd" else "transformer."
    assert expert.ranks() == {2} and all(path.startswith(prefix) for path in expert.layers)
    assert any(factors.up.abs().sum() > 0 for factors in expert.layers.values())
    before = Path(config["out"]).read_bytes()
    with pytest.raises(MoleStateError, match="already holds checkpoints"):
        cli("train", tmp_path / "run.yaml")
    cli("train", tmp_path / "run.yaml", "--resume")
    assert Path(config["out"]).read_bytes() == before


def test_many_jobs_write_what_each_writes_alone(work, cli, tmp_path):
    shared = one(work, "sd")
    many = shared | {"out": str(tmp_path / "many")}
    many["jobs"] = [
        {"expert": {"name": "ann"}},
        {"expert": {"name": "bob", "rank": 5, "targets": r"attn2\.to_(k|v)"}, "train": {"lr": 0.001}},
        {"expert": {"name": "cid"}, "data": {"batch_size": 1}, "train": {"cond_dropout": 0.5}},
    ]
    cli("train-many", written(tmp_path / "many.yaml", many))
    for job in many["jobs"]:
        alone = {key: shared[key] | job.get(key, {}) for key in ("data", "expert", "train")}
        name = job["expert"]["name"]
        alone |= {"base": shared["base"], "out": str(tmp_path / f"{name}.safetensors")}
        cli("train", written(tmp_path / f"{name}.yaml", alone))
        files = (tmp_path / "many" / f"{name}.safetensors", tmp_path / f"{name}.safetensors")
        digests = {hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
        assert len(digests) == 1, name


def test_every_mistake_is_named_with_the_nearest_word(work, tmp_path):
    config = one(work, "sd", optimser="adamw", schedule="cosin")
    config["exprt"] = {"name": "x"}
    config["train"]["steps"] = "many"
    config["expert"]["rank"] = True
    del config["data"]["folder"]
    with pytest.raises(MoleFileError) as error:
        read_recipe(written(tmp_path / "bad.yaml", config))
    text = str(error.value)
    for words in (
        "train.optimser: no such key, did you mean optimiser?",
        "exprt: no such key, did you mean expert?",
        "train.steps: expected an integer, got 'many'",
        "expert.rank: expected an integer, got True",
        "data.folder: is missing",
    ):
        assert words in text, words
    with pytest.raises(MoleFileError, match=r"train: .*lr.*above 0"):
        read_recipe(written(tmp_path / "bad.yaml", one(work, "sd", lr=0)))
    (tmp_path / "bad.yaml").write_text("base: [1\n")
    with pytest.raises(MoleFileError, match="not YAML"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("just words")
    with pytest.raises(MoleFileError, match="keys and values"):
        read_recipe(tmp_path / "bad.yaml")
    twice = one(work, "sd") | {"jobs": [{}, {}]}
    with pytest.raises(MoleFileError, match="two jobs are called own"):
        read_many(written(tmp_path / "bad.yaml", twice))


def test_what_contradicts_the_model_is_refused(work, cli, tmp_path):
    config = one(work, "sd", name="wrong") | {"objective": {"guidance": 3.5}}
    with pytest.raises(MoleValueError, match="objective"):
        cli("train", written(tmp_path / "run.yaml", config))
    config = one(work, "sd3", name="wrong", snr_gamma=5.0)
    with pytest.raises(MoleValueError, match="flow matching"):
        cli("train", written(tmp_path / "run.yaml", config))
    config = one(work, "sd", name="wrong")
    config["expert"]["targets"] = "nowhere"
    with pytest.raises(MoleValueError, match="nowhere"):
        cli("train", written(tmp_path / "run.yaml", config))


def test_a_job_that_fails_leaves_the_others_files(work, cli, tmp_path):
    many = one(work, "sd") | {"out": str(tmp_path / "many")}
    many["jobs"] = [{"expert": {"name": "good"}}, {"expert": {"name": "bad"}, "train": {"lr": 1e38}}]
    with pytest.raises(MoleStateError, match=r"1 of 2 jobs failed.*bad"):
        cli("train-many", written(tmp_path / "many.yaml", many))
    assert [file.name for file in (tmp_path / "many").glob("*.safetensors")] == ["good.safetensors"]


def test_the_shipped_files_are_right():
    files = sorted((Path(__file__).parents[2] / "python/recipes/configs").glob("*.yaml"))
    assert len(files) >= 6
    for file in files:
        recipe = (read_many if file.stem == "many" else read_recipe)(file)
        assert recipe.base and recipe.out


@pytest.mark.parametrize("base", ["sd", "flux"])
def test_held_out_pictures_are_looked_at_and_change_nothing(work, cli, tmp_path, base):
    (tmp_path / "held").mkdir()
    Image.new("RGB", (16, 16), (200, 90, 9)).save(tmp_path / "held/a.png")
    (tmp_path / "held/a.txt").write_text("two")
    config = one(work, base, name="held", steps=8, lr=0.02, cond_dropout=0.5)
    outs = []
    for validation in (None, {"folder": str(tmp_path / "held"), "every": 4, "draws": 8}):
        out = tmp_path / f"{validation is None}.safetensors"
        asked = config | {"out": str(out)} | ({} if validation is None else {"validation": validation})
        cli("train", written(tmp_path / "run.yaml", asked))
        outs.append(out.read_bytes())
    assert outs[0] == outs[1]
    lines = (tmp_path / "False.safetensors.run/validation.jsonl").read_text().splitlines()
    looks = [json.loads(line) for line in lines]
    assert [look["step"] for look in looks] == [4, 8] and looks[0]["loss"] != looks[1]["loss"]
    assert "on what is held out" in cli.printed[-1]
    with pytest.raises(MoleFileError, match=r"validation.evry: no such key, did you mean every"):
        read_recipe(written(tmp_path / "run.yaml", config | {"validation": {"folder": "x", "evry": 3}}))
