"""Where adapters go wrong without a word: PEFT as installed and lora_fx on the same models, side by side.

    python benchmarks/silent_failures.py [--markdown]

A case is a row: a tiny model, the weights that are adapted, and the same factors A, B and the same scale for both
libraries. What must come out is the base model with W + s·B·A written in the place of W, in float64.
A cell is derived from numbers, never written by hand: no further from that than rounding makes it (`compare`, with the
noise of one rounding step in every weight) is `right`, no further than that from the base is `NO EFFECT`.

The exit status is 1 where lora_fx is neither right nor refuses. PEFT's columns need peft (the `test` extra).
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.checks.verification import Draws, cast_inputs, compare, dither, relative_error, run
from lora_fx.errors import CaptureError
from lora_fx.graph.capture import normalize_inputs
from lora_fx.model.inventory import inventory
from lora_fx.tables import table

RANK, ALPHA = 2, 5
CYCLES = 50

RIGHT, NO_EFFECT, NOTHING, WARNS = "right", "NO EFFECT", "–", " (warns)"
HEADER = ("case", "PEFT, before merge", "PEFT, after merge", "lora_fx, adapted", "lora_fx, folded")
LEGEND = (
    "right: the base model with W + s·B·A in its weights, up to rounding. Off by: the error as a share of what the "
    "adapter must change, to one digit. (warns): PEFT gave a warning."
)


class Model(nn.Module):
    """Parts, and what is done with them."""

    def __init__(self, body: Callable[[Any, torch.Tensor], torch.Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.body = body
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self, x)


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, eq=False)
class Case:
    """A row."""

    name: str
    model: Callable[[], nn.Module]
    x: Callable[[], torch.Tensor]
    weights: tuple[str, ...]
    """Every name under which an adapted weight is read. Names of one storage share their factors."""
    peft: Mapping[str, Any]
    """Settings of PEFT's LoraConfig."""
    rule: Mapping[str, Any] = field(default_factory=dict)
    """Keys and settings of lora_fx's rule; by default the names of the weights."""
    dtype: torch.dtype = torch.float64
    adapters: tuple[str, ...] = ("default",)
    scale: float = ALPHA / RANK
    transposed: bool = False
    """The weight is (in, out…)."""
    groups: int = 1
    """PEFT writes the delta of a grouped convolution block by block, with a rank `groups` times ours."""
    layers: Mapping[str, str] = field(default_factory=dict)
    """weight → the module of PEFT's model that holds its factors, where that is not the weight's owner."""
    merge: Callable[[Any], nn.Module] = lambda model: model.merge_and_unload()
    fold: Callable[[nn.Module], nn.Module] = lora_fx.fold
    judge: Callable[[Truth, nn.Module], str] | None = None
    """What the weights must be after merge or fold; None where the outputs say it all."""

    @property
    def keys(self) -> Mapping[str, Any]:
        return self.rule if "form" in self.rule else {"where": " | ".join(self.weights), **self.rule}

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.model().to(self.dtype).eval()


