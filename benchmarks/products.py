"""The small products of a branch on a GPU: what torch's take, and what kernels take that pass over the features once.

    python benchmarks/products.py [--rounds 12] [--rank 8] [--only "4096.*"]

With x (tokens, in), W, A, B, the gradient g of y, z = A·xᵀ and h = Bᵀ·gᵀ, in bfloat16. Beside each matmul with W a
branch passes over x, y, g and the gradient of x again; a pass takes what its bytes take in a copy, which is shown
beside. Each kernel of the library's (`lora_fx.deltas.gpu_kernels`) is compared with float64 before it is timed, in
several shapes of its blocks; the best one is shown. `--tiny` sees without a GPU that it runs, in Triton's interpreter
and float16. Needs triton.
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

from measuring import arguments, report
from triton.runtime.errors import OutOfResources

from lora_fx.deltas import gpu_kernels
from lora_fx.deltas.gpu_kernels import Blocks, Drop

SIZES = ((4096, 4096), (4096, 11008), (11008, 4096))
TOKENS = 8192
PROBABILITY = 0.1
DROP = Drop(0x9ABCDEF112345678, PROBABILITY)
TOLERANCE = 4
"""So many roundings of the dtype each result may be off, as a norm: the operands are rounded to it as torch's are."""


PASSES = (
    Blocks(32, 256, 512, 4, 3), Blocks(64, 256, 512, 8, 3), Blocks(64, 256, 1024, 8, 4), Blocks(32, 512, 512, 8, 3),
    Blocks(64, 128, 512, 4, 4), Blocks(128, 128, 512, 4, 3), Blocks(128, 128, 256, 8, 3),
)  # fmt: skip
UPS = (
    Blocks(32, 128, 0, 4, 2), Blocks(64, 128, 0, 4, 2), Blocks(64, 256, 0, 8, 2), Blocks(128, 128, 0, 8, 2),
    Blocks(128, 256, 0, 8, 2), Blocks(16, 512, 0, 4, 2),
)  # fmt: skip
TINY = (Blocks(16, 16, 32, 4, 1),)


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

    def rounded(self, factor: torch.Tensor) -> torch.Tensor:
        return factor.to(self.x.dtype)

    @property
    def kept(self) -> torch.Tensor:
        """Of x: 0, or the reciprocal of its probability to be kept."""
        return DROP.kept(*self.x.shape, self.x.device)


@dataclass(frozen=True)
class Product:
    """Something that a step computes beside the matmuls with W."""

    name: str
    bytes: Callable[[Case], int]
    """What it has to read and write, features of tokens alone."""
    torch: Callable[[Case, torch.Tensor, torch.Tensor], Any]
    """Given a place like y and one like x."""
    kernel: Callable[[Case, torch.Tensor, torch.Tensor, Blocks], Any] | None
    oracle: Callable[[Case], list[torch.Tensor]] | None = None
    """Of the kernel, float64, where the places were ones."""
    shapes: tuple[Blocks, ...] = PASSES


def _passed(blocks: Blocks, p: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    gpu_kernels.PASS = blocks
    return [found for found in gpu_kernels.passed(p, **options) if found is not None]


def _written(blocks: Blocks, *operands: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    gpu_kernels.WRITE = blocks
    return [gpu_kernels.written(*operands, scale=1.0, **options)]


def _size(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in tensors)


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
        lambda c, y, dx, s: _passed(s, c.x, q=c.A.T), lambda c: [_of(c, "A") @ c.x.double().T],
    ),
    Product(
        "z, of x with dropout", lambda c: _size(c.x), lambda c, y, dx: c.rounded(c.A) @ torch.dropout(c.x, 0.1, True).T,
        lambda c, y, dx, s: _passed(s, c.x, q=c.A.T, drop=DROP),
        lambda c: [_of(c, "A") @ c.rounded(c.x.float() * c.kept.float()).double().T],
    ),
    Product(
        "y += zᵀ·Bᵀ", lambda c: _size(c.g, c.g),
        lambda c, y, dx: y.addmm_(c.rounded(c.z).T, c.rounded(c.B).T),
        lambda c, y, dx, s: _written(s, y, c.z, c.B, add=True), lambda c: [1 + _of(c, "z").T @ _of(c, "B").T], UPS,
    ),
    Product(
        "h = Bᵀ·gᵀ and z·g", lambda c: _size(c.g),
        lambda c, y, dx: (c.rounded(c.B).T @ c.g.T, c.rounded(c.z) @ c.g),
        lambda c, y, dx, s: _passed(s, c.g, q=c.B, z=c.z),
        lambda c: [_of(c, "B").T @ c.g.double().T, _of(c, "z") @ c.g.double()],
    ),
    Product(
        "h·x", lambda c: _size(c.x), lambda c, y, dx: c.rounded(c.h) @ c.x,
        lambda c, y, dx, s: _passed(s, c.x, z=c.h), lambda c: [_of(c, "h") @ c.x.double()],
    ),
    Product(
        "h·x, of x with dropout", lambda c: _size(c.x), lambda c, y, dx: c.rounded(c.h) @ torch.dropout(c.x, 0.1, True),
        lambda c, y, dx, s: _passed(s, c.x, z=c.h, drop=DROP),
        lambda c: [_of(c, "h") @ c.rounded(c.x.float() * c.kept.float()).double()],
    ),
    Product(
        "dx += hᵀ·A", lambda c: _size(c.x, c.x),
        lambda c, y, dx: dx.addmm_(c.rounded(c.h).T, c.rounded(c.A)),
        lambda c, y, dx, s: _written(s, dx, c.h, c.A.T, add=True), lambda c: [1 + _of(c, "h").T @ _of(c, "A")], UPS,
    ),
    Product(
        "dx = hᵀ·A", lambda c: _size(c.x), lambda c, y, dx: torch.mm(c.rounded(c.h).T, c.rounded(c.A), out=dx),
        lambda c, y, dx, s: _written(s, dx, c.h, c.A.T, add=False), lambda c: [_of(c, "h").T @ _of(c, "A")], UPS,
    ),
    Product(
        "dx = hᵀ·A, dropped", lambda c: _size(c.x),
        lambda c, y, dx: torch.mm(c.rounded(c.h).T, c.rounded(c.A), out=dx).mul_(c.x),
        lambda c, y, dx, s: _written(s, dx, c.h, c.A.T, add=False, drop=DROP),
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


def compared(product: Product, case: Case, shape: Blocks) -> None:
    """The kernel gives what float64 gives, in that shape."""
    assert product.kernel is not None and product.oracle is not None
    found = product.kernel(case, torch.ones_like(case.g), torch.ones_like(case.x), shape)
    eps = torch.finfo(case.x.dtype).eps
    for own, exact in zip(found, product.oracle(case), strict=True):
        off = float((own.double() - exact).norm() / exact.norm())
        if not off <= TOLERANCE * eps:
            raise SystemExit(f"{product.name}, {shape}: off by {off:.2g}")


def _row(
    product: Product, case: Case, bandwidth: float, shapes: Sequence[Blocks] | None, options: Any
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
