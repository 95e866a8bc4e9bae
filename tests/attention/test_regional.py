"""Regional attention against a loop over places, on every backend; the kernel in the interpreter, races and
bounds watched.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from mole_kernels.attention.regional import regional_attention
from mole_kernels.errors import MoleBackendError, MoleShapeError, MoleTypeError, MoleValueError
from mole_kernels.methods.mix_of_show.regions import Region, shares

BOXES = {
    "none": [],
    "one": [(0, 0, 0.5, 0.5)],
    "nested": [(0, 0, 1, 1), (0.25, 0.25, 0.75, 0.75)],
    "overlapping": [(0, 0, 0.75, 0.75), (0.25, 0.25, 1, 1), (0.5, 0, 1, 1)],
    "touching": [(0, 0, 1, 0.5), (0, 0.5, 1, 1)],
    "thin": [(0, 0, 0.01, 1)],
}


@dataclass(frozen=True)
class Case:
    boxes: str = "overlapping"
    B: int = 2
    H: int = 2
    size: tuple[int, int] = (6, 8)
    L: int = 5
    D: int = 8
    overlap: str = "mean"
    lengths: bool = False

    def __str__(self) -> str:
        return f"{self.boxes}-B{self.B}H{self.H}{self.size[0]}x{self.size[1]}L{self.L}D{self.D}-{self.overlap}{'-lengths' * self.lengths}"

    def make(self, dtype=torch.float32):
        g = torch.Generator().manual_seed(0)
        T, S = self.size[0] * self.size[1], len(BOXES[self.boxes]) + 1
        q = torch.randn(self.B, T, self.H, self.D, generator=g).transpose(1, 2).to(dtype)
        k, v = (torch.randn(self.B, S, self.H, self.L, self.D, generator=g).to(dtype) for _ in "kv")
        table = shares([Region("x", box=box) for box in BOXES[self.boxes]], *self.size, overlap=self.overlap)
        lengths = torch.randint(1, self.L + 1, (self.B, S), generator=g) if self.lengths else None
        return q, k, v, table.expand(self.B, -1, -1), lengths


CASES = [Case(boxes) for boxes in BOXES] + [
    Case(overlap="overwrite"),
    Case(lengths=True),
    Case("touching", B=1, H=3, size=(5, 7), L=77, D=40),
    Case("one", D=3, L=1),
]


def place_by_place(q, k, v, w, lengths) -> torch.Tensor:
    """A softmax for each place, head and covering region, in float64."""
    q, k, v, w = (t.double() for t in (q, k, v, w))
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for p in range(q.shape[2]):
                for s in range(k.shape[1]):
                    n = k.shape[3] if lengths is None else int(lengths[b, s])
                    if w[b, s, p]:
                        a = torch.softmax(k[b, s, h, :n] @ q[b, h, p] / math.sqrt(q.shape[3]), 0)
                        out[b, h, p] += w[b, s, p] * (a @ v[b, s, h, :n])
    return out


def run_kernel(*args, **tiles):
    from mole_kernels.kernels.triton.regional import launch
    from tests.kernels.interpreter import run
    from tests.kernels.support import poisoned

    q, k, v, w, lengths = args
    with run(seed=3, resident=2), poisoned():
        return launch(
            q, k, v, w.contiguous(), None if lengths is None else lengths.int(), q.shape[-1] ** -0.5, **tiles
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_against_the_loop(case):
    args = case.make()
    want = place_by_place(*args)
    for backend in ("reference", "gathered", "auto"):
        torch.testing.assert_close(
            regional_attention(*args, backend=backend).double(), want, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_against_the_loop(case, dtype):
    pytest.importorskip("triton", reason="the kernel needs Triton")
    args = case.make(dtype)
    got = run_kernel(*args, BM=16, BL=32)
    want = place_by_place(*args)
    assert got.dtype == dtype and got.shape == want.shape
    # p is rounded once before its product with v, and y once
    limit = {
        torch.float32: 2e-6,
        torch.bfloat16: 1.25 * math.sqrt(2) * 2**-8,
        torch.float16: 1.25 * math.sqrt(2) * 2**-11,
    }[dtype]
    assert (got.double() - want).norm() <= limit * want.norm()
    assert (
        (got.double() - want).norm(dim=-1)
        <= 4 * limit * want.norm(dim=-1).clamp_min(want.norm() / want[..., 0].numel() ** 0.5)
    ).all()


def test_what_does_not_cover_does_not_leak():
    """NaN in the texts of a region reaches the places it covers and no other; NaN in a share too."""
    pytest.importorskip("triton", reason="the kernel needs Triton")
    q, k, v, w, lengths = Case("touching").make()
    v[:, 2], k[:, 0] = torch.nan, torch.nan
    for y in (regional_attention(q, k, v, w), run_kernel(q, k, v, w, lengths, BM=16)):
        nan = y.isnan().any(-1)
        assert torch.equal(nan, (w[:, None, 2] != 0).expand_as(nan)) and nan.any() and not nan.all()
    q, k, v, w, lengths = Case("touching").make()
    w = w.clone()
    w[0, 1, 3] = torch.nan
    for y in (regional_attention(q, k, v, w), run_kernel(q, k, v, w, lengths, BM=16)):
        assert y[0, :, 3].isnan().all() and y.isnan().sum() == y[0, :, 3].numel()


def test_one_prompt_everywhere_is_plain_attention():
    q, k, v, _, _ = Case("touching").make()
    same_k, same_v = k[:, :1].expand_as(k), v[:, :1].expand_as(v)
    _, _, _, w, _ = Case("touching").make()
    want = torch.nn.functional.scaled_dot_product_attention(q, k[:, 0], v[:, 0])
    torch.testing.assert_close(regional_attention(q, same_k, same_v, w), want, rtol=1e-5, atol=1e-6)


def test_shares_may_differ_by_sample():
    case = Case()
    q, k, v, w, _ = case.make()
    w = w.clone()
    w[1] = w[1].flip(0)
    torch.testing.assert_close(
        regional_attention(q, k, v, w).double(), place_by_place(q, k, v, w, None), rtol=1e-5, atol=1e-5
    )


def test_gradients_flow_through_the_gathered_way():
    q, k, v, w, _ = (
        t.double() if t is not None else None for t in Case("overlapping", B=1, size=(2, 4), D=3).make()
    )
    q, k, v = (t.detach().clone().requires_grad_() for t in (q, k, v))
    assert torch.autograd.gradcheck(lambda *t: regional_attention(*t, w), (q, k, v))


@pytest.mark.parametrize(
    "change, error, words",
    [
        (dict(k=torch.ones(2, 4, 2, 5, 9)), MoleShapeError, r"k \[B,S,H,L,D\] = \[2, S, 2, L, 8\]"),
        (dict(v=torch.ones(2, 4, 2, 6, 8)), MoleShapeError, "v of k's shape"),
        (dict(shares=torch.ones(2, 3, 48)), MoleShapeError, r"shares \[B,S,T\] = \[2, 4, 48\]"),
        (dict(shares=torch.ones(2, 4, 48, dtype=torch.int64)), MoleShapeError, "floating"),
        (dict(q=torch.ones(2, 2, 48)), MoleShapeError, r"q \[B,H,T,D\]"),
        (dict(q=torch.ones(2, 2, 48, 8, dtype=torch.float64)), MoleTypeError, "one dtype"),
        (dict(k=torch.ones(2, 4, 2, 5, 8, device="meta")), MoleTypeError, "k on q's device cpu"),
        (dict(lengths=torch.zeros(2, 4, dtype=torch.int64)), MoleValueError, "between 1 and L = 5"),
        (dict(lengths=torch.ones(2, 3, dtype=torch.int64)), MoleShapeError, r"lengths \[B,S\]"),
        (dict(backend="warp"), MoleValueError, "'auto' or one of triton"),
        (dict(backend="triton"), MoleBackendError, "CUDA devices only"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    q, k, v, w, lengths = Case().make()
    given = dict(q=q, k=k, v=v, shares=w, lengths=lengths) | change
    with pytest.raises(error, match=words):
        regional_attention(**given)