class Truth:
    """The base model of a case, its factors, and what must come out, in float64."""

    def __init__(self, case: Case) -> None:
        self.case = case
        # Made twice: a deep copy shares the class that a parametrization gives to its module.
        self.base, self.wide = case.make(), _plain(case.make()).double()
        for model in (self.base, self.wide):
            model.requires_grad_(False)
        self.inputs = cast_inputs(normalize_inputs(self.base, case.x()), case.dtype)
        by_storage: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        self.factors = {}
        for name in case.weights:
            weight = self.wide.get_parameter(name)
            self.factors[name] = by_storage.setdefault(weight.data_ptr(), self._draw(weight))
        self.sums = {name: self.wide.get_parameter(name) + self._delta(name) for name in case.weights}

    def _draw(self, weight: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """For each adapter A (rank, in) and B (out, rank), as in float32: B·A about as large as a usual weight."""
        inner = weight.shape[0] if self.case.transposed else weight[0].numel()
        shapes = (RANK, inner), (weight.numel() // inner, RANK)
        return {
            adapter: (torch.randn(shapes[0]) * (0.5 / math.sqrt(inner)), torch.randn(shapes[1]) * 0.5)
            for adapter in self.case.adapters
        }

    def _delta(self, name: str) -> torch.Tensor:
        weight = self.wide.get_parameter(name)
        total = sum(self.case.scale * (B.double() @ A.double()) for A, B in self.factors[name].values())
        return (total.T if self.case.transposed else total).reshape(weight.shape)  # type: ignore[union-attr]

    def _run(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The base model with these weights. (functional_call mixes up the names of a module that has two.)"""
        model = copy.deepcopy(self.wide)
        for name, weight in weights.items():
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
        (out,) = run(model, cast_inputs(self.inputs, torch.float64))
        return out

    @cached_property
    def plain(self) -> torch.Tensor:
        return self._run({})

    @cached_property
    def right(self) -> torch.Tensor:
        return self._run(self.sums)

    @cached_property
    def noise(self) -> float:
        """How far one rounding step in every weight moves the output."""
        draws = Draws(0)
        step = torch.finfo(self.case.dtype).eps / 2
        weights = {name: p.detach() for name, p in self.wide.named_parameters(remove_duplicate=False)} | self.sums
        moved = {name: weight * dither(weight, step, draws) for name, weight in weights.items()}
        return relative_error(self._run(moved), self.right, self.right)

    def verdict(self, model: nn.Module) -> str:
        (out,) = run(model, self.inputs)

        def is_that(reference: torch.Tensor) -> bool:
            return bool(compare(out, reference, self.right, self.noise, self.case.dtype))

        if is_that(self.right):
            return RIGHT
        if is_that(self.plain):
            return NO_EFFECT
        return f"WRONG, off by {percent(relative_error(out, self.right, self.right - self.plain))}"

    def verdict_folded(self, model: nn.Module) -> str:
        return self.verdict(model) if self.case.judge is None else self.case.judge(self, model)


def _plain(model: nn.Module) -> nn.Module:
    """Computed weights (weight_norm) as parameters, so that W + s·B·A can be written into them."""
    for module in model.modules():
        if is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
    return model


def percent(share: float) -> str:
    """One significant digit."""
    return f"{float(f'{100 * share:.1g}'):g} %"


def judge_rounding(truth: Truth, model: nn.Module) -> str:
    """Whether no number of the weight's dtype is nearer to the sum than the one that is there."""
    weight, exact = (m[truth.case.weights[0]] for m in (dict(model.named_parameters()), truth.sums))
    weight = weight.detach()
    error = (weight.double() - exact).abs()
    neighbours = [torch.nextafter(weight, torch.full_like(weight, end)) for end in (-math.inf, math.inf)]
    wrong = (error > (neighbours[0].double() - exact).abs()) | (error > (neighbours[1].double() - exact).abs())
    share = float(wrong.double().mean())
    return f"WRONG, {percent(share)} of the weights misrounded" if share else RIGHT


def judge_way_back(truth: Truth, model: nn.Module) -> str:
    """Whether the weights are what they were before the adapter was merged and unmerged."""
    name = truth.case.weights[0]
    weight, before = model.get_parameter(name).detach(), truth.base.get_parameter(name)
    if torch.equal(weight, before):
        return RIGHT
    share = float((weight != before).double().mean())
    return f"WRONG, {percent(share)} of the weights changed, by {percent(relative_error(weight, before, before))} RMS"


def merge_and_back(model: Any) -> nn.Module:
    for _ in range(CYCLES):
        model.merge_adapter()
        model.unmerge_adapter()
    return model.unload()


def fold_and_back(model: nn.Module) -> nn.Module:
    for _ in range(CYCLES):
        lora_fx.unfold(lora_fx.fold(model))
    return lora_fx.remove(model, *lora_fx.adapters(model))


# ── the two libraries ────────────────────────────────────────────────────────────────────────────────────────────────


def measure_lora_fx(case: Case) -> tuple[str, str]:
    """The cells of lora_fx: adapted, folded."""
    truth = Truth(case)
    model = copy.deepcopy(truth.base)
    try:
        for adapter in case.adapters:
            rule = Rule(**case.keys, rank=RANK, alpha=ALPHA)
            lora_fx.apply(model, rule, truth.inputs.args, name=adapter)
        _fill(model, truth)
        adapted = truth.verdict(model)
    except LoraFxError as error:
        return f"refused: {error.reason}", NOTHING
    try:
        return adapted, truth.verdict_folded(case.fold(model))
    except LoraFxError as error:
        return adapted, f"refused: {error.reason}"


@torch.no_grad()
def _fill(model: nn.Module, truth: Truth) -> None:
    for place in inventory(model).places:
        adapter = place.adapter
        A, B = truth.factors[place.weight][adapter.name]
        if adapter.A.shape != A.shape:  # a head tied to an embedding has that one's layout: (B·A)ᵀ = Aᵀ·Bᵀ
            A, B = B.T, A.T
        adapter.A.copy_(A)
        adapter.B.copy_(B)


def measure_peft(case: Case) -> tuple[str, str]:
    """The cells of PEFT: before merge, after merge."""
    truth = Truth(case)
    adapted: list[nn.Module] = []

    def before() -> str:
        adapted.append(adapt_with_peft(truth))
        return truth.verdict(adapted[0])

    first = _attempt(before)
    if not adapted:
        return first, NOTHING
    return first, _attempt(lambda: truth.verdict_folded(case.merge(adapted[0])))


def adapt_with_peft(truth: Truth) -> nn.Module:
    import peft

    case = truth.case
    config = peft.LoraConfig(r=RANK * case.groups, lora_alpha=ALPHA * case.groups, **case.peft)
    model = peft.get_peft_model(copy.deepcopy(truth.base), config, adapter_name=case.adapters[0]).eval()
    for adapter in case.adapters[1:]:
        model.add_adapter(adapter, copy.deepcopy(config))
    filled = 0
    with torch.no_grad():
        for name, factors in truth.factors.items():
            layer = model.base_model.model.get_submodule(case.layers.get(name, name.rpartition(".")[0]))
            if not hasattr(layer, "lora_A"):
                continue
            for adapter, (A, B) in factors.items():
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
                a.copy_(torch.block_diag(*[A] * case.groups).view_as(a))
                b.copy_(B.view_as(b))
                filled += 1
    assert filled == sum(len(m.lora_A) for m in model.modules() if hasattr(m, "lora_A")), "factors of PEFT left at 0"
    if len(case.adapters) > 1:
        model.add_weighted_adapter(list(case.adapters), [1.0] * len(case.adapters), "sum", combination_type="cat")
        model.set_adapter("sum")
    return model


def _attempt(step: Callable[[], str]) -> str:
    """The verdict of a step of PEFT, or how it failed; and whether there was a warning."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        try:
            cell = step()
        except AssertionError:  # the case itself is wrong
            raise
        except Exception as error:  # whatever PEFT raises is what the table shows
            error = error.__cause__ if isinstance(error, CaptureError) and error.__cause__ else error
            line = traceback.extract_tb(error.__traceback__)[-1].line or ""
            cell = "refused" if line.startswith("raise ") else f"crashes: {type(error).__name__}"
    return cell + WARNS if seen else cell


# ── the cases ────────────────────────────────────────────────────────────────────────────────────────────────────────


def numbers(*shape: int) -> Callable[[], torch.Tensor]:
    return lambda: torch.randn(shape)


def _shared_linears() -> nn.Module:
    model = Model(lambda m, x: m.first(x) + m.second(x).tanh(), first=nn.Linear(8, 5), second=nn.Linear(8, 5))
    model.second.weight = model.first.weight
    return model


def _two_names() -> nn.Module:
    linear = nn.Linear(8, 5)
    return Model(lambda m, x: m.first(x) + m.second(x.tanh()), first=linear, second=linear)


def _tied_head() -> nn.Module:
    model = Model(lambda m, ids: m.read(m.words(ids).tanh()), words=nn.Embedding(11, 8), read=nn.Linear(8, 11))
    model.read.weight = model.words.weight
    return model


def _attention() -> nn.Module:
    return Model(lambda m, x: m.attention(x, x, x)[0], attention=nn.MultiheadAttention(8, 2, batch_first=True))


def _conv(make: Callable[..., nn.Module], *args: Any, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: Model(lambda m, x: m.conv(x), conv=make(*args, **settings))


def _linear(wrap: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> Callable[[], nn.Module]:
    return lambda: Model(lambda m, x: m.lin(x), lin=wrap(nn.Linear(8, 5)))


def _wide_linear() -> nn.Module:
    return Model(lambda m, x: m.lin(x), lin=nn.Linear(96, 64))


def _parameter() -> nn.Module:
    return Model(lambda m, x: F.linear(x, m.w), w=nn.Parameter(torch.randn(5, 8)))


def _lstm() -> nn.Module:
    return Model(lambda m, x: m.lstm(x)[0], lstm=nn.LSTM(8, 5, batch_first=True))


X = numbers(4, 3, 8)
CONV = dict(weights=("conv.weight",), peft=dict(target_modules=["conv"]))
LIN = dict(weights=("lin.weight",), peft=dict(target_modules=["lin"]))
BF16 = dict(model=_wide_linear, x=numbers(4, 96), dtype=torch.bfloat16, **LIN)

CASES = (
    Case(
        "nn.TransformerEncoderLayer in eval mode",
        lambda: Model(lambda m, x: m.layer(x), layer=nn.TransformerEncoderLayer(8, 2, 12, batch_first=True)),
        X, ("layer.linear1.weight", "layer.linear2.weight"), dict(target_modules=["linear1", "linear2"]),
    ),
    Case(
        "nn.MultiheadAttention, its out_proj alone",
        _attention, X, ("attention.out_proj.weight",), dict(target_modules=["out_proj"]),
    ),
    Case(
        "nn.MultiheadAttention, all of it",
        _attention, X, ("attention.in_proj_weight", "attention.out_proj.weight"), dict(target_modules=["attention"]),
        layers={"attention.out_proj.weight": "attention.base_layer.out_proj"},
    ),
    Case(
        "F.linear(x, self.lin.weight)",
        lambda: Model(lambda m, x: F.linear(x, m.lin.weight), lin=nn.Linear(8, 5)), X, **LIN,
    ),
    Case(
        "one Linear under two names",
        _two_names, X, ("first.weight", "second.weight"), dict(target_modules=["first", "second"]),
    ),
    Case(
        "two Linears that share a Parameter",
        _shared_linears, X, ("first.weight", "second.weight"), dict(target_modules=["first", "second"]),
    ),
    Case(
        "a head tied to the embedding, the head alone",
        _tied_head, lambda: torch.randint(0, 11, (4, 3)), ("read.weight",), dict(target_modules=["read"]),
        rule=dict(form="linear"),
    ),
    Case('Conv1d, padding="same", dilation 2', _conv(nn.Conv1d, 3, 5, 3, padding="same", dilation=2), X, **CONV),
    Case("Conv1d, circular padding", _conv(nn.Conv1d, 3, 5, 3, padding=1, padding_mode="circular"), X, **CONV),
    Case("a Linear with weight_norm", _linear(weight_norm), X, **LIN, rule=dict(where="lin.*")),
    Case(
        "the sum of two rsLoRA adapters",
        _linear(), X, LIN["weights"], dict(target_modules=["lin"], use_rslora=True), dict(scaling="rslora"),
        adapters=("one", "two"), scale=ALPHA / math.sqrt(RANK),
    ),
    Case(
        "bfloat16, safe_merge=True", **BF16, merge=lambda m: m.merge_and_unload(safe_merge=True), judge=judge_rounding
    ),
    Case(
        f"bfloat16, merged and unmerged {CYCLES} times",
        **BF16, merge=merge_and_back, fold=fold_and_back, judge=judge_way_back,
    ),
    Case("Conv1d, 2 groups", _conv(nn.Conv1d, 4, 6, 3, groups=2), numbers(4, 4, 8), **CONV, groups=2),
    Case("Conv1d, dilation 2", _conv(nn.Conv1d, 3, 5, 3, dilation=2), X, **CONV),
    Case("Conv3d, kernel (1, 1, 3)", _conv(nn.Conv3d, 3, 5, (1, 1, 3)), numbers(2, 3, 4, 4, 4), **CONV),
    Case("ConvTranspose1d", _conv(nn.ConvTranspose1d, 3, 5, 4, stride=2), X, **CONV, transposed=True),
    Case("LSTM, by target_modules", _lstm, X, ("lstm.weight_ih_l0",), dict(target_modules=["lstm"])),
    Case("LSTM, by target_parameters", _lstm, X, ("lstm.weight_ih_l0",), dict(target_parameters=["weight_ih_l0"])),
    Case(
        "Bilinear",
        lambda: Model(lambda m, x: m.mix(x, x[..., :6]), mix=nn.Bilinear(8, 6, 5)), X, ("mix.weight",),
        dict(target_modules=["mix"]),
    ),
    Case("a Parameter of the top-level module", _parameter, X, ("w",), dict(target_parameters=["w"])),
    Case(
        "a Parameter with dropout",
        lambda: Model(lambda m, x: m.part(x), part=_parameter()), X, ("part.w",),
        dict(target_parameters=["part.w"], lora_dropout=0.1), dict(dropout=0.1),
    ),
)  # fmt: skip

# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────────


#: What PEFT does, from its cells: first one that is true of a row.
BLOCKS: Mapping[str, Callable[[str], bool]] = {
    "PEFT is wrong, and says nothing": lambda cell: cell.startswith((NO_EFFECT, "WRONG")) and WARNS not in cell,
    "PEFT refuses, crashes or warns": lambda cell: cell.startswith(("refused", "crashes")) or WARNS in cell,
    "PEFT is right": lambda cell: True,
}


def is_sound(cells: Sequence[str]) -> bool:
    """Each is right, or a refusal with its reason, or comes after one."""
    return all(cell in (RIGHT, NOTHING) or cell.startswith("refused: ") for cell in cells)


def in_blocks(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows, each under the title of its block."""
    blocks: dict[str, list[tuple[str, ...]]] = {title: [] for title in BLOCKS}
    for row in rows:
        blocks[next(title for title, holds in BLOCKS.items() if any(map(holds, row[1:3])))].append(row)
    return [row for title, own in blocks.items() if own for row in ((f"**{title}**", *[""] * 4), *own)]


def report(rows: Sequence[tuple[str, ...]], markdown: bool = False) -> str:
    """The table, the versions and what the cells mean."""
    import peft

    versions = f"peft {peft.__version__}, torch {torch.__version__.partition('+')[0]}"
    if not markdown:
        body = [(row[0].strip("*"), *row[1:]) for row in in_blocks(rows)]
        return f"{table(HEADER, body)}\n\n{versions}. {LEGEND}"
    lines = (HEADER, ["---"] * len(HEADER), *in_blocks(rows))
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", f"{versions}. {LEGEND}"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help="print the table for docs/silent.md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cases = track(CASES, "PEFT and lora_fx", console=Console(stderr=True), transient=True)
    rows = [(case.name, *measure_peft(case), *measure_lora_fx(case)) for case in cases]
    print(report(rows, options.markdown))
    return 0 if all(is_sound(row[3:]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
