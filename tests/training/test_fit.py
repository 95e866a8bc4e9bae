"""The loop: what trains, what stays, and that a resumed run is the run that never stopped."""

import copy
import json
import math
import os
import signal
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from torch import nn

from mole_kernels.errors import MoleFileError, MoleStateError, MoleTypeError, MoleValueError, MoleWarning
from mole_kernels.training import checkpoint as checkpoints
from mole_kernels.training import config as configs
from mole_kernels.training import session
from mole_kernels.training.checkpoint import list_checkpoints, load_latest
from mole_kernels.training.config import TrainConfig, learning_rate
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.loop import fit

BASE = TrainConfig(steps=7, lr=1e-2, warmup=2, accumulation=2, checkpoint_every=3, seed=3)


def toy(rank=3):
    """A frozen layer, a dropout (so torch's own random state matters) and a layer that trains."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, rank, bias=False), nn.Linear(rank, 4))


def data():
    return TensorBatches({"x": torch.randn(11, 4, generator=torch.Generator().manual_seed(1))}, 3)


def noisy_loss(model, batch, generator):
    return (
        (model(batch["x"] + torch.randn(batch["x"].shape, generator=generator)) - batch["x"]).square().mean()
    )


def run(config=BASE, model=None, batches=None, trained=(2, 3), **options):
    model = toy() if model is None else model
    named = {name: p for name, p in model.named_parameters() if int(name[0]) in trained}
    options = {"loss_fn": noisy_loss, "progress": False} | options
    return model, fit(model, named, batches if batches is not None else data(), config, **options)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def test_only_what_is_named_trains_and_the_rest_is_put_back():
    model = toy().eval()
    model[1].train()
    model[2].weight.requires_grad_(False)
    before, random = snapshot(model), torch.get_rng_state()
    _, result = run(model=model, trained=(2,))
    after = model.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["2.weight"]
    assert [m.training for m in model] == [False, True, False, False] and not model.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert len(result.losses) == result.steps == 7 and result.throughput > 0


def test_one_step_is_adamw_on_the_mean_of_its_batches():
    config = replace(BASE, steps=1, warmup=0, grad_clip=None, weight_decay=0.1)
    batches = [{"x": torch.randn(2, 4)} for _ in range(2)]

    def loss_fn(model, batch, generator):
        return model[3](model[2](model[0](batch["x"]))).square().mean()

    ours, result = run(config, batches=batches, loss_fn=loss_fn)
    theirs = toy()
    optimiser = torch.optim.AdamW(
        [*theirs[2].parameters(), *theirs[3].parameters()], lr=config.lr, weight_decay=0.1
    )
    losses = [loss_fn(theirs, batch, None) for batch in batches]
    (sum(losses) / 2).backward()
    optimiser.step()
    assert result.losses == pytest.approx([sum(losses).item() / 2], rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


def test_gradients_are_clipped_over_all_that_trains_and_the_rate_follows_its_schedule(monkeypatch):
    norms, rates = [], []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            group = self.param_groups[0]
            norms.append(torch.cat([p.grad.flatten() for p in group["params"]]).norm().item())
            rates.append(group["lr"])

    monkeypatch.setitem(configs.OPTIMISERS, "adamw", lambda parameters, config: Spy(parameters, lr=config.lr))
    config = replace(BASE, grad_clip=None, schedule="linear")
    run(config)
    assert rates == [learning_rate(config, step) for step in range(7)] and len(set(rates)) > 4
    free = list(norms)
    norms.clear()
    run(replace(BASE, grad_clip=1e-3))
    assert min(free) > 1e-2 and max(norms) == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rate(schedule):
    config = TrainConfig(steps=100, lr=2.0, warmup=4, schedule=schedule)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0
    wanted = {"constant": 2.0, "linear": 1.0, "cosine": 1.0}[schedule]
    assert rates[52] == pytest.approx(wanted) and rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"mixed_precision": "bf16"}], ids=str)
@pytest.mark.parametrize("stop", [3, 4])
def test_resume_equals_a_run_without_a_break_bit_for_bit(tmp_path, stop, options):
    config = replace(BASE, **options)
    whole, wanted = run(config, run_dir=tmp_path / "whole")
    run(replace(config, steps=stop), run_dir=tmp_path / "broken")
    torch.manual_seed(99)
    torch.rand(5)
    model, result = run(config, run_dir=tmp_path / "broken", resume=True)
    assert same(model, whole) and result.losses == wanted.losses and result.steps == 7
    plain, _ = run(config)
    assert same(plain, whole)
    left, right = load_latest(tmp_path / "whole"), load_latest(tmp_path / "broken")
    assert torch.equal(left.rng[0]["cpu"], right.rng[0]["cpu"]) and left.data == right.data


def test_a_loss_scaler_may_skip_a_step_and_is_resumed(tmp_path, monkeypatch):
    """accelerate makes a scaler on a GPU only (fp16); torch's own, put in its place, does the same on a
    CPU.
    """

    class Scaling(Accelerator):
        def __init__(self, **options):
            super().__init__(**options)
            self.scaler = torch.amp.GradScaler("cpu")

    monkeypatch.setattr(session, "Accelerator", Scaling)
    config, calls, seen = replace(BASE, accumulation=1, grad_clip=None), [], []

    def overflowing(model, batch, generator):
        calls.append(1)
        # finite itself, but not once it is scaled: the scaler has to skip this step and halve its scale
        return noisy_loss(model, batch, generator) * (1e35 if len(calls) == 2 else 1.0)

    model = toy()
    run(
        replace(config, steps=3),
        model=model,
        run_dir=tmp_path,
        loss_fn=overflowing,
        on_step=lambda *_: seen.append(snapshot(model)),
    )
    changed = [not all(torch.equal(a[k], b[k]) for k in a) for a, b in pairwise(seen)]
    assert changed == [False, True]
    assert load_latest(tmp_path).scaler["scale"] == 2.0**15
    run(config, run_dir=tmp_path, resume=True)
    assert load_latest(tmp_path).scaler["scale"] == 2.0**15


def test_resume_of_a_finished_or_unbegun_run(tmp_path):
    whole, wanted = run(run_dir=tmp_path, resume=True)
    model, result = run(run_dir=tmp_path, resume=True)
    assert same(model, whole) and result.losses == wanted.losses and result.throughput == 0
    with pytest.raises(MoleStateError, match="already holds checkpoints"):
        run(run_dir=tmp_path)
    with pytest.raises(MoleValueError, match="run_dir"):
        run(resume=True)


def test_a_cosine_run_cannot_change_its_length(tmp_path):
    config = replace(BASE, schedule="cosine")
    run(replace(config, steps=3), run_dir=tmp_path)
    with pytest.raises(MoleStateError, match=r"config\.steps: expected 3 .* got 7"):
        run(config, run_dir=tmp_path, resume=True)


def test_resume_with_another_run_is_refused_and_changes_nothing(tmp_path):
    run(replace(BASE, steps=3), run_dir=tmp_path, identity={"experts": "face:3"})
    cases = {
        "lr": ({"config": replace(BASE, lr=1.0)}, r"config\.lr"),
        "rank": ({"model": toy(rank=5)}, r"2\.weight: expected \[3, 8\] float32 .* got \[5, 8\]"),
        "names": ({"trained": (0, 2)}, r"3\.\w+: expected .* got nothing"),
        "dtype": ({"model": toy().double()}, "float64"),
        "data": ({"batches": TensorBatches({"x": torch.randn(12, 4)}, 3)}, "samples"),
        "values": ({"batches": TensorBatches({"x": torch.randn(11, 4)}, 3)}, "batches, x: has other values"),
        "identity": ({"identity": {"experts": "hand:3"}}, "experts: expected 'face:3', got 'hand:3'"),
    }
    for name, (options, message) in cases.items():
        options = {"identity": {"experts": "face:3"}, "model": toy()} | options
        before = snapshot(options["model"])
        with pytest.raises(MoleStateError, match=message):
            run(run_dir=tmp_path, resume=True, **options)
        assert all(torch.equal(before[k], v) for k, v in options["model"].state_dict().items()), name


@pytest.mark.parametrize("when", ["between steps", "within a step", "after the last step"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_in_the_middle_of_training_is_not_silent(tmp_path, when, dtype):
    model, at = toy(), 7 if when == "after the last step" else 4

    def on_step(step, loss):
        if when != "within a step" and step == at:
            model.to(dtype)

    def loss_fn(model, batch, generator):
        loss = noisy_loss(model, batch, generator)
        if when == "within a step" and len(list_checkpoints(tmp_path)) == 1:
            model.to(dtype)
        return loss

    with pytest.raises(
        (MoleStateError, RuntimeError), match=r"2\.weight was cast to torch\.|dtype"
    ) as caught:
        run(model=model, run_dir=tmp_path, on_step=on_step, loss_fn=loss_fn)
    if isinstance(caught.value, MoleStateError):
        assert "the last good checkpoint is" in str(caught.value)
    # no checkpoint holds what was rounded, and the run goes on from the last good one
    saved = load_latest(tmp_path)
    assert {value.dtype for value in saved.weights.values()} == {torch.float32}
    assert not all(torch.equal(v, v.to(dtype).float()) for v in saved.weights.values())
    resumed, result = run(run_dir=tmp_path, resume=True)
    whole, wanted = run()
    assert result.losses == wanted.losses and same(resumed, whole)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_mixed_precision_keeps_steps_that_16_bits_would_lose(precision):
    config = replace(BASE, lr=1e-6, warmup=0, weight_decay=0.0, mixed_precision=precision)
    before, (after, _) = toy(), run(config)
    for name, p in after.named_parameters():
        moved = (p - dict(before.named_parameters())[name]).abs()
        if name[0] in "23":
            assert p.dtype == torch.float32 and 0 < moved.max() < 1e-5


def test_nan_loss_stops_names_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    calls = []

    def loss_fn(model, batch, generator):
        calls.append(1)
        loss = noisy_loss(model, batch, generator)
        # the second batch of step 5
        return loss * math.nan if len(calls) == 10 else loss

    model = toy()
    with pytest.raises(MoleStateError, match=r"step 5: the loss is nan \(batch 9\)(.|\n)*step-00000003"):
        run(model=model, run_dir=tmp_path, loss_fn=loss_fn)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    resumed, _ = run(run_dir=tmp_path, resume=True)
    assert same(resumed, run()[0])


def test_infinite_gradient_stops_before_it_reaches_the_weights():
    def loss_fn(model, batch, generator):
        return model[3].bias.sub(model[3].bias.detach()).abs().sqrt().sum()

    model = toy()
    before = snapshot(model)
    with pytest.raises(MoleStateError, match="step 1: the gradient's norm is"):
        run(model=model, loss_fn=loss_fn, trained=(3,))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_ctrl_c_finishes_the_step_and_leaves_a_checkpoint_to_go_on_from(tmp_path):
    handler = signal.getsignal(signal.SIGINT)

    def press(step, loss):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path, on_step=press)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]
    model, result = run(run_dir=tmp_path, resume=True)
    whole, wanted = run()
    assert same(model, whole) and result.losses == wanted.losses


def test_a_second_ctrl_c_stops_at_once_and_the_earlier_checkpoint_stays(tmp_path):
    def twice(model, batch, generator):
        if len(list_checkpoints(tmp_path)):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return noisy_loss(model, batch, generator)

    with pytest.raises(KeyboardInterrupt):
        run(run_dir=tmp_path, loss_fn=twice)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [3]
    assert same(run(run_dir=tmp_path, resume=True)[0], run()[0])


@pytest.mark.parametrize("stage", ["optimiser", "rename"])
def test_a_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, stage):
    run(replace(BASE, steps=3), run_dir=tmp_path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    if stage == "optimiser":
        monkeypatch.setattr(checkpoints.torch, "save", full)
    else:
        monkeypatch.setattr(checkpoints.Path, "rename", full)
    with pytest.raises(MoleFileError, match="No space left"):
        run(run_dir=tmp_path, resume=True)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003"]
    assert same(run(run_dir=tmp_path, resume=True)[0], run()[0])


def test_killed_while_saving_and_broken_newest(tmp_path):
    whole, _ = run(run_dir=tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [6, 7]
    (tmp_path / ".unfinished-step-00000009-1").mkdir()
    newest = list_checkpoints(tmp_path)[-1][1]
    for name in ("weights.safetensors", "optimiser.pt", "run.json"):
        (newest / name).write_bytes((newest / name).read_bytes()[:40])
        with pytest.warns(MoleWarning, match="step-00000007(.|\n)*cannot be read"):
            found = load_latest(tmp_path)
        assert found.step == 6
    with pytest.warns(MoleWarning):
        model, _ = run(run_dir=tmp_path, resume=True)
    assert same(model, whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000006", "step-00000007"]
    for _, folder in list_checkpoints(tmp_path):
        (folder / "run.json").write_text(json.dumps({"format": "other"}))
    with pytest.warns(MoleWarning), pytest.raises(MoleStateError, match="none of its 2 checkpoints"):
        run(run_dir=tmp_path, resume=True)


def test_keep_last_and_checkpoint_at_the_end_only(tmp_path):
    run(replace(BASE, checkpoint_every=1, keep_last=3), run_dir=tmp_path / "a")
    assert [step for step, _ in list_checkpoints(tmp_path / "a")] == [5, 6, 7]
    run(replace(BASE, checkpoint_every=None), run_dir=tmp_path / "b")
    assert [step for step, _ in list_checkpoints(tmp_path / "b")] == [7]


def test_the_running_mean_is_the_result(tmp_path):
    seen = []
    config = replace(BASE, ema_decay=0.75)
    model = toy()
    mean = model[2].weight.detach().clone()
    run(config, model=model, on_step=lambda *_: seen.append(model[2].weight.detach().clone()))
    for weight in seen:
        mean = 0.75 * mean + 0.25 * weight
    torch.testing.assert_close(model[2].weight, mean)
    assert not torch.equal(model[2].weight, seen[-1])


def test_mixed_precision_of_one_run_does_not_bind_the_next():
    seen = []

    def loss_fn(model, batch, generator):
        seen.append(model[2](model[0](batch["x"])).dtype)
        return noisy_loss(model, batch, generator)

    for precision in ("bf16", "no", None):
        model, _ = run(replace(BASE, steps=1, accumulation=1, mixed_precision=precision), loss_fn=loss_fn)
        assert "forward" not in model.__dict__ and "_original_forward" not in model.__dict__
        copy.deepcopy(model)
    assert seen == [torch.bfloat16, torch.float32, torch.float32]


def test_one_line_at_the_end_where_there_is_no_terminal(capfd):
    run(progress=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "it/s" in line]
    assert [line.split()[1] for line in lines] == ["7/7"] and "loss" in lines[0] and " in 0:" in lines[0]
    # and more of them where they were asked for
    run(replace(BASE, log_every=4), progress=True)
    lines = [line for line in capfd.readouterr().err.splitlines() if "it/s" in line]
    assert [line.split()[1] for line in lines] == ["4/7", "7/7"] and "left" in lines[0]
    run(progress=False)
    assert capfd.readouterr().err == ""


def test_what_cannot_train():
    model = toy()
    with pytest.raises(MoleTypeError, match="parameters of the model"):
        fit(model, [nn.Parameter(torch.zeros(1))], data(), BASE, loss_fn=noisy_loss)
    with pytest.raises(MoleValueError, match="at least one"):
        fit(model, [], data(), BASE, loss_fn=noisy_loss)
    with pytest.raises(MoleTypeError, match="float32"):
        fit(model.to(torch.bfloat16), list(model[2].parameters()), data(), BASE, loss_fn=noisy_loss)
    with pytest.raises(MoleTypeError, match="scalar"):
        run(loss_fn=lambda model, batch, generator: batch["x"].mean())
    with pytest.raises(MoleValueError, match="'no' or 'bf16' on a CPU"):
        run(replace(BASE, mixed_precision="fp16"))


def test_two_runs_in_two_threads_do_not_end_each_other():
    config = replace(BASE, mixed_precision="no")
    long_has_begun, short_has_ended = threading.Event(), threading.Event()
    _, wanted = run(config, trained=(2,))
    results, errors = {}, []

    def train(name, **options):
        try:
            # no dropout, whose draws come from the generator that threads share
            results[name] = run(config, model=toy().eval(), trained=(2,), **options)[1]
        except BaseException as error:
            errors.append(error)

    def long_step(step, loss):
        if step == 2:
            long_has_begun.set()
            assert short_has_ended.wait(60)

    # the short run makes accelerate's state and ends while the long one is in the middle
    def short_step(step, loss):
        if step == 1:
            threads[1].start()
            assert long_has_begun.wait(60)

    threads = [
        threading.Thread(target=lambda: (train("short", on_step=short_step), short_has_ended.set())),
        threading.Thread(target=lambda: train("long", on_step=long_step)),
    ]
    threads[0].start()
    for thread in threads:
        thread.join(120)
    assert not errors and not is_initialized()
    assert len(results["short"].losses) == len(results["long"].losses) == len(wanted.losses)


def test_a_process_that_already_chose_its_precision():
    Accelerator(mixed_precision="no")
    try:
        with pytest.raises(MoleValueError, match="bf16"):
            run(replace(BASE, mixed_precision="bf16"))
        run()
        assert is_initialized()
    finally:
        AcceleratorState._reset_state()


WRONG = [
    ("steps", -1),
    ("lr", 0),
    ("lr", math.nan),
    ("schedule", "step"),
    ("optimiser", "lion9"),
    ("mixed_precision", "fp8"),
    ("accumulation", 0),
    ("grad_clip", -1.0),
    ("cond_dropout", 1.5),
    ("ema_decay", 1.0),
    ("checkpoint_every", 0),
    ("keep_last", 0),
    ("betas", (0.9, 1.0)),
    ("seed", 0.5),
]


@pytest.mark.parametrize("field, value", WRONG)
def test_config_names_what_is_wrong(field, value):
    with pytest.raises(MoleValueError, match=f"TrainConfig: {field}: expected"):
        TrainConfig(**({"steps": 1} | {field: value}))
