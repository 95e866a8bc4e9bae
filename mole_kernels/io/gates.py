"""MoLE's gate files: the official names in both directions, and our own for any number of experts.

Official: `moe_lora_unet_<path>.softmoe.{Phi_1,face_scale,hand_scale}.{weight,bias}`, six tensors a layer,
experts (face, hand) in this
order; `<path>` as in kohya's files, so with LDM's block names for SDXL (JiePKU/MoLE). Native:
`gate.<path>.{phi,phi_bias,head,head_bias}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal

import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleTypeError, MoleValueError, printable
from mole_kernels.experts.bank import check_name
from mole_kernels.experts.checks import check_finite
from mole_kernels.experts.format import FORMAT, check_stamp, stamp
from mole_kernels.experts.lowrank import cast, flatten
from mole_kernels.files.limits import DTYPE_NAMES, parse_json
from mole_kernels.files.opening import PathLike
from mole_kernels.files.reader import read_tensors
from mole_kernels.files.writer import atomic_save
from mole_kernels.io.dialects.keys import parse_key, some_keys
from mole_kernels.io.dialects.paths import kohya_name, looks_like_sdxl, module_path

PREFIX = "gate."
OFFICIAL_PREFIX, OFFICIAL_MIDDLE, OFFICIAL_NAMES = "moe_lora_unet_", ".softmoe.", ("face", "hand")
# the official module holds one token gate of all experts and one pooled gate of each
OFFICIAL_TENSORS = (
    "Phi_1.weight",
    "Phi_1.bias",
    *(f"{name}_scale.{part}" for name in OFFICIAL_NAMES for part in ("weight", "bias")),
)


@dataclass(frozen=True, eq=False)
class GateTensors:
    """The learned gates of one layer; the token half or the sample half may be absent.

    Attributes:
        phi: [E,K], of the token gate sigmoid(x phiᵀ + phi_bias).
        phi_bias: [E].
        head: [E,N], of the sample gate sigmoid(head_e · mean_t(s_e B_e A_e x) + head_bias_e).
        head_bias: [E].
    """

    phi: Tensor | None = None
    phi_bias: Tensor | None = None
    head: Tensor | None = None
    head_bias: Tensor | None = None

    def present(self) -> dict[str, Tensor]:
        """The tensors that are not None, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}


@dataclass(frozen=True, eq=False)
class GateFile:
    """The gates between the experts of a model, as a file holds them.

    Attributes:
        layers: Dotted path -> GateTensors.
        expert_names: Whose row is whose, in every layer.
        metadata: Text as it came: escape before printing.

    Raises:
        MoleKeyError: Two spellings of one layer, or a layer without both tensors of a half.
        MoleShapeError: Tensors that do not fit the number of experts.
        MoleTypeError: A dtype that gates do not have.
        MoleValueError: Names that repeat, NaN or Inf.
    """

    layers: Mapping[str, GateTensors]
    expert_names: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.expert_names or len(set(self.expert_names)) != len(self.expert_names):
            raise MoleValueError("GateFile", expected="expert names that differ", got=self.expert_names)
        for name in self.expert_names:
            check_name(name)
        flat: dict[str, str] = {}
        for path, layer in self.layers.items():
            if flat.setdefault(flatten(path), path) != path:
                raise MoleKeyError(
                    "GateFile",
                    f"one layer is named twice: {printable(path)} and {printable(flat[flatten(path)])}",
                )
            check_gates(f"gates of {printable(path)}", layer, len(self.expert_names))


def load_gates(path: PathLike) -> GateFile:
    """The gates of an official MoLE gate file, of a native one, or of a single file of ours.

    Args:
        path: The safetensors file.

    Returns:
        The gates by layer, and the experts that their rows are for.

    Raises:
        MoleFileError: A broken file, or one of a later version.
        MoleKeyError: Keys that are missing, or that no gate has.
        MoleShapeError: Tensors that do not fit each other.
        MoleValueError: NaN or Inf.
    """
    tensors, metadata = read_tensors(path)
    where = printable(path, 300)
    if metadata.get("format") == FORMAT:
        check_stamp(metadata, where)
        gates = gates_from_tensors(
            {k: t for k, t in tensors.items() if not k.startswith("expert.")}, metadata, where
        )
        if gates is None:
            raise MoleKeyError(
                where, "holds no gates", hint="it is a bank of experts; mole_kernels.ExpertBank.load reads it"
            )
        return gates
    return _from_official(tensors, metadata, where)


