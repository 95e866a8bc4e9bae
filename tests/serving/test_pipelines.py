"""Two prompts of two outputs each, through the real pipeline classes: each output is what it is alone."""

from __future__ import annotations

import inspect
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import mole_kernels as mk
from mole_kernels.errors import MoleShapeError
from mole_kernels.modules.scan import scan
from mole_kernels.serving.batching import LATENTS, TEXTS, PipelineCall, sample_order
from tests.serving.pipelines import CASES, ENDINGS, PICTURES, PROMPTS, Case
from tests.tiny_models import make_expert

pytest.importorskip("diffusers")
pytest.importorskip("transformers")


UNREAD: list[str] = []
UNTOLD = ["Ideogram4Pipeline", "RFD4ProteinaPipeline"]


def experts(pipe: Any, denoiser: str) -> dict[str, Any]:
    paths = [p for p in scan(pipe).layers if p.startswith(f"{denoiser}.") and p.endswith(ENDINGS)]
    return {name: make_expert(pipe, paths, seed=i, scale=4.0) for i, name in enumerate(("anna", "ben"))}


def alone(case: Case, pipe: Any, people: dict[str, Any], names: list[str | None]) -> list[Tensor]:
    """Each prompt by itself, with its adapter for the whole model."""

    def draw(i: int) -> Tensor:
        if case.by_itself:
            return case.draw(pipe, slice(i, i + 1))
        return case.draw(pipe, slice(None))[i * PICTURES : (i + 1) * PICTURES]

    out = []
    for i, name in enumerate(names):
        if name is None:
            out.append(draw(i))
            continue
        with mk.patch(pipe, {name: people[name]}):
            out.append(draw(i))
    return out


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_prompts_of_two_outputs(case: Case):
    pipe = case.make()
    people = experts(pipe, case.denoiser)
    names: list[str | None] = ["ben", "anna"]
    want = alone(case, pipe, people, names)
    other = alone(case, pipe, people, ["anna", "ben"])
    with mk.serve(pipe, people) as served, served.assign(names):
        got = case.draw(pipe, slice(None))
    assert len(got) == PROMPTS * PICTURES
    scale = torch.cat(want).abs().max()
    assert (torch.cat(want) - torch.cat(other)).abs().max() > 1e-2 * scale, (
        "the adapters are too weak to tell apart"
    )
    assert (got - torch.cat(want)).abs().max() <= 1e-3 * scale


@pytest.mark.parametrize("case", [c for c in CASES if c.id in ("sd", "wan-two-calls", "z-image")], ids=str)
def test_a_name_for_each_picture(case: Case):
    """Four names for two prompts of two pictures: they belong to the pictures."""
    pipe = case.make()
    people = experts(pipe, case.denoiser)
    first, second = alone(case, pipe, people, ["ben", "anna"]), alone(case, pipe, people, ["anna", "ben"])
    with mk.serve(pipe, people) as served, served.assign(["ben", "anna", "ben", "anna"]):
        got = case.draw(pipe, slice(None))
    want = torch.stack([first[0][0], second[0][1], second[1][0], first[1][1]])
    assert (got - want).abs().max() <= 1e-3 * want.abs().max()


def test_a_second_pipeline_around_the_same_model_is_read_itself():
    """`from_pipe` shares the denoiser: which pipeline guides is seen from the one that runs."""
    import diffusers

    case = CASES[0]
    pipe = case.make()
    people = experts(pipe, case.denoiser)
    want = torch.cat(alone(case, pipe, people, ["ben", None]))
    with mk.serve(pipe, people) as served, served.assign(["ben", None]):
        case.draw(pipe, slice(0, 1), 1) if served.assign(["ben"]) else None
        served.assign(["ben", None])
        twin = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
        torch.testing.assert_close(case.draw(twin, slice(None)), want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "names, which, words",
    [
        (["anna", "ben"], slice(0, 1), "draws 1 outputs"),
        (["anna", "ben", None], slice(None), "draws 4 outputs"),
    ],
)
def test_names_that_do_not_fit_the_prompts_are_refused(names, which, words):
    case = CASES[0]
    pipe = case.make()
    pictures = 1 if which == slice(0, 1) else PICTURES
    served = mk.serve(pipe, experts(pipe, case.denoiser))
    with served.assign(names), pytest.raises(MoleShapeError, match=words):
        case.draw(pipe, which, pictures)


