"""Triton's interpreter made right: a kernel runs on a CPU as on a GPU, or the fault is named.

What is added to `triton.runtime.interpreter` (import this after TRITON_INTERPRET=1 and before the kernels):
- bf16 multiplies values, not bit patterns; arithmetic on bf16 outside a dot is refused; tf32 dots round their
  operands
- every lane must stay inside the tensors that were passed, gaps between the rows of a view included
- masked lanes without `other` read poison (NaN, or the largest integer)
- programs start in a shuffled order and are interleaved at every atomic, at most `resident` of them at a time
- races between programs, with happens-before from release and acquire: a store counts as released only if a
  barrier lies
  between it and the release, as on a GPU
- a program that spins with nobody left to release it is a deadlock
- bytes read, bytes written, distinct bytes, floating point operations of dots and atomics are counted

`run(...)` is a context: `with run(seed=3, resident=2) as counts: kernel[grid](...)`.
It leans on Triton's internals; `test_interpreter.py` runs first and shows that each check catches a planted
fault.
"""

from __future__ import annotations

import contextlib
import inspect

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as I

from tests.kernels.programs import Bounds, Counts, Deadlock, Launch, Race

__all__ = ["Bounds", "Counts", "Deadlock", "Launch", "Race", "run"]

Builder = I.InterpreterBuilder


class _Settings:
    """What `run` set for the launches inside it; `launch` is the one in progress."""

    seed, resident, counts = 0, 1, Counts()
    launch: Launch | None = None


@contextlib.contextmanager
def run(seed: int = 0, resident: int = 1):
    """Launches inside are shuffled by `seed`, at most `resident` programs at a time; yields their Counts."""
    before = _Settings.seed, _Settings.resident, _Settings.counts
    _Settings.seed, _Settings.resident, _Settings.counts = seed, resident, Counts()
    try:
        yield _Settings.counts
    finally:
        _Settings.seed, _Settings.resident, _Settings.counts = before


