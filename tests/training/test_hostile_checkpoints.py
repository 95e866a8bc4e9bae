"""Checkpoints that another program, a full disk or a stranger has changed: words, and the run as it was."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mole_kernels.errors import MoleError, MoleWarning
from mole_kernels.training.checkpoint import list_checkpoints
from mole_kernels.training.config import TrainConfig
from mole_kernels.training.data import TensorBatches
from mole_kernels.training.loop import fit

CONFIG = TrainConfig(steps=2, ema_decay=0.5, mixed_precision="no")
OTHER = st.none() | st.booleans() | st.integers(-1, 5) | st.text(max_size=3) | st.just([]) | st.just({})


def fitted(run_dir, resume=False):
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    batches = TensorBatches({"x": torch.ones(4, 3)}, 2)
    result = fit(
        model,
        [model.weight],
        batches,
        CONFIG,
        loss_fn=lambda model, batch, _: model(batch["x"]).square().mean(),
        run_dir=run_dir,
        resume=resume,
        progress=False,
    )
    return model, result


def paths(value, path=()):
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*path, key))


def replaced(value, path, new):
    return new if not path else {**value, path[0]: replaced(value[path[0]], path[1:], new)}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.filterwarnings("ignore::mole_kernels.errors.MoleWarning")
def test_a_changed_checkpoint_gets_words_or_resumes(tmp_path_factory, data):
    run_dir = tmp_path_factory.mktemp("run")
    whole, result = fitted(run_dir)
    ((_, folder),) = list_checkpoints(run_dir)
    name = data.draw(st.sampled_from(["run.json", "optimiser.pt", "weights.safetensors", "ema.safetensors"]))
    file = folder / name
    if name == "run.json":
        content = json.loads(file.read_text())
        changed = replaced(content, data.draw(st.sampled_from(list(paths(content)))), data.draw(OTHER))
        file.write_text(json.dumps(changed))
    elif name == "optimiser.pt" and data.draw(st.booleans()):
        state = torch.load(file, weights_only=True)
        place = data.draw(st.sampled_from([path for path in paths(state) if "optimiser" not in path[:1]]))
        torch.save(replaced(state, place, data.draw(OTHER)), file)
    else:
        content = file.read_bytes()
        file.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        resumed, again = fitted(run_dir, resume=True)
    except MoleError as error:
        assert "checkpoint" in str(error) or "resume" in str(error)
    else:
        assert torch.equal(resumed.weight, whole.weight) and again.steps == result.steps


def test_an_older_checkpoint_is_named_with_its_format(tmp_path):
    fitted(tmp_path)
    ((_, folder),) = list_checkpoints(tmp_path)
    about = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(about | {"format": "mole-kernels-run-1"}))
    with (
        pytest.raises(MoleError, match="none of its 1"),
        pytest.warns(MoleWarning, match="mole-kernels-run-1"),
    ):
        fitted(tmp_path, resume=True)
