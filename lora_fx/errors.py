"""One error family: every message shows the value, the place, the reason and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

_NAMES, _REASONS = 5, 5  # shown: places of each reason, reasons of each error
_EACH = "mend each of them, or leave it out: a rule without a rank before, or otherwise='skip' in its rule"
_CHARACTERS = 4000  # and of each part of a message
_Error = TypeVar("_Error", bound="LoraFxError")


class LoraFxError(Exception):
    """Something lora_fx refuses to do. The model and the files are bitwise what they were before the call.

    Args:
        reason: what is wrong, with the offending value in it.
        place: where: a weight, module, rule or file.
        remedy: what to do about it.
    """

    def __init__(self, reason: str, *, place: str, remedy: str) -> None:
        self.reason, self.place, self.remedy = reason, place, remedy
        super().__init__(f"{_shown(place)}: {_shown(reason)}\n  → {_shown(remedy)}")

    def __reduce__(self) -> tuple:
        return _restore, (type(self), self.reason, self.place, self.remedy)


def _shown(text: str) -> str:
    """A file may hold millions of characters where a word should be."""
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS // 2]} … {text[-_CHARACTERS // 2 :]}"


def _restore(cls: type[LoraFxError], reason: str, place: str, remedy: str) -> LoraFxError:
    return cls(reason, place=place, remedy=remedy)


def _restore_plan_error(cls: type[PlanError], reason: str, place: str, remedy: str, refusals: Any) -> PlanError:
    return cls(reason, place=place, remedy=remedy, refusals=refusals)


class CaptureError(LoraFxError):
    """The model could not be captured on the example inputs."""


class RuleError(LoraFxError):
    """A rule is malformed, or does not match what it must."""


class FormError(LoraFxError):
    """A form that is to be registered is malformed, or wrong on its own examples."""


class KindError(LoraFxError):
    """A kind is unknown, or one that is to be registered is malformed or wrong on its own trial."""


class PlanError(LoraFxError):
    """Sites that rules ask for cannot be adapted. One message names each of them, grouped by reason.

    `refusals` holds an error for each; of one alone that is the error itself.
    """

    def __init__(self, reason: str, *, place: str, remedy: str, refusals: Sequence[PlanError] = ()) -> None:
        super().__init__(reason, place=place, remedy=remedy)
        self.refusals = tuple(refusals) or (self,)

    def __reduce__(self) -> tuple:
        own = self.refusals if self.refusals != (self,) else ()
        return _restore_plan_error, (type(self), self.reason, self.place, self.remedy, own)

    @classmethod
    def of(cls, refusals: Sequence[PlanError], remedy: str = _EACH) -> PlanError:
        """All of them in one."""
        if len(refusals) == 1:
            return refusals[0]
        groups = by_reason(refusals)
        lines = [f"\n  {names}: {error.reason}\n    → {error.remedy}" for names, error in groups[:_REASONS]]
        more = [f"\n  … {len(groups) - _REASONS} more reasons"] if len(groups) > _REASONS else []
        return cls(
            f"{len(refusals)} sites cannot be adapted{''.join([*lines, *more])}",
            place="the plan",
            remedy=remedy,
            refusals=refusals,
        )


def by_reason(errors: Sequence[_Error]) -> list[tuple[str, _Error]]:
    """For each reason: the first few of its places, and one of its errors."""
    groups: dict[str, list[_Error]] = {}
    for error in errors:
        groups.setdefault(error.reason, []).append(error)
    return [(few([error.place for error in group], _NAMES), group[0]) for group in groups.values()]


def few(names: Sequence[str], most: int) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:most]) + (f", … {len(names) - most} more" if len(names) > most else "")


class AdapterError(LoraFxError):
    """There is no adapter of that name, or what is set on one cannot be set."""


class PipelineError(LoraFxError):
    """A pipeline is put together wrongly, or a pass cannot run where it stands."""


class EquivalenceError(LoraFxError):
    """Two models that must be the same function are not."""


class FoldError(LoraFxError):
    """A fold or unfold cannot be exact."""


class FileError(LoraFxError):
    """A file is damaged, belongs to another model, or says what the format cannot hold."""


class ExportError(LoraFxError):
    """A model cannot be exported, or the exported file is not the model."""


def essence(error: BaseException) -> str:
    """The first lines of what a library said at the root of an error, without its advertising."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{type(cause).__name__}: {cause}".strip()
    lines = [line for line in text.splitlines() if line.strip()][:4]
    return "\n  ".join(lines)[:1000]
