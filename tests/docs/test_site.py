"""The site builds without a warning, every link in it leads somewhere, and nothing of the tests shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.docs.blocks import ROOT

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings_handlers.python")
sys.path.insert(0, str(ROOT / "python/tools"))


class Links(HTMLParser):
    """The ids of a page, and where its links and pictures lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name in ("href", "src") and value:
                self.targets.append(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--site-dir",
        str(folder),
        "--config-file",
        str(ROOT / "mkdocs.yml"),
    ]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stderr
    return folder


def test_every_link_and_anchor_is_there(site):
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.targets:
            parts = urlsplit(link)
            # 404.html is served from anywhere and so links from the root
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (
                parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].ids
            ):
                broken.append(f"{path.relative_to(site)} -> {link}")
    assert len(pages) > 40 and broken == []


def test_nothing_is_fetched_from_elsewhere(site):
    for path in site.rglob("*.html"):
        targets = [
            t
            for t in Links(path.read_text(encoding="utf-8")).targets
            if t.endswith((".js", ".css", ".woff2"))
        ]
        assert targets and not [t for t in targets if urlsplit(t).netloc], path


def test_every_page_and_every_results_file_is_shown(site):
    shown = {path.relative_to(site).with_suffix("").as_posix() for path in site.rglob("*.html")}
    pages = {
        path.relative_to(ROOT / "docs").with_suffix("").as_posix().replace("README", "index")
        for path in (ROOT / "docs").rglob("*.md")
    }
    assert pages <= shown
    for results in (ROOT / "benchmarks/results").rglob("*.json"):
        assert f"benchmarks/{results.parent.name}-{results.stem}" in shown


def test_comments_for_the_tests_do_not_show(site):
    text = (site / "howto/compile.html").read_text(encoding="utf-8")
    assert "Compile" in text and "before:" not in text and "world." not in text


def test_the_api_comes_from_the_docstrings(site):
    from mole_kernels.patching.apply import patch

    text = (site / "api/pipelines.html").read_text(encoding="utf-8")
    assert (patch.__doc__ or "none").splitlines()[0] in text and "allow_large_rank" in text


def test_docstrings_keep_their_tables():
    from docs_docstrings import shown

    assert shown("y = x <a>.\n\nx    [B,T]  floats\ngate [E]\nRaises E.\n\n    f(x)") == (
        "y = x &lt;a>.\n\n```text\nx    [B,T]  floats\n```\n\ngate [E]\nRaises E.\n\n```text\n    f(x)\n```"
    )


def test_rows_of_any_shape_become_columns():
    from docs_benchmarks import columns

    result = {
        "host": "a CPU",
        "cases": [{"id": "one", "us": {"ours": [1.0, 2.0, 3.5]}}, {"id": "two", "err": 1.23456e-7}],
    }
    text = columns(json.loads(json.dumps(result)))
    assert (
        "| id | us: ours | err |" in text
        and "| one | 2 (1 to 3.5) | – |" in text
        and "| two | – | 1.235e-07 |" in text
    )
