"""Rewrites of a model: insert the branches, fold them into the weights, and back."""

from lora_fx.passes.fold import Fold, Unfold
from lora_fx.passes.insert import Insert

__all__ = ["Fold", "Insert", "Unfold"]
