"""Every python block of the README and the documentation runs, page by page, on tiny models of the real
classes.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
from tests.docs import world
from tests.docs.blocks import ROOT, blocks, pages

# needs weights from the hub, a GPU, or is no program; grows only with a reason on the page itself
MOST_NOT_RUN = 8


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_page_runs(page: Path, tmp_path, monkeypatch):
    text = page.read_text(encoding="utf-8")
    todo = [block for block in blocks(text) if not block.not_run]
    if not todo:
        return
    monkeypatch.chdir(tmp_path)
    world.briefly(monkeypatch)
    first = "flux" if "flux()" in text else "pipeline"
    pipe = getattr(world, first)()
    world.write_files("\n".join(block.before + block.code for block in todo), pipe)
    names = {
        "Path": Path,
        "mk": world.mk,
        "torch": world.torch,
        "world": world,
        "pipe": pipe,
        "prompt": "a cat",
        "gates": "mole",
    }
    names["experts"] = {"face": world.expert(pipe, 0), "hand": world.expert(pipe, 1)}
    for block in todo:
        exec(compile(block.before, f"{page.name}, before line {block.line}", "exec"), names)
        # as many line feeds as lines before it: a traceback then names the page's own line
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)


def test_few_blocks_are_not_run_and_all_say_why():
    left = [
        (page.name, block)
        for page in pages()
        for block in blocks(page.read_text(encoding="utf-8"))
        if block.not_run
    ]
    assert all(len(block.not_run) > 10 for _, block in left)
    assert len(left) <= MOST_NOT_RUN, [f"{page}:{block.line}" for page, block in left]


def test_blocks_are_read_with_their_comments():
    text = "a\n\n<!-- before: x = 1 -->\n```python\ny = x\n```\n\n<!-- not run: needs a GPU -->\n\n```python\nz\n```\n\n```text\nno\n```\n"
    first, second = blocks(text)
    assert (first.code, first.line, first.before, first.not_run) == ("y = x\n", 5, "x = 1", "")
    assert (second.code, second.line, second.not_run) == ("z\n", 11, "needs a GPU")
