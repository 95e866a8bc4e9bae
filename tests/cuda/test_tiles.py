"""The tile choice of the Hopper kernels (csrc/cuda/sm90/tile.h), compiled by itself: sane, and the same as
the dispatcher's model of it.
"""

import random
import shutil
import subprocess
from dataclasses import replace
from math import ceil, inf
from pathlib import Path

import pytest
import torch

from mole_kernels.dispatch import hopper
from mole_kernels.dispatch.device import known
from mole_kernels.dispatch.work import Use, work
from mole_kernels.kernels import sm90
from mole_kernels.problem import Problem

COMPILER = shutil.which("g++") or shutil.which("c++")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
SHARED = 232_448


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    out = tmp_path_factory.mktemp("tiles") / "tiles"
    source = Path(__file__).with_name("tiles.cpp")
    subprocess.run(
        [COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", str(source), "-o", str(out)],
        check=True,
    )
    return out


def ask(program, calls, every=False, back=False):
    """[(way, Problem)] -> candidates of each: a reason, or groups, columns, extra, cluster, slice, slices,
    stages, shared, grid, us.
    """
    lines = [
        f"{way} {p.B} {p.T} {p.K} {p.N} {p.R} {p.E} {p.S} {int(p.token_gate)} {int(p.sample_gate)} {int(back)}"
        for way, p in calls
    ]
    out = subprocess.run(
        [program, *(["all"] * every)], input="\n".join(lines), capture_output=True, text=True, check=True
    ).stdout
    answers = []
    for block in out.split("end\n")[:-1]:
        said = [line.split("\t") for line in block.splitlines()]
        answers.append([words if yes == "no" else [float(n) for n in words.split()] for yes, words in said])
    return answers


def some_problems(count):
    r = random.Random(0)
    for _ in range(count):
        B, T = r.choice([1, 2, 3]), r.choice([1, 77, 512, 1024, 2048, 4096])
        K, N = (r.choice([8, 320, 640, 1280, 2048, 3072, 5120, 10240]) for _ in range(2))
        R = r.choice([8, 16, 24, 64, 128, 256, 512])
        ranks, S = (R // 2, R - R // 2), r.choice([1, B])
        yield Problem(B, T, K, N, ranks, S, torch.bfloat16, "cuda", r.random() < 0.5, r.random() < 0.4)


CALLS = [
    (way, p) for p in some_problems(150) for way in sm90.WAYS if not (way == "recompute" and p.sample_gate)
]


@pytest.mark.parametrize("back", [False, True])
def test_the_dispatcher_predicts_what_the_library_chooses(program, back):
    found = 0
    calls = [(way, replace(p, sample_gate=p.sample_gate and not back)) for way, p in CALLS]
    for (way, p), (answer,) in zip(calls, ask(program, calls, back=back)):
        predicted = hopper.predict_us(way, work(p, known("h200"), Use(backward=back)), p.token_gate, back)
        if isinstance(answer, str):
            assert predicted == inf, (way, p, answer)
        else:
            assert predicted == pytest.approx(answer[-1], rel=1e-6), (way, p)
            found += 1
    assert found > 200


def test_every_candidate_fits_or_says_why(program):
    for (way, p), answers in zip(CALLS, ask(program, CALLS, every=True)):
        assert len(answers) == len(sm90.SHAPES[way]) * (3 if way == "cluster" else 1)
        for answer in answers:
            if isinstance(answer, str):
                assert answer
                continue
            groups, columns, extra, cluster, slice_, slices, stages, shared, grid, us = answer
            assert slice_ * slices >= p.R and slice_ % 8 == 0 and slice_ + 8 * p.token_gate == extra
            assert 3 <= stages <= 6 and shared <= SHARED and us > 0
            alone = p.S > 1 or p.sample_gate
            rows = (p.B if alone else 1) * ceil((p.T if alone else p.M) / (64 * groups))
            assert 1 <= grid <= 132 and grid % cluster == 0
            # a cluster that waits for a sample's gate waits for clusters that must all be there
            assert (
                not (way == "cluster" and p.sample_gate)
                or grid == rows * ceil(ceil(p.N / columns) / cluster) * cluster
            )


def test_every_candidate_for_dx_fits_or_says_why(program):
    fits = 0
    for (way, p), answers in zip(CALLS, ask(program, CALLS, every=True, back=True)):
        assert len(answers) == len(sm90.SHAPES[f"{way}_dx"]) * (3 if way == "cluster" else 1)
        for answer in answers:
            if not isinstance(answer, str):
                _, _, extra, cluster, slice_, slices, stages, shared, grid, us = answer
                assert slice_ == extra and slice_ * slices >= p.R and 3 <= stages <= 6 and shared <= SHARED
                assert 1 <= grid <= 132 and grid % cluster == 0 and us > 0
                fits += 1
    assert fits > 2000


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(N=1284), "N = 1284 is no multiple of 8"),
        (dict(K=1284), "K = 1284 is no multiple of 8"),
        (dict(sample_gate=True), "every token of a sample before the first dX"),
    ],
)
def test_what_is_refused_of_dx_by_the_layers_own_names(program, change, words):
    sizes = dict(B=1, T=2048, K=1280, N=640, ranks=(16,), S=1, dtype=torch.bfloat16, device="cuda") | change
    ((answer,),) = ask(program, [("cluster", Problem(**sizes))], back=True)
    assert words in answer


def test_a_wave_of_160_columns_for_1280(program):
    """16 row tiles times 8 column tiles are 128 of 132 multiprocessors; 128 columns would need two waves."""
    ((answer,),) = ask(
        program, [("cluster", Problem(1, 2048, 1280, 1280, (32, 32), 1, torch.bfloat16, "cuda", True))]
    )
    assert answer[1] == 160 and answer[8] == 128


@pytest.mark.parametrize(
    "way, change, words",
    [
        ("cluster", dict(K=1283), "K = 1283 is no multiple of 8"),
        ("persistent", dict(N=1281), "N = 1281 is no multiple of 8"),
        ("recompute", dict(ranks=(4,)), "R = 4 is no multiple of 8"),
        ("recompute", dict(sample_gate=True), "before the first output"),
        ("recompute", dict(ranks=(64,)), "no tile fits"),
        ("cluster", dict(ranks=(8,) * 9, token_gate=True), "9 experts are more"),
        ("cluster", dict(B=2, T=8192, sample_gate=True), "no tile fits"),
    ],
)
def test_what_is_refused_and_why(program, way, change, words):
    sizes = dict(B=1, T=2048, K=1280, N=1280, ranks=(16,), S=1, dtype=torch.bfloat16, device="cuda") | change
    ((answer,),) = ask(program, [(way, Problem(**sizes))])
    assert words in answer
