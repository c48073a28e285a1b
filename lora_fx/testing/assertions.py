"""Assertions on adapted, folded and exported models, which name the place where they fail."""

from __future__ import annotations

import copy
import inspect
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lora_fx.application import fold, unfold
from lora_fx.checks.oracles import delta, misrounded
from lora_fx.checks.verification import Report, compare, noise_floors, run, verify
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import LoraFxError
from lora_fx.graph.capture import Inputs, capture_graph, no_fast_paths, normalize_inputs
from lora_fx.model.inventory import base_parameters, inventory
from lora_fx.testing import comparing
from lora_fx.testing.random_models import RandomModel


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

    Every element of a folded weight is W + Σ δ, rounded once; every other weight is bitwise untouched; the folded
    model has the base model's classes, `state_dict` keys and captured graph, and is the adapted model's function;
    folding twice is folding once; unfolding gives every bit back.

    Returns:
        By how much the folded model's outputs differ from the adapted one's.

    Raises:
        AssertionError: something of that does not hold; it names the weight or the place.
    """
    state, wired = comparing.bits(model), comparing.classes(model)
    base, folded = comparing.base_of(model), fold(model, copy=True)
    _refuse(model, _changed(state, model, "folding a copy has changed the model itself"))
    _refuse(model, _other(wired, comparing.classes(model), "class of the model itself"))
    _refuse(model, _other(comparing.classes(base), comparing.classes(folded), "class"))
    _refuse(model, _other(dict.fromkeys(base.state_dict()), dict.fromkeys(folded.state_dict()), "state_dict key"))
    _refuse(model, _wrong_weights(model, folded))
    _refuse(model, _other_lines(base, folded, example_inputs))
    report = _assert_equivalent("the folded model is not the adapted model", model, folded, example_inputs)
    once = comparing.bits(folded)
    _refuse(model, _changed(once, fold(folded), "folding a second time changes it"))
    back = unfold(folded)
    _refuse(model, _changed(state, back, "unfolding does not give its bits back"))
    _refuse(model, _other(wired, comparing.classes(back), "class after unfolding"))
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
    from lora_fx.export.onnx.runs import open_session

    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments  # in the signature's order
    tensors = [t for t in pytree.tree_leaves(bound) if isinstance(t, torch.Tensor)]
    session, missing = open_session(path)
    assert session is not None, missing
    with session:
        feeds = {name: t.numpy() for (name, _, _), t in zip(session.inputs, tensors, strict=True)}
        outputs = [torch.from_numpy(array) for array in session.run(feeds)]
    return [t for t in outputs if t.is_floating_point()]


def _assert_equivalent(message: str, before: nn.Module, after: nn.Module, example_inputs: Any) -> Report:
    try:
        report = verify(before, after, example_inputs)
    except LoraFxError as error:
        raise _failure(f"{message}: {error}", before) from error
    if not report:
        where = comparing.first_difference(before, after, example_inputs)
        first = f"first at {where}" if where else "in eval mode no use of a weight differs by itself"
        raise _failure(f"{message}: {report}\n{first}", before)
    return report


def _failure(message: str, model: nn.Module) -> AssertionError:
    """With the model as a program, where it is one of ours."""
    return AssertionError(f"{message}\n{model!r}" if isinstance(model, RandomModel) else message)


def _refuse(model: nn.Module, problems: Iterator[str]) -> None:
    for problem in problems:
        raise _failure(problem, model)


def _changed(was: dict[str, torch.Tensor], now: nn.Module, message: str) -> Iterator[str]:
    found = comparing.bits(now)
    for name in dict.fromkeys((*was, *found)):
        if not (name in was and name in found and comparing.same_bits(was[name], found[name])):
            yield f"{name}: {message}"


def _other(wanted: dict[str, Any], found: dict[str, Any], what: str) -> Iterator[str]:
    for name in dict.fromkeys((*wanted, *found)):
        if name not in found:
            yield f"{name}: this {what} is missing"
        elif name not in wanted:
            yield f"{name}: this {what} is not the base model's"
        elif wanted[name] is not found[name]:
            yield f"{name or 'the model'}: the {what} is {found[name]}, not {wanted[name]}"


def _wrong_weights(model: nn.Module, folded: nn.Module) -> Iterator[str]:
    """Names of one storage that are adapted alike share one still, and what no adapter acts on is untouched."""
    acting, before, after = inventory(model).by_weight(active=True), base_parameters(model), base_parameters(folded)
    first: dict[tuple, str] = {}
    for name, weight in before.items():
        twin = first.setdefault((weight.untyped_storage().data_ptr(), *map(id, acting.get(name, ()))), name)
        if after[name].untyped_storage().data_ptr() != after[twin].untyped_storage().data_ptr():
            yield f"{name}: it shared its storage with {twin}, and does no longer"
    for name, weight in before.items():
        if name in acting:
            wrong = misrounded(weight, after[name], acting[name])
            if wrong.numel():
                yield _describe(name, weight, after[name], acting[name], wrong)
        elif not comparing.same_bits(weight, after[name]):
            yield f"{name}: no adapter acts on it, and its bits have changed"


def _describe(
    name: str, weight: torch.Tensor, folded: torch.Tensor, acting: Sequence[Adapter], wrong: torch.Tensor
) -> str:
    total = weight.detach().to(torch.float64) + delta(weight, *acting)
    k = int(wrong[0])
    value, wanted = float(folded.detach().reshape(-1)[k]), float(total.reshape(-1)[k])
    index = [int(n) for n in torch.unravel_index(torch.tensor(k), tuple(weight.shape))]
    half_step = abs(wanted) * torch.finfo(weight.dtype).eps / 2
    return (
        f"{name}: {wrong.numel()} of {weight.numel()} folded elements are not W + δ, rounded once to "
        f"{weight.dtype}: element {index} is {value!r} where the sum is {wanted!r} "
        f"(error {abs(value - wanted):.3g}, bound half a step, at most {half_step:.3g})"
    )


def _other_lines(base: nn.Module, folded: nn.Module, example_inputs: Any) -> Iterator[str]:
    def lines(model: nn.Module) -> list[str]:
        return comparing.graph_lines(capture_graph(model, example_inputs).graph)

    found, wanted = lines(folded), lines(base)
    if found != wanted:  # a router on other numbers, or a tied weight of which one use has a copy now
        wanted = lines(comparing.as_folded(base, folded))
    for pair in zip_longest(wanted, found, fillvalue=""):
        if len({*pair}) > 1:
            yield f"the folded model's graph is not the base model's: {pair}"
