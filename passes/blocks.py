"""Which blocks a kind stands behind that rewrites what blocks give, and in whose call they and the table are.

The model runs once more on its example inputs, and is watched: a block must give the activations of the ids that the
table was read with last, (*ids.shape, d), itself or as the first of a tuple. Which reading is meant is that of the
innermost module in whose call both are: of an encoder-decoder with one table each stack has its own. Shapes tell which
axis is which, so the ids of the example inputs must have no two axes of one length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from lora_fx.deltas.calls import Calls, new_calls
from lora_fx.deltas.rewrites import SEPARATOR
from lora_fx.errors import PlanError, few
from lora_fx.graph.capture import capture_graph
from lora_fx.graph.program import Program, Weight
from lora_fx.model.behind import hidden
from lora_fx.model.lookups import Lookups


@dataclass(frozen=True)
class Standing:
    """Where it stands."""

    blocks: tuple[str, ...]
    """Paths."""
    calls: tuple[str, ...]
    """The path of the innermost module whose call has a reading of the table and blocks in it, for each such; none
    where nothing has run."""

    @property
    def setting(self) -> str:
        """As ``blocks`` among the settings says it."""
        return SEPARATOR.join(self.blocks)


def find_standing(
    program: Program, weight: Weight, owners: Sequence[tuple[str, str]], wanted: str | None, width: int
) -> Standing:
    """The blocks that these globs name; of none, those of the model.

    Args:
        weight: the table.
        owners: path and attribute of each module that reads it.
        wanted: globs over paths, several with ``|``; the outermost modules that they match are meant. None: the
            numbered children of one list whose outputs could be rewritten.
        width: of the activations.

    Raises:
        PlanError: there is none, or one of those that are named cannot have it.
    """
    model = program.model
    above = {".".join(path.split(".")[:n]) for path, _ in owners for n in range(path.count(".") + 2)} | {""}
    callers = [path for path in above if not isinstance(model.get_submodule(path), fx.GraphModule)]
    named = _named(model, wanted, weight) if wanted is not None else _numbered(program)
    paths = {path: module for path, module in named.items() if path not in above}
    if not paths:
        raise _error(weight, "no module of the model is a block that it could stand behind", _SAY)
    if program.capture is None:
        return Standing(tuple(_chosen(paths, weight) if wanted is None else paths), ())
    watch = _Watch(width)
    tables = [(model.get_submodule(path), attribute) for path, attribute in owners]
    with watch.following(model, tables, paths, callers):
        capture_graph(model, program.capture.inputs)
    reasons = {path: watch.why_not(path, module) for path, module in paths.items()}
    able = [path for path, why in reasons.items() if not why]
    if wanted is None and not able:
        path, why = next(iter(reasons.items()))
        raise _error(weight, f"the block {path} {why}", _SAY)
    if wanted is None:
        lists = {path.rpartition(".")[0] for path, why in reasons.items() if why}
        able = _chosen([path for path in able if path.rpartition(".")[0] not in lists], weight)
    elif wrong := [path for path in paths if path not in able]:
        raise _error(weight, f"the block {wrong[0]} {reasons[wrong[0]]}", "leave it out of settings['blocks']")
    return Standing(tuple(able), tuple(dict.fromkeys(max(watch.calls[path], key=len) for path in able)))


_SAY = "say which are meant: settings={'blocks': 'h.*'}, a glob over paths"


def _error(weight: Weight, reason: str, remedy: str) -> PlanError:
    return PlanError(
        f"the kind 'prefix_layer' rewrites what blocks give, and {reason}", place=weight.name, remedy=remedy
    )


def _named(model: nn.Module, wanted: str, weight: Weight) -> dict[str, nn.Module]:
    """The outermost modules that these globs match, each once."""
    found: dict[str, nn.Module] = {}
    modules = [(path, module) for path, module in model.named_modules() if path]
    for glob in map(str.strip, wanted.split("|")):
        matched = [(path, module) for path, module in modules if fnmatchcase(path, glob)]
        if not matched:
            remedy = f"its modules are {few([path for path, _ in modules], 5)}"
            raise _error(weight, f"{glob!r} matches no module", remedy)
        found |= dict(matched)
    return {path: m for path, m in found.items() if not any(path.startswith(f"{other}.") for other in found)}


def _numbered(program: Program) -> dict[str, nn.Module]:
    """The children of lists that have weights in them."""
    weights = [name for weight in program.weights for name in weight.names]
    return {
        path: module
        for path, module in program.model.named_modules()
        if path.rpartition(".")[2].isdigit() and any(name.startswith(f"{path}.") for name in weights)
    }


def _chosen(able: Iterable[str], weight: Weight) -> list[str]:
    """Those of one list, which is in no other's.

    Raises:
        PlanError: there are several, or none.
    """
    lists: dict[str, list[str]] = {}
    for path in able:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    outermost = {
        parent: own
        for parent, own in lists.items()
        if not any(parent == path or parent.startswith(f"{path}.") for path in able)
    }
    if len(outermost) != 1:
        globs = [f"{parent}.*".lstrip(".") for parent in outermost]
        both = (
            f"say which are meant: settings={{'blocks': {' | '.join(globs[:2])!r}}}, or one of these" if globs else _SAY
        )
        raise _error(weight, f"the lists whose children could be meant are {few(globs, 5) if globs else 'none'}", both)
    return next(iter(outermost.values()))


@dataclass(eq=False)
class _Call:
    """One call of a module, while it runs."""

    path: str
    own: Calls = field(default_factory=new_calls)

    def __post_init__(self) -> None:
        self.own.enter()


@dataclass
class _Watch:
    """What happens while a model runs."""

    width: int
    calls: dict[str, set[str]] = field(default_factory=dict)
    """Block → the modules in whose call it and one reading of the table before it were, each time."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Block → why nothing can stand behind it."""
    _read: bool = False
    """The table has been read."""
    _running: list[_Call] = field(default_factory=list)

    @contextmanager
    def following(
        self,
        model: nn.Module,
        tables: Sequence[tuple[nn.Module, str]],
        blocks: Mapping[str, nn.Module],
        above: Iterable[str],
    ) -> Iterator[None]:
        with ExitStack() as hooks:
            for path in above:
                module = model.get_submodule(path)
                hooks.callback(module.register_forward_pre_hook(partial(self._begins, path)).remove)
                hooks.callback(module.register_forward_hook(self._ends, always_call=True).remove)
            for path, module in blocks.items():
                hooks.callback(module.register_forward_hook(partial(self._gives, path), prepend=True).remove)
            hooks.enter_context(Lookups(tables, self._looked_up))
            yield

    def why_not(self, path: str, module: nn.Module) -> str:
        """Why nothing can stand behind this block; empty where it can."""
        if isinstance(module, fx.GraphModule):
            return "is a GraphModule, whose graph its callers may have in theirs"
        if "forward" in module.__dict__:
            return "has a forward that is replaced on the instance (as accelerate does)"
        if path not in self.calls:
            return "does not run on the example inputs"
        if path in self.reasons:
            return self.reasons[path]
        return "" if self.calls[path] else "runs in no call of a module in which the table is read"

    def _begins(self, path: str, module: nn.Module, args: Any) -> None:
        self._running.append(_Call(path))

    def _ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()

    def _looked_up(self, table: torch.Tensor, ids: torch.Tensor) -> None:
        self._read = True
        for call in self._running:
            call.own.give(ids, table.shape[0])

    def _gives(self, path: str, module: nn.Module, args: Any, output: Any) -> None:
        read = [call for call in self._running if call.own.ids is not None]
        told = [call for call in read if not call.own.mixed]
        here = {call.path for call in told}
        self.calls[path] = self.calls.get(path, here) & here
        if why := self._why_not(hidden(output), read, told):
            self.reasons.setdefault(path, why)
        for call in read:
            call.own.asked = True

    def _why_not(self, h: torch.Tensor | None, read: Sequence[_Call], told: Sequence[_Call]) -> str:
        if not self._read:
            return "runs before the table is read"
        if read and not told:
            return (
                "runs behind two readings of the table, with no block that is meant between: whose positions it has "
                "is not known"
            )
        if h is None:
            return "gives no activations, itself or as the first of a tuple"
        ids = told[-1].own.ids if told else None
        if ids is None:
            return ""
        if h.shape != (*ids.shape, self.width):
            return f"gives {tuple(h.shape)}, for ids of {tuple(ids.shape)} and {self.width} features of the table"
        if len(set(ids.shape)) < ids.ndim:
            return f"is given ids of {tuple(ids.shape)}: which axis is which cannot be told; give other example inputs"
        return ""
