"""The vocabulary's PTX bodies: compiled by nvcc for the GPUs they are for, and the machine instructions that
come of them.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NVCC = shutil.which("nvcc")

pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def disassembler() -> str | None:
    """nvdisasm from PATH, or the one that comes with Triton."""
    if found := shutil.which("nvdisasm"):
        return found
    try:
        import triton
    except ImportError:
        return None
    beside = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    return str(beside) if beside.exists() else None


def compile_for(source: str, arch: str, folder: Path) -> tuple[str, str]:
    """(what ptxas says, SASS)"""
    cubin = folder / f"{source}-{arch}.cubin"
    code = f"arch=compute_{arch},code=sm_{arch}"
    command = [
        NVCC,
        "-std=c++17",
        "-gencode",
        code,
        "-Xptxas",
        "-v",
        "-cubin",
        "-o",
        str(cubin),
        str(HERE / source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tool = disassembler()
    if tool is None:
        pytest.skip("nvdisasm is not installed")
    return done.stderr, subprocess.run([tool, str(cubin)], capture_output=True, text=True, check=True).stdout


def opcodes(sass: str) -> set[str]:
    return set(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Za-z0-9_.]+)", sass, re.M))


@pytest.fixture(scope="module")
def hopper(tmp_path_factory):
    return compile_for("ptx_sm90.cu", "90a", tmp_path_factory.mktemp("ptx"))


def test_nothing_spills(hopper):
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", hopper[0]
    )
    assert len(frames) == 65 and set(frames) == {("0", "0", "0")}


def test_the_compiler_does_not_serialise_wgmma(hopper):
    assert "serialized" not in hopper[0] and "setmaxnreg ignored" not in hopper[0]


@pytest.mark.parametrize("n", range(8, 257, 8))
def test_every_width_is_a_product_of_its_own(hopper, n):
    found = opcodes(hopper[1])
    assert {o for o in found if o.startswith(f"HGMMA.64x{n}x16.F32")} >= {
        f"HGMMA.64x{n}x16.F32",
        f"HGMMA.64x{n}x16.F32.BF16",
    }


HOPPER = """
    UTMALDG.2D UTMALDG.3D UTMALDG.2D.MULTICAST UTMALDG.3D.MULTICAST UTMASTG.2D UTMASTG.3D UTMACMDFLUSH UTMACCTL.PF UBLKCP.S.G UBLKCP.S.S
    UBLKCP.G.S SYNCS.EXCH.64 SYNCS.ARRIVE.TRANS64 SYNCS.PHASECHK.TRANS64.TRYWAIT SYNCS.ARRIVE.TRANS64.RED SYNCS.CCTL.IV UCGABAR_ARV
    UCGABAR_WAIT STAS STAS.64 STAS.128 LD.E ST.E USETMAXREG.TRY_ALLOC USETMAXREG.DEALLOC WARPGROUP.ARRIVE WARPGROUP.DEPBAR
    FENCE.VIEW.ASYNC.S FENCE.VIEW.ASYNC.G ACQBULK PREEXIT ELECT STSM.16.M88.4 STSM.16.MT88.4 BAR.SYNC BAR.ARV
""".split()


@pytest.mark.parametrize("instruction", HOPPER)
def test_hopper_instructions(hopper, instruction):
    found = opcodes(hopper[1])
    assert any(o == instruction or o.startswith(instruction + ".") for o in found), sorted(found)


@pytest.mark.parametrize("arch", ["80", "90", "120"])
def test_portable_instructions(tmp_path, arch):
    words, sass = compile_for("ptx_portable.cu", arch, tmp_path)
    assert not re.search(r"[1-9]\d* bytes spill", words)
    found = opcodes(sass)
    for start in "HMMA.16816.F32 LDGSTS.E.BYPASS.128 LDSM.16.M88.4 LDSM.16.MT88.4 LDGDEPBAR DEPBAR MEMBAR ATOMG RED".split():
        assert any(o.startswith(start) for o in found), (start, sorted(found))
