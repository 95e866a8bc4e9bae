"""Two processes under `accelerate launch` take the steps of one process with twice the accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mole_kernels.training.checkpoint import list_checkpoints, load_latest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import launched  # noqa: E402


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path):
    # with ACCELERATE_USE_CPU, --multi_gpu only means: one process each, talking through gloo
    options = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(HERE / "launched.py"), str(tmp_path)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert ranks[0]["world"] == 2 and ranks[0]["losses"] == ranks[1]["losses"]
    model, result = launched.train(tmp_path / "one", 2, 5, resume=False)
    assert ranks[0]["losses"] == pytest.approx(result.losses, rel=1e-5)
    for key, wanted in model.state_dict().items():
        assert torch.equal(ranks[0]["weights"][key], ranks[1]["weights"][key])
        torch.testing.assert_close(ranks[0]["weights"][key], wanted)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [4, 5]
    assert len(load_latest(tmp_path / "run").rng) == 2
