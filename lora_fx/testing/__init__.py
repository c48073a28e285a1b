"""Hypothesis strategies and assertions for the tests of those who adapt, fold and export models.

    from lora_fx.testing import adapters, assert_folds_exactly, models, rules_for

    @given(st.data())
    def test_our_pipeline(data):
        model, inputs = data.draw(models())
        lora_fx.apply(model, data.draw(rules_for(model, inputs)), inputs)
        data.draw(adapters())(model)
        assert_folds_exactly(model, inputs)

The assertions take any adapted model; the strategies make models that are unlike yours. No tolerance is set by hand:
bounds are those of `lora_fx.verify`. Needs ``pip install "lora-fx[testing]"``.
"""

from __future__ import annotations

import copy
import inspect
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.analysis.rules import Rule
from lora_fx.analysis.sites import Site, find_sites
from lora_fx.application import fold, plan, unfold
from lora_fx.checks import oracles
from lora_fx.checks.oracles import Difference, first_difference
from lora_fx.checks.verification import Report, compare, noise_floors, run, verify
from lora_fx.deltas.schedules import AUTO, BRANCH, SCHEDULES
from lora_fx.errors import LoraFxError
from lora_fx.graph.capture import Inputs, capture_graph, no_fast_paths, normalize_inputs
from lora_fx.model import wiring
from lora_fx.passes.planning import read_program
from lora_fx.testing import random_models
from lora_fx.testing.random_models import BLOCKS, DTYPES, HEADS, Again, Block, RandomModel, Tied

try:
    from hypothesis import strategies as st
except ImportError as error:
    raise LoraFxError(
        f"the package hypothesis cannot be imported: {error}",
        place="lora_fx.testing",
        remedy='pip install "lora-fx[testing]"',
    ) from error

__all__ = [
    "BLOCKS",
    "DTYPES",
    "Difference",
    "Filling",
    "RandomModel",
    "adapters",
    "assert_equivalent",
    "assert_folds_exactly",
    "assert_onnx_equivalent",
    "first_difference",
    "models",
    "rules_for",
]


# ── strategies ───────────────────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def models(
    draw: st.DrawFn,
    *,
    blocks: Sequence[type[Block]] = BLOCKS,
    dtypes: Sequence[torch.dtype] = DTYPES,
    training: Sequence[bool] = (False, True),
    heads: Sequence[str] = HEADS,
    max_blocks: int = 3,
) -> tuple[RandomModel, tuple[torch.Tensor]]:
    """(model, example inputs): random programs over every way a model multiplies with a weight.

    Chains and residuals, fused, sliced and tied weights, modules called again, odd sizes; the model's `repr` is the
    program, and can be pasted. Shrinks to one `Linear`.

    Args:
        blocks: the rows to draw from; all of them are in `BLOCKS`.
        dtypes: of parameters and inputs.
        training: train mode or not.
        heads: how the models end; see `lora_fx.testing.random_models.HEADS`.
        max_blocks: the longest chain.
    """
    dtype = draw(st.sampled_from(list(dtypes)))
    served = [block for block in blocks if dtype in block.dtypes]
    steps: list[Block | Again] = []
    real: list[int] = []  # the steps that can be shared
    for count in range(draw(st.integers(1, max_blocks))):
        shares = draw(st.sampled_from([None, None, None, Again, Tied])) if real else None
        if shares is not None:
            steps.append(shares(draw(st.sampled_from(real))))
            continue
        kind = draw(st.sampled_from(_row_choices(served, first=count == 0)))
        if not kind.reads_ids:
            real.append(count)
        steps.append(kind(**draw(_options(kind))))
    tables = isinstance(steps[0], random_models.Embedding)
    model = RandomModel(
        *steps,
        head=draw(st.sampled_from([h for h in heads if tables or h not in ("tied", "borrowed")] or ["none"])),
        outputs=draw(st.sampled_from((2, 3, 5, 1))),
        dtype=dtype,
        seed=draw(st.integers(0, 2**16)),
        training=draw(st.sampled_from(list(training))),
    )
    return model, model.example(draw(st.sampled_from((2, 1, 3))), draw(st.sampled_from((3, 1, 2, 5))))


