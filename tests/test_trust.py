"""What SECURITY.md promises: no pickle by default, nothing evaluated, hostile sizes refused before they cost
anything, licences known.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mole_kernels
from mole_kernels.cli import app
from mole_kernels.dispatch.tables import load as load_table
from mole_kernels.errors import MoleFileError
from mole_kernels.experts.format import tensors_of_experts
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.reader import read_header
from mole_kernels.files.text import read_json_file
from mole_kernels.io import load_expert, load_gates, save_expert
from mole_kernels.io.bank import load_bank
from mole_kernels.io.convert import convert
from mole_kernels.io.merge import compress_file, merge_files
from mole_kernels.io.mix_of_show import load_mix_of_show
from mole_kernels.methods.mix_of_show.concept import load_concept, load_embeddings, load_fusion_config
from mole_kernels.patching.apply import patch
from mole_kernels.training.checkpoint import load_checkpoint
from tests.raw import raw

PACKAGE = Path(mole_kernels.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(
    [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "python").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
        ROOT / "setup.py",
    ]
)
# modules that build objects or code out of bytes
FORBIDDEN_MODULES = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "codeop"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
LOADERS = {"load", "loads", "Unpickler"}


def dotted(node: ast.expr) -> str:
    """a.b.c of an attribute chain, else ''."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{inner}.{node.attr}" if (inner := dotted(node.value)) else ""
    return ""


