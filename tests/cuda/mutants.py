"""Faults planted in the sources of the Hopper kernels, each of which the emulator or the comparison with
float64 must notice.

python tests/cuda/mutants.py            # all of them; exit 1 where one survives
"""

from __future__ import annotations

import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "python/tools")]

from emulate import Outcome, build, digest, run  # noqa: E402

from tests.planting import replaced  # noqa: E402

CLUSTER = "way=cluster b=2 t=70 k=72 n=264"
PERSISTENT = "way=persistent b=2 t=70 k=72 n=264"
RECOMPUTE = "way=recompute b=2 t=70 k=72 n=264 ranks=8,8"
DX = "b=2 t=70 n=72 k=264 topk=2 ranks=8,5,11"


@dataclass(frozen=True)
class Mutant:
    """`old` in csrc/cuda/sm90/`file` becomes `new`; run with `arguments`, over a few schedules."""

    name: str
    file: str
    old: str
    new: str
    arguments: str
    seeds: int = 6
    program: str = "fused"


MUTANTS = [
    Mutant(
        "the producer does not wait for a free stage",
        "tile_kernel.h",
        "wait_stage<CLUSTER>(&bars.empty[ring.slot], ring.phase ^ 1);\n      uint64_t",
        "uint64_t",
        CLUSTER,
    ),
    Mutant(
        "wrong parity of a stage",
        "pipeline.h",
        "mbarrier_wait(&bars.full[ring.slot], ring.phase);\n  const unsigned char* stage",
        "mbarrier_wait(&bars.full[ring.slot], ring.phase ^ 1);\n  const unsigned char* stage",
        RECOMPUTE,
    ),
    Mutant(
        "too few bytes expected",
        "tile_kernel.h",
        "(BM + BN + p.slice + (p.token ? LOGITS : 0))",
        "(BM + BN + p.slice)",
        CLUSTER,
    ),
    Mutant(
        "a stage is given back before it was read",
        "pipeline.h",
        "    wgmma_wait<1>();\n    release",
        "    release",
        RECOMPUTE + " k=328",
    ),
    Mutant(
        "a stage is given back to this CTA alone",
        "pipeline.h",
        "if (me.lane < cluster) mbarrier_arrive_freed(empty, me.lane);",
        "if (me.lane < cluster) mbarrier_arrive(empty);",
        CLUSTER + " k=520",
    ),
    Mutant("no proxy fence before y's store", "pipeline.h", "  fence_proxy_async_shared();\n", "", RECOMPUTE),
    Mutant(
        "y's staging is written while the last store reads it",
        "pipeline.h",
        "if (leader) bulk_wait_read<0>();",
        "",
        RECOMPUTE,
    ),
    Mutant(
        "no barrier between y's staging and its store",
        "pipeline.h",
        "  fence_proxy_async_shared();\n  named_barrier_sync(1 + me.group, 128);\n",
        "  fence_proxy_async_shared();\n",
        RECOMPUTE,
    ),
    Mutant(
        "h read before its products are done",
        "pipeline.h",
        "  wgmma_wait<0>();\n  wgmma_hold(acc);\n  release_stage<CLUSTER>(&bars.empty[previous]",
        "  wgmma_wait<1>();\n  wgmma_hold(acc);\n  release_stage<CLUSTER>(&bars.empty[previous]",
        RECOMPUTE,
    ),
    Mutant("K's tail is lost", "tile_kernel.h", "(p.K + DEPTH - 1) / DEPTH", "p.K / DEPTH", RECOMPUTE),
    Mutant(
        "the next expert's gate",
        "gates.h",
        "g0 = g[owner[first + column]]",
        "g0 = g[(owner[first + column] + 1) % p.E]",
        RECOMPUTE,
    ),
    Mutant(
        "another row's gate",
        "gates.h",
        "gamma + (me.group * 64 + me.row(i)) * (p.E + 1)",
        "gamma + (me.group * 64 + (me.row(i) ^ 1)) * (p.E + 1)",
        RECOMPUTE,
    ),
    Mutant(
        "the slice of another CTA",
        "tile_kernel.h",
        "gate_columns(h, gamma, owner, p, lane, rank * p.slice);",
        "gate_columns(h, gamma, owner, p, lane, 0);",
        CLUSTER,
    ),
    Mutant(
        "z is not awaited",
        "tile_kernel.h",
        "  mbarrier_wait_cluster(&bars.z_full[me.group], phase);\n",
        "",
        CLUSTER,
    ),
    Mutant(
        "z is awaited by the CTA's own scope",
        "tile_kernel.h",
        "mbarrier_wait_cluster(&bars.z_full[me.group], phase);",
        "mbarrier_wait(&bars.z_full[me.group], phase);",
        CLUSTER,
    ),
    Mutant(
        "z is announced as freed memory is, without a fence",
        "tile_kernel.h",
        "if (me.warp == 0 && me.lane < cluster) mbarrier_arrive_remote(&bars.z_full[me.group], me.lane);",
        "if (me.warp == 0 && me.lane < cluster) mbarrier_arrive_freed(&bars.z_full[me.group], me.lane);",
        CLUSTER,
    ),
    Mutant(
        "z is announced before all of it is there",
        "tile_kernel.h",
        "  named_barrier_sync(1 + me.group, 128);\n  if (me.warp == 0 && me.lane < cluster) mbarrier_arrive_remote(&bars.z_full",
        "  if (me.warp == 0 && me.lane < cluster) mbarrier_arrive_remote(&bars.z_full",
        CLUSTER,
    ),
    Mutant(
        "z is overwritten before the peers have read it",
        "tile_kernel.h",
        "mbarrier_wait_cluster(&bars.z_free[me.group], phase ^ 1);",
        "",
        CLUSTER + " t=300",
    ),
    Mutant(
        "no cluster barrier at the end",
        "tile_kernel.h",
        "  if (CLUSTER)\n    cluster_sync();\n  else if (p.pooled)",
        "  if (p.pooled)",
        CLUSTER,
    ),
    Mutant(
        "no cluster barrier at the start",
        "tile_kernel.h",
        "  if (CLUSTER)\n    cluster_sync();\n  else\n    __syncthreads();",
        "  __syncthreads();",
        CLUSTER,
    ),
    Mutant(
        "every CTA loads the same rows of x",
        "tile_kernel.h",
        "item.rows.position + rank * part,",
        "item.rows.position,",
        CLUSTER,
    ),
    Mutant(
        "the sample gate is not awaited",
        "tile_kernel.h",
        "  wait_for(p.flags + flags.gate_ready(item.rows.group), 1, me);\n",
        "",
        CLUSTER + " pooled=1",
    ),
    Mutant(
        "a share of the pooled logits too few is awaited",
        "gates.h",
        "int(before) != shares - 1",
        "int(before) != shares - 2",
        CLUSTER + " pooled=1",
    ),
    Mutant(
        "the shares are read without a barrier after the counter",
        "gates.h",
        "  __syncwarp();\n  if (int(before) != shares - 1) return;",
        "  if (int(before) != shares - 1) return;",
        CLUSTER + " pooled=1",
    ),
    Mutant(
        "the first sample's gate for all",
        "gates.h",
        "g *= p.sample_gate[m / p.T * p.E + e]",
        "g *= p.sample_gate[e]",
        CLUSTER + " pooled=1",
    ),
    Mutant(
        "the counters are not put back",
        "gates.h",
        "for (int i = lane; i < count; i += 32) p.flags[i] = 0;",
        "(void)count;",
        PERSISTENT,
    ),
    Mutant(
        "tiles of h are not awaited",
        "persistent_kernel.h",
        "      wait_for(p.flags + flags.rows_ready(item.rows.group, item.rows.tile), p.slices * GROUPS, lane);",
        "      (void)0;",
        PERSISTENT,
    ),
    Mutant(
        "one tile of h too few is awaited",
        "persistent_kernel.h",
        "p.slices * GROUPS, lane);",
        "p.slices * GROUPS - 1, lane);",
        PERSISTENT,
    ),
    Mutant(
        "a tile of h is announced by a relaxed counter",
        "persistent_kernel.h",
        "reduce_add_release(p.flags + flags.rows_ready",
        "reduce_add_relaxed(p.flags + flags.rows_ready",
        PERSISTENT,
    ),
    Mutant(
        "a tile of h is announced before all of it is stored",
        "persistent_kernel.h",
        "  store_z(h, p, rows, me, first);\n  named_barrier_sync(1 + me.group, 128);\n",
        "  store_z(h, p, rows, me, first);\n",
        PERSISTENT,
    ),
    Mutant(
        "an item is overwritten before all have read it",
        "persistent_kernel.h",
        "  mbarrier_wait(&bars.item_free[ring.slot], ring.phase ^ 1);\n",
        "",
        PERSISTENT + " n=520",
    ),
    Mutant(
        "the sample gate is left out of z",
        "persistent_kernel.h",
        "if (p.pooled && r < p.R) {",
        "if (false) {",
        PERSISTENT + " pooled=1",
    ),
    Mutant(
        "z's padding is not zero",
        "persistent_kernel.h",
        "if (r < p.R && rows.holds(p, row)) z =",
        "if (rows.holds(p, row)) z =",
        PERSISTENT + " ranks=8",
    ),
]

