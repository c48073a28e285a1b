"""A sequence of passes, as a value: print it, change it, run it.

pipeline = lora_fx.pipeline("apply", rules, example_inputs)
print(pipeline)                                        # a table: each pass, what it requires, what it ensures
run = pipeline.after("select", Budget(10_000))(model)  # wholly or not at all
print(run)                                             # what each pass did, and how long it took
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.changes import changing
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import PipelineError
from lora_fx.model.classes import show
from lora_fx.model.inventory import inventory
from lora_fx.passes.base import Facts, Pass
from lora_fx.tables import table

_WIDEST = 48  # characters of an option in the table


@dataclass(frozen=True)
class Step:
    """One pass that has run."""

    name: str
    seconds: float
    modified: bool
    gave: tuple[str, ...]
    """The types of the facts it has found."""
    changed: tuple[str, ...] = ()
    """The paths of the modules that it changed; known where a folder for the dump was given."""


@dataclass(frozen=True)
class Run:
    """What a pipeline came to. `print` it for the time of each pass."""

    name: str
    model: nn.Module
    facts: Facts
    steps: tuple[Step, ...]

    @property
    def modified(self) -> bool:
        return any(step.modified for step in self.steps)

    @property
    def seconds(self) -> float:
        return sum(step.seconds for step in self.steps)

    def __str__(self) -> str:
        header = ("pass", "ms", "model", "gave", "changed")
        rows = [
            (
                s.name, f"{1000 * s.seconds:.1f}", "modified" if s.modified else "as it was",
                ", ".join(s.gave), ", ".join(path or "the model" for path in s.changed),
            )
            for s in self.steps
        ]  # fmt: skip
        return f"{table(header, rows, right=(1,))}\n{self.name}: {1000 * self.seconds:.1f} ms"


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. Two of one name, or a pass that needs a fact which none before it gives, are refused.

    Args:
        name: of the verb that it is: in errors, and in the table.
        passes: run one after the other, on one model.

    Raises:
        PipelineError: the passes do not fit together.
    """

    name: str
    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        known: set[type] = set()
        for k, one in enumerate(self.passes):
            if one.name in self.names[:k]:
                raise PipelineError(
                    f"two passes have the name {one.name!r}",
                    place=f"pipeline {self.name!r}",
                    remedy="give one of them another name",
                )
            missing = [c.name for c in one.requires if c.fact is not None and c.fact not in known]
            if missing:
                raise PipelineError(
                    f"pass {one.name!r} requires {', '.join(missing)}, and no pass before it gives that",
                    place=f"pipeline {self.name!r}",
                    remedy=f"insert it later, or a pass that gives it before; the passes are {', '.join(self.names)}",
                )
            known |= {c.fact for c in one.ensures if c.fact is not None}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.passes)

    def __getitem__(self, name: str) -> Pass:
        """The pass of this name."""
        return self.passes[self._place(name)]

    def before(self, name: str, *passes: Pass) -> Pipeline:
        """With these passes in front of the one of that name.

        Raises:
            PipelineError: there is no such pass, or the new ones do not fit there.
        """
        return self._with(self._place(name), passes)

    def after(self, name: str, *passes: Pass) -> Pipeline:
        """With these passes behind the one of that name; errors as in `before`."""
        return self._with(self._place(name) + 1, passes)

    def without(self, *names: str) -> Pipeline:
        """Without the passes of these names; errors as in `before`."""
        places = {self._place(name) for name in names}
        return replace(self, passes=tuple(one for k, one in enumerate(self.passes) if k not in places))

    def __str__(self) -> str:
        header = ("", "pass", "options", "requires", "ensures")
        rows = [
            (
                str(k), one.name, ", ".join(_options(one)),
                ", ".join(c.name for c in one.requires), ", ".join(c.name for c in one.ensures),
            )
            for k, one in enumerate(self.passes, 1)
        ]  # fmt: skip
        return f"{self.name}\n{table(header, rows, right=(0,))}"

    def __call__(self, model: nn.Module, *, dump: str | os.PathLike[str] | None = None) -> Run:
        """Run the passes on a model, in place: all of them, or none.

        Args:
            dump: a folder, made if it is not there. For each pass it gets a folder with the text of every module that
                the pass changed, before and after, and of every fact that it found.

        Returns:
            The model, the facts, and what each pass did.

        Raises:
            PipelineError: the model is no module, or a condition does not hold between two passes.
            LoraFxError: a pass refuses; the model is bitwise what it was.
        """
        if not isinstance(model, nn.Module):
            program = isinstance(model, torch.export.ExportedProgram)
            remedy = "pass copy.deepcopy(program.module())" if program else "pass the model itself"
            raise PipelineError(f"{type(model).__name__} is no torch.nn.Module", place=self.name, remedy=remedy)
        steps: list[Step] = []
        with ExitStack() as outside, changing(model, self.name) as undo, ExitStack() as inside:
            facts = Facts(undo, inside, outside)
            before = _texts(model) if dump is not None else {}
            for number, one in enumerate(self.passes, 1):
                start = time.perf_counter()
                result = one.checked(model, facts)
                seconds = time.perf_counter() - start
                changed: tuple[str, ...] = ()
                if dump is not None:
                    after = _texts(model) if result.modified else before
                    changed = _dump(Path(dump) / f"{number:02d}-{one.name}", before, after, result.facts)
                    before = after
                gave = tuple(type(fact).__name__ for fact in result.facts)
                steps.append(Step(one.name, seconds, result.modified, gave, changed))
        return Run(self.name, model, facts, tuple(steps))

    def _place(self, name: str) -> int:
        if name not in self.names:
            raise PipelineError(
                f"there is no pass named {name!r}",
                place=f"pipeline {self.name!r}",
                remedy=f"the passes are {', '.join(self.names)}",
            )
        return self.names.index(name)

    def _with(self, place: int, passes: tuple[Pass, ...]) -> Pipeline:
        return replace(self, passes=(*self.passes[:place], *passes, *self.passes[place:]))