def save_gates(
    gates: GateFile,
    path: PathLike,
    dialect: Literal["official", "native"] = "native",
    dtype: torch.dtype | None = None,
    *,
    sdxl: bool | None = None,
) -> None:
    """Write a gate file, atomically.

    Args:
        gates: What to write.
        path: The file.
        dialect: "native": any gates · "official": JiePKU/MoLE's, which needs the experts face and hand (their
            rows are put in this order) and both halves on every layer.
        dtype: Of the tensors; None keeps theirs.
        sdxl: For the official dialect: LDM's block names; None decides by the layers.

    Raises:
        MoleFileError: The file could not be written.
        MoleKeyError: Layers that the official dialect does not cover.
        MoleValueError: An unknown dialect, other experts, or a value that `dtype` cannot hold.
    """
    if dialect == "native":
        tensors, metadata = gates_to_tensors(gates)
        metadata = stamp() | metadata
    elif dialect == "official":
        tensors, metadata = (
            _to_official(gates, looks_like_sdxl(gates.layers) if sdxl is None else sdxl),
            dict(gates.metadata),
        )
    else:
        raise MoleValueError("save_gates", expected="dialect official or native", got=repr(dialect))
    atomic_save(
        {key: cast(printable(key), tensor.detach(), dtype) for key, tensor in tensors.items()}, path, metadata
    )


