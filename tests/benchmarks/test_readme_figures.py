"""Every figure of speed in README comes out of a result file in the repository."""

import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
FOLDER = ROOT / "benchmarks/results/amd-epyc-family-25-model-17-avx512bf16"


def newest(suite: str) -> dict:
    """The newest result of a suite; "" is the suite of single layers."""
    pattern = re.compile(rf"\d{{4}}-\d\d-\d\d{'-' + suite if suite else ''}\.json")
    files = sorted(path for path in FOLDER.iterdir() if pattern.fullmatch(path.name))
    assert len(files) == 1, (
        f"{suite or 'layers'}: superseded results are to be removed, {[f.name for f in files]}"
    )
    return json.loads(files[0].read_text())


def geometric(values) -> float:
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


@pytest.mark.parametrize("dtype, word", [("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_table_of_layers(dtype, word):
    cases = [c for c in newest("")["cases"] if c["mode"] == "forward" and c["dtype"] == dtype]
    figures = [geometric(c["flop_ratio"] for c in cases if c["method"] == "ours")]
    figures += [
        geometric(c["ratio"]["plain"] for c in cases if c["method"] == m)
        for m in ("ours", "stacked", "peft", "eager")
    ]
    (row,) = re.findall(rf"^\| {word} \|(.*)\|$", README, re.M)
    assert [cell.strip(" *") for cell in row.split("|")] == [f"{figure:.2f}" for figure in figures]
    count = sum(c["method"] == "ours" for c in cases)
    assert f"over {count} layer shapes" in README


def test_a_training_step():
    cases = [c for c in newest("training")["cases"] if c["stage"] == "gates" and c["dtype"] == "fp32"]
    eager, peft = (
        geometric(c["ratio"]["ours"] for c in cases if c["method"] == m) for m in ("eager", "peft")
    )
    assert f"1 ÷ {eager:.2f} of the eager MoLE layer's time and 1 ÷ {peft:.2f} of PEFT's" in " ".join(
        README.split()
    )


def test_serving():
    cases = newest("serving")["cases"]
    medians = sorted(c["own_to_shared"][1] for c in cases)
    median = (medians[len(medians) // 2] + medians[(len(medians) - 1) // 2]) / 2
    assert f"median {median:.2f}" in README
    eight = [c["over_base"] for c in cases if c["B"] == 8]
    # where the adapted layer is not slower than the plain one, PEFT's share of it is no finite factor
    least = min(c["peft"] / c["own"] for c in eight if c["own"] > 0)
    assert f"at least {math.floor(least * 10) / 10} times less" in README


def test_regions():
    apart = [c["ratio"][1] for c in newest("regional")["cases"] if c["queries"] == 1]
    assert f"four regions cost {min(apart):.2f} to {max(apart):.2f} of plain cross-attention" in " ".join(
        README.split()
    )


def test_what_was_measured_from_a_changed_tree_is_said():
    dirty = [suite for suite in ("", "training", "serving", "regional") if newest(suite)["dirty"]]
    assert ("uncommitted changes" in README) == bool(dirty)


def test_no_speed_stands_in_readme_without_a_result_file():
    """ "87 times faster", "1.4 times": each is one of those that are tested above."""
    tested = {"8.7 times less"}
    assert set(re.findall(r"\d[\d.]* times (?:faster|less|slower|more)", README)) <= tested


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda p: p.name)
def test_a_result_file_names_its_commit_and_machine(path):
    result = json.loads(path.read_text())
    assert (
        re.fullmatch(r"[0-9a-f]{7,40}", result["commit"])
        and result["host"]
        and isinstance(result["dirty"], bool)
    )
