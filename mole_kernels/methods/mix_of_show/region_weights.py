"""Experts by region: the gates of a patched model filled with what each region asks of each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleStateError
from mole_kernels.gates.softmax import GivenGate
from mole_kernels.layers.linear import Gated
from mole_kernels.methods.mix_of_show.regions import Region
from mole_kernels.patching.handle import Handle


class SampleLayout(Protocol):
    """What a region's weights ask of the open `regional`: whose sample each row is, and the shares of
    its places.
    """

    def samples(self, B: int) -> list[tuple[int, bool]]: ...

    def table(self, B: int, T: int, device: torch.device) -> Tensor: ...


class RegionWeights:
    """How much of each expert every place gets: the mean of its regions' weights, by their shares."""

    def __init__(
        self, handle: Handle, by_prompt: Sequence[Sequence[Region]], elsewhere: Mapping[str, float] | None
    ) -> None:
        self.names, self.layers = (
            handle.names,
            {
                p: m
                for p, m in handle.layers.items()
                if isinstance(m, Gated) and isinstance(m.gate, GivenGate)
            },
        )
        if not self.layers:
            raise MoleStateError(
                "regional",
                "the patch has no region gates",
                hint="mk.patch(pipe, experts, gates=region_gates)",
            )
        outside = self._row(elsewhere)
        self.rows = torch.stack(
            [
                torch.stack([outside, *(self._row(region.experts) for region in regions)])
                for regions in by_prompt
            ]
        )

    def _row(self, experts: Mapping[str, float] | None) -> Tensor:
        for name in experts or {}:
            if name not in self.names:
                raise MoleKeyError(
                    "regional", expected=f"experts among {', '.join(self.names)}", got=repr(name)
                )
        return torch.tensor(
            [1.0 if experts is None else float(experts.get(name, 0.0)) for name in self.names]
        )

    def hook(self, state: SampleLayout) -> list[Any]:
        """Before a layer that sees the picture runs, its gate becomes [B,T,E] = Σ_s shares_s · weight_s."""

        def fill(module: Any, args: tuple[Any, ...]) -> None:
            x = args[0]
            B, T = x.shape[0], x.shape[-1] * x.shape[-2] if isinstance(module, nn.Conv2d) else x.shape[1]
            weights = self.rows[[p for p, _ in state.samples(B)]].to(x.device)
            module.gate.set(
                torch.einsum("bst,bse->bte", state.table(B, T, x.device), weights)[..., self._columns(module)]
            )

        seen = [m for path, m in self.layers.items() if not path.endswith(("attn2.to_k", "attn2.to_v"))]
        return [module.register_forward_pre_hook(fill) for module in seen]

    def for_texts(self, modules: Sequence[Any], samples: Sequence[tuple[int, bool]], S: int) -> None:
        """K and V of a region are made with that region's experts: one row of gates for each text
        [B·S,1,E].
        """
        for module in modules:
            if isinstance(module, Gated) and isinstance(module.gate, GivenGate):
                rows = self.rows[[p for p, _ in samples]][:, :S].flatten(0, 1)[:, None]
                module.gate.set(rows[..., self._columns(module)].to(module.experts.scale.device))

    def clear(self) -> None:
        for module in self.layers.values():
            gate: Any = module.gate
            gate.set(torch.ones(1, 1, gate.num_experts, device=gate.given.device))

    def _columns(self, module: Any) -> list[int]:
        return [self.names.index(name) for name in module.experts.names]
