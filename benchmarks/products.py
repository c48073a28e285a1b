"""The small products of a branch on a GPU: what torch's take, and what kernels take that pass over the features once.

    python benchmarks/products.py [--rounds 12] [--rank 8] [--only "4096.*"]

With x (tokens, in), W, A, B, the gradient g of y, z = A·xᵀ and h = Bᵀ·gᵀ, in bfloat16. Beside each matmul with W a
branch passes over x, y, g and the gradient of x again; a pass takes what its bytes take in a copy, which is shown
beside. Each kernel is compared with float64 before it is timed, in each of its shapes; the best one is shown. The
library has none of them: this tells what they would win. `--tiny` sees without a GPU that they compute what they say,
in Triton's interpreter and float16. Needs triton.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

if "--tiny" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads when it is imported

import triton
import triton.language as tl
from measuring import arguments, report
from triton.runtime.errors import OutOfResources

SIZES = ((4096, 4096), (4096, 11008), (11008, 4096))
TOKENS = 8192
PROBABILITY = 0.1
SEED = (0x12345678, 0x9ABCDEF1)
TOLERANCE = 4
"""So many roundings of the dtype each result may be off, as a norm: the operands are rounded to it as torch's are."""


@triton.jit
def _mixed(x):
    """A bijection of 32 bits; each input bit changes about half of them."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _kept(values, rows, columns, low, high, threshold, up):
    """Dropout without a mask: an element's bits are a hash of a seed, its row and its column."""
    key = _mixed(_mixed(rows.to(tl.uint32) ^ low.to(tl.uint32)) ^ high.to(tl.uint32))
    bits = _mixed(columns.to(tl.uint32)[None, :] ^ key[:, None])
    return tl.where(bits >= threshold.to(tl.uint32), values * up, 0.0)


@triton.jit
def _pass(
    p, q, z, h, g, low, high, threshold, up, scale, rows, columns, p_row, q_column, q_rank, z_rank,
    RANK: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DOWN: tl.constexpr, SUM: tl.constexpr, DROP: tl.constexpr,
):  # fmt: skip
    """Of CHUNK rows and COLUMNS columns of P, read once: their share of P·Q in `h`, and of z·P in `g`, float32."""
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
        to = g + chunk.to(tl.int64) * RANK * columns + ranks[:, None] * columns + at[None, :]
        tl.store(to, total * scale, mask=known[:, None] & inside[None, :])


