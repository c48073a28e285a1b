"""What transformers makes of the tensors of a checkpoint when it loads them: other names, and experts that it stacks.

Its own table says so for each `model_type`; where transformers is not installed, nothing is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any


def conversions(config: Mapping[str, Any]) -> Iterator[Any]:
    """What transformers does to names and tensors that it loads, in its order: first all renamings."""
    with suppress(ImportError):
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        said = (config, config.get("text_config"))
        types = dict.fromkeys(own["model_type"] for own in said if isinstance(own, dict) and "model_type" in own)
        found = [rule for name in types for rule in get_checkpoint_conversion_mapping(name) or ()]
        for kind in (WeightRenaming, WeightConverter):
            yield from (rule for rule in found if isinstance(rule, kind))


def in_the_model(name: str, rules: Sequence[Any]) -> tuple[str, int | None]:
    """The name that a tensor has there, and which of the sources of a merged one it is; None where it is a whole."""
    own = name
    for rule in rules:
        own, source = rule.rename_source_key(own)
        if source is None or not hasattr(rule, "operations"):
            continue
        sources = [*rule.source_patterns]
        steps = [(type(step).__name__, getattr(step, "dim", None)) for step in rule.operations]
        side_by_side = [("Concatenate", 1)] if len(sources) > 1 else []
        known = steps == [("MergeModulelist", 0), *side_by_side] and len(rule.target_patterns) == 1
        return (own, sources.index(source)) if known else (name, None)
    return own, None
