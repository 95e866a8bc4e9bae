"""DiffLoRA's parts by their works-criteria: layout, autoencoder, features, denoiser, sampling."""

from __future__ import annotations

import json

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
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.methods.difflora.autoencoder import (
    AutoencoderConfig,
    LoRAAutoencoder,
    weight_preserved_loss,
)
from mole_kernels.methods.difflora.denoiser import DenoiserConfig, DiTBlock, LoRADenoiser
from mole_kernels.methods.difflora.diffusion import noise_schedule, sample_latents, x0_loss
from mole_kernels.methods.difflora.features import (
    ClipImages,
    InsightFaces,
    MixedImageFeatures,
    SmallImages,
)
from mole_kernels.methods.difflora.manifest import Manifest
from mole_kernels.patching.apply import patch
from tests.tiny_models import make_expert, run_unet, tiny_unet


def lora(seed: int = 0) -> dict[str, torch.Tensor]:
    """Mixed ranks, a 3x3 and a 1x1 convolution, three dtypes, one empty tensor."""
    g = torch.Generator().manual_seed(seed)
    shapes = {
        "a.down": ((4, 7), torch.float32),
        "a.up": ((5, 4), torch.float32),
        "b.down": ((16, 3, 3, 3), torch.bfloat16),
        "b.up": ((6, 16, 1, 1), torch.float16),
        "none": ((0, 3), torch.float32),
        "alpha": ((), torch.float32),
    }
    return {
        name: (torch.randn(shape, generator=g) * 10 ** (3 * i - 6)).to(dtype)
        for i, (name, (shape, dtype)) in enumerate(shapes.items())
    }


# -- the layout
# ----------------------------------------------------------------------------------------------------------------------


def test_flatten_and_back_is_bit_exact_scaled_or_not():
    tensors = lora()
    for manifest in (Manifest.of(tensors), Manifest.of(tensors).fit([tensors, lora(1)])):
        again = Manifest.from_json(manifest.to_json())
        vector = manifest.flatten(dict(reversed(tensors.items())))
        assert vector.shape == (manifest.length,) and again == manifest
        back = again.unflatten(vector)
        assert list(back) == list(tensors)
        assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())
    parts = [vector[e.offset : e.offset + e.size].abs().max() for e in manifest.entries if e.size]
    assert all(top < 1 for top in parts) and max(parts) >= 0.5


def test_an_expert_comes_back_bit_for_bit_and_fits_its_base():
    unet = tiny_unet()
    expert = make_expert(unet, rank=3)
    manifest = Manifest.of_expert(expert)
    back = manifest.expert(manifest.flatten_expert(expert))
    for path, factor in expert.layers.items():
        got = back.layers[path]
        assert (
            torch.equal(got.down, factor.down)
            and torch.equal(got.up, factor.up)
            and (got.scale, got.conv) == (factor.scale, factor.conv)
        )
    manifest.check_base(unet)
    path = next(iter(expert.layers))
    wide = Manifest.of_expert(Expert({path: LowRank(torch.ones(1, 99), torch.ones(8, 1))}))
    with pytest.raises(MoleShapeError, match=r"1 layers have other sizes: .*8x99 here"):
        wide.check_base(unet)
    with pytest.raises(MoleKeyError, match="1 of its 1 layers are not in the model: nowhere"):
        Manifest.of_expert(Expert({"nowhere": LowRank(torch.ones(1, 2), torch.ones(2, 1))})).check_base(unet)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda t: t.pop("a.up"), MoleKeyError, r"lacks a\.up"),
        (lambda t: t.update(extra=torch.ones(1)), MoleKeyError, "has extra too"),
        (
            lambda t: t.update({"a.up": torch.ones(5, 3)}),
            MoleShapeError,
            r"a\.up: expected \[5, 4\] float32, got \[5, 3\]",
        ),
        (lambda t: t.update({"a.up": torch.ones(5, 4).bfloat16()}), MoleShapeError, "got .*bfloat16"),
    ],
)
def test_tensors_of_another_lora_are_named(change, error, words):
    manifest, tensors = Manifest.of(lora()), lora(1)
    change(tensors)
    with pytest.raises(error, match=words):
        manifest.flatten(tensors)


