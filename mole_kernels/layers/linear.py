"""A frozen linear layer plus E gated low-rank experts, and what it shares with the convolution; they hold
tensors and do no arithmetic.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.errors import MoleShapeError, MoleStateError, MoleTypeError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.functional import NO_GATES, run_call
from mole_kernels.gates.gate import Gate
from mole_kernels.layers import offload, sharded
from mole_kernels.operands import Experts, Gates
from mole_kernels.ops.direct import PLAIN

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


_NONE: dict[str, Any] = {}


class LastGates(NamedTuple):
    """What the gates of the last eager forward said: token [B,T,E], sample [B,E], given (broadcastable to
    [B,T,E]); None where absent.
    """

    token: Tensor | None
    sample: Tensor | None
    given: Tensor | None


class Gated(nn.Module):
    """What the linear layer and its convolutional twin share: experts, a gate, a backend, and whether they
    are on.
    """

    experts: LayerExperts
    gate: Gate | None
    backend: str
    experts_on: bool
    # the values of `last_gates`
    # False for a layer that was patched in place: its state dict is the base's
    experts_in_state: bool
    # the ranks that share a batch's tokens, whose pooled gates look at all of them: `Handle.split_tokens`
    tokens_group: ProcessGroup | None = None
    # layers with the same input, whose outputs one of them makes for all: `Handle.group`
    group: Any = None

    def mixture(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """y = x Wᵀ + b + Σ_e s_e·g_e·(x A_eᵀ) B_eᵀ for tokens x [...,K] and weight [N,K]."""
        # `self.experts` would go through nn.Module.__getattr__
        modules = self._modules
        experts: LayerExperts = modules["experts"]  # type: ignore[assignment]
        samples = None
        if experts.route is not None:
            if experts.is_idle():
                return F.linear(x, weight, bias)
            samples = x.shape[0] if x.dim() > 2 else None
        gate: Gate | None = modules.get("gate")  # type: ignore[assignment]
        if "_hf_hook" in experts.__dict__:
            with offload.loaded(experts, gate):
                gates = NO_GATES if gate is None else gate.operands(experts)
                return self.mixture_of(x, weight, bias, experts.operands(samples), gates)
        gates = NO_GATES if gate is None else gate.operands(experts)
        return self.mixture_of(x, weight, bias, experts.operands(samples), gates)

    def operands_of_gate(self) -> Gates:
        """The operands of the layer's gate; `NO_GATES` where it has none."""
        return NO_GATES if self.gate is None else self.gate.operands(self.experts)

    def mixture_of(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, experts: Experts, gates: Gates
    ) -> Tensor:
        """`mixture` of operands given; the values of the gates are kept."""
        if experts.assignment is not None and x.dim() == 2 and x.shape[0] == experts.assignment.shape[0]:
            # without a token axis each row is a sample of one token (time_emb_proj)
            return self.mixture_of(x[:, None], weight, bias, experts, gates)[:, 0]
        if gates.sample_weight is not None and self.tokens_group is not None:
            gates = sharded.pool_over(self.tokens_group, x, experts, gates)
        compiling = torch.compiler.is_compiling()
        if type(weight) not in PLAIN and sharded.is_sharded(weight):
            y, token, sample = sharded.sharded_linear(x, weight, bias, experts, gates)
        else:
            y, token, sample = run_call(x, weight, bias, experts, gates, self.backend, compiling)
        bias_delta = self._modules["experts"].__dict__.get("_buffers", _NONE).get("bias_delta")
        if bias_delta is not None:
            y = y + bias_term(x, experts.scale, gates.gate, token, sample, bias_delta).to(y.dtype)
        if not compiling:
            given = None if gates.gate is None else gates.gate.detach()
            # past nn.Module's search for parameters and modules
            self.__dict__["_last_gates"] = (token, sample, given)
        return y

    @property
    def last_gates(self) -> LastGates | None:
        """The values of the gates in the last eager forward; None before the first."""
        values = self.__dict__.get("_last_gates")
        return None if values is None else LastGates._make(values)

    @last_gates.setter
    def last_gates(self, values: LastGates | None) -> None:
        self.__dict__["_last_gates"] = values

    def attach_experts(
        self, experts: LayerExperts, gate: Gate | None, backend: str, *, in_state: bool = True
    ) -> None:
        """`in_state`: whether experts and gate are part of the layer's state dict."""
        self.experts, self.gate, self.backend = experts, gate, backend
        self.experts_on, self.last_gates, self.experts_in_state = True, None, in_state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The base layer's names and tensors; with experts and gate only where the layer was built with them.

        A layer that was patched in place reads as the base to whatever copies, averages or saves weights.
        accelerate alone gets everything: its offload hooks find each module's tensors in the model's state
        dict, and `Accelerator.save_state` is meant to keep what trains.
        """
        state = super().state_dict(*args, **kwargs)
        if not self.experts_in_state and not _asked_by_accelerate():
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            inner = tuple(f"{prefix}{child}" for child in ("experts", "gate"))
            for table in (state, getattr(state, "_metadata", {})):
                for key in [k for k in table if f"{k}.".startswith(tuple(f"{name}." for name in inner))]:
                    del table[key]
        return state

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if not self.experts_in_state:
            # what the base's state lacks stays as it is; what a state does hold of them is loaded
            for name in ("experts", "gate"):
                child = self._modules.get(name)
                for key, tensor in () if child is None else child.state_dict(keep_vars=True).items():
                    state_dict.setdefault(f"{prefix}{name}.{key}", tensor)

    def __getstate__(self):
        # the last call's activations are no part of the layer, and a process group belongs to its process
        return {name: value for name, value in self.__dict__.items() if name != "tokens_group"} | {
            "_last_gates": None
        }

    def _apply(self, fn, recurse: bool = True):
        """Cast and move; experts and gates are never stored in 8 bits, and not narrowed while they train.

        Storage in 8 bits (diffusers' layerwise casting) is for the base. Parameters that require a gradient
        keep their dtype when the model is cast to a narrower one: they are the optimiser's master weights,
        and each call computes in the layer's dtype anyway.
        """
        super()._apply(fn, recurse=False)
        if recurse:
            for child in self.children():
                trains = any(p.requires_grad for p in child.parameters())
                child._apply(lambda t, trains=trains: _wide_enough(t, fn(t), trains))
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if "." in name:
            raise MoleStateError(
                f"parallelize_module of a {type(self).__name__}",
                f"torch would shard its experts ({name}) as if they were the weight",
                hint="parallelize_module first, then patch",
            )
        super().register_parameter(name, param)


class GatedLoRALinear(Gated, nn.Linear):
    """y = x Wᵀ + b + Σ_e s_e·g_e(token, sample)·(x A_eᵀ) B_eᵀ; W and b are frozen.

    x [...,K] -> [...,N]; the first dimension is the sample, all between are tokens ([M,K] is one sample).
    Made by
    `from_linear`, or by `mk.patch` in place.

    Args:
        in_features: K, as nn.Linear's.
        out_features: N, as nn.Linear's.
        bias: Whether there is a b.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    @classmethod
    def from_linear(
        cls,
        base: nn.Linear,
        experts: LayerExperts | Experts,
        gate: Gate | None = None,
        *,
        backend: str = "auto",
    ) -> GatedLoRALinear:
        """A new layer that shares base's weight and bias, which it freezes; base is left alone otherwise.

        Args:
            base: The layer y = x Wᵀ + b, W [N,K].
            experts: `LayerExperts`, or the operands of one call, `mk.Experts` (down [S,R,K], up [S,N,R],
                scale [E], ranks), whose tensors are copied and whose experts are called "0", "1" …
            gate: What weighs the experts; None for the plain sum.
            backend: "auto", or a backend by name.

        Returns:
            The layer, in base's training mode.

        Raises:
            MoleTypeError: `experts` is neither, or `base` no nn.Linear. Nothing changes.
            MoleShapeError: The experts' K and N are not the layer's. Nothing changes.
            MoleValueError: Operands with an assignment, which belongs to a call and not to a layer.
        """
        if not isinstance(base, nn.Linear):
            raise MoleTypeError("from_linear", expected="base of type nn.Linear", got=type(base).__name__)
        experts = _layer_experts(experts)
        check_fit("GatedLoRALinear", base.in_features, base.out_features, experts)
        layer = cls(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        base.requires_grad_(False)
        layer.weight, layer.bias = base.weight, base.bias
        layer.attach_experts(experts, gate, backend)
        return layer.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if self.group is not None and (y := self.group.take(self, x)) is not None:
            return y
        # past nn.Module.__getattr__; a parametrised or sharded layer keeps them elsewhere
        own = self._parameters
        weight = own["weight"] if "weight" in own else self.weight  # noqa: SIM401
        bias = own["bias"] if "bias" in own else self.bias  # noqa: SIM401
        assert weight is not None
        if not self.experts_on:
            return F.linear(x, weight, bias)
        return self.mixture(x, weight, bias)


def bias_term(
    x: Tensor,
    scale: Tensor,
    gate: Tensor | None,
    token: Tensor | None,
    sample: Tensor | None,
    bias_delta: Tensor,
) -> Tensor:
    """Σ_e s_e · gate_e · l_e · G_e · β_e: what gated bias differences add to y.

    Args:
        x: [...,K], the layer's input: the first dimension is the sample, all between are tokens.
        scale: s [E].
        gate: Given gate, broadcastable to [B,T,E], or None.
        token: Token gate l [B,T,E], or None.
        sample: Sample gate G [B,E], or None.
        bias_delta: β [E,N].

    Returns:
        [...,N] float32, of x's leading dimensions or broadcastable to them.
    """
    gamma = scale.float()[None, None]
    for factor in (gate, token, None if sample is None else sample[:, None]):
        gamma = gamma if factor is None else gamma * factor.float()
    term = gamma @ bias_delta.float()
    if x.dim() == 3 or term.shape[:2] == (1, 1):
        return term if x.dim() == 3 else term[0, 0]
    samples, tokens = (
        (x.shape[0], x[0].numel() // x.shape[-1]) if x.dim() > 3 else (1, max(x.numel() // x.shape[-1], 1))
    )
    return term.expand(samples, tokens, -1).reshape(*x.shape[:-1], -1)


def _layer_experts(experts: LayerExperts | Experts) -> LayerExperts:
    """What a layer holds, of what it was given."""
    if isinstance(experts, LayerExperts):
        return experts
    if not isinstance(experts, Experts):
        raise MoleTypeError("from_linear", expected="LayerExperts or Experts", got=type(experts).__name__)
    if experts.assignment is not None:
        raise MoleValueError(
            "from_linear",
            expected="experts without an assignment",
            got=f"one of {list(experts.assignment.shape)}",
            hint="gated_lora_linear takes one at each call; mole_kernels.serve keeps one for a model",
        )
    down, up, scale, ranks, _ = experts
    names = tuple(str(e) for e in range(len(ranks)))
    down, up, scale = (t.detach().clone() for t in (down, up, scale))
    return LayerExperts(down, up, scale, names, tuple(ranks))


def _asked_by_accelerate() -> bool:
    """Whether the first caller outside of torch and of this file is accelerate."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module != __name__ and not module.startswith("torch."):
            return module.startswith("accelerate.")
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _wide_enough(old: Tensor, new: Tensor, trains: bool) -> Tensor:
    """`new`, or `old` on new's device where the cast would lose what must not be lost."""
    narrower = new.is_floating_point() and new.element_size() < old.element_size()
    return old.to(new.device) if narrower and (trains or new.element_size() == 1) else new


def check_fit(where: str, K: int, N: int, experts: LayerExperts) -> None:
    """The experts' K and N are the layer's."""
    got = (experts.down.shape[2], experts.up.shape[1])
    if got != (K, N):
        raise MoleShapeError(where, expected=f"experts of K, N = {K}, {N}", got=f"{got[0]}, {got[1]}")
