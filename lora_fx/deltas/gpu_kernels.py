"""Triton kernels for the small products of a branch: each passes over the features of all tokens once.

A branch beside a large matmul takes what it takes to read and write x, y and their gradients. torch's products read the
gradient of y once for B and once for what flows on, and take half as long again to add onto y as to read and write it
(`benchmarks/products.py`). So, with P (tokens, features), in two kernels:

* `passed`: P·Q and z·P together, where P may have dropout on it
* `written`: y = s·zᵀ·Bᵀ or y += s·zᵀ·Bᵀ, where what is written may have the dropout of x on it

Sums are taken in float32, in one order: the same numbers give the same bits. Factors are read as they are kept, in
float32 beside a bfloat16 model, and rounded on the way. Dropout needs no mask that anyone keeps: each element's 32 bits
are a hash of a seed, its row and its column (`Drop`).

This module imports Triton, so it is imported when it is needed first (`one_pass`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Drop:
    """What is dropped: where the hash of a place is below the threshold. What is kept is scaled."""

    seed: int
    """64 bits."""
    p: float

    @property
    def arguments(self) -> tuple[int, int, int, float]:
        """As the kernels take them: numbers of 32 bits, whatever they are, so that there is one kernel for all."""
        low, high, threshold = (number - (number >> 31 << 32) for number in self._numbers)
        return low, high, threshold, 1 / (1 - self.p)

    @property
    def _numbers(self) -> tuple[int, int, int]:
        return self.seed & 0xFFFFFFFF, self.seed >> 32, round(self.p * 2**32)

    def kept(self, rows: int, columns: int, device: torch.device) -> torch.Tensor:
        """0, or the reciprocal of the probability to be kept, float64: as the kernels decide it, in torch's ops."""
        low, high, threshold = self._numbers
        row, column = (torch.arange(n, device=device) for n in (rows, columns))
        key = _mixed_by_torch(_mixed_by_torch(row ^ low) ^ high)
        return (_mixed_by_torch(column ^ key[:, None]) >= threshold).double() / (1 - self.p)


_NOTHING = (0, 0, 0, 1.0)


def _mixed_by_torch(x: torch.Tensor) -> torch.Tensor:
    for shift, by in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = ((x ^ x >> shift) * by) & 0xFFFFFFFF
    return x ^ x >> 16


