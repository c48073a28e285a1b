"""Tables 5, 6, 2–4 and 16 of the LoRA paper, on two small tasks: each row is trained, from several seeds.

    weights    one budget of parameters, spent on q, k, v, o, some of them, the MLPs, or everything      (table 5)
    ranks      1, 2, 4, 8, 64, on q, on q and v, and on q, k, v, o                                       (table 6)
    methods    what the paper compares LoRA with, at about one budget                                    (tables 2–4)
    data       100 examples, 1,000, and all                                                              (table 16)
    choice     the ranks given by `lora_fx.suggest`, by AdaLoRA, or the same to all                      (question 3)

Each run is noted in the folder when it is over, so that a sweep that was interrupted goes on where it was. A run that
stands in two tables is trained once.
"""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.demo import experiment
from lora_fx.paper.notes import Notes
from lora_fx.paper.outcome import prepared
from lora_fx.paper.tasks import TASKS, Effort, Placed, Task, base_of, train
from lora_fx.tables import table

TABLES = ("weights", "ranks", "methods", "data", "choice")
RUNS = "runs.jsonl"

_ROLES = {
    "q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.output",
    "up": "mlp.up", "down": "mlp.down",
}  # fmt: skip
_COMBINATIONS = {
    "q": "q", "k": "k", "v": "v", "o": "o", "q, k": "q k", "q, v": "q v", "q, k, v, o": "q k v o", "mlp": "up down",
    "all": "q k v o up down",
}  # fmt: skip

SUGGEST, ADALORA = "suggest", "adalora"


@dataclass(frozen=True)
class System:
    """One way to adapt a base model."""

    name: str
    rules: tuple[Rule, ...] = ()
    then: tuple[Rule, ...] = ()
    """More of them, for sites that have an adapter by the first: of a linear layer its bias."""
    rate: float = 3e-2
    chosen: str = ""
    """Who gives the ranks, where that is not the rules: `SUGGEST` or `ADALORA`, which start from them."""
    budget: int = 0
    """Parameters that these may give."""
    prefix: int = 0
    """Tokens of its own, before those of a batch."""

    @property
    def label(self) -> str:
        rules = [rule.label for rule in (*self.rules, *self.then)]
        return f"{self.name} {rules} {self.rate} {self.chosen} {self.budget} {self.prefix}"


@dataclass(frozen=True)
class Run:
    """One training."""

    table: str
    task: str
    system: System
    seed: int
    steps: int
    base_steps: int
    examples: int
    """0: all."""
    row: str
    column: str = ""

    @property
    def key(self) -> str:
        """What it is, whichever table it stands in."""
        task = TASKS[self.task]
        what = f"{self.task} {self.base_steps} {task.effort.batch} {self.steps} {self.system.label} {self.examples}"
        return hashlib.sha256(f"{what} {self.seed}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    key: str
    score: float
    parameters: int

    @classmethod
    def read(cls, values: Any) -> Outcome:
        outcome = cls(str(values["key"]), float(values["score"]), int(values["parameters"]))
        if not math.isfinite(outcome.score):
            raise ValueError(f"score {outcome.score}")
        return outcome


@dataclass(frozen=True)
class Cell:
    """The seeds of one row of a table, in one column."""

    table: str
    task: str
    row: str
    column: str
    parameters: int
    scores: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.scores)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; 0 of one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else 0.0

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "mean": self.mean, "spread": self.spread}


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def planned(task: Task, tables: Sequence[str], seeds: int, quick: bool = False) -> list[Run]:
    """Every run of these tables; `quick` trains a tenth as long, from one seed."""
    base_steps, steps = task.base_effort.steps, task.effort.steps
    if quick:
        base_steps, steps, seeds = base_steps // 10, steps // 10, 1
    systems = _Systems(task)
    rows = [
        (name, row, column, system, examples)
        for name in tables
        for row, column, system, examples in getattr(systems, name)()
    ]
    return [
        Run(name, task.name, system, seed, steps, base_steps, examples, row, column)
        for name, row, column, system, examples in rows
        for seed in range(seeds)
    ]


_Row = tuple[str, str, System, int]


