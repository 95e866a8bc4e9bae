"""What ships works: the pipeline draws, the reader reads, the weights are small and in safetensors."""

import pytest
import torch
from torch import Generator

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")

from mole_kernels.demo import classifier, data, evaluate
from mole_kernels.demo.model import ASSETS, PARTS, build_tokenizer, load_pipeline, read_facts


@pytest.fixture(scope="module")
def pipe():
    return load_pipeline()


def test_assets_are_small_and_hold_no_pickle():
    files = [f for f in ASSETS.iterdir() if f.is_file()]
    assert {f.suffix for f in files} <= {".safetensors", ".json"}
    assert {f"{part}.safetensors" for part in (*PARTS, "reader", "mixture")} <= {f.name for f in files}
    assert sum(f.stat().st_size for f in files) <= 8 * 2**20


def test_the_tokenizer_gives_every_word_one_token():
    tokenizer = build_tokenizer()
    for word in (*data.WORDS, data.BLANK):
        assert len(tokenizer(word)["input_ids"]) == 3, word
    ids = tokenizer(["three blank seven", ""], padding="max_length", truncation=True)["input_ids"]
    assert [len(row) for row in ids] == [5, 5]
    assert tokenizer.decode(ids[0], skip_special_tokens=True).split() == ["three", "blank", "seven"]


def test_the_pipeline_is_made_of_real_parts_and_frozen(pipe):
    assert (
        type(pipe).__name__ == "StableDiffusionPipeline"
        and type(pipe.unet).__name__ == "UNet2DConditionModel"
    )
    for part in PARTS:
        module = getattr(pipe, part)
        assert not module.training and not any(p.requires_grad for p in module.parameters())


def test_the_pipeline_draws_the_same_pictures_twice(pipe):
    one, two = (
        evaluate.generate_pictures(pipe, ["three blank seven", "blank one blank"], seed=1, steps=3)
        for _ in range(2)
    )
    assert one.shape == (2, 3, data.HEIGHT, data.WIDTH) and torch.equal(one, two)
    assert torch.isfinite(one).all() and one.min() >= -1 and one.max() <= 1


def test_the_pipeline_works_by_its_own_defaults(pipe):
    picture = pipe("five six nine", num_inference_steps=2, generator=Generator().manual_seed(0)).images[0]
    assert picture.size == (data.WIDTH, data.HEIGHT)


def test_the_autoencoder_keeps_held_out_scenes(pipe):
    pixels = data.scenes(data.load_split("held"), 32, Generator().manual_seed(5)).pixels
    latents = evaluate.encode_pictures(pipe, pixels)
    back = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    assert (back - pixels).square().mean() < 4 / 10**2.8
    assert 0.7 < latents.std() < 1.4


def test_the_reader_reads_held_out_scenes():
    made = data.scenes(data.load_split("held"), 300, Generator().manual_seed(6))
    found = classifier.accuracy(classifier.read(classifier.load_reader(), made.pixels), made.labels)
    assert (
        found["digits"] >= 0.97 and found["low"] >= 0.95 and found["high"] >= 0.95 and found["blank"] >= 0.97
    )


def test_the_base_is_weak_but_not_lost():
    facts = read_facts()
    assert facts["base_loss"][1] < 0.6 * facts["base_loss"][0]
    assert facts["reader_weak"]["digits"] < facts["reader_sharp"]["digits"] - 0.1


def test_the_base_follows_its_captions(pipe):
    """Blank slots are blank, and digits are right far more often than one in ten; a broken asset fails
    this.
    """
    captions = [
        "zero blank seven",
        "blank three blank",
        "six one blank",
        "five blank four",
        "eight nine two",
        "blank blank zero",
    ]
    found = evaluate.read_back(
        classifier.load_reader(), evaluate.generate_pictures(pipe, captions, seed=2, steps=12), captions
    )
    assert found["blank"] >= 0.8 and found["digits"] >= 0.25
