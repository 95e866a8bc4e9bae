"""Regions in five transformers of diffusers: who is reached by which text, batches, experts, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest
import torch

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.methods.mix_of_show.regions import Region
from mole_kernels.methods.mix_of_show.sampling import region_gates
from mole_kernels.methods.mix_of_show.transformers import EncodedText, regional_transformer
from mole_kernels.modules.scan import scan, sizes
from mole_kernels.patching.apply import patch

WIDTH, POOLED = 12, 20
LEFT, LOW = Region("left", box=(0, 0, 1, 0.5)), Region("low", box=(0.5, 0, 1, 1))


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=8,
    )


def flux():
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        axes_dims_rope=(2, 2, 4),
    )


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        guidance_embeds=False,
        axes_dims_rope=(8, 4, 4),
    )


def z_image():
    return diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )


def wan():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=20,
        num_layers=1,
    )


def run_sd3(model, args, B):
    return model(
        hidden_states=randn(B, 4, 8, 8),
        encoder_hidden_states=args["prompt_embeds"],
        pooled_projections=args["pooled_prompt_embeds"],
        timestep=torch.full((B,), 3.0),
    ).sample


def run_flux(model, args, B):
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    out = model(
        hidden_states=randn(B, 16, 4),
        encoder_hidden_states=args["prompt_embeds"],
        pooled_projections=args["pooled_prompt_embeds"],
        timestep=torch.full((B,), 0.5),
        img_ids=ids,
        txt_ids=torch.zeros(args["prompt_embeds"].shape[1], 3),
    ).sample
    return out.transpose(1, 2).unflatten(2, (4, 4))


def run_qwen(model, args, B):
    out = model(
        hidden_states=randn(B, 16, 16),
        encoder_hidden_states=args["prompt_embeds"],
        encoder_hidden_states_mask=args.get("prompt_embeds_mask"),
        timestep=torch.full((B,), 0.5),
        img_shapes=[[(1, 4, 4)]] * B,
    ).sample
    return out.transpose(1, 2).unflatten(2, (4, 4))


def run_z_image(model, args, B):
    x = randn(B, 4, 1, 8, 8)
    out = model(list(x), torch.full((B,), 0.5), list(args["prompt_embeds"]))
    return torch.stack(list(out.sample if hasattr(out, "sample") else out[0]))[:, :, 0]


def run_wan(model, args, B):
    return model(randn(B, 4, 2, 8, 8), torch.full((B,), 3), args["prompt_embeds"]).sample


FAMILIES = {
    "sd3": (sd3, run_sd3),
    "flux": (flux, run_flux),
    "qwen": (qwen, run_qwen),
    "z-image": (z_image, run_z_image),
    "wan": (wan, run_wan),
}
# texts without positions: then a text that stands behind another is as by itself
PLAIN = ("sd3", "flux", "wan")


def texts_of(prompts, regions, changed=()):
    """Random texts, of unlike lengths; those in `changed` are others."""
    texts = {}
    for p in range(prompts):
        for s in (None, *range(regions)):
            for half in ("prompt", "negative"):
                seed = 100 * p + 10 * (0 if s is None else s + 1) + (half == "negative")
                seed += 1000 * ((p, s, half) in changed)
                length = 3 + ((0 if s is None else s + 1) + p) % 3
                texts[p, s, half] = EncodedText(randn(length, WIDTH, seed=seed), randn(POOLED, seed=7 + p))
    return texts


def setup(name, prompts=1, regions=(LEFT, LOW), changed=(), **options):
    torch.manual_seed(0)
    make, run = FAMILIES[name]
    model = make().eval()
    pipe = SimpleNamespace(transformer=model, vae_scale_factor=8)
    lists = regions if regions and isinstance(regions[0], list) else list(regions)
    count = len(lists[0]) if isinstance(lists[0], list) else len(lists)
    options = {"height": 64, "width": 64, "frames": 5 if name == "wan" else 1} | options
    state = regional_transformer(
        pipe, ["whole"] * prompts, lists, texts=texts_of(prompts, count, changed), **options
    )
    return model, run, state


def drawn(name, **options):
    model, run, state = setup(name, **options)
    with torch.no_grad(), state:
        return run(model, state.arguments, len(state.prompts))


def places(changed):
    """Where in [..., 8, 8] or [..., 4, 4] an output differs, by places of 4 x 4."""
    flat = changed.flatten(0, -3).any(0)
    return flat if flat.shape == (4, 4) else flat.view(4, 2, 4, 2).permute(0, 2, 1, 3).flatten(2).any(2)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_one_layer_a_text_reaches_its_own_region_alone(name):
    """Places see one another as they were before the layer, so what a text does stays where it is seen."""
    base = drawn(name)
    left = torch.zeros(4, 4, dtype=torch.bool)
    left[:, :2] = True
    low = torch.zeros(4, 4, dtype=torch.bool)
    low[2:] = True
    for s, want in ((0, left), (1, low), (None, ~(left | low))):
        other = drawn(name, changed=[(0, s, "prompt")])
        assert torch.equal(places(other != base), want), (s, places(other != base))
    # the last region covers: nothing of the left text in the lower half
    over = [drawn(name, overlap="overwrite", changed=c) for c in ([], [(0, 0, "prompt")])]
    assert torch.equal(places(over[0] != over[1]), left & ~low)


@pytest.mark.parametrize("name", PLAIN)
def test_a_region_of_the_whole_picture_is_a_prompt_by_itself(name):
    model, run, state = setup(name, regions=(Region("all"),))
    alone = dict(state.arguments)
    alone["prompt_embeds"] = texts_of(1, 1)[0, 0, "prompt"].states[None]
    with torch.no_grad():
        want = run(model, alone, 1)
        with state:
            got = run(model, state.arguments, 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(run(model, alone, 1), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_of_prompts_with_regions_of_their_own_is_each_by_itself(name):
    lists = [[LEFT, LOW], [Region("x", box=(0, 0, 0.5, 1)), Region("y", box=(0.5, 0.5, 1, 1))]]
    model, run, state = setup(name, prompts=2, regions=lists)
    with torch.no_grad(), state:
        both = run(model, state.arguments, 2)
        rows = [
            {
                key: value[p : p + 1]
                for key, value in state.arguments.items()
                if not key.startswith("negative")
            }
            for p in range(2)
        ]
    every = texts_of(2, 2)
    for p in range(2):
        texts = {(0, s, half): text for (q, s, half), text in every.items() if q == p}
        pipe = SimpleNamespace(transformer=model, vae_scale_factor=8)
        alone = regional_transformer(
            pipe, ["whole"], lists[p], height=64, width=64, frames=5 if name == "wan" else 1, texts=texts
        )
        # as many tokens as the batch has, so that positions of texts are the same
        alone.lengths, alone._valid = state.lengths, state._valid[p : p + 1]
        noise = FAMILIES[name][1]
        with torch.no_grad(), alone:
            # the first sample's noise for both: compare the first prompt alone, the second by its own call
            if p == 0:
                torch.testing.assert_close(noise(model, rows[p], 1)[0], both[p], rtol=1e-4, atol=1e-5)
    assert both.isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_negative_texts_have_the_same_places_and_lengths(name):
    _, _, state = setup(name, prompts=2)
    positive, negative = state.arguments["prompt_embeds"], state.arguments["negative_prompt_embeds"]
    assert [tuple(row.shape) for row in positive] == [tuple(row.shape) for row in negative]
    assert not torch.equal(positive[0], negative[0])
    # region 1 of the second prompt has 3 tokens where the first's has 5
    assert state.lengths == [4, 5, 5] and state._valid.sum(1).tolist() == [3 + 4 + 5, 4 + 5 + 3]


@pytest.mark.parametrize("name", ["sd3", "z-image"])
def test_guidance_in_one_call_has_both_halves(name):
    _, _, state = setup(name, prompts=2)
    state.pipe.do_classifier_free_guidance = True
    assert state.prompt_of(8) == [0, 0, 1, 1, 0, 0, 1, 1]
    state.pipe.do_classifier_free_guidance = False
    assert state.prompt_of(4) == [0, 0, 1, 1]
    with pytest.raises(MoleStateError, match="pictures of 2 prompts"):
        state.prompt_of(3)


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_by_region_are_gates_by_place_and_by_text(name):
    torch.manual_seed(0)
    make, run = FAMILIES[name]
    model = make().eval()
    pipe = SimpleNamespace(transformer=model, vae_scale_factor=8)
    layers = {p: m for p, m in scan(model).layers.items() if ".attn" in p or "attention" in p}
    bank = ExpertBank.new({p: sizes(m) for p, m in layers.items()}, ["a", "b"], 2)
    regions = [
        Region("left", box=(0, 0, 1, 0.5), experts={"a": 1.0}),
        Region("right", box=(0, 0.5, 1, 1), experts={"b": 0.5}),
    ]
    with patch(model, bank, gates=region_gates) as handle:
        state = regional_transformer(
            pipe,
            ["whole"],
            regions,
            height=64,
            width=64,
            frames=5 if name == "wan" else 1,
            handle=handle,
            texts=texts_of(1, 2),
        )
        with torch.no_grad(), state:
            run(model, state.arguments, 1)
            gates = {path: layer.gate.given[0] for path, layer in handle.layers.items()}
        assert all(torch.equal(m.gate.given, torch.ones(1, 1, 2)) for m in handle.layers.values())
        count = state.table.shape[2]
        left = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.5], [0.0, 0.5]]).repeat(count // 4, 1)
        whole, first, second = ([[1.0, 1.0]], [[1.0, 0.0]], [[0.0, 0.5]])
        lengths = state.lengths
        text = torch.tensor(whole * lengths[0] + first * lengths[1] + second * lengths[2])
        kinds = set()
        for gate in gates.values():
            if len(gate) == len(text):
                torch.testing.assert_close(gate, text)
                kinds.add("text")
            elif len(gate) == count:
                torch.testing.assert_close(gate, left)
                kinds.add("places")
            elif name == "z-image":
                # places or texts, and what fills them up to 32, or both
                start = 32 if len(gate) == 64 else 0
                is_text = torch.equal(gate[start : start + len(text)], text)
                assert is_text or torch.equal(gate[:count], left)
                kinds |= {"text"} if is_text else {"places"}
                if len(gate) == 64:
                    torch.testing.assert_close(gate[:count], left)
                    kinds.add("joint")
        assert kinds >= ({"text", "places", "joint"} if name == "z-image" else {"text", "places"})
        with pytest.raises(MoleKeyError, match="experts among a, b"):
            regional_transformer(
                pipe,
                ["x"],
                [Region("x", experts={"c": 1.0})],
                height=64,
                width=64,
                handle=handle,
                texts=texts_of(1, 1),
            )


def test_what_is_wrong_is_named_and_nothing_stays():
    pipe = SimpleNamespace(transformer=sd3(), vae_scale_factor=8)
    options = {"height": 64, "width": 64, "texts": texts_of(2, 2)}
    for call, error, match in (
        (
            lambda: regional_transformer(SimpleNamespace(), ["x"], [LEFT], **options),
            MoleTypeError,
            "SD3Transf",
        ),
        (lambda: regional_transformer(pipe, ["x"], [], **options), MoleTypeError, "at least one region"),
        (lambda: regional_transformer(pipe, ["x"], [[LEFT], [LOW]], **options), MoleValueError, "each of 1"),
        (
            lambda: regional_transformer(pipe, ["x", "y"], [[LEFT], [LOW, LEFT]], **options),
            MoleValueError,
            "each of 2",
        ),
        (lambda: regional_transformer(pipe, ["x"], [["no"]], **options), MoleTypeError, "something else"),
        (
            lambda: regional_transformer(pipe, ["x"], [LEFT], **(options | {"height": 60})),
            MoleValueError,
            "multiples of 16",
        ),
    ):
        with pytest.raises(error, match=match):
            call()
    layers = {p: m for p, m in scan(pipe.transformer).layers.items() if ".attn" in p}
    bank = ExpertBank.new({p: sizes(m) for p, m in layers.items()}, ["a"], 2)
    with patch(pipe.transformer, bank) as handle, pytest.raises(MoleStateError, match="gates=region_gates"):
        regional_transformer(pipe, ["x"], [LEFT], handle=handle, **options)
    model, _, state = setup("sd3")
    # an error inside the transformer takes the mask off too
    with state, pytest.raises(Exception, match=r"."):
        model(hidden_states=None)
    assert state._mode is None and not model._forward_pre_hooks and not model._forward_hooks
