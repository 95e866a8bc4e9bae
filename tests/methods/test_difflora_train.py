"""Autoencoder and denoiser train and resume bit for bit; a model's folder is whole, or an error that says
what is wrong.
"""

import json
from dataclasses import replace

import pytest
import torch

from mole_kernels.errors import (
    MoleFileError,
    MoleKeyError,
    MoleShapeError,
    MoleStateError,
    MoleTypeError,
    MoleValueError,
)
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save
from mole_kernels.methods.difflora.autoencoder import AutoencoderConfig, LoRAAutoencoder
from mole_kernels.methods.difflora.features import SmallImages
from mole_kernels.methods.difflora.manifest import Manifest
from mole_kernels.methods.difflora.predictor import Predictor
from mole_kernels.methods.difflora.store import (
    load_autoencoder,
    load_predictor,
    save_autoencoder,
    save_predictor,
)
from mole_kernels.methods.difflora.train import (
    PersonBatches,
    VectorBatches,
    train_autoencoder,
    train_predictor,
)
from mole_kernels.training.config import TrainConfig

LENGTH, PEOPLE = 70, 6
CONFIG = TrainConfig(steps=4, lr=3e-3, weight_decay=0.0, seed=5)
MANIFEST = Manifest.of({"a.down": torch.ones(5, 8), "a.up": torch.ones(6, 5)})
VECTORS = torch.randn(PEOPLE, LENGTH, generator=torch.Generator().manual_seed(1)) * 0.2


class Frozen:
    """An encoder that is no part of the model."""

    dim = 5

    def __call__(self, pictures):
        return torch.tensor([[float(p.size[0])] * self.dim for p in pictures])


def new_autoencoder(seed=0):
    torch.manual_seed(seed)
    return LoRAAutoencoder(AutoencoderConfig(LENGTH, channels=(4, 4)))


def new_predictor(frozen=False, seed=0):
    autoencoder = new_autoencoder(seed)
    encoders = {"face": Frozen() if frozen else SmallImages(5, 4, 8), "image": SmallImages(6, 4, 16)}
    return Predictor.new(
        MANIFEST, autoencoder, encoders, dim=8, hidden=8, depth=1, width=12, heads=2, patch=2
    )


def references():
    g = torch.Generator().manual_seed(2)
    return [
        {"face": torch.randn(n, 3, 8, 8, generator=g), "image": torch.randn(n, 3, 16, 16, generator=g)}
        for n in (1, 2, 3, 4, 5, 3)
    ]


def same(a, b):
    one, two = a.state_dict(), b.state_dict()
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_training_the_autoencoder_lowers_its_loss_and_a_resumed_run_equals_an_unbroken_one(tmp_path):
    whole, broken = new_autoencoder(), new_autoencoder()
    result = train_autoencoder(
        whole, VECTORS, CONFIG, batch_size=3, run_dir=tmp_path / "whole", progress=False
    )
    assert torch.equal(whole.mean, VECTORS.double().mean(0).float())
    stop = replace(CONFIG, steps=2)
    train_autoencoder(broken, VECTORS, stop, batch_size=3, run_dir=tmp_path / "run", progress=False)
    again = new_autoencoder(seed=9)
    resumed = train_autoencoder(
        again, VECTORS, CONFIG, batch_size=3, run_dir=tmp_path / "run", resume=True, progress=False
    )
    assert same(again, whole) and resumed.losses == result.losses
    # other vectors, another loss: not the run that was begun
    other = replace(CONFIG, steps=6)
    for data, strength, words in ((VECTORS + 1, 1.0, "batches, data"), (VECTORS, 2.0, "loss")):
        with pytest.raises(MoleStateError, match=words):
            train_autoencoder(
                new_autoencoder(),
                data,
                other,
                batch_size=3,
                strength=strength,
                run_dir=tmp_path / "run",
                resume=True,
            )
    long = train_autoencoder(
        new_autoencoder(), VECTORS, replace(CONFIG, steps=40), batch_size=6, progress=False
    )
    assert sum(long.losses[-5:]) < 0.8 * sum(long.losses[:5])


