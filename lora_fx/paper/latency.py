"""Table 1 of the LoRA paper: what an adapted GPT-2 medium costs at inference, in ONNX Runtime.

    base                 the model without adapters
    base again           a second session of the very same file: what "no difference" looks like on this machine
    LoRA, folded         r = 4 on q and v, in the weights: proven to be the base's graph, node for node
    LoRA, unfolded       the same, with the branches in the graph
    Adapter H, L         layers behind the attention and the MLP, or behind the MLP: they cannot be folded

One forward pass, which gives the next token's logits. Weights are random: a latency does not depend on them. A run with
fewer or narrower layers has a vocabulary that much smaller, so that each part's share of the work stays what it is.

What a layer behind another one costs has two parts: a node more that is waited for, whatever it computes, and its
products. On the paper's GPU 128 tokens of 1,024 features keep a node about as long as its launch takes; on a core of a
CPU one or two tokens of 128 features do. So where the shape and the lengths are divided, both parts show in their turn,
as in the paper; at whole lengths a CPU has products only.

Where a session's weights lie in memory makes a difference of its own, which no number of calls averages away. So all
sessions are opened anew several times; what an opening gives is the median of the ratios within its rounds, and the
interval is one over the openings. Each opening has two sessions of the base, and whether an adapter is slower is asked
of its time over the mean of theirs, opening by opening: what is done to one session of the base counts half. A session
is of one size, which it knows when it is opened, as a server's is; no node is left that only works out shapes. A
session's calls come in turns, since a model that serves has its weights in the caches that they fit in.
"""

from __future__ import annotations

import functools
import hashlib
import math
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import LoraFxError
from lora_fx.export import Session
from lora_fx.export.onnx.runtimes import CPU, quiet_options, require, require_providers
from lora_fx.paper.architectures import gpt2
from lora_fx.paper.notes import Notes
from lora_fx.paper.outcome import prepared
from lora_fx.paper.timing import Interval, Verdict, all_of, ending, interleaved, machine, ratios
from lora_fx.tables import table

CUDA = "CUDAExecutionProvider"
AXES = "batch", "tokens"
TURN = 0.005
"""Seconds of calls of one session, before another one's turn; one call at least."""
HOW = "sessions of one size, calls in turns"
"""Notes of another way of timing are not gone on from."""
OPENINGS = "openings.jsonl"

BASE, AGAIN, FOLDED, UNFOLDED = "base", "base again", "LoRA, folded", "LoRA, unfolded"
ADAPTER_H, ADAPTER_L = ADAPTERS = "Adapter H", "Adapter L"
SYSTEMS = (BASE, AGAIN, FOLDED, UNFOLDED, *ADAPTERS)


# ── what is compared ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Shape:
    """GPT-2 medium's, or a part of it."""

    layers: int = 24
    width: int = 1024

    def __post_init__(self) -> None:
        if self.width % 64:
            remedy = "give a multiple of 64: the heads of GPT-2 are that wide"
            raise LoraFxError(f"width={self.width} is no number of whole heads", place="latency", remedy=remedy)

    @property
    def vocabulary(self) -> int:
        """The logits of a token are V·d of products beside 12·L·d² in the blocks."""
        return round(50257 * (self.layers / 24) * (self.width / 1024))

    def build(self) -> nn.Module:
        """The same random numbers every time."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            return NextToken(gpt2(self.layers, self.width, self.vocabulary)).eval()

    def __str__(self) -> str:
        if self == Shape():
            return "GPT-2 medium's shape: 24 layers, 1,024 wide"
        wide = "" if self.width == 1024 else f", {self.width} of 1,024 wide"
        words = f"{self.vocabulary:,} of 50,257 words"
        return f"GPT-2 medium's shape, scaled: {self.layers} of 24 layers{wide}, {words}"


class NextToken(nn.Module):
    """Tokens (batch, length) → logits of the next one (batch, 1, vocabulary)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.gpt2 = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.gpt2(input_ids, logits_to_keep=1, use_cache=False).logits


@dataclass(frozen=True)
class Theirs:
    """A column of the paper's table."""

    budget: float
    """|Θ| of the adapters, in millions: in its table one of the sizes has other ranks than the others."""
    ms: float
    """Of the base, on a Quadro RTX8000."""
    slower: dict[str, float]
    """Percent."""


