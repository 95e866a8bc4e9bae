"""One call of the operator: its operands, what it gives, and its gradients.

A `Call` goes from the public function to the backend; `Outputs` and `Gradients` come back. Only
`ops/schema.py` flattens it, for torch.library, by `FIELDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mole_kernels.problem import Problem


class Experts(NamedTuple):
    """E low-rank experts of one layer, packed: A_e one under the other, B_e side by side.

    Args:
        down: [S,R,K], the A_e, R = Σ ranks; S = 1 (shared by the batch) or B (one set per sample), or any
            with an
            assignment.
        up: [S,N,R], the B_e.
        scale: [E] float32, s_e: the convention's scale times the adapter's own.
        ranks: R_e of each expert, in order.
        assignment: [B] int64, which of the S sets each sample takes; −1: none, its row of y is the base
            layer's.
    """

    down: Tensor
    up: Tensor
    scale: Tensor
    ranks: tuple[int, ...]
    assignment: Tensor | None = None


class Gates(NamedTuple):
    """The gates of one call; each part may be absent, and those present multiply.

    Token gate: l = sigmoid(x token_weightᵀ + token_bias), or softmax over the experts by `top_k`. Sample
    gate:
    G_e = sigmoid(Σ_{r∈e} sample_weight_r · mean_t h_r + sample_bias_e), h = x Aᵀ.

    Args:
        gate: A given gate, broadcastable to [B,T,E]: constants, masks, one-hot per sample.
        token_weight: [E,K].
        token_bias: [E].
        sample_weight: [S,R] float32.
        sample_bias: [E].
        top_k: 0: sigmoids, independent of one another; k ≥ 1: softmax over each token's k largest logits, 0
            for
            the other experts (k ≥ E: over all; of equal logits the first expert counts as the larger).
    """

    gate: Tensor | None = None
    token_weight: Tensor | None = None
    token_bias: Tensor | None = None
    sample_weight: Tensor | None = None
    sample_bias: Tensor | None = None
    top_k: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        return {name: t for name, t in zip(self._fields, self) if isinstance(t, Tensor)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Gates:
        """The same gates with every tensor changed."""
        return Gates(**{name: change(t) for name, t in self.tensors().items()}, top_k=self.top_k)


class Call(NamedTuple):
    """One call: checked, cast to one dtype, x as samples of tokens.

    x        [B,T,K]
    weight   [N,K], bias [N] or None: the frozen base layer
    save     whether a gradient will be asked for, so that h is kept
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    experts: Experts
    gates: Gates
    save: bool = False

    def problem(self) -> Problem:
        """Its sizes, dtype, device and gate kinds, without its tensors."""
        x, gates = self.x, self.gates
        B, T, K = x.shape
        token = gates.token_weight is not None
        return Problem(
            B=B,
            T=T,
            K=K,
            N=self.weight.shape[0],
            ranks=tuple(self.experts.ranks),
            S=self.experts.down.shape[0],
            dtype=x.dtype,
            device=x.device.type,
            token_gate=token,
            sample_gate=gates.sample_weight is not None,
            given_gate=gates.gate is not None,
            top_k=gates.top_k if token else 0,
            assigned=self.experts.assignment is not None,
        )

    def is_empty(self) -> bool:
        """Whether a size is 0, so that there is nothing for a kernel to do."""
        down = self.experts.down
        return 0 in (self.x.numel(), self.weight.shape[0], down.shape[0], down.shape[1])

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All its operands that are tensors, where they are given."""
        down, up, scale, _, assignment = self.experts
        return (self.x, self.weight, self.bias, down, up, scale, assignment, *self.gates.tensors().values())

    def flat(self) -> tuple[Any, ...]:
        """Its operands in the order of `FIELDS`."""
        return (self.x, self.weight, self.bias, *self.experts, *self.gates, self.save)

    @classmethod
    def of_flat(cls, values: Sequence[Any]) -> Call:
        """The call that `flat` made these of; ranks become a tuple."""
        x, weight, bias, down, up, scale, ranks, assignment, *others, save = values
        experts = Experts(down, up, scale, tuple(ranks), assignment)
        return cls(x, weight, bias, experts, Gates(*others), save)


# the operands of a call, one by one: for torch.library and for the native library, in this order
FIELDS = ("x", "weight", "bias", *Experts._fields, *Gates._fields, "save")


class Outputs(NamedTuple):
    """What a forward gives; a tensor of no elements stands for what the call does not have.

    y            [B,T,N] in x's dtype
    h            [B,T,R] in x's dtype, x downᵀ: where the call is saved for a gradient
    token_gate   [B,T,E] l, sample_gate [B,E] G: in the gates' dtype
    """

    y: Tensor
    h: Tensor
    token_gate: Tensor
    sample_gate: Tensor


class Saved(NamedTuple):
    """What a backward is given of its forward's `Outputs`."""

    h: Tensor
    token_gate: Tensor
    sample_gate: Tensor


class Need(NamedTuple):
    """Which gradients are wanted: the operands that have one."""

    x: bool
    down: bool
    up: bool
    scale: bool
    gate: bool
    token_weight: bool
    token_bias: bool
    sample_weight: bool
    sample_bias: bool


class Gradients(NamedTuple):
    """One gradient for each field of `Need`; a tensor of no elements where it is not wanted."""

    x: Tensor
    down: Tensor
    up: Tensor
    scale: Tensor
    gate: Tensor
    token_weight: Tensor
    token_bias: Tensor
    sample_weight: Tensor
    sample_bias: Tensor
