"""Every name of the package keeps to docs/words.md, and public names are unique."""

import ast
from pathlib import Path

from python.tools import words

PACKAGE = Path(words.PACKAGE)
FILES = sorted(PACKAGE.rglob("*.py"))


def test_the_table_is_read():
    assert words.forbidden() >= {"turns", "looking", "reject", "refusal"}


def test_no_name_is_one_that_the_table_rules_out():
    assert [line for path in FILES for line in words.offences(path)] == []


def test_no_public_name_is_defined_in_two_files():
    assert list(words.duplicates(FILES)) == []


def test_a_name_that_is_ruled_out_is_seen(tmp_path):
    assert [name for _, name, _ in words.names(ast.parse("def reject(made): found = 1"))] == [
        "reject",
        "made",
        "found",
    ]
