"""Meet every bad input and write what happened into docs/robustness.md: python python/tools/robustness.py"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["ACCELERATE_USE_CPU"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

from tests import test_trust  # noqa: E402
from tests.robustness import silence, table  # noqa: E402
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
SILENT = """
## Kinds of faults that were wrong in silence

Found by people's stories, files and suites of other projects; each kind is held by tests of the whole kind.

| kind | what happens now | tests |
|---|---|---|
"""
COSTS = """
## What hostile sizes cost

`mole-kernels inspect` in a process that has read a good file before: bytes it reads (`/proc/self/io`), memory at its peak above where it
began, CPU time of one run of `make robustness`. `tests/test_trust.py` holds the bytes and the memory, not the time.

| file | says | bytes read | peak of memory | CPU time |
|---|---|---|---|---|
"""
BEYOND = """
## Beyond the list

- Files of every tool: `tests/io/test_every_spelling.py` draws one LoRA in random prefixes, endings, adapter names and alphas, own names and
  those of the model's code, whole or layer by layer: the same ΔW on the same layers, or a refusal; `tests/io/test_strength.py` holds random
  PEFT settings to what PEFT itself computes, and every door to the same strength; `tests/io/test_accounting.py` puts 32 endings that are no
  plain LoRA's, and random ones, beside layers of every dialect: none vanishes. `tests/files/test_words.py` cuts files anywhere, fails disks
  at every read, and follows the links of the hub's cache; `tests/experts/test_checks.py` puts NaN into experts in memory at every door.
- `tests/fuzz`: every reader of strangers' bytes (headers, keys, gate files, PEFT's settings, the single file, indexes, regions as text and
  JSON, fusion lists, tables, DiffLoRA's layouts and models, SELMA's answers, skills and questions, captions) meets a corpus and counted
  mutations of it under atheris: a result or one printable `MoleError`, bounded memory, no hang, and what is written of what was read is
  read as the same. What was found stays in the corpus as `found-…`. `make fuzz` goes on for a minute, or `SECONDS=600`.
- `tests/fuzz/test_sweep.py` and `test_machine.py`: patch, set_scales, swap, enable, disable, fold, unfold, save, load, accelerate and
  remove with a full memory at a tensor operation, a full disk at a call for a file or Ctrl-C between two lines: the model, the handle and
  the files are bit for bit as before. Ctrl-C on the way out of a change that is complete leaves it complete; `patch` and `accelerate`
  take it back.
  `make fuzz` takes every moment, a test run every ninth operation and every 41st line.
- `tests/robustness/test_killed.py`: kill -9 before every call that opens, writes, syncs, renames or removes a file (of training every
  third) in a save, a merge, training, packing shards, filling a cache, two of SELMA's stages and the saving of a fusion: the last good
  state loads, and the work can be done again. A full disk (RLIMIT_FSIZE, and a tmpfs where one can be
  mounted) is named and leaves what was there.
"""
NOT_YET = """
## Not built, and so refused by name

- Quantised layers (72) take no experts on their own; PEFT's quantised layers are left to PEFT by `accelerate`.
- DoRA, LoKr, LoHa and bias keys (48; all names in dialects.md), grouped convolutions, and sub-byte or integer weights (44, 45).
- A swap from another thread waits for the forwards that run (74), but not inside `torch.compile` of the whole model, nor for layers called
  on their own; a swap out of a hook happens there and then, each layer wholly old or wholly new.
- An unsupported GPU (62) is held with a backend that refuses, not with such a GPU.
"""


def meet(case: Case) -> str:
    """Run one case in an empty folder; its outcome."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patches:
        return case.run(Ground(Path(folder), patches))


def cost(size: str, found: dict[str, Any]) -> str:
    said = f"`{found['said']}`" if found["said"] else "sizes and ranks"
    return f"| {size} | {said} | {found['read']:,} | {found['peak'] / 1e6:.1f} MB | {1000 * found['cpu_s']:.0f} ms |"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows = {case.number: table.row(case, meet(case)) for case in table.shown()}
    inputs = [row for number, row in rows.items() if not number.startswith("P")]
    peers = [row for number, row in rows.items() if number.startswith("P")]
    with tempfile.TemporaryDirectory() as folder:
        costs = [cost(size, found) for size, found in test_trust.measured(Path(folder)).items()]
    text = "\n".join(
        [
            HEAD + FIRST + "\n".join(inputs),
            PEERS + "\n".join(peers),
            SILENT + "\n".join(silence.rows()),
            COSTS + "\n".join(costs),
            BEYOND + NOT_YET,
        ]
    )
    table.DOC.write_text(text)
    print(
        f"{len(inputs)} bad inputs and {len(peers)} faults of peers: {table.DOC.relative_to(ROOT)}; {len(table.CASES)} cases in all"
    )


if __name__ == "__main__":
    main()
