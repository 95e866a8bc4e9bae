"""Draw two prompts of two outputs, each prompt with its own adapter, through every pipeline of diffusers.

    python python/tools/serving_suite.py --source DIR [--only FLUX]        DIR: a checkout of diffusers (bare too)

The tiny components and inputs are those of diffusers' own tests, which its distribution does not contain.
Tokenizers, which those tests fetch, are replaced by one that numbers letters. Every pipeline class that loads
LoRA files is drawn three times: with the first adapter alone, with the second alone, and served with one for
each prompt; the outputs of a prompt must be those of its adapter.

Exit 0: no pipeline drew an output with another's adapter. 1: one did. 2: the tests are not to be had.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
CACHE = ROOT / "build" / "serving-suite"
# long enough for those that drop the words of a template, and of one length
TEXT = "{} in a picture of the usual kind, drawn with a pen on old paper, and on it {}"
PROMPTS = tuple(TEXT.format(what, what) for what in ("anna at sea", "a dead tree", "some a hat."))
PICTURES = 2
TESTS = "diffusers_tests"
NAMES = ("anna", "ben")


def unpack(source: Path) -> None:
    """The tests of a checkout, under build/."""
    CACHE.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "-C", str(source), "archive", "HEAD", "tests"], capture_output=True)
    if archive.returncode:
        sys.exit(f"{source}: expected a checkout of diffusers with tests/, or its bare repository")
    subprocess.run(["tar", "x", "-C", str(CACHE)], input=archive.stdout, check=True)
    # beside this project's own tests they need a name of their own
    shutil.rmtree(CACHE / TESTS, ignore_errors=True)
    (CACHE / "tests").rename(CACHE / TESTS)
    for path in (CACHE / TESTS).rglob("*.py"):
        text = path.read_text()
        if "from tests." in text:
            path.write_text(text.replace("from tests.", f"from {TESTS}."))


def tokenizer(*_: Any, **__: Any) -> Any:
    """One that numbers letters; messages of a chat are their words one after the other."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    letters = sorted(set("".join(map(chr, range(32, 127)))))
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    words = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=77,
    )
    words.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}{% endfor %}"
    )
    return words


def without_a_hub() -> None:
    """Tokenizers and configurations that the tests would fetch, made here."""
    import transformers

    for name in dir(transformers):
        if name.endswith(("Tokenizer", "TokenizerFast")):
            cls = getattr(transformers, name)
            if isinstance(cls, type):
                cls.from_pretrained = staticmethod(tokenizer)
    t5 = {"vocab_size": 1000, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}

    def config(name: str, *_: Any, **__: Any) -> Any:
        if "t5" in name:
            return transformers.T5Config(**t5)
        raise OSError(f"{name} is not here")

    transformers.AutoConfig.from_pretrained = staticmethod(config)
    for prefix in ("T5", "UMT5"):
        made = getattr(transformers, prefix + "Config")(**t5)
        getattr(transformers, prefix + "EncoderModel").from_pretrained = classmethod(
            lambda cls, *_, config=made, **__: cls(config)
        )


def testers() -> Iterator[tuple[str, type]]:
    """Each pipeline class that loads LoRA files, with a class of the tests that knows its components."""
    sys.path.insert(0, str(CACHE))
    seen = set()
    for path in sorted((CACHE / TESTS / "pipelines").rglob("test_*.py")):
        name = ".".join(path.relative_to(CACHE).with_suffix("").parts)
        try:
            module = importlib.import_module(name)
        except Exception as error:  # what a test file wants may be missing here: it is reported
            print(f"{name}: not imported: {error}", file=sys.stderr)
            continue
        for cls in vars(module).values():
            # stand-ins for what is not installed raise at every look
            if not isinstance(cls, type) or type(cls).__name__ == "DummyObject":
                continue
            pipeline = getattr(cls, "pipeline_class", None)
            if not isinstance(pipeline, type) or type(pipeline).__name__ == "DummyObject" or pipeline in seen:
                continue
            loads = any("LoraLoaderMixin" in base.__name__ for base in pipeline.__mro__)
            if loads and hasattr(cls, "get_dummy_components") and cls.__module__ == name:
                seen.add(pipeline)
                yield pipeline.__name__, cls


def inputs_of(tester: Any) -> dict[str, Any]:
    getter = tester.get_dummy_inputs
    wants = inspect.signature(getter).parameters
    return getter("cpu") if "device" in wants else getter()


