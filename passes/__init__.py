"""Passes over a model, and pipelines of them."""

from lora_fx.passes.activate import Activate, Remove, Require, Restore
from lora_fx.passes.base import Condition, Facts, Pass, Result, given
from lora_fx.passes.fold import Fold, Unfold
from lora_fx.passes.insert import Check, Insert, Inserted, Rewrite
from lora_fx.passes.pipeline import Pipeline, Run, Step
from lora_fx.passes.planning import Analyse, Capture, Plan, Row, Schedule, Select, Sites
from lora_fx.passes.prune import Prune

__all__ = [
    "Activate",
    "Analyse",
    "Capture",
    "Check",
    "Condition",
    "Facts",
    "Fold",
    "Insert",
    "Inserted",
    "Pass",
    "Pipeline",
    "Plan",
    "Prune",
    "Remove",
    "Require",
    "Restore",
    "Result",
    "Rewrite",
    "Row",
    "Run",
    "Schedule",
    "Select",
    "Sites",
    "Step",
    "Unfold",
    "given",
]