def test_the_predictor_trains_all_but_the_autoencoder_and_resumes(tmp_path):
    config = replace(CONFIG, cond_dropout=0.2)
    whole, people = new_predictor(), references()
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    result = train_predictor(
        whole, VECTORS, people, config, batch_size=4, run_dir=tmp_path / "whole", progress=False
    )
    changed = {key for key, value in whole.state_dict().items() if not torch.equal(value, before[key])}
    trained = {key for key in before if not key.startswith("autoencoder.")}
    # a zero-initialised last layer keeps what is behind it still for one step, not for four
    assert changed == trained, trained ^ changed
    assert all(p.requires_grad for p in whole.parameters())
    again = new_predictor()
    train_predictor(
        again,
        VECTORS,
        people,
        replace(config, steps=2),
        batch_size=4,
        run_dir=tmp_path / "run",
        progress=False,
    )
    again = new_predictor(seed=0)
    resumed = train_predictor(
        again, VECTORS, people, config, batch_size=4, run_dir=tmp_path / "run", resume=True, progress=False
    )
    assert same(again, whole) and resumed.losses == result.losses
    # the denoiser's latents are standardised and come back
    z = whole.latents(VECTORS)
    torch.testing.assert_close(z.mean(0), torch.zeros_like(z[0]), atol=1e-5, rtol=0)
    assert z.square().mean().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(whole.decode(z), whole.autoencoder(VECTORS).detach(), rtol=1e-4, atol=1e-5)


