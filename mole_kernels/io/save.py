"""An expert into a LoRA file that other tools read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.lazy import stored_dtype
from mole_kernels.experts.lowrank import Expert, LowRank, cast, split_component
from mole_kernels.experts.scales import alpha_of
from mole_kernels.files.limits import DTYPE_NAMES
from mole_kernels.files.opening import PathLike
from mole_kernels.files.writer import atomic_save
from mole_kernels.io import adapter_config
from mole_kernels.io.dialects.paths import kohya_name, looks_like_sdxl, stayed_flat

LoraDialect = Literal["diffusers", "kohya"]


def save_expert(
    expert: Expert,
    path: PathLike,
    dialect: LoraDialect = "diffusers",
    dtype: torch.dtype | None = None,
    *,
    sdxl: bool | None = None,
) -> None:
    """Write one expert as a LoRA file, atomically; its readers find the scale of every layer.

    Args:
        expert: The expert; its layers may be read from another file one by one.
        path: The safetensors file to write.
        dialect: "diffusers": lora_A and lora_B, the scales in PEFT's metadata. "kohya": lora_down, lora_up
            and one alpha for all layers of a component (see `LayerWriter`).
        dtype: Of the factors; None keeps theirs.
        sdxl: Kohya's dialect only: LDM's block names, as kohya's tools want them for SDXL; None decides by
            the layers.

    Raises:
        MoleKeyError: A layer whose name the dialect does not cover.
        MoleTypeError: A dtype that files do not hold.
        MoleValueError: An unknown dialect, or a factor that overflows in `dtype`.
        MoleFileError: The file cannot be written.

    Example:
        >>> save_expert(expert, "face.safetensors", "kohya", torch.float16)
    """
    tensors, metadata = expert_tensors(
        expert, dialect, dtype, looks_like_sdxl(expert.layers) if sdxl is None else sdxl
    )
    atomic_save(tensors, path, metadata)


def expert_tensors(
    expert: Expert, dialect: LoraDialect, dtype: torch.dtype | None, sdxl: bool
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the file that `save_expert` writes."""
    expert.check_low_rank("save_expert")
    writer = LayerWriter(dialect, expert.dialect, expert.source, dtype, sdxl=sdxl)
    writer.check(expert.layers)
    tensors: dict[str, Tensor] = {}
    for path in expert.layers:
        tensors |= writer.tensors(path, expert.layers[path])
    return tensors, writer.metadata(expert.metadata)


class LayerWriter:
    """The tensors of a LoRA file, layer by layer, and the metadata that belong to them.

    A file in kohya's dialect gets one alpha for all layers of a component, the first layer's: diffusers'
    loader keeps the alphas of attention layers under names that PEFT does not match, and gives every such
    layer the alpha that is most frequent. A layer of another alpha has the quotient multiplied into B, with
    one rounding in B's dtype.

    Args:
        dialect: Of the file.
        read_as: The dialect in which the paths were read.
        source: Where the layers come from, for messages.
        dtype: Of the factors; None keeps theirs.
        sdxl: LDM's block names in kohya's dialect.

    Raises:
        MoleTypeError: A dtype that files do not hold.
        MoleValueError: An unknown dialect.
    """

    def __init__(
        self,
        dialect: LoraDialect,
        read_as: str = "memory",
        source: str = "memory",
        dtype: torch.dtype | None = None,
        *,
        sdxl: bool = False,
    ) -> None:
        if dtype is not None and dtype not in DTYPE_NAMES:
            raise MoleTypeError("save_expert", expected=f"dtype {', '.join(DTYPE_NAMES.values())}", got=dtype)
        if dialect not in get_args(LoraDialect):
            expected = f"dialect {' or '.join(get_args(LoraDialect))}"
            raise MoleValueError("save_expert", expected=expected, got=repr(printable(dialect)))
        self.dialect, self.read_as, self.source = dialect, read_as, source
        self.dtype, self.sdxl = dtype, sdxl
        # component -> the alpha of all its layers in a file of kohya's
        self._alphas: dict[str | None, float] = {}
        # the layers so far, without their values
        self._written: dict[str, LowRank] = {}

    def check(self, paths: Mapping[str, object] | list[str]) -> None:
        """Refuse names that the dialect does not cover, before anything is written.

        Raises:
            MoleKeyError: A layer that has no name in this dialect.
        """
        for path in paths:
            self._name(path)
        if self.dialect == "diffusers":
            flat = [path for path in paths if "kohya" in self.read_as and stayed_flat(path)]
            if flat:
                raise MoleKeyError(
                    printable(self.source),
                    f"{len(flat)} layers are known by a flat name only, such as {printable(flat[0])}",
                    hint="give the pipeline (pipeline=, or --pipeline), whose class knows the dotted names",
                )

    def tensors(self, path: str, layer: LowRank) -> dict[str, Tensor]:
        """The tensors of one layer by key."""
        name = self._name(path)
        layer = layer.to(self.dtype, where=printable(path))
        if self.dialect == "diffusers":
            down, up = _as_stored(layer)
            self._remember(path, layer)
            return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
        alpha = alpha_of("kohya", layer.scale, layer.rank)
        # an alpha of 0 makes a B of zeros: nothing could be divided by it
        common = self._alphas.setdefault(split_component(path)[0], alpha or float(layer.rank))
        if alpha != common:
            layer = _times(layer, alpha / common, self.dtype, printable(path))
        down, up = _as_stored(layer)
        self._remember(path, layer)
        return {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(common, dtype=torch.float32),
        }

    def metadata(self, source: Mapping[str, str]) -> dict[str, str]:
        """The metadata of the layers so far, with what stays of the source's."""
        rest = {key: value for key, value in source.items() if not adapter_config.is_strength_key(key)}
        settings = (
            adapter_config.adapter_metadata(Expert(self._written)) if self.dialect == "diffusers" else {}
        )
        return rest | {"format": "pt"} | settings

    def _name(self, path: str) -> str:
        if self.dialect == "diffusers":
            return path
        name = kohya_name(path, sdxl=self.sdxl)
        if name is None:
            raise MoleKeyError(
                printable(self.source),
                f"kohya's names do not cover {printable(path)}",
                hint='save it in diffusers\' dialect (dialect="diffusers", or --to diffusers)',
            )
        return name

    def _remember(self, path: str, layer: LowRank) -> None:
        down, up = (torch.empty(half.shape, device="meta") for half in (layer.down, layer.up))
        self._written[path] = LowRank(down, up, layer.scale, layer.conv)


def _times(layer: LowRank, factor: float, dtype: torch.dtype | None, where: str) -> LowRank:
    """The layer with `factor` multiplied into B; 8 bits become 16, since their rounding would show."""
    stored = dtype or stored_dtype([layer.up.dtype])
    wide = torch.promote_types(stored, torch.float32)
    up = cast(f"{where}, B (up)", layer.up.detach().to(wide) * factor, stored)
    return LowRank(layer.down, up, layer.scale, layer.conv)


def _as_stored(layer: LowRank) -> tuple[Tensor, Tensor]:
    """(down, up) as files hold them: with four dimensions for a convolution."""
    if layer.conv:
        return layer.down.unflatten(1, (-1, *layer.kernel)), layer.up[:, :, None, None]
    return layer.down, layer.up
