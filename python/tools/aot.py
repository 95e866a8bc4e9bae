"""Compile every kernel for GPUs that are not here, and read the result back: a table, and ratchets for a
test.

    python python/tools/aot.py                 # the whole table (minutes); 1 where one fails or spills
    python python/tools/aot.py --arch 90 --only persistent --json out.json

registers, spills (loads and stores of local memory), stack, shared memory, tensor-core and TMA instructions
in the SASS, and the
instructions of the innermost loop that has tensor-core work in it (the main loop).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mole_kernels.kernels.triton.common import COUNTS
from mole_kernels.kernels.triton.tiles import Tile, fitted, for_dense, for_recompute, for_sums

ARCHES = (80, 89, 90, 100, 120)
# bytes of shared memory that one program may have (CUDA programming guide, table of compute capabilities)
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Build:
    """One kernel with its compile-time choices; `described` names the arguments that are tensor descriptors,
    with their blocks.

    types  arguments whose type is not the one their name has everywhere else
    """

    id: str
    kernel: str
    constants: dict[str, object]
    warps: int = 8
    stages: int = 3
    dtype: str = "bf16"
    described: tuple[tuple[str, tuple[int, int]], ...] = ()
    unit: tuple[str, ...] = ("sxk", "swk", "sdk", "sur", "spk", "sge")
    arches: tuple[int, ...] = ARCHES
    types: tuple[tuple[str, str], ...] = ()


@dataclass
class Row:
    """What one build came to on one architecture."""

    id: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    mma: dict[str, int]
    tma: int
    async_copies: int
    loop: int
    loop_mma: int
    instructions: int
    spills: int = 0
    releases: int = 0
    ordered_releases: int = 0
    error: str = ""


FLOAT32 = (
    "scale",
    "gate",
    "token_bias",
    "sample_weight",
    "sample_bias",
    "token_gate",
    "sample_gate",
    "d",
    "parts",
    "q",
    "partial",
    "dsample_weight",
    "dsample_bias",
    "dtoken_bias",
    "dscale",
)
INT64 = ("assignment",)
INT32 = ("cols", "first", "flags", "arrived", "counters")
TENSORS = (
    "x",
    "x2",
    "w",
    "w2",
    "down",
    "up",
    "token_weight",
    "bias",
    "h",
    "z",
    "y",
    "dy",
    "ddown",
    "dup",
    "dtoken_weight",
    "dgate",
    "merged",
    "delta",
    "delta2",
)


def kernel_named(name: str):
    """The jit function `name`, from the module that has it."""
    from mole_kernels.kernels.triton import (
        dense,
        expand,
        gradients,
        merge,
        persistent,
        recompute,
        regional,
        shrink,
    )

    return next(
        getattr(m, name)
        for m in (shrink, expand, persistent, recompute, merge, dense, gradients, regional)
        if hasattr(m, name)
    )


def compile_build(build: Build, arch: int):
    """The compiled kernel: pointers 16-byte aligned, sizes multiples of 16, the unit strides 1, as a launch
    would specialise them.
    """
    kernel = kernel_named(build.kernel)
    constants = {name: value for name, value in build.constants.items() if name in kernel.arg_names}
    signature, attributes = {}, {}
    pooled = bool(build.constants.get("POOL"))
    described, types = dict(build.described), dict(build.types)
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in COUNTS:
            signature[name] = "i32"
        elif name in build.unit:
            signature[name], constants[name] = "constexpr", 1
        elif name in types:
            signature[name] = types[name]
            if types[name].startswith("*"):
                attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in described:
            signature[name] = f"tensordesc<{build.dtype}{list(described[name])}>"
        elif name in FLOAT32 + INT32 + INT64 + TENSORS:
            kind = (
                "fp32"
                if name in FLOAT32 or (name == "z" and pooled)
                else "i32"
                if name in INT32
                else "i64"
                if name in INT64
                else build.dtype
            )
            signature[name] = f"*{kind}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name[0] == "s" or name in "NKR":
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": build.warps, "num_stages": build.stages},
    )


def instructions_of(sass: str) -> tuple[list[str], dict[str, int], list[tuple[int, str]]]:
    """SASS text -> the opcodes in order, where each label is, and (place, label) of each branch."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x?_?\d+|\.L_\d+):", line)
        if label:
            labels[label[1]] = len(opcodes)
            continue
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if found:
            target = (
                re.search(r"`\((\.L_x?_?\d+)\)|(\.L_x?_?\d+)", found[2])
                if found[1].startswith("BRA")
                else None
            )
            if target:
                branches.append((len(opcodes), target[1] or target[2]))
            opcodes.append(found[1])
    return opcodes, labels, branches


