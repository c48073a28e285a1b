"""The paper's tables of trainable parameters, counted: theirs, ours, equal or not, and why not.

LoRA's, adapters', PreEmbed's and PreLayer's by a plan of the rules on the architecture, the model's and its biases' by
its parameters. What a plan must come to (5.1), with L layers of width d:

    adapters     L_A·(2·d·r + r + d) + 2·L_N·d      L_A adapter layers (H: two a block, P: one), L_N trained LayerNorms
    PreEmbed     d·(l_p + l_i)                      l_p prefix and l_i infix tokens
    PreLayer     L·d·(l_p + l_i)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any

from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.graph.program import Program
from lora_fx.paper.architectures import ARCHITECTURES, Architecture
from lora_fx.passes.base import Facts, Pass, Result, given
from lora_fx.passes.pipeline import Pipeline
from lora_fx.passes.planning import Plan, Schedule, Select, Sites
from lora_fx.tables import table


@dataclass(frozen=True)
class Claim:
    """A row of one of the paper's tables."""

    table: str
    model: str
    method: str
    stated: str
    """What the paper says of it, as ``q=8 v=8``, ``r=64``, ``l=264`` or nothing."""
    theirs: str
    """Millions, as they are printed."""
    remark: str = ""
    """Where it does not follow: what comes nearest."""


@dataclass(frozen=True)
class Count:
    """A claim, counted."""

    claim: Claim
    ours: int
    equal: str
    """``yes``, to the last digit that is printed; ``cut`` or ``rounded``, where only that gives it; ``no``."""

    def to_json(self) -> dict:
        return {**asdict(self.claim), "ours": self.ours, "equal": self.equal}


def _lora(table: str, model: str, stated: str, theirs: str, remark: str = "") -> Claim:
    return Claim(table, model, "LoRA", stated, theirs, remark)