class _Systems:
    """The rows of each table, for one task: (row, column, system, examples)."""

    def __init__(self, task: Task) -> None:
        rows = lora_fx.plan(task.model().eval(), Rule(role="attention.* | mlp.*", rank=1), task.example()).rows
        self.cost = {name: sum(row.parameters for row in rows if row.role == role) for name, role in _ROLES.items()}
        """The parameters of one rank, in all layers."""
        self.depth = sum(row.role == _ROLES["q"] for row in rows)
        self.budget = 16 * self.cost["q"]
        self.width = task.width
        self.reads = task.reads

    def evenly(self, parts: str, budget: int) -> tuple[Rule, ...]:
        """One rank after the other to each of the parts, while it fits."""
        names = parts.split()
        ranks, left = dict.fromkeys(names, 0), budget
        while fitting := [name for name in names if self.cost[name] <= left]:
            name = min(fitting, key=lambda name: ranks[name])
            ranks[name], left = ranks[name] + 1, left - self.cost[name]
        return tuple(Rule(role=_ROLES[name], rank=rank) for name, rank in ranks.items() if rank)

    def weights(self) -> Iterator[_Row]:
        for name, parts in _COMBINATIONS.items():
            yield name, "", System(f"LoRA {name}", self.evenly(parts, self.budget)), 0

    def ranks(self) -> Iterator[_Row]:
        for name in ("q", "q, v", "q, k, v, o"):
            for rank in (1, 2, 4, 8, 64):
                # one alpha for all ranks, as the paper has it (4.1): alpha = r = 64 diverges at the rate of the others
                rules = tuple(Rule(role=_ROLES[part], rank=rank, alpha=8) for part in _COMBINATIONS[name].split())
                yield name, f"r = {rank}", System(f"LoRA {name}", rules), 0

    def methods(self) -> Iterator[_Row]:
        for system in self._compared():
            yield system.name, "", system, 0

    def data(self) -> Iterator[_Row]:
        for system in self._compared():
            if system.name in _LOW_DATA:
                for examples in (100, 1000, 0):
                    yield system.name, f"{examples:,} examples" if examples else "all examples", system, examples

    def choice(self) -> Iterator[_Row]:
        for name in ("q, v", "all"):
            yield f"the same rank: {name}", "", System(f"LoRA {name}", self.evenly(_COMBINATIONS[name], self.budget)), 0
        everywhere = Rule(role=" | ".join(_ROLES.values()), rank=1)
        yield "lora_fx.suggest", "", System("suggest", (everywhere,), chosen=SUGGEST, budget=self.budget), 0
        yield "AdaLoRA: all", "", self._adalora("all"), 0

    def _adalora(self, name: str) -> System:
        """Starts with half as many ranks again as it ends with (Zhang et al. 2023, 4.1)."""
        rules = self.evenly(_COMBINATIONS[name], self.budget * 3 // 2)
        rules = tuple(replace(rule, kind="adalora") for rule in rules)
        return System(f"AdaLoRA {name}", rules, rate=_RATES["AdaLoRA"], chosen=ADALORA, budget=self.budget)

    def _compared(self) -> Iterator[System]:
        last = f"{self.depth - 2}-{self.depth - 1}"
        full, bias = (Rule(where="*", kind=kind, otherwise="skip") for kind in ("full", "bias"))
        top = replace(full, layers=last), replace(bias, layers=last)
        yield System("full fine-tuning", (full,), (bias,), _RATES["full fine-tuning"])
        yield System("FT-Top2", top[:1], top[1:], _RATES["FT-Top2"])
        yield System("bias only", (bias,), rate=_RATES["bias only"])
        tokens = Rule(where="embedding", kind="tokens", settings={"prefix": _PREFIX})
        if self.reads:
            yield System("PreEmbed", (tokens,), rate=_RATES["PreEmbed"], prefix=_PREFIX)
            layers = replace(tokens, kind="prefix_layer")
            yield System("PreLayer", (layers,), rate=_RATES["PreLayer"], prefix=_PREFIX)
        both = " | ".join((_ROLES["o"], _ROLES["down"]))
        narrow = self.budget // (2 * self.depth * (2 * self.width + 1))  # 2·d·r + r + d parameters at each place
        for name, role, rank, settings in (
            ("Adapter H", both, narrow, {}),
            ("Adapter L", _ROLES["down"], 2 * narrow, {"norm": True, "activation": "relu"}),
            ("Adapter P", _ROLES["down"], 2 * narrow, {}),
        ):
            rule = Rule(role=role, kind="bottleneck", rank=rank, settings=settings)
            yield System(name, (rule,), rate=_RATES["adapters"])
        yield System("Compacter", (Rule(role=both, kind="compacter", rank=16),), rate=_RATES["adapters"])
        yield self._adalora("q, v")
        lora = self.evenly("q v", self.budget)
        yield System("LoRA q, v", lora)
        if self.reads:
            yield System("LoRA q, v + PreEmbed", (*lora, tokens), prefix=_PREFIX)
            rest = self.evenly("q v", self.budget - _PREFIX * self.depth * self.width)
            yield System("LoRA q, v + PreLayer", (*rest, layers), prefix=_PREFIX)


_PREFIX = 16

_LOW_DATA = ("full fine-tuning", "bias only", "PreEmbed", "Adapter H", "LoRA q, v")

#: of each method the best of three or four rates, two to a decade, for both tasks; on one seed that is in no table
_RATES = {
    "full fine-tuning": 3e-3, "FT-Top2": 1e-2, "bias only": 3e-2, "AdaLoRA": 1e-1, "PreEmbed": 1e-1, "PreLayer": 3e-1,
    "adapters": 3e-2,
}  # fmt: skip


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def trained(run: Run, base: Path) -> Outcome:
    """Train it, and score it on what is held out."""
    from safetensors.torch import load_file

    task = TASKS[run.task]
    with experiment.one_thread(run.seed):
        model = task.model()
        model.load_state_dict(load_file(base))
        model.requires_grad_(False).eval()
        data = task.after()[: run.examples or None]
        how = Effort(run.steps, task.effort.batch, run.system.rate)
        placed = Placed(run.system.prefix, getattr(task, "characters", 0))
        for rules in (_rules(run, model, task, data, placed), run.system.then):
            if rules:
                lora_fx.apply(model, rules, task.example(), check=False)
        budget = _budget(run, model)
        train(model, task, data, how, placed, budget)
        if budget is not None:
            budget.finish()
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Outcome(run.key, task.score(model, placed), parameters)


def _rules(run: Run, model: nn.Module, task: Task, data: torch.Tensor, placed: Placed) -> Sequence[Rule]:
    if run.system.chosen != SUGGEST:
        return run.system.rules
    batches = list(data[: 8 * 32].split(32))
    rules = list(run.system.rules)
    return lora_fx.suggest(
        model, run.system.budget, batches, lambda m, b: task.loss(m, b, placed), rules, measure=False
    ).rules


def _budget(run: Run, model: nn.Module) -> Any:
    """AdaLoRA's, which ends with as many ranks as the budget of parameters has room for."""
    if run.system.chosen != ADALORA:
        return None
    adapters = [m for m in model.modules() if isinstance(m, lora_fx.Adapter)]
    each = sum(p.numel() for a in adapters for p in a.parameters()) / sum(a.rank for a in adapters)
    ranks = min(int(run.system.budget / each), sum(a.rank for a in adapters))
    warmup, settle = run.steps // 10, run.steps // 3
    return lora_fx.Budget(model, ranks, run.steps, warmup=warmup, settle=settle)


# ── the sweep ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sweep(
    runs: Sequence[Run], folder: Path, jobs: int | None = None, step: Callable[[str], None] = lambda _: None
) -> list[Cell]:
    """Train what is not in the folder yet, and give the rows of all.

    Args:
        jobs: how many are trained at a time, each with one thread; as many as there are cores by default.
        step: called with what has just been done.

    Raises:
        FileError: the folder cannot be written, or its notes are none of ours.
    """
    prepared(folder)
    notes = Notes(folder / RUNS, Outcome.read)
    bases = {run.task: base_of(TASKS[run.task], run.base_steps, folder)[1] for run in runs}
    waiting = {run.key: run for run in runs if run.key not in notes.found}
    for key in dict.fromkeys(run.key for run in runs if run.key in notes.found):
        step(key)
    workers = min(jobs or os.cpu_count() or 1, len(waiting))
    if workers == 1:
        for run in waiting.values():
            notes.add(trained(run, bases[run.task]))
            step(run.key)
    if workers > 1:
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        with ProcessPoolExecutor(workers, context) as pool:
            try:
                done = [pool.submit(trained, run, bases[run.task]) for run in waiting.values()]
                for future in as_completed(done):
                    notes.add(future.result())
                    step(future.result().key)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return cells(runs, notes.found)


