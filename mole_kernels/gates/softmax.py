"""Gates that share one unit among the experts: per token, and per sample from a cluster."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import Gate
from mole_kernels.operands import Gates
from mole_kernels.reference import softmax_of_largest


class SoftmaxGate(Gate):
    """l = softmax_e((Phi x + phi_bias) / temperature) per token, over the top_k largest where that is given
    (the others get 0).

    phi [E,K], phi_bias [E]; top_k None: over all experts. The sum over the experts is 1 for every token.
    Source: X-LoRA (Buehler & Buehler, 2024), whose scalings are softmaxes per token and layer with an
    optional top-k and temperature.
    It scales x before A, which is the same number, as experts are linear; its logits come from a first pass's
    last hidden state, ours
    from the layer's own input, so that no first pass is needed. Its other form, given scalings, is
    `GivenGate`.
    """

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        temperature: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.top_k = _check_top_k("SoftmaxGate", top_k, num_experts)
        self.temperature = _check_temperature("SoftmaxGate", temperature)
        make = {"device": device, "dtype": dtype}
        self.phi = nn.Parameter(torch.empty(num_experts, in_features, **make))
        self.phi_bias = nn.Parameter(torch.zeros(num_experts, **make))
        bound = 1 / math.sqrt(in_features)
        nn.init.uniform_(self.phi, -bound, bound)

    def operands(self, experts: LayerExperts) -> Gates:
        if self.temperature == 1:
            return Gates(phi=self.phi, phi_bias=self.phi_bias, top_k=self.top_k)
        return Gates(
            phi=self.phi / self.temperature, phi_bias=self.phi_bias / self.temperature, top_k=self.top_k
        )

    def extra_repr(self) -> str:
        return f"top {self.top_k} of {self.phi.shape[0]}, temperature {self.temperature:g}"


class GivenGate(Gate):
    """gate = whatever tensor was set last, broadcastable to [B,T,E]; its gradient flows to where it came
    from.

    For gates that something outside the layer computes: a router, a first pass (X-LoRA), a hypernetwork.
    """

    def __init__(self, num_experts: int, device=None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.given: Tensor = torch.ones(1, 1, num_experts, device=device)

    def set(self, gate: Tensor) -> None:
        """gate [B|1,T|1,E] float; kept as it is, not copied."""
        if gate.dim() != 3 or gate.shape[2] != self.num_experts:
            raise MoleShapeError(
                "GivenGate.set", expected=f"a gate [B|1,T|1,{self.num_experts}]", got=tuple(gate.shape)
            )
        self.given = gate

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.given)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.given = self.given.to(fn(self.given).device)
        return self

    def __getstate__(self):
        return {**self.__dict__, "given": self.given.detach()}


class ClusterGate(Gate):
    """gate = softmax_e over the top_k of (W c_b / temperature) for the E−1 first experts, and 1 − max of them
    for the last, universal one.

    centres   [C,D] float  cluster centres (k-means of prompt or image embeddings), fixed
    weight    [E−1,D]      the router; `assign` says which cluster each sample of the batch belongs to
    top_k     how many of the E−1 share; 1: the chosen expert gets its probability, not 1 (the softmax is over
              all E−1)
    Source: MoCLE (Gou et al., 2023), equations of the cluster router and the universal expert. Its released
    code multiplies by the
    largest gate twice for top-1; this does so once, as the paper has it.
    """

    centres: Tensor
    clusters: Tensor

    def __init__(
        self,
        centres: Tensor,
        num_experts: int,
        *,
        top_k: int = 1,
        temperature: float = 1.0,
        universal: bool = True,
        device=None,
    ) -> None:
        super().__init__()
        if centres.dim() != 2 or not centres.is_floating_point() or not torch.isfinite(centres).all():
            raise MoleShapeError(
                "ClusterGate",
                expected="finite centres [C,D] of a floating dtype",
                got=f"{centres.dtype} {tuple(centres.shape)}",
            )
        routed = num_experts - universal
        if routed < 1:
            raise MoleValueError(
                "ClusterGate", expected="at least one expert beside the universal one", got=num_experts
            )
        self.top_k, self.universal = _check_top_k("ClusterGate", top_k, routed), universal
        self.temperature = _check_temperature("ClusterGate", temperature)
        self.register_buffer("centres", centres.detach().to(device=device, dtype=torch.float32).clone())
        self.register_buffer("clusters", torch.zeros(1, dtype=torch.int64, device=device))
        self.weight = nn.Parameter(torch.empty(routed, centres.shape[1], device=device))
        nn.init.normal_(self.weight, std=centres.shape[1] ** -0.5)

    def assign(self, clusters: Tensor) -> None:
        """clusters [B] int64: the cluster of each sample, or [1] for all of them."""
        if clusters.dtype != torch.int64 or clusters.dim() != 1:
            raise MoleTypeError(
                "ClusterGate.assign",
                expected="clusters [B] int64",
                got=f"{clusters.dtype} {tuple(clusters.shape)}",
            )
        outside = (clusters < 0) | (clusters >= self.centres.shape[0])
        if bool(outside.any()):
            b = int(outside.nonzero()[0])
            raise MoleValueError(
                "ClusterGate.assign",
                expected=f"clusters 0 … {self.centres.shape[0] - 1}",
                got=f"{int(clusters[b])} for sample {b}",
            )
        self.clusters = clusters.to(self.centres.device)

    def assign_nearest(self, embeddings: Tensor) -> Tensor:
        """Assign each sample [B,D] to the nearest centre (Euclidean), and say which [B]."""
        if embeddings.dim() != 2 or embeddings.shape[1] != self.centres.shape[1]:
            raise MoleShapeError(
                "ClusterGate", expected=f"embeddings [B,{self.centres.shape[1]}]", got=tuple(embeddings.shape)
            )
        self.assign(torch.cdist(embeddings.to(self.centres), self.centres).argmin(1))
        return self.clusters

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.weights()[:, None])

    def weights(self) -> Tensor:
        """The gate of each sample [B,E] float32."""
        logits = self.centres[self.clusters] @ self.weight.float().mT / self.temperature
        shares = torch.softmax(logits, -1)
        kept = torch.where(softmax_of_largest(logits, self.top_k) > 0, shares, 0)
        return torch.cat([kept, 1 - shares.amax(-1, keepdim=True)], -1) if self.universal else kept


def _check_top_k(where: str, top_k: int | None, most: int) -> int:
    if top_k is not None and not 1 <= top_k <= most:
        raise MoleValueError(where, expected=f"top_k between 1 and the {most} experts", got=top_k)
    return most if top_k is None else top_k


def _check_temperature(where: str, temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise MoleValueError(where, expected="a finite temperature above 0", got=temperature)
    return float(temperature)