PAPER = {
    "1×128": Theirs(11, 19.8, {ADAPTER_L: 20.7, ADAPTER_H: 30.3}),
    "16×256": Theirs(11, 338.0, {ADAPTER_L: 5.0, ADAPTER_H: 8.4}),
    "32×512": Theirs(0.5, 1449.4, {ADAPTER_L: 2.2, ADAPTER_H: 3.0}),
}


@dataclass(frozen=True)
class Size:
    """Of one call."""

    batch: int
    length: int
    stands_for: str = ""
    """The paper's, where this is a part of that."""

    @property
    def theirs(self) -> Theirs | None:
        return PAPER.get(self.stands_for or str(self))

    @property
    def budget(self) -> float:
        """Of a size that the paper has not: the larger of its two."""
        return self.theirs.budget if self.theirs else 11

    def __str__(self) -> str:
        return f"{self.batch}×{self.length}"


SIZES = Size(1, 128), Size(16, 256), Size(32, 512)


def scaled(size: Size, by: int, shorter: int = 1) -> Size:
    """A batch, and a length, that many times smaller, of one at least."""
    batch, length = max(1, size.batch // by), max(1, size.length // shorter)
    same = (batch, length) == (size.batch, size.length)
    return size if same else Size(batch, length, size.stands_for or str(size))


QUICK_SHAPE = Shape(2, 256)
QUICK = Size(1, 32, "1×128"), Size(4, 64, "16×256"), Size(8, 128, "32×512")


def adapter_parameters(system: str, rank: int, shape: Shape) -> int:
    """L_A·(2·d·r + r + d) + 2·L_N·d (5.1), of LoRA on q and v L·4·d·r."""
    d, layers = shape.width, shape.layers
    if system in (FOLDED, UNFOLDED):
        return layers * 4 * d * rank
    each = 2 * d * rank + rank + d
    return layers * 2 * each if system == ADAPTER_H else layers * (each + 2 * d)


def rank_of(system: str, budget: float, shape: Shape) -> int:
    """LoRA's is 4; an adapter's comes nearest to the paper's |Θ| on the whole shape, narrower where the shape is."""
    if system not in ADAPTERS:
        return 4
    whole = Shape()
    rank = min(range(1, 257), key=lambda r: abs(adapter_parameters(system, r, whole) - 1e6 * budget))
    return max(1, round(rank * shape.width / whole.width))


def rule_of(system: str, rank: int) -> Rule:
    if system == ADAPTER_H:
        return Rule(role="attention.output | mlp.down", kind="bottleneck", rank=rank)
    if system == ADAPTER_L:
        return Rule(role="mlp.down", kind="bottleneck", rank=rank, settings={"norm": True, "activation": "relu"})
    return Rule(role="attention.query | attention.value", rank=rank)


@dataclass(frozen=True)
class Plan:
    """What is measured, and how."""

    shape: Shape
    sizes: tuple[Size, ...]
    openings: int = 9
    seconds: float = 20.0
    """Of rounds, at each size in each opening; two rounds at least."""
    cuda: bool = False
    threads: int = 0
    """Of the CPU; 0 for as many as there are cores."""
    processor_time: bool = False
    """Count the seconds in which a processor worked, of one thread: what else the machine does is not in them."""

    def __post_init__(self) -> None:
        if self.processor_time and (self.cuda or self.threads > 1):
            what = "of a GPU" if self.cuda else f"of {self.threads} threads"
            remedy = "measure those by the clock, on a machine that does nothing else"
            raise LoraFxError(f"the processor's time {what} is not that of a call", place="latency", remedy=remedy)
        if len(set(self.sizes)) < len(self.sizes):
            raise LoraFxError("a size is given twice", place="latency", remedy="give each once")

    @property
    def providers(self) -> list[str]:
        return [CUDA] if self.cuda else [CPU]

    @property
    def opset(self) -> int:
        """23 has an operator for attention, which the CPU's provider runs as one node."""
        return 20 if self.cuda else 23

    @property
    def steps(self) -> int:
        """How often `measure` says that something is done."""
        return len(self.files) + self.openings * len(self.sizes)

    @property
    def files(self) -> dict[str, tuple[str, int]]:
        """Name of each file → system and rank."""
        wanted = {(system, rank_of(system, size.budget, self.shape)) for size in self.sizes for system in SYSTEMS}
        ordered = sorted(wanted, key=lambda one: (SYSTEMS.index(one[0]), one[1]))
        return {_name(*one): one for one in ordered if one[0] != AGAIN}

    def file(self, system: str, size: Size) -> str:
        """Name of the file that a system has at a size."""
        return _name(system, rank_of(system, size.budget, self.shape))

    def label(self) -> str:
        """What the numbers of a note depend on, beside the size."""
        versions = [lora_fx.__version__, torch.__version__, require("onnxruntime").__version__]
        here, how = machine(), replace(self, sizes=(), openings=0)
        return str((HOW, versions, here["processor"], here["cores"], how))


def _name(system: str, rank: int) -> str:
    """Of a system's file."""
    return "base" if system in (BASE, AGAIN) else f"{system.replace(', ', '-').replace(' ', '-')}-r{rank}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# ── the files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def export(shape: Shape, system: str, rank: int, path: Path, opset: int, check: bool = False) -> None:
    """Write a system's model, with a dynamic batch and length.

    Args:
        check: hold the file against torch, too, which takes the memory of two more models.
    """
    model, example = shape.build(), torch.arange(2 * 8).reshape(2, 8)
    axes = {"input_ids": dict(enumerate(AXES))}
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(1)
        if system != BASE:
            lora_fx.apply(model, rule_of(system, rank), example, check=check)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:  # a fresh adapter changes nothing, and a runtime might see that
                parameter.data.add_(0.02 * torch.randn_like(parameter))
    folded = system in (BASE, FOLDED)
    lora_fx.export_onnx(
        model, example, path, dynamic_shapes=axes, adapters="folded" if folded else "unfolded",
        opset=opset, prove=system == FOLDED, check=check,
    )  # fmt: skip


@contextmanager
def opened(plan: Plan, folder: Path, size: Size, opening: int) -> Iterator[dict[str, Any]]:
    """A session of each system for calls of this size, opened in an order drawn anew."""
    order = random.Random(opening).sample(SYSTEMS, len(SYSTEMS))
    _one_arena()
    sessions = {system: _session(plan, folder / f"{plan.file(system, size)}.onnx", size) for system in order}
    try:
        yield sessions
    finally:
        sessions.clear()  # before the next ones are opened


def _session(plan: Plan, path: Path, size: Size) -> Any:
    options = quiet_options()
    options.intra_op_num_threads = 1 if plan.processor_time else plan.threads
    for axis, length in zip(AXES, (size.batch, size.length), strict=True):
        options.add_free_dimension_override_by_name(axis, length)
    for key in ("session.use_env_allocators", "session.use_device_allocator_for_initializers"):
        options.add_session_config_entry(key, "1")
    return Session(path, providers=plan.providers, options=options).session


@functools.cache
def _one_arena() -> None:
    """Activations of all sessions in the same memory: large batches would fill the machine's with six of them."""
    onnxruntime = require("onnxruntime")
    kind, memory = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, onnxruntime.OrtMemType.DEFAULT
    onnxruntime.create_and_register_allocator(onnxruntime.OrtMemoryInfo("Cpu", kind, 0, memory), None)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Opening:
    """One size, in sessions that were opened once."""

    key: str
    ms: dict[str, float]
    """System → the median of its calls."""
    ratio: dict[str, float]
    """System → the median over the rounds of its time over the base's."""
    rounds: int
    load: float
    """How many programs wanted a processor in the minute before."""

    @classmethod
    def read(cls, values: Any) -> Opening:
        ms, ratio = ({s: float(values[what][s]) for s in SYSTEMS} for what in ("ms", "ratio"))
        if not all(0 < value < math.inf for value in (*ms.values(), *ratio.values())):
            raise ValueError("a time is no positive number")
        return cls(str(values["key"]), ms, ratio, int(values["rounds"]), float(values["load"]))


def measure(plan: Plan, folder: Path, step: Callable[[str], None] = lambda _: None) -> list[Row]:
    """Export what is compared, time what is not in the folder's notes yet, and give the rows of all.

    Args:
        step: called with what has just been done, `Plan.steps` times.

    Raises:
        ExportError: ONNX Runtime has no provider for CUDA, and that is asked for; an export is refused.
        FileError: the folder cannot be written, or its notes are none of ours.
        LoraFxError: transformers, which has the model, is not there.
    """
    require_providers(plan.providers)
    prepared(folder)
    notes = Notes(folder / OPENINGS, Opening.read)
    label = plan.label()
    keys = {(n, size): _digest(f"{label} {size!r} {n}") for n in range(plan.openings) for size in plan.sizes}
    models = folder / f"models-{_digest(label)}"
    waiting = {place: key for place, key in keys.items() if key not in notes.found}
    if waiting:
        models.mkdir(exist_ok=True)
    for name, (system, rank) in plan.files.items():
        if waiting and not (models / f"{name}.onnx").exists():
            export(plan.shape, system, rank, models / f"{name}.onnx", plan.opset)
            if system == BASE:
                _session(plan, models / f"{name}.onnx", plan.sizes[0])  # a missing driver is told after the first file
        step(name)
    for n in range(plan.openings):
        sizes = [size for size in plan.sizes if (n, size) in waiting]
        for _ in range(len(plan.sizes) - len(sizes)):
            step("noted")
        for size in sizes:
            with opened(plan, models, size, n) as sessions:
                notes.add(_timed(plan, sessions, size, waiting[n, size]))
            step(str(size))
    shutil.rmtree(models, ignore_errors=True)
    return rows(plan, {size: [notes.found[keys[n, size]] for n in range(plan.openings)] for size in plan.sizes})


def _timed(plan: Plan, sessions: dict[str, Any], size: Size, key: str) -> Opening:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(plan.shape.vocabulary, (size.batch, size.length), generator=generator).numpy()
    load, clock = machine()["load"], time.thread_time if plan.processor_time else time.perf_counter
    calls = {s: functools.partial(sessions[s].run, None, {"input_ids": ids}) for s in SYSTEMS}
    each = _calls_of_a_turn(calls[BASE], clock)
    turns = {s: functools.partial(_repeat, call, each) for s, call in calls.items()}
    times = interleaved(turns, plan.seconds, clock=clock)
    ms = {s: 1e3 * statistics.median(times[s]) / each for s in SYSTEMS}
    ratio = {s: statistics.median(ratios(times, s, BASE)) for s in SYSTEMS}
    return Opening(key, ms, ratio, len(times[BASE]), load)


def _calls_of_a_turn(call: Callable[[], Any], clock: Callable[[], float]) -> int:
    """As many as take `TURN`, by the fastest of a few."""
    taken = []
    for _ in range(3):
        start = clock()
        call()
        taken.append(clock() - start)
    return max(1, round(TURN / max(min(taken), 1e-6)))


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


# ── what came out ────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Row:
    """One system at one size."""

    size: Size
    system: str
    parameters: int
    """Of its adapters."""
    ms: float
    ratio: Interval
    """Its time over the base's, over the openings."""
    openings: tuple[Opening, ...] = field(repr=False)

    @property
    def theirs(self) -> float | None:
        """How much slower it is in the paper's table, in percent."""
        if self.size.theirs is None or self.system in (BASE, AGAIN, UNFOLDED):
            return None
        return self.size.theirs.slower.get(self.system, 0.0)  # LoRA is the base there

    def to_json(self) -> dict[str, Any]:
        return {
            "size": str(self.size), "stands_for": self.size.stands_for or None, "system": self.system,
            "parameters": self.parameters, "ms": self.ms, "ratio": asdict(self.ratio),
            "over_both": asdict(self.paired), "slower_percent": self.slower,
            "theirs_percent": self.theirs, "of_each_opening": [o.ratio[self.system] for o in self.openings],
            "rounds": [o.rounds for o in self.openings], "load": [o.load for o in self.openings],
        }  # fmt: skip

    @property
    def over_both(self) -> list[float]:
        """Its time over the geometric mean of both sessions of the base, of each opening."""
        return [o.ratio[self.system] / math.sqrt(o.ratio[AGAIN]) for o in self.openings]

    @property
    def paired(self) -> Interval:
        return Interval.of(self.over_both)

    @property
    def slower(self) -> float:
        """Percent."""
        return 100 * (self.ratio.median - 1)


def rows(plan: Plan, found: dict[Size, list[Opening]]) -> list[Row]:
    made = []
    for size, own in found.items():
        for system in SYSTEMS:
            rank = rank_of(system, size.budget, plan.shape)
            parameters = 0 if system in (BASE, AGAIN) else adapter_parameters(system, rank, plan.shape)
            ms = statistics.median(o.ms[system] for o in own)
            ratio = Interval.of([o.ratio[system] for o in own])
            made.append(Row(size, system, parameters, ms, ratio, tuple(own)))
    return made


def verdicts(found: Sequence[Row]) -> list[Verdict]:
    """The paper's, of these rows. What is not told apart is neither so nor not so.

    Folded costs nothing where its median lies in the interval of the base's own second session. An adapter is slower
    where its time over that of both, opening by opening, has an interval above 1. An interval of the adapter above one
    of the base against itself would count what openings scatter by twice: of 2.6 % at a scatter of 1.5 % seven openings
    then show one case in fifty, and so half of them. It is slowed most at a size where that time over the same one at
    each other size, opening by opening again, has an interval above 1.
    """
    by = {(row.size, row.system): row.ratio for row in found}
    paired = {(row.size, row.system): row.paired for row in found}
    sizes = list(dict.fromkeys(row.size for row in found))
    made = []
    for size in sizes:
        again, folded = by[size, AGAIN], by[size, FOLDED]
        seen = f"{folded.median:.3f} of the base, which is {again.span} of itself"
        made.append(Verdict(f"{size}: folded is within what the base has against itself", folded.median in again, seen))
        for system in ADAPTERS:
            own = paired[size, system]
            seen = f"{own.span} of both its sessions"
            made.append(Verdict(f"{size}: {system} is slower than the base", own.above(_ONE), seen))
    first, *others = sorted(sizes, key=lambda size: (size.batch, size.length))
    for system in ADAPTERS if others else ():
        over = [_compared(found, system, first, size) for size in others]
        seen = ", ".join(f"{one.span} of {size}'s" for size, one in zip(others, over, strict=True))
        most = all_of(one.above(_ONE) for one in over)
        made.append(Verdict(f"{system} is slowed most at {first}", most, f"its time over the base's is {seen}"))
    return made


_ONE = Interval(1, 1, 1, 1)


def _compared(found: Sequence[Row], system: str, one: Size, other: Size) -> Interval:
    """What a system takes over the base at one size, over the same at another, opening by opening."""
    own = {row.size: row.over_both for row in found if row.system == system}
    return Interval.of([a / b for a, b in zip(own[one], own[other], strict=True)])


def shown(plan: Plan, found: Sequence[Row]) -> str:
    """How it was measured, the table, and the claims with what they came to."""
    here, runtime = machine(), require("onnxruntime").__version__
    threads = "one thread" if plan.processor_time else f"{plan.threads or here['cores']} threads"
    loads = [o.load for row in found for o in row.openings]
    lines = [
        f"{plan.shape}, float32, one forward pass that gives the next token.",
        f"ONNX Runtime {runtime}, {plan.providers[0]}, {threads}; {here['processor']}, {here['cores']} cores, "
        f"load {min(loads):.1f} to {max(loads):.1f}.",
        f"Sessions opened {plan.openings} times, {'seconds of the processor, ' if plan.processor_time else ''}medians; "
        f"interval: where the median ratio to the base lies with {100 * found[0].ratio.confidence:.1f} %.",
    ]
    scaled = [f"{row.size} in the place of {row.size.stands_for}" for row in found if row.size.stands_for]
    lines += [f"Sizes: {', '.join(dict.fromkeys(scaled))}."] if scaled else []
    header = "batch×length", "system", "parameters", "ms", "/ base", "interval", "slower", "theirs"
    cells = [
        (
            str(row.size) if row.system == BASE else "", row.system, f"{row.parameters:,}" if row.parameters else "",
            f"{row.ms:.2f}", *(("", "") if row.system == BASE else (f"{row.ratio.median:.3f}", row.ratio.span)),
            "" if row.system == BASE else f"{row.slower:+.1f} %",
            "" if row.theirs is None or row.system == BASE else f"{row.theirs:+.1f} %",
        )
        for row in found
    ]  # fmt: skip
    return "\n".join([*lines, "", table(header, cells, right=range(2, 8)), "", *ending(verdicts(found))])


def to_json(plan: Plan, found: Sequence[Row]) -> dict[str, Any]:
    own = verdicts(found)
    how = {
        "shape": {**asdict(plan.shape), "vocabulary": plan.shape.vocabulary, "scaled": plan.shape != Shape()},
        "provider": plan.providers[0], "openings": plan.openings, "seconds": plan.seconds, "threads": plan.threads,
        "processor_time": plan.processor_time, "onnxruntime": require("onnxruntime").__version__, "machine": machine(),
    }  # fmt: skip
    said = {"rows": [row.to_json() for row in found], "verdicts": [asdict(verdict) for verdict in own]}
    return {**how, **said, "holds": all_of(verdict.holds for verdict in own)}
