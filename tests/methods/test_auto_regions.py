"""Gates found while drawing: on the digits they find their cards; on tiny models every layer gets its own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.methods.auto_regions import MaskSettings, automatic_regions, found_gates, soft_masks
from mole_kernels.modules.scan import scan, sizes
from mole_kernels.patching.apply import patch
from tests.training.pipelines import sd_pipeline, sdxl_pipeline

PROMPTS = ["three five", "five one"]
WORDS = {"a": ["three", "one"], "b": ["five"]}
OPTIONS = {"height": 16, "width": 16, "output_type": "latent"}


def experts(model, paths=None):
    layers = {p: m for p, m in scan(model).layers.items() if paths is None or paths(p)}
    torch.manual_seed(0)
    bank = ExpertBank.new({p: sizes(m) for p, m in layers.items()}, ["a", "b"], 2)
    for expert in bank.experts.values():
        for layer in expert.layers.values():
            torch.nn.init.normal_(layer.up, std=0.3)
    return bank


def draw(pipe, prompts, steps=4, **options):
    generator = torch.Generator().manual_seed(0)
    return pipe(prompts, num_inference_steps=steps, generator=generator, **(OPTIONS | options)).images


def test_on_the_digits_gates_find_their_cards_and_leave_the_others():
    pytest.importorskip("sklearn")
    import torch.nn.functional as F

    from mole_kernels.demo import data, evaluate
    from mole_kernels.demo.model import MIXTURE, load_pipeline
    from mole_kernels.io.bank import load_bank

    pipe, n = load_pipeline(), 48
    held = evaluate.make_held_out(pipe, n)
    scenes = data.scenes(data.load_split("held"), n, torch.Generator().manual_seed(99))
    digits = [i for i, text in enumerate(scenes.captions) if set(text.split()) != {"blank"}]
    captions = [scenes.captions[i] for i in digits]
    bank = load_bank(MIXTURE)
    bank = bank[0] if isinstance(bank, tuple) else bank
    words = {"low": data.WORDS[:5], "high": data.WORDS[5:]}
    with (
        torch.no_grad(),
        patch(pipe, bank, gates=found_gates) as handle,
        automatic_regions(pipe, handle, captions, words) as found,
    ):
        for time in (750, 500, 300):
            t = torch.full((len(digits),), time)
            noisy = pipe.scheduler.add_noise(held.latents[digits], held.noise[0][digits], t)
            pipe.unet(noisy, t, encoder_hidden_states=held.text[digits])
        masks = found.masks
    boxes = held.boxes[digits]
    for rest, other in evaluate._scores(masks, boxes):
        assert rest >= 0.90 and other >= 0.99
    cover = F.adaptive_avg_pool2d(boxes, (6, 18)) > 0.5
    for e in (0, 1):
        own, others = masks[:, e][cover[:, e]].mean(), masks[:, e][cover[:, 1 - e]].mean()
        # the plain sum has 1 everywhere
        assert others <= 0.10 and own >= 0.90


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_first_steps_are_the_plain_sum_and_the_rest_have_masks(kind, guidance):
    pipe = {"sd": sd_pipeline, "sdxl": sdxl_pipeline}[kind]()
    options = {"guidance_scale": guidance, "negative_prompt": ["one", "one"], "num_images_per_prompt": 2}
    bank = experts(pipe.unet)
    with patch(pipe.unet, bank, gates=found_gates) as handle:
        plain = {steps: draw(pipe, PROMPTS, steps, **options) for steps in (1, 4)}
        with automatic_regions(pipe, handle, PROMPTS, WORDS, MaskSettings(steps=1)) as found:
            torch.testing.assert_close(draw(pipe, PROMPTS, 1, **options), plain[1])
            assert found.masks is None
            drawn = draw(pipe, PROMPTS, 4, **options)
            masks, gates = found.masks, {p: m.gate.given for p, m in handle.layers.items()}
            # another drawing begins anew
            torch.testing.assert_close(draw(pipe, PROMPTS, 4, **options), drawn)
        assert not torch.allclose(drawn, plain[4], atol=1e-3)
        assert masks.shape[:2] == (4, 2) and (masks.sum(1) <= 1 + 1e-5).all() and masks.min() >= 0
        rows = 8 if guidance > 1 else 4
        for path, gate in gates.items():
            if path.endswith(("attn2.to_k", "attn2.to_v")):
                assert gate.shape == (rows, 5, 2)
                # BOS shared, "three" a's, "five" b's; in the second prompt the other way round
                want = torch.tensor([[0.5, 0.5], [1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]])
                torch.testing.assert_close(gate[0], want)
                torch.testing.assert_close(gate[rows - 1], want[[0, 2, 1, 3, 4]])
            elif gate.shape[1] > 1:
                # uncond and cond halves alike; places of the finest grid are the masks
                torch.testing.assert_close(gate[:4], gate[rows - 4 :])
                if gate.shape[1] == masks[0, 0].numel():
                    torch.testing.assert_close(gate[:4], masks.flatten(2).transpose(1, 2))
        assert all(torch.equal(m.gate.given, torch.ones(1, 1, 2)) for m in handle.layers.values())
        torch.testing.assert_close(draw(pipe, PROMPTS, 4, **options), plain[4])
    assert not any(m._forward_pre_hooks for m in pipe.unet.modules())


def test_an_expert_whose_words_are_not_in_a_prompt_does_not_act():
    pipe = sd_pipeline()
    with patch(pipe.unet, experts(pipe.unet), gates=found_gates) as handle:
        with automatic_regions(pipe, handle, ["five five", "three"], WORDS, MaskSettings(steps=1)) as found:
            draw(pipe, ["five five", "three"], 2)
        assert (found.masks[0, 0] == 0).all() and (found.masks[1, 1] == 0).all()
        assert found.masks[0, 1].max() > 0.5 and found.masks[1, 0].max() > 0.5


def test_masks_by_the_formula():
    g = torch.Generator().manual_seed(0)
    maps, settings = (
        torch.rand(2, 3, 5, 7, generator=g),
        MaskSettings(smooth=0, temperature=0.3, background=0.4),
    )
    got = soft_masks(maps, settings)
    for b in range(2):
        scaled = [maps[b, e] / maps[b, e].max() for e in range(3)]
        total = math.exp(0.4 / 0.3) + sum((m / 0.3).exp() for m in scaled)
        for e in range(3):
            torch.testing.assert_close(got[b, e], (scaled[e] / 0.3).exp() / total)
    # smoothing keeps a constant map and spreads a point, by as much on both sides
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    spread = soft_masks(point, MaskSettings(smooth=1.0, temperature=0.5, background=0.0))[0, 0]
    assert spread[4, 4] > spread[4, 5] > spread[4, 7]
    torch.testing.assert_close(spread, spread.flip(0).flip(1))
    outside = soft_masks(maps, MaskSettings(smooth=0, background=5.0, outside=0.25))
    torch.testing.assert_close(outside, torch.full_like(outside, 0.25), atol=1e-4, rtol=0)


def test_joint_attention_of_sd3_is_read_too():
    """The real transformer of Stable Diffusion 3: a stream of its own for CLIP's tokens and then T5's."""
    from tests.peft_models import tiny_sd3

    model = tiny_sd3()
    tokenizer = sd_pipeline().tokenizer
    pipe = SimpleNamespace(
        transformer=model, tokenizer=tokenizer, tokenizer_3=tokenizer, do_classifier_free_guidance=False
    )
    bank = experts(model, lambda p: p.endswith(("attn.to_q", "attn.add_q_proj", "ff.net.2")))
    config, g = model.config, torch.Generator().manual_seed(0)
    side = config.sample_size
    with (
        torch.no_grad(),
        patch(model, bank, gates=found_gates) as handle,
        automatic_regions(pipe, handle, ["three five"], WORDS, MaskSettings(steps=1)) as found,
    ):
        for t in (900.0, 500.0):
            model(
                hidden_states=torch.randn(1, config.in_channels, side, side, generator=g),
                # five tokens of CLIP, and seven of a T5 that pads further than its tokenizer says
                encoder_hidden_states=torch.randn(1, 12, config.joint_attention_dim, generator=g),
                pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=g),
                timestep=torch.tensor([t]),
            )
        gates = {p: m.gate.given for p, m in handle.layers.items()}
    places = (side // config.patch_size) ** 2
    assert found.masks.shape[:2] == (1, 2) and found.masks[0, 0].numel() == places
    half, a, b = [0.5, 0.5], [1.0, 0.0], [0.0, 1.0]
    for path, gate in gates.items():
        assert gate.shape == (1, 12 if "add_q" in path else places, 2)
        if "add_q" in path:
            want = torch.tensor([half, a, b, half, half, half, a, b, half, half, half, half])
            torch.testing.assert_close(gate[0], want)


def test_flux_reads_in_its_double_blocks_and_gates_its_single_ones():
    """In single blocks the text stands before the places, in one sequence."""
    from tests.tiny_models import tiny_flux

    model, tokenizer = tiny_flux(), sd_pipeline().tokenizer
    pipe = SimpleNamespace(transformer=model, tokenizer=tokenizer, tokenizer_2=tokenizer)
    bank = experts(model, lambda p: p.endswith(("attn.to_q", "attn.add_q_proj")))
    config, g = model.config, torch.Generator().manual_seed(0)
    ids = torch.zeros(6, 3)
    ids[:, 1], ids[:, 2] = torch.arange(6) // 3, torch.arange(6) % 3
    with (
        torch.no_grad(),
        patch(model, bank, gates=found_gates) as handle,
        automatic_regions(pipe, handle, ["three five"], WORDS, MaskSettings(steps=1)) as found,
    ):
        for t in (0.9, 0.5):
            model(
                hidden_states=torch.randn(1, 6, config.in_channels, generator=g),
                encoder_hidden_states=torch.randn(1, 5, config.joint_attention_dim, generator=g),
                pooled_projections=torch.randn(1, config.pooled_projection_dim, generator=g),
                timestep=torch.tensor([t]),
                img_ids=ids,
                txt_ids=torch.zeros(5, 3),
            )
        gates = {p: m.gate.given for p, m in handle.layers.items()}
    assert found.masks.shape == (1, 2, 2, 3)
    places = found.masks.flatten(2).transpose(1, 2)
    single = [gate for path, gate in gates.items() if path.startswith("single")]
    assert single and all(torch.equal(gate[:, 5:], places) and gate.shape[1] == 11 for gate in single)
    assert all(torch.equal(gate[0, 1], torch.tensor([1.0, 0.0])) for gate in single)


def test_what_cannot_be_found_is_named_and_nothing_is_left_behind():
    pipe = sd_pipeline()
    bank = experts(pipe.unet)
    with patch(pipe.unet, bank, gates=found_gates) as handle:
        for call, error, match in (
            (
                lambda: automatic_regions(object(), handle, ["three"], WORDS),
                MoleTypeError,
                "UNet or a transformer",
            ),
            (
                lambda: automatic_regions(pipe, handle, ["three"], {"c": ["x"]}),
                MoleKeyError,
                "experts among a, b",
            ),
            (
                lambda: automatic_regions(pipe, handle, ["six"], WORDS),
                MoleValueError,
                r"'six'.*three, one, five",
            ),
            (lambda: automatic_regions(pipe, handle, ["six"], {}), MoleValueError, "one of the words none"),
            # the tokenizer takes three words
            (
                lambda: automatic_regions(pipe, handle, ["six six six five"], WORDS),
                MoleValueError,
                "first 3 tokens",
            ),
        ):
            with pytest.raises(error, match=match):
                call()
        before = [len(m._forward_pre_hooks) for m in pipe.unet.modules()]
        with (
            automatic_regions(pipe, handle, ["three", "five"], WORDS, MaskSettings(steps=1)),
            pytest.raises(MoleStateError, match=r"pictures of 2 prompts.*a batch of 3"),
        ):
            draw(pipe, ["three", "five", "one"], 2)
        assert [len(m._forward_pre_hooks) for m in pipe.unet.modules()] == before
    with patch(pipe.unet, bank) as handle, pytest.raises(MoleStateError, match="gates=found_gates"):
        automatic_regions(pipe, handle, ["three"], WORDS)
    for wrong in ({"steps": 0}, {"temperature": 0}, {"smooth": -1}, {"background": math.nan}):
        with pytest.raises(MoleValueError, match="MaskSettings"):
            MaskSettings(**wrong)
