"""A room imports only rooms below it; importing the package needs nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mole_kernels

PACKAGE = Path(mole_kernels.__file__).parent
# from the bottom up, as in docs/design.md section 2
ROOMS = [
    *"doors errors settings precision tally files problem operands reference extension kernels dispatch backends ops functional attention".split(),
    *"experts gates layers io modules text_cache grouping peft patching reports serving training metrics methods demo cli".split(),
]


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py")


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mole_kernels"):
            names = (
                [node.module]
                if node.module != "mole_kernels"
                else [f"mole_kernels.{alias.name}" for alias in node.names]
            )
            found |= {name.split(".")[1] for name in names if "." in name}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("mole_kernels.")
            }
    return found & {room_of(p) for p in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_downwards(path):
    room = room_of(path)
    assert room in ROOMS, f"{room} is no room of docs/design.md"
    above = {other for other in imports_of(path) if ROOMS.index(other) > ROOMS.index(room)}
    assert not above, f"{room} imports {', '.join(sorted(above))}, which lie above it"


PAPERS = {p.name for p in (PACKAGE / "methods").iterdir() if (p / "__init__.py").exists()}


def papers_of(path: Path) -> set[str]:
    """The rooms of papers that a file imports from."""
    modules = {
        node.module
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mole_kernels.methods")
    }
    return {module.split(".")[2] for module in modules if module.count(".") > 1} & PAPERS


# methods/__init__.py is the door to all of them
METHODS = sorted(set((PACKAGE / "methods").rglob("*.py")) - {PACKAGE / "methods" / "__init__.py"})


@pytest.mark.parametrize("path", METHODS, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_papers_do_not_import_one_another(path):
    own = path.relative_to(PACKAGE / "methods").parts[0]
    others = papers_of(path) - {own}
    assert not others, f"methods/{own} imports {', '.join(sorted(others))}: what they share lies in methods/"


HEAVY = "triton diffusers peft transformers accelerate sklearn matplotlib".split()


def test_import_is_light_and_the_names_are_there():
    program = (
        "import sys, mole_kernels as mk\n"
        "[getattr(mk, name) for name in mk.__all__ if name not in ('accelerate',)]\n"
        f"heavy = [m for m in {HEAVY!r} if m in sys.modules]\n"
        "libraries = open('/proc/self/maps').read() if sys.platform == 'linux' else ''\n"
        "print(heavy, 'mole_kernels/' in libraries and '.so' in libraries.split('mole_kernels/')[-1].split('\\n')[0])"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd="/", timeout=300
    )
    assert out.returncode == 0, out.stderr
    assert out.stdout.split("\n")[0] == "[] False"


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'pacth'"):
        _ = mole_kernels.pacth
    assert set(mole_kernels.__all__) <= set(dir(mole_kernels))
