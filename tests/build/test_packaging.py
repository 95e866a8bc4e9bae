"""The wheel's tag, its contents and its bill of materials, on made-up wheels; make wheel does it on the real
one.
"""

import hashlib
import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python/tools"))
import sbom  # noqa: E402
import wheels as tool  # noqa: E402

METADATA = """Metadata-Version: 2.4
Name: mole-kernels
Version: 9.8.7
License-Expression: Apache-2.0
Requires-Dist: torch<2.14,>=2.11
Requires-Dist: rich
Requires-Dist: peft>=0.18; extra == "diffusers"
Requires-Dist: torch; extra == "train"
Requires-Dist: mole-kernels[diffusers]; extra == "train"
Requires-Dist: triton>=3.6; sys_platform == "linux" and extra == "triton"
"""


def make_wheel(folder, name="mole_kernels-9.8.7-py3-none-manylinux_2_34_x86_64.whl", cuda="9.0", library=b"\x7fELF .nv_fatbin", **more):
    files = {
        "mole_kernels/__init__.py": b"",
        "mole_kernels/demo/assets/unet.safetensors": b"",
        "mole_kernels/libmole_kernels.so": library,
        "mole_kernels/libmole_kernels.json": json.dumps({"built": True, "cuda": cuda}).encode(),
        "mole_kernels-9.8.7.dist-info/METADATA": METADATA.encode(),
    }
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        for inside, content in (files | {k.replace("__", "/"): v for k, v in more.items()}).items():
            archive.writestr(inside, content)
    return path


def shown(**changes):
    found = {"sym_tag": "manylinux_2_34_x86_64", "external_libs": {"libtorch.so": None, "libtorch_cpu.so": None}, "unsupported_isa": False}
    return found | changes


def test_the_tag_is_what_the_symbols_allow():
    assert tool.system_tag(shown()) == "manylinux_2_34_x86_64"
    assert tool.system_tag(shown(sym_tag="manylinux_2_28_aarch64")) == "manylinux_2_28_aarch64"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sym_tag": "manylinux_2_41_x86_64"}, "older system"),
        ({"sym_tag": "linux_x86_64"}, "older system"),
        ({"external_libs": {"libtorch.so": None, "libcudart.so.13": None}}, "libcudart"),
        ({"unsupported_isa": True}, "newer processors"),
    ],
)
def test_a_library_that_would_not_load_elsewhere_is_refused(changes, words):
    with pytest.raises(SystemExit, match=words):
        tool.system_tag(shown(**changes))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "mole_kernels-9.8.7-cp311-cp311-linux_x86_64.whl"}, "py3-none"),
        ({"library": b"\x7fELF"}, "holds none"),
        ({"tests__test_x.py": b""}, "tests/test_x.py"),
        ({"library": b"\x7fELF .nv_fatbin " + str(ROOT).encode()}, "folders of this machine"),
    ],
)
def test_a_wrong_wheel_is_named(change, words, tmp_path):
    tool.check_wheel(make_wheel(tmp_path))
    with pytest.raises(SystemExit, match=words):
        tool.check_wheel(make_wheel(tmp_path, **change))


def test_bill_of_materials(tmp_path):
    wheel = make_wheel(tmp_path)
    made = sbom.bom(wheel, "13.0.88")
    assert (made["bomFormat"], made["specVersion"]) == ("CycloneDX", "1.6") and re.match(r"urn:uuid:[0-9a-f-]{36}$", made["serialNumber"])
    component = made["metadata"]["component"]
    assert component["purl"] == "pkg:pypi/mole-kernels@9.8.7" and component["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert component["hashes"][0]["content"] == hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert {"name": "mole:vendored-source", "value": "none"} in component["properties"]
    scopes = {c["name"]: c.get("scope") for c in made["components"]}
    assert scopes == {"libcudart_static": None, "torch": "required", "rich": "required", "peft": "optional", "triton": "optional"}
    assert made["components"][0]["version"] == "13.0.88"
    refs = [c["bom-ref"] for c in made["components"]]
    assert made["dependencies"] == [{"ref": component["bom-ref"], "dependsOn": refs}] and len(set(refs)) == len(refs)
    assert made == sbom.bom(wheel, "13.0.88")


def test_without_cuda_nothing_is_linked_in(tmp_path):
    made = sbom.bom(make_wheel(tmp_path, cuda=""), None)
    assert "libcudart_static" not in {c["name"] for c in made["components"]}


def test_no_source_of_others_is_in_the_repository():
    """What the bill of materials states: no other project's copyright line in anything that is packaged."""
    for folder in ("mole_kernels", "csrc", "python"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".h", ".cpp", ".cu"):
                assert not re.search(r"copyright \(c\)|SPDX-FileCopyrightText", path.read_text(encoding="utf-8"), re.IGNORECASE), path


def test_the_version_is_in_one_place():
    import mole_kernels

    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "version" in project["project"]["dynamic"] and "version" not in project["project"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mole_kernels.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", mole_kernels.__version__)


def test_a_newer_torch_stays():
    """An upper bound made pip replace a newer torch by an older one, gigabytes of it, before anything was said."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    text = (ROOT / "pyproject.toml").read_text()
    (line,) = re.findall(r'^    "(torch[^"]*)",$', text, re.M)
    torch = Requirement(line)
    assert all(torch.specifier.contains(v) for v in ("2.11.0", "2.13.0", "2.14.1", "2.99", "3.0"))
    assert not torch.specifier.contains("2.10.1") and Version("2.11") in torch.specifier
