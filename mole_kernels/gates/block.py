"""One gate per transformer block and sample (MoLE of ICLR 2024), with a differentiable balancing loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mole_kernels.errors import MoleKeyError, MoleStateError, MoleTypeError
from mole_kernels.experts.layer import LayerExperts
from mole_kernels.gates.gate import Gate
from mole_kernels.operands import Gates


class BlockRouter(nn.Module):
    """g = softmax_e(W · normalise(mean_t h) / exp(log_temperature)) for each sample.

    The paper gates on a block's flattened, normalised features, which ties W to one picture size. This
    router takes the mean over tokens and so any size. The temperature is learnt, as in the paper.

    Args:
        features: C, the width of the block's input.
        num_experts: E.
        device: Device of the parameters.
    """

    def __init__(self, features: int, num_experts: int, device=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, features, device=device))
        self.log_temperature = nn.Parameter(torch.zeros((), device=device))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, h: Tensor) -> Tensor:
        """Gates [B,E] float32 of a block's input h [B,T,C]."""
        pooled = nn.functional.normalize(h.float().flatten(1, -2).mean(1), dim=-1)
        # float32 even under autocast, which would turn 0.8 of an expert into 0.797
        with torch.autocast(h.device.type, enabled=False):
            return torch.softmax(pooled @ self.weight.float().mT / self.log_temperature.float().exp(), -1)


class BlockGate(Gate):
    """The output of the block's router, the same for every token and every layer of the block.

    Args:
        router: The router that the layers of the block share.
    """

    def __init__(self, router: BlockRouter) -> None:
        super().__init__()
        self.router = router
        self.current: Tensor | None = None

    def operands(self, experts: LayerExperts) -> Gates:
        if self.current is None:
            raise MoleStateError(
                "BlockGate",
                "its block has not run: the gate is made from the block's input",
                hint="run the whole model",
            )
        return Gates(gate=self.current[:, None])

    def __getstate__(self):
        return {**self.__dict__, "current": None}


class BlockRouting:
    """One softmax over the experts for each transformer block and sample.

    A layer outside all blocks has no gate: every expert counts fully there. `remove` takes the hooks off
    the blocks.

    Args:
        model: The module whose blocks are routed.
        is_block: (path, module) -> whether the module is a block. None: modules whose class name ends in
            "TransformerBlock".

    Raises:
        MoleTypeError: `model` is no nn.Module, for example a whole pipeline.
        MoleKeyError: No module of it is a block.

    Example:
        routing = mk.gates.BlockRouting(unet)
        handle = mk.patch(unet, experts, gates=routing)
        loss = denoising + 0.01 * routing.balance_loss()

    Source: MoLE (Wu et al., ICLR 2024, arXiv 2404.13628).
    """

    def __init__(self, model: nn.Module, is_block: Callable[[str, nn.Module], bool] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise MoleTypeError(
                "BlockRouting",
                expected="an nn.Module (a pipeline's unet or transformer)",
                got=type(model).__name__,
            )
        takes = is_block or (lambda path, module: type(module).__name__.endswith("TransformerBlock"))
        self._blocks = {
            path: module for path, module in model.named_modules() if path and takes(path, module)
        }
        if not self._blocks:
            raise MoleKeyError(
                "BlockRouting",
                f"no transformer block in this {type(model).__name__}",
                hint="is_block=lambda path, module: …",
            )
        self.routers: dict[str, BlockRouter] = {}
        self._gates: dict[str, list[BlockGate]] = {}
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._last: dict[str, Tensor] = {}
        self._experts: int | None = None

    def __call__(self, path: str, module: nn.Module, experts: LayerExperts) -> Gate | None:
        """The gate of one layer, for `patch(gates=…)`."""
        block = next(
            (b for b in sorted(self._blocks, key=len, reverse=True) if f".{path}".find(f".{b}.") >= 0), None
        )
        if block is None:
            return None
        E = len(experts.names)
        if self._experts not in (None, E):
            raise MoleStateError(
                "BlockRouting",
                expected=f"every layer to hold the same {self._experts} experts",
                got=f"{E} at {path}",
            )
        self._experts = E
        if block not in self.routers:
            self.routers[block] = BlockRouter(_width(self._blocks[block]), E, device=experts.scale.device)
            self._gates[block] = []
            self._hooks.append(
                self._blocks[block].register_forward_pre_hook(self._hook(block), with_kwargs=True)
            )
        gate = BlockGate(self.routers[block])
        self._gates[block].append(gate)
        return gate

    def _hook(self, block: str) -> Callable[..., None]:
        def route(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            h = args[0] if args else kwargs["hidden_states"]
            weights = self.routers[block](h)
            self._last[block] = weights
            for gate in self._gates[block]:
                gate.current = weights

        return route

    def gates(self) -> dict[str, Tensor]:
        """block -> its gate [B,E] float32 in the last forward.

        Raises:
            MoleStateError: No routed block has run yet.
        """
        if not self._last:
            raise MoleStateError("BlockRouting", "no routed block has run yet", hint="run the model first")
        return dict(self._last)

    def balance_loss(self) -> Tensor:
        """−Σ_e log q_e, where q_e is the mean of gate e over blocks and samples of the last forward.

        It is smallest where all experts are used equally. This is the paper's −log Π_e q_e with a gradient;
        the released code computes it from detached gates, which leaves none.

        Returns:
            A scalar float32.

        Raises:
            MoleStateError: No routed block has run yet.
        """
        gates = list(self.gates().values())
        return -torch.cat([gate.to(gates[0].device) for gate in gates]).mean(0).log().sum()

    def parameters(self) -> Iterable[nn.Parameter]:
        """The routers' parameters, for an optimiser."""
        for router in self.routers.values():
            yield from router.parameters()

    def remove(self) -> None:
        """Take the hooks off the blocks; the gates keep their last values."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


def _width(block: nn.Module) -> int:
    for name in ("norm1", "norm", "attn1", "attn"):
        part = getattr(block, name, None)
        for shape in (getattr(part, "normalized_shape", None), getattr(part, "weight", None)):
            if isinstance(shape, tuple):
                return int(shape[-1])
            if isinstance(shape, Tensor):
                return int(shape.shape[-1])
    linear = next((m for m in block.modules() if isinstance(m, nn.Linear)), None)
    if linear is None:
        raise MoleTypeError(
            "BlockRouting",
            expected="a block with a norm or a linear layer, to know its width",
            got=type(block).__name__,
        )
    return linear.in_features
