"""Every schedule of one adapted linear on a grid of widths and tokens, and how far `auto` is from the best of them.

    python benchmarks/schedules.py [--rounds 30] [--most 400] [--widths 64 256 1024 4096] [--dtypes float32 bfloat16]

A frozen linear, as wide as it is long, with factors of rank 8 in float32; the forward without gradients, and forward
and backward; one thread, the time that it computes. Where a call of it is expected to take longer than `--most` ms, it
is left out. Expected: what `lora_fx.deltas.costs` says of the schedule that `auto` takes, beside the frozen linear.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter, thread_time

import torch
import torch.nn.functional as F
from measuring import arguments, paired, report

from lora_fx.deltas import costs, schedules
from lora_fx.deltas.costs import Matmul

RANK, SCALE = 8, 2.0
_APART = (schedules.IN_PLACE, schedules.FUSED, schedules.DENSE)
WIDTHS, TOKENS = (64, 256, 1024, 4096), (8, 64, 512, 2048, 8192)


def calls(m: Matmul, tokens: int) -> dict[str, Callable[[], None]]:
    """The frozen linear, and the same with a branch by each schedule."""
    dtype = torch.bfloat16 if m.size == 2 else torch.float32
    x, y, W = (
        torch.randn(n, w, dtype=dtype) for n, w in ((tokens, m.inputs), (tokens, m.outputs), (m.outputs, m.inputs))
    )
    W /= m.inputs**0.5
    x.requires_grad_(m.gradients)
    A, B = torch.randn(RANK, m.inputs).requires_grad_(), torch.randn(m.outputs, RANK).requires_grad_()

    def run(schedule: str) -> Callable[[], None]:
        def once() -> None:
            with torch.set_grad_enabled(m.gradients):
                if schedule == "plain":
                    out = F.linear(x, W)
                else:
                    out = schedules.matmul("linear", x, W, None, ((A, B, SCALE, 0, None),), schedule)
            if m.gradients:
                out.backward(y)
                x.grad = A.grad = B.grad = None

        return once

    names = [name for name in schedules.SCHEDULES if name != schedules.DENSE or m.size == 4]
    return {name: run(name) for name in ("plain", *names)}


def main() -> None:
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--most", type=float, default=400.0, help="ms of a call, above which a case is left out")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--dtypes", nargs="+", default=("float32", "bfloat16"))
    options = parser.parse_args()
    if options.tiny:
        options.widths, options.tokens = (64,), (8,)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rows, distances = [], []
    for dtype in options.dtypes:
        for gradients in False, True:
            for width in options.widths:
                for tokens in options.tokens:
                    size = getattr(torch, dtype).itemsize
                    case = Matmul(width, width, RANK, size, cast=size == 2, gradients=gradients)
                    if costs.expected("plain", case, tokens) <= 1e3 * options.most:
                        distance, row = _row(case, tokens, options.rounds)
                        rows.append((f"{dtype}, {'with backward' if gradients else 'forward'}", *row))
                        distances.append(distance)
    header = (
        "", "width", "tokens", "frozen, µs", "branch / frozen", "in_place / frozen", "fused / frozen",
        "dense / frozen", "auto / frozen", "expected", "auto / the best",
    )  # fmt: skip
    note = f"auto / the best: median {statistics.median(distances):.3f}, at most {max(distances):.3f}."
    report("Schedules of one linear, rank 8, one thread", header, rows, options, note)


def _row(case: Matmul, tokens: int, rounds: int) -> tuple[float, tuple[str, ...]]:
    works = calls(case, tokens)
    start = perf_counter()
    works["fused"]()
    each = max(perf_counter() - start, 1e-6)
    often = max(1, min(200, int(0.004 / each)))
    rounds = max(5, min(rounds, int(6 / (each * often * len(works)))))
    times = paired(works, rounds, warm_up=2, calls=often, clock=thread_time)
    against = {name: times.ratio(name, "plain")[0] for name in works}
    best = min((name for name in works if name not in ("plain", schedules.AUTO)), key=times.median)
    distance = times.ratio(schedules.AUTO, best)[0]
    taken = costs.cheapest([name for name in works if name in _APART], case, tokens)
    foreseen = costs.expected(taken, case, tokens) / costs.expected("plain", case, tokens)
    each_shown = (f"{against[name]:.2f}" if name in against else "–" for name in ("branch", *_APART, "auto"))
    return distance, (
        str(case.inputs), f"{tokens:,}", f"{1e6 * times.median('plain'):.0f}", *each_shown, f"{foreseen:.2f}",
        f"{distance:.2f} ({best})",
    )  # fmt: skip


if __name__ == "__main__":
    main()