CLAIMS = (
    Claim("2", "RoBERTa base", "FT", "", "125.0", "125, rounded to a whole number"),
    Claim("2", "RoBERTa base", "BitFit", "", "0.1"),
    _lora("2", "RoBERTa base", "q=8 v=8", "0.3"),
    Claim("2", "RoBERTa large", "FT", "", "355.0", "355, cut to a whole number"),
    _lora("2", "RoBERTa large", "q=8 v=8", "0.8"),
    Claim("2", "RoBERTa large", "Adapter P", "r=64", "3.0", "3, cut to a whole number"),
    Claim("2", "RoBERTa large", "Adapter P", "r=16", "0.8"),
    Claim("2", "RoBERTa large", "Adapter H", "r=64", "6.0", "6, cut to a whole number"),
    Claim("2", "RoBERTa large", "Adapter H", "r=8", "0.8"),
    Claim("2", "DeBERTa XXL", "FT", "", "1500.0", "1.5 billion, cut"),
    _lora("2", "DeBERTa XXL", "q=8 v=8", "4.7", "table 10 says r = 8; r = 16 on q and v gives 4.718"),
    Claim("3", "GPT-2 M", "FT", "", "354.92", "a number of prior work's; 0.03 % more than the model"),
    Claim("3", "GPT-2 M", "FT Top2", "", "25.19"),
    _lora("3", "GPT-2 M", "q=4 v=4", "0.35", "table 11 says r = 4; no whole rank on q and v gives 0.35"),
    Claim("3", "GPT-2 L", "FT", "", "774.03"),
    _lora("3", "GPT-2 L", "q=4 v=4", "0.77", "table 11 says r = 4; no whole rank on q and v gives 0.77"),
    Claim("4", "GPT-3", "FT", "", "175255.8", "with a head of its own the model has 175,221.8, the nearest"),
    Claim("4", "GPT-3", "BitFit", "", "14.2", "every bias is 11·d a layer; 12·d would be 14.156"),
    Claim("4, 15", "GPT-3", "PreEmbed", "l=264", "3.2"),
    Claim(
        "4, 15",
        "GPT-3",
        "PreLayer",
        "l=16",
        "20.2",
        "17 tokens on 97 levels are 20.263, the nearest",
    ),
    Claim("4, 15", "GPT-3", "Adapter H", "r=1", "7.1"),
    Claim("4, 15", "GPT-3", "Adapter H", "r=8", "40.1"),
    _lora("4, 15", "GPT-3", "v=2", "4.7"),
    _lora("4, 15", "GPT-3", "q=1 v=1", "4.7"),
    _lora("4, 15", "GPT-3", "q=8 v=8", "37.7"),
    *(_lora("5", "GPT-3", f"{site}=8", "18") for site in "qkvo"),
    _lora("5", "GPT-3", "q=4 k=4", "18"),
    _lora("5", "GPT-3", "q=4 v=4", "18"),
    _lora("5", "GPT-3", "q=2 k=2 v=2 o=2", "18"),
    _lora("D.4", "GPT-3", "q=2 k=2 v=2 o=2", "37.7", "table 15 says 18.8 for these ranks, and r = 4 for 37.7"),
    Claim("15", "GPT-3", "PreEmbed", "l=40", "0.4"),
    Claim("15", "GPT-3", "PreEmbed", "l=72", "0.9"),
    Claim("15", "GPT-3", "PreEmbed", "l=136", "1.7"),
    Claim("15", "GPT-3", "PreEmbed", "l=520", "6.4"),
    Claim("15", "GPT-3", "PreLayer", "l=4", "5.1", "5 tokens are 5.898"),
    Claim("15", "GPT-3", "PreLayer", "l=8", "10.1", "9 tokens are 10.617"),
    Claim("15", "GPT-3", "PreLayer", "l=36", "44.1", "37 tokens are 43.647, the nearest"),
    Claim("15", "GPT-3", "PreLayer", "l=64", "76.1", "64 tokens are the nearest"),
    Claim("15", "GPT-3", "Adapter H", "r=4", "21.2"),
    Claim("15", "GPT-3", "Adapter H", "r=16", "77.9"),
    Claim("15", "GPT-3", "Adapter H", "r=64", "304.4"),
    _lora("15", "GPT-3", "q=2 v=2", "9.4"),
    _lora("15", "GPT-3", "q=1 k=1 v=1 o=1", "9.4"),
    _lora("15", "GPT-3", "q=4 v=4", "18.8"),
    _lora("15", "GPT-3", "q=2 k=2 v=2 o=2", "18.8"),
    _lora("15", "GPT-3", "q=4 k=4 v=4 o=4", "37.7"),
    _lora("15", "GPT-3", "q=64 v=64", "301.9"),
    _lora("15", "GPT-3", "q=64 k=64 v=64 o=64", "603.8", "603.8 is twice the 301.9 of the row before, which was cut"),
    Claim("15", "GPT-3", "LoRA+PE", "q=8 v=8 l=12", "37.8"),
    Claim("15", "GPT-3", "LoRA+PE", "q=32 v=32 l=12", "151.1"),
    Claim("15", "GPT-3", "LoRA+PE", "q=64 v=64 l=12", "302.1"),
    Claim("15", "GPT-3", "LoRA+PL", "q=8 v=8 l=12", "52.8", "what is over is PreLayer's"),
)


def count(claims: Sequence[Claim] = CLAIMS) -> list[Count]:
    """Each claim counted, on its architecture on meta.

    Raises:
        LoraFxError: transformers, which has the shapes of four of the models, is not there.
    """
    models: dict[str, _Counted] = {}
    found = []
    for claim in claims:
        if claim.model not in models:
            models[claim.model] = _Counted(ARCHITECTURES[claim.model])
        ours = models[claim.model].count(claim.method, _numbers(claim.stated))
        found.append(Count(claim, ours, agreement(claim.theirs, ours)))
    return found


def agreement(theirs: str, ours: int) -> str:
    """How a count in full becomes the millions that are printed: ``yes``, ``cut``, ``rounded`` or ``no``."""
    printed, millions = Decimal(theirs), Decimal(ours) / 1_000_000
    cut, rounded = (millions.quantize(printed, how) == printed for how in (ROUND_DOWN, ROUND_HALF_UP))
    if cut and rounded:
        return "yes"
    return "cut" if cut else "rounded" if rounded else "no"


def _numbers(stated: str) -> dict[str, int]:
    return {key: int(value) for key, _, value in (word.partition("=") for word in stated.split())}


@dataclass(frozen=True)
class _Known(Pass):
    """What was read off the model once, for the plans of many rules."""

    program: Program
    sites: Sites

    name = "known"
    ensures = (given(Program), given(Sites))

    def call(self, model: nn.Module, facts: Facts) -> Result:
        return Result(model, False, (self.program, self.sites))