def batched(pipe: Any, tester: Any, texts: list[str], pictures: int) -> dict[str, Any]:
    """The tests' inputs for several prompts of two outputs each, with a generator for each output."""
    inputs = inputs_of(tester)
    names = inspect.signature(type(pipe).__call__).parameters
    for name in ("prompt", "negative_prompt"):
        if name in inputs and inputs[name] is not None:
            inputs[name] = list(texts) if name == "prompt" else ["bad"] * len(texts)
    count = [n for n in names if n.startswith("num_") and n.endswith("_per_prompt")]
    if count:
        inputs[count[0]] = pictures
    outputs = len(texts) * (pictures if count else 1)
    if "generator" in names:
        inputs["generator"] = [torch.Generator().manual_seed(i) for i in range(outputs)]
    inputs["num_inference_steps"] = min(2, inputs.get("num_inference_steps", 2))
    return inputs


def rows_of(out: Any) -> Tensor:
    first = next(iter(out.values())) if hasattr(out, "values") else out[0]
    if isinstance(first, list):
        first = torch.stack([torch.as_tensor(x) for x in first])
    return torch.as_tensor(first).float()


def draw(pipe: Any, tester: Any, texts: list[str], pictures: int) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return rows_of(pipe(**batched(pipe, tester, texts, pictures)))


def outcome_of(tester_class: type) -> tuple[str, str]:
    """(right | wrong | refused | not drawn, why)."""
    import mole_kernels as mk
    from mole_kernels.errors import MoleError
    from tests.serving.pipelines import ENDINGS
    from tests.tiny_models import make_expert

    try:
        tester = tester_class()
        pipe = tester_class.pipeline_class(**tester.get_dummy_components())
        pipe.set_progress_bar_config(disable=True)
        part = next(n for n in ("transformer", "unet", "prior") if getattr(pipe, n, None) is not None)
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.float().eval()
        try:
            pictures = PICTURES
            base = draw(pipe, tester, list(PROMPTS[:2]), pictures)
        except Exception:  # some take one output per prompt, whatever they are asked
            pictures = 1
            base = draw(pipe, tester, list(PROMPTS[:2]), pictures)
        again = draw(pipe, tester, list(PROMPTS[:2]), pictures)
        if not torch.equal(base, again):
            return "not drawn", "two runs differ"
        moved = draw(pipe, tester, [PROMPTS[0], PROMPTS[2]], pictures)
    except Exception as error:
        return (
            "not drawn",
            f"{type(error).__name__}: {str(error).splitlines()[0][:150] if str(error) else ''}",
        )
    owner = [int(not torch.equal(a, b)) for a, b in zip(base, moved, strict=True)]
    if sum(owner) * 2 != len(owner):
        return "not drawn", f"{sum(owner)} of {len(owner)} outputs follow the second prompt"
    from mole_kernels.modules.scan import scan

    paths = [p for p in scan(pipe).layers if p.startswith(f"{part}") and p.endswith(ENDINGS)]
    if not paths:
        return "not drawn", "no attention layer under a name that LoRA files use"
    experts = {n: make_expert(pipe, paths, seed=i, scale=4.0) for i, n in enumerate(NAMES)}
    whole = []
    for name in NAMES:
        with mk.patch(pipe, {name: experts[name]}):
            whole.append(draw(pipe, tester, list(PROMPTS[:2]), pictures))
    want = torch.stack([whole[o][i] for i, o in enumerate(owner)])
    swapped = torch.stack([whole[1 - o][i] for i, o in enumerate(owner)])
    scale = want.abs().max()
    if (want - swapped).abs().max() <= 1e-2 * scale:
        return "not drawn", "the adapters cannot be told apart in the output"
    try:
        with mk.serve(pipe, experts) as served, served.assign(list(NAMES)):
            got = draw(pipe, tester, list(PROMPTS[:2]), pictures)
    except MoleError as error:
        return "refused", str(error).splitlines()[0]
    error = float((got - want).abs().max() / scale)
    return (
        ("right", f"{len(want)} outputs")
        if error <= 1e-3
        else ("wrong", f"{error:.2g} of the largest value away")
    )


def run(only: str, report: Callable[[str], None]) -> dict[str, list[str]]:
    out = {}
    for name, tester in testers():
        if only.lower() in name.lower():
            try:
                kind, why = outcome_of(tester)
            except Exception as error:
                traceback.print_exc()
                kind, why = "wrong", f"{type(error).__name__}: {str(error)[:200]}"
            out[name] = [kind, why]
            report(f"{kind:10} {name}: {why}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True)
    parser.add_argument("--only", default="")
    asked = parser.parse_args()
    unpack(asked.source)
    without_a_hub()
    outcomes = run(asked.only, lambda line: print(line, flush=True))
    kinds = [kind for kind, _ in outcomes.values()]
    print({kind: kinds.count(kind) for kind in sorted(set(kinds))})
    sys.exit("wrong" in kinds)


if __name__ == "__main__":
    main()
