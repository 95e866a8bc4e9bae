"""A frozen convolution plus E gated low-rank experts: a linear layer over the patch of pixels that each
output pixel sees.

An expert of a k×k convolution is A as a k×k convolution down to R channels and B as a 1×1 convolution up. So
A is stored [R, K·k·k] like
any other, ΔW = s·B·A reshapes to the convolution's weight, and the gates see the patch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mole_kernels.errors import MoleShapeError, MoleStateError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import Gate
from mole_kernels.layers import offload
from mole_kernels.layers.linear import Gated, check_fit
from mole_kernels.operands import Experts, Gates


class GatedLoRAConv2d(Gated, nn.Conv2d):
    """The gated layer for a convolution: x [B,K,H,W] -> [B,N,H',W'], every output pixel a token, any H and
    W.
    """

    @classmethod
    def from_conv(
        cls, base: nn.Conv2d, experts: LayerExperts, gate: Gate | None = None, *, backend: str = "auto"
    ) -> GatedLoRAConv2d:
        """A new layer that shares base's weight and bias (which it freezes)."""
        if reason := reason_against_conv(base):
            raise MoleStateError("GatedLoRAConv2d", reason)
        check_fit("GatedLoRAConv2d", *conv_sizes(base), experts)
        layer = cls(
            base.in_channels,
            base.out_channels,
            base.kernel_size,  # type: ignore[arg-type]
            base.stride,  # type: ignore[arg-type]
            base.padding,  # type: ignore[arg-type]
            base.dilation,  # type: ignore[arg-type]
            bias=base.bias is not None,
            padding_mode=base.padding_mode,
            device="meta",
        )
        base.requires_grad_(False)
        layer.weight, layer.bias = base.weight, base.bias
        layer.attach_experts(experts, gate, backend)
        return layer.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        if not self.experts_on or self.experts.is_idle():
            return nn.Conv2d.forward(self, x)
        if x.dim() not in (3, 4):
            raise MoleShapeError("GatedLoRAConv2d", expected="x [B,K,H,W] or [K,H,W]", got=tuple(x.shape))
        images = x if x.dim() == 4 else x[None]
        y = self._pointwise(images) if is_pointwise(self) else self._wide(images)
        return y if x.dim() == 4 else y[0]

    def _pointwise(self, images: Tensor) -> Tensor:
        y = self.mixture(images.flatten(2).mT, self.weight.flatten(1), self.bias)
        y = y.mT.unflatten(2, images.shape[2:])
        # the tokens' layout is channels-last; answer in the layout that came
        if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
            y = y.contiguous()
        return y

    def _wide(self, images: Tensor) -> Tensor:
        """The convolution itself, and beside it the operator on z = [A x, Φ x]: what is left of it once A and
        Φ are convolutions.
        """
        base = nn.Conv2d.forward(self, images)
        if offload.offloaded(self.experts):
            with offload.loaded(self.experts, self.gate):
                return self._beside(images, base)
        return self._beside(images, base)

    def _beside(self, images: Tensor, base: Tensor) -> Tensor:
        experts = self.experts.operands(images.shape[0])
        gates = self.operands_of_gate()
        z, inner, logits = self._shrunk(images, experts, gates)
        weight = z.new_zeros(self.out_channels, z.shape[1])
        y = self.mixture_of(z.flatten(2).mT, weight, None, inner, logits)
        return base + y.mT.unflatten(2, base.shape[2:]).to(base.dtype)

    def _shrunk(self, images: Tensor, experts: Experts, gates: Gates) -> tuple[Tensor, Experts, Gates]:
        """z [B, R (+E), H', W'], and the experts and gates that are left: down and phi pick their channels
        out of z.
        """
        S, R, _ = experts.down.shape
        z = self._filtered(images, experts.down.to(images.dtype), experts.assignment)
        if gates.token_weight is not None:
            E = gates.token_weight.shape[0]
            z = torch.cat([z, self._filtered(images, gates.token_weight.to(images.dtype)[None], None)], 1)
            pick = torch.eye(R + E, dtype=z.dtype, device=z.device)
            gates = gates._replace(token_weight=pick[R:])
        else:
            pick = torch.eye(R, dtype=z.dtype, device=z.device)
        return z, experts._replace(down=pick[:R].expand(S, -1, -1)), gates

    def _filtered(self, images: Tensor, filters: Tensor, assignment: Tensor | None) -> Tensor:
        """images [B,K,H,W] through filters [S,R,K·k·k] as a convolution like this one; with S > 1 every
        sample through its own set.
        """
        B, S, R = images.shape[0], filters.shape[0], filters.shape[1]
        padding: str | Sequence[int] = self.padding  # type: ignore[assignment]
        if self.padding_mode != "zeros":
            images, padding = (
                F.pad(images, self._reversed_padding_repeated_twice, mode=self.padding_mode),
                (0, 0),
            )
        shape = (self.in_channels, *self.kernel_size)
        if S == 1:
            return F.conv2d(images, filters.reshape(R, *shape), None, self.stride, padding, self.dilation)  # type: ignore[arg-type]
        # a sample without a set (−1) takes any: the operator closes its gate
        own = filters if assignment is None else filters[assignment.clamp(min=0)]
        side_by_side = images.reshape(1, B * self.in_channels, *images.shape[2:])
        z = F.conv2d(
            side_by_side, own.reshape(B * R, *shape), None, self.stride, padding, self.dilation, groups=B
        )  # type: ignore[arg-type]
        return z.reshape(B, R, *z.shape[2:])


def is_pointwise(conv: nn.Conv2d) -> bool:
    """A convolution that is a linear layer at every pixel: 1x1, stride 1, no padding, one group."""
    return (
        conv.kernel_size == (1, 1)
        and conv.stride == (1, 1)
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
    )


def reason_against_conv(conv: nn.Conv2d) -> str | None:
    """Why a convolution takes no experts, or None."""
    if conv.groups != 1:
        size = "x".join(map(str, conv.kernel_size))
        return (
            f"a {size} convolution of {conv.groups} groups (groups {conv.groups}): an expert's A would see "
            "only its own group's channels"
        )
    return None


def conv_sizes(conv: nn.Conv2d) -> tuple[int, int]:
    """(K, N) of a convolution as a linear layer over patches: K counts every weight that one output pixel
    sums over.
    """
    return conv.in_channels * conv.kernel_size[0] * conv.kernel_size[1], conv.out_channels


def conv_of(module: nn.Module) -> bool | tuple[int, int]:
    """What `LowRank.conv` says of factors for this layer: False for a linear one, True for a 1x1 convolution,
    else the kernel.
    """
    if not isinstance(module, nn.Conv2d):
        return False
    height, width = module.kernel_size
    return True if (height, width) == (1, 1) else (height, width)
