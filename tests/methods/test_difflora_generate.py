"""Pictures in, experts out: merged or not the same, straight into a patched and a served pipeline; what is
wrong is named.
"""

import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mole_kernels.cli.app import app
from mole_kernels.errors import (
    MoleError,
    MoleFileError,
    MoleKeyError,
    MoleShapeError,
    MoleTypeError,
    MoleValueError,
)
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.io import load_expert
from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
from mole_kernels.methods.difflora.features import SmallImages
from mole_kernels.methods.difflora.generate import Sampling, generate_experts
from mole_kernels.methods.difflora.manifest import Manifest
from mole_kernels.methods.difflora.predictor import Predictor
from mole_kernels.methods.difflora.store import save_predictor
from mole_kernels.patching.apply import patch
from mole_kernels.serving.serve import serve
from tests.tiny_models import make_expert, run_unet, tiny_unet

sys.path.insert(0, str(Path(__file__).parent))
from difflora_data import write_people

SAMPLING = Sampling(steps=3, guidance=2.0, seed=4)


def new_predictor(model, encoders=None, rank=2):
    torch.manual_seed(0)
    expert = make_expert(model, rank=rank)
    manifest = Manifest.of_expert(expert)
    autoencoder = LoRAAutoencoder(AutoencoderConfig(manifest.length, channels=(4, 4)))
    encoders = encoders or {"face": SmallImages(5, 4, 8), "image": SmallImages(6, 4, 16)}
    made = Predictor.new(
        manifest, autoencoder, encoders, dim=8, hidden=8, depth=1, width=12, heads=2, patch=4
    )
    for p in made.denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return made.eval()


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.fixture
def predictor(unet):
    return new_predictor(unet)


@pytest.fixture
def pictures():
    return {
        name: [Image.new("RGB", (16, 16), (60 * i, 10, 200 - 90 * i)) for i in range(n)]
        for name, n in (("anna", 3), ("ben", 1))
    }


def same(a, b):
    return all(
        torch.equal(a.layers[p].down, b.layers[p].down) and torch.equal(a.layers[p].up, b.layers[p].up)
        for p in a.layers
    )


