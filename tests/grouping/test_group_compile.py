"""Groups inside torch.compile: one graph, right whatever is changed or moved afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from tests.grouping.test_group import CHANGES, K, Twins, draw
from tests.grouping.test_group_models import group
from tests.patching.test_compile import Counted
from tests.tiny_models import make_expert, run_flux, tiny_flux


@pytest.fixture
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
def test_flux_in_one_graph(fresh: None):
    model, run, counted = tiny_flux(), run_flux, Counted()
    handle = mk.patch(model, {"a": make_expert(model, rank=3), "b": make_expert(model, seed=1)}, "mole")
    groups = group(handle)
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    changes: dict[int, Callable[[], object]] = {
        0: lambda: None,
        1: lambda: handle.set_scales({"a": 0.3}),
        2: lambda: handle.swap("a", make_expert(model, rank=3, seed=8)),
        3: lambda: handle.swap("a", make_expert(model, rank=1, seed=9)),
        4: lambda: [p.detach().mul_(2) for p in handle.gate_parameters()],
        # the graph holds the layers' own weights, wherever they lie
        5: lambda: [
            setattr(m, "weight", nn.Parameter(m.weight * 2, requires_grad=False))
            for m in handle.layers.values()
        ],
    }
    seen: list[Tensor] = []
    for change in changes.values():
        change()
        got = run(compiled)
        torch.testing.assert_close(got, run(model), rtol=1e-4, atol=1e-4)
        assert not any(torch.equal(got, one) for one in seen)
        seen.append(got)
    assert counted.graphs == 1 and counted.codes[0].count("gated_lora_group_fwd") >= len(groups)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_changes_recompile_nothing(backend: str, fresh: None):
    t = Twins("mole")
    counted = Counted(backend)
    compiled = torch.compile(t.models[1], fullgraph=True, backend=counted)
    for change in (
        "scale",
        "swap",
        "a weight written in place",
        "a weight replaced",
        "half and back",
        "scale of one layer",
    ):
        with torch.no_grad():
            torch.testing.assert_close(compiled(t.x), t.models[0](t.x))
        t.both(CHANGES[change])
    assert counted.graphs == 1 and "group_fwd" in counted.codes[0]


def test_dynamic_shapes_are_one_graph(fresh: None):
    t = Twins("mole")
    counted = Counted("aot_eager")
    compiled = torch.compile(t.models[1], fullgraph=True, backend=counted)
    with torch.no_grad():
        for shape in ((2, 6), (3, 6), (5, 9)):
            x = draw(*shape, K)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            torch.testing.assert_close(compiled(x), t.models[0](x))
    assert counted.graphs == 1 and "group_fwd" in counted.codes[0]


@pytest.mark.parametrize("strict", [False, True])
def test_exported_layer_by_layer(strict: bool):
    t = Twins("mole")
    with torch.no_grad():
        program = torch.export.export(t.models[1], (t.x,), strict=strict)
        assert not any("group_fwd" in str(node.target) for node in program.graph.nodes)
        torch.testing.assert_close(program.module()(t.x), t.models[0](t.x))
    t.check(1)


def test_compiled_graphs_trust_only_known_processors(fresh: None):
    """A graph counts no versions: an attention that might write into its input is compiled layer by layer."""
    t = Twins()
    next(iter(t.groups.groups.values())).always = False
    for model in t.models:
        model[0].between = lambda x: x.mul_(2)
    counted = Counted()
    compiled = torch.compile(t.models[1], fullgraph=True, backend=counted)
    with torch.no_grad():
        torch.testing.assert_close(compiled(t.x.clone()), t.models[0](t.x.clone()))
    assert "group_fwd" not in counted.codes[0]


def test_gradients_inside_a_compiled_graph_are_the_layers_own(fresh: None):
    t = Twins()
    counted = Counted("aot_eager")
    compiled = torch.compile(t.models[1], fullgraph=True, backend=counted)
    grads = []
    for handle, run in zip(t.handles, (t.models[0], compiled)):
        handle.experts_require_grad()
        run(t.x).square().sum().backward()
        grads.append([p.grad for p in handle.expert_parameters()])
    for got, want in zip(grads[1], grads[0]):
        torch.testing.assert_close(got, want)
