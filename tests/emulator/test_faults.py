"""A corpus of planted faults: the emulator names each of them, under every schedule tried, and passes the
same kernel without it.

Each program has a right kernel and a list of faults; `fault=none seed=N` computes the right thing,
`fault=NAME` ends with status 3 and
a report of one of the kinds given here. Where a schedule decides which of two rules is broken first, both
kinds are given.
MOLE_EMULATE_SEEDS=20 tries that many schedules of each (make emulate).
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.emulator.support import build, run

SEEDS = int(os.environ.get("MOLE_EMULATE_SEEDS", "1"))
CLEAN_SEEDS = max(20, SEEDS)

FAULTS = {
    "faults_pipeline": {
        "no_full_wait": "race",
        "no_empty_wait": "race|mbarrier",
        "few_bytes": "race",
        "many_bytes": "deadlock",
        "early_release": "race",
        "no_release": "deadlock",
        "no_init_fence": "proxy",
        "no_init_barrier": "race|mbarrier",
        "read_before_wait": "wgmma",
        "no_wgmma_fence": "wgmma",
        "no_proxy_fence": "proxy",
        "no_store_barrier": "race|uninitialised",
        "no_store_wait": "exit",
        "buffer_reuse": "race",
        "double_arrival": "mbarrier",
        "misaligned_tile": "alignment",
        "descriptor_out_of_bounds": "bounds",
        "divergent_descriptor": "divergence",
        "wrong_parity": "deadlock|race",
        "uninitialised_barrier": "mbarrier",
        "row_out_of_bounds": "bounds",
        "lane_skips_wgmma": "deadlock|divergence",
        "wait_leaves_one": "race|wgmma",
        "overwritten_in_flight": "race",
        "wgmma_not_waited": "exit",
        "load_not_waited": "exit",
        "barrier_overwritten": "mbarrier",
        "init_twice": "mbarrier",
        "expect_after_phase": "mbarrier",
        "map_rank": "tma",
        "accumulator_write": "wgmma",
        "fragment_late": "wgmma",
        "swizzle_differs": "wrong",
    },
    "faults_cluster": {
        "no_first_sync": "race|mbarrier",
        "no_last_sync": "exit",
        "cta_scope_wait": "race|exit",
        "no_proxy_fence": "proxy",
        "early_copy": "race",
        "foreign_barrier": "mbarrier",
        "one_expects": "race|uninitialised|transactions|mbarrier",
        "wrong_rank": "bounds",
        "peer_pointer": "bounds",
        "arrive_twice": "divergence",
        "wait_without_arrive": "divergence",
        "lane_not_arrived": "divergence",
        "no_remote_arrival": "deadlock",
        "relaxed_without_fence": "race|proxy",
        "remote_uninitialised": "mbarrier",
        "misaligned_store": "alignment",
        "out_of_bounds": "bounds",
        "few_remote_bytes": "race|transactions",
        "no_wait_for_peer": "race|proxy",
        "source_reuse": "race",
        "multicast_to_nobody": "bounds",
        "late_store": "exit",
        "read_after_end": "exit",
        "no_freed_wait": "race",
        "arrival_without_scope": "race",
        "ordinary_after_freed": "race|proxy",
        "no_second_fence": "proxy",
    },
    "faults_warp": {
        "no_reuse_barrier": "race",
        "no_copy_wait": "race",
        "misaligned_ldmatrix": "alignment",
        "half_barrier": "divergence|deadlock",
        "half_shuffle": "divergence",
        "no_syncwarp": "race|uninitialised",
        "uninitialised": "uninitialised",
        "named_count": "barrier",
        "named_mismatch": "barrier",
        "copy_at_exit": "exit",
        "smem_out_of_bounds": "bounds",
        "misaligned_vector": "alignment",
        "writes_input": "bounds",
        "mask_without_me": "divergence",
        "reads_past_input": "bounds",
        "copy_misaligned": "alignment",
        "lane_exits_early": "deadlock|divergence",
        "lanes_race": "race",
        "double_writer": "race",
        "static_variable": "bounds",
        "different_calls": "divergence",
        "arrive_only": "race|uninitialised",
        "no_barrier_before_sum": "race|uninitialised",
        "register_budget": "deadlock",
        "registers_diverge": "divergence",
        "fragment_index": "bounds",
        "atomic_and_plain": "race",
        "copy_past_input": "bounds",
        "no_async_arrival_wait": "race",
    },
    "faults_grid": {
        "relaxed_flag": "race",
        "relaxed_load": "race",
        "no_release_barrier": "race|uninitialised",
        "no_proxy_fence": "proxy",
        "not_resident": "deadlock",
        "same_output": "race",
        "plain_flag": "race",
        "plain_flag_load": "race|livelock",
        "no_acquire_barrier": "race|uninitialised",
        "wrong_block": "race|uninitialised",
        "flag_before_data": "race|uninitialised",
        "flag_out_of_bounds": "bounds",
        "wrong_count": "deadlock",
        "tile_past_end": "bounds",
        "counter_uninitialised": "uninitialised|race",
        "fence_after": "race",
        "bulk_store_not_waited": "race",
    },
}


def kinds_seen(program, fault: str) -> list[str]:
    """What became of the fault under each schedule: the report's kind, `wrong` for a wrong answer, `right`
    for none.
    """
    seen = []
    for seed in range(SEEDS):
        # another schedule for each fault, so that a short run is not all of one kind
        outcome = run(program, fault=fault, seed=seed if SEEDS > 1 else sum(map(ord, fault)) % 12)
        report = re.search(r"emulator: \[(\w+)\]", outcome.output)
        seen.append(
            report[1]
            if outcome.code == 3 and report
            else {0: "right", 1: "wrong"}.get(outcome.code, outcome.output)
        )
    return seen


@pytest.mark.parametrize("name", FAULTS)
def test_without_a_fault_nothing_is_reported(name):
    program = build(name)
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda seed: run(program, fault="none", seed=seed), range(CLEAN_SEEDS)))
    assert not [o.output for o in outcomes if not o.ok]


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_is_in_the_table(name):
    listed = run(build(name), list=1).output.split()
    assert listed == ["none", *FAULTS[name]]


@pytest.mark.parametrize("name,fault", [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_a_planted_fault_is_named(name, fault):
    allowed = FAULTS[name][fault].split("|")
    seen = kinds_seen(build(name), fault)
    assert set(seen) <= set(allowed), seen


def test_a_report_says_who_where_and_what():
    outcome = run(build("faults_pipeline"), fault="no_proxy_fence", seed=3)
    assert re.search(
        r"\[proxy\] tma_store touches shared memory \+\d+ at faults_pipeline.cpp:\d+", outcome.output
    )
    assert re.search(
        r"ordinary store of thread \d+ \(warp \d, lane \d+\) of CTA \(\d,0,0\) at faults_pipeline.cpp:\d+",
        outcome.output,
    )


def test_a_deadlock_says_who_waits_for_what():
    outcome = run(build("faults_pipeline"), fault="many_bytes", seed=1)
    assert re.search(
        r"threads 0…127: waits for an mbarrier: .* at shared memory \+\d+.*, parity 0, from faults_pipeline.cpp:\d+",
        outcome.output,
    )
    assert re.search(
        r"mbarrier at \+\d+: phase 0, 0 of 1 arrivals still to come, 16 bytes expected and not there",
        outcome.output,
    )


def test_a_seed_is_a_schedule():
    """The same seed gives the same report, word for word; some other seed another."""
    program = build("faults_warp")
    words = [run(program, fault="no_reuse_barrier", seed=seed).output for seed in (5, 5, 6, 7)]
    assert words[0] == words[1]
    assert len(set(words)) > 1


@pytest.mark.parametrize("name", ["gemm_portable", "gemm_wgmma"])
def test_a_right_kernel_is_right_under_every_schedule(name):
    program = build(name)
    outcomes = [run(program, seed=seed) for seed in range(CLEAN_SEEDS)]
    assert not [o.output for o in outcomes if not o.ok]
    # the schedule moves nothing: the sums are made in the same order
    assert len({o.output for o in outcomes}) == 1


@pytest.mark.skipif(SEEDS == 1, reason="compiles the emulator again: make emulate")
@pytest.mark.parametrize("flavour", ["address", "fast"])
@pytest.mark.parametrize("name", ["gemm_portable", "gemm_wgmma", *FAULTS])
def test_other_flavours_agree(name, flavour):
    outcome = run(build(name, flavour), seed=1)
    assert outcome.ok, outcome.output