# dX: the name, the file, the fault, and the way that it shows in
MUTANTS += [
    Mutant(name, file, old, new, f"{DX} way={way}", program="dx")
    for way, name, file, old, new in [
        (
            "recompute",
            "W's sixteen rows are found as if it lay the other way",
            "pipeline.h",
            "RIGHT_STEP = BACK ? 16 * BOX * 2 : 32;",
            "RIGHT_STEP = 32;",
        ),
        (
            "recompute",
            "the next 32 columns of W are looked for too near",
            "pipeline.h",
            "(p, depth * BOX * 2, 8 * BOX * 2)",
            "(p, 16 * BOX * 2, 8 * BOX * 2)",
        ),
        (
            "recompute",
            "the token gate's boxes are taken for as deep as A's",
            "pipeline.h",
            "stages.x_bytes, 16 * STEPS)",
            "stages.x_bytes, DEPTH)",
        ),
        (
            "recompute",
            "the token gate is awaited with A's bytes",
            "tile_kernel.h",
            "ALL * LOGIT_DEPTH * 2)",
            "ALL * ROW_BYTES)",
        ),
        (
            "cluster ranks=8,13,19",
            "the columns of V of another CTA",
            "tile_kernel.h",
            "&maps.down, full, k, rank * p.slice,",
            "&maps.down, full, k, 0,",
        ),
        (
            "recompute",
            "the saved gate of another row",
            "backward.h",
            "g *= p.token_gate[m * p.E + e];",
            "g *= p.token_gate[e];",
        ),
        (
            "recompute",
            "h of rows past the end",
            "backward.h",
            "if (r < p.R && rows.holds(p, row))\n      h =",
            "if (r < p.R)\n      h =",
        ),
        (
            "recompute",
            "D without an expert's last column",
            "backward.h",
            "column < to ?",
            "column < to - 1 ?",
        ),
        (
            "recompute",
            "D of half a row",
            "backward.h",
            "      sums[s] += __shfl_xor_sync(0xffffffffu, sums[s], 2);\n",
            "",
        ),
        (
            "recompute",
            "a sigmoid's derivative for a softmax",
            "backward.h",
            "(p.top_k ? all : gd[1])",
            "gd[1]",
        ),
        (
            "recompute ranks=3,5,2,4,7,3",
            "a softmax's sum over four experts",
            "backward.h",
            "  all += __shfl_xor_sync(0xffffffffu, all, 2);\n",
            "  all += 0;\n",
        ),
        (
            "recompute",
            "D is read before the warp has met",
            "tile_kernel.h",
            "  });\n  __syncwarp();\n}",
            "  });\n}",
        ),
        (
            "cluster ranks=8,13,19",
            "D of this CTA's columns alone",
            "tile_kernel.h",
            "c < cluster; ++c) sum +=",
            "c < 1; ++c) sum +=",
        ),
        (
            "cluster",
            "shares of D for the first CTA alone",
            "tile_kernel.h",
            "to < cluster; to += 4",
            "to < 1; to += 4",
        ),
        (
            "cluster",
            "shares of D are overwritten before the peers have read them",
            "tile_kernel.h",
            "    if (CLUSTER) await_free_z(bars, lane, z_phase);\n    if constexpr (BACK) give_shares<T, BM, CLUSTER>(h, p, parts, item, lane, cluster, rank);\n",
            "    if constexpr (BACK) give_shares<T, BM, CLUSTER>(h, p, parts, item, lane, cluster, rank);\n    if (CLUSTER) await_free_z(bars, lane, z_phase);\n",
        ),
        (
            "cluster",
            "dh is handed on ungated",
            "tile_kernel.h",
            "    gate_columns(h, gamma, owner, p, lane, rank * p.slice);\n    if (BACK && item.first && p.dh) save_columns<T>(h, p.dh, p, item.rows, lane, rank * p.slice);\n",
            "    if (BACK && item.first && p.dh) save_columns<T>(h, p.dh, p, item.rows, lane, rank * p.slice);\n    gate_columns(h, gamma, owner, p, lane, rank * p.slice);\n",
        ),
        (
            "persistent",
            "dh is announced before all of it is stored",
            "persistent_kernel.h",
            "  save_columns<T>(v, p.dh, p, rows, me, first);\n  named_barrier_sync(1 + me.group, 128);\n",
            "  save_columns<T>(v, p.dh, p, rows, me, first);\n",
        ),
        (
            "persistent ranks=8,20,20",
            "D of one slice alone",
            "persistent_kernel.h",
            "j < p.slices; ++j",
            "j < 1; ++j",
        ),
        (
            "persistent",
            "dh of the row before",
            "persistent_kernel.h",
            "static_cast<const char*>(p.dh) + (rows.index(p, row) * p.R",
            "static_cast<const char*>(p.dh) + ((rows.index(p, row) ^ 1) * p.R",
        ),
    ]
]


