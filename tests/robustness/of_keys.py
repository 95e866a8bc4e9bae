"""Cases 31 to 50: keys and tensors of a LoRA file, each given to `patch` and to `Handle.swap`."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from mole_kernels.errors import MoleKeyError, MoleShapeError, MoleValueError, MoleWarning
from mole_kernels.experts.lowrank import Expert, LowRank
from mole_kernels.files.reader import read_tensors
from mole_kernels.patching.apply import patch
from tests.io import test_bad_keys as there
from tests.raw import entry, raw, write
from tests.robustness.cases import Case, Ground
from tests.robustness.of_files import factors

KEYS, PLAN = "tests/io/test_bad_keys.py::", "tests/patching/test_plan.py::"
SAYS = {
    31: "no key matches",
    32: "some keys unmatched",
    33: "A without B",
    34: "B without A",
    35: "ranks of A and B differ",
    36: "in or out size differs",
    37: "3-D A",
    38: "0-D weight",
    39: "rank 0",
    40: "rank above the layer's size",
    41: "NaN or Inf",
    42: "overflow on the cast to fp16",
    43: "alpha NaN, Inf or a vector (zero: a warning)",
    46: "unaligned storage",
    47: "two dialects naming one layer",
    48: "DoRA, LoKr or bias keys",
    49: "hostile key text",
    50: "conv LoRA on a linear layer",
}


def wrong(case: there.Wrong) -> Case:
    deeper = (KEYS + "test_wrong_tensors_are_refused_by_name",)
    return Case(
        case.id,
        SAYS[int(case.id[:2])],
        source=lambda g: case.tensors,
        error=case.error,
        words=case.words,
        deeper=deeper,
    )


WRONG = [wrong(case) for case in there.CASES if case.id[:2].isdigit()]


def unmatched_listed(g: Ground) -> None:
    with pytest.warns(MoleWarning, match="secend"):
        handle = patch(g.model, {"a": factors() | factors("secend", 10, 5)}, strict=False)
    assert list(handle.layers) == ["first"]
    handle.remove()


def overflowing(g: Ground) -> dict[str, Tensor]:
    return {key: tensor * 65_536 for key, tensor in factors().items()}


def alpha_zero(g: Ground) -> None:
    tensors = {
        f"lora_unet_first.{half}.weight": t for half, t in zip(("lora_down", "lora_up"), factors().values())
    }
    before = g.forward()
    with pytest.warns(MoleWarning, match="alpha is 0 on 1 layers"):
        handle = patch(g.model, {"a": tensors | {"lora_unet_first.alpha": torch.tensor(0.0)}})
    assert torch.equal(g.forward(), before)
    handle.remove()


def unaligned(g: Ground) -> None:
    tensors = {"first.lora_A.weight": torch.randn(1, 6), "first.lora_B.weight": torch.randn(10, 1)}
    data = b"\x38" + b"".join(t.numpy().tobytes() for t in tensors.values())
    header = {"pad": entry((1,), 0, 1, "F8_E4M3")}
    for (key, tensor), begin in zip(tensors.items(), (1, 25)):
        header[key] = entry(tuple(tensor.shape), begin, begin + 4 * tensor.numel())
    found, _ = read_tensors(write(g.folder, raw(header, data)), keys=list(tensors))
    assert all(
        found[key].data_ptr() % 16 == 0 and torch.equal(found[key], tensor) for key, tensor in tensors.items()
    )
    patch(g.model, {"a": found}).remove()


def good_passes_silently(g: Ground) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch(g.model, {"a": factors()}).remove()


def source(
    id: str, make, error: type[BaseException], *words: str, deeper: str = "", prepare=lambda g: None
) -> Case:
    return Case(
        id,
        SAYS[int(id[:2])],
        source=make,
        error=error,
        words=words,
        prepare=prepare,
        deeper=(deeper,) if deeper else (),
    )


def half(g: Ground) -> None:
    g.model.half()


KEY_CASES = [
    source(
        "31-of-another-model",
        lambda g: factors("transformer.blocks.0.attn.to_q"),
        MoleKeyError,
        "none of its 1 layers",
        deeper=PLAN + "test_31_no_key_matches_is_always_an_error",
    ),
    source(
        "32-strict",
        lambda g: factors() | factors("secend", 10, 5),
        MoleKeyError,
        "1 of",
        "2 layers",
        "secend",
        deeper=PLAN + "test_32_some_keys_unmatched",
    ),
    Case(
        "32-not-strict",
        SAYS[32],
        act=unmatched_listed,
        outcome="with `strict=False` a `MoleWarning`, and listed in `plan.unmatched`",
    ),
    source(
        "36-in",
        lambda g: factors(K=7),
        MoleShapeError,
        "first",
        "down [R,6]",
        "down [2, 7]",
        deeper=PLAN + "test_36_sizes_that_do_not_fit",
    ),
    source("36-out", lambda g: factors(N=9), MoleShapeError, "first", "up [10,R]", "up [9, 2]"),
    source(
        "40-rank",
        lambda g: factors(rank=7),
        MoleShapeError,
        "a rank of at most min(K, N) = 6",
        "got 7",
        deeper=PLAN + "test_40_rank_above_the_layers_size",
    ),
    source(
        "42-overflow",
        overflowing,
        MoleValueError,
        "first",
        "do not fit the layer's float16",
        prepare=half,
        deeper=KEYS + "test_42_overflow_on_the_cast",
    ),
    Case(
        "43-alpha-zero",
        SAYS[43],
        act=alpha_zero,
        outcome="`MoleWarning`: alpha is 0; the layer computes as the base",
        deeper=(KEYS + "test_43_alpha_zero_warns_once_and_switches_off",),
    ),
    Case(
        "46-unaligned",
        SAYS[46],
        act=unaligned,
        outcome="accepted, copied to aligned memory",
        deeper=("tests/files/test_bad_files.py::test_46_unaligned_tensors_are_copied_to_aligned_memory",),
    ),
    *(
        source(
            f"49-text-{i}",
            lambda g, key=key: factors() | {key: torch.ones(1)},
            MoleKeyError,
            "not LoRA keys",
            deeper=KEYS + "test_49_hostile_key_text_is_shown_escaped",
        )
        for i, key in enumerate(("\x1b]0;owned\x07", "a\nb: ok", "<script>", "../../etc/passwd", "%s%n{0}"))
    ),
    source(
        "50-linear",
        lambda g: Expert({"first": LowRank(torch.ones(2, 6), torch.ones(10, 2), conv=True)}),
        MoleShapeError,
        "factors of a linear layer",
        "of a convolution",
        deeper=PLAN + "test_50_convolution_factors_on_a_linear_layer",
    ),
]

CASES = WRONG + KEY_CASES