def gates_to_tensors(gates: GateFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the native dialect, without the format's stamp.

    Args:
        gates: What to write.
    """
    tensors = {
        f"{PREFIX}{path}.{name}": tensor
        for path, layer in gates.layers.items()
        for name, tensor in layer.present().items()
    }
    return tensors, {"gates": json.dumps({"experts": gates.expert_names, "metadata": dict(gates.metadata)})}


def gates_from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str
) -> GateFile | None:
    """The native gates among tensors that must all be gates; None where there are none.

    Args:
        tensors: Tensors by key.
        metadata: The header's metadata.
        where: The file, for messages.

    Raises:
        MoleKeyError: A tensor of no gate, or metadata that do not say whose gates these are.
    """
    if "gates" not in metadata and not tensors:
        return None
    about = parse_json(metadata.get("gates", "null"), f"{where}, metadata of the gates", "the text")
    known = (
        isinstance(about, dict)
        and set(about) == {"experts", "metadata"}
        and isinstance(about["experts"], list)
        and all(isinstance(name, str) for name in about["experts"])
        and isinstance(about["metadata"], dict)
        and all(isinstance(value, str) for value in about["metadata"].values())
    )
    if not known:
        raise MoleKeyError(
            where,
            "the metadata does not say whose gates these are",
            expected="experts and metadata",
            got=printable(about),
        )
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, _, name = key.removeprefix(PREFIX).rpartition(".")
        if not key.startswith(PREFIX) or not path or name not in {f.name for f in fields(GateTensors)}:
            raise MoleKeyError(where, f"'{printable(key)}' is neither an expert's nor a gate's")
        layers.setdefault(path, {})[name] = tensor
    return GateFile(
        {path: GateTensors(**tensors_here) for path, tensors_here in layers.items()},
        tuple(about["experts"]),
        about["metadata"],
    )


def check_gates(where: str, layer: GateTensors, E: int) -> None:
    """Check shapes, dtypes and values of one layer's gates.

    Args:
        where: File and layer, for messages.
        layer: Its gates.
        E: How many experts there are.

    Raises:
        MoleKeyError: Half of a gate.
        MoleShapeError: Tensors of other shapes.
        MoleTypeError: A dtype that gates do not have.
        MoleValueError: NaN or Inf.
    """
    shapes = {"phi": (E, "K"), "phi_bias": (E,), "head": (E, "N"), "head_bias": (E,)}
    present = layer.present()
    if (
        not present
        or ("phi" in present) != ("phi_bias" in present)
        or ("head" in present) != ("head_bias" in present)
    ):
        raise MoleKeyError(
            where,
            expected="phi and phi_bias, or head and head_bias, or all four",
            got=", ".join(present) or "nothing",
        )
    for name, tensor in present.items():
        if tensor.dtype not in DTYPE_NAMES:
            raise MoleTypeError(
                f"{where}, {name}", expected=f"dtype {', '.join(DTYPE_NAMES.values())}", got=tensor.dtype
            )
        shape = shapes[name]
        if tensor.dim() != len(shape) or tensor.shape[0] != E or 0 in tensor.shape:
            raise MoleShapeError(
                f"{where}, {name}", expected=f"[{', '.join(map(str, shape))}]", got=list(tensor.shape)
            )
        check_finite(f"{where}, {name}", tensor)


def _from_official(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str) -> GateFile:
    by_path: dict[str, dict[str, Tensor]] = {}
    extra = []
    for key, tensor in tensors.items():
        flat, middle, name = key.removeprefix(OFFICIAL_PREFIX).partition(OFFICIAL_MIDDLE)
        if key.startswith(OFFICIAL_PREFIX) and flat and middle and name in OFFICIAL_TENSORS:
            by_path.setdefault(flat, {})[name] = tensor
        else:
            extra.append(key)
    if extra or not by_path:
        lora = any(parse_key(key) for key in extra)
        raise MoleKeyError(
            where,
            f"{len(extra)} of {len(tensors)} keys are not gates of MoLE: {some_keys(extra)}",
            hint="this is an expert, not a gate file"
            if lora
            else f"a gate is {OFFICIAL_PREFIX}<path>{OFFICIAL_MIDDLE}{OFFICIAL_TENSORS[0]}",
        )
    missing = [
        f"{OFFICIAL_PREFIX}{flat}{OFFICIAL_MIDDLE}{name}"
        for flat, have in by_path.items()
        for name in OFFICIAL_TENSORS
        if name not in have
    ]
    if missing:
        raise MoleKeyError(
            where, f"{len(missing)} keys are missing: {some_keys(missing)}", hint="the file is incomplete"
        )
    layers = {}
    for flat, have in by_path.items():
        for name in OFFICIAL_NAMES:
            weight, bias = have[f"{name}_scale.weight"], have[f"{name}_scale.bias"]
            if (
                weight.dim() != 2
                or weight.shape[0] != 1
                or tuple(bias.shape) != (1,)
                or weight.shape != have["face_scale.weight"].shape
            ):
                at = f"{where}, '{printable(flat)}{OFFICIAL_MIDDLE}{name}_scale'"
                raise MoleShapeError(
                    at,
                    expected="weight [1,N] and bias [1]",
                    got=f"{list(weight.shape)} and {list(bias.shape)}",
                )
        head, head_bias = (
            torch.cat([have[f"{name}_scale.{part}"] for name in OFFICIAL_NAMES])
            for part in ("weight", "bias")
        )
        path, _ = module_path(f"lora_unet_{flat}", "kohya")
        if path in layers:
            raise MoleKeyError(where, f"'{printable(flat)}' and another key name the layer {printable(path)}")
        layers[path] = GateTensors(have["Phi_1.weight"], have["Phi_1.bias"], head, head_bias)
    return GateFile(layers, OFFICIAL_NAMES, dict(metadata))


def _to_official(gates: GateFile, sdxl: bool) -> dict[str, Tensor]:
    if set(gates.expert_names) != set(OFFICIAL_NAMES):
        raise MoleValueError(
            "save_gates",
            expected=f"experts {' and '.join(OFFICIAL_NAMES)} for the official dialect",
            got=", ".join(gates.expert_names),
            hint='dialect="native" takes any',
        )
    rows = [gates.expert_names.index(name) for name in OFFICIAL_NAMES]
    tensors = {}
    for path, layer in gates.layers.items():
        name = kohya_name(path, sdxl=sdxl, prefix="moe_lora_")
        if name is None or not name.startswith(OFFICIAL_PREFIX) or len(layer.present()) != 4:
            what = (
                "both gates of each layer"
                if name is not None and name.startswith(OFFICIAL_PREFIX)
                else "layers of the UNet"
            )
            raise MoleKeyError(
                f"save_gates, {printable(path)}",
                f"the official dialect holds {what} only",
                hint='dialect="native" takes any',
            )
        assert (
            layer.phi is not None
            and layer.phi_bias is not None
            and layer.head is not None
            and layer.head_bias is not None
        )
        base = f"{name}{OFFICIAL_MIDDLE}"
        tensors[f"{base}Phi_1.weight"], tensors[f"{base}Phi_1.bias"] = layer.phi[rows], layer.phi_bias[rows]
        for e, expert in zip(rows, OFFICIAL_NAMES):
            tensors[f"{base}{expert}_scale.weight"] = layer.head[e : e + 1]
            tensors[f"{base}{expert}_scale.bias"] = layer.head_bias[e : e + 1]
    return tensors