class _Counted:
    """A model on meta, and what is counted of it."""

    def __init__(self, architecture: Architecture) -> None:
        self.a, self.model = architecture, architecture.on_meta()
        assert all(p.is_meta for p in self.model.parameters())
        run = lora_fx.pipeline("plan", self._rules({"q": 1}), architecture.inputs())(self.model)
        self._known = _Known(run.facts[Program], run.facts[Sites])

    def _rules(self, ranks: dict[str, int], **more: Any) -> list[Rule]:
        sites: Any = self.a.sites
        return [Rule(rank=rank, **sites[site], **more) for site, rank in ranks.items()]

    def _planned(self, rules: list[Rule], sites: int) -> int:
        plan = Pipeline("plan", (self._known, Select(rules), Schedule()))(self.model).facts[Plan]
        assert len(plan.rows) == sites, str(plan)
        return plan.parameters

    def lora(self, ranks: dict[str, int]) -> int:
        return self._planned(self._rules(ranks), self.a.layers * len(ranks))

    def bottlenecks(self, rank: int, sites: tuple[str, ...], **settings: Any) -> int:
        """An adapter layer behind each of these sites."""
        rules = self._rules(dict.fromkeys(sites, rank), kind="bottleneck", settings=settings)
        return self._planned(rules, self.a.layers * len(sites))

    def tokens(self, prefix: int, kind: str) -> int:
        where: Any = self.a.sites["words"]
        rule = Rule(kind=kind, settings={"prefix": prefix}, **where)
        return self._planned([rule], 1)

    def count(self, method: str, stated: dict[str, int]) -> int:
        tokens = stated.get("l", 0)
        ranks = {site: rank for site, rank in stated.items() if site in "qkvo"}
        if method == "FT":
            return sum(p.numel() for p in self.model.parameters())
        if method == "FT Top2":
            return sum(p.numel() for block in self._blocks()[-2:] for p in block.parameters())
        if method == "BitFit":
            return sum(p.numel() for name, p in self.model.named_parameters() if name.endswith("bias"))
        if method.startswith("Adapter"):
            return self.bottlenecks(stated["r"], ("o", "down") if method == "Adapter H" else ("down",))
        kind = "tokens" if method in ("PreEmbed", "LoRA+PE") else "prefix_layer"
        return (self.lora(ranks) if ranks else 0) + (self.tokens(tokens, kind) if tokens else 0)

    def _blocks(self) -> list[nn.Module]:
        return next(list(m) for m in self.model.modules() if isinstance(m, nn.ModuleList) and len(m) == self.a.layers)


@dataclass(frozen=True)
class Checkpoint:
    """What is stored for a task (4.2: 350 GB → 35 MB, in 16 bits, with r = 4 on q and v)."""

    whole: int
    """Bytes of the model."""
    adapter: int
    """Bytes of the adapter."""

    def __str__(self) -> str:
        times = f"{self.whole / self.adapter:,.0f}"
        return (
            f"GPT-3 in 16 bits, r = 4 on q and v: {self.whole / 1e9:.1f} GB → {self.adapter / 1e6:.1f} MB "
            f"= {self.adapter / 2**20:.1f} MiB, {times} times less (theirs: 350 GB → 35 MB, roughly 10,000 times)"
        )


def checkpoint() -> Checkpoint:
    gpt3 = _Counted(ARCHITECTURES["GPT-3"])
    return Checkpoint(2 * gpt3.count("FT", {}), 2 * gpt3.lora({"q": 4, "v": 4}))


def table_of_counts(found: Iterable[Count], stored: Checkpoint) -> str:
    header = ("table", "model", "method", "stated", "theirs", "ours", "equal", "what comes nearest")
    rows = []
    for c in found:
        said = c.claim
        rows.append(
            (said.table, said.model, said.method, said.stated, f"{said.theirs}M", f"{c.ours:,}", c.equal, said.remark)
        )
    notes = "equal: to the last digit printed; 'cut' and 'rounded' where only one of the two gives it.\n"
    notes += "Of PreLayer, L·d·(l_p + l_i) gives less than is printed in every row, by 1 to 8 %."
    return f"{table(header, rows, right=(4, 5))}\n{notes}\n{stored}"


def rows_to_json(found: Iterable[Count], stored: Checkpoint) -> dict[str, Any]:
    return {"rows": [c.to_json() for c in found], "checkpoint": asdict(stored)}
