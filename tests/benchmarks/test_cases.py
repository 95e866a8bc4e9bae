"""What is measured: sizes, the work that the mathematics needs, and the plan's order."""

from dataclasses import replace

import pytest
import torch

from benchmarks.cases import Case, layers, shapes
from benchmarks.gpu import plan
from benchmarks.gpu.layers import case_of
from benchmarks.gpu.methods import problem_of

CASE = Case("m", 2048, 1280, 640, True, "bf16", 32)


@pytest.mark.parametrize("gate", ["mole", "none"])
def test_the_work_is_the_problems_own(gate):
    case = replace(CASE, gate=gate)
    problem = problem_of(case, "cuda")
    assert (case.flops, case.bytes_min) == (problem.flops(), problem.bytes())
    assert case.base_flops == problem.base_flops()


def test_a_training_step_is_a_forward_and_a_backward():
    forward, backward, both = (replace(CASE, mode=m) for m in ("forward", "backward", "training"))
    assert both.flops == forward.flops + backward.flops and both.base_flops == 2 * forward.base_flops


def test_layers_count_what_the_model_has():
    sdxl = {(c.M, c.K, c.N): dict(c.counts)["SDXL-UNet"] for c in layers("SDXL-UNet")}
    assert len(sdxl) == 8 and sdxl[2048, 1280, 1280] == 372
    assert sum(sdxl.values()) == 722, "SDXL's adapted linear layers"
    assert {c.B for c in layers("SDXL-UNet")} == {2} and {c.B for c in layers("FLUX.1-dev")} == {1}
    assert layers("no such model") == []


def test_the_cpu_suite_is_what_it_was():
    found = shapes(("SD1.5-UNet", "SDXL-UNet"), 3.4)
    assert len(found) == 19 and all(2e-9 * c.M * c.K * c.N <= 3.4 or c.M <= 256 for c in found)


def test_the_default_plan_holds_what_the_goals_need():
    items = plan.measured("cuda", False, False)
    names = [i["id"] for i in items]
    assert len(names) == len(set(names)) and 40 <= len(names) <= 90
    for R, model in ((16, "SDXL-UNet"), (64, "SDXL-UNet"), (64, "FLUX.1-dev")):
        wanted = [c for c in layers(model) if c.base_flops * dict(c.counts)[model] > 1e9]
        covered = {
            (c.M, c.K, c.N)
            for i in items
            if "case" in i and (c := case_of(i)).R == R and c.gate == "mole" and c.mode == "forward"
        }
        part = sum(c.base_flops * dict(c.counts)[model] for c in wanted if (c.M, c.K, c.N) in covered)
        assert part / sum(c.base_flops * dict(c.counts)[model] for c in wanted) > 0.95
    assert {case_of(i).R for i in items if "case" in i} == set(plan.RANKS)
    assert {case_of(i).E for i in items if "case" in i} == set(plan.EXPERTS)
    models = {m for i in items if "case" in i for m, _ in case_of(i).counts}
    assert models >= {plan.SDXL, plan.FLUX, *plan.OTHERS}
    assert names.index("step sdxl R64 mole") < names.index("forward-4608x3072x3072-bf16-r256"), (
        "sweeps are dropped before whole models"
    )


def test_quick_only_and_full():
    assert len(plan.measured("cuda", True, False)) <= 4
    items = plan.measured("cuda", False, False)
    assert all("2048x1280x1280" in i["id"] for i in plan.chosen(items, "2048x1280x1280")) and plan.chosen(
        items, "2048x1280x1280"
    )
    assert [i["id"] for i in plan.chosen(items, "step*sdxl*")] == ["step sdxl R64 mole", "step sdxl R16 mole"]
    assert len(plan.measured("cuda", False, True)) > 2000
    warm = plan.warmed(items)
    assert warm and all(i["kind"] == "warm" and not i["compile"] for i in warm)


def test_items_travel_as_json():
    import json

    for item in (*plan.measured("cuda", False, False), *plan.tiny()):
        if "case" in item:
            assert case_of(json.loads(json.dumps(item))) == case_of(item)
    assert torch.bfloat16 == problem_of(CASE, "cuda").dtype
