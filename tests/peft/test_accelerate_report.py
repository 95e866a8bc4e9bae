"""What `accelerate` says is computed: the handle, the counts and the warning agree with what the next call
does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize

import mole_kernels as mk
from mole_kernels.errors import MoleValueError, MoleWarning
from mole_kernels.peft import status
from tests.peft_models import K, calls, draw, make, twins

peft = pytest.importorskip("peft")
pytest.importorskip("diffusers")


@pytest.fixture(autouse=True)
def fresh_counts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(status, "_warned", set())
    mk.status(reset=True)
    yield
    mk.status(reset=True)


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


class Moves:
    """A model and everything that is done to it; the same steps on a second one that is not accelerated."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.undo: dict[str, Callable[[], object]] = {}

    @property
    def layer(self) -> Any:
        return self.model[0]

    def toggle(self, name: str, begin: Callable[[], Callable[[], object]]) -> None:
        if name in self.undo:
            self.undo.pop(name)()
        else:
            self.undo[name] = begin()

    # -- states of the layer

    def disable(self) -> None:
        self.layer.enable_adapters(self.layer.disable_adapters)

    def merge(self) -> None:
        if "weight" not in self.layer.lora_A["a0"]._parameters or self.undo.keys() & {"sequential", "norm"}:
            return
        self.layer.unmerge() if self.layer.merged else self.layer.merge()

    def train(self) -> None:
        self.model.train(not self.model.training)

    def activate(self) -> None:
        names = [["a0", "a1"], ["a1"], []]
        self.layer.set_adapter(names[(names.index(list(self.layer.active_adapters)) + 1) % 3])

    # -- hooks and parametrisations

    def hook(self) -> None:
        def begin() -> Callable[[], object]:
            return self.layer.lora_A["a0"].register_forward_hook(lambda m, a, y: 2 * y).remove

        self.toggle("hook", begin)

    def parametrise(self) -> None:
        module = self.layer.lora_B["a1"]

        def begin() -> Callable[[], object]:
            parametrize.register_parametrization(module, "weight", Halved())
            return lambda: parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)

        if not self.undo.keys() & {"sequential", "leaf"} and not self.layer.merged:
            self.toggle("parametrise", begin)

    def norm(self) -> None:
        """The old kind, with a hook that computes the weight: it is no parameter any more."""
        module = self.layer.lora_A["a1"]

        def begin() -> Callable[[], object]:
            weight = module._parameters.pop("weight")
            module.weight = weight.detach() * 1.5

            def end() -> None:
                del module.weight
                module._parameters["weight"] = weight

            return end

        if not self.undo.keys() & {"sequential", "leaf"} and not self.layer.merged:
            self.toggle("norm", begin)

    def sequential(self) -> None:
        from accelerate import cpu_offload
        from accelerate.hooks import remove_hook_from_submodules

        def begin() -> Callable[[], object]:
            cpu_offload(self.model, torch.device("cpu"))
            return lambda: remove_hook_from_submodules(self.model)

        if not self.undo.keys() & {"parametrise", "norm", "leaf"} and not self.layer.merged:
            self.toggle("sequential", begin)

    def leaf(self) -> None:
        from diffusers.hooks import HookRegistry, apply_group_offloading

        def begin() -> Callable[[], object]:
            apply_group_offloading(self.model, torch.device("cpu"), torch.device("cpu"), "leaf_level")
            registry = HookRegistry.check_if_exists_or_initialize(self.model)
            return lambda: registry.remove_hook("group_offloading", recurse=True)

        if not self.undo.keys() & {"parametrise", "norm", "sequential"}:
            self.toggle("leaf", begin)


STEPS = "disable merge train activate hook parametrise norm sequential leaf".split()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.sampled_from(STEPS), min_size=1, max_size=8))
def test_the_handle_says_what_the_next_call_does(steps: list[str]):
    plain, fast = (Moves(make((4, 2), lora_dropout=0.5).eval()) for _ in range(2))
    x = draw(3, K)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handle = mk.accelerate(fast.model)
        mk.status(reset=True)
        for count, step in enumerate(steps):
            for moves in (plain, fast):
                getattr(moves, step)()
            claimed = "0" in handle.layers
            computes = handle.report()["0"]["computes"]
            assert claimed == (computes == "accelerated") == ("0" not in handle.skipped)
            assert (
                repr(handle) == f"AccelerateHandle({int(claimed)} layers accelerated, {1 - claimed} skipped)"
            )
            assert mk.status()["layers"].get(computes, 0) >= 1
            with torch.no_grad():
                torch.manual_seed(count)
                theirs = plain.model(x)
                torch.manual_seed(count)
                ours = fast.model(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            accelerated, fallbacks = calls()
            assert (accelerated, sum(fallbacks.values())) == (int(claimed), 1 - claimed), (step, fallbacks)
            if not claimed:
                assert f"PEFT's own forward: {next(iter(fallbacks))}" == computes
            report = handle.report()["0"]["calls"]
            assert report["accelerated"] + sum(report["fallbacks"].values()) == count + 1
            mk.status(reset=True)


def test_layers_that_came_or_went_later_are_not_counted():
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["0"]), model, "a")
    handle = mk.accelerate(model)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["1"]), model, "b")
    # injecting "b" made it the active adapter everywhere
    assert not handle.layers and handle.skipped["0"] == "no adapter is active"
    model[0].set_adapter("a")
    assert list(handle.layers) == ["0"] and "call that again" in handle.skipped["1"]
    model[0] = model[0].base_layer
    assert not handle.layers and list(handle.skipped) == ["1"]
    handle.remove()
    assert repr(handle) == "AccelerateHandle(0 layers accelerated, 0 skipped)"


