"""One error family: every message shows the value, the place, the reason and the remedy."""

from __future__ import annotations


class LoraFxError(Exception):
    """Something lora_fx refuses to do. The model and the files are bitwise what they were before the call.

    Args:
        reason: what is wrong, with the offending value in it.
        place: where: a weight, module, rule or file.
        remedy: what to do about it.
    """

    def __init__(self, reason: str, *, place: str, remedy: str) -> None:
        self.reason, self.place, self.remedy = reason, place, remedy
        super().__init__(f"{place}: {reason}\n  → {remedy}")

    def __reduce__(self) -> tuple:
        return _restore, (type(self), self.reason, self.place, self.remedy)


def _restore(cls: type[LoraFxError], reason: str, place: str, remedy: str) -> LoraFxError:
    return cls(reason, place=place, remedy=remedy)


class CaptureError(LoraFxError):
    """The model could not be captured on the example inputs."""


class RuleError(LoraFxError):
    """A rule is malformed, or does not match what it must."""


class FormError(LoraFxError):
    """A form that is to be registered is malformed, or wrong on its own examples."""


class KindError(LoraFxError):
    """A kind is unknown, or one that is to be registered is malformed or wrong on its own trial."""


class PlanError(LoraFxError):
    """A site that a rule asks for cannot be adapted."""


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
