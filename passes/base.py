"""What a pass is:   requires → call → ensures.

A pass is a frozen dataclass whose fields are its options. It gets a model, and what the passes before it have found
out; it changes the model in place or leaves it alone, and says so. What it needs and what it leaves behind are
conditions with names, which are checked: a pass that refuses leaves the model bitwise as it was.

    @dataclass(frozen=True)
    class Budget(Pass):
        most: int
        name = "budget"
        requires = (given(Plan),)

        def call(self, model, facts):
            if facts[Plan].parameters > self.most:
                raise PlanError(…)
            return Result(model, modified=False)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from lora_fx.changes import Undo, changing, safe_point
from lora_fx.errors import LoraFxError, PipelineError, PlanError
from lora_fx.model.inventory import is_folded

T = TypeVar("T")


class Facts:
    """What the passes of one run have found out, by type: ``facts[Plan]``. And what the run keeps open.

    Args:
        undo: the list of the change in progress: see `lora_fx.changes.changing`.
        inside: what `enter` opens, closed while the change can still be undone.
        outside: what `outlast` opens, closed when it is over.
    """

    def __init__(self, undo: list[Undo], inside: ExitStack, outside: ExitStack) -> None:
        self.undo = undo
        self._inside, self._outside = inside, outside
        self._found: dict[type, Any] = {}

    def __getitem__(self, kind: type[T]) -> T:
        """The newest fact of this type.

        Raises:
            PipelineError: no pass has given one.
        """
        if kind not in self._found:
            raise PipelineError(
                f"no pass before gives a {kind.__name__}",
                place="facts",
                remedy=f"put given({kind.__name__}) into what the pass requires; it has {self._listing()}",
            )
        return self._found[kind]

    def __contains__(self, kind: type) -> bool:
        return kind in self._found

    def get(self, kind: type[T]) -> T | None:
        """The newest fact of this type; None where there is none."""
        return self._found.get(kind)

    def add(self, facts: Iterable[object]) -> None:
        self._found.update((type(fact), fact) for fact in facts)

    def enter(self, context: AbstractContextManager[T]) -> T:
        """Keep a context open until the last pass has run."""
        return self._inside.enter_context(context)

    def outlast(self, context: AbstractContextManager[T]) -> T:
        """Keep a context open until nothing can be undone any more."""
        return self._outside.enter_context(context)

    def _listing(self) -> str:
        return ", ".join(kind.__name__ for kind in self._found) or "none"


@dataclass(frozen=True)
class Condition:
    """Something that must hold of a model, or of what has been found out about it."""

    name: str
    """In the table of a pipeline: ``an active adapter``."""
    why_not: Callable[[nn.Module, Facts], str] = field(repr=False)
    """Why it does not hold; empty where it does."""
    remedy: str = "put a pass before it that ensures that"
    error: type[LoraFxError] = PipelineError
    fact: type | None = None
    """The type of the fact, where that is the condition: a pipeline is refused when no pass before gives it."""

    def check(self, model: nn.Module, facts: Facts, name: str) -> None:
        """Raise where it does not hold before the pass of this name."""
        if why := self.why_not(model, facts):
            raise self.error(
                f"{why} (it requires {self.name})",
                place=f"pass {name!r} on {type(model).__name__}",
                remedy=self.remedy,
            )


UNFOLDED = Condition(
    "a model that is not folded",
    lambda model, facts: "the model is folded: its adapters are in its weights" if is_folded(model) else "",
    "lora_fx.unfold(model) first, or make the fold final: fold(model, final=True)",
    PlanError,
)


def given(kind: type) -> Condition:
    """The condition that a fact of this type has been found."""

    def why_not(model: nn.Module, facts: Facts) -> str:
        return "" if kind in facts else f"no {kind.__name__} has been given"

    return Condition(kind.__name__, why_not, fact=kind)


@dataclass(frozen=True)
class Result:
    """What a pass came to."""

    model: nn.Module
    modified: bool
    """Whether it has changed the model."""
    facts: tuple[object, ...] = ()
    """What later passes may read, each by its type."""


class Pass(ABC):
    """Base of the passes. `name` is what people insert other passes before and after."""

    name: ClassVar[str]
    requires: ClassVar[tuple[Condition, ...]] = ()
    ensures: ClassVar[tuple[Condition, ...]] = ()

    @abstractmethod
    def call(self, model: nn.Module, facts: Facts) -> Result:
        """Do it. Whoever writes into numbers appends to ``facts.undo`` first."""

    def __call__(self, model: nn.Module) -> Result:
        """The pass alone, with its conditions checked: wholly, or not at all.

        Raises:
            PipelineError: a condition does not hold, before or after.
            LoraFxError: the pass refuses. The model is bitwise what it was, each time.
        """
        with ExitStack() as outside, changing(model, self.name) as undo, ExitStack() as inside:
            return self.checked(model, Facts(undo, inside, outside))

    def checked(self, model: nn.Module, facts: Facts) -> Result:
        """`call` between its conditions, inside a change of the model that is open already."""
        safe_point()
        for condition in self.requires:
            condition.check(model, facts, self.name)
        result = self.call(model, facts)
        facts.add(result.facts)
        for condition in self.ensures:
            if why := condition.why_not(result.model, facts):
                raise PipelineError(
                    f"it ensures {condition.name}, and does not: {why}",
                    place=f"pass {self.name!r}",
                    remedy="mend the pass, or take it out of the pipeline",
                )
        return result
