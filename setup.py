"""Builds mole_kernels/libmole_kernels.so with ninja: C++ always, CUDA where nvcc is found.

The library has no Python ABI (it is loaded with torch.ops.load_library) and speaks LibTorch's stable ABI, so
one
wheel, tagged py3-none-<platform>, serves every Python and every torch from 2.11 on.

Environment: MOLE_SKIP_CUDA_BUILD=1 leaves CUDA out, MOLE_FORCE_CUDA=1 makes a missing nvcc an error,
MOLE_REQUIRE_EXTENSION=1 makes a missing compiler an error; TORCH_CUDA_ARCH_LIST, CUDA_HOME, MAX_JOBS, CXX and
NVCC
mean what they mean elsewhere. Whether a GPU is present is never asked.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "libmole_kernels.so"
REPORT = "libmole_kernels.json"  # what was built, or why not; `mole-kernels doctor` reads it
TARGET_VERSION = "0x020b000000000000"  # torch 2.11, the oldest that loads the library
OLDEST_TORCH = (2, 11)
DEFAULT_ARCHS = "8.0;9.0;10.0;12.0+PTX"
TRUE = {"1", "true", "yes", "on"}


class BuildProblem(SystemExit):
    """A build that cannot go on; the message says what to do."""


class Torch(NamedTuple):
    """Where torch keeps what a build needs."""

    version: str
    include: list[str]
    library: str


class Toolchain(NamedTuple):
    """The programs of one build; nvcc is None where CUDA is left out, with the reason."""

    cxx: str
    ninja: str
    nvcc: str | None
    no_cuda: str


def flag(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").strip().lower() in TRUE


def find_torch() -> Torch:
    """The torch of this environment; a message with the two commands to type where there is none."""
    commands = "    pip install torch\n    pip install --no-build-isolation ."
    try:
        import torch
    except ImportError as e:
        raise BuildProblem(
            f"mole_kernels: torch cannot be imported while building ({e}).\n"
            f"Hint: the extension is compiled against the torch you run, so install torch first and build without isolation:\n{commands}"
        ) from None
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or tuple(map(int, version.groups())) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        raise BuildProblem(
            f"mole_kernels: expected torch >= {wanted} while building, got {torch.__version__}.\nHint:\n{commands}"
        )
    base = Path(torch.__file__).parent
    return Torch(
        torch.__version__,
        [str(base / "include"), str(base / "include/torch/csrc/api/include")],
        str(base / "lib"),
    )


def find_program(names: list[str], env: Mapping[str, str]) -> str | None:
    return next((p for n in names if n and (p := shutil.which(n, path=env.get("PATH")))), None)


def find_ninja(env: Mapping[str, str]) -> str | None:
    """ninja from PATH, or the one of the ninja package where PATH lacks the environment's bin."""
    if found := find_program(["ninja"], env):
        return found
    beside = Path(sys.executable).parent / "ninja"
    return str(beside) if beside.exists() else None