def _row_choices(blocks: Sequence[type[Block]], first: bool) -> list[type[Block]]:
    """Only a first block can look up; it does so often, because heads can be tied to it."""
    lookups, others = [b for b in blocks if b.reads_ids], [b for b in blocks if not b.reads_ids]
    if not first:
        return others or lookups
    return [*others[:1], *lookups * (1 + len(others) // 6), *others[1:]]


def _options(kind: type[Block]) -> st.SearchStrategy[dict[str, Any]]:
    every = {**kind.choices, **random_models.GLUE}
    return st.fixed_dictionaries({name: st.sampled_from(values) for name, values in every.items()})


@st.composite
def rules_for(draw: st.DrawFn, model: nn.Module, example_inputs: Any = None, *, dropout: bool = False) -> list[Rule]:
    """Rules that are valid on this model and make at least one adapter.

    Some sites by name, by role, by op or by a predicate, with a rank up to what fits; the rest is excluded or left.

    Args:
        dropout: also draw a dropout of the branches, where every use can have one.
    """
    with wiring.unwired(model):
        sites = [s for s in find_sites(read_program(model, example_inputs)) if min(s.in_features, s.out_features)]
    refused = dict.fromkeys(s.weight.name for s in sites if s.weight.problem)
    rules, left = [Rule(where=name) for name in refused], [s for s in sites if not s.weight.problem]
    if not left:
        raise LoraFxError("the model has no weight that can be adapted", place="rules_for", remedy="draw another model")
    others = list(dict.fromkeys(s.weight for s in left))[1:]
    if others and draw(st.sampled_from((False, False, True))):
        out = draw(st.sampled_from(others))
        rules, left = [*rules, Rule(where=out.name)], [s for s in left if s.weight is not out]
    for _ in range(draw(st.integers(1, 3))):
        if left:
            rule, decided = draw(_rule(model, example_inputs, rules, left, dropout))
            rules, left = [*rules, rule], [s for s in left if s not in decided]
    return rules


@st.composite
def _rule(
    draw: st.DrawFn, model: nn.Module, inputs: Any, before: list[Rule], left: list[Site], dropout: bool
) -> tuple[Rule, list[Site]]:
    """A rule, and which of the sites that are left it decides."""
    chosen = draw(st.sampled_from(left))
    by_role = {
        "role": chosen.role or "*"
    }  # twice: only a role asks for a part of a weight, or for one use of a tied one
    by_name, by_form = {"where": chosen.weight.name}, {"form": chosen.uses[0].form}
    keys: list[dict[str, Any]] = [{"where": "*"}, by_role, by_form, by_name, by_role]
    keys.append({"when": Narrower(chosen.in_features + 1)})
    key = draw(st.sampled_from(keys))
    settings: dict[str, Any] = dict(
        rank=draw(st.integers(1, 4)),
        alpha=draw(st.sampled_from((None, 1, 3, 0.5, 16, -2))),
        scaling=draw(st.sampled_from(("standard", "rslora"))),
        schedule=draw(st.sampled_from(SCHEDULES)),
        dropout=draw(st.sampled_from((0.0, 0.5))) if dropout else 0.0,
    )
    decided = [s for s in left if Rule(**key).matches(s)]
    rule = Rule(**key, **_fitting(settings, decided))
    if any(s.weight in {d.weight for d in decided} and s not in decided for s in left) or not (
        settings["dropout"] == 0 and settings["schedule"] in (AUTO, BRANCH)
    ):
        try:
            plan(model, [*before, rule], inputs)
        except LoraFxError:  # one use of a weight that the same attribute gives to others; a use that has no branch
            key = {"where": chosen.weight.name}
            settings.update(dropout=0.0, schedule=AUTO)
            decided = [s for s in left if s.weight is chosen.weight]
            rule = Rule(**key, **_fitting(settings, decided))
    return rule, decided


def _fitting(settings: dict[str, Any], sites: Sequence[Site]) -> dict[str, Any]:
    """With a rank that every site can have."""
    return {**settings, "rank": min(settings["rank"], *(min(s.in_features, s.out_features) for s in sites))}


@dataclass(frozen=True)
class Narrower:
    """A predicate on a site: fewer input features than this."""

    than: int

    def __call__(self, site: Site) -> bool:
        return site.in_features < self.than


@dataclass(frozen=True)
class Filling:
    """Gives every adapter in a model random factors, B ≠ 0, in place; equal fillings give equal bits."""

    seed: int
    size: float
    """Of the delta, relative to a usual weight of the adapter's width, for a scale up to 1 in size."""

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        for adapter in dict.fromkeys(adapter for *_, adapter in wiring.find_adapters(model)):
            smaller = max(1.0, abs(oracles.scale_of(adapter)))
            for factor, std in ((adapter.A, adapter.A.shape[-1] ** -0.5), (adapter.B, adapter.rank**-0.5 / smaller)):
                values = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                factor.copy_(values * std * math.sqrt(self.size))
        return model


def adapters(*, sizes: Sequence[float] = (1.0, 0.25, 1e-3)) -> st.SearchStrategy[Filling]:
    """Fillings: call one on a model, and every adapter in it has random factors, B ≠ 0.

    Args:
        sizes: of the delta, relative to a usual weight.
    """
    return st.builds(Filling, seed=st.integers(0, 2**16), size=st.sampled_from(list(sizes)))


# ── assertions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def assert_equivalent(before: nn.Module, after: nn.Module, example_inputs: Any = None) -> Report:
    """The two models are the same function on these inputs, up to rounding (`lora_fx.verify`).

    Returns:
        What was measured.

    Raises:
        AssertionError: they are not; it names the first use of a weight at which they differ.
    """
    return _assert_equivalent("the models are not the same function", before, after, example_inputs)


def assert_folds_exactly(model: nn.Module, example_inputs: Any = None) -> Report:
    """Folding this adapted model is exact, free and can be undone. The model itself is left alone.

    Every element of a folded weight is W + Σ s·B·A, rounded once; every other weight is bitwise untouched; the folded
    model has the base model's classes, `state_dict` keys and captured graph, and is the adapted model's function;
    folding twice is folding once; unfolding gives every bit back.

    Returns:
        By how much the folded model's outputs differ from the adapted one's.

    Raises:
        AssertionError: something of that does not hold; it names the weight or the place.
    """
    state, wired = oracles.bits(model), oracles.classes(model)
    base, folded = oracles.base_of(model), fold(model, copy=True)

    def check(holds: bool, message: str) -> None:
        if not holds:
            raise _failure(message, model)

    def check_bits(was: dict[str, torch.Tensor], now: nn.Module, message: str) -> None:
        changed = oracles.first_changed(was, oracles.bits(now))
        check(changed is None, f"{changed}: {message}")

    check_bits(state, model, "folding a copy has changed the model itself")
    _check_shape(check, wired, oracles.classes(model), "class of the model itself")
    _check_shape(check, oracles.classes(base), oracles.classes(folded), "class")
    _check_shape(check, dict.fromkeys(base.state_dict()), dict.fromkeys(folded.state_dict()), "state_dict key")
    _check_ties(check, model, folded)
    _check_weights(check, model, folded)
    _check_graph(check, base, folded, example_inputs)
    report = _assert_equivalent("the folded model is not the adapted model", model, folded, example_inputs)
    once = oracles.bits(folded)
    check_bits(once, fold(folded), "folding a second time changes it")
    back = unfold(folded)
    check_bits(state, back, "unfolding does not give its bits back")
    _check_shape(check, wired, oracles.classes(back), "class after unfolding")
    return report


def assert_onnx_equivalent(
    model: nn.Module, example_inputs: Any = None, path: str | os.PathLike[str] | None = None, **options: Any
) -> Any:
    """The exported file, run by ONNX Runtime, is the adapted model in eval mode, up to rounding.

    Args:
        path: where to leave the file; None for a temporary folder.
        options: of `lora_fx.export_onnx`.

    Returns:
        The `ExportReport`.

    Raises:
        AssertionError: it differs, or ONNX Runtime could not run it.
        ExportError: the model cannot be exported.
    """
    from lora_fx.export.onnx.export import export_onnx

    inputs = normalize_inputs(model, example_inputs)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "model.onnx" if path is None else Path(path)
        report = export_onnx(model, inputs, target, **options)
        if report.not_run or not report.comparisons:
            raise _failure(f"ONNX Runtime has not run the file: {report.not_run}", model)
        for comparison in report.comparisons:
            if not comparison.equivalent:
                raise _failure(f"ONNX Runtime is not the model on inputs of shapes {comparison}", model)
        found = _run_file(target, model, inputs)
    still = copy.deepcopy(model).eval()
    with no_fast_paths():
        outputs = run(still, inputs)
        floors = noise_floors(still, inputs, outputs)
    for n, (y, got, (exact, noise)) in enumerate(zip(outputs, found, floors, strict=True)):
        measured = compare(y, got, exact, noise, y.dtype)
        if not measured:
            raise _failure(f"output {n} of the exported file is not the model's: {measured}", model)
    return report


def _run_file(path: Path, model: nn.Module, inputs: Inputs) -> list[torch.Tensor]:
    """What ONNX Runtime gives for the floating-point outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments  # in the signature's order
    tensors = [t for t in pytree.tree_leaves(bound) if isinstance(t, torch.Tensor)]
    feeds = {value.name: t.numpy() for value, t in zip(session.get_inputs(), tensors, strict=True)}
    outputs = [torch.from_numpy(array) for array in session.run(None, feeds)]
    return [t for t in outputs if t.is_floating_point()]


def _assert_equivalent(message: str, before: nn.Module, after: nn.Module, example_inputs: Any) -> Report:
    try:
        report = verify(before, after, example_inputs)
    except LoraFxError as error:
        raise _failure(f"{message}: {error}", before) from error
    if not report:
        where = first_difference(before, after, example_inputs)
        first = f"first at {where}" if where else "in eval mode no use of a weight differs by itself"
        raise _failure(f"{message}: {report}\n{first}", before)
    return report


def _failure(message: str, model: nn.Module) -> AssertionError:
    """With the model as a program, where it is one of ours."""
    return AssertionError(f"{message}\n{model!r}" if isinstance(model, RandomModel) else message)


_Check = Callable[[bool, str], None]


def _check_shape(check: _Check, wanted: dict[str, Any], found: dict[str, Any], what: str) -> None:
    for name in dict.fromkeys((*wanted, *found)):
        check(name in found, f"{name}: this {what} is missing")
        check(name in wanted, f"{name}: this {what} is not the base model's")
        check(wanted[name] is found[name], f"{name or 'the model'}: the {what} is {found[name]}, not {wanted[name]}")


def _check_ties(check: _Check, model: nn.Module, folded: nn.Module) -> None:
    """Names of one storage that are adapted alike share a storage still."""
    acting, after = oracles.active_adapters(model), oracles.parameters(folded)
    first: dict[tuple, str] = {}
    for name, parameter in oracles.parameters(model).items():
        alike = (parameter.untyped_storage().data_ptr(), tuple(map(id, acting.get(name, ()))))
        twin = first.setdefault(alike, name)
        same = after[name].untyped_storage().data_ptr() == after[twin].untyped_storage().data_ptr()
        check(same, f"{name}: it shared its storage with {twin}, and does no longer")


def _check_weights(check: _Check, model: nn.Module, folded: nn.Module) -> None:
    acting, after = oracles.active_adapters(model), oracles.parameters(folded)
    for name, weight in oracles.parameters(model).items():
        if name not in acting:
            check(oracles.same_bits(weight, after[name]), f"{name}: no adapter acts on it, and its bits have changed")
            continue
        wrong = oracles.misrounded(weight, after[name], acting[name])
        if wrong.numel():
            raise _failure(_describe(name, weight, after[name], acting[name], wrong), model)


def _describe(name: str, weight: torch.Tensor, folded: torch.Tensor, acting: Sequence[Any], wrong: torch.Tensor) -> str:
    total, _ = oracles.weight_sums(weight, acting)
    k = int(wrong[0])
    value, wanted = float(folded.detach().reshape(-1)[k]), float(total.reshape(-1)[k])
    index = [int(n) for n in torch.unravel_index(torch.tensor(k), tuple(weight.shape))]
    half_step = abs(wanted) * torch.finfo(weight.dtype).eps / 2
    return (
        f"{name}: {wrong.numel()} of {weight.numel()} folded elements are not W + s·B·A, rounded once to "
        f"{weight.dtype}: element {index} is {value!r} where the sum is {wanted!r} "
        f"(error {abs(value - wanted):.3g}, bound half a step, at most {half_step:.3g})"
    )


def _check_graph(check: _Check, base: nn.Module, folded: nn.Module, example_inputs: Any) -> None:
    def lines(model: nn.Module) -> list[str]:
        return oracles.graph_lines(capture_graph(model, example_inputs).graph)

    found, wanted = lines(folded), lines(base)
    if found != wanted:  # a router on other numbers, or a tied weight of which one use has a copy now
        wanted = lines(oracles.as_folded(base, folded))
    pairs = zip([*wanted, *[""] * len(found)], [*found, *[""] * len(wanted)], strict=False)
    differing = next(((w, f) for w, f in pairs if w != f), None)
    check(differing is None, f"the folded model's graph is not the base model's: {differing}")