def test_every_step_shows_other_references_of_the_same_people():
    latents = torch.arange(PEOPLE).float()[:, None, None]
    people = [
        {k: torch.arange(n)[:, None] + 100 * i for k in ("face", "image")}
        for i, n in enumerate((1, 2, 3, 4, 5, 3))
    ]
    batches = PersonBatches(latents, people, 4, most=3, seed=7)
    counts, seen = set(), set()
    for number in range(60):
        batch = batches.batch(number)
        counts.add(batch["face"].shape[1])
        assert torch.equal(batch["face"], batch["image"]) and len(batch["latents"]) == 4
        assert torch.equal(batch["face"] // 100, batch["latents"].long().expand_as(batch["face"]))
        seen |= set(batch["face"].flatten().tolist())
        again = PersonBatches(latents, people, 4, most=3, seed=7).batch(number)
        assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert counts == {1, 2, 3} and seen == {
        100 * i + k for i, n in enumerate((1, 2, 3, 4, 5, 3)) for k in range(n)
    }
    rows = VectorBatches(VECTORS, 3, 1)
    one_round = torch.cat([rows.batch(n)["vectors"] for n in range(2)])
    assert sorted(one_round[:, 0].tolist()) == sorted(VECTORS[:, 0].tolist())


def test_bad_data_is_named_before_a_step():
    with pytest.raises(MoleShapeError, match=r"vectors \[n,70\], got \[n,69\]"):
        train_autoencoder(new_autoencoder(), VECTORS[:, 1:], CONFIG)
    with pytest.raises(MoleValueError, match="at least one vector"):
        train_autoencoder(new_autoencoder(), VECTORS[:0], CONFIG)
    with pytest.raises(MoleShapeError, match="references of 6 people, got 5"):
        train_predictor(new_predictor(), VECTORS, references()[1:], CONFIG)
    people = references()
    people[2] = {kind: value[:0] for kind, value in people[2].items()}
    with pytest.raises(MoleValueError, match="at least one picture of each person"):
        train_predictor(new_predictor(), VECTORS, people, CONFIG)
    with pytest.raises(MoleStateError, match="loss is nan"):
        train_predictor(
            new_predictor(), torch.full_like(VECTORS, torch.nan), references(), CONFIG, progress=False
        )


# -- the model's folder
# --------------------------------------------------------------------------------------------------------------


def test_a_model_comes_back_bit_for_bit(tmp_path):
    predictor = new_predictor()
    predictor.set_latent_scale(torch.randn(4, 1, predictor.autoencoder.config.latent_length))
    state = torch.get_rng_state()
    save_predictor(tmp_path, predictor, {"who": "me"})
    back = load_predictor(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert same(predictor, back) and back.manifest == predictor.manifest and not back.training
    autoencoder, manifest = load_autoencoder(tmp_path)
    assert same(autoencoder, predictor.autoencoder) and manifest == MANIFEST
    # written again: the old weights go last
    save_autoencoder(tmp_path, new_autoencoder(3), MANIFEST)
    assert (
        same(load_autoencoder(tmp_path)[0], new_autoencoder(3)) and len(list(tmp_path.glob("weights*"))) == 1
    )
    with pytest.raises(MoleFileError, match="a model of kind predictor, got autoencoder"):
        load_predictor(tmp_path)


def test_frozen_encoders_are_given_again(tmp_path):
    save_predictor(tmp_path, new_predictor(frozen=True))
    with pytest.raises(MoleValueError, match="face=, the Frozen it was trained with"):
        load_predictor(tmp_path)
    wide = Frozen()
    wide.dim = 7
    with pytest.raises(MoleShapeError, match="face encoder: expected features 5 wide, got 7"):
        load_predictor(tmp_path, face=wide)
    with pytest.raises(MoleTypeError, match="an ImageEncoder"):
        load_predictor(tmp_path, face=3)
    assert same(load_predictor(tmp_path, face=Frozen()), new_predictor(frozen=True))


def test_parts_that_do_not_fit_each_other_are_named():
    p, longer = new_predictor(), Manifest.of({"a": torch.ones(71)})
    with pytest.raises(MoleShapeError, match="autoencoder: length: expected 71, got 70"):
        Predictor(longer, p.autoencoder, p.features, p.denoiser, dict(p.own))
    with pytest.raises(MoleKeyError, match="face and image"):
        Predictor.new(MANIFEST, p.autoencoder, {"face": Frozen()})


def test_broken_folders_are_named(tmp_path):
    with pytest.raises(MoleFileError, match=r"a folder with a trained DiffLoRA model, got no model\.json"):
        load_predictor(tmp_path)
    save_predictor(tmp_path, new_predictor())
    path = tmp_path / "model.json"
    text, record = path.read_text(), json.loads(path.read_text())
    weights = tmp_path / record["weights"]

    def refused(change, error, words):
        changed = json.loads(text)
        change(changed)
        path.write_text(json.dumps(changed))
        with pytest.raises(error, match=words):
            load_predictor(tmp_path)
        path.write_text(text)

    refused(
        lambda r: r.update(format="mole-kernels-difflora-9"),
        MoleFileError,
        "expected format mole-kernels-difflora-1",
    )
    refused(lambda r: r.update(weights="../x"), MoleFileError, "its weights beside it")
    refused(lambda r: r["features"].pop("dim"), MoleFileError, "settings make no model")
    refused(lambda r: r["denoiser"].update(depth=2), MoleKeyError, "lacks denoiser.blocks.1")
    refused(lambda r: r["features"].update(hidden=9), MoleShapeError, r"features\.gate.*expected \[9")
    refused(lambda r: r.update(manifest={}), MoleFileError, "no layout of a LoRA vector")
    refused(lambda r: r["autoencoder"].update(length=71), MoleShapeError, "autoencoder: length")
    tensors, metadata = read_tensors(weights)
    tensors["latent_std"] += 1
    atomic_save(tensors, weights, metadata)
    with pytest.raises(MoleFileError, match=r"not the weights that model\.json was written with"):
        load_predictor(tmp_path)
    path.write_text("{")
    with pytest.raises(MoleFileError, match="is not JSON"):
        load_predictor(tmp_path)