def test_bad_layouts_and_vectors_are_named():
    manifest = Manifest.of(lora())
    vector = manifest.flatten(lora())
    vector[30] = torch.nan
    with pytest.raises(MoleValueError, match=r"got nan in a\.up"):
        manifest.unflatten(vector)
    with pytest.raises(MoleShapeError, match=r"a vector \["):
        manifest.unflatten(vector[1:])
    with pytest.raises(MoleTypeError, match="float64"):
        Manifest.of({"x": torch.ones(1, dtype=torch.float64)})
    held = json.loads(manifest.to_json())
    with pytest.raises(MoleFileError, match="version 1, got 2"):
        Manifest.from_json(json.dumps(held | {"version": 2}))
    held["entries"][1]["offset"] += 1
    with pytest.raises(MoleFileError, match=r"a\.up: its place does not follow"):
        Manifest.from_json(json.dumps(held))
    for text in ("", "[]", '{"version": 1}'):
        with pytest.raises(MoleFileError):
            Manifest.from_json(text)
    expert = Expert({"a": LowRank(torch.ones(1, 2), torch.ones(2, 1), 0.5)})
    with pytest.raises(MoleValueError, match=r"the layout's scale 0\.5, got 1"):
        Manifest.of_expert(expert).flatten_expert(
            Expert({"a": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)})
        )


# -- the autoencoder
# -----------------------------------------------------------------------------------------------------------------


def test_the_default_compresses_as_the_paper_says():
    config = AutoencoderConfig(372_320)
    assert 250 <= config.ratio <= 310 and config.latent_length == 1455
    small = AutoencoderConfig(100_000)
    assert 250 <= small.ratio <= 310