# ---- bf16 and dots


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> bf16 bit patterns, rounded to nearest even."""
    t = torch.from_numpy(np.array(values, dtype=np.float32)).bfloat16().view(torch.int16)
    return t.numpy().view(np.uint16).reshape(values.shape)


def bf16_values(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded to tf32's ten bits of mantissa."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return (
        np.where(finite, (bits + 0x0FFF + ((bits >> 13) & 1)) & np.uint32(0xFFFFE000), bits)
        .astype(np.uint32)
        .view(np.float32)
    )


_cast_impl, _fp_to_fp, _dot = Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot


def _cast(self, src, dst_type):
    s, d = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 in (s, d) and s != d:
        wide = bf16_values(src.data) if s == tl.bfloat16 else src.data
        return I.TensorHandle(bf16_bits(wide) if d == tl.bfloat16 else wide.astype(I._get_np_dtype(d)), d)
    return _cast_impl(self, src, dst_type)


def _convert(self, src, dst_type, rounding):
    if min(src.dtype.scalar.primitive_bitwidth, dst_type.scalar.primitive_bitwidth) >= 16:
        return _cast(self, src, dst_type)
    return _fp_to_fp(self, src, dst_type, rounding)


def _checked_dot(self, a, b, d, precision, imprecise):
    if a.dtype.scalar != b.dtype.scalar:
        raise TypeError(f"dot of {a.dtype} and {b.dtype}")
    rows, inner, columns = a.data.shape[-2], a.data.shape[-1], b.data.shape[-1]
    if min(rows, inner, columns) < 16:
        raise TypeError(f"dot of {rows}x{inner} and {inner}x{columns}: below 16 on some GPU")
    _Settings.counts.flops += 2 * rows * inner * columns

    def operand(h):
        data = bf16_values(h.data) if h.dtype.scalar == tl.bfloat16 else h.data
        data = data.astype(np.float32) if data.dtype == np.float16 else data
        return tf32(data) if h.dtype.scalar == tl.float32 and precision == ir.INPUT_PRECISION.TF32 else data

    with np.errstate(all="ignore"):
        return I.TensorHandle(np.matmul(operand(a), operand(b), dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _refuse_bf16(name: str):
    original = getattr(Builder, name)

    def op(self, *args):
        if any(isinstance(a, I.TensorHandle) and a.dtype.scalar == tl.bfloat16 for a in args):
            raise TypeError(f"{name} on bf16: cast to float32 first, the interpreter computes on its bits")
        with np.errstate(all="ignore"):
            return original(self, *args)

    return op


# ---- memory


# what follows a value or a mask differs between versions of Triton and means nothing here: passed on as it
# came


def _load(self, ptrs, mask, other, *rest, **named):
    mask = _as_handle(mask)
    element = ptrs.get_element_ty()
    kind = I._get_np_dtype(element)
    if _Settings.launch is not None:
        _Settings.launch.touch(ptrs.data, mask.data, kind.itemsize, "read")
    if other is None:
        poison = (
            0xFFFF
            if element == tl.bfloat16
            else np.nan
            if kind.kind == "f"
            else True
            if kind.kind == "b"
            else np.iinfo(kind).max
        )
        other = I.TensorHandle(np.full(ptrs.data.shape, poison, kind), element)
    return _masked_load(self, ptrs, mask, other, *rest, **named)


def _as_handle(mask):
    # a descriptor's mask comes as a bare array
    return I.TensorHandle(mask, tl.int1) if isinstance(mask, np.ndarray) else mask


def _store(self, ptrs, value, mask, *rest, **named):
    mask = _as_handle(mask)
    if _Settings.launch is not None:
        _Settings.launch.touch(ptrs.data, mask.data, I._get_np_dtype(ptrs.get_element_ty()).itemsize, "write")
    return _masked_store(self, ptrs, value, mask, *rest, **named)


def _rmw(self, op, ptr, val, mask, sem, scope):
    launch = _Settings.launch
    if launch is None:
        return _atomic_rmw(self, op, ptr, val, mask, sem, scope)

    def change():
        launch.touch(ptr.data, mask.data, I._get_np_dtype(ptr.get_element_ty()).itemsize, "atomic")
        return _atomic_rmw(self, op, ptr, val, mask, sem, scope)

    return launch.atomic(ptr.data, mask.data, sem, change)


def _barrier(self):
    if _Settings.launch is not None:
        _Settings.launch.barrier()


# ---- launches


def _tensors_of(values) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for v in values:
        if isinstance(v, (tuple, list)):
            found += _tensors_of(v)
        elif hasattr(v, "block_shape"):
            found.append(v.base)
        elif isinstance(v, torch.Tensor):
            found.append(v)
    return found


def _execute(self, *args, **kwargs):
    """GridExecutor.__call__ with the checks; tensors are on the CPU already, so nothing is copied."""
    kwargs = {k: v for k, v in kwargs.items() if k in self.arg_names}
    # Triton's own device functions (tl.sum, tl.sigmoid) see the language as tl.core
    scopes = [I._patch_lang(self.fn), I._patch_lang(tl.standard.sum.fn)]
    try:
        named = inspect.getcallargs(self.fn, *args, **kwargs)
        cast = {name: v if name in self.constexprs else I._implicit_cvt(v) for name, v in named.items()}
        grid = tuple(self.grid(cast) if callable(self.grid) else self.grid)
        grid = grid + (1,) * (3 - len(grid))
        builder = I.interpreter_builder
        builder.set_grid_dim(*grid)
        launch = Launch(
            grid, _tensors_of(named.values()), _Settings.counts, _Settings.seed, _Settings.resident
        )
        _Settings.counts.launches += 1
        _Settings.counts.names.append(self.fn.__name__)

        def body(program):
            builder.set_grid_idx(*program)
            self.fn(**cast)

        _Settings.launch = launch
        try:
            launch.run(body)
        except I.InterpreterError as e:
            raise _root(e) from e
    finally:
        _Settings.launch = None
        for scope in reversed(scopes):
            scope.restore()


def _root(e: BaseException) -> BaseException:
    """The first cause: Triton wraps a device function's exception once for every call level."""
    while isinstance(e, I.InterpreterError) and e.__cause__ is not None:
        e = e.__cause__
    return e


def _device_call(self, *args, **kwargs):
    # as shipped, every call of a device function patches the language anew and never undoes it; inside a
    # launch it is patched
    return (
        self.rewrite()(*args, **kwargs)
        if _Settings.launch is not None
        else _device_function(self, *args, **kwargs)
    )


_masked_load, _masked_store, _atomic_rmw = (
    Builder.create_masked_load,
    Builder.create_masked_store,
    Builder.create_atomic_rmw,
)
_device_function = I.InterpretedFunction.__call__


def install() -> None:
    """Replace the interpreter's methods, once."""
    if getattr(Builder, "made_right", False):
        return
    Builder.made_right = True
    Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = _cast, _convert, _checked_dot
    arithmetic = "fadd fsub fmul fdiv precise_divf frem maxnumf minnumf maximumf minimumf exp exp2 log log2 sqrt rsqrt fma fabs floor"
    comparisons = [f"fcmp{order}{c}" for order in "OU" for c in ("LT", "GT", "LE", "GE", "EQ", "NE")]
    for name in (*arithmetic.split(), *comparisons):
        if hasattr(Builder, f"create_{name}"):
            setattr(Builder, f"create_{name}", _refuse_bf16(f"create_{name}"))
    Builder.create_masked_load, Builder.create_masked_store = _load, _store
    Builder.create_atomic_rmw, Builder.create_barrier = _rmw, _barrier
    I.GridExecutor.__call__ = _execute
    I.InterpretedFunction.__call__ = _device_call


install()
