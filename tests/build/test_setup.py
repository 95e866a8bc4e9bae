"""setup.py's own decisions, with fake programs and environments; nothing is compiled here."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("mole_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def programs(tmp_path):
    """programs("c++", "nvcc") -> a PATH that holds just these."""

    def make(*names: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name in names:
            (folder / name).write_text("#!/bin/sh\nexit 0\n")
            (folder / name).chmod(0o755)
        return str(folder)

    return make


def test_no_compiler_is_a_sentence(build, programs):
    assert "no C++ compiler" in build.find_toolchain({"PATH": programs("ninja")})


def test_cxx_is_honoured(build, programs):
    path = programs("c++", "my-cxx", "ninja")
    assert build.find_toolchain({"PATH": path, "CXX": "my-cxx"}).cxx.endswith("my-cxx")


def test_nvcc_from_cuda_home_comes_first(build, programs, tmp_path):
    (tmp_path / "cuda/bin").mkdir(parents=True)
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    assert build.choose_nvcc({"PATH": programs("nvcc"), "CUDA_HOME": str(tmp_path / "cuda")}) == (str(nvcc), "")


def test_skip_cuda(build, programs):
    nvcc, reason = build.choose_nvcc({"PATH": programs("nvcc"), "MOLE_SKIP_CUDA_BUILD": "1"})
    assert nvcc is None and "MOLE_SKIP_CUDA_BUILD" in reason


def test_force_cuda_without_nvcc_is_an_error(build, programs, monkeypatch):
    monkeypatch.setattr(build, "find_nvcc", lambda env: None)
    with pytest.raises(build.BuildProblem, match=r"MOLE_FORCE_CUDA.*\n.*CUDA_HOME"):
        build.choose_nvcc({"PATH": programs(), "MOLE_FORCE_CUDA": "1"})
    assert build.choose_nvcc({"PATH": programs()})[0] is None


def test_skip_and_force_together_are_an_error(build):
    with pytest.raises(build.BuildProblem, match="both set"):
        build.choose_nvcc({"MOLE_SKIP_CUDA_BUILD": "1", "MOLE_FORCE_CUDA": "1"})


def test_arch_list(build):
    assert build.cuda_gencode("8.0 9.0a;12.0+PTX") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    with pytest.raises(build.BuildProblem, match="Hopper"):
        build.cuda_gencode("8.0;Hopper")


def test_no_torch_says_what_to_type(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(build.BuildProblem, match=r"pip install torch\n    pip install --no-build-isolation \."):
        build.find_torch()


def test_an_old_torch_is_refused(build, monkeypatch):
    import torch

    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(build.BuildProblem, match=r"expected torch >= 2.11 while building, got 2.9.1"):
        build.find_torch()


def ninja_text(build, nvcc, machine="x86_64", **env):
    torch = build.Torch("2.13.0", ["/torch/include"], "/torch/lib")
    return build.ninja_file(torch, build.Toolchain("c++", "ninja", nvcc, ""), Path("/out/lib.so"), env, machine)


def test_kernels_see_no_torch_header(build):
    """An inline function of a header compiled for AVX-512 could be the copy that the linker keeps for every
    CPU.
    """
    text = ninja_text(build, None)
    flags = {line.split()[1]: text.splitlines()[i + 1] for i, line in enumerate(text.splitlines()) if line.startswith("build ")}
    assert "-mavx512bf16" in flags["kernels_avx512bf16.o:"]
    for name, line in flags.items():
        assert ("/torch/include" in line) != name.startswith("kernels_") or name.startswith("/out")
        assert ("-mavx" in line) == ("avx" in name)


def test_cuda_sources_only_with_nvcc(build):
    assert "cuda_device.o: nvcc" in ninja_text(build, "/cuda/bin/nvcc") and "sm_86" in ninja_text(build, "/n", TORCH_CUDA_ARCH_LIST="8.6")
    assert ".cu" not in ninja_text(build, None)


def test_other_machines_get_the_portable_kernels(build):
    text = ninja_text(build, None, machine="aarch64")
    assert "kernels_base.o" in text and "avx" not in text


def test_max_jobs(build, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(build.subprocess, "run", lambda command, **_: seen.append(command) or subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("MAX_JOBS", "3")
    from setuptools import Distribution

    command = build.BuildExtension(Distribution())
    command.compile_library(build.Torch("2.13.0", [], "/torch/lib"), build.Toolchain("c++", "ninja", None, ""), tmp_path / "lib.so")
    assert seen == [["ninja", "-j", "3"]]


def test_no_gpu_is_ever_asked_for():
    text = (ROOT / "setup.py").read_text()
    assert "is_available" not in text and "nvidia-smi" not in text


def run_setup(tmp_path, path: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "tmp")]
    keep = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "NVCC")}
    return subprocess.run(command, cwd=ROOT, env={**keep, "PATH": path, **env}, capture_output=True, text=True, check=False)


def test_without_a_compiler_it_installs_and_says_so(tmp_path, programs):
    run = run_setup(tmp_path, programs("ninja"))
    assert run.returncode == 0, run.stderr
    assert "without the compiled extension" in run.stderr and "Hint: install a C++17 compiler" in run.stderr
    report = json.loads((tmp_path / "lib/mole_kernels/libmole_kernels.json").read_text())
    assert report["built"] is False and "no C++ compiler was found" in report["reason"]
    assert not (tmp_path / "lib/mole_kernels/libmole_kernels.so").exists()


def test_without_a_compiler_it_fails_where_asked_to(tmp_path, programs):
    run = run_setup(tmp_path, programs("ninja"), MOLE_REQUIRE_EXTENSION="1")
    assert run.returncode != 0 and "MOLE_REQUIRE_EXTENSION" in run.stderr


def test_this_install_was_built_for_every_supported_torch():
    """The library beside the package (if one was built) carries no newer ABI than 2.11's."""
    report = ROOT / "mole_kernels/libmole_kernels.json"
    if not report.exists() or not json.loads(report.read_text())["built"]:
        pytest.skip("the package was installed without a compiler")
    assert json.loads(report.read_text())["target"] == "0x020b000000000000"


def test_the_library_names_no_folder_of_the_machine_that_built_it(build):
    text = ninja_text(build, "/cuda/bin/nvcc", TORCH_CUDA_ARCH_LIST="9.0")
    flags = [line for line in text.splitlines() if line.startswith("  flags")]
    assert flags and all(
        f"-ffile-prefix-map={build.ROOT}=" in line and "-ffile-prefix-map=/torch=" in line.replace("/lib", "") for line in flags
    )
    # nvcc keeps the arguments of its device link as text in the library
    assert "  libs = -Xlinker=-L/torch/lib,-ltorch,-ltorch_cpu" in text
    assert "  libs = -L/torch/lib -ltorch -ltorch_cpu" in ninja_text(build, None)
