"""The demo end to end at toy size: what it promises to write is written, from the shipped base."""

import base64
import io
import json
import re

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("diffusers")
pytest.importorskip("peft")

from mole_kernels.demo import evaluate, stages, tasks
from mole_kernels.demo.model import ASSETS, load_pipeline
from mole_kernels.demo.run import MIXTURE, SHOWN, run_demo
from mole_kernels.demo.timing import eager_unet, peft_unet, step_input
from mole_kernels.errors import MoleValueError
from mole_kernels.io import load_bank
from mole_kernels.patching.apply import patch

TINY = stages.DigitTraining(
    rank=2, closeups=32, expert_steps=2, expert_batch=4, scenes=32, gate_steps=2, gate_batch=4
)


def job(folder, **changes) -> tasks.DemoJob:
    return tasks.DemoJob(
        **{
            "seed": 0,
            "folder": folder,
            "plan": TINY,
            "held_out": 4,
            "captions": 3,
            "steps": 2,
            "pictures": True,
        }
        | changes
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with both toy experts."""
    made = job(tmp_path_factory.mktemp("demo"))
    for half in (0, 1):
        assert all(loss > 0 for loss in tasks.expert_task(made, half)["training"][("low", "high")[half]])
    return made


@pytest.mark.parametrize("kind", stages.GATE_KINDS)
def test_each_kind_of_gates_is_trained_and_measured(trained, kind):
    found = tasks.gates_task(trained, kind)
    name = tasks.GATED[kind]
    assert set(found["loss"][name]) == set(evaluate.REGIONS) and len(found["scene_loss"][name]) == 4
    assert ("gates" in found) == (kind in ("local", "mole")) and ("constants" in found) == (
        kind == "constant"
    )
    if kind == "mole":
        assert found["maps"][name].shape == (len(tasks.SHOWN_CAPTIONS), 2, 6, 18)
        bank, gates = load_bank(tasks.mixture_path(trained))
        assert bank.names == ("low", "high") and len(gates.layers) == len(bank.paths()) == 84
        assert all(path.startswith("unet.") for path in bank.paths())


def test_experts_without_gates_are_measured_alone_summed_and_scaled(trained):
    found = tasks.plain_task(trained)
    assert list(found["loss"]) == [
        "low expert",
        "high expert",
        "sum",
        *(f"constant {c}" for c in tasks.CONSTANTS),
    ]
    assert set(found["pictures"]) == {"low expert", "high expert", "sum"}


def test_the_base_is_the_same_before_and_after_an_expert_is_trained():
    pipe = load_pipeline()
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    stages.train_digit_expert(pipe, 0, TINY, seed=0)
    after = pipe.unet.state_dict()
    assert list(after) == list(before) and all(
        torch.equal(after[name], tensor) for name, tensor in before.items()
    )


def test_the_shipped_mixture_computes_what_the_eager_layer_does():
    bank, gates = load_bank(ASSETS / MIXTURE)
    unet, given = load_pipeline().unet, step_input(2)
    plain = unet(*given).sample
    with torch.no_grad(), patch(unet, bank, gates):
        ours = unet(*given).sample
        eager = eager_unet(load_pipeline().unet, bank, gates)(*given).sample
    assert (ours - eager).norm() <= 1e-5 * eager.norm() < 1e-1 * (ours - plain).norm()


def test_the_ungated_experts_compute_what_peft_does():
    bank, _ = load_bank(ASSETS / MIXTURE)
    unet, given = load_pipeline().unet, step_input(2)
    with torch.no_grad(), patch(unet, bank):
        ours = unet(*given).sample
        peft = peft_unet(load_pipeline().unet, bank)(*given).sample
    assert (ours - peft).norm() <= 1e-5 * peft.norm()


def test_no_seeds_is_an_error(tmp_path):
    with pytest.raises(MoleValueError, match="at least one"):
        run_demo(tmp_path, seeds=0)


@pytest.mark.slow
def test_a_quick_demo_writes_all_that_it_promises(tmp_path):
    from PIL import Image

    lines: list[str] = []
    result = run_demo(
        tmp_path, quick=True, seeds=2, workers=1, say=lines.append, held_out=4, captions=3, steps=2
    )
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert (
        saved["shown"] == SHOWN and saved["seeds"] == [0, 1] and saved["loss"].keys() == result["loss"].keys()
    )
    assert {"base", "low expert", "high expert", "sum", "best constant", "both"} <= set(saved["loss"])
    assert saved["time"]["ratio"].keys() == {"base again", "peft", "eager MoLE", "ours"}
    for name in ("grid.png", "gate_maps.png"):
        Image.open(tmp_path / name).verify()
    page = (tmp_path / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 2 and not re.search(r'(src|href)="(?!data:)', page)
    assert all(Image.open(io.BytesIO(base64.b64decode(p))).size[0] > 600 for p in pictures)
    assert any("report.html" in line for line in lines)
