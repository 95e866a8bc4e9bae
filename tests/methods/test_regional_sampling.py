"""Regional sampling of a real UNet: against attention place by place, on guidance and batches, with experts
by region, and undone.
"""

from __future__ import annotations

import copy

import pytest
import torch

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.gates.schedule import Clock, switch
from mole_kernels.methods.mix_of_show.regions import Region, shares, token_grid
from mole_kernels.methods.mix_of_show.sampling import region_gates, regional
from mole_kernels.modules.forward_lock import ForwardLock
from mole_kernels.patching.apply import patch
from mole_kernels.reports.layout import attention_over_picture
from tests.tiny_models import TEXT_WIDTH, make_expert, tiny_pipeline

REGIONS = [Region("left", box=(0, 0, 1, 0.5)), Region("low", box=(0.5, 0.25, 1, 1))]
SIZE = (8, 8)


@pytest.fixture
def pipe():
    made = tiny_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def texts(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def draw(
    pipe, prompts: int = 1, each: int = 1, guidance: float = 1.0, steps: int = 2, text=None
) -> torch.Tensor:
    g = torch.Generator().manual_seed(4)
    noise = torch.randn(prompts * each, 4, *SIZE, generator=g)
    return pipe(
        prompt_embeds=texts(prompts, seed=7) if text is None else text,
        negative_prompt_embeds=texts(prompts, seed=8),
        latents=noise,
        num_images_per_prompt=each,
        guidance_scale=guidance,
        num_inference_steps=steps,
        output_type="latent",
    ).images


class PlaceByPlace:
    """The same by its definition: for each sample and place, a softmax over the text of each region that
    covers it.
    """

    def __init__(self, regions, embeds, guided, overlap="mean"):
        self.regions, self.embeds, self.guided, self.overlap = regions, embeds, guided, overlap

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        B, T, _ = hidden_states.shape
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        out = torch.zeros_like(q)
        P = len(self.regions)
        for b in range(B):
            half, within = divmod(b, B // 2 if self.guided else B)
            p = within // (B // ((2 if self.guided else 1) * P))
            own = self.embeds[1 if self.guided and half == 0 else 0][p]
            table = shares(self.regions[p], *token_grid(T, *SIZE), overlap=self.overlap)
            for s, text in enumerate([encoder_hidden_states[b], *own]):
                k, v = (f(text).unflatten(-1, (attn.heads, -1)) for f in (attn.to_k, attn.to_v))
                for t in range(T):
                    if table[s, t]:
                        a = torch.softmax(torch.einsum("hd,lhd->hl", q[b, t], k) * attn.scale, -1)
                        out[b, t] += table[s, t] * torch.einsum("hl,lhd->hd", a, v)
        return attn.to_out[1](attn.to_out[0](out.flatten(2)))


@pytest.mark.parametrize("overlap", ["mean", "overwrite"])
@pytest.mark.parametrize(
    "prompts, each, guidance", [(1, 1, 1.0), (1, 1, 5.0), (2, 2, 5.0)], ids=["plain", "guided", "batch"]
)
def test_a_picture_is_what_attention_place_by_place_draws(pipe, prompts, each, guidance, overlap):
    by_prompt = [REGIONS, REGIONS[::-1]][:prompts]
    embeds = texts(prompts, 2, seed=1), texts(prompts, 2, seed=2)
    slow = copy.copy(pipe)
    slow.unet = copy.deepcopy(pipe.unet)
    by_place = PlaceByPlace(by_prompt, embeds, guidance > 1, overlap)
    slow.unet.set_attn_processor(
        {n: by_place if ".attn2." in n else p for n, p in slow.unet.attn_processors.items()}
    )
    want = draw(slow, prompts, each, guidance)
    plain = draw(pipe, prompts, each, guidance)
    with regional(pipe, by_prompt, embeds=embeds, overlap=overlap):
        got = draw(pipe, prompts, each, guidance)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-2)
    assert torch.equal(draw(pipe, prompts, each, guidance), plain)


def test_regions_that_say_what_the_whole_says_change_nothing(pipe):
    text, negative = texts(1, seed=7), texts(1, seed=8)
    want = draw(pipe, guidance=3.0)
    with regional(
        pipe, REGIONS, embeds=(text[:, None].expand(-1, 2, -1, -1), negative[:, None].expand(-1, 2, -1, -1))
    ):
        torch.testing.assert_close(draw(pipe, guidance=3.0), want, rtol=1e-5, atol=1e-5)


def test_keys_and_values_are_made_once_and_again_when_something_changes(pipe):
    handle = patch(pipe, {"a": make_expert(pipe.unet)}, strict=False)
    layer = next(m for p, m in handle.layers.items() if p.endswith("attn2.to_k"))
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    layer.register_forward_hook(count)
    text, embeds = texts(1, seed=7), (texts(1, 2, seed=1), texts(1, 2, seed=2))
    with regional(pipe, REGIONS, embeds=embeds), torch.no_grad():
        unet_text = text.clone()
        x = torch.randn(1, 4, *SIZE)
        first = pipe.unet(x, 3, unet_text).sample
        assert torch.equal(pipe.unet(x, 3, unet_text).sample, first) and calls == 1
        handle.set_scales({"a": 0.3})
        second = pipe.unet(x, 3, unet_text).sample
        assert calls == 2 and not torch.equal(second, first)
        unet_text.mul_(1.5)
        third = pipe.unet(x, 3, unet_text).sample
        assert calls == 3 and not torch.equal(third, second)
    with regional(pipe, REGIONS, embeds=embeds), torch.no_grad():
        torch.testing.assert_close(pipe.unet(x, 3, unet_text).sample, third)


def test_a_schedule_of_experts_is_followed(pipe):
    clock = Clock(2)
    experts = {"a": make_expert(pipe.unet), "b": make_expert(pipe.unet, seed=1)}
    embeds, x, text = (texts(1, 2, seed=1), texts(1, 2, seed=2)), torch.randn(1, 4, *SIZE), texts(1, seed=7)
    want = []
    for name in experts:
        with (
            patch(pipe, {name: experts[name]}, strict=False),
            regional(pipe, REGIONS, embeds=embeds),
            torch.no_grad(),
        ):
            want.append(pipe.unet(x, 3, text).sample)
    with (
        patch(pipe, experts, switch(clock, every=1), strict=False),
        regional(pipe, REGIONS, embeds=embeds),
        torch.no_grad(),
    ):
        for i in range(2):
            clock.set(i)
            torch.testing.assert_close(pipe.unet(x, 3, text).sample, want[i])


def test_each_region_has_its_own_experts(pipe):
    """A region over everything with one expert alone is that expert alone; halves differ only where they
    should.
    """
    experts = {"a": make_expert(pipe.unet), "b": make_expert(pipe.unet, seed=1)}
    embeds = texts(1, 1, seed=1), texts(1, 1, seed=2)
    with patch(pipe, {"b": experts["b"]}, strict=False), regional(pipe, [Region("x")], embeds=embeds):
        want = draw(pipe, guidance=3.0)
    handle = patch(pipe, experts, region_gates, strict=False)
    both = draw(pipe, guidance=3.0)
    with regional(pipe, [Region("x", experts={"b": 1.0})], embeds=embeds, handle=handle):
        torch.testing.assert_close(draw(pipe, guidance=3.0), want, rtol=1e-4, atol=1e-5)
    assert torch.equal(draw(pipe, guidance=3.0), both)
    with regional(
        pipe,
        [Region("x", box=(0, 0, 1, 0.5), experts={"a": 0.5})],
        embeds=embeds,
        handle=handle,
        elsewhere={"b": 2.0},
    ):
        # guided, as the last call was: two samples
        pipe.unet(torch.randn(2, 4, *SIZE), 3, texts(2, seed=7))
        layer = next(m for p, m in handle.layers.items() if p.endswith("attn1.to_q"))
        left = REGIONS[0].cover(*SIZE).flatten()
        given = layer.last_gates.given[0]
        assert torch.equal(given[left], torch.tensor([0.5, 0.0]).expand(int(left.sum()), 2))
        assert torch.equal(given[~left], torch.tensor([0.0, 2.0]).expand(int((~left).sum()), 2))


def test_one_text_for_each_layer(pipe):
    """As extended textual inversion has them: layer i reads slice i."""
    layers = sum(".attn2." in name for name in pipe.unet.attn_processors)
    per_layer = texts(1, 1, layers, seed=1), texts(1, 1, layers, seed=2)
    x, text, seen = torch.randn(1, 4, *SIZE), texts(1, seed=7), []
    hooks = [
        m.to_k.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        for n, m in pipe.unet.named_modules()
        if n.endswith("attn2")
    ]
    with regional(pipe, [Region("x")], embeds=per_layer), torch.no_grad():
        pipe.unet(x, 3, text)
    for hook in hooks:
        hook.remove()
    order = [n for n in pipe.unet.attn_processors if ".attn2." in n]
    ran = [n for n, m in pipe.unet.named_modules() if n.endswith("attn2")]
    assert len(seen) == layers and sorted(f"{n}.processor" for n in ran) == sorted(order)
    found = {tuple(t[1].flatten().tolist()) for t in seen}
    assert found == {tuple(per_layer[0][0, 0, i].flatten().tolist()) for i in range(layers)}


def test_where_each_regions_words_were_read(pipe):
    """Nothing outside a region; inside, the attention that a hand-made softmax gives, and a picture of it."""
    embeds = texts(1, 2, seed=1), texts(1, 2, seed=2)
    plain = regional(pipe, REGIONS, embeds=embeds)
    with pytest.raises(MoleStateError, match="nothing was recorded"):
        plain.attention()
    with regional(pipe, REGIONS, embeds=embeds, record=True) as state:
        drawn = draw(pipe)
    with plain:
        assert torch.equal(draw(pipe), drawn)
    maps = state.attention()
    assert maps.shape == (1, 2, *SIZE)
    for i, region in enumerate(REGIONS):
        inside = region.cover(*SIZE)
        assert (maps[0, i][inside] > 0).all() and maps[0, i].max() <= 1
        outside = (
            ~torch.nn.functional.interpolate(region.cover(4, 4)[None, None].float(), SIZE)[0, 0].bool()
            & ~inside
        )
        assert outside.any() and not maps[0, i][outside].any()
    one = {}
    with regional(pipe, REGIONS, embeds=embeds, record=True) as state, torch.no_grad():
        attn = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
        attn.to_q.register_forward_hook(lambda m, a, y: one.update(q=y.unflatten(-1, (attn.heads, -1))))
        pipe.unet(torch.randn(1, 4, *SIZE), 3, texts(1, seed=7))
        k = attn.to_k(embeds[0][0, 0]).unflatten(-1, (attn.heads, -1))
        p = (
            torch.softmax(torch.einsum("thd,lhd->htl", one["q"][0], k) * attn.scale, -1)[..., 1:]
            .sum(-1)
            .mean(0)
        )
        grid = token_grid(len(p), *SIZE)
        want = p * shares(REGIONS, *grid)[1]
        total, count = state._read[grid]
        layers = sum(m.heads > 0 for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
        assert 0 < count <= layers
        if count == 1:
            torch.testing.assert_close(total[0, 0].flatten(), want)
        else:
            assert (total[0, 0].flatten() + 1e-6 >= want).all()
    made = attention_over_picture(torch.rand(3, 16, 16), REGIONS, maps[0])
    assert [a.get_title() for a in made.axes[:2]] == ["left", "low"]
    with pytest.raises(MoleShapeError, match=r"maps \[2,h,w\]"):
        attention_over_picture(torch.rand(3, 16, 16), REGIONS, maps[0, :1])


def test_the_adapters_features_are_weighed_by_region(pipe):
    """In the pipeline that has one: what its UNet is handed, and that it is as before afterwards."""
    from diffusers import StableDiffusionAdapterPipeline, T2IAdapter

    torch.manual_seed(0)
    parts = {n: p for n, p in pipe.components.items() if n != "image_encoder"}
    channels = list(pipe.unet.config.block_out_channels)
    drawer = StableDiffusionAdapterPipeline(
        **parts, adapter=T2IAdapter(3, channels, 1, 2), requires_safety_checker=False
    )
    drawer.set_progress_bar_config(disable=True)
    handed = []
    drawer.unet.register_forward_pre_hook(
        lambda m, a, k: handed.append([t.clone() for t in k["down_intrablock_additional_residuals"]]),
        with_kwargs=True,
    )

    def run():
        handed.clear()
        one, two = (torch.Generator().manual_seed(seed) for seed in (0, 1))
        drawer(
            prompt_embeds=texts(1, seed=7),
            negative_prompt_embeds=texts(1, seed=8),
            image=torch.rand(1, 3, 16, 16, generator=two),
            height=16,
            width=16,
            num_inference_steps=1,
            guidance_scale=3.0,
            output_type="latent",
            generator=one,
        )
        return handed[0]

    plain = run()
    weights = [((0.0, 0.0, 1.0, 0.5), 0.25)]
    with regional(
        drawer,
        [Region("x")],
        embeds=(texts(1, 1, seed=1), texts(1, 1, seed=2)),
        adapter=weights,
        adapter_elsewhere=2.0,
    ):
        weighed = run()
    assert len(plain) == len(channels) and plain[0].shape[0] == 2 and plain[0].norm() > 0
    for before, after in zip(plain, weighed):
        half = before.shape[3] // 2
        torch.testing.assert_close(after[..., :half], 0.25 * before[..., :half])
        torch.testing.assert_close(after[..., half:], 2.0 * before[..., half:])
    assert all(torch.equal(a, b) for a, b in zip(run(), plain))
    with pytest.raises(MoleTypeError, match="a pipeline with a T2I-Adapter"):
        regional(pipe, [Region("x")], adapter=weights)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda p: regional(p.unet, REGIONS), MoleTypeError, "a pipeline with a UNet"),
        (lambda p: regional(p, []), MoleValueError, "at least one region"),
        (lambda p: regional(p, [REGIONS, REGIONS[:1]]), MoleValueError, "as many regions"),
        (lambda p: regional(p, [["x"]]), MoleTypeError, "a list of regions"),
        (lambda p: regional(p, REGIONS, overlap="blend"), MoleValueError, "'mean' or 'overwrite'"),
        (
            lambda p: regional(p, REGIONS, embeds=(texts(1, 3), texts(1, 2))).__enter__(),
            MoleShapeError,
            r"positive \[1,2",
        ),
        (
            lambda p: regional(p, REGIONS, handle=patch(p, {"a": make_expert(p.unet)})),
            MoleStateError,
            "no region gates",
        ),
        (
            lambda p: regional(
                p,
                [Region("x", experts={"zoe": 1.0})],
                handle=patch(p, {"a": make_expert(p.unet)}, region_gates),
            ),
            MoleKeyError,
            "'zoe'",
        ),
    ],
)
def test_bad_calls_are_named_and_change_nothing(pipe, call, error, words):
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(error, match=words):
        call(pipe)
    # of a patch that a call made itself there are the turns that forwards and changes take
    hooks = [
        hook
        for hook in pipe.unet._forward_pre_hooks.values()
        if not isinstance(getattr(hook, "__self__", None), ForwardLock)
    ]
    assert pipe.unet.attn_processors == before and not hooks


