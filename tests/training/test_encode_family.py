"""Pictures and captions as each pipeline takes them: its own decoding and its own call undo what is encoded."""

import diffusers
import pytest
import torch

from mole_kernels.errors import MoleTypeError
from mole_kernels.training.cached import encoder_of
from mole_kernels.training.encode_family import padded, prompt_names
from mole_kernels.training.families.family import Family
from tests.training.pipelines import flux_pipeline, sd3_pipeline
from tests.training.tiny_families import FAMILIES

VIDEO_VAE = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 0.5, 2.0, 1.0],
}


def with_vae(name, vae):
    """A tiny family's pipeline, with a VAE of its kind."""
    tiny = next(t for t in FAMILIES if t.id == name)
    pipe = tiny.make()
    torch.manual_seed(0)
    pipe.register_modules(vae=vae.eval().requires_grad_(False))
    return type(pipe)(**pipe.components), tiny


PIPES = {
    "sd3": lambda: (sd3_pipeline(), None),
    "flux": lambda: (flux_pipeline(), None),
    "wan": lambda: with_vae("wan", diffusers.AutoencoderKLWan(**VIDEO_VAE)),
    "qwen-image": lambda: with_vae("qwen-image", diffusers.AutoencoderKLQwenImage(**VIDEO_VAE)),
}


class DecodedError(Exception):
    """Carries what a pipeline hands to its VAE."""


@pytest.mark.parametrize("name", list(PIPES))
def test_the_pipelines_own_decoding_undoes_the_latents(name):
    pipe, tiny = PIPES[name]()
    encoder = encoder_of(pipe)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encoder.latents(pixels)
    family = Family(pipe)
    assert latents.shape[-1] == 32 // encoder.factor and latents.shape[1] == encoder.channels

    # a sampler that leaves latents as they are
    step = {"step": lambda self, output, t, sample, **_: (sample,)}
    pipe.scheduler.__class__ = type("Still", (type(pipe.scheduler),), step)
    seen = {}

    def decode(z, *_, **__):
        seen["z"] = z
        raise DecodedError

    pipe.vae.decode = decode
    texts = encoder.text(["one", "two"]) if tiny is None else family.conditions(tiny.batch())
    arguments = family.arguments(latents, texts)
    with pytest.raises(DecodedError):
        pipe(**(arguments | {"output_type": "pil"}))
    inputs = pixels[:, :, None] if name in ("wan", "qwen-image") else pixels
    torch.testing.assert_close(seen["z"], pipe.vae.encode(inputs).latent_dist.mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_texts_are_what_the_pipeline_encodes(name):
    pipe, _ = PIPES[name]()
    texts = encoder_of(pipe).text(["one two", "three"])
    assert list(texts) == ["prompt_embeds", "pooled_prompt_embeds"]
    captions = {"prompt": ["one two", "three"], "prompt_2": None}
    if name == "sd3":
        captions |= {"prompt_3": None, "do_classifier_free_guidance": False}
    states = pipe.encode_prompt(**captions)
    assert torch.equal(texts["prompt_embeds"], states[0])
    assert torch.equal(texts["pooled_prompt_embeds"], states[2 if name == "sd3" else 1])


def test_every_familys_prompt_has_names_that_its_call_takes():
    """What a batch holds beside latents comes out of `encode_prompt`, but for masks that are made here."""
    for tiny in FAMILIES:
        pipe = tiny.make()
        if Family(pipe).row.patched > 1:
            continue
        names = prompt_names(pipe)
        made_here = {"prompt_embeds_mask"} if tiny.id == "z-image" else set()
        assert set(tiny.texts) - made_here <= set(names), (tiny.id, names)


def test_texts_of_unlike_length_get_a_mask():
    states = [torch.ones(2, 3), torch.ones(4, 3)]
    texts = padded("prompt_embeds", states)
    assert texts["prompt_embeds"].shape == (2, 4, 3) and texts["prompt_embeds"][0, 2:].abs().sum() == 0
    assert texts["prompt_embeds_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_what_the_vae_does_not_make_alone_is_refused():
    for name in ("flux2", "cogvideox"):
        tiny = next(t for t in FAMILIES if t.id == name)
        pipe = tiny.make()
        pipe.vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        with pytest.raises(MoleTypeError, match="make the latents yourself"):
            encoder_of(pipe)
