"""The emulator's fragments, descriptors and swizzles, against the PTX ISA's tables as stated here, in numpy.

Nothing here looks at the C++: shared memory images are laid out by these formulas, and what comes back is
read by them.
"""

import itertools

import numpy as np
import pytest

from tests.emulator.support import build, probe, to_16


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(5)


# ---- PTX ISA, "Register Fragments and Shared Memory Matrix Layouts" of wgmma.m64nNk16


def wgmma_d(d: np.ndarray, n: int) -> np.ndarray:
    """d [thread, register] -> D [64, n]: row 16·warp + lane/4 (+8 for registers 2, 3 of four), eight columns
    to four registers.
    """
    out = np.full((64, n), np.nan)
    for thread, register in itertools.product(range(128), range(n // 2)):
        row = 16 * (thread // 32) + (thread % 32) // 4 + (8 if register % 4 >= 2 else 0)
        column = 8 * (register // 4) + 2 * (thread % 4) + (register & 1)
        out[row, column] = d[thread, register]
    return out


def a_registers(a: np.ndarray) -> np.ndarray:
    """A [64,16] -> [thread, 8]: a0 a1 at row g, columns 2q, 2q+1; a2 a3 at row g+8; a4 a5 at row g, columns
    2q+8…; a6 a7 at row g+8.
    """
    out = np.zeros((128, 8), a.dtype)
    for thread in range(128):
        base, g, q = 16 * (thread // 32), (thread % 32) // 4, thread % 4
        for i in range(8):
            row = base + g + (8 if i in (2, 3, 6, 7) else 0)
            column = 2 * q + (i & 1) + (8 if i >= 4 else 0)
            out[thread, i] = a[row, column]
    return out


# ---- PTX ISA, "Swizzling Modes": lines of 128 bytes, eight pieces of 16 each; which piece holds what


def swizzle_piece(line: int, piece: int, width: int) -> int:
    """A segment of `width` bytes permutes its pieces by the line's number; the pattern repeats after 8·width
    bytes (CUDA guide).
    """
    lines = {128: 8, 64: 4, 32: 2}.get(width, 1)
    return piece ^ (line % lines)


def swizzle_image(plain: np.ndarray, width: int) -> np.ndarray:
    """bytes as they would lie unswizzled -> as they lie swizzled (from a multiple of 1024)."""
    lines = plain.reshape(-1, 8, 16)
    out = np.empty_like(lines)
    for line in range(len(lines)):
        for piece in range(8):
            out[line, swizzle_piece(line, piece, width)] = lines[line, piece]
    return out.reshape(-1)


# ---- PTX ISA, "Shared Memory Matrix Layout", "Strides": canonical layouts in units of 8×16-byte core
# matrices


def k_major(x: np.ndarray, width: int, stride: int, leading: int) -> np.ndarray:
    """x [rows,16] 16-bit -> unswizzled bytes. Swizzled kinds: rows of `width` bytes, groups of eight rows
    `stride` apart.
    """
    size = 65536
    out = np.zeros(size // 2, np.uint16)
    for row, k in itertools.product(range(x.shape[0]), range(16)):
        if width:
            at = row // 8 * stride + row % 8 * width + 2 * k
        else:
            at = row // 8 * stride + k // 8 * leading + row % 8 * 16 + 2 * (k % 8)
        out[at // 2] = x[row, k]
    return out.view(np.uint8)


def mn_major(x: np.ndarray, width: int, stride: int, leading: int) -> np.ndarray:
    """x [rows,16] -> unswizzled bytes, rows running fastest: `width` bytes of rows for each k, eight k to a
    group.
    """
    out = np.zeros(32768, np.uint16)
    per = width // 2
    for row, k in itertools.product(range(x.shape[0]), range(16)):
        if width:
            at = row // per * leading + k // 8 * stride + k % 8 * width + 2 * (row % per)
        else:
            at = row // 8 * stride + k // 8 * leading + k % 8 * 16 + 2 * (row % 8)
        out[at // 2] = x[row, k]
    return out.view(np.uint8)


def operand(x: np.ndarray, mn: bool, width: int) -> tuple[np.ndarray, int, int]:
    """(swizzled image, leading, stride) of an operand laid out densely; of K-major swizzled ones the leading
    offset is ignored.
    """
    rows = x.shape[0]
    if mn:
        # the rows' extent outermost, k's groups of eight inside it
        leading, stride = (16 * width, 8 * width) if width else (128 * (rows // 8), 128)
        plain = mn_major(x, width, stride, leading)
    else:
        leading, stride = (16, 8 * width) if width else (128, 256)
        plain = k_major(x, width, stride, leading)
    used = (int(np.flatnonzero(plain).max()) // 1024 + 1) * 1024 if plain.any() else 1024
    return swizzle_image(plain[:used], width), leading, stride


def whole(random, *shape):
    x = random.integers(1, 9, shape)
    return x * random.choice([-1, 1], shape)


@pytest.fixture(scope="module")
def wgmma_program():
    return build("probe_wgmma")


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("b_mn", [False, True])
@pytest.mark.parametrize("a_mn", [False, True])
@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_wgmma_reads_shared_operands(wgmma_program, tmp_path, random, width, a_mn, b_mn, half):
    a, b = whole(random, 64, 16), whole(random, 64, 16)
    image_a, a_leading, a_stride = operand(to_16(a, half), a_mn, width)
    image_b, b_leading, b_stride = operand(to_16(b, half), b_mn, width)
    kind = dict(n=64, swizzle=width, a_mn=int(a_mn), b_mn=int(b_mn), half=int(half))
    places = dict(
        a=0, a_leading=a_leading, a_stride=a_stride, b=len(image_a), b_leading=b_leading, b_stride=b_stride
    )
    d = probe(wgmma_program, tmp_path, np.concatenate([image_a, image_b]), np.float32, **kind, **places)
    assert np.array_equal(wgmma_d(d.reshape(128, -1), 64), 1000 + a @ b.T)


@pytest.mark.parametrize("n", [8, 256])
def test_wgmma_widths(wgmma_program, tmp_path, random, n):
    a, b = whole(random, 64, 16), whole(random, n, 16)
    image_a, image_b = operand(to_16(a, False), False, 128)[0], operand(to_16(b, False), False, 128)[0]
    d = probe(
        wgmma_program,
        tmp_path,
        np.concatenate([image_a, image_b]),
        np.float32,
        n=n,
        a_stride=1024,
        b=len(image_a),
        b_stride=1024,
        accumulate=0,
    )
    assert np.array_equal(wgmma_d(d.reshape(128, -1), n), a @ b.T)


@pytest.mark.parametrize("n,half", [(64, False), (136, True)])
def test_wgmma_takes_a_from_registers(wgmma_program, tmp_path, random, n, half):
    a, b = whole(random, 64, 16), whole(random, n, 16)
    image_b = operand(to_16(b, half), False, 128)[0]
    registers = a_registers(to_16(a, half)).view(np.uint8).reshape(-1)
    image = np.concatenate([registers, image_b])
    d = probe(wgmma_program, tmp_path, image, np.float32, n=n, ra=1, b=len(registers), b_stride=1024)
    assert np.array_equal(wgmma_d(d.reshape(128, -1), n), 1000 + a @ b.T)


def test_wgmma_steps_along_k_inside_a_swizzled_row(wgmma_program, tmp_path, random):
    """64 of K to a row of 128 bytes: the second 16 begin 32 bytes further, and the address bits still name
    the line.
    """
    a, b = whole(random, 64, 64), whole(random, 64, 64)
    rows = [np.ascontiguousarray(to_16(x, False)).view(np.uint8).reshape(-1) for x in (a, b)]
    image = np.concatenate([swizzle_image(r, 128) for r in rows])
    for step in range(4):
        d = probe(
            wgmma_program,
            tmp_path,
            image,
            np.float32,
            n=64,
            a=32 * step,
            b=8192 + 32 * step,
            a_stride=1024,
            b_stride=1024,
        )
        part = slice(16 * step, 16 * step + 16)
        assert np.array_equal(wgmma_d(d.reshape(128, -1), 64), 1000 + a[:, part] @ b[:, part].T)


# ---- TMA


@pytest.fixture(scope="module")
def tma_program():
    return build("probe_tma")


def tile_of(tensor: np.ndarray, box: tuple[int, ...], at: tuple[int, ...]) -> np.ndarray:
    """The box at `at`, zeros outside the tensor."""
    out = np.zeros(box, tensor.dtype)
    for place in np.ndindex(*box):
        index = tuple(p + a for p, a in zip(place, at))
        if all(0 <= i < s for i, s in zip(index, tensor.shape)):
            out[place] = tensor[index]
    return out


@pytest.mark.parametrize("at", [(0, 0), (5, 16), (-3, -8), (9, 40), (40, 0)], ids=str)
@pytest.mark.parametrize("width", [0, 32, 64, 128])
def test_tma_loads_two_dimensions(tma_program, tmp_path, random, width, at):
    columns = width // 2 or 48
    tensor = random.integers(1, 60000, (12, 56)).astype(np.uint16)
    tile = probe(
        tma_program,
        tmp_path,
        tensor,
        np.uint8,
        sx=56,
        sy=12,
        bx=columns,
        by=16,
        swizzle=width,
        x=at[1],
        y=at[0],
    )
    expected = tile_of(tensor, (16, columns), at).view(np.uint8).reshape(-1)
    assert np.array_equal(tile, swizzle_image(expected, width) if width else expected)


@pytest.mark.parametrize("at", [(0, 0, 0), (1, 3, 8), (2, -1, -8)], ids=str)
def test_tma_loads_three_dimensions(tma_program, tmp_path, random, at):
    tensor = random.integers(1, 60000, (3, 10, 64)).astype(np.uint16)
    tile = probe(
        tma_program,
        tmp_path,
        tensor,
        np.uint8,
        rank=3,
        sx=64,
        sy=10,
        sz=3,
        bx=64,
        by=8,
        bz=2,
        x=at[2],
        y=at[1],
        z=at[0],
    )
    assert np.array_equal(
        tile, swizzle_image(tile_of(tensor, (2, 8, 64), at).view(np.uint8).reshape(-1), 128)
    )


@pytest.mark.parametrize("at", [(0, 0), (8, 32), (-2, -16)], ids=str)
@pytest.mark.parametrize("width", [0, 64, 128])
def test_tma_stores_inside_the_tensor_only(tma_program, tmp_path, random, width, at):
    columns = width // 2 or 48
    tile = random.integers(1, 30000, (16, columns)).astype(np.uint16)
    flat = tile.view(np.uint8).reshape(-1)
    image = swizzle_image(flat, width) if width else flat
    pitch = 64
    tensor = probe(
        tma_program,
        tmp_path,
        image,
        np.uint16,
        store=1,
        sx=56,
        sy=12,
        pitch=pitch,
        bx=columns,
        by=16,
        swizzle=width,
        x=at[1],
        y=at[0],
    )
    expected = np.full((12, pitch), 0x7777, np.uint16)
    for r, c in np.ndindex(*tile.shape):
        if 0 <= at[0] + r < 12 and 0 <= at[1] + c < 56:
            expected[at[0] + r, at[1] + c] = tile[r, c]
    assert np.array_equal(tensor.reshape(12, pitch), expected)


# ---- warp fragments. PTX ISA, "Matrix Fragments for mma.m16n8k16", "ldmatrix", "stmatrix"


@pytest.fixture(scope="module")
def warp_program():
    return build("probe_warp")


def mma_rows() -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of c0…c3 of each lane: row lane/4 for c0, c1 and lane/4+8 for c2, c3; column 2·(lane%4) +
    (i&1).
    """
    lane, i = np.arange(32)[:, None], np.arange(4)[None, :]
    return lane // 4 + np.where(i < 2, 0, 8), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("half", [False, True])
def test_mma(warp_program, tmp_path, random, half):
    a, b, c = whole(random, 16, 16), whole(random, 16, 8), whole(random, 16, 8)
    lanes = np.zeros((32, 40), np.uint8)
    fragment = a_registers(np.vstack([to_16(a, half)] * 4))[:32]
    lane, i = np.arange(32)[:, None], np.arange(4)[None, :]
    b_fragment = to_16(b, half)[lane % 4 * 2 + (i & 1) + np.where(i < 2, 0, 8), lane // 4]
    lanes[:, :16], lanes[:, 16:24] = fragment.view(np.uint8), np.ascontiguousarray(b_fragment).view(np.uint8)
    lanes[:, 24:] = np.ascontiguousarray(c[mma_rows()].astype(np.float32)).view(np.uint8)
    d = probe(warp_program, tmp_path, lanes, np.float32, op="mma", half=int(half)).reshape(32, 4)
    assert np.array_equal(d, (a @ b + c)[mma_rows()])


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix(warp_program, tmp_path, random, transposed, count):
    matrices = random.integers(0, 60000, (4, 8, 8)).astype(np.uint16)
    r = probe(
        warp_program, tmp_path, matrices, np.uint16, op="load", transposed=int(transposed), count=count
    ).reshape(32, 4, 2)
    source = matrices.transpose(0, 2, 1) if transposed else matrices
    for lane, m, i in itertools.product(range(32), range(count), range(2)):
        assert r[lane, m, i] == source[m, lane // 4, 2 * (lane % 4) + i]


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(warp_program, tmp_path, random, transposed):
    registers = random.integers(0, 60000, (32, 4, 2)).astype(np.uint16)
    out = probe(warp_program, tmp_path, registers, np.uint16, op="store", transposed=int(transposed)).reshape(
        4, 8, 8
    )
    expected = np.empty((4, 8, 8), np.uint16)
    for lane, m, i in itertools.product(range(32), range(4), range(2)):
        row, column = lane // 4, 2 * (lane % 4) + i
        expected[(m, column, row) if transposed else (m, row, column)] = registers[lane, m, i]
    assert np.array_equal(out, expected)
