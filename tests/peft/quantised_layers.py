"""One PEFT layer with two adapters over a base that each of the four packages quantised; all of them compute
on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

K, N = 64, 96
# diffusers imports these two wherever they are installed: a second more for every process, warnings, and
# bitsandbytes asks the model hub
BESIDE = "bitsandbytes and torchao are kept out of the environment: make quantised-tests runs with them"


@dataclass(frozen=True)
class Quantised:
    """package: what must be installed; kind: its word for the format; dtype: of the input."""

    package: str
    kind: str
    dtype: torch.dtype
    layer: str
    base: str

    def __str__(self) -> str:
        return f"{self.package}-{self.kind}-{str(self.dtype).removeprefix('torch.')}"


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
BNB8, BNB4 = ("Linear8bitLt", "bitsandbytes.Linear8bitLt"), ("Linear4bit", "bitsandbytes.Linear4bit")
AO8, AO_FP8 = ("TorchaoLoraLinear", "torchao.Int8Tensor"), ("TorchaoLoraLinear", "torchao.Float8Tensor")
QUANTO, GGUF = ("Linear", "optimum.QLinear"), ("Linear", "diffusers.GGUFLinear")
CASES = [
    *(Quantised("bitsandbytes", "8", dtype, *BNB8) for dtype in (F32, BF16, F16)),
    *(Quantised("bitsandbytes", kind, dtype, *BNB4) for kind in ("nf4", "fp4") for dtype in (F32, BF16)),
    *(Quantised("torchao", "Int8WeightOnlyConfig", dtype, *AO8) for dtype in (F32, BF16)),
    *(Quantised("torchao", "Float8WeightOnlyConfig", dtype, *AO_FP8) for dtype in (F32, BF16)),
    Quantised("torchao", "Int8DynamicActivationInt8WeightConfig", BF16, *AO8),
    *(
        Quantised("optimum.quanto", kind, dtype, *QUANTO)
        for kind in ("qint8", "qint4", "qfloat8")
        for dtype in (F32, BF16)
    ),
    *(
        Quantised("gguf", kind, dtype, *GGUF)
        for kind in ("Q8_0", "Q4_0", "Q5_1", "BF16")
        for dtype in (F32, BF16)
    ),
]
# one of each of PEFT's classes and of each package
FEW = [
    case
    for case in CASES
    if (case.kind, case.dtype)
    in (("8", BF16), ("nf4", F32), ("Int8WeightOnlyConfig", F32), ("qint8", F32), ("Q8_0", F32))
]


def quantised(case: Quantised) -> nn.Module:
    """nn.Sequential of one linear layer, quantised."""
    pytest.importorskip(case.package, reason=f"{case.package} is not installed; {BESIDE}")
    torch.manual_seed(0)
    linear = nn.Linear(K, N).to(case.dtype).requires_grad_(False)
    return {
        "bitsandbytes": by_bitsandbytes,
        "torchao": by_torchao,
        "optimum.quanto": by_quanto,
        "gguf": by_gguf,
    }[case.package](linear, case)


def by_bitsandbytes(linear: nn.Linear, case: Quantised) -> nn.Module:
    import bitsandbytes as bnb

    if case.kind == "8":
        made: Any = bnb.nn.Linear8bitLt(K, N, has_fp16_weights=False)
    else:
        made = bnb.nn.Linear4bit(K, N, compute_dtype=case.dtype, quant_type=case.kind)
    made.load_state_dict(linear.state_dict())
    model: Any = nn.Sequential(made.to("cpu"))
    model.is_loaded_in_8bit, model.is_loaded_in_4bit = case.kind == "8", case.kind != "8"
    return model


def by_torchao(linear: nn.Linear, case: Quantised) -> nn.Module:
    from torchao import quantization

    model = nn.Sequential(linear)
    quantization.quantize_(model, getattr(quantization, case.kind)())
    return model


def by_quanto(linear: nn.Linear, case: Quantised) -> nn.Module:
    from optimum import quanto

    model = nn.Sequential(linear)
    quanto.quantize(model, weights=getattr(quanto, case.kind))
    quanto.freeze(model)
    return model


def by_gguf(linear: nn.Linear, case: Quantised) -> nn.Module:
    """As diffusers loads it: GGUFLinear over a GGUFParameter of packed bytes."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType[case.kind]
    packed = torch.from_numpy(gguf.quantize(linear.weight.float().numpy(), kind).copy())
    made = GGUFLinear(K, N, bias=True, compute_dtype=case.dtype)
    made.weight = GGUFParameter(packed, quant_type=kind)
    made.bias = linear.bias
    return nn.Sequential(made)


def with_adapters(model: Any, dtype: torch.dtype, ranks: tuple[int, ...] = (4, 2), **config: Any) -> Any:
    import peft

    for i, rank in enumerate(ranks):
        made = peft.LoraConfig(
            r=rank,
            lora_alpha=rank * (0.3 + 0.25 * i),
            target_modules=["0"],
            init_lora_weights=False,
            **config,
        )
        model = peft.inject_adapter_in_model(made, model, f"a{i}")
    model[0].set_adapter([f"a{i}" for i in range(len(ranks))])
    return model


def twins(case: Quantised, **config: Any) -> tuple[Any, Any]:
    """The same quantised layer twice, one of them to be accelerated; made twice, since not every quantised
    weight can be copied.
    """
    first, second = (with_adapters(quantised(case), case.dtype, **config) for _ in range(2))
    return first, second
