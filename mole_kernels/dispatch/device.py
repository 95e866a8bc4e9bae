"""What a GPU can do, as far as the cost model needs it; the known ones, and the one that is here."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from mole_kernels.errors import MoleStateError, MoleValueError, printable


@dataclass(frozen=True)
class Device:
    """A GPU's rates; nominal, with the part of them that is reached.

    key, name   "h200", "NVIDIA H200"; the key names the table's file
    bf16, tf32, fp32  dense TFLOP/s, accumulating in float32: tensor cores for 16 bits and tf32, CUDA cores
                      for IEEE float32
    hbm, l2     TB/s of the memory and of the second-level cache; cache its size in MB
    reach       part of the tensor rate that a library's large product reaches; hbm_reach the same of the
                memory's
    """

    key: str
    name: str
    capability: tuple[int, int]
    processors: int
    bf16: float
    tf32: float
    fp32: float
    hbm: float
    l2: float
    cache: float
    reach: float = 0.8
    hbm_reach: float = 0.9

    def rate(self, dtype: torch.dtype, tf32: bool = False) -> float:
        """Floating-point operations a microsecond that a library's large product reaches."""
        nominal = self.bf16 if dtype.itemsize == 2 else self.tf32 if tf32 else self.fp32
        return nominal * self.reach * 1e6

    def scaled(self, processors: int) -> Device:
        """The same with another number of multiprocessors (a part of the GPU, or a smaller sister)."""
        part = processors / self.processors
        rates = {name: getattr(self, name) * part for name in ("bf16", "tf32", "fp32", "l2")}
        return self if part == 1 else replace(self, processors=processors, **rates)


# rates and sizes: NVIDIA's data sheets and architecture white papers (H100, A100, Ada, Blackwell), dense,
# boost clock.
# reach 0.8: cuBLAS at 8192³ on an H100 SXM, 795 of 989 TFLOP/s (README of pranjalssh/fast.cu); assumed for
# the others.
# l2: 5 TB/s for Hopper, which published microbenchmarks of an H100 come near; no vendor states it, so for the
# others it is
# scaled by multiprocessors and clock. Nothing here was measured by us.
KNOWN: dict[str, Device] = {
    d.key: d
    for d in (
        Device("h200", "NVIDIA H200", (9, 0), 132, 989.4, 494.7, 66.9, 4.8, 5.0, 50),
        Device("h100", "NVIDIA H100 SXM", (9, 0), 132, 989.4, 494.7, 66.9, 3.35, 5.0, 50),
        Device("a100", "NVIDIA A100 SXM 80GB", (8, 0), 108, 312.0, 156.0, 19.5, 2.04, 3.1, 40),
        Device("rtx4090", "NVIDIA GeForce RTX 4090", (8, 9), 128, 165.2, 82.6, 82.6, 1.008, 6.7, 72),
        Device("b200", "NVIDIA B200", (10, 0), 148, 2250.0, 1125.0, 75.0, 7.7, 6.0, 126),
        Device("rtx5090", "NVIDIA GeForce RTX 5090", (12, 0), 170, 209.5, 104.8, 104.8, 1.792, 8.5, 96),
    )
}
# the nearest relative of a GPU that is not known, by its generation
_RELATIVE = {
    (8, 0): "a100",
    (8, 6): "rtx4090",
    (8, 7): "rtx4090",
    (8, 9): "rtx4090",
    9: "h200",
    10: "b200",
    11: "b200",
    12: "rtx5090",
}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def known(name: str) -> Device:
    """The known GPU of that name, in any spelling ("H200", "RTX 4090"). Raises MoleValueError."""
    properties = KNOWN.get(_plain(name))
    if properties is None:
        raise MoleValueError(
            "gpu", expected=f"one of {', '.join(KNOWN)}, or auto", got=repr(printable(name, 60))
        )
    return properties


def described(name: str, capability: tuple[int, int], processors: int) -> Device:
    """A GPU by what its driver says: a known one, or the nearest relative scaled to its multiprocessors."""
    plain = _plain(name)
    match = next((d for d in KNOWN.values() if d.key in plain), None)
    if match is not None:
        return match.scaled(processors)
    relative = KNOWN[_RELATIVE.get(capability) or _RELATIVE.get(capability[0]) or "h200"]
    return replace(
        relative.scaled(processors),
        key=plain.removeprefix("nvidia")[:40] or "unknown",
        name=name,
        capability=capability,
    )


@lru_cache(maxsize=16)
def present(index: int | None = None) -> Device:
    """The GPU of this machine. Raises MoleStateError where torch sees none."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        raise MoleStateError(
            "gpu", "torch sees no NVIDIA GPU on this machine", hint=f"name one: {', '.join(KNOWN)}"
        )
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    return described(properties.name, (properties.major, properties.minor), properties.multi_processor_count)
