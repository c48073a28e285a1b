"""A pass written outside the package: refuse an adaptation that would train more parameters than a budget allows.

python examples/budget_pass.py              (a few seconds)
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Plan, Rule
from lora_fx.passes import Facts, Pass, Result, given


@dataclass(frozen=True)
class Spent:
    """What the pass found out: the parameters that a training would move."""

    parameters: int
    most: int

    def __str__(self) -> str:
        return f"{self.parameters:,} of {self.most:,} parameters"


@dataclass(frozen=True)
class Budget(Pass):
    """Count the parameters that a training would move, and refuse where they are more than `most`."""

    most: int

    name = "budget"
    requires = (given(Plan),)
    ensures = (given(Spent),)

    def call(self, model: nn.Module, facts: Facts) -> Result:
        rows = facts[Plan].rows
        spent = Spent(sum(row.parameters for row in rows), self.most)
        if spent.parameters > self.most:
            largest = max(rows, key=lambda row: row.parameters)
            raise LoraFxError(
                f"{spent.parameters:,} parameters would be trained, and the budget is {self.most:,}",
                place=f"pass {self.name!r}",
                remedy=f"lower the rank, or exclude sites: the largest is {largest.name} with {largest.parameters:,}",
            )
        return Result(model, modified=False, facts=(spent,))


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
inputs = torch.randn(4, 16)

pipeline = lora_fx.pipeline("apply", Rule(where="*", rank=4, alpha=8), inputs)
print(f"{pipeline.after('select', Budget(1_000))}\n")

try:
    pipeline.after("select", Budget(500))(model)
except LoraFxError as error:
    print("refused:", error)
print("adapters after the refusal:", lora_fx.adapters(model))

with tempfile.TemporaryDirectory() as folder:
    run = pipeline.after("select", Budget(1_000))(model, dump=folder)
    texts = {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in Path(folder).glob("*/*.txt")}
print(f"\n{run}\n")
print("spent:", run.facts[Spent])
print("written:", *sorted(texts), sep="\n  ")
print("\nthe first layer, before and after the rewriting:\n")
print(texts["07-rewrite/0.before.txt"], texts["07-rewrite/0.after.txt"], sep="\n")
