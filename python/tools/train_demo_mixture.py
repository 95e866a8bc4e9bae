"""Trains the experts and gates that `mole-kernels demo --quick` uses, on the shipped base.

    python python/tools/train_demo_mixture.py --assets mole_kernels/demo/assets            # about ten minutes
    on one core

The same stages as in the demo, with more steps; kept in half precision in mixture.safetensors.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mole_kernels.demo import data, model, stages
from mole_kernels.demo.run import MIXTURE
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.experts.lowrank import Expert
from mole_kernels.io import GateFile, GateTensors, save_bank
from mole_kernels.patching.apply import patch


def halved(expert: Expert) -> Expert:
    return replace(expert, layers={path: layer.to(torch.float16) for path, layer in expert.layers.items()})


def halved_gates(gates: GateFile) -> GateFile:
    layers = {
        path: GateTensors(**{k: t.half() for k, t in tensors.present().items()})
        for path, tensors in gates.layers.items()
    }
    return replace(gates, layers=layers)


def make_mixture(assets: Path, plan: stages.DigitTraining, seed: int) -> dict:
    """Stages 2 and 3; writes mixture.safetensors and adds to facts.json. Returns what was added."""
    pipe, experts, losses = model.load_pipeline(assets), {}, {}
    for half, name in enumerate(data.HALVES):
        expert, found = stages.train_digit_expert(pipe, half, plan, seed)
        # what ships is half precision, so the gates are trained on that
        experts[name] = halved(expert)
        losses[name] = [round(value, 5) for value in stages.ends(found)]
        print(name, losses[name], flush=True)
    bank = ExpertBank(experts)
    torch.manual_seed(seed)
    with patch(pipe, bank, gates="mole") as handle:
        found = stages.train_digit_gates(pipe, handle, "mole", stages.sharp_scenes(plan, seed), plan, seed)
        losses["gates"] = [round(value, 5) for value in stages.ends(found)]
        gates = handle.gates()
    print("gates", losses["gates"], flush=True)
    assert gates is not None
    save_bank(bank, assets / MIXTURE, halved_gates(gates))
    facts = {"mixture": asdict(plan) | {"seed": seed, "losses": losses}}
    model.write_facts(model.read_facts(assets) | facts, assets)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--longer", type=float, default=3.0, help="steps, as a multiple of the demo's own")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    plan = stages.DigitTraining()
    steps = {
        name: max(1, round(args.longer * getattr(plan, name))) for name in ("expert_steps", "gate_steps")
    }
    make_mixture(args.assets, replace(plan, **steps), args.seed)


if __name__ == "__main__":
    main()
