"""Bases that must be called as they are (hooked, trained, another class, another dtype): PEFT's answer, with
all adapters added at once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mole_kernels as mk
from mole_kernels.errors import MoleBackendError
from tests.peft_models import K, N, assert_as_right, calls, draw, twins

peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def fresh_counts() -> Iterator[None]:
    mk.status(reset=True)
    yield
    mk.status(reset=True)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Kept(nn.Linear):
    """Gives the same tensor to everybody who asks: nobody may write to it."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "said"):
            self.said = super().forward(x)
        return self.said


def other_base(kind: type[nn.Linear]) -> Callable[[Any], None]:
    def put(layer: Any) -> None:
        made = kind(K, N).requires_grad_(False)
        made.load_state_dict(layer.base_layer.state_dict())
        layer.base_layer = made

    return put


def accelerate_hook(layer: Any) -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer.base_layer, ModelHook())


def casting_hook(layer: Any) -> None:
    """Layerwise casting as diffusers puts it on a model: the base in float8 between calls, the adapters
    spared.
    """
    from diffusers.hooks import apply_layerwise_casting

    apply_layerwise_casting(layer, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("lora",))


def half(layer: Any) -> None:
    layer.lora_A.half(), layer.lora_B.half()


@dataclass(frozen=True)
class Called:
    id: str
    reason: str
    change: Callable[[Any], object]
    input: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.id


HOOKS, DTYPES = "hooks on the base layer", "weights and input of different dtypes"
HERE = __name__.partition(".")[0]
CALLED = [
    Called("subclass", f"the base layer is a {HERE}.Doubled", other_base(Doubled)),
    Called("keeps-its-output", f"the base layer is a {HERE}.Kept", other_base(Kept)),
    Called(
        "forward-hook", HOOKS, lambda layer: layer.base_layer.register_forward_hook(lambda m, a, y: y * 2)
    ),
    Called(
        "pre-hook", HOOKS, lambda layer: layer.base_layer.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    ),
    Called("accelerate", HOOKS, accelerate_hook),
    Called("layerwise-casting", HOOKS, casting_hook),
    Called("trained", "the base layer wants a gradient", lambda layer: layer.base_layer.requires_grad_(True)),
    Called("half-adapters", DTYPES, half),
    Called("bf16-base", DTYPES, lambda layer: layer.base_layer.bfloat16(), torch.bfloat16),
]


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("case", CALLED, ids=str)
def test_same_answer(case: Called, grad: bool):
    plain, fast = twins((4, 2, 3))
    for model in (plain, fast):
        case.change(model[0])
    x = draw(2, 5, K, dtype=case.input)
    reasons = {} if case.id == "trained" and not grad else {case.reason: 2}
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            ours, theirs = fast(x), plain(x)
            low = torch.float16 if case.id == "half-adapters" else case.input
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            assert (ours - theirs).norm() <= 4 * torch.finfo(low).eps * theirs.norm()
    assert calls() == (2, {})
    assert mk.status()["base_called"] == reasons


@pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, 4, K), (0, K)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]):
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        other_base(Doubled)(model[0])
    x = draw(*shape)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=1e-5)
    assert calls() == (1, {})


def test_same_gradients_the_base_included():
    plain, fast = twins((4, 2), torch.float64)
    x = draw(2, 7, K, dtype=torch.float64)
    grads = []
    for model in (plain, fast):
        model[0].base_layer.requires_grad_(True)
        inputs = x.clone().requires_grad_()
        model(inputs).square().sum().backward()
        grads.append([inputs.grad, *(p.grad for p in model.parameters())])
    assert calls() == (1, {}) and len(grads[0]) == 7
    for theirs, ours in zip(*grads, strict=True):
        assert theirs is not None
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(adapter: torch.dtype):
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        other_base(Doubled)(model[0])
        model[0].lora_A.to(adapter), model[0].lora_B.to(adapter)
    x = draw(2, 7, K)
    truth = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = fast(x), plain(x)
    assert_as_right(ours, theirs, truth)
    assert calls() == (1, {})


class Products(TorchDispatchMode):
    """The matrix products that run, by the size of what is multiplied into."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "baddbmm", "linear"):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def test_three_products_however_many_adapters_and_one_where_all_weigh_zero():
    plain, fast = twins((4, 2, 3, 1))
    for model in (plain, fast):
        other_base(Doubled)(model[0])
    x = draw(5, K)
    with torch.no_grad():
        with Products() as theirs:
            plain(x)
        with Products() as ours:
            fast(x)
        for name in ("a0", "a1", "a2", "a3"):
            fast[0].set_scale(name, 0.0)
        with Products() as none:
            assert torch.equal(fast(x), fast[0].base_layer(x))
    # of the two, one is the check's own
    assert len(theirs.seen) == 9 and len(ours.seen) == 3 and len(none.seen) == 2


def test_compiles_to_one_graph():
    torch.compiler.reset()
    plain, fast = twins((4, 2))
    for model in (plain, fast):
        other_base(Doubled)(model[0])
    graphs: list[str] = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph

    x = draw(3, K)
    torch.testing.assert_close(
        torch.compile(fast, fullgraph=True, backend=compiler)(x), plain(x), rtol=1e-5, atol=1e-5
    )
    assert len(graphs) == 1
    torch.compiler.reset()


def test_a_base_without_a_kernel_is_named():
    class Nowhere(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError("int3 product")

    _, fast = twins((4, 2))
    other_base(Nowhere)(fast[0])
    with pytest.raises(
        MoleBackendError, match=r"Nowhere: .* no kernel for a torch.float32 input on cpu: int3 product"
    ):
        fast(draw(3, K))