@pytest.mark.parametrize("length", [256, 257, 1000, 1])
def test_any_length_is_kept(length):
    torch.manual_seed(0)
    model = LoRAAutoencoder(AutoencoderConfig(length, channels=(4, 4, 4, 4)))
    vectors = torch.randn(2, length)
    latents = model.encode(vectors)
    assert latents.shape == (2, 1, -(-length // 256)) and latents.abs().max() <= 1
    assert model(vectors).shape == vectors.shape
    with pytest.raises(MoleShapeError, match=rf"vectors \[B,{length}\]"):
        model(vectors[:, 1:] if length > 1 else torch.ones(2, 3))


def train(model, vectors, steps, strength=1.0, lr=3e-3):
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 20) * (1 - step / steps)
        loss = weight_preserved_loss(model(vectors), vectors, strength)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
        losses.append(loss.item())
    return losses


def test_four_loras_are_overfitted_a_hundredfold():
    torch.manual_seed(0)
    vectors = torch.randn(4, 512) * 0.3
    model = LoRAAutoencoder(AutoencoderConfig(512, channels=(32, 32, 32, 32)))
    losses = train(model, vectors, 120, lr=5e-3)
    assert losses[0] / losses[-1] >= 100, (losses[0], losses[-1])


def test_large_weights_are_kept_better_where_the_loss_prefers_them():
    torch.manual_seed(0)
    # heavy tails, as in a LoRA: cubes of normal numbers
    vectors = torch.randn(8, 768).pow(3) * 0.1
    errors = {}
    for strength in (0.0, 4.0):
        torch.manual_seed(1)
        model = LoRAAutoencoder(AutoencoderConfig(768, channels=(16, 16, 16, 16)))
        train(model, vectors, 60, strength, lr=5e-3)
        with torch.no_grad():
            error = model(vectors) - vectors
        top = vectors.abs() >= vectors.abs().flatten().quantile(0.99)
        errors[strength] = (error[top].norm() / vectors[top].norm()).item()
    assert errors[4.0] < errors[0.0], errors


def test_the_loss_without_preference_is_the_mse_and_its_gradient_is_right():
    w, x = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.equal(weight_preserved_loss(x, w, 0.0), torch.nn.functional.mse_loss(x, w))
    for strength, power in ((1.0, 1.0), (3.0, 2.0)):
        assert torch.autograd.gradcheck(
            lambda r, s=strength, p=power: weight_preserved_loss(r, w, s, p), (x,)
        )
        scale = 1 + strength * w.abs() ** power / (w.abs() ** power).mean()
        torch.testing.assert_close(
            weight_preserved_loss(x, w, strength, power), (scale * (x - w) ** 2).mean()
        )
    with pytest.raises(MoleValueError, match="strength >= 0"):
        weight_preserved_loss(x, w, -1.0)


def test_noise_comes_from_the_generator_alone_and_bad_latents_are_refused():
    torch.manual_seed(0)
    model = LoRAAutoencoder(AutoencoderConfig(600, channels=(4, 4)))
    vectors = torch.randn(2, 600)
    first, again, clean = (
        model(vectors, g) for g in (torch.Generator().manual_seed(3), torch.Generator().manual_seed(3), None)
    )
    assert torch.equal(first, again) and not torch.equal(first, clean)
    latents = model.encode(vectors)
    latents[0, 0, 0] = torch.nan
    with pytest.raises(MoleValueError, match="finite latents"):
        model.decode(latents)


# -- mixed image features
# ------------------------------------------------------------------------------------------------------------


def test_gate_weights_sum_to_one_and_a_branch_that_is_off_gives_the_other():
    torch.manual_seed(0)
    mix = MixedImageFeatures(6, 10, 4)
    face, image = torch.randn(3, 6), torch.randn(3, 10)
    torch.testing.assert_close(mix.weights(face, image).sum(-1), torch.ones(3))
    for branch, other, x in ((0, mix.image, image), (1, mix.face, face)):
        with torch.no_grad():
            mix.gate[-1].weight.zero_()
            mix.gate[-1].bias.copy_(torch.tensor([-1e4 if branch == 0 else 1e4, 0.0]))
        torch.testing.assert_close(mix(face, image), other(x))


def test_the_order_of_the_references_does_not_matter():
    torch.manual_seed(0)
    mix = MixedImageFeatures(6, 10, 4)
    face, image, order = torch.randn(2, 5, 6), torch.randn(2, 5, 10), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(mix(face, image), mix(face[:, order], image[:, order]))
    torch.testing.assert_close(mix(face[:, :1], image[:, :1]), mix(face[:, 0], image[:, 0]))
    with pytest.raises(MoleShapeError, match=r"face \[B,6\]"):
        mix(torch.randn(2, 7), image[:, 0])


def test_a_clip_model_and_the_small_encoder_read_pictures():
    from PIL import Image
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=12,
    )
    pictures = [Image.new("RGB", (20, 30), (i * 80, 10, 200)) for i in range(3)] + [
        Image.new("L", (16, 16), 7)
    ]
    for encoder in (ClipImages(CLIPVisionModelWithProjection(config)), SmallImages(dim=12, channels=8)):
        features = encoder(pictures)
        assert (
            features.shape == (4, encoder.dim)
            and encoder.dim == 12
            and not torch.allclose(features[0], features[1])
        )
    with pytest.raises(MoleFileError, match="a folder with a CLIP vision model"):
        ClipImages("nowhere")


def test_without_its_package_the_face_encoder_says_what_to_install():
    with pytest.raises(MoleStateError, match="insightface is not installed"):
        InsightFaces("nowhere")


# -- the denoiser
# --------------------------------------------------------------------------------------------------------------------


def test_a_new_block_is_the_identity():
    torch.manual_seed(0)
    block = DiTBlock(24, 3, 8, 2.0)
    h = torch.randn(2, 5, 24)
    assert torch.equal(block(h, torch.randn(2, 24)), h)