def find_nvcc(env: Mapping[str, str]) -> str | None:
    home = env.get("CUDA_HOME") or env.get("CUDA_PATH")
    names = [
        env.get("NVCC", ""),
        str(Path(home) / "bin/nvcc") if home else "",
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    return find_program(names, env)


def choose_nvcc(env: Mapping[str, str]) -> tuple[str | None, str]:
    """(nvcc or None, why none); never asks whether a GPU is present."""
    skip, force = flag(env, "MOLE_SKIP_CUDA_BUILD"), flag(env, "MOLE_FORCE_CUDA")
    if skip and force:
        raise BuildProblem(
            "mole_kernels: MOLE_SKIP_CUDA_BUILD and MOLE_FORCE_CUDA are both set.\nHint: set one of them."
        )
    if skip:
        return None, "MOLE_SKIP_CUDA_BUILD is set"
    nvcc = find_nvcc(env)
    if nvcc is None and force:
        raise BuildProblem(
            "mole_kernels: MOLE_FORCE_CUDA is set and nvcc was not found.\nHint: set CUDA_HOME to the CUDA toolkit."
        )
    return nvcc, "" if nvcc else "nvcc was not found (PATH, CUDA_HOME, /usr/local/cuda)"


def find_toolchain(env: Mapping[str, str]) -> Toolchain | str:
    """The programs, or a sentence saying which one is missing."""
    cxx = find_program([env.get("CXX", ""), "c++", "g++", "clang++"], env)
    if cxx is None:
        return "no C++ compiler was found (CXX, c++, g++, clang++)"
    ninja = find_ninja(env)
    if ninja is None:
        return "ninja was not found (pip install ninja)"
    return Toolchain(cxx, ninja, *choose_nvcc(env))


def cuda_gencode(arch_list: str) -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0a 12.0+PTX") as -gencode flags; a name that is no architecture is an
    error.
    """
    flags = []
    for arch in re.split(r"[;,\s]+", arch_list.strip()):
        m = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", arch)
        if m is None:
            raise BuildProblem(
                f"mole_kernels: TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 12.0+PTX, got {arch!r}."
            )
        sm = "".join(m.group(1, 2, 3))
        flags.append(f"-gencode=arch=compute_{sm},code=sm_{sm}")
        if m.group(4):
            flags.append(f"-gencode=arch=compute_{sm},code=compute_{sm}")
    return flags


def has_hopper(gencode: list[str]) -> bool:
    """Whether Hopper is among the architectures: only then its own kernels (wgmma, clusters) are compiled."""
    return any(re.search(r"code=sm_90a?$", flag) for flag in gencode)


def ptxas_facts(text: str) -> list[dict[str, object]]:
    """What `ptxas -v` said: kernel, registers at launch and bytes spilled of each one; and whether it
    serialised its products.
    """
    facts = []
    slow = set(re.findall(r"serialized.*?in the function '(\w+)'", text))
    for name, body in re.findall(
        r"Compiling entry function '(\w+)' for '\w+'(.*?)(?=Compiling entry function|\Z)", text, re.DOTALL
    ):
        shape = re.search(r"(?:4sm90|6ladder)\d+([a-z_]+)I(?:NS_4([a-z0-9]+)E)?((?:Li\d+E)+)E", name)
        kernel = (
            name
            if shape is None
            else f"{shape[1]}<{', '.join([shape[2] or 'bf16', *re.findall(r'[0-9]+', shape[3])])}>"
        )
        patterns = (r"(\d+) bytes spill stores", r"(\d+) bytes spill loads", r"Used (\d+) reg")
        stores, loads, registers = (int(m[1]) if (m := re.search(p, body)) else 0 for p in patterns)
        facts.append(
            {"kernel": kernel, "registers": registers, "spilled": stores + loads, "serialized": name in slow}
        )
    return sorted(facts, key=lambda fact: str(fact["kernel"]))


def isa_variants(machine: str) -> dict[str, list[str]]:
    """The kernels are compiled once per instruction set; the library picks at run time what the CPU has."""
    variants: dict[str, list[str]] = {"base": []}
    if machine.lower() in ("x86_64", "amd64"):
        variants["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
        v4 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
        variants["avx512"] = [*variants["avx2"], *v4]
        variants["avx512bf16"] = [*variants["avx512"], "-mavx512bf16"]
    return variants


def ninja_escape(text: str) -> str:
    return re.sub(r"([$ :])", r"$\1", text)


def ninja_file(torch: Torch, tools: Toolchain, out: Path, env: Mapping[str, str], machine: str) -> str:
    """The text of build.ninja: one object per source and instruction set, then one library."""
    include = [f"-I{p}" for p in torch.include]
    shared = [f"-I{ROOT / 'csrc'}", f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", "-std=c++17", "-O3"]
    # maybe-uninitialized: gcc 12 says it of its own _mm512_undefined
    warnings = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-maybe-uninitialized"]
    # messages name sources; the folders of the machine that built a wheel are nobody's business
    named = [
        f"-ffile-prefix-map={ROOT}=mole_kernels",
        f"-ffile-prefix-map={Path(torch.library).parent}=torch",
    ]
    cxx = [*shared, "-fPIC", "-fvisibility=hidden", *named, *warnings, *env.get("CXXFLAGS", "").split()]
    lines = [
        "rule cxx",
        "  command = $cxx -MMD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        "rule nvcc",
        "  command = $nvcc -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc",
        "rule kernels",  # what ptxas says of registers and spills is kept for the report
        "  command = $nvcc -MD -MF $out.d -Xptxas=-v $flags -c $in -o $out > $out.log 2>&1 || { cat $out.log; exit 1; }",
        "  depfile = $out.d\n  deps = gcc",
        "rule link",
        "  command = $link $in $libs -o $out",
        f"cxx = {tools.cxx}",
        f"nvcc = {tools.nvcc or ''}",
    ]
    objects = []

    def compile(rule: str, source: Path, stem: str, flags: list[str]) -> None:
        objects.append(f"{stem}.o")
        lines.extend([f"build {stem}.o: {rule} {ninja_escape(str(source))}", f"  flags = {' '.join(flags)}"])

    # no torch header here: an inline function compiled for AVX-512 could be the copy the linker keeps for
    # everyone
    for isa, flags in isa_variants(machine).items():
        compile(
            "cxx",
            ROOT / "csrc/cpu/kernels.cpp",
            f"kernels_{isa}",
            [*cxx, *flags, f"-DMOLE_ISA={isa}", f"-DMOLE_ISA_{isa.upper()}=1"],
        )
    variants = [f"-DMOLE_HAS_{isa.upper()}=1" for isa in isa_variants(machine)]
    for source in [ROOT / "csrc/bindings.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]:
        if source.name != "kernels.cpp":
            compile("cxx", source, source.stem, [*cxx, *include, *variants])
    # libtorch.so stays although unused: through it the weak CUDA symbols are found where torch has CUDA
    libs, link = f"-L{torch.library} -ltorch -ltorch_cpu", f"{tools.cxx} -shared -Wl,--no-as-needed"
    if tools.nvcc:
        gencode = cuda_gencode(env.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
        through = ",".join(["-fPIC", "-fvisibility=hidden", *named])
        cuda = [*shared, *include, *gencode, f"-Xcompiler={through}", f"-ccbin={tools.cxx}"]
        for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
            compile("nvcc", source, f"cuda_{source.stem}", cuda)
        if has_hopper(gencode):
            host = [
                *shared,
                *include,
                f"-Xcompiler={through},-Wall,-Wextra,-Wno-unused-parameter",
                f"-ccbin={tools.cxx}",
            ]
            for source in [
                *sorted((ROOT / "csrc/cuda").glob("*.cpp")),
                *sorted((ROOT / "csrc/cuda/sm90").glob("*.cpp")),
            ]:
                compile("nvcc", source, f"sm90_{source.stem}", host)
            hopper = [
                *shared,
                "-gencode=arch=compute_90a,code=sm_90a",
                f"-Xcompiler={through}",
                f"-ccbin={tools.cxx}",
            ]
            compile("kernels", ROOT / "csrc/cuda/ladder/kernels.cu", "sm90_ladder", hopper)
            ways = ("cluster", "persistent", "recompute")
            for way in (*ways, *(f"{way}_dx" for way in ways)):
                for dtype in ("bf16", "fp16"):
                    names = [
                        f"-DMOLE_WAY={way}",
                        f"-DMOLE_DTYPE={dtype}",
                        f"-DMOLE_SHAPES=MOLE_SM90_{way.upper()}",
                    ]
                    compile(
                        "kernels",
                        ROOT / "csrc/cuda/sm90/kernels.cu",
                        f"sm90_{way}_{dtype}",
                        [*hopper, *names],
                    )
        # nvcc links, for it alone knows where its static runtime lies; past its own device link, which would
        # keep its arguments as text
        libs = f"-Xlinker=-L{torch.library},-ltorch,-ltorch_cpu"
        link = f"{tools.nvcc} -shared -cudart=static -ccbin={tools.cxx} -Xlinker=--no-as-needed"
    lines += [f"link = {link}"]
    lines += [f"build {ninja_escape(str(out))}: link {' '.join(objects)}", f"  libs = {libs}"]
    return "\n".join(lines) + "\n"


class BuildExtension(build_ext):
    """Compiles with ninja; without a compiler the package installs without the library and says so."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split(".")[:-1]) / LIBRARY)

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        out.parent.mkdir(parents=True, exist_ok=True)
        report: dict[str, object] = {"built": False, "torch": torch.version, "target": TARGET_VERSION}
        out.unlink(missing_ok=True)  # an older library must not pass for this build's
        tools = find_toolchain(os.environ)
        if isinstance(tools, str):
            self.give_up(tools, report)
        else:
            self.compile_library(torch, tools, out)
            archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
            report |= {"built": True, "cuda": archs if tools.nvcc else "", "no_cuda": tools.no_cuda}
            if tools.nvcc and has_hopper(cuda_gencode(archs)):
                report["sm90"] = ptxas_facts(
                    "".join(p.read_text() for p in sorted(self.work().glob("sm90_*.o.log")))
                )
        self.write_report(out, report)

    def work(self) -> Path:
        """pip's own folder is new each time; here ninja rebuilds what changed."""
        return ROOT / "build" / f"ninja-{platform.machine()}"

    def compile_library(self, torch: Torch, tools: Toolchain, out: Path) -> None:
        work = self.work()
        work.mkdir(parents=True, exist_ok=True)
        (work / "build.ninja").write_text(ninja_file(torch, tools, out, os.environ, platform.machine()))
        jobs = os.environ.get("MAX_JOBS", "")
        command = [tools.ninja, *(["-j", jobs] if jobs else [])]
        print(
            f"mole_kernels: torch {torch.version}, {tools.cxx}, CUDA: {tools.nvcc or tools.no_cuda}",
            flush=True,
        )
        if subprocess.run(command, cwd=work, check=False).returncode:
            raise BuildProblem(
                "mole_kernels: compiling failed; the compiler's messages are above (pip shows them with -v)."
            )

    def give_up(self, reason: str, report: dict[str, object]) -> None:
        hint = "install a C++17 compiler and ninja, then `pip install --no-build-isolation .` again"
        if flag(os.environ, "MOLE_REQUIRE_EXTENSION"):
            raise BuildProblem(f"mole_kernels: {reason}, and MOLE_REQUIRE_EXTENSION is set.\nHint: {hint}.")
        report["reason"] = f"{reason} when the package was installed"
        print(
            f"mole_kernels: WARNING: {reason}; installing without the compiled extension (slower).\nHint: {hint}.",
            file=sys.stderr,
        )

    def write_report(self, out: Path, report: dict[str, object]) -> None:
        text = json.dumps(report, indent=1) + "\n"
        (out.parent / REPORT).write_text(text)
        if self.editable_mode or self.old_inplace():
            (ROOT / "mole_kernels" / REPORT).write_text(text)

    def old_inplace(self) -> bool:
        return bool(self.distribution.get_command_obj("build_ext").inplace)


class PlainWheel(bdist_wheel):
    """A library without a Python ABI: py3-none-<platform>."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    # optional: where no compiler is found there is nothing to copy
    setup(
        ext_modules=[Extension("mole_kernels.libmole_kernels", sources=[], optional=True)],
        cmdclass={"build_ext": BuildExtension, "bdist_wheel": PlainWheel},
    )