@triton.jit
def _up(
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
    where = b + at[None, :] * b_column + ranks[:, None] * b_rank
    right = tl.load(where, mask=known[:, None] & inside[None, :], other=0.0)
    value = tl.dot(left.to(y.dtype.element_ty), right.to(y.dtype.element_ty)) * scale
    if DROP:
        value = _kept(value, row, at, low, high, threshold, up)
    to, mask = y + row.to(tl.int64)[:, None] * y_row + at[None, :], there[:, None] & inside[None, :]
    if ADD:
        value += tl.load(to, mask=mask, other=0.0).to(tl.float32)
    tl.store(to, value.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Shape:
    """Of a kernel's blocks: as many rows and columns, rows that a program goes through, warps, stages."""

    rows: int
    columns: int
    chunk: int
    warps: int
    stages: int


PASSES = (
    Shape(32, 256, 512, 4, 3), Shape(64, 256, 512, 8, 3), Shape(64, 256, 1024, 8, 4), Shape(32, 512, 512, 8, 3),
    Shape(64, 128, 512, 4, 4), Shape(128, 128, 512, 4, 3), Shape(128, 128, 256, 8, 3),
)  # fmt: skip
UPS = (
    Shape(32, 128, 0, 4, 2), Shape(64, 128, 0, 4, 2), Shape(64, 256, 0, 8, 2), Shape(128, 128, 0, 8, 2),
    Shape(128, 256, 0, 8, 2), Shape(16, 512, 0, 4, 2),
)  # fmt: skip
TINY = (Shape(16, 16, 32, 4, 1),)


@dataclass(frozen=True)
class Case:
    """The tensors of one site. Factors are float32, as masters are; torch's products read them rounded."""

    x: torch.Tensor
    weight: torch.Tensor
    A: torch.Tensor
    B: torch.Tensor
    g: torch.Tensor
    z: torch.Tensor
    h: torch.Tensor

    @staticmethod
    def of(tokens: int, inputs: int, outputs: int, rank: int, device: str, dtype: torch.dtype) -> Case:
        def normal(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        x, g = normal(tokens, inputs), normal(tokens, outputs)
        weight = normal(outputs, inputs) * inputs**-0.5
        A, B = normal(rank, inputs, dtype=torch.float32) * inputs**-0.5, normal(outputs, rank, dtype=torch.float32) / 8
        return Case(x, weight, A, B, g, (A.to(dtype) @ x.T).float(), (B.to(dtype).T @ g.T).float())

    @property
    def rank(self) -> int:
        return len(self.A)

    def rounded(self, factor: torch.Tensor) -> torch.Tensor:
        return factor.to(self.x.dtype)

    @property
    def kept(self) -> torch.Tensor:
        """What `_kept` keeps of x, by torch: 0, or the reciprocal of its probability."""

        def mixed(x: torch.Tensor) -> torch.Tensor:
            for shift, by in ((16, 0x7FEB352D), (15, 0x846CA68B)):
                x = ((x ^ x >> shift) * by) & 0xFFFFFFFF
            return x ^ x >> 16

        rows, columns = (torch.arange(n, device=self.x.device) for n in self.x.shape)
        key = mixed(mixed(rows ^ SEED[0]) ^ SEED[1])
        return (mixed(columns ^ key[:, None]) >= int(PROBABILITY * 2**32)) / (1 - PROBABILITY)

    def passed(self, p: torch.Tensor, shape: Shape, q: Any = None, z: Any = None, drop: bool = False) -> list[Any]:
        """P·Q (rank, rows) and z·P (rank, columns), those that are asked for: float32."""
        (rows, columns), rank = p.shape, self.rank
        grid = triton.cdiv(rows, shape.chunk), triton.cdiv(columns, shape.columns)
        h, g = (torch.empty(n, rank, size, device=p.device) for n, size in zip(grid[::-1], p.shape, strict=True))
        drops = (*SEED, int(PROBABILITY * 2**32), 1 / (1 - PROBABILITY))
        _pass[grid](
            p, p if q is None else q, p if z is None else z, h, g, *drops, 1.0, rows, columns, p.stride(0),
            *((0, 0) if q is None else q.stride()), 0 if z is None else z.stride(0),
            RANK=rank, WIDE=max(16, triton.next_power_of_2(rank)), CHUNK=shape.chunk, ROWS=shape.rows,
            COLUMNS=shape.columns, DOWN=q is not None, SUM=z is not None, DROP=drop,
            num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        return [part.sum(0) for part, asked in ((h, q), (g, z)) if asked is not None]

    def up(self, y: torch.Tensor, z: torch.Tensor, b: torch.Tensor, shape: Shape, add: bool, drop: bool = False) -> Any:
        """y = zᵀ·Bᵀ, or y += that."""
        rows, columns = y.shape
        drops = (*SEED, int(PROBABILITY * 2**32), 1 / (1 - PROBABILITY))
        _up[(triton.cdiv(rows, shape.rows) * triton.cdiv(columns, shape.columns),)](
            y, z, b, *drops, 1.0, rows, columns, y.stride(0), z.stride(0), *b.stride(),
            RANK=self.rank, WIDE=max(16, triton.next_power_of_2(self.rank)), ROWS=shape.rows, COLUMNS=shape.columns,
            ADD=add, DROP=drop, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
        return y


@dataclass(frozen=True)
class Product:
    """Something that a step computes beside the matmuls with W."""

    name: str
    bytes: Callable[[Case], int]
    """What it has to read and write, features of tokens alone."""
    torch: Callable[[Case, torch.Tensor, torch.Tensor], Any]
    """Given a place like y and one like x."""
    kernel: Callable[[Case, torch.Tensor, torch.Tensor, Shape], Any] | None
    oracle: Callable[[Case], list[torch.Tensor]] | None = None
    """Of the kernel, float64, where the places were ones."""
    shapes: tuple[Shape, ...] = PASSES


def _size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.double() for t in tensors]


def _of(c: Case, name: str) -> torch.Tensor:
    """A factor, or z or h, as a kernel reads it."""
    return c.rounded(getattr(c, name)).double()


PRODUCTS = (
    Product("y = x·Wᵀ", lambda c: _size(c.x, c.weight, c.g), lambda c, y, dx: torch.mm(c.x, c.weight.T, out=y), None),
    Product("dx = g·W", lambda c: _size(c.x, c.weight, c.g), lambda c, y, dx: torch.mm(c.g, c.weight, out=dx), None),
    Product(
        "dx += g·W, in the matmul", lambda c: _size(c.x, c.x, c.weight, c.g),
        lambda c, y, dx: dx.addmm_(c.g, c.weight), None,
    ),
    Product(
        "z = A·xᵀ", lambda c: _size(c.x), lambda c, y, dx: c.rounded(c.A) @ c.x.T,
        lambda c, y, dx, s: c.passed(c.x, s, q=c.A.T), lambda c: [_of(c, "A") @ c.x.double().T],
    ),
    Product(
        "z, of x with dropout", lambda c: _size(c.x), lambda c, y, dx: c.rounded(c.A) @ torch.dropout(c.x, 0.1, True).T,
        lambda c, y, dx, s: c.passed(c.x, s, q=c.A.T, drop=True),
        lambda c: [_of(c, "A") @ c.rounded(c.x.float() * c.kept.float()).double().T],
    ),
    Product(
        "y += zᵀ·Bᵀ", lambda c: _size(c.g, c.g),
        lambda c, y, dx: y.addmm_(c.rounded(c.z).T, c.rounded(c.B).T),
        lambda c, y, dx, s: [c.up(y, c.z, c.B, s, add=True)], lambda c: [1 + _of(c, "z").T @ _of(c, "B").T], UPS,
    ),
    Product(
        "h = Bᵀ·gᵀ and z·g", lambda c: _size(c.g),
        lambda c, y, dx: (c.rounded(c.B).T @ c.g.T, c.rounded(c.z) @ c.g),
        lambda c, y, dx, s: c.passed(c.g, s, q=c.B, z=c.z),
        lambda c: [_of(c, "B").T @ c.g.double().T, _of(c, "z") @ c.g.double()],
    ),
    Product(
        "h·x", lambda c: _size(c.x), lambda c, y, dx: c.rounded(c.h) @ c.x,
        lambda c, y, dx, s: c.passed(c.x, s, z=c.h), lambda c: [_of(c, "h") @ c.x.double()],
    ),
    Product(
        "h·x, of x with dropout", lambda c: _size(c.x), lambda c, y, dx: c.rounded(c.h) @ torch.dropout(c.x, 0.1, True),
        lambda c, y, dx, s: c.passed(c.x, s, z=c.h, drop=True),
        lambda c: [_of(c, "h") @ c.rounded(c.x.float() * c.kept.float()).double()],
    ),
    Product(
        "dx += hᵀ·A", lambda c: _size(c.x, c.x),
        lambda c, y, dx: dx.addmm_(c.rounded(c.h).T, c.rounded(c.A)),
        lambda c, y, dx, s: [c.up(dx, c.h, c.A.T, s, add=True)], lambda c: [1 + _of(c, "h").T @ _of(c, "A")], UPS,
    ),
    Product(
        "dx = hᵀ·A", lambda c: _size(c.x), lambda c, y, dx: torch.mm(c.rounded(c.h).T, c.rounded(c.A), out=dx),
        lambda c, y, dx, s: [c.up(dx, c.h, c.A.T, s, add=False)], lambda c: [_of(c, "h").T @ _of(c, "A")], UPS,
    ),
    Product(
        "dx = hᵀ·A, dropped", lambda c: _size(c.x),
        lambda c, y, dx: torch.mm(c.rounded(c.h).T, c.rounded(c.A), out=dx).mul_(c.x),
        lambda c, y, dx, s: [c.up(dx, c.h, c.A.T, s, add=False, drop=True)],
        lambda c: [_of(c, "h").T @ _of(c, "A") * c.kept], UPS,
    ),
)  # fmt: skip


def microseconds(function: Callable[[], Any], rounds: int, device: str) -> float:
    """Of the device alone: it is busy with something else until Python has asked for everything."""
    if device == "cpu":
        function()
        return float("nan")
    times = []
    for number in range(-3, rounds):
        torch.cuda.synchronize()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(400_000)
        start.record()
        function()
        stop.record()
        torch.cuda.synchronize()
        if number >= 0:
            times.append(1e3 * start.elapsed_time(stop))
    return median(times)


def compared(product: Product, case: Case, shape: Shape) -> None:
    """The kernel gives what float64 gives, in that shape."""
    assert product.kernel is not None and product.oracle is not None
    found = product.kernel(case, torch.ones_like(case.g), torch.ones_like(case.x), shape)
    eps = torch.finfo(case.x.dtype).eps
    for own, exact in zip(found, product.oracle(case), strict=True):
        off = float((own.double() - exact).norm() / exact.norm())
        if not off <= TOLERANCE * eps:
            raise SystemExit(f"{product.name}, {shape}: off by {off:.2g}")


def _row(
    product: Product, case: Case, bandwidth: float, shapes: Sequence[Shape] | None, options: Any
) -> tuple[str, ...]:
    y, dx, kernel = torch.empty_like(case.g), torch.empty_like(case.x), product.kernel

    def time(function: Callable[[], Any]) -> float:
        return microseconds(function, options.rounds, options.device)

    least, theirs = product.bytes(case) / bandwidth, time(lambda: product.torch(case, y, dx))
    if kernel is None:
        return product.name, f"{least:.0f}", f"{theirs:.0f}", "", ""
    found = []
    for shape in shapes or product.shapes:
        try:
            compared(product, case, shape)
        except OutOfResources:  # this card has less of what it wants
            continue
        found.append((time(partial(kernel, case, y, dx, shape)), shape))
    best, shape = min(found, key=lambda own: own[0])
    which = f"{shape.rows}×{shape.columns}, {shape.chunk}, {shape.warps} warps, {shape.stages} stages"
    return product.name, f"{least:.0f}", f"{theirs:.0f}", f"{best:.0f}", which


def main() -> None:
    parser = arguments(__doc__, rounds=12)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--only", default=".*", help="sizes whose name is this, a regular expression")
    options = parser.parse_args()
    options.device = "cpu" if options.tiny else "cuda"
    dtype = torch.float16 if options.tiny else torch.bfloat16  # what Triton interprets
    copied = torch.randn(2**6 if options.tiny else 2**28, device=options.device, dtype=dtype)
    place = torch.empty_like(copied)
    copy = microseconds(lambda: place.copy_(copied), options.rounds, options.device)
    bandwidth = 2 * _size(copied) / copy
    rows = []
    for inputs, outputs in ((24, 40),) if options.tiny else SIZES:
        if not re.fullmatch(options.only, f"{inputs}→{outputs}"):
            continue
        torch.manual_seed(0)
        case = Case.of(40 if options.tiny else TOKENS, inputs, outputs, options.rank, options.device, dtype)
        shapes = TINY if options.tiny else None
        own = [_row(product, case, bandwidth, shapes, options) for product in PRODUCTS]
        rows += [(f"{inputs}→{outputs}: {name}", *cells) for name, *cells in own]
    title = f"Products of a branch: {TOKENS} tokens, {dtype}, rank {options.rank}, in µs"
    note = f"A copy moves {bandwidth / 1e6:.2f} TB/s."
    report(title, ("", "its bytes", "torch", "kernel", "best shape"), rows, options, note)


if __name__ == "__main__":
    main()