def test_the_papers_width_runs_and_any_length():
    torch.manual_seed(0)
    config = DenoiserConfig(1, 100, 8, depth=1)
    assert (config.width, config.head_dim, DenoiserConfig(1, 1454, 8).depth) == (1454, 96, 16)
    model = LoRADenoiser(config)
    x = torch.randn(2, 1, 100)
    assert torch.equal(model(x, torch.tensor([3, 900]), torch.randn(2, 8)), torch.zeros_like(x))
    odd = LoRADenoiser(DenoiserConfig(2, 13, 4, depth=1, width=30, heads=4, patch=5))
    torch.nn.init.normal_(odd.out.weight)
    assert odd(torch.randn(3, 2, 13), torch.tensor(5), None).shape == (3, 2, 13)
    with pytest.raises(MoleShapeError, match=r"x \[B,1,100\]"):
        model(torch.randn(2, 1, 99), torch.tensor(0), None)
    with pytest.raises(MoleShapeError, match=r"condition \[2,8\]"):
        model(x, torch.tensor(0), torch.randn(2, 9))


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_with_a_perfect_predictor_sampling_returns_the_target(kind):
    target = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(1))
    got = sample_latents(
        lambda x, t, c: target, noise_schedule(kind), torch.zeros(3, 4), (2, 7), steps=8, guidance=3.0
    )
    torch.testing.assert_close(got, target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["ddim", "dpm"])
def test_sampling_is_deterministic_by_person(kind):
    torch.manual_seed(0)
    model = LoRADenoiser(DenoiserConfig(1, 20, 4, depth=2, width=24, heads=2, patch=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    condition = torch.randn(3, 4)
    scheduler = noise_schedule(kind)
    draws = [
        sample_latents(model, scheduler, condition, (1, 20), steps=5, guidance=2.0, seed=s) for s in (7, 7, 8)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.allclose(draws[0], draws[2])
    # person 0 alone has the noise that they had among three
    alone = sample_latents(model, scheduler, condition[:1], (1, 20), steps=5, guidance=2.0, seed=7)
    torch.testing.assert_close(alone[0], draws[0][0], rtol=1e-4, atol=1e-4)
    unguided = sample_latents(model, scheduler, condition, (1, 20), steps=5, guidance=1.0, seed=7)
    assert not torch.allclose(unguided, draws[0])


def test_the_loss_is_that_of_the_formula_and_drops_conditions():
    torch.manual_seed(0)
    model = LoRADenoiser(DenoiserConfig(1, 12, 4, depth=1, width=16, heads=2, patch=4))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    scheduler, x0, condition = noise_schedule(), torch.randn(6, 1, 12), torch.randn(6, 4)
    for drop, shown in ((0.0, condition), (1.0, None)):
        got = x0_loss(model, scheduler, x0, condition, torch.Generator().manual_seed(2), drop)
        g = torch.Generator().manual_seed(2)
        t, noise = torch.randint(0, 1000, (6,), generator=g), torch.randn(x0.shape, generator=g)
        alpha = scheduler.alphas_cumprod[t][:, None, None]
        want = (model(alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, t, shown) - x0).square().mean()
        torch.testing.assert_close(got, want)
    loss = x0_loss(model, scheduler, x0, condition, torch.Generator().manual_seed(2), 0.5)
    (null,) = torch.autograd.grad(loss, [model.null])
    assert null.norm() > 0


# -- what comes out
# ------------------------------------------------------------------------------------------------------------------


def test_a_decoded_lora_applied_is_the_merged_one_and_taken_off_leaves_the_base():
    torch.manual_seed(0)
    unet = tiny_unet()
    manifest = Manifest.of_expert(make_expert(unet, rank=2))
    model = LoRAAutoencoder(AutoencoderConfig(manifest.length, channels=(4, 4)))
    with torch.no_grad():
        expert = manifest.expert(model.decode(torch.rand(1, 1, model.config.latent_length))[0])
    base = run_unet(unet)
    with patch(unet, {"person": expert}):
        unmerged = run_unet(unet)
    assert torch.equal(run_unet(unet), base) and not torch.allclose(unmerged, base, atol=1e-4)
    for path, factor in expert.layers.items():
        weight = unet.get_submodule(path).weight
        weight.data += factor.delta().reshape(weight.shape)
    torch.testing.assert_close(run_unet(unet), unmerged, rtol=1e-5, atol=1e-5)