def _options(one: Pass) -> Iterator[str]:
    """The fields of a pass that are not their defaults, on one short line each."""
    for field in fields(one):  # type: ignore[arg-type]  # every pass is a dataclass: `Pass` itself has no fields
        value = getattr(one, field.name)
        if value is not field.default:
            text = " ".join(repr(pytree.tree_map_only(torch.Tensor, _Shape, value)).split())
            yield f"{field.name}={text if len(text) <= _WIDEST else text[:_WIDEST] + '…'}"


class _Shape:
    """A tensor in the table: ``float32 (2, 5)``."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.text = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"

    def __repr__(self) -> str:
        return self.text


# ── what a pass has changed, as text ─────────────────────────────────────────────────────────────────────────────────


def _texts(model: nn.Module) -> dict[str, str]:
    """The path of each module → its parameters and the forward it runs."""
    here = inventory(model)
    return {paths[0]: _text(module, here.of(module)) for module, paths in here.modules.items()}


def _text(module: nn.Module, adapters: Mapping[str, Adapter]) -> str:
    lines = [type(module).__name__]
    tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
    lines += [f"  {name}: {_numbers(t)}" for held in tables for name, t in held.items() if t is not None]
    for name, adapter in adapters.items():
        lines.append(f"  {name}: {adapter.extra_repr()}, {'active' if adapter.active else 'inactive'}")
        lines += [f"    {factor}: {_numbers(t)}" for factor, t in adapter.named_parameters()]
    return "\n".join([*lines, "", show(module), ""])


def _numbers(tensor: torch.Tensor) -> str:
    """Which numbers, in a few characters: ``float32 (8, 6) frozen #3f2a91c4``."""
    kind = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    trained = "trained" if tensor.requires_grad else "frozen"
    if tensor.is_meta:
        return f"{kind} {trained}, on meta"
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{kind} {trained} #{hashlib.sha256(bits).hexdigest()[:8]}"


def _dump(folder: Path, before: dict[str, str], after: dict[str, str], facts: tuple[object, ...]) -> tuple[str, ...]:
    """Write what differs; the paths of the modules that do come back."""
    folder.mkdir(parents=True, exist_ok=True)
    for fact in facts:
        (folder / f"{type(fact).__name__.lower()}.txt").write_text(f"{fact}\n", encoding="utf-8")
    changed = tuple(path for path in dict.fromkeys((*before, *after)) if before.get(path) != after.get(path))
    for path in changed:
        for moment, texts in (("before", before), ("after", after)):
            (folder / f"{path or 'model'}.{moment}.txt").write_text(texts.get(path, ""), encoding="utf-8")
    return changed
