"""The operator as a repository for the `kernels` package: python python/tools/hf_kernels.py [--out build/hf]
[--repo OWNER/NAME]

    build.toml, torch-ext/mole_kernels/      what kernel-builder reads
    build/torch-cpu/, build/torch-cuda/      what `get_local_kernel` and `LocalLayerRepository` load

Both hold the same Python: what `functional.py` imports and nothing above it (no PEFT, no diffusers), with
relative imports, and its ops
in a namespace that is this content's own, so that several versions and the installed package live in one
process. The compiled library
is left out: its ops have fixed names, which the kernels package does not allow.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "mole_kernels"
NAME = "mole-kernels"
# raised whenever a public name is added or changes; the kernels package keeps a branch for each
VERSION = 1
EXPORTS = {
    "functional": ["gated_lora_linear", "gated_lora_linear_with_gates"],
    "operands": ["Experts", "Gates"],
    "errors": ["MoleError"],
}
BACKENDS = ("cpu", "cuda")
# found by their folder, not by an import
DATA = ("dispatch/tables/*.json",)
_COMPILED = ('COMPILED = {"cpu": "cpu", "cuda": "triton"}', 'COMPILED = {"cuda": "triton"}')
_IMPORT = re.compile(r"^(\s*)from mole_kernels(?:\.(\S+))? import ", re.MULTILINE)


def modules(roots: list[str]) -> dict[str, Path]:
    """module below the package -> its file, for everything the roots import, packages' own __init__
    included.
    """
    found: dict[str, Path] = {}
    todo = list(roots)
    while todo:
        name = todo.pop()
        path = _file(name)
        if name in found or path is None:
            continue
        found[name] = path
        if "." in name:
            todo.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == PACKAGE:
                below = node.module.partition(".")[2]
                todo += [below] if below else []
                todo += [f"{below}.{alias.name}".lstrip(".") for alias in node.names]
    return found


def _file(name: str) -> Path | None:
    base = ROOT / PACKAGE / name.replace(".", "/")
    return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.exists()), None)


def relative(text: str, depth: int) -> str:
    """Imports of the package as relative ones, for a file `depth` folders below it."""
    return _IMPORT.sub(lambda m: f"{m[1]}from {'.' * (depth + 1)}{m[2] or ''} import ", text)


def own_namespace(text: str, depth: int) -> str:
    """The ops under the names that `_ops.py` gives them."""
    found = text.replace('Library("mole", ', 'Library(add_op_namespace_prefix("").removesuffix("::"), ')
    found = re.sub(r"(?<!`)torch\.ops\.mole\.", "ops.", found)
    found = re.sub(r'"mole::(\w+)"', r'add_op_namespace_prefix("\1")', found)
    if found == text:
        return text
    # after the future import and the modules of others, before our own
    first = re.search(r"^from \.", found, re.MULTILINE)
    at = first.start() if first else len(found)
    return f"{found[:at]}from {'.' * (depth + 1)}_ops import add_op_namespace_prefix, ops\n{found[at:]}"


def sources() -> dict[str, str]:
    """Path inside the kernel -> text, `_ops.py` and metadata aside."""
    made = {"layers.py": relative((ROOT / "python/tools/hub/layers.py").read_text(encoding="utf-8"), 0)}
    for path in modules(list(EXPORTS)).values():
        inside = path.relative_to(ROOT / PACKAGE)
        depth = len(inside.parts) - 1
        made[inside.as_posix()] = own_namespace(relative(path.read_text(encoding="utf-8"), depth), depth)
    # there is no compiled backend of the CPU here whose absence would be worth a warning
    assert _COMPILED[0] in made["backends/select.py"]
    made["backends/select.py"] = made["backends/select.py"].replace(*_COMPILED)
    for pattern in DATA:
        for path in sorted((ROOT / PACKAGE).glob(pattern)):
            made[path.relative_to(ROOT / PACKAGE).as_posix()] = path.read_text(encoding="utf-8")
    reason = {"built": False, "reason": "a kernel from the hub holds Triton and plain torch alone"}
    made["libmole_kernels.json"] = json.dumps(reason) + "\n"
    names = [name for every in EXPORTS.values() for name in every]
    imports = [f"from .{module} import {', '.join(every)}" for module, every in EXPORTS.items()]
    title = '"""Linear layers with mixtures of low-rank experts: y = x Wᵀ + b + Σ_e s_e·g_e·(x A_eᵀ) B_eᵀ."""'
    made["__init__.py"] = "\n".join(
        [title, "", "from . import layers", *imports, "", f"__all__ = {[*names, 'layers']!r}", ""]
    )
    return dict(sorted(made.items()))


def identifier(made: dict[str, str]) -> str:
    """Of this content: the name of its module and of its ops' namespace."""
    digest = hashlib.sha256("".join(f"{path}\0{text}\0" for path, text in made.items()).encode()).hexdigest()
    return f"{PACKAGE}_{digest[:12]}"


def ops_file(namespace: str) -> str:
    return (
        f"import torch\n\nops = torch.ops.{namespace}\n\n\n"
        f'def add_op_namespace_prefix(op_name: str) -> str:\n    """The op\'s name in this kernel\'s namespace."""\n'
        f'    return f"{namespace}::{{op_name}}"\n'
    )


def build_toml(repo: str | None) -> str:
    hub = f'\n[general.hub]\nrepo-id = "{repo}"\n' if repo else ""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    general = f'[general]\nname = "{NAME}"\nversion = {VERSION}\nlicense = "Apache-2.0"\nbackends = [{backends}]\nedition = 5\n'
    return f"{general}{hub}\n[torch-noarch]\n"


def assemble(out: Path, repo: str | None = None) -> Path:
    """Write the whole repository into an empty or earlier `out`; returns it."""
    made = sources()
    name = identifier(made)
    shutil.rmtree(out, ignore_errors=True)
    _write(
        out,
        {
            "build.toml": build_toml(repo),
            "README.md": (ROOT / "python/tools/hub/README.md").read_text(encoding="utf-8"),
        },
    )
    _write(out, {"LICENSE": (ROOT / "LICENSE").read_text(encoding="utf-8")})
    # kernel-builder writes _ops.py itself
    _write(out / "torch-ext" / PACKAGE, made)
    for backend in BACKENDS:
        about = {
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        # a module for each variant, one namespace for all: only one of them is loaded
        metadata = json.dumps({"id": f"{name}_{backend}", **about}, indent=1) + "\n"
        _write(
            out / "build" / f"torch-{backend}",
            {**made, "_ops.py": ops_file(f"{name}_{backend}"), "metadata.json": metadata},
        )
    return out


def _write(folder: Path, texts: dict[str, str]) -> None:
    for path, text in texts.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build/hf/mole-kernels")
    parser.add_argument("--repo", help="OWNER/NAME on the hub, for kernel-builder's upload")
    given = parser.parse_args()
    print(assemble(given.out, given.repo))
