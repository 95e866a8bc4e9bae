"""LoRA files whose keys or tensors are wrong: the refusal names the key, and nothing is dropped or
invented.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mole_kernels.errors import (
    MoleError,
    MoleKeyError,
    MoleShapeError,
    MoleTypeError,
    MoleValueError,
    MoleWarning,
)
from mole_kernels.experts.bank import ExpertBank
from mole_kernels.io import load_expert, save_expert

A, B = (
    "unet.mid_block.attentions.0.proj_in.lora_A.weight",
    "unet.mid_block.attentions.0.proj_in.lora_B.weight",
)
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
R, K, N = 2, 5, 4
NAN, INF = float("nan"), float("inf")


def good() -> dict[str, Tensor]:
    return {A: torch.ones(R, K), B: torch.ones(N, R)}


def kohya(**more: Tensor) -> dict[str, Tensor]:
    found = {f"{KOHYA}.lora_down.weight": torch.ones(R, K), f"{KOHYA}.lora_up.weight": torch.ones(N, R)}
    return found | {f"{KOHYA}.{key.replace('__', '.')}": tensor for key, tensor in more.items()}


def spoiled(value: float, count: int) -> Tensor:
    tensor = torch.ones(R, K)
    tensor.view(-1)[:count] = value
    return tensor


@dataclass(frozen=True)
class Wrong:
    """Tensors, the error, and the words its message must hold."""

    id: str
    tensors: dict[str, Tensor] = field(hash=False)
    error: type[MoleError]
    words: tuple[str, ...]

    def __str__(self) -> str:
        return self.id


def with_key(key: str, tensor: Tensor | None = None) -> dict[str, Tensor]:
    return good() | {key: torch.ones(N) if tensor is None else tensor}


CASES = [
    Wrong(
        "31-no-lora-key",
        {"conv.weight": torch.ones(1), "x.bias": torch.ones(1)},
        MoleKeyError,
        ("2 of 2 keys", "'conv.weight'", "'x.bias'"),
    ),
    Wrong("31-no-tensors", {}, MoleKeyError, ("holds no tensors",)),
    Wrong(
        "32-one-stranger",
        with_key("conv.weight"),
        MoleKeyError,
        ("1 of 3 keys are not LoRA keys", "'conv.weight'"),
    ),
    Wrong("33-A-without-B", {A: torch.ones(R, K)}, MoleKeyError, ("1 layers have no B (up)", A)),
    Wrong("34-B-without-A", {B: torch.ones(N, R)}, MoleKeyError, ("1 layers have no A (down)", B)),
    Wrong(
        "34-alpha-alone",
        {"unet.x.alpha": torch.tensor(1.0)},
        MoleKeyError,
        ("have no A (down)", "unet.x.alpha"),
    ),
    Wrong(
        "35-ranks-differ",
        good() | {B: torch.ones(N, 3)},
        MoleShapeError,
        ("proj_in", "of one rank", "A [2, 5]", "B [4, 3]"),
    ),
    Wrong(
        "35-transposed", good() | {B: torch.ones(R, N)}, MoleShapeError, ("proj_in", "B [2, 4]", "transposed")
    ),
    Wrong(
        "37-3-D",
        good() | {A: torch.ones(1, R, K)},
        MoleShapeError,
        ("proj_in", "A (down)", "expected a matrix", "[1, 2, 5]"),
    ),
    Wrong(
        "38-0-D",
        good() | {B: torch.tensor(1.0)},
        MoleShapeError,
        ("proj_in", "B (up)", "expected a matrix", "shape []"),
    ),
    Wrong("38-1-D", good() | {B: torch.ones(4)}, MoleShapeError, ("proj_in", "expected a matrix", "[4]")),
    Wrong(
        "39-rank-0",
        {A: torch.ones(0, K), B: torch.ones(N, 0)},
        MoleShapeError,
        ("proj_in", "a rank of at least 1", "A [0, 5]"),
    ),
    Wrong(
        "39-no-input",
        {A: torch.ones(R, 0), B: torch.ones(N, R)},
        MoleShapeError,
        ("proj_in", "at least one input", "A [2, 0]"),
    ),
    Wrong(
        "41-nan",
        good() | {A: spoiled(NAN, 3)},
        MoleValueError,
        ("proj_in", "A (down)", "3 NaN and 0 Inf among 10"),
    ),
    Wrong("41-inf", good() | {A: spoiled(-INF, 2)}, MoleValueError, ("proj_in", "0 NaN and 2 Inf")),
    Wrong("41-nan-half", good() | {A: spoiled(NAN, 1).half()}, MoleValueError, ("1 NaN and 0 Inf",)),
    Wrong(
        "41-nan-f8", good() | {A: spoiled(NAN, 1).to(torch.float8_e5m2)}, MoleValueError, ("1 NaN and 0 Inf",)
    ),
    Wrong(
        "43-alpha-nan",
        kohya(alpha=torch.tensor(NAN)),
        MoleValueError,
        (f"'{KOHYA}.alpha'", "a finite alpha", "nan"),
    ),
    Wrong(
        "43-alpha-inf",
        kohya(alpha=torch.tensor(INF)),
        MoleValueError,
        (f"'{KOHYA}.alpha'", "a finite alpha", "inf"),
    ),
    Wrong(
        "43-alpha-vector",
        kohya(alpha=torch.ones(2)),
        MoleShapeError,
        (f"'{KOHYA}.alpha'", "a scalar alpha", "[2]"),
    ),
    Wrong(
        "47-kohya-and-diffusers",
        good() | kohya(),
        MoleKeyError,
        (A, f"'{KOHYA}.lora_down.weight'", "both name the A (down)"),
    ),
    Wrong(
        "47-two-adapter-names",
        {A.replace("A.", f"A.{n}."): torch.ones(R, K) for n in "xy"},
        MoleKeyError,
        ("A.x.weight", "A.y.weight", "both name"),
    ),
    Wrong(
        "47-old-and-new",
        with_key(A.replace("lora_A", "lora.down")),
        MoleKeyError,
        ("both name the A (down)",),
    ),
    Wrong(
        "48-loha", {f"{KOHYA}.hada_w1_a": torch.ones(2, 2)}, MoleKeyError, ("no w1_b of LoHa", "hada_w1_a")
    ),
    Wrong(
        "48-core-of-another-rank",
        kohya(lora_mid__weight=torch.ones(3, 2, 3, 3)),
        MoleShapeError,
        ("lora_mid", "[3, 2, 3, 3]"),
    ),
    Wrong("48-ia3", kohya(on_input=torch.tensor(1.0)), MoleKeyError, ("IA3",)),
    Wrong("48-boft", with_key("unet.x.boft_R"), MoleKeyError, ("BOFT",)),
    Wrong("48-vera", with_key("unet.x.vera_lambda_b"), MoleKeyError, ("VeRA",)),
    Wrong("48-glora", kohya(a1__weight=torch.ones(2, 2)), MoleKeyError, ("GLoRA",)),
    Wrong("48-scalar", kohya(scalar=torch.tensor(1.0)), MoleKeyError, ("LyCORIS scalar",)),
    Wrong("48-sparse-bias", kohya(bias_indices=torch.ones(2)), MoleKeyError, ("sparse bias",)),
    Wrong(
        "48-control",
        with_key("double_blocks.0.img_attn.norm.query_norm.scale"),
        MoleKeyError,
        ("full weights of a norm",),
    ),
    Wrong("48-full-difference", kohya(diff=torch.ones(2, 2)), MoleKeyError, ("full weight difference",)),
    Wrong("48-norm", kohya(w_norm=torch.ones(2)), MoleKeyError, ("of a norm",)),
    Wrong("48-embedding", with_key("bundle_emb.x.string_to_param.*"), MoleKeyError, ("an embedding",)),
    Wrong("48-concept", with_key("new_concept_embedding.<potter1>"), MoleKeyError, ("an embedding",)),
    Wrong(
        "37-the-kernel-is-in-B",
        {A: torch.ones(R, K, 1, 1), B: torch.ones(N, R, 3, 3)},
        MoleShapeError,
        ("mid_block.attentions.0.proj_in", "B (up)", "3x3 convolution", "the kernel is A's"),
    ),
    Wrong(
        "37-two-kernels",
        {A: torch.ones(R, K, 3, 3), B: torch.ones(N, R, 1, 3)},
        MoleShapeError,
        ("B (up)", "1x3 convolution"),
    ),
    Wrong(
        "gate-file",
        {"moe_lora_unet_x.softmoe.Phi_1.weight": torch.ones(2, 3)},
        MoleKeyError,
        ("this is a gate file",),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("form", ["file", "mapping"])
def test_wrong_tensors_are_refused_by_name(case: Wrong, form: str, tmp_path: Path):
    source = tmp_path / "x.safetensors"
    save_file(case.tensors, source)
    with pytest.raises(case.error) as caught:
        load_expert(source if form == "file" else case.tensors)
    text = str(caught.value)
    assert [
        word for word in (*case.words, str(source) if form == "file" else "state dict") if word not in text
    ] == [], text


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64])
def test_44_dtype(dtype: torch.dtype):
    with pytest.raises(MoleTypeError, match="expected dtype F64"):
        load_expert(good() | {A: torch.ones(R, K).to(dtype)})


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_44_dtype_of_alpha(dtype: torch.dtype):
    with pytest.raises(MoleTypeError, match="alpha of dtype"):
        load_expert(kohya(alpha=torch.ones((), dtype=dtype)))


def test_43_alpha_zero_warns_once_and_switches_off():
    other = {
        key.replace("proj_in", "proj_out"): tensor for key, tensor in kohya(alpha=torch.tensor(0.0)).items()
    }
    with pytest.warns(MoleWarning, match="alpha is 0 on 2 layers") as caught:
        expert = load_expert(kohya(alpha=torch.tensor(0.0)) | other)
    assert len(caught) == 1
    assert expert.scales() == {0.0}


def test_42_overflow_on_the_cast(tmp_path: Path):
    expert = load_expert({A: torch.full((R, K), 65_536.0), B: torch.ones(N, R)})
    path = tmp_path / "x.safetensors"
    for act in (
        lambda: save_expert(expert, path, dtype=torch.float16),
        lambda: expert.layers["unet.mid_block.attentions.0.proj_in"].to(torch.float16),
        lambda: ExpertBank({"x": expert}).pack("unet.mid_block.attentions.0.proj_in", torch.float16),
    ):
        with pytest.raises(MoleValueError, match=r"65536 overflows in torch\.float16"):
            act()
    assert not path.exists()
    save_expert(expert, path, dtype=torch.bfloat16)
    assert load_expert(path).norm() == pytest.approx(expert.norm())


@pytest.mark.parametrize(
    "key",
    ["\x1b]0;owned\x07", "a\nb: ok", "\u202egnp", "<script>", "../../etc/passwd", "__proto__", "%s%n{0}"],
)
def test_49_hostile_key_text_is_shown_escaped(key: str):
    with pytest.raises(MoleKeyError) as caught:
        load_expert(good() | {key: torch.ones(1)})
    text = str(caught.value)
    assert all(line.isprintable() for line in text.splitlines())
    assert len(text.splitlines()) == 2
    assert key.encode("unicode_escape").decode() in text or key in text


@pytest.mark.parametrize("tensors", [{1: torch.ones(1)}, {A: [1.0]}, {A: None}, {"x.alpha": "1"}], ids=str)
def test_mapping_of_wrong_types(tensors: dict):
    with pytest.raises(MoleTypeError, match="a tensor under a str"):
        load_expert(tensors)


@pytest.mark.parametrize("source", [None, 3, [A]], ids=str)
def test_source_of_wrong_type(source: object):
    with pytest.raises(MoleTypeError, match="a path or a mapping"):
        load_expert(source)  # type: ignore[arg-type]


def config(**fields: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})}


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (config(use_qalora=True, r=R), "QALoRA, which is not supported"),
        (config(r=R, alpha_pattern={"(a+)+$": 1.0}), "is a regular expression"),
        (config(r=R, alpha_pattern=[1]), "alpha_pattern as a JSON object"),
        (config(r="2"), "r as a whole number"),
        (config(r=7), "say rank 7, the tensors have rank 2"),
        (config(r=R, lora_alpha="4"), "a number as alpha"),
        (config(r=R, lora_alpha=[4]), "a number as alpha"),
        (config(r=R, lora_alpha=True), "a number as alpha"),
        ({"lora_adapter_metadata": "[1]"}, "a JSON object"),
        ({"lora_adapter_metadata": "{"}, "not JSON"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": NaN}'}, "NaN is not JSON"),
        ({"lora_adapter_metadata": '{"unet.lora_alpha": 1e999}'}, "a finite alpha"),
        ({"lora_adapter_metadata": "[" * 30_000}, "nested too deep|not JSON"),
        ({"lora_adapter_metadata": '{"unet.r": 1, "unet.r": 2}'}, "occurs twice"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_48_peft_metadata_that_cannot_be_right(metadata: dict[str, str], words: str, tmp_path: Path):
    save_file(good(), tmp_path / "x.safetensors", metadata)
    with pytest.raises(MoleError, match=words) as caught:
        load_expert(tmp_path / "x.safetensors")
    assert str(tmp_path / "x.safetensors") in str(caught.value)


def test_alpha_keys_beside_peft_metadata(tmp_path: Path):
    alpha = A.replace("lora_A.weight", "alpha")
    save_file(good() | {alpha: torch.tensor(1.0)}, tmp_path / "x.safetensors", config(r=R, lora_alpha=4))
    with pytest.raises(MoleKeyError, match="both alpha keys and PEFT metadata"):
        load_expert(tmp_path / "x.safetensors")


def test_good_files_raise_no_warning(tmp_path: Path):
    save_file(good(), tmp_path / "x.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_expert(tmp_path / "x.safetensors")
