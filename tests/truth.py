"""Cases, float64 truth, and the derived allowances that every backend is held to.

What separates right from wrong is the low-rank part alone (W = 0, b = 0): errors there cannot hide behind the
base product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mole_kernels.backends.select import BACKENDS
from mole_kernels.operands import Call, Experts, Gates, Need
from mole_kernels.problem import Problem
from mole_kernels.reference import gated_lora_ref

NAMES = Need._fields
ALL = Need(*[True] * len(NAMES))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# backends that take tensors on a CPU; Triton's and CUDA's kernels are held to the same truth by tests/kernels,
# tests/emulator and, on a device, `make gpu`
ON_CPU = tuple(name for name in BACKENDS if name not in ("triton", "cuda"))


@dataclass(frozen=True)
class Case:
    """One problem and its seed; `gate` is any of local, pooled, both, none, constant, mask, onehot, softmax,
    top1, top2 joined by '+'.

    softmax and top… make the token gate one over the experts; S < 0 means |S| sets named by an assignment, −1
    (none) among them.
    """

    B: int = 2
    T: int = 15
    K: int = 64
    N: int = 48
    ranks: tuple[int, ...] = (8, 8)
    S: int = 1
    gate: str = "both"
    bias: bool = True
    layout: str = "plain"
    base: bool = True
    seed: int = 0

    def __str__(self) -> str:
        parts = [
            f"B{self.B}T{self.T}K{self.K}N{self.N}",
            "r" + "-".join(map(str, self.ranks)) if len(self.ranks) < 8 else f"E{len(self.ranks)}",
        ]
        parts += [f"S{self.S}"] if self.S > 1 else [f"pool{-self.S}"] if self.S < 0 else []
        parts += (
            [self.gate]
            + ([] if self.bias else ["nobias"])
            + ([self.layout] if self.layout != "plain" else [])
        )
        return "-".join(parts)

    @property
    def E(self) -> int:
        return len(self.ranks)

    @property
    def R(self) -> int:
        return sum(self.ranks)

    @property
    def top_k(self) -> int:
        return self.E if "softmax" in self.gate else next((k for k in (1, 2) if f"top{k}" in self.gate), 0)

    @property
    def local(self) -> bool:
        return self.top_k > 0 or "local" in self.gate or "both" in self.gate

    def assignment(self) -> Tensor | None:
        """Sample b takes set b−1 (mod |S|), the first none: repeated sets, and a sample without any."""
        return torch.tensor([b % (1 - self.S) - 1 for b in range(self.B)]) if self.S < 0 else None

    def alone(self) -> Case:
        """The low-rank part alone."""
        return replace(self, base=False)

    def problem(self, dtype: torch.dtype) -> Problem:
        local, pooled = self.local, "pooled" in self.gate or "both" in self.gate
        given = any(w in self.gate for w in ("constant", "mask", "onehot"))
        size = self.B, self.T, self.K, self.N, self.ranks, abs(self.S)
        return Problem(*size, dtype, "cpu", local, pooled, given, self.top_k, self.S < 0)

    def make(self, dtype: torch.dtype, integers: bool = False) -> CaseCall:
        g = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            if integers:
                return torch.randint(-2, 3, shape, generator=g).to(dtype)
            return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(dtype)

        x, sets = _laid_out(draw, self), abs(self.S)
        weight = draw(self.N, self.K, scale=self.K**-0.5) * (1 if self.base else 0)
        bias = draw(self.N) * (1 if self.base else 0) if self.bias else None
        down, up = (
            draw(sets, self.R, self.K, scale=self.K**-0.5),
            draw(sets, self.N, self.R, scale=self.R**-0.5),
        )
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scale = torch.linspace(0.5, 1.5, self.E, dtype=wide) if not integers else torch.ones(self.E)
        return CaseCall(
            x,
            weight,
            bias,
            Experts(down, up, scale, self.ranks, self.assignment()),
            self._gates(g, dtype, wide),
            self,
        )

    def _gates(self, g: torch.Generator, dtype: torch.dtype, wide: torch.dtype) -> Gates:
        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

        gate = token_weight = token_bias = sample_weight = sample_bias = None
        if self.local:
            token_weight, token_bias = (
                draw(self.E, self.K, scale=self.K**-0.5).to(dtype),
                draw(self.E).to(dtype),
            )
        if "pooled" in self.gate or "both" in self.gate:
            sample_weight, sample_bias = (
                draw(abs(self.S), self.R, scale=self.R**-0.5).to(wide),
                draw(self.E).to(wide),
            )
        if "constant" in self.gate:
            gate = torch.rand(1, 1, self.E, generator=g).to(wide)
        if "mask" in self.gate:
            gate = torch.rand(1, self.T, self.E, generator=g).to(wide)
        if "onehot" in self.gate:
            gate = torch.eye(self.E)[torch.arange(self.B) % self.E][:, None].to(wide)
        return Gates(gate, token_weight, token_bias, sample_weight, sample_bias, self.top_k)


def _laid_out(draw, case: Case) -> Tensor:
    B, T, K = case.B, case.T, case.K
    if case.layout == "transposed":
        return draw(B, K, T).mT
    if case.layout == "sliced":
        return draw(B, T, K + 3)[..., 1 : K + 1]
    if case.layout == "stride0":
        return draw(B, 1, K).expand(B, T, K)
    assert case.layout == "plain", case.layout
    return draw(B, T, K)


@dataclass(frozen=True)
class CaseCall:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    experts: Experts
    gates: Gates
    case: Case

    def operands(self, save: bool = True) -> Call:
        """The call as a backend takes it; `save`: a gradient will be asked for."""
        return Call(self.x, self.weight, self.bias, self.experts, self.gates, save)

    def tensors(self) -> dict[str, Tensor]:
        """The differentiable operands by name."""
        named = {
            "x": self.x,
            "down": self.experts.down,
            "up": self.experts.up,
            "scale": self.experts.scale,
            **self.gates.tensors(),
        }
        return named

    def with_tensors(self, new: dict[str, Tensor]) -> CaseCall:
        experts = self.experts._replace(down=new["down"], up=new["up"], scale=new["scale"])
        return replace(
            self,
            x=new["x"],
            experts=experts,
            gates=self.gates._replace(**{name: new[name] for name in self.gates.tensors()}),
        )

    def double(self) -> CaseCall:
        wide = self.with_tensors({name: t.double() for name, t in self.tensors().items()})
        return replace(
            wide, weight=self.weight.double(), bias=None if self.bias is None else self.bias.double()
        )

    def truth(self) -> Tensor:
        """y in float64 from the operands as they are."""
        call = self.double()
        return gated_lora_ref(call.x, call.weight, call.bias, call.experts, call.gates)[0]

    def truth_grads(self, dy: Tensor) -> tuple[dict[str, Tensor], float]:
        """All gradients in float64, by autograd through the reference; and the size ‖dγ‖ of the per-token
        terms of the gates' gradients.
        """
        call = self.double()
        terms = torch.ones(call.x.shape[0], call.x.shape[1], self.case.E, dtype=torch.float64)
        gate = terms if call.gates.gate is None else terms * call.gates.gate
        leaves = {name: t.detach().clone().requires_grad_() for name, t in call.tensors().items()}
        run = call.with_tensors(leaves)
        y = gated_lora_ref(run.x, run.weight, run.bias, run.experts, run.gates)[0]
        grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy.double())))
        gate.requires_grad_()
        y = gated_lora_ref(call.x, call.weight, call.bias, call.experts, call.gates._replace(gate=gate))[0]
        return grads, torch.autograd.grad(y, gate, dy.double())[0].norm().item()


def rounding_error(truth: Tensor, dtype: torch.dtype) -> float:
    """‖round(truth) − truth‖ / ‖truth‖ in `dtype`; for float32 the accumulation bound 1e-6 is used
    instead.
    """
    if dtype == torch.float32:
        return 1e-6
    return ((truth.to(dtype).double() - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def assert_close_to_truth(
    got: Tensor, truth: Tensor, dtype: torch.dtype, roundings: int, what: str = ""
) -> None:
    """G1 to G3: NaN and Inf where the truth has them; relative error ≤ 1.25·√roundings·e_round; rows and
    columns ≤ 4 times that.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, truth {tuple(truth.shape)}"
    assert torch.equal(got.isnan(), truth.isnan()) and torch.equal(got.isinf(), truth.isinf()), (
        f"{what}: NaN or Inf where the truth has none"
    )
    if truth.numel() == 0 or truth.norm() == 0:
        assert not got.double().abs().sum(), f"{what}: the truth is zero"
        return
    limit = rounding_error(truth, dtype) * (1 if dtype == torch.float32 else 1.25 * math.sqrt(roundings))
    error = got.double() - truth
    relative = (error.norm() / truth.norm()).item()
    assert relative <= limit, f"{what}: relative error {relative:.2e} > {limit:.2e}"
    matrix, error = truth.reshape(-1, truth.shape[-1]), error.reshape(-1, truth.shape[-1])
    for axis, word in ((1, "row"), (0, "column")):
        size = matrix.norm(dim=axis)
        # a line much smaller than the others is judged against the typical one: its rounding has theirs in it
        floor = truth.norm() / math.sqrt(matrix.shape[1 - axis])
        worst = (error.norm(dim=axis) / torch.maximum(size, floor)).max().item()
        assert worst <= 4 * limit, f"{what}: worst {word} {worst:.2e} > {4 * limit:.2e}"
