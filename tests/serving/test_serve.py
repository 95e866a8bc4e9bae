"""Every sample with its own expert gives what each gives alone; the pool, its routes and its refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleStateError, MoleValueError
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.patching.apply import patch
from mole_kernels.serving.layout import ALIGN, AdapterLayout
from mole_kernels.serving.serve import serve
from tests.tiny_models import State, make_expert, run_unet, tiny_unet

NAMES = ("anna", "ben", "carl")


def people(model, ranks=(2, 3, 1), **kw) -> dict[str, Expert]:
    return {
        name: make_expert(model, rank=rank, seed=10 + i, **kw)
        for i, (name, rank) in enumerate(zip(NAMES, ranks))
    }


def draw(
    pipe, prompts: int, each: int = 1, guidance: float = 4.0, which: slice = slice(None)
) -> torch.Tensor:
    """Latents [prompts·each,…] after three steps; `which` picks prompts, with the noise they have in the
    whole batch.
    """
    g = torch.Generator().manual_seed(5)
    text, negative = torch.randn(prompts, 5, 12, generator=g), torch.randn(prompts, 5, 12, generator=g)
    noise = torch.randn(prompts, each, 4, 8, 6, generator=g)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=text[which],
        negative_prompt_embeds=negative[which],
        num_images_per_prompt=each,
        guidance_scale=guidance,
        latents=noise[which].flatten(0, 1),
        num_inference_steps=3,
        output_type="latent",
    ).images


@pytest.mark.parametrize("each", [1, 2], ids=["one-picture", "two-pictures"])
@pytest.mark.parametrize("guidance", [1.0, 4.0], ids=["plain", "guided"])
def test_each_sample_of_a_pipeline_gets_its_own_expert(pipeline, guidance, each):
    experts = people(pipeline.unet)
    batch = ["ben", None, "anna", "ben"]
    want = []
    for i, name in enumerate(batch):
        alone = copy.deepcopy(pipeline.unet)
        if name is not None:
            patch(alone, {name: experts[name]})
        pipe = copy.copy(pipeline)
        pipe.unet = alone
        want.append(draw(pipe, len(batch), each, guidance, slice(i, i + 1)))
    with serve(pipeline, experts) as served, served.assign(batch):
        got = draw(pipeline, len(batch), each, guidance)
    # two guided steps: sums of other batches are other sums, by a hundredth of what tells the adapters apart
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(want[0], want[3], atol=1e-2)


def test_unserved_is_the_base_and_removing_restores_everything(unet):
    state = State(unet, lambda: run_unet(unet, batch=2))
    served = serve(unet, people(unet))
    assert torch.equal(run_unet(unet, batch=2), state.output)
    with served.assign(["anna", "carl"]):
        assert not torch.equal(run_unet(unet, batch=2), state.output)
    assert torch.equal(run_unet(unet, batch=2), state.output)
    with served.assign([None, "carl"]):
        half = run_unet(unet, batch=2)
    # a 1x1 convolution as a product differs from torch's convolution in the last bit
    torch.testing.assert_close(half[0], state.output[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(half[1], state.output[1], atol=1e-3)
    served.remove()
    state.assert_unchanged()
    with pytest.raises(MoleStateError, match="removed already"):
        served.assign([None])


def test_a_small_pool_evicts_the_least_recently_used(unet):
    experts = people(unet)
    served = serve(unet, experts, capacity=2)
    want = {name: run_unet(patched(experts[name])) for name in NAMES}
    for name in ("anna", "ben", "anna", "carl", "anna", "ben"):
        served.assign([name])
        torch.testing.assert_close(run_unet(unet), want[name], rtol=1e-5, atol=1e-5)
    assert (served.stats.hits, served.stats.misses, served.stats.evictions) == (2, 4, 2)
    assert served.resident == ("anna", "ben") and served.names == NAMES
    with pytest.raises(MoleStateError, match="3 adapters and the pool room for 2"):
        served.assign(list(NAMES))


def patched(expert: Expert):
    model = tiny_unet()
    patch(model, {"x": expert})
    return model


def test_a_pool_that_must_not_evict_refuses_and_changes_nothing(unet):
    served = serve(unet, people(unet), capacity=2, evict=False)
    served.assign(["anna", "ben"])
    before = run_unet(unet, batch=2)
    with pytest.raises(MoleStateError, match=r"the pool is full .*'carl' does not fit"):
        served.assign(["carl", "anna"])
    assert torch.equal(run_unet(unet, batch=2), before) and served.resident == ("anna", "ben")
    served.drop("ben")
    served.assign(["carl", "anna"])
    assert served.resident == ("anna", "carl")


def test_prefetch_leaves_the_running_batch_alone(unet):
    served = serve(unet, people(unet), capacity=2)
    served.assign(["anna"])
    before = run_unet(unet)
    served.prefetch(["ben", "carl"])
    assert set(served.resident) == {"anna", "ben"} and torch.equal(run_unet(unet), before)
    served.assign(["ben"])
    assert served.stats.misses == 2


def test_an_identity_is_replaced_from_the_next_assignment_on(unet):
    experts = people(unet)
    served = serve(unet, experts)
    served.assign(["anna"])
    run_unet(unet)
    served.add("anna", experts["ben"])
    served.add("dora", experts["carl"])
    for name, same in (("anna", "ben"), ("dora", "carl")):
        served.assign([name])
        torch.testing.assert_close(run_unet(unet), run_unet(patched(experts[same])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", ["dtype", "reload"])
def test_moving_the_model_makes_the_pool_anew(unet, change):
    experts = people(unet)
    served = serve(unet, experts)
    served.assign(["anna"])
    want = run_unet(unet)
    if change == "dtype":
        unet.to(torch.float64).to(torch.float32)
    else:
        for module in served.layers.values():
            module.experts.down.data = module.experts.down.data.clone()
    served.assign(["anna"])
    torch.testing.assert_close(run_unet(unet), want)


def test_a_layer_an_identity_lacks_keeps_the_base(unet):
    experts = people(unet)
    path = next(iter(experts["anna"].layers))
    fewer = Expert({p: f for p, f in experts["anna"].layers.items() if p != path})
    served = serve(unet, {"whole": experts["anna"], "fewer": fewer})
    served.assign(["fewer"])
    run_unet(unet)
    torch.testing.assert_close(run_unet(unet), run_unet(patched(fewer)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_another_assignment_recompiles_nothing(unet, fullgraph):
    served = serve(unet, people(unet))
    graphs = 0

    def count(gm, inputs):
        nonlocal graphs
        graphs += 1
        return gm.forward

    torch._dynamo.reset()
    compiled = torch.compile(unet, backend=count, fullgraph=fullgraph)
    served.assign(["anna", "ben"])
    run_unet(compiled, batch=2)
    first = graphs
    for batch in (["carl", "anna"], [None, "ben"], ["ben", "ben"], ["anna", "carl"]):
        served.assign(batch)
        got = run_unet(compiled, batch=2)
        torch.testing.assert_close(got, run_unet(unet, batch=2))
        for i, name in enumerate(batch):
            if name is not None:
                alone = run_unet(patched(people(tiny_unet())[name]), batch=2)
                torch.testing.assert_close(got[i], alone[i], rtol=1e-5, atol=1e-5)
    assert graphs == first


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda s, u: s.assign(["anna", "zoe"]), MoleKeyError, "'zoe' for sample 1"),
        (lambda s, u: s.assign("anna"), MoleValueError, "in a list"),
        (
            lambda s, u: (s.assign(["anna", "ben"]), run_unet(u, batch=3)),
            MoleShapeError,
            "multiple of the 2 prompts",
        ),
        (lambda s, u: s.drop("zoe"), MoleKeyError, "'zoe'"),
        (lambda s, u: s.add("zoe", make_expert(u, rank=4)), MoleShapeError, "at most the pool's 3, got 4"),
        (
            lambda s, u: s.add("zoe", Expert({"nowhere": LowRank(torch.ones(1, 2), torch.ones(2, 1))})),
            MoleKeyError,
            "nowhere",
        ),
    ],
)
def test_bad_calls_name_what_is_wrong_and_change_nothing(unet, call, error, words):
    served = serve(unet, people(unet))
    with pytest.raises(error, match=words):
        call(served, unet)
    assert served.names == NAMES
    served.assign([])
    assert torch.equal(run_unet(unet), run_unet(tiny_unet()))


def test_a_serve_that_fails_leaves_the_model_alone(unet):
    state = State(unet, lambda: run_unet(unet))
    for bad in (dict(capacity=-1), dict(rank=1)):
        with pytest.raises((MoleValueError, MoleShapeError)):
            serve(unet, people(unet), **bad)
        state.assert_unchanged()
    with pytest.raises(MoleValueError, match=r"anna.safetensors.*got none"):
        serve(unet, {})


def test_the_layout_is_aligned_and_holds_every_factor_exactly():
    sizes = {"a": (5, 7), "b": (64, 3)}
    layout = AdapterLayout.of(sizes, 3)
    g = torch.Generator().manual_seed(0)
    factors = {
        p: LowRank(torch.randn(r, K, generator=g), torch.randn(N, r, generator=g), 1.0)
        for (p, (N, K)), r in zip(sizes.items(), (3, 2))
    }
    vector = torch.full((layout.size,), torch.nan)
    layout.flatten("x", factors, vector)
    assert all(place.down % ALIGN == 0 and place.up % ALIGN == 0 for place in layout.places.values())
    for path, factor in factors.items():
        down, up = layout.views(vector[None], path)
        assert torch.equal(down[0, : factor.rank], factor.down) and torch.equal(
            up[0, :, : factor.rank], factor.up
        )
        assert not down[0, factor.rank :].any() and not up[0, :, factor.rank :].any()
    assert not vector.isnan().any()
