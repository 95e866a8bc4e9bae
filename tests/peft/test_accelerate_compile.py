"""Accelerated layers inside torch.compile: one graph, our operator in it, PEFT's answer and gradients out of
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mole_kernels as mk
from tests.peft_models import K, calls, draw, make, twins

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_to_one_graph(backend: str):
    torch.compiler.reset()
    plain, fast = twins((4, 2))
    graphs: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    compiled = torch.compile(fast, fullgraph=True, backend=compiler)
    x = draw(2, 5, K)
    for seed in (1, 2):
        torch.testing.assert_close(
            compiled(draw(2, 5, K, seed=seed)), plain(draw(2, 5, K, seed=seed)), rtol=1e-5, atol=1e-5
        )
    assert len(graphs) == 1 and "gated_lora_fwd" in graphs[0].code
    assert calls() == (0, {})
    compiled(x).sum().backward()
    plain(x).sum().backward()
    for theirs, ours in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.compiler.reset()


def test_compiled_graph_with_tensor_scaling_serves_every_weight():
    torch.compiler.reset()
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        for name in ("a0", "a1"):
            model[0].scaling[name] = torch.tensor(0.5)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    x = draw(2, 5, K)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for weight in (0.5, 0.25, 2.0):
            for model in (plain, fast):
                model[0].scaling["a1"].fill_(weight)
            torch.testing.assert_close(compiled(x), plain(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


def test_acceleration_reaches_a_compiled_model_and_leaves_it():
    torch.compiler.reset()
    plain = make((4, 2))
    graphs: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(plain, fullgraph=True, backend=compiler)
    x = draw(2, 5, K)
    first = compiled(x)
    handle = mk.accelerate(compiled)
    compiled(x)
    handle.remove()
    assert torch.equal(compiled(x), first)
    assert ["gated_lora_fwd" in code for code in graphs[:2]] == [False, True]
    torch.compiler.reset()
