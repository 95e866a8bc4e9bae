"""Gates whose weights sum to 1 over the experts, and gates that are set from outside."""

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
    """Token gate softmax_e((Phi x + phi_bias) / temperature), over the `top_k` largest logits.

    The weights of a token sum to 1. The parameters are `phi` [E,K] and `phi_bias` [E].

    Args:
        in_features: K, the layer's input features.
        num_experts: E.
        top_k: Number of experts that share a token; the others get 0. None: all of them.
        temperature: Divides the logits.
        device: Device of the parameters.
        dtype: Dtype of the parameters, torch's default if None.

    Raises:
        MoleValueError: `top_k` is not between 1 and E, or the temperature is not finite and above 0.

    Source: X-LoRA (Buehler & Buehler, 2024), whose scalings are softmaxes per token and layer. X-LoRA takes
    its logits from the last hidden state of a first pass; this gate takes them from the layer's own input, so
    it needs no first pass. `GivenGate` takes scalings that were computed elsewhere.
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
            return Gates(token_weight=self.phi, token_bias=self.phi_bias, top_k=self.top_k)
        return Gates(
            token_weight=self.phi / self.temperature,
            token_bias=self.phi_bias / self.temperature,
            top_k=self.top_k,
        )

    def extra_repr(self) -> str:
        return f"top {self.top_k} of {self.phi.shape[0]}, temperature {self.temperature:g}"


class GivenGate(Gate):
    """The tensor that was set last, with its gradient; 1 for every expert before that.

    For gates that something outside the layer computes: a router, a first pass (X-LoRA), a hypernetwork.

    Args:
        num_experts: E.
        device: Device of the gate until one is set.
    """

    def __init__(self, num_experts: int, device=None) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.given: Tensor = torch.ones(1, 1, num_experts, device=device)

    def set(self, gate: Tensor) -> None:
        """Use this gate from the next call on.

        Args:
            gate: [B|1,T|1,E] of a floating dtype; held, not copied, and its gradient flows back.

        Raises:
            MoleShapeError: The gate has another shape. The old one stays.
        """
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
    """Sample gate softmax_e(W c_b / temperature) of cluster centre c_b, and 1 − max_e for a universal expert.

    The softmax is over all routed experts: with `top_k` 1, the chosen expert gets its probability, not 1.
    `assign` sets the cluster of each sample. The parameter is `weight` [E−1,D], or [E,D] without a universal
    expert.

    Args:
        centres: [C,D] float, for example k-means of prompt embeddings; fixed, copied as float32.
        num_experts: E, with the universal expert, which is the last.
        top_k: Number of routed experts that a sample gets; the others get 0.
        temperature: Divides the logits.
        universal: Whether the last expert is the universal one.
        device: Device of the centres and parameters.

    Raises:
        MoleShapeError: The centres are not finite [C,D] of a floating dtype.
        MoleValueError: Too few experts, or `top_k` or `temperature` out of range.

    Source: MoCLE (Gou et al., 2023), equations of the cluster router and the universal expert. For top-1 its
    released code multiplies by the largest gate twice; this gate does so once, as in the paper.
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
        """Set the cluster of each sample.

        Args:
            clusters: [B] int64, or [1] for all samples.

        Raises:
            MoleTypeError: Another dtype or number of dimensions.
            MoleValueError: A cluster that does not exist.
        """
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
        """Assign each sample to the nearest centre (Euclidean).

        Args:
            embeddings: [B,D], of the kind that the centres were computed from.

        Returns:
            The clusters [B] int64.

        Raises:
            MoleShapeError: The embeddings are not [B,D].
        """
        if embeddings.dim() != 2 or embeddings.shape[1] != self.centres.shape[1]:
            raise MoleShapeError(
                "ClusterGate", expected=f"embeddings [B,{self.centres.shape[1]}]", got=tuple(embeddings.shape)
            )
        self.assign(torch.cdist(embeddings.to(self.centres), self.centres).argmin(1))
        return self.clusters

    def operands(self, experts: LayerExperts) -> Gates:
        return Gates(gate=self.weights()[:, None])

    def weights(self) -> Tensor:
        """The gate [B,E] float32 of the samples assigned last; [1,E] where one cluster serves all."""
        logits = self.centres[self.clusters] @ self.weight.float().mT / self.temperature
        shares = torch.softmax(logits, -1)
        routed = torch.where(softmax_of_largest(logits, self.top_k) > 0, shares, 0)
        return torch.cat([routed, 1 - shares.amax(-1, keepdim=True)], -1) if self.universal else routed


def _check_top_k(where: str, top_k: int | None, most: int) -> int:
    if top_k is not None and not 1 <= top_k <= most:
        raise MoleValueError(where, expected=f"top_k between 1 and the {most} experts", got=top_k)
    return most if top_k is None else top_k


def _check_temperature(where: str, temperature: float) -> float:
    if not (math.isfinite(temperature) and temperature > 0):
        raise MoleValueError(where, expected="a finite temperature above 0", got=temperature)
    return float(temperature)
