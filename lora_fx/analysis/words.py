"""PEFT's words where ours are wanted: each is answered with the word for it here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lora_fx.errors import RuleError


class WordError(RuleError, TypeError):
    """An argument that there is not; in the words of another library, with ours for it."""


def _globs(names: Any) -> str:
    listed = [names] if isinstance(names, str) else list(names)
    return repr(" | ".join(f"*.{name}" for name in listed))


#: PEFT's word → what to write for its value
_WORDS = {
    "r": lambda v: f"rank={v!r}",
    "lora_alpha": lambda v: f"alpha={v!r}",
    "lora_dropout": lambda v: f"dropout={v!r}",
    "use_rslora": lambda v: "scaling='rslora'",
    "use_dora": lambda v: "kind='dora'",
    "init_lora_weights": lambda v: "init='kaiming' (the default), 'gaussian', or a function (A, B) -> None",
    "target_modules": lambda v: (
        "form='linear'" if v == "all-linear" else f"where={_globs(v)}, or by what they do: role='attention.*'"
    ),
    "target_parameters": lambda v: f"where={_globs(v)}: a weight is a weight",
    "exclude_modules": lambda v: f"Rule(where={_globs(v)}), without a rank, before the others",
    "layers_to_transform": lambda v: f"layers={v!r}",
    "layers_pattern": lambda v: "layers='0-3': the first number in a weight's name counts",
    "rank_pattern": lambda v: "a rule for those sites, before the others",
    "alpha_pattern": lambda v: "a rule for those sites, before the others",
    "modules_to_save": lambda v: f"Rule(where={_globs(v)}, kind='full')",
    "bias": lambda v: "Rule(…, kind='bias')",
    "lora_bias": lambda v: "Rule(…, kind='bias') for the same sites, under another name",
    "fan_in_fan_out": lambda v: "nothing: it is read from the graph",
    "task_type": lambda v: f"save_adapter(…, task_type={v!r})",
}


def refuse_words(given: Mapping[str, Any], place: str, known: str) -> None:
    """Raise for arguments that there are not.

    Args:
        known: what there is, for words that are nobody's.
    """
    if not given:
        return
    word, value = next(iter(given.items()))
    try:
        ours = _WORDS[word](value) if word in _WORDS else ""
    except TypeError:  # a value that it cannot have
        ours = _WORDS[word]("…")
    whole = "; a LoraConfig as it is goes into apply too" if ours else ""
    remedy = f"write {ours}{whole}" if ours else known
    raise WordError(f"there is no argument {word}={value!r}", place=place, remedy=remedy)
