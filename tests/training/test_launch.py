"""Two processes under `accelerate launch` take the steps of one process with twice the accumulation."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_kernels.training.checkpoint import list_checkpoints, load_latest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import launched  # noqa: E402


@pytest.mark.slow
def test_two_processes_equal_one_with_twice_the_accumulation(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(5):
        Image.new("RGB", (16, 16), (50 * i, 90, 200 - 40 * i)).save(tmp_path / "set" / f"{i}.png")
        (tmp_path / "set" / f"{i}.txt").write_text("one two three four five".split()[i])
    # with ACCELERATE_USE_CPU, --multi_gpu only means: one process each, talking through gloo
    options = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no --dynamo_backend no"
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", *options.split()]
    paths = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(HERE / "launched.py"), str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
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
    # experts and gates of a UNet; each process has encoded its share of the pictures
    shards = sorted(path.name for path in (tmp_path / "cache").rglob("latents*/*"))
    assert [name.split("-")[1] for name in shards] == ["000", "001"]
    wanted = launched.experts_and_gates(tmp_path / "set", tmp_path / "cache", 2)
    assert len(list((tmp_path / "cache").rglob("latents*/*"))) == 2
    assert ranks[0]["mole"][2] == pytest.approx(wanted[2], rel=1e-5)
    for found, right in zip(ranks[0]["mole"][:2], wanted[:2]):
        assert len(found) == len(right) > 10
        # AdamW's first steps divide by the gradient's own size, where a rounding of a tiny one counts
        off = torch.cat([(a - b).flatten() for a, b in zip(found, right)])
        assert off.norm() < 1e-3 * torch.cat([b.flatten() for b in right]).norm()
    for found, right in zip(ranks[0]["mole"], ranks[1]["mole"]):
        assert all((a == b) if isinstance(a, float) else torch.equal(a, b) for a, b in zip(found, right))
