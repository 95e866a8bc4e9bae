"""What is in a wheel and what it asks for, as CycloneDX 1.6: python python/tools/sbom.py [--dist dist] writes
WHEEL.cdx.json beside it.

No source of others is copied into this package. What a wheel with CUDA does hold of others is NVIDIA's static
runtime, linked by nvcc.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import uuid
import zipfile
from email.parser import Parser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_REQUIREMENT = re.compile(
    r"^(?P<name>[\w.-]+)(?P<extras>\[[^\]]*\])?\s*(?P<range>[^;]*)(?:;\s*(?P<marker>.*))?$"
)


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(metadata: str) -> list[dict[str, str]]:
    """name, range and extra ("" where it is always needed) of each Requires-Dist but those on this package
    itself.
    """
    message = Parser().parsestr(metadata)
    found = []
    for line in message.get_all("Requires-Dist") or []:
        match = _REQUIREMENT.match(line)
        if match is None or normal(match["name"]) == normal(str(message["Name"])):
            continue
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", match["marker"] or "")
        found.append(
            {
                "name": normal(match["name"]),
                "range": match["range"].strip(" ()"),
                "extra": extra[1] if extra else "",
            }
        )
    return found


def bom(wheel: Path, nvcc: str | None) -> dict[str, Any]:
    """The document for one wheel; nvcc: the version whose runtime is linked in, where the wheel holds CUDA
    code.
    """
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(
            next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        ).decode()
        report = json.loads(archive.read("mole_kernels/libmole_kernels.json"))
    about = Parser().parsestr(metadata)
    name, version = normal(str(about["Name"])), str(about["Version"])
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    ref = f"pkg:pypi/{name}@{version}"
    asked: dict[str, dict[str, Any]] = {}
    for one in requirements(metadata):
        kept = asked.setdefault(one["name"], _component(one["name"], one["range"]))
        if not one["extra"]:
            kept["scope"] = "required"
    linked = []
    if report.get("cuda"):
        linked.append(
            {
                "type": "library",
                "bom-ref": "cudart-static",
                "name": "libcudart_static",
                **({"version": nvcc} if nvcc else {}),
                "supplier": {"name": "NVIDIA"},
                "licenses": [{"license": {"name": "NVIDIA CUDA Toolkit EULA"}}],
                "properties": [{"name": "mole:how", "value": "linked statically into libmole_kernels.so"}],
            }
        )
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'{ref}#{digest}')}",
        "version": 1,
        "metadata": {
            "component": {
                "type": "library",
                "bom-ref": ref,
                "name": name,
                "version": version,
                "purl": ref,
                "licenses": [{"license": {"id": str(about["License-Expression"])}}],
                "hashes": [{"alg": "SHA-256", "content": digest}],
                "properties": [
                    {"name": "mole:file", "value": wheel.name},
                    {"name": "mole:vendored-source", "value": "none"},
                    {"name": "mole:cuda", "value": report.get("cuda") or "none"},
                ],
            }
        },
        "components": [*linked, *asked.values()],
        "dependencies": [{"ref": ref, "dependsOn": [c["bom-ref"] for c in [*linked, *asked.values()]]}],
    }


def _component(name: str, allowed: str) -> dict[str, Any]:
    """A package that is asked for and not contained, by the range that it may have."""
    ref = f"pkg:pypi/{name}"
    properties = [
        {"name": "mole:range", "value": allowed or "any"},
        {"name": "mole:how", "value": "asked for, not contained"},
    ]
    return {
        "type": "library",
        "bom-ref": ref,
        "name": name,
        "purl": ref,
        "scope": "optional",
        "properties": properties,
    }


def nvcc_version() -> str | None:
    """Of the nvcc that builds here, None where there is none."""
    try:
        said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return found[1] if found else None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    wheels = sorted(parser.parse_args().dist.glob("*.whl"))
    if not wheels:
        raise SystemExit("there is no wheel: make wheel")
    for wheel in wheels:
        out = wheel.with_name(f"{wheel.name}.cdx.json")
        out.write_text(json.dumps(bom(wheel, nvcc_version()), indent=1) + "\n")
        print(out)