def test_applied_is_merged_and_taken_off_leaves_the_base(unet, predictor, pictures):
    base = run_unet(unet)
    bank = generate_experts(predictor, pictures, base=unet, sampling=SAMPLING)
    assert bank.names == ("anna", "ben")
    with patch(unet, {"anna": bank.experts["anna"]}):
        unmerged = run_unet(unet)
    assert torch.equal(run_unet(unet), base) and not torch.allclose(unmerged, base, atol=1e-4)
    before = {path: unet.get_submodule(path).weight.detach().clone() for path in bank.paths()}
    for path, factor in bank.experts["anna"].layers.items():
        unet.get_submodule(path).weight.data += factor.delta().reshape(before[path].shape)
    merged = run_unet(unet)
    for path, weight in before.items():
        unet.get_submodule(path).weight.data.copy_(weight)
    torch.testing.assert_close(merged, unmerged, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_a_persons_expert_is_theirs_alone(predictor, pictures, kind):
    sampling = Sampling(steps=3, seed=1, kind=kind)
    bank = generate_experts(predictor, pictures, sampling=sampling)
    alone = generate_experts(predictor, {"ben": pictures["ben"]}, sampling=sampling).experts["ben"]
    for path, factor in alone.layers.items():
        torch.testing.assert_close(factor.down, bank.experts["ben"].layers[path].down, rtol=1e-4, atol=1e-6)
    assert same(
        generate_experts(predictor, pictures, sampling=sampling).experts["anna"], bank.experts["anna"]
    )
    turned = generate_experts(predictor, {"anna": pictures["anna"][::-1]}, sampling=sampling).experts["anna"]
    for path, factor in turned.layers.items():
        torch.testing.assert_close(factor.up, bank.experts["anna"].layers[path].up, rtol=1e-3, atol=1e-5)
    # another person, another seed: another expert
    assert not same(bank.experts["anna"], bank.experts["ben"])
    assert not same(
        generate_experts(
            predictor, {"ben": pictures["ben"]}, sampling=Sampling(steps=3, seed=2, kind=kind)
        ).experts["ben"],
        alone,
    )


def test_straight_into_a_batch_in_which_everyone_is_another(unet, predictor, pictures):
    bank = generate_experts(predictor, pictures, base=unet, sampling=SAMPLING)
    base, wanted = run_unet(unet), {}
    for name, expert in bank.experts.items():
        with patch(unet, {name: expert}):
            wanted[name] = run_unet(unet)
    with serve(unet, bank.experts, capacity=2) as served, served.assign(["ben", "anna"][: len(base)]):
        got = run_unet(unet)
    for i, name in enumerate(["ben", "anna"][: len(base)]):
        torch.testing.assert_close(got[i], wanted[name][i], rtol=1e-4, atol=1e-5)
    assert torch.equal(run_unet(unet), base)


def test_bad_pictures_and_encoders_are_named(predictor, pictures, tmp_path, unet):
    (tmp_path / "x.png").write_bytes(b"no picture")
    with pytest.raises(MoleFileError, match=r"x\.png: is no picture that can be read"):
        generate_experts(predictor, pictures | {"eve": [tmp_path / "x.png"]})
    with pytest.raises(MoleValueError, match="generate, 'eve': expected at least one picture of each person"):
        generate_experts(predictor, pictures | {"eve": []})
    with pytest.raises(MoleValueError, match="at least one person"):
        generate_experts(predictor, {})
    with pytest.raises(MoleTypeError, match="'eve': expected a file's path or a PIL image, got int"):
        generate_experts(predictor, {"eve": [3]})

    class Faces:
        dim = 5

        def __call__(self, pictures):
            if pictures[0].size == (1, 1):
                raise MoleValueError("Faces", expected="a face in every picture", got="none in picture 0")
            return torch.ones(len(pictures), 5 if len(pictures) < 3 else 6)

    other = new_predictor(unet, {"face": Faces(), "image": SmallImages(6, 4, 16)})
    with pytest.raises(
        MoleShapeError, match=r"'anna', face encoder: expected features \[3,5\], got \(3, 6\)"
    ):
        generate_experts(other, pictures)
    with pytest.raises(
        MoleValueError, match="'eve', face encoder: expected a face in every picture, got none in picture 0"
    ):
        generate_experts(other, {"eve": [Image.new("RGB", (1, 1))]})


def test_latents_that_are_not_finite_name_the_person(predictor, pictures):
    def poison(module, args, out):
        out = out.clone()
        out[1:] = torch.nan
        return out

    with (
        predictor.denoiser.register_forward_hook(poison),
        pytest.raises(MoleValueError, match="generate, 'ben': expected finite latents"),
    ):
        generate_experts(predictor, pictures, sampling=SAMPLING)


def test_a_layout_of_another_base_names_its_layers_before_anything_is_computed(predictor, pictures, unet):
    path = next(iter(predictor.manifest.scales))
    wide = Manifest.of_expert(Expert({path: LowRank(torch.ones(1, 99), torch.ones(8, 1))}))
    strange = Manifest.of_expert(Expert({"nowhere.to_q": LowRank(torch.ones(1, 2), torch.ones(2, 1))}))
    calls = []
    predictor.denoiser.register_forward_hook(lambda *_: calls.append(1))
    for manifest, error, words in ((wide, MoleShapeError, path), (strange, MoleKeyError, "nowhere")):
        predictor.manifest = manifest
        with pytest.raises(error, match=words):
            generate_experts(predictor, pictures, base=unet)
    assert not calls


# -- the command line
# ----------------------------------------------------------------------------------------------------------------


def run(*words):
    paper = ["train", "difflora"] if words[0] in ("autoencoder", "predictor") else ["difflora"]
    result = CliRunner().invoke(app, [*paper, *map(str, words)])
    if isinstance(result.exception, MoleError):
        return str(result.exception)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output


def test_commands_from_pictures_to_a_lora_file(tmp_path):
    root = write_people(tmp_path / "people", "ab")
    for i, folder in enumerate(sorted(root.iterdir())):
        for k in range(2):
            Image.new("RGB", (24, 24), (90 * i, 100, 20 + 30 * k)).save(folder / f"{k}.png")
    run(
        "data",
        root,
        "--out",
        tmp_path / "work",
        "--model",
        "demo",
        "--steps",
        1,
        "--rank",
        1,
        "--resolution",
        24,
        "--min-side",
        24,
        "--target-module",
        "to_v",
    )
    run(
        "autoencoder",
        tmp_path / "work",
        "--out",
        tmp_path / "ae",
        "--steps",
        2,
        "--channels",
        "4,4",
        "--batch-size",
        2,
    )
    small = (
        "--face-encoder",
        "small:8",
        "--image-encoder",
        "small:16",
        "--dim",
        8,
        "--depth",
        1,
        "--width",
        16,
        "--heads",
        2,
    )
    places = (tmp_path / "work", "--autoencoder", tmp_path / "ae", "--out", tmp_path / "model")
    run("predictor", *places, "--steps", 2, *small)
    assert "3 steps" in run("predictor", *places, "--steps", 3, "--resume", *small)
    out = tmp_path / "anna.safetensors"
    run("generate", tmp_path / "model", root / "a", "--out", out, "--model", "demo", "--sampling-steps", 2)
    expert = load_expert(out)
    assert expert.ranks() and all(path.endswith("to_v") for path in expert.layers)
    (tmp_path / "nobody").mkdir()
    assert "holds no picture" in run("generate", tmp_path / "model", tmp_path / "nobody", "--out", out)
    (tmp_path / "nobody/x.png").write_bytes(b"no picture")
    before = out.read_bytes()
    assert "no picture that can be read" in run(
        "generate", tmp_path / "model", tmp_path / "nobody", "--out", out
    )
    assert "are not in the model" in run(
        "generate", tmp_path / "model", root / "a", "--out", out, "--model", "sd15"
    )
    assert "expected small, small:SIZE" in run(
        "generate", tmp_path / "model", root / "a", "--out", out, "--face-encoder", "eyes"
    )
    assert out.read_bytes() == before


def test_a_saved_model_is_that_of_its_file(tmp_path, predictor, pictures):
    save_predictor(tmp_path / "model", predictor)
    pictures["ben"][0].save(tmp_path / "ben.png")
    run(
        "generate",
        tmp_path / "model",
        tmp_path / "ben.png",
        "--out",
        tmp_path / "ben.safetensors",
        "--sampling-steps",
        3,
        "--seed",
        4,
    )
    wanted = generate_experts(
        predictor, {"ben": pictures["ben"]}, sampling=Sampling(steps=3, seed=4)
    ).experts["ben"]
    found = load_expert(tmp_path / "ben.safetensors")
    for path, factor in wanted.layers.items():
        torch.testing.assert_close(found.layers[path].delta(), factor.delta())
