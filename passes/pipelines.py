"""Pipelines of passes alone, for verbs and for those who build on them."""

from __future__ import annotations

from lora_fx.passes.fold import Fold, Unfold
from lora_fx.passes.insert import Rewrite
from lora_fx.passes.pipeline import Pipeline

FOLD = Pipeline("fold", (Fold(),))
UNFOLD = Pipeline("unfold", (Unfold(), Rewrite()))