def complaints(source: str) -> list[str]:
    """What a file does that could run code out of data."""
    found, tree = [], ast.parse(source)
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            found += [f"imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_MODULES]
            if isinstance(node, ast.ImportFrom) and node.module == "pickle":
                found += [f"imports {a.name} from pickle" for a in node.names if a.name in LOADERS]
        if not isinstance(node, ast.Call):
            continue
        name, given = dotted(node.func), {k.arg: k.value for k in node.keywords}
        if name in FORBIDDEN_CALLS - own:
            found.append(f"calls {name}")
        if name.split(".")[0] == "pickle" and name.split(".")[-1] in LOADERS:
            found.append(f"calls {name}")
        if name == "torch.load" and not (
            isinstance(only := given.get("weights_only"), ast.Constant) and only.value is True
        ):
            found.append("torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and "allow_pickle" in given:
            found.append("np.load with allow_pickle")
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(f"calls {name}")
        if any(
            k == "shell" and not (isinstance(v, ast.Constant) and v.value is False) for k, v in given.items()
        ):
            found.append(f"{name} through a shell")
        if name in ("os.system", "os.popen"):
            found.append(f"calls {name}")
        trusted = given.get("trust_remote_code")
        if trusted is not None and not (isinstance(trusted, ast.Constant) and trusted.value is False):
            found.append(f"{name} with trust_remote_code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_code_comes_out_of_data(path: Path):
    assert complaints(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval('1')",
        "exec(x)",
        "import marshal",
        "from joblib import load",
        "import pickle\npickle.loads(b)",
        "from pickle import loads",
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "yaml.load(f)",
        "subprocess.run(x, shell=True)",
        "os.system(x)",
        "Model.from_pretrained(x, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str):
    assert complaints(source)


def test_the_search_lets_the_harmless_pass():
    assert not complaints(
        "model.eval()\ntorch.load(f, weights_only=True)\nimport pickle\nre.compile('x')\npickle.UnpicklingError"
    )


def test_torch_load_is_called_in_two_places_only():
    """What reads pickles for `convert`, and this package's own checkpoints."""
    places = {
        p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.py") if "torch.load(" in p.read_text()
    }
    assert places == {"io/pickles.py", "training/checkpoint.py"}


# -- one that tries
# ---------------------------------------------------------------------------------------------------------------------


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple:
        return (os.mkdir, (self.mark,))


def as_torch(path: Path, evil: object) -> None:
    torch.save({"params": {"unet": {"x": evil}}}, path)


def as_legacy_torch(path: Path, evil: object) -> None:
    torch.save({"params": {"unet": {"x": evil}}}, path, _use_new_zipfile_serialization=False)


def as_pickle(path: Path, evil: object) -> None:
    path.write_bytes(pickle.dumps({"params": {"unet": {"x": evil}}}))


DOORS = {
    "load_expert": load_expert,
    "load_gates": load_gates,
    "load_bank": load_bank,
    "patch": lambda path: patch(torch.nn.Linear(2, 2), {"a": path}),
    "convert": lambda path: convert(path, path.with_suffix(".out.safetensors"), "diffusers"),
    "mix_of_show": load_mix_of_show,
    "merge": lambda path: merge_files([path, path], path.with_suffix(".out.safetensors")),
    "compress": lambda path: compress_file(path, path.with_suffix(".out.safetensors"), rank=1),
    "concept": load_concept,
    "embeddings": load_embeddings,
    "header": read_header,
    "table": load_table,
    "json": read_json_file,
}
# commands that read a file from elsewhere
COMMANDS = {
    "inspect": lambda path: ["inspect", path],
    "convert": lambda path: [
        "convert",
        path,
        "--out",
        path.with_suffix(".out.safetensors"),
        "--to",
        "diffusers",
    ],
    "merge": lambda path: ["merge", path, path, "--out", path.with_suffix(".out.safetensors")],
    "compress": lambda path: ["compress", path, "--rank", "1"],
    "report": lambda path: ["report", path, "--out", path.with_suffix(".html")],
}


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
@pytest.mark.parametrize("write", [as_torch, as_legacy_torch, as_pickle], ids=lambda write: write.__name__)
@pytest.mark.parametrize("door", DOORS)
def test_24_25_a_malicious_pickle_runs_at_no_door(door: str, write, suffix: str, tmp_path: Path):
    path, mark = tmp_path / f"x{suffix}", tmp_path / "ran"
    write(path, Malicious(mark))
    with pytest.raises(MoleFileError):
        DOORS[door](path)
    assert not mark.exists() and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("write", [as_torch, as_legacy_torch, as_pickle], ids=lambda write: write.__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_24_25_a_malicious_pickle_runs_in_no_command(
    command: str, write, suffix: str, tmp_path: Path, monkeypatch, capsys
):
    path, mark = tmp_path / f"x{suffix}", tmp_path / "ran"
    write(path, Malicious(mark))
    monkeypatch.setattr(sys, "argv", ["mole-kernels", *map(str, COMMANDS[command](path))])
    with pytest.raises(SystemExit) as ended:
        app.main()
    assert ended.value.code and path.name in "".join(capsys.readouterr()).replace("\n", "")
    assert not mark.exists() and [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_list_of_concepts_that_names_a_malicious_file_runs_nothing(tmp_path: Path):
    as_torch(tmp_path / "x.pth", Malicious(tmp_path / "ran"))
    (tmp_path / "concepts.json").write_text(json.dumps([{"lora_path": "x.pth"}]))
    with pytest.raises(MoleFileError):
        load_fusion_config(tmp_path / "concepts.json")
    assert not (tmp_path / "ran").exists()


def test_the_malicious_pickle_is_one(tmp_path: Path):
    as_torch(tmp_path / "x.pth", Malicious(tmp_path / "ran"))
    torch.load(tmp_path / "x.pth", weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_a_malicious_checkpoint_runs_nothing(tmp_path: Path):
    (tmp_path / "run.json").write_text(
        json.dumps({"format": 1, "ema": False, "step": 1, "config": {}, "identity": {}})
    )
    torch.save({"optimiser": Malicious(tmp_path / "ran")}, tmp_path / "optimiser.pt")
    with pytest.raises(MoleFileError, match="cannot be read"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


# -- what hostile sizes cost
# ------------------------------------------------------------------------------------------------------------

MEASURE = """
import json, resource, sys, time
from pathlib import Path
from mole_kernels.cli import inspect
from mole_kernels.cli.files import InspectArgs
from mole_kernels.errors import MoleError

def of_file(path, field):
    return int(Path(path).read_text().split(field)[1].split()[0])

def meet(path):
    # the peak of memory counts from here
    Path("/proc/self/clear_refs").write_text("5")
    resident, read, cpu, said = of_file("/proc/self/status", "VmRSS:"), of_file("/proc/self/io", "rchar: "), time.process_time(), ""
    try:
        inspect.show(InspectArgs(file=Path(path), layers=True))
    except MoleError as error:
        said = type(error).__name__
    cpu = time.process_time() - cpu
    read = of_file("/proc/self/io", "rchar: ") - read
    return {"said": said, "read": read, "peak": 1024 * (of_file("/proc/self/status", "VmHWM:") - resident), "cpu_s": round(cpu, 4)}

# a good file first: what is counted afterwards is not the imports
found = [meet(path) for path in sys.argv[1:]][1:]
print()
print(json.dumps(found))
"""


def small_expert(folder: Path) -> Path:
    save_expert(Expert({"unet.x": LowRank(torch.ones(2, 8), torch.ones(8, 2))}), folder / "small.safetensors")
    return folder / "small.safetensors"


def bomb(count: int) -> bytes:
    entry = '"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return raw(("{" + ",".join(entry % i for i in range(count)) + "}").encode())


def four_gigabytes(folder: Path, keys: tuple[str, str], metadata: dict[str, str]) -> Path:
    """A sparse file: rank 1024 on one layer of 524,288 by 524,288."""
    R, K = 1024, 2**19
    header: dict = {"__metadata__": metadata} if metadata else {}
    header[keys[0]] = {"dtype": "F32", "shape": [R, K], "data_offsets": [0, 2**31]}
    header[keys[1]] = {"dtype": "F32", "shape": [K, R], "data_offsets": [2**31, 2**32]}
    content, path = raw(header), folder / f"{keys[0]}.safetensors"
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + 2**32)
    return path


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """What `mole-kernels inspect` says, reads and takes, for each hostile size."""
    if not sys.platform.startswith("linux"):
        pytest.skip("counts bytes by /proc")
    return measured(tmp_path_factory.mktemp("sizes"))


def measured(folder: Path) -> dict[str, dict]:
    """{size: {said, read, peak, cpu_s}}, each in bytes and seconds, of one process that has met a good file
    before.
    """
    paths = {}
    for count in (1_000_000, 250_000):
        paths[f"{count}-tensors"] = folder / f"{count}.safetensors"
        paths[f"{count}-tensors"].write_bytes(bomb(count))
    expert = Expert(
        {"unet.x": LowRank(torch.empty(1024, 2**19, device="meta"), torch.empty(2**19, 1024, device="meta"))}
    )
    bank = tensors_of_experts({"e": expert})[1]
    paths["4GB-lora"] = four_gigabytes(folder, ("unet.x.lora_A.weight", "unet.x.lora_B.weight"), {})
    paths["4GB-single-file"] = four_gigabytes(folder, ("expert.e.unet.x.down", "expert.e.unet.x.up"), bank)
    files = [str(small_expert(folder)), *map(str, paths.values())]
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, *files], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    assert out.returncode == 0, out.stderr
    return dict(zip(paths, json.loads(out.stdout.splitlines()[-1])))


@pytest.mark.parametrize("size", ["1000000-tensors", "250000-tensors"])
def test_21_a_header_bomb_costs_little(size: str, costs: dict[str, dict], record_property):
    record_property("costs", costs[size])
    assert costs[size]["said"] == "MoleFileError"
    assert costs[size]["peak"] < 100e6
    # the first is refused by its length, unread
    assert costs[size]["read"] < (1e4 if size.startswith("1000000") else 20e6)


@pytest.mark.parametrize("kind", ["lora", "single-file"])
def test_four_gigabytes_are_inspected_unread(kind: str, costs: dict[str, dict], record_property):
    """Sizes and ranks are shown from the header; none of the 4 GB is read."""
    found = costs[f"4GB-{kind}"]
    record_property("costs", found)
    assert found["said"] == "" and found["read"] < 1e5 and found["peak"] < 50e6


def test_inspect_says_what_it_did_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from mole_kernels.cli import inspect

    path = small_expert(tmp_path)
    monkeypatch.setattr(inspect, "READ_WHOLE", 100)
    monkeypatch.setattr(inspect, "_SMALL", 10)
    monkeypatch.setattr(sys, "argv", ["mole-kernels", "inspect", str(path)])
    with pytest.raises(SystemExit):
        app.main()
    out = capsys.readouterr().out
    assert "not read, and not checked for NaN" in out and "—" in out


# -- licences
# ---------------------------------------------------------------------------------------------------------------------------


def tool_of(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "python" / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def licences():
    return tool_of("licences")


def test_licences_are_listed_known_and_as_installed():
    pytest.importorskip("tomllib")
    tool = licences()
    listed = {
        line.split(" | ")[0].removeprefix("| "): line
        for line in tool.DOC.read_text().splitlines()
        if line.startswith("| ")
    }
    assert {tool.normal(name) for name in listed} >= tool.direct()
    assert [line for line in listed.values() if "unknown" in line] == []
    assert [row for row in tool.rows() if row not in listed.values()] == [], (
        "make robustness writes docs/licences.md anew"
    )
    # what is used at run time puts no condition on its users' own code
    assert [line for line in listed.values() if "GPL" in line and "runs with" in line] == []


def test_every_pin_but_torchs_is_locked_to_the_bits():
    tool = tool_of("lock")
    pins, locked = tool.pins(), tool.locked()
    assert {tool.normal(name): version for name, version in pins.items()} == {
        name: version for name, (version, _) in locked.items()
    }, "make lock writes constraints.lock anew"
    assert "torch" not in locked and len(locked) > 100
    sums = [each for _, hashes in locked.values() for each in hashes]
    assert all(len(each) == 64 and set(each) <= set("0123456789abcdef") for each in sums) and len(
        set(sums)
    ) == len(sums)
    assert "://" not in tool.LOCK.read_text()


def test_security_names_how_to_report_and_what_is_promised():
    text = (ROOT / "SECURITY.md").read_text()
    for word in (
        "## Reporting",
        "private",
        "safetensors",
        "weights_only=True",
        "docs/robustness.md",
        "docs/licences.md",
        "constraints.lock",
    ):
        assert word in text, word