@triton.jit
def _mixed(x):
    """A bijection of 32 bits; each bit of x changes about half of them."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(values, rows, columns, low, high, threshold, up):
    key = _mixed(_mixed(rows.to(tl.uint32) ^ low.to(tl.uint32)) ^ high.to(tl.uint32))
    bits = _mixed(columns.to(tl.uint32)[None, :] ^ key[:, None])
    return tl.where(bits >= threshold.to(tl.uint32), values * up, 0.0)


@triton.jit(do_not_specialize=["low", "high", "threshold"])
def _pass(
    p, q, z, h, g, low, high, threshold, up, scale, rows, columns, p_row, q_column, q_rank, z_rank, g_rank, g_column,
    RANK: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DOWN: tl.constexpr, SUM: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Of CHUNK rows and COLUMNS columns of P, read once: their share of P·Q in `h`, and of s·z·P in `g`, float32."""
    chunk, block = tl.program_id(0), tl.program_id(1)
    at, ranks = block * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, WIDE)
    inside, known = at < columns, ranks < RANK
    if DOWN:
        factor = q + at[:, None] * q_column + ranks[None, :] * q_rank
        own = tl.load(factor, mask=inside[:, None] & known[None, :], other=0.0).to(p.dtype.element_ty)
    if SUM:
        total = tl.zeros((WIDE, COLUMNS), dtype=tl.float32)
    for step in range(0, CHUNK, ROWS):
        row = chunk * CHUNK + step + tl.arange(0, ROWS)
        there = row < rows
        value = tl.load(
            p + row.to(tl.int64)[:, None] * p_row + at[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        if DROP:
            value = _kept(value.to(tl.float32), row, at, low, high, threshold, up).to(p.dtype.element_ty)
        if DOWN:
            share = h + block.to(tl.int64) * RANK * rows + ranks[None, :] * rows + row[:, None]
            tl.store(share, tl.dot(value, own), mask=there[:, None] & known[None, :])
        if SUM:
            ours = z + ranks[:, None] * z_rank + row[None, :]
            weights = tl.load(ours, mask=known[:, None] & there[None, :], other=0.0)
            total += tl.dot(weights.to(value.dtype), value)
    if SUM:
        to = g + chunk.to(tl.int64) * RANK * columns + ranks[:, None] * g_rank + at[None, :] * g_column
        tl.store(to, total * scale, mask=known[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["low", "high", "threshold"])
def _write(
    y, z, b, low, high, threshold, up, scale, rows, columns, y_row, z_rank, b_column, b_rank,
    RANK: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr,
    DROP: tl.constexpr,
):  # fmt: skip
    """Of ROWS rows and COLUMNS columns of y: s·zᵀ·Bᵀ, written there or added."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    at = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    ranks = tl.arange(0, WIDE)
    there, inside, known = row < rows, at < columns, ranks < RANK
    left = tl.load(z + ranks[None, :] * z_rank + row[:, None], mask=there[:, None] & known[None, :], other=0.0)
    factor = b + at[None, :] * b_column + ranks[:, None] * b_rank
    right = tl.load(factor, mask=known[:, None] & inside[None, :], other=0.0)
    value = tl.dot(left.to(y.dtype.element_ty), right.to(y.dtype.element_ty)) * scale
    if DROP:
        value = _kept(value, row, at, low, high, threshold, up)
    to, mask = y + row.to(tl.int64)[:, None] * y_row + at[None, :], there[:, None] & inside[None, :]
    if ADD:
        value += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["low", "high", "threshold"])
def _drop(to, x, low, high, threshold, up, rows, columns, x_row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x with dropout."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)
    at = (tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (at < columns)[None, :]
    value = tl.load(x + row.to(tl.int64)[:, None] * x_row + at[None, :], mask=mask, other=0.0)
    value = _kept(value.to(tl.float32), row, at, low, high, threshold, up).to(to.dtype.element_ty)
    tl.store(to + row.to(tl.int64)[:, None] * columns + at[None, :], value, mask=mask)


@triton.jit
def _times(
    to, w, a, b, rows, columns, w_row, w_column, a_row, a_column, b_row, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """w·(a·b), where a·b is rounded to the dtype of w between."""
    blocks = tl.cdiv(columns, COLUMNS)
    row = ((tl.program_id(0) // blocks) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    at = ((tl.program_id(0) % blocks) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    mask = (row < rows) & (at < columns)
    left = tl.load(a + row * a_row + at * a_column, mask=mask, other=0.0)
    right = tl.load(b + row * b_row + at * b_column, mask=mask, other=0.0)
    inner = (left * right).to(to.dtype.element_ty).to(tl.float32)
    outer = tl.load(w + row * w_row + at * w_column, mask=mask, other=0.0).to(tl.float32)
    tl.store(to + row * columns + at, (outer * inner).to(to.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Blocks:
    """How a kernel divides its work: `chunk` rows to a program, `rows` × `columns` at a time."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


#: the fastest of some on an H100, by a step of Llama 4096×8; all of them were within 1 %
PASS, WRITE = Blocks(32, 256, 512, 4, 3), Blocks(64, 128, 0, 4, 2)


def _wide(rank: int) -> int:
    return max(16, triton.next_power_of_2(rank))


def passed(
    p: torch.Tensor,
    q: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    scale: float = 1.0,
    drop: Drop | None = None,
    tall: bool = False,
) -> tuple[Any, Any]:
    """(P·Q)ᵀ and s·z·P, float32, of P with dropout; those of the two that are asked for, and None.

    Args:
        p: (rows, columns), each row without gaps.
        q: (columns, rank).
        z: (rank, rows), each without gaps.
        tall: s·z·P as (columns, rank).
    """
    blocks, (rows, columns) = PASS, p.shape
    rank = len(z) if z is not None else q.shape[1]  # type: ignore[union-attr]
    grid = triton.cdiv(rows, blocks.chunk), triton.cdiv(columns, blocks.columns)
    h = p if q is None else torch.empty(grid[1], rank, rows, dtype=torch.float32, device=p.device)
    shape = (columns, rank) if tall else (rank, columns)
    g = p if z is None else torch.empty(grid[0], *shape, dtype=torch.float32, device=p.device)
    along = (1, rank) if tall else (columns, 1)
    with _on(p.device):
        _pass[grid](
            p, p if q is None else q, p if z is None else z, h, g, *(drop.arguments if drop else _NOTHING), scale,
            rows, columns, p.stride(0), *((0, 0) if q is None else q.stride()), 0 if z is None else z.stride(0),
            *along, RANK=rank, WIDE=_wide(rank), CHUNK=blocks.chunk, ROWS=blocks.rows, COLUMNS=blocks.columns,
            DOWN=q is not None, SUM=z is not None, DROP=drop is not None, **blocks.options,
        )  # fmt: skip
    return None if q is None else h.sum(0), None if z is None else g.sum(0)


def written(
    y: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    scale: float,
    add: bool,
    drop: Drop | None = None,
) -> torch.Tensor:
    """y, after y = s·zᵀ·Bᵀ or y += s·zᵀ·Bᵀ.

    Args:
        y: (rows, columns), each row without gaps.
        z: (rank, rows), float32, each without gaps.
        b: (columns, rank).
    """
    blocks, (rows, columns) = WRITE, y.shape
    with _on(y.device):
        _write[(triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns),)](
            y, z, b, *(drop.arguments if drop else _NOTHING), scale, rows, columns, y.stride(0), z.stride(0),
            *b.stride(), RANK=len(z), WIDE=_wide(len(z)), ROWS=blocks.rows, COLUMNS=blocks.columns, ADD=add,
            DROP=drop is not None, **blocks.options,
        )  # fmt: skip
    return y


def dropped(x: torch.Tensor, drop: Drop) -> torch.Tensor:
    """x (rows, columns) with dropout, as the others have it."""
    blocks, (rows, columns) = WRITE, x.shape
    to = torch.empty(rows, columns, dtype=x.dtype, device=x.device)
    with _on(x.device):
        _drop[(triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns),)](
            to, x, *drop.arguments, rows, columns, x.stride(0), ROWS=blocks.rows, COLUMNS=blocks.columns,
            num_warps=blocks.warps,
        )  # fmt: skip
    return to


def multiplied(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """w·(a·b) with a·b rounded to the dtype of w, in one pass: the bits of torch's three ops.

    Args:
        w: of half precision, a, b: float32, of one shape (rows, columns); they may be expanded.
    """
    blocks, (rows, columns) = WRITE, w.shape
    to = torch.empty(rows, columns, dtype=w.dtype, device=w.device)
    with _on(w.device):
        _times[(triton.cdiv(rows, blocks.rows) * triton.cdiv(columns, blocks.columns),)](
            to, w, a, b, rows, columns, *w.stride(), *a.stride(), *b.stride(), ROWS=blocks.rows,
            COLUMNS=blocks.columns, num_warps=blocks.warps,
        )  # fmt: skip
    return to


def prove(device: torch.device) -> None:
    """Compare all of them with torch on this device, on odd sizes.

    Raises:
        ArithmeticError: something came out another number than rounding explains.
    """
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    for dtype in (torch.float16,) if device.type == "cpu" else (torch.float16, torch.bfloat16):
        rank, drop = 3, Drop(0x9E3779B97F4A7C15, 0.25)
        p, y = normal(75, 83, dtype=dtype), normal(75, 83, dtype=dtype)
        q, z = normal(83, rank, dtype=torch.float32), normal(rank, 75, dtype=torch.float32)
        mask = drop.kept(75, 83, device)
        low_q, low_z, wide = q.to(dtype).double(), z.to(dtype).double(), (p.double() * mask).to(dtype).double()
        h, g = passed(p, q, z, 2.0, tall=True)
        cases = [
            (h, (p.double() @ low_q).T),
            (g, 2 * (low_z @ p.double()).T),
            (passed(p, q, drop=drop)[0], (wide @ low_q).T),
            (passed(p, z=z, drop=drop)[1], low_z @ wide),
            (written(y.clone(), z, q, 2.0, add=True), y.double() + 2 * low_z.T @ low_q.T),
            (written(y.clone(), z, q, 2.0, add=False, drop=drop), 2 * (low_z.T @ low_q.T) * mask),
            (dropped(p, drop), wide),
        ]
        w, a, b = normal(83, dtype=dtype).expand(75, 83), p.float(), normal(75, 1).float().expand(75, 83)
        if not torch.equal(multiplied(w, a, b), w * (a * b).to(dtype)):
            raise ArithmeticError(f"a product of three is another one in {dtype}")
        for k, (found, exact) in enumerate(cases):
            off = float((found.double() - exact).norm() / exact.norm())
            if not off <= torch.finfo(dtype).eps:  # one rounding of the dtype moves each element by half of that
                raise ArithmeticError(f"kernel {k} is off by {off:.2g} in {dtype}")


def _on(device: torch.device) -> Any:
    """Triton launches where torch's current device is."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()