def test_a_second_regional_on_one_unet_is_refused_and_leaves_the_first(pipe):
    before = dict(pipe.unet.attn_processors)
    with regional(pipe, REGIONS, embeds=(texts(1, 2), texts(1, 2))) as first:
        wanted, inside = draw(pipe), dict(pipe.unet.attn_processors)
        with pytest.raises(MoleStateError, match="already draws by regions"):
            regional(pipe, REGIONS[:1], embeds=(texts(1, 1), texts(1, 1))).__enter__()
        assert pipe.unet.attn_processors == inside and first.by_prompt == [REGIONS]
        torch.testing.assert_close(draw(pipe), wanted, rtol=0, atol=0)
    assert pipe.unet.attn_processors == before


def test_an_error_inside_restores_the_processors(pipe):
    before = dict(pipe.unet.attn_processors)
    with (
        pytest.raises(MoleShapeError, match="multiple of 2 prompts"),
        regional(pipe, [REGIONS, REGIONS], embeds=(texts(2, 2), texts(2, 2))),
    ):
        draw(pipe)
    # of a patch that a call made itself there are the turns that forwards and changes take
    hooks = [
        hook
        for hook in pipe.unet._forward_pre_hooks.values()
        if not isinstance(getattr(hook, "__self__", None), ForwardLock)
    ]
    assert pipe.unet.attn_processors == before and not hooks