def kill(mutant: Mutant) -> Outcome | None:
    """The first run that notices the fault, None where none does. Raises ValueError where the source does not
    hold `old` exactly once, or
    the kernel refuses the arguments."""
    with tempfile.TemporaryDirectory() as folder:
        copytree(ROOT / "csrc/cuda", Path(folder) / "csrc/cuda")
        copytree(ROOT / "csrc/emulator", Path(folder) / "csrc/emulator")
        copytree(ROOT / "tests/cuda", Path(folder) / "tests/cuda")
        source = Path(folder) / "csrc/cuda/sm90" / mutant.file
        text = source.read_text()
        source.write_text(replaced(text, mutant.old, mutant.new, f"{mutant.name}: {mutant.file}"))
        # the compiled program is kept by what went into it, and it goes by the true sources: the fault must
        # be in the name
        mark = digest([], [mutant.file, mutant.old, mutant.new])
        program = build(
            Path(folder) / f"tests/cuda/{mutant.program}.cpp",
            "check",
            ("MOLE_ONE_KERNEL", f"MOLE_MUTANT=0x{mark}"),
        )
    # as `make emulate` runs it: a livelock counts as noticed too
    for seed in range(mutant.seeds):
        outcome = run(program, [*mutant.arguments.split(), f"seed={seed}"], mutant.name, timeout=60)
        if outcome.code == 2:
            raise ValueError(f"{mutant.name}: {outcome.output.strip()}")
        if not outcome.ok:
            return outcome
    return None


def main() -> int:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(kill, MUTANTS))
    for mutant, outcome in zip(MUTANTS, found):
        said = "SURVIVED" if outcome is None else outcome.output.strip().splitlines()[0][:110]
        print(f"{mutant.name:60} {said}")
    return 1 if None in found else 0


if __name__ == "__main__":
    sys.exit(main())
