"""One measured case on the CPU: every method, injected faults, rows that keep the schema; and whole
models.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks import lorafusion, ours
from benchmarks.cases import Case
from benchmarks.device import Cpu, kernels
from benchmarks.gpu import clock, layers, methods, models, results
from benchmarks.gpu.context import Context
from benchmarks.gpu.plan import layer_item
from benchmarks.layer import Layer
from benchmarks.peers import Eager, Merged, Stacked
from tests.benchmarks.peers_file import METHODS
from tests.kernels.interpreter import run as interpreted

CASE = Case("tiny", 32, 24, 40, True, "bf16", 4, counts=(("tiny", 3),))


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch, request):
    """Kernels run only in the tests that ask for them: timing them in the interpreter would take minutes."""
    if "interpreted_kernels" not in request.fixturenames:
        monkeypatch.setattr(ours, "interpreting", lambda: False)


@pytest.fixture
def interpreted_kernels():
    with interpreted() as counts:
        yield counts


def context(**methods) -> Context:
    return replace(Context.make("cpu", seconds=0.001), methods=methods)


def measured(case: Case, ctx: Context, **named):
    return layers.check(layer_item(case, **named), ctx)


@pytest.mark.parametrize(
    "case", [CASE, replace(CASE, gate="none"), replace(CASE, E=1, r=8), replace(CASE, E=8, r=1, B=1)], ids=str
)
def test_forward_rows(case):
    out = measured(case, context(), cold=True)
    assert not out.failures
    found = {(r["method"], r["cache"], r["launch"]) for r in out.rows}
    names = {"plain", "plain again", "ours", "stacked", "eager"} | (
        {"merged"} if case.gate == "none" else set()
    )
    assert {name for name, cache, launch in found if (cache, launch) == ("hot", "graph")} >= names
    assert {name for name, cache, _ in found if cache == "cold"} == {
        "plain",
        "plain again",
        "ours",
        "stacked",
    }
    assert {name for name, _, launch in found if launch == "stream"} >= {"plain", "ours", "eager"}
    for r in out.rows:
        assert not list(results._fields(r, results.CASE | results.GPU_CASE, "row")) and not list(
            results._times(r, "row")
        )
        assert r["ratio"]["p20"] <= r["ratio"]["plain"] <= r["ratio"]["p80"] and r["rounds"] >= clock.LEAST
    by = {r["method"]: r for r in out.rows if (r["cache"], r["launch"]) == ("hot", "graph")}
    assert by["plain"]["ratio"]["plain"] == 1 and by["stacked"]["ratio"]["stacked"] == 1
    assert (
        by["ours"]["flops"] > by["plain"]["flops"] and by["ours"]["aa"] == by["plain again"]["ratio"]["plain"]
    )


@pytest.mark.parametrize("gate", ["mole", "none"])
def test_training_rows(gate):
    out = measured(replace(CASE, gate=gate, mode="training"), context())
    assert not out.failures
    assert {r["method"] for r in out.rows} >= {"plain", "ours", "stacked", "eager"}
    assert all(r["err"] < 0.02 for r in out.rows)


@pytest.mark.parametrize("how, stage", [("wrong", "verify"), ("NaN", "verify"), ("raises", "verify")])
def test_a_faulty_method_is_marked_and_the_rest_is_measured(how, stage):
    out = measured(CASE, context(**{how: METHODS[how]}))
    assert [(f["method"], f["stage"]) for f in out.failures] == [(how, stage)]
    timed = {r["method"] for r in out.rows if r["us"]}
    assert how not in timed and timed >= {"plain", "ours", "stacked"}
    marked = [r for r in out.rows if r["method"] == how]
    assert len(marked) == (how != "raises")
    assert all(r["wrong"] and r["us"] is None and r["ratio"] is None for r in marked)
    assert not [p for r in marked for p in results._times(r, "row")]


def test_skipped_and_chosen_methods():
    out = measured(CASE, replace(context(), skip=frozenset({"stacked"})))
    assert "stacked" not in {r["method"] for r in out.rows} and not out.failures
    out = measured(CASE, context(), methods=["ours"])
    assert {r["method"] for r in out.rows} == {"plain", "ours"}


def test_a_replay_that_writes_nothing_is_a_failure(monkeypatch):
    monkeypatch.setattr(Cpu, "captured", lambda self, run: (run(), lambda: None)[1])
    out = measured(CASE, context())
    assert {f["stage"] for f in out.failures} == {"graph"} and "unwritten" in out.failures[0]["error"]


def test_warming_times_nothing():
    out = measured(CASE, context(), kind="warm")
    assert not out.rows and not out.failures and out.passed >= 4


def test_without_peft(monkeypatch):
    monkeypatch.setattr(methods, "installed", lambda name: False)
    out = measured(CASE, context())
    assert out.refused["peft"] == "PEFT is not installed" and not out.failures
    assert "peft" not in {r["method"] for r in out.rows}


def test_the_profilers_events_are_counted_by_device():
    class Event:
        def __init__(self, name, device_type):
            self.name, self.device_type = name, device_type

    events = [
        Event("aten::linear", "DeviceType.CPU"),
        Event("persistent_kernel", "DeviceType.CUDA"),
        Event("memset", "DeviceType.CUDA"),
    ]
    assert kernels(events) == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("gate", ["mole", "none"])
def test_lorafusions_scheme_is_right(dtype, gate, interpreted_kernels):
    """In the interpreter, in one launch of its kernel."""
    case = replace(CASE, dtype=dtype, gate=gate, M=70, K=33, N=45)
    with torch.no_grad():
        layer = Layer.make(case)
        y = lorafusion.LoRAFusion(layer)(layer.x)
    assert interpreted_kernels.launches == 1
    assert ((y.double() - layer.truth()).norm() / layer.truth().norm()) < layers.ALLOWED[dtype]


@pytest.mark.parametrize(
    "name", ["triton:persistent", "triton:two_pass", "triton:added", "triton:merge", "triton:recompute"]
)
def test_our_ways_by_name(name, interpreted_kernels):
    case = replace(CASE, gate="none" if name.endswith(("merge", "recompute")) else "mole")
    with torch.no_grad():
        layer = Layer.make(case)
        y = methods.methods(case, context(), False)[name].make(layer)(layer.x)
    assert not layers.rules.broken(y, layer.truth(), torch.bfloat16, layers.ROUNDINGS)


def test_a_case_goes_through_every_way(interpreted_kernels):
    ways = [name for name in ours.register() if name.startswith("triton:")]
    out = measured(replace(CASE, gate="none"), context(), kind="warm", methods=ways)
    assert not out.failures and out.passed == 1 + len(ways), out.refused
    assert interpreted_kernels.launches >= 7


def test_ways_say_what_they_cannot(interpreted_kernels):
    found = methods.methods(CASE, context(), False)
    assert (
        "every token" in found["triton:recompute"].refuses and "depend on x" in found["triton:merge"].refuses
    )


@pytest.mark.parametrize("make", [Merged, Stacked, Eager])
def test_plain_peers_without_gates(make):
    with torch.no_grad():
        layer = Layer.make(replace(CASE, gate="none", dtype="fp32"))
        y = make(layer)(layer.x)
    assert ((y.double() - layer.truth()).norm() / layer.truth().norm()) < 1e-6


def test_blocks_of_flux():
    item = {"id": "step", "kind": "model", "model": "flux-tiny", "R": 8, "gate": "mole"}
    out = models.check(item, context())
    assert not out.failures and out.passed >= 2
    assert {r["launch"] for r in out.rows} == {"eager", "graph"}
    ours = [r for r in out.rows if r["method"] == "ours"]
    assert all(r["layers"] == 17 for r in ours), (
        "q, k, v, out and two of the MLP in two streams; five in the single block"
    )


def test_a_model_whose_experts_do_nothing_is_caught(monkeypatch):
    monkeypatch.setitem(models.METHODS, "ours", lambda layer: layer.base)
    out = models.check(
        {"id": "step", "kind": "model", "model": "flux-tiny", "R": 8, "gate": "mole"}, context()
    )
    assert [f["method"] for f in out.failures] == ["ours"] and "no expert" in out.failures[0]["error"]


def test_the_unet_needs_diffusers(monkeypatch):
    monkeypatch.setattr(models, "installed", lambda name: False)
    out = models.check({"id": "step", "kind": "model", "model": "sdxl", "R": 8, "gate": "mole"}, context())
    assert out.refused == {"sdxl": "diffusers is not installed"} and not out.rows


def test_sdxls_unet_has_the_published_shapes():
    """On the meta device: the linear layers of the attention blocks are those of linear_shapes.json."""
    pytest.importorskip("diffusers")
    from benchmarks.cases import layers as published

    unet, _ = models.sdxl()
    found: dict[tuple[int, int], int] = {}
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and "attentions." in name:
            found[module.in_features, module.out_features] = (
                found.get((module.in_features, module.out_features), 0) + 1
            )
    wanted: dict[tuple[int, int], int] = {}
    for case in published("SDXL-UNet"):
        wanted[case.K, case.N] = wanted.get((case.K, case.N), 0) + dict(case.counts)["SDXL-UNet"]
    assert found == wanted


def test_copies_share_the_weights():
    model, _ = models.flux_blocks(True)
    model = model.to_empty(device="cpu")
    copied = models.shared(model)
    assert copied.first is not model.first and copied.first.text.to_q.weight is model.first.text.to_q.weight


def test_the_floor_is_this_runs_own():
    case = replace(CASE, M=2048, K=1280, N=1280)
    fast, slow = ({"bf16_tflops": t, "copy_gb_s": 4000.0} for t in (800.0, 400.0))
    assert layers.floor_us(case, slow) == pytest.approx(2 * layers.floor_us(case, fast))
    assert clock.calls(1000) == 1 and clock.calls(1) == clock.MOST_CALLS
