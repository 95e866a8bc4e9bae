"""What the build says of the Hopper kernels, where nvcc compiled them: all are there, none spills, none has
its products serialised.
"""

import importlib.util
from pathlib import Path

import pytest
import torch

from mole_kernels import extension
from mole_kernels.kernels import sm90

ROOT = Path(__file__).resolve().parents[2]
built = pytest.mark.skipif(
    not extension.has_sm90(), reason="the library was built without nvcc or without Hopper"
)

SAID = """\
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to non wgmma instructions defining \
accumulator registers of a wgmma between start and end of the pipeline stage in the function \
'_ZN4mole4sm909recomputeINS_4bf16ELi2ELi192ELi40EEEvNS0_4MapsENS0_6ParamsE'
ptxas info    : Compiling entry function '_ZN4mole4sm909recomputeINS_4bf16ELi2ELi192ELi40EEEvNS0_4MapsENS0_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN4mole4sm909recomputeINS_4bf16ELi2ELi192ELi40EEEvNS0_4MapsENS0_6ParamsE
    464 bytes stack frame, 1272 bytes spill stores, 1000 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers
ptxas info    : Compiling entry function '_ZN4mole6ladder4stepILi2ELi160EEEvN4mole4sm904MapsENS1_6ParamsE' for 'sm_90a'
ptxas info    : Function properties for _ZN4mole6ladder4stepILi2ELi160EEEvN4mole4sm904MapsENS1_6ParamsE
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 166 registers, used 9 barriers
"""


def test_spills_and_serialised_products_are_read_from_the_compilers_words():
    spec = importlib.util.spec_from_file_location("mole_setup", ROOT / "setup.py")
    setup = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    assert setup.ptxas_facts(SAID) == [
        {"kernel": "recompute<bf16, 2, 192, 40>", "registers": 168, "spilled": 2272, "serialized": True},
        {"kernel": "step<bf16, 2, 160>", "registers": 166, "spilled": 0, "serialized": False},
    ]


@built
def test_every_kernel_is_there_and_none_spills():
    found = {kernel["kernel"]: kernel for kernel in extension.describe()["sm90"]}
    for way, shapes in sm90.SHAPES.items():
        for dtype in ("bf16", "fp16"):
            for shape in shapes:
                kernel = found[f"{way}<{dtype}, {', '.join(map(str, shape))}>"]
                assert (
                    kernel["spilled"] == 0 and not kernel["serialized"] and kernel["registers"] in (168, 240)
                )
                assert kernel["shared"] is None or kernel["shared"] <= 232_448
    assert all(
        not kernel["spilled"] and not kernel["serialized"]
        for name, kernel in found.items()
        if name.startswith("step<")
    )


@built
def test_the_operators_say_what_is_wrong_without_a_gpu():
    ops = torch.ops.mole_cuda
    plan, reason = ops.sm90_plan("cluster", [1, 2048, 1280, 1280, 64, 2, 1], True, False, False, False, -1)
    assert plan[:4] == [2, 160, 16, 8] and not reason
    for way in sm90.WAYS[:2]:
        plan, reason = ops.sm90_plan(way, [1, 2048, 640, 1280, 64, 2, 1], True, False, False, True, -1)
        assert tuple(plan[:3]) in sm90.SHAPES[f"{way}_dx"] and not reason
    assert (
        "before the first dX"
        in ops.sm90_plan("cluster", [1, 2048, 1280, 1280, 64, 2, 1], True, True, False, True, -1)[1]
    )
    with pytest.raises(RuntimeError, match="expected way cluster, persistent or recompute, got merge"):
        ops.sm90_plan("merge", [1, 2048, 1280, 1280, 64, 2, 1], True, False, False, False, -1)
    x = torch.zeros(1, 8, 8, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="sm90_forward"):
        ops.sm90_forward(
            x,
            x[0],
            None,
            x,
            x,
            torch.ones(1),
            [8],
            None,
            None,
            None,
            None,
            None,
            None,
            0,
            x,
            None,
            None,
            None,
            None,
            None,
            None,
            "cluster",
            [1, 128, 16, 2],
        )
    with pytest.raises(NotImplementedError, match="sm90_backward"):
        ops.sm90_backward(
            x,
            x[0],
            x,
            x,
            torch.ones(1),
            [8],
            None,
            None,
            None,
            0,
            None,
            None,
            x,
            None,
            None,
            None,
            "cluster",
            [1, 128, 16, 2],
        )
