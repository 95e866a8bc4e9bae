"""The assembled repository is what the kernels package takes: valid, alone, and computing the same under
`kernelize`.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

kernels = pytest.importorskip("kernels")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python/tools"))
import hf_kernels  # noqa: E402


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    return hf_kernels.assemble(tmp_path_factory.mktemp("hub") / hf_kernels.NAME, "someone/mole-kernels")


@pytest.fixture(scope="module")
def said(repository, tmp_path_factory):
    """What a process says that has the repository, and another version of it, and nothing of ours."""
    other = tmp_path_factory.mktemp("other") / hf_kernels.NAME
    hf_kernels.assemble(other)
    for path in (other / "build").rglob("*"):
        if path.name in ("_ops.py", "metadata.json"):
            path.write_text(path.read_text().replace(hf_kernels.identifier(hf_kernels.sources()), "mole_kernels_other"))
    run = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mole_kernels", str(ROOT / "tests/build/hf_kernel_run.py"), str(repository), str(other)],
        cwd=repository,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_kernelized_layer_computes_the_same(said):
    assert said["own_calls"] == 0
    assert said["error"] < 1e-5 and said["gradients"] < 1e-5 and said["compiled"] < 1e-5


def test_two_versions_live_in_one_process(said):
    assert said["second"] < 1e-5 and len(set(said["modules"])) == 2 and len(set(said["ops"])) == 2
    assert all(name.startswith("mole_kernels_") for name in said["ops"])


def test_nothing_above_the_kernels_is_imported(said, repository):
    assert said["ours"] == []
    allowed = {"torch", "triton", "numpy"} | sys.stdlib_module_names
    for path in (repository / "build").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_every_module_imports_also_the_triton_kernels(said):
    assert len(said["imported"]) > 30 and any(name.endswith(".kernels.triton.fused") for name in said["imported"])


def test_build_toml_is_valid_and_metadata_complete(repository):
    from kernels._rust import Build, Metadata

    assert {str(b) for b in Build.open(repository).general.backends} == set(hf_kernels.BACKENDS)
    ids = set()
    for backend in hf_kernels.BACKENDS:
        about = Metadata.read_from_file(repository / "build" / f"torch-{backend}" / "metadata.json")
        assert str(about.name) == hf_kernels.NAME and about.version == hf_kernels.VERSION and about.license == "Apache-2.0"
        assert about.python_depends == [] and about.id.isidentifier()
        ids.add(about.id)
    assert len(ids) == len(hf_kernels.BACKENDS)


def test_names_change_with_the_content():
    made = hf_kernels.sources()
    assert hf_kernels.identifier(made) == hf_kernels.identifier(dict(made))
    assert hf_kernels.identifier(made) != hf_kernels.identifier(made | {"errors.py": made["errors.py"] + "\n"})


def test_what_is_rewritten():
    text = (
        'from mole_kernels import settings\n\nlib = Library("mole", "DEF")\nf = torch.ops.mole.f\n'
        'register("mole::f")  # `torch.ops.mole.f`\n'
    )
    assert hf_kernels.own_namespace(hf_kernels.relative(text, 1), 1) == (
        "from .._ops import add_op_namespace_prefix, ops\nfrom .. import settings\n\n"
        'lib = Library(add_op_namespace_prefix("").removesuffix("::"), "DEF")\nf = ops.f\n'
        'register(add_op_namespace_prefix("f"))  # `torch.ops.mole.f`\n'
    )