def test_a_layer_that_pefts_unloading_drops_is_not_kept_alive():
    import gc
    import weakref

    model = make((4,))
    handle = mk.accelerate(model)
    layer = weakref.ref(model[0])
    model[0] = model[0].base_layer
    gc.collect()
    assert layer() is None and handle.report() == {}


def test_one_warning_names_all_reasons_and_silent_states_none():
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin, self.conv, self.dora = nn.Linear(4, 4), nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    model: Any = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["lin", "conv"]), Model(), "a"
    )
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["dora"], use_dora=True), model, "b"
    )
    with pytest.warns(MoleWarning) as caught:
        mk.accelerate(model)
    ours = [str(w.message) for w in caught if issubclass(w.category, MoleWarning)]
    assert len(ours) == 1 and "2 PEFT layers" in ours[0] and "DoRA" in ours[0] and "Conv2d" in ours[0]
    # merged, disabled or without an active adapter is what the caller asked for
    for change in ("merge", "disable_adapters"):
        _, fast = twins((4,))
        fast[0].merge() if change == "merge" else fast[0].enable_adapters(False)
        with warnings.catch_warnings():
            warnings.simplefilter("error", MoleWarning)
            assert mk.accelerate(fast).skipped
            fast(draw(3, K))


def test_the_first_call_that_falls_back_warns_and_the_next_does_not():
    _, fast = twins((4, 2))
    fast[0].lora_A["a0"].register_forward_hook(lambda m, a, y: y)
    with pytest.warns(MoleWarning, match=r"went through PEFT's own forward: hooks on lora_A"):
        fast(draw(3, K))
    with warnings.catch_warnings():
        warnings.simplefilter("error", MoleWarning)
        fast(draw(3, K))


def test_counts_are_those_of_the_layer():
    model: Any = nn.Sequential(nn.Linear(K, K), nn.Linear(K, K))
    model = peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), model, "a"
    )
    handle = mk.accelerate(model)
    model[1].enable_adapters(False)
    for _ in range(3):
        model(draw(2, K))
    model[0].base_layer.register_forward_hook(lambda m, a, y: y)
    model(draw(2, K))
    report = handle.report()
    hooks = {"hooks on the base layer": 1}
    assert report["0"]["calls"] == {"accelerated": 4, "base_called": hooks, "fallbacks": {}}
    assert report["1"]["calls"] == {
        "accelerated": 0,
        "base_called": {},
        "fallbacks": {"adapters are disabled": 4},
    }
    assert mk.status()["accelerated"] == 4 and sum(mk.status()["fallbacks"].values()) == 4


OTHERS: dict[str, dict[str, Any]] = {
    "LoKr": {"r": 2},
    "LoHa": {"r": 2},
    "OFT": {"r": 0, "oft_block_size": 4},
    "IA3": {"feedforward_modules": []},
    "HRA": {"r": 2},
    "BOFT": {"boft_block_size": 4},
}


def other_adapter(family: str, model: Any, targets: list[str]) -> Any:
    config = next(c for n, c in vars(peft).items() if n.lower() == f"{family}config".lower())
    return peft.inject_adapter_in_model(config(target_modules=targets, **OTHERS[family]), model, "x")


@pytest.mark.parametrize("family", OTHERS)
def test_other_adapters_are_named(family: str):
    def net() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    alone = other_adapter(family, net(), ["0", "1"])
    with pytest.raises(
        MoleValueError, match=rf"none of this model's 2 PEFT layers is a LoRA layer \(2 {family}\)"
    ):
        mk.accelerate(alone)
    mixed = other_adapter(family, net(), ["0"])
    mixed = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["1"]), mixed, "y")
    with pytest.warns(MoleWarning, match=f"a {family} layer"):
        handle = mk.accelerate(mixed)
    assert list(handle.layers) == ["1"] and family in handle.skipped["0"]


def test_adapters_without_layers_are_named_too():
    class Backbone(nn.Module):
        peft_config = {"p": peft.PromptTuningConfig(num_virtual_tokens=2)}

    with pytest.raises(MoleValueError, match=r"PROMPT_TUNING\) have put no LoRA layer"):
        mk.accelerate(Backbone())
    with pytest.raises(MoleValueError, match="there is no PEFT LoRA layer"):
        mk.accelerate(nn.Linear(4, 4))
