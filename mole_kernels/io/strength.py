"""The scale of each layer of a file, from wherever its writer put it: alpha tensors, PEFT's settings, the
header.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleWarning, printable
from mole_kernels.experts.checks import checked_alpha
from mole_kernels.experts.scales import scale_of
from mole_kernels.io.adapter_config import AdapterConfig
from mole_kernels.io.dialects.keys import some_keys
from mole_kernels.io.dialects.paths import spelled
from mole_kernels.io.layer_keys import LayerKeys


@dataclass(frozen=True)
class Strength:
    """Where a file's scales come from.

    Attributes:
        config: PEFT's settings; empty where there are none.
        alpha: The scale itself of a Mix-of-Show file, which does not hold it.
        origin: One phrase for people: where the scales stand.
    """

    config: AdapterConfig
    alpha: float | None
    origin: str

    def scale(self, layer: LayerKeys, alpha: Tensor | float | None, rank: int, where: str) -> float:
        """The scale of one layer.

        Args:
            layer: Its keys.
            alpha: The value under its alpha key, or None.
            rank: The rank of its factors.
            where: The file, for messages.

        Raises:
            MoleKeyError: An alpha in the tensors that differs from the settings', or settings of another
                rank.
        """
        # messages are made where one is needed: this runs for each of a thousand layers
        at = f"{where}, {layer.path or layer.module}" if self.config else where
        configured = self.config.scale(written_path(layer), rank, printable(at, 500)) if self.config else None
        if alpha is not None:
            number = _plain_number(alpha)
            if number is None:
                number = checked_alpha(f"{where}, '{printable(layer.keys['alpha'])}'", alpha)
            scale = scale_of("kohya", number, rank)
            if configured is not None and not math.isclose(scale, configured, rel_tol=1e-3):
                raise MoleKeyError(
                    printable(at, 500),
                    f"has both alpha keys and PEFT metadata, which differ: scale {scale:g} by its alpha, "
                    f"{configured:g} by {self.config.origin}",
                    hint="one of them must give the scale",
                )
            return scale
        if configured is not None:
            return configured
        return scale_of("mix_of_show", self.alpha, rank) if layer.dialect == "mix_of_show" else 1.0


def _plain_number(alpha: Tensor | float) -> float | None:
    """The value of a finite floating scalar; None for what `checked_alpha` must look at."""
    if isinstance(alpha, Tensor) and alpha.dim() == 0 and alpha.dtype in (torch.float32, torch.float16):
        value = alpha.item()
        return value if math.isfinite(value) else None
    return None


def written_path(layer: LayerKeys) -> str:
    """The layer's name as PEFT's settings know it: without wrappers, with the component that the file
    names.
    """
    name = spelled(layer.module)
    return f"{name.component}.{name.rest}" if name.component else name.rest


def strength_of(
    layers: Iterable[LayerKeys],
    metadata: Mapping[str, str],
    beside: AdapterConfig | None,
    alpha: float | None,
    where: str,
) -> Strength:
    """Find out who gives this file's scales.

    Args:
        layers: The file's layers.
        metadata: Its header's metadata.
        beside: The settings of an `adapter_config.json` that belongs to it.
        alpha: The scale of a Mix-of-Show file.
        where: The file, for messages.

    Raises:
        MoleFileError, MoleKeyError: As `AdapterConfig.from_metadata`.
    """
    layers = list(layers)
    config = AdapterConfig.from_metadata(metadata, where) or beside or AdapterConfig()
    if config and (left := config.not_targeted(map(written_path, layers))):
        warnings.warn(
            f"{where}: {config.origin} does not target {len(left)} layers that the file holds, and PEFT "
            "would leave "
            f"them out: {some_keys(left)}; they are read",
            MoleWarning,
            stacklevel=5,
        )
    with_alpha = [layer for layer in layers if "alpha" in layer.keys]
    if with_alpha:
        origin = "alpha in the file's tensors" + (
            "" if len(with_alpha) == len(layers) else ", 1 where there is none"
        )
        return Strength(config, alpha, origin)
    if config:
        return Strength(config, alpha, config.origin)
    if any(layer.dialect == "mix_of_show" for layer in layers):
        return Strength(
            config, alpha, "the alpha that was given" if alpha is not None else "none in the file: 1"
        )
    _tell_of_header(metadata, where)
    return Strength(config, alpha, "none in the file: 1")


def _tell_of_header(metadata: Mapping[str, str], where: str) -> None:
    """kohya's own loader takes alpha from tensors alone; a header that says otherwise is told of."""
    try:
        alpha, rank = (float(metadata[name]) for name in ("ss_network_alpha", "ss_network_dim"))
    except (KeyError, ValueError):
        return
    if alpha != rank:
        warnings.warn(
            f"{where}: the header says ss_network_alpha {alpha:g} for ss_network_dim {rank:g}, but the "
            "file holds no "
            f"alpha tensors; its scale is 1, as kohya's own loader reads it. Set {alpha / rank:g} as the "
            "adapter's "
            "weight if alpha was lost",
            MoleWarning,
            stacklevel=6,
        )