@given(
    prompts=st.integers(2, 4),
    pictures=st.integers(1, 3),
    parts=st.integers(1, 4),
    by_prompt=st.booleans(),
    as_list=st.booleans(),
    conditions=st.booleans(),
    data=st.data(),
)
@settings(max_examples=300, deadline=None)
def test_the_order_is_what_the_pipeline_made(prompts, pictures, parts, by_prompt, as_list, conditions, data):
    """Batches as pipelines make them from latents: that order or, where samples are shuffled, a refusal."""
    count = prompts * pictures
    owner = [i // pictures if by_prompt else i % prompts for i in range(count)]
    latents = torch.randn(count, 3, 2)
    texts = torch.randn(prompts, 4)[owner]
    batch = latents.repeat(parts, 1, 1)
    if conditions:
        batch = torch.cat([batch, torch.randn(len(batch), 2, 2)], 1)
    shuffled = data.draw(st.booleans()) and parts > 1
    if shuffled:
        # the parts of a sample side by side
        batch = batch.reshape(parts, count, -1, 2).transpose(0, 1).flatten(0, 1)
    texts = texts.repeat(data.draw(st.integers(1, 2)), 1)
    # another of the pipeline's embeddings, whose first dimension is a layer and no sample
    layers = torch.randn(count, 2, 3)
    call = PipelineCall(
        "Pipe", prompts, pictures, latents, data.draw(st.sampled_from([(texts,), (layers, texts)]))
    )
    try:
        order = sample_order("x", prompts, list(batch) if as_list and not conditions else batch, call, None)
    except MoleShapeError:
        assert shuffled
        return
    assert not shuffled and order.rows() == owner * parts


def test_without_a_pipeline_a_batch_is_told_or_refused():
    batch = torch.randn(4, 3, 2)
    assert sample_order("x", 4, batch, None, None).rows() == [0, 1, 2, 3]
    assert sample_order("x", 2, batch, None, 2).rows() == [0, 1, 0, 1]
    assert sample_order("x", 2, batch, None, 1).rows() == [0, 0, 1, 1]
    for parts in (None, 3):
        with pytest.raises(MoleShapeError, match=r"parts=… says"):
            sample_order("x", 2, batch, None, parts)


@pytest.mark.parametrize("by_prompt", [True, False])
@pytest.mark.parametrize("texts", ["none", "not repeated", "of another order each", "shuffled"])
def test_pictures_whose_prompts_cannot_be_told_are_refused(texts, by_prompt):
    """Two prompts of two pictures: side by side is a custom, and no reason to draw with each other's adapters."""
    latents = torch.randn(4, 3, 2)
    rows = torch.randn(2, 5)
    side_by_side, as_a_whole = rows[[0, 0, 1, 1]], rows[[0, 1, 0, 1]]
    shown = {
        "none": (),
        "not repeated": (rows,),
        "of another order each": (side_by_side, as_a_whole),
        "shuffled": (rows[[0, 1, 1, 0]],),
    }[texts]
    call = PipelineCall("Pipe", 2, 2, latents, shown if by_prompt else shown[::-1])
    with pytest.raises(MoleShapeError, match="shows no embeddings of its prompts"):
        sample_order("x", 2, latents, call, None)
    # told, or a name for each picture
    assert sample_order("x", 2, latents, call, 1).rows() == [0, 0, 1, 1]
    assert sample_order("x", 4, latents, call, None).rows() == [0, 1, 2, 3]
    # prompts of equal texts show either order
    same = PipelineCall("Pipe", 2, 2, latents, (rows[[0, 0, 0, 0]],))
    assert sample_order("x", 2, latents, same, None).rows() == [0, 0, 1, 1]


def lora_pipelines() -> list[type]:
    """Every pipeline class of diffusers that loads LoRA files."""
    import diffusers.pipelines

    found = []
    for names in diffusers.pipelines._import_structure.values():
        for name in names:
            cls = getattr(diffusers.pipelines, name, None) if name.endswith("Pipeline") else None
            if isinstance(cls, type) and any("LoraLoaderMixin" in base.__name__ for base in cls.__mro__):
                found.append(cls)
    return found


def test_what_is_read_of_every_pipeline_that_loads_loras():
    """The latents are a variable of the call in all but these, which are refused for want of them."""
    classes = lora_pipelines()
    unread = sorted(
        cls.__name__
        for cls in classes
        if not set(LATENTS) & set(inspect.unwrap(cls.__call__).__code__.co_varnames)
    )
    assert len(classes) > 150
    assert unread == UNREAD
    # several pictures of several prompts are refused in these, unless they are told
    untold = sorted(
        cls.__name__
        for cls in classes
        if not any(known in n for known in TEXTS for n in inspect.unwrap(cls.__call__).__code__.co_varnames)
    )
    assert untold == UNTOLD
