"""mkdocs hooks: benchmark pages from the results files, pages nobody listed, and no test comments in what is
shown.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
from docs_benchmarks import ROOT, pages

# what tests/docs reads before a block
_COMMENT = re.compile(r"<!--\s*(?:before|not run):.*?-->\s*\n", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[(?P<text>[^\[\]]+)\]\((?P<target>\.\.[^\s():]*)\)")
_BENCHMARKS = "Benchmarks"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The generated pages into their place, and pages below docs/ that the navigation lacks under "More":
    none is ever lost.
    """
    nav: list[Any] = config.nav or []
    listed = set(_paths(nav))
    docs = Path(config.docs_dir)
    more = [
        page for p in sorted(docs.rglob("*.md")) if (page := p.relative_to(docs).as_posix()) not in listed
    ]
    for entry in nav:
        if _BENCHMARKS in entry:
            entry[_BENCHMARKS] = [{page.title: page.path} for page in pages(ROOT)]
    if more:
        nav.append({"More": more})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for page in pages(ROOT):
        files.append(File.generated(config, page.path, content=page.text))
        for picture in page.pictures:
            files.append(File.generated(config, f"benchmarks/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, **_: object) -> str:
    """Without the tests' comments; links to files of the repository that are no pages become their names."""
    folder = (Path(config.docs_dir) / page.file.src_uri).parent

    def plain(match: re.Match[str]) -> str:
        target = (folder / match["target"].partition("#")[0]).resolve()
        outside = target.exists() and not target.is_relative_to(config.docs_dir)
        return match["text"] if outside else match[0]

    return _LINK.sub(plain, _COMMENT.sub("", markdown))


def _paths(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [path for one in inner for path in _paths(one)]
