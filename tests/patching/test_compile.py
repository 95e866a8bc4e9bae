"""Patched models inside torch.compile: one graph each, and nothing that a user changes between calls makes
another (docs/compile.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mole_kernels as mk
from mole_kernels.gates.block import BlockRouting
from mole_kernels.gates.gate import ConstantGate, MaskGate, SampleGate
from mole_kernels.gates.schedule import Clock, switch
from mole_kernels.gates.softmax import ClusterGate, GivenGate
from tests.tiny_models import make_expert, run_flux, run_unet, tiny_flux, tiny_unet

B, T, K, N, E = 2, 6, 8, 12, 2


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counted:
    """A torch.compile backend that counts the graphs it is given."""

    def __init__(self, backend: str = "eager") -> None:
        self.backend, self.graphs = backend, 0
        self.codes: list[str] = []

    def __call__(self, graph: torch.fx.GraphModule, inputs: Any) -> Any:
        self.graphs += 1
        self.codes.append(graph.code)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


class TransformerBlock(nn.Module):
    """Small enough for every gate and both backends: a linear layer, a cross term and a 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.first, self.second, self.mix = (
            nn.LayerNorm(K),
            nn.Linear(K, N),
            nn.Linear(N, K, bias=False),
            nn.Conv2d(K, K, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.second(torch.tanh(self.first(self.norm1(x))))
        return self.mix(y.mT[..., None])


def block() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(TransformerBlock()).eval()


def experts(model: Any) -> dict[str, Any]:
    return {"a": make_expert(model, rank=3), "b": make_expert(model, seed=1)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def each(change: Callable[[Any, int], Any]) -> Callable[[Any, int], None]:
    """The same change to the gate of every layer."""

    def all_layers(handle: Any, i: int) -> None:
        for layer in handle.layers.values():
            change(layer.gate, i)

    return all_layers


def write_parameters(gate: nn.Module, i: int) -> None:
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.copy_(draw(*parameter.shape, seed=i))


CLOCK = Clock(4)
# gates -> how `patch` is given them, and what is changed between calls
GATES: dict[str, tuple[Callable[[Any], Any], Callable[[Any, int], None]]] = {
    "constant values": (lambda m: lambda p, l, e: ConstantGate(E), each(lambda g, i: g.value.fill_(0.1 * i))),
    "learned constants": (lambda m: "constant", each(write_parameters)),
    "token masks": (
        lambda m: lambda p, l, e: MaskGate(torch.ones(T, E)),
        each(lambda g, i: g.set(draw(T, E, seed=i))),
    ),
    "rows by sample": (
        lambda m: lambda p, l, e: SampleGate(torch.ones(B, E)),
        each(lambda g, i: g.set(draw(B, E, seed=i))),
    ),
    "given gates": (lambda m: lambda p, l, e: GivenGate(E), each(lambda g, i: g.set(draw(1, 1, E, seed=i)))),
    "clusters": (
        lambda m: lambda p, l, e: ClusterGate(draw(4, 4), E, universal=False),
        each(lambda g, i: g.assign(torch.tensor([i]))),
    ),
    "schedule": (lambda m: switch(CLOCK, every=1), lambda handle, i: CLOCK.set(i % 4)),
    "softmax weights": (lambda m: "top-1", each(write_parameters)),
    "mole weights": (lambda m: "mole", each(write_parameters)),
    "block routers": (
        lambda m: BlockRouting(m),
        lambda handle, i: write_parameters(handle.layers["0.first"].gate.router, i),
    ),
}


def check_changes(
    run: Callable[[Any], Tensor], model: Any, compiled: Any, counted: Counted, change: Callable[[int], object]
) -> None:
    """Compile once; then after each of three changes the compiled model says what the eager one says, out of
    the same graphs.
    """
    # eagerly first: block routers fill their table of what was said, which a graph made before that would ask
    # about
    seen = [run(model)]
    torch.testing.assert_close(run(compiled), seen[0], rtol=1e-4, atol=1e-5)
    first = counted.graphs
    for i in range(1, 4):
        change(i)
        torch.testing.assert_close(run(compiled), run(model), rtol=1e-4, atol=1e-5)
        seen.append(run(model))
    assert counted.graphs == first
    # the changes were real: a schedule of two experts comes back to the first, two top-1 gates may agree
    assert len({tuple(one.flatten().tolist()) for one in seen}) > 1


def run_block(model: Any) -> Tensor:
    with torch.no_grad():
        return model(draw(B, T, K, seed=5))


@pytest.mark.parametrize("name", GATES)
def test_gate_changes_recompile_nothing(name: str):
    make, change = GATES[name]
    model, counted = block(), Counted()
    CLOCK.set(0)
    handle = mk.patch(model, experts(model), make(model))
    check_changes(
        run_block,
        model,
        torch.compile(model, fullgraph=True, backend=counted),
        counted,
        lambda i: change(handle, i),
    )
    assert counted.graphs == 1


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_scales_swaps_gates_and_schedule_in_one_graph(backend: str):
    model, counted, clock = block(), Counted(backend), Clock(4)
    handle = mk.patch(model, experts(model), switch(clock, every=1))
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    steps = {
        1: lambda: handle.set_scales({"a": 0.3}),
        2: lambda: handle.swap("a", make_expert(model, rank=3, seed=8)),
        3: lambda: handle.swap("a", make_expert(model, rank=1, seed=9)),
    }
    check_changes(run_block, model, compiled, counted, lambda i: steps[i]())
    check_changes(run_block, model, compiled, counted, lambda i: clock.set(i))
    assert counted.graphs == 1 and "gated_lora_fwd" in counted.codes[0]


def test_disabled_is_a_graph_of_its_own_and_made_once():
    model, counted = block(), Counted()
    handle = mk.patch(model, experts(model))
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    on = run_block(compiled)
    for _ in range(3):
        with handle.disable():
            off = run_block(compiled)
        assert torch.equal(run_block(compiled), on) and not torch.equal(off, on)
    assert counted.graphs == 2


def test_a_larger_rank_is_a_new_graph():
    model, counted = block(), Counted()
    handle = mk.patch(model, experts(model))
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    run_block(compiled)
    handle.swap("a", make_expert(model, rank=5, seed=8))
    torch.testing.assert_close(run_block(compiled), run_block(model))
    assert counted.graphs == 2


@pytest.mark.parametrize("gates", [None, "mole", "top-1"])
def test_marked_dynamic_shapes_are_one_graph(gates: str | None):
    model, counted = block(), Counted("aot_eager")
    mk.patch(model, experts(model), gates)
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    with torch.no_grad():
        for shape in ((2, 6), (3, 6), (5, 9), (4, 17)):
            x = draw(*shape, K)
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
            torch.testing.assert_close(compiled(x), model(x))
    assert counted.graphs == 1


def change_expert(model: Any, handle: Any) -> Callable[[int], object]:
    steps = {
        1: lambda: handle.set_scales({"a": 0.3}),
        2: lambda: handle.swap("a", make_expert(model, rank=3, seed=8)),
        3: lambda: handle.set_scales({"a": 2.0, "b": -1.0}),
    }
    return lambda i: steps[i]()


def test_unet_in_one_graph_at_every_batch_and_height():
    unet, counted = tiny_unet(), Counted()
    handle = mk.patch(unet, experts(unet), "mole")
    # a text cache stands aside and breaks nothing
    handle.cache_text()
    compiled = torch.compile(unet, fullgraph=True, backend=counted)

    def run(model: Any, batch: int, height: int) -> Tensor:
        x, text, t = draw(batch, 4, height, 8), draw(batch, 5, 12), torch.full((batch,), 3)
        for tensor in (x, text, t):
            torch._dynamo.mark_dynamic(tensor, 0)
        torch._dynamo.mark_dynamic(x, 2)
        with torch.no_grad():
            return model(x, t, text).sample

    check_changes(lambda m: run(m, 2, 8), unet, compiled, counted, change_expert(unet, handle))
    for batch, height in ((3, 8), (2, 12), (4, 16)):
        torch.testing.assert_close(
            run(compiled, batch, height), run(unet, batch, height), rtol=1e-4, atol=1e-5
        )
    assert counted.graphs == 1


def test_flux_in_one_graph():
    flux, counted = tiny_flux(), Counted()
    handle = mk.patch(flux, experts(flux), "mole")
    check_changes(
        run_flux,
        flux,
        torch.compile(flux, fullgraph=True, backend=counted),
        counted,
        change_expert(flux, handle),
    )
    assert counted.graphs == 1


@pytest.mark.parametrize("family", ["unet", "flux"])
def test_repeated_blocks(family: str):
    families: dict[str, tuple[Any, Any]] = {"unet": (tiny_unet, run_unet), "flux": (tiny_flux, run_flux)}
    make, run = families[family]
    plain, counted = make(), Counted()
    model = make()
    twin, handle = mk.patch(plain, experts(plain)), mk.patch(model, experts(model))
    model.compile_repeated_blocks(fullgraph=True, backend=counted)
    torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-5)
    first = counted.graphs
    assert first and all("gated_lora_fwd" in code for code in counted.codes)
    for i in (1, 2, 3):
        change_expert(model, handle)(i)
        change_expert(plain, twin)(i)
        torch.testing.assert_close(run(model), run(plain), rtol=1e-4, atol=1e-5)
    assert counted.graphs == first


def test_assignments_recompile_nothing():
    """The blocks are compiled, as `compile_repeated_blocks` does: the assignment is made at the root, in
    plain Python.
    """
    model, counted = block(), Counted()
    served = mk.serve(
        model, {name: make_expert(model, seed=seed) for seed, name in enumerate(("anna", "ben", "carl"))}
    )
    batches = [["anna", "ben"], ["carl", "anna"], [None, "ben"], ["ben", "ben"]]
    want = []
    for batch in batches:
        served.assign(batch)
        want.append(run_block(model))
    model[0].compile(fullgraph=True, backend=counted)
    for batch, y in zip(batches, want):
        served.assign(batch)
        torch.testing.assert_close(run_block(model), y)
    assert counted.graphs == 1 and not torch.equal(want[0], want[1])


def test_export_keeps_the_operator_and_follows_the_scales():
    model = block()
    handle = mk.patch(model, experts(model), "mole")
    x = draw(B, T, K, seed=5)
    shapes = ({0: torch.export.Dim("B", min=2, max=8), 1: torch.export.Dim("T", min=2, max=64)},)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=shapes)
        assert sum("gated_lora_fwd" in str(node.target) for node in program.graph.nodes) == 3
        other = draw(3, 9, K)
        torch.testing.assert_close(program.module()(other), model(other))
        handle.set_scales({"a": 0.3})
        # an exported program holds the tensors themselves, so a scale written in place reaches it
        torch.testing.assert_close(program.module()(other), model(other))


@pytest.mark.slow
def test_aot_inductor_package(tmp_path):
    model = block()
    mk.patch(model, experts(model), "mole")
    x = draw(B, T, K, seed=5)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("B", min=2, max=8)},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "patched.pt2"))
        loaded = torch._inductor.aoti_load_package(path)
        for batch in (2, 5):
            other = draw(batch, T, K, seed=batch)
            torch.testing.assert_close(loaded(other), model(other))
