"""Meet every bad input and write what happened into docs/robustness.md: python python/tools/robustness.py"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["ACCELERATE_USE_CPU"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.robustness import table  # noqa: E402
from tests.robustness.cases import Case, Ground  # noqa: E402

HEAD = """# What bad input meets

Made by `make robustness`, which runs the first test of every number and writes down what came; do not edit.
`tests/robustness/test_cases.py` runs all of them, compares its outcomes with these lines, and fails where a number has no test.

Every refusal is one `MoleError` that names the file, key or argument, what was expected and what came. After each, the model is
compared with what it was before: the tensors of its state dict (the same objects, the same bits), `requires_grad`, classes, attributes,
hooks, and the bits of its output. Bad files and tensors are given both to `patch` on a plain model and to `Handle.swap` on a patched one.
Where Python or torch itself raises (Ctrl-C, memory), that exception passes through, and the same holds. `…` is the file's folder, or a cut.
"""
FIRST = "\n## Bad inputs\n\n| | bad input | what happens | tests |\n|---|---|---|---|\n"
PEERS = """
## Faults known from other packages

Each could have been ours.

| | fault | here | tests |
|---|---|---|---|
"""
NOT_YET = """
## Not built, and so refused by name

- Quantised layers (72) take no experts on their own; PEFT's quantised layers are left to PEFT by `accelerate`.
- DoRA, LoKr, LoHa and bias keys (48; all names in dialects.md), grouped convolutions, and sub-byte or integer tensors (44, 45).
- A swap from another thread in the middle of a layer (74) is not guarded: tensors of at most the packed rank are written in place, so the
  caller must hold its own lock. Between layers every layer is wholly old or wholly new.
- An unsupported GPU (62) is held with a backend that refuses, not with such a GPU.
"""


def meet(case: Case) -> str:
    """Run one case in an empty folder; its outcome."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patches:
        return case.run(Ground(Path(folder), patches))


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {case.number: table.row(case, meet(case)) for case in table.shown()}
    inputs = [row for number, row in rows.items() if not number.startswith("P")]
    peers = [row for number, row in rows.items() if number.startswith("P")]
    text = HEAD + FIRST + "\n".join(inputs) + "\n" + PEERS + "\n".join(peers) + "\n" + NOT_YET
    table.DOC.write_text(text)
    print(f"{len(inputs)} bad inputs and {len(peers)} faults of peers: {table.DOC.relative_to(ROOT)}; {len(table.CASES)} cases in all")


if __name__ == "__main__":
    main()