def releases_of(ptx: str) -> tuple[int, int]:
    """Releasing atomics, and those with no store between the last barrier and them: a release by one thread
    covers only what a
    barrier put before it."""
    found = ordered = 0
    stored = False
    for line in ptx.splitlines():
        if "bar.sync" in line or "barrier.sync" in line:
            stored = False
        elif "st.global" in line:
            stored = True
        elif "atom" in line and (".release" in line or ".acq_rel" in line):
            found += 1
            ordered += not stored
    return found, ordered


MMA = ("HGMMA", "HMMA", "QGMMA", "UTCHMMA", "UTCMMA")


def width_of(opcode: str) -> int:
    """How wide a tensor-core instruction is (HGMMA.64x128x16 has 128 columns), 0 for any other: the main loop
    is the densest in it.
    """
    if not opcode.startswith(MMA):
        return 0
    found = re.search(r"64x(\d+)x", opcode)
    return int(found[1]) if found else 8


def read_back(build: Build, arch: int, compiled) -> Row:
    """Row of a compiled kernel, from its cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True)
        sass = subprocess.run([BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage.stdout + usage.stderr)
    registers, stack, _, local = (int(n) for n in found.groups()) if found else (0, 0, 0, 0)
    opcodes, labels, branches = instructions_of(sass)
    count = collections.Counter(op.split(".")[0] for op in opcodes)
    loops = [opcodes[labels[to] : at + 1] for at, to in branches if labels.get(to, at + 1) <= at]
    loops = [lo for lo in loops if any(op.startswith(MMA) for op in lo)]
    main = max(loops, key=lambda lo: sum(map(width_of, lo)) / len(lo), default=[])
    return Row(
        build.id,
        arch,
        registers,
        stack,
        local,
        compiled.metadata.shared,
        {m: count[m] for m in MMA if count[m]},
        count["UTMALDG"],
        count["LDGSTS"],
        len(main),
        sum(op.startswith(MMA) for op in main),
        len(opcodes),
        count["LDL"] + count["STL"],
        *releases_of(compiled.asm["ptx"]),
    )


def row_of(build: Build, arch: int) -> Row:
    """Compile and read back; a failure is a row that says so."""
    try:
        return read_back(build, arch, compile_build(build, arch))
    except Exception as e:
        text = str(e).strip().splitlines()
        return Row(
            build.id,
            arch,
            0,
            0,
            0,
            0,
            {},
            0,
            0,
            0,
            0,
            0,
            error=f"{type(e).__name__}: {text[-1] if text else ''}"[:300],
        )


GATES = {
    "none": dict(TOKEN=False, GATE=False, POOL=False),
    "local": dict(TOKEN=True, GATE=False, POOL=False),
    "both": dict(TOKEN=True, GATE=False, POOL=True),
    "mask": dict(TOKEN=False, GATE=True, POOL=False),
    "all": dict(TOKEN=True, GATE=True, POOL=True),
    "softmax": dict(TOKEN=True, GATE=False, POOL=True, SOFTMAX=True),
    "sets": dict(TOKEN=True, GATE=False, POOL=True, ASSIGN=True),
}
KINDS = ("TOKEN", "GATE", "POOL")
LOOSE = dict(
    ASSIGN=False,
    SOFTMAX=False,
    EVEN_K=True,
    PRECISION="ieee",
    PHI_BIAS=True,
    POOL_BIAS=True,
    BIAS=True,
    EP=16,
    ADD=False,
    PDL=False,
    STORE_Z=True,
    GROUP=8,
)
# a tile of y of each size that `tiles.tile_for` may take, on each kind of GPU
WHOLE = {80: Tile(stages=3), 89: Tile(stages=2), 90: Tile(tma=True), 100: Tile(tma=True), 120: Tile(stages=2)}


def _product(kernel: str, arch: int, way: str, gate: str, tile: Tile, suffix: str = "") -> Build:
    """A forward or backward product at `tile`, as `launch.py` would start it."""
    backward = way == "bwd"
    tile = fitted(
        tile, (arch // 10, arch % 10), backward, backward + sum(GATES[gate][kind] for kind in KINDS)
    )
    constants = (
        LOOSE
        | GATES[gate]
        | dict(
            BACKWARD=backward,
            SAVE=not backward,
            NEED_D=backward and gate != "none",
            TMA=tile.tma,
            W_ROWS=not backward,
            BM=tile.BM,
            BH=tile.BH or tile.BM,
            BN=tile.BN,
            BX=tile.BX,
            BK=tile.BK,
            BR=tile.BR,
            BZ=tile.BZ,
            PDL=kernel == "expand_kernel" and arch >= 90,
        )
    )
    # every stride that is 1 in a launch on contiguous tensors
    unit = (
        ("sxk", "swn", "sdr", "sun", "spk", "sge") if backward else ("sxk", "swk", "sdk", "sur", "spk", "sge")
    )
    w_block = (tile.BK, tile.BN) if backward else (tile.BN, tile.BK)
    w2_block = w_block if not tile.BX else (tile.BK, tile.BX) if backward else (tile.BX, tile.BK)
    described = (
        (("x", (tile.BM, tile.BK)), ("x2", (tile.BH or tile.BM, tile.BK)), ("w", w_block), ("w2", w2_block))
        if tile.tma
        else ()
    )
    id = f"{kernel.removesuffix('_kernel')}-{way}-{gate}{suffix}"
    return Build(
        id, kernel, constants, tile.warps, tile.stages, described=described, unit=unit, arches=(arch,)
    )


def _shrink(arch: int, way: str, gate: str) -> Build:
    gates = (way == "bwd") + sum(GATES[gate][kind] for kind in KINDS)
    tile = fitted(
        Tile(stages=WHOLE[arch].stages),
        (arch // 10, arch % 10),
        way == "bwd",
        gates,
        "SOFTMAX" in GATES[gate],
    )
    b = _product("shrink_kernel", arch, way, gate, replace(tile, tma=False))
    return replace(
        b,
        constants=b.constants | dict(BM=tile.BS, BIAS=True, PDL=arch >= 90 and way == "fwd"),
        warps=tile.warps,
    )


def _dense(arch: int, gate: str, tile: Tile, suffix: str = "") -> list[Build]:
    """ΔW's kernel and the product's, for a kind of gate that `dense` takes."""
    tile = for_dense(tile, (arch // 10, arch % 10))
    b = _product("dense_kernel", arch, "fwd", gate, tile, suffix)
    blocks = dict(b.described)
    more = (("delta", blocks["w"]), ("delta2", blocks["w2"])) if blocks else ()
    product = replace(b, described=b.described + more, constants=b.constants | dict(PDL=arch >= 90))
    made = b.constants | dict(BM=tile.BS, BN=min(tile.BN, 64), BK=min(tile.BK, 64), PDL=arch >= 90)
    return [
        product,
        replace(b, id=f"delta-fwd-{gate}{suffix}", kernel="delta_kernel", constants=made, described=()),
    ]


def _regional(arch: int, D: int) -> Build:
    """Attention to the texts of regions, 77 tokens each, for heads D wide."""
    from mole_kernels.kernels.triton.regional import tile_for

    tile = tile_for(D)
    constants = dict(LENGTHS=False, PRECISION="ieee") | tile
    types = tuple((name, "*bf16") for name in "qkvo") + (
        ("shares", "*fp32"),
        ("lengths", "*i32"),
        ("qk_scale", "fp32"),
    )
    return Build(
        f"regional-{D}",
        "regional_attention_fwd_kernel",
        constants,
        tile["warps"],
        2,
        unit=(),
        arches=(arch,),
        types=types,
    )


def builds() -> list[Build]:
    """What the table has: each kernel as the tiles of `tiles.py` launch it."""
    out = []
    for arch in ARCHES:
        for gate in GATES:
            for way in ("fwd", "bwd"):
                out.append(_shrink(arch, way, gate))
                for kernel in ("expand_kernel", "persistent_kernel"):
                    out.append(_product(kernel, arch, way, gate, WHOLE[arch]))
                    if WHOLE[arch].tma and gate in ("none", "both"):
                        out.append(
                            _product(kernel, arch, way, gate, replace(WHOLE[arch], tma=False), "-pointers")
                        )
                    if WHOLE[arch].tma and kernel == "persistent_kernel" and gate in ("none", "both", "all"):
                        out += [
                            _product(kernel, arch, way, gate, replace(WHOLE[arch], BX=BX), f"-{128 + BX}")
                            for BX in (32, 64)
                        ]
                        out.append(_product(kernel, arch, way, gate, replace(WHOLE[arch], BN=256), "-256"))
        for gate in ("none", "local", "mask", "softmax", "sets"):
            tile = for_recompute(
                WHOLE[arch], (arch // 10, arch % 10), GATES[gate]["TOKEN"] + GATES[gate]["GATE"]
            )
            b = _product("recompute_kernel", arch, "fwd", gate, tile)
            out.append(replace(b, constants=b.constants | dict(BR=32)))
        for gate in ("none", "both"):
            out += [
                _product("persistent_kernel", arch, way, gate, replace(WHOLE[arch], BH=64), "-h64")
                for way in ("fwd", "bwd")
            ]
        for gate in ("local", "mask", "softmax"):
            out += _dense(arch, gate, WHOLE[arch])
        if WHOLE[arch].tma:
            out += _dense(arch, "mask", replace(WHOLE[arch], BX=32), "-160")[:1]
        merge = dict(ASSIGN=True, GATE=True, PRECISION="ieee", BN=64, BK=64, BZ=64)
        out.append(
            Build("merge", "merge_kernel", merge, 8, 2, unit=("swk", "sdk", "sur", "sge"), arches=(arch,))
        )
        out += [_regional(arch, D) for D in (40, 64, 128, 160)]
        BT, BC, BR = for_sums(64, torch.bfloat16, (arch // 10, arch % 10), False)
        sums = dict(
            DOWN=True,
            UP=True,
            PHI=True,
            GATES=True,
            DPOOL=True,
            GIVEN=False,
            BY_TOKEN=False,
            S_MANY=False,
            ASSIGN=False,
            SOFTMAX=False,
            TOKEN=True,
            GATE=False,
            POOL=True,
            PRECISION="ieee",
            BT=BT,
            BC=BC,
            BR=BR,
            EP=16,
        )
        unit = ("syn", "sxk", "sge")
        for kind, change in {
            "softmax": dict(SOFTMAX=True),
            "constant": dict(GATE=True, GIVEN=True),
            "sets": dict(S_MANY=True, ASSIGN=True),
            "mask": dict(
                PHI=False, TOKEN=False, DPOOL=False, POOL=False, GATE=True, GIVEN=True, BY_TOKEN=True
            ),
        }.items():
            BT, BC, BR = for_sums(64, torch.bfloat16, (arch // 10, arch % 10), kind in ("constant", "sets"))
            out.append(
                Build(
                    f"gradients-{kind}",
                    "gradients_kernel",
                    sums | change | dict(BT=BT, BC=BC, BR=BR),
                    8,
                    2,
                    unit=unit,
                    arches=(arch,),
                )
            )
        out.append(Build("gradients-both", "gradients_kernel", sums, 8, 2, unit=unit, arches=(arch,)))
        none = sums | dict(PHI=False, GATES=False, DPOOL=False, TOKEN=False, POOL=False)
        out.append(Build("gradients-none", "gradients_kernel", none, 8, 2, unit=unit, arches=(arch,)))
    return out


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [
        f"{'kernel':34} {'arch':>5} {'regs':>5} {'spill':>5} {'stack':>5} {'shared':>7} {'tma':>4} {'cp':>4} {'loop':>5} {'mma':>4}  mma"
    ]
    for r in rows:
        mma = " ".join(f"{k}:{v}" for k, v in r.mma.items())
        lines.append(
            f"{r.id:34} sm_{r.arch:<3}{r.registers:>4} {r.spills:>5} {r.stack:>5} {r.shared:>7} {r.tma:>4} {r.async_copies:>4} "
            f"{r.loop:>5} {r.loop_mma:>4}  {mma}{r.error}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, action="append", help="90, say; default: all")
    parser.add_argument(
        "--only",
        default="",
        help="rows whose id and architecture (merge sm_90) match this regular expression",
    )
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    rows = []
    print(table([]))
    for build in builds():
        for arch in build.arches:
            if re.search(options.only, f"{build.id} sm_{arch}") and (
                not options.arch or arch in options.arch
            ):
                rows.append(row_of(build, arch))
                print(table(rows[-1:]).splitlines()[1], flush=True)
    if options.json:
        options.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(r) for r in rows]}, indent=1)
        )
    bad = [
        f"{r.id} sm_{r.arch}: {r.error or f'{r.spills} loads and stores of spilled registers'}"
        for r in rows
        if r.error or r.spills
    ]
    print(
        f"{len(rows)} kernels by Triton {triton.__version__}; that fail or spill: {len(bad)}", *bad, sep="\n"
    )
    return bool(bad)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    raise SystemExit(main())