def cells(runs: Sequence[Run], found: Mapping[str, Outcome]) -> list[Cell]:
    groups: dict[tuple[str, str, str, str], list[Outcome]] = {}
    for run in runs:
        groups.setdefault((run.table, run.task, run.row, run.column), []).append(found[run.key])
    return [
        Cell(*place, own[0].parameters, tuple(outcome.score for outcome in own)) for place, own in groups.items()
    ]  # fmt: skip


def shown(found: Sequence[Cell]) -> str:
    """A table for each, with the best row marked; ± is the standard deviation over the seeds."""
    parts = []
    for task, name in dict.fromkeys((cell.task, cell.table) for cell in found):
        own = [cell for cell in found if (cell.task, cell.table) == (task, name)]
        columns = list(dict.fromkeys(cell.column for cell in own))
        by = {(cell.row, cell.column): cell for cell in own}
        best = {column: min(c.mean for c in own if c.column == column) for column in columns}
        rows = []
        for row in dict.fromkeys(cell.row for cell in own):
            first = next(cell for cell in own if cell.row == row)
            count = "" if len(columns) > 1 and name == "ranks" else f"{first.parameters:,}"
            rows.append((row, count, *(_score(by[row, column], best[column]) for column in columns)))
        header = (name, "parameters", *(column or TASKS[task].unit for column in columns))
        lines = [f"{task}: {TASKS[task].unit}, {len(own[0].scores)} seeds" if len(own[0].scores) > 1 else task]
        parts.append("\n".join([*lines, table(header, rows, right=tuple(range(1, len(header))))]))
    return "\n\n".join(parts)


def _score(cell: Cell, best: float) -> str:
    spread = f" ± {cell.spread:.3f}" if len(cell.scores) > 1 else ""
    return f"{cell.mean:.3f}{spread}{' *' if cell.mean == best else '  '}"
