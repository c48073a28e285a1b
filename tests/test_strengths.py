"""Adapters at a strength:   W + 0.7·δa − 0.3·δb,   of every kind that is a delta, and the same wherever it goes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare, noise_floors, run
from lora_fx.errors import AdapterError, FoldError
from lora_fx.export.onnx.sessions import Session
from lora_fx.graph.capture import normalize_inputs
from lora_fx.model.inventory import inventory
from lora_fx.testing import Filling, assert_equivalent, assert_folds_exactly
from tests.test_active import Configured, same, state

X = torch.linspace(-1, 1, 24).reshape(4, 6)
KINDS = ("lora", "dora", "adalora", "full", "bias")
STRENGTHS = {"a": 0.7, "b": -1.25}


def adapted(one: str = "lora", other: str = "lora") -> tuple[nn.Module, nn.Module]:
    """A model with the adapters a and b, of these kinds, on a forward that is generated and one that dispatches; and
    its base."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Configured(10, 5)).requires_grad_(False)
    model = copy.deepcopy(base)
    for name, kind in (("a", one), ("b", other)):
        settings = {"rank": 2, "alpha": 3} if kind in ("lora", "dora", "adalora") else {}
        lora_fx.apply(model, Rule(where="*", kind=kind, **settings), X, name=name)
    Filling(seed=0, size=0.5)(model)
    return model, base


def by_hand(model: nn.Module, base: nn.Module, strengths: dict[str, float]) -> nn.Module:
    """The base with W + Σ c·δ: δ is what the adapter at strength 1 says."""
    dense = copy.deepcopy(base).double()
    for place in inventory(model).places:
        copied = copy.deepcopy(place.adapter).double()
        copied.adjust(1.0)
        own = strengths.get(place.adapter.name, 0.0) * copied.delta(place.parameter.detach().double())
        dense.get_parameter(place.weight).data.add_(own)
    return dense.float()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_dense_sum_in_forwards_folds_and_certificates(kind):
    model, base = adapted(kind)
    before = state(model)
    with lora_fx.active(model, STRENGTHS):
        dense = by_hand(model, base, STRENGTHS)
        assert_equivalent(dense, model, X)
        assert_folds_exactly(model, X)
        certificate = lora_fx.certify(model, X)
        assert certificate, str(certificate)
        lora_fx.fold(model)
        assert_equivalent(dense, model, X)
        lora_fx.unfold(model)
        assert {a.name: a.strength for a in inventory(model).adapters} == STRENGTHS
    assert same(state(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_one_alone_is_the_dense_sum(kind):
    model, base = adapted(kind)
    for c in (0.7, -1.25):
        lora_fx.activate(model, {"a": c})
        assert_equivalent(by_hand(model, base, {"a": c}), model, X)


def test_blocks_nest_and_all_is_as_it_was_after_an_error():
    model, base = adapted()
    lora_fx.activate(model, {"a": 0.25})
    before = state(model)
    with pytest.raises(ZeroDivisionError), lora_fx.active(model, STRENGTHS):
        outer = run_once(model)
        with lora_fx.active(model, "b"):
            assert torch.equal(run_once(model), run_once(model)) and not torch.equal(run_once(model), outer)
            with lora_fx.disabled(model):
                assert torch.equal(run_once(model), base(X))
        assert torch.equal(run_once(model), outer)
        raise ZeroDivisionError
    assert same(state(model), before)
    assert {a.name: a.strength for a in inventory(model).adapters} == {"a": 0.25, "b": 1.0}
    lora_fx.activate(model, "a")
    assert {a.strength for a in inventory(model).adapters} == {1.0}


def run_once(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(X)


def test_zero_leaves_it_out_and_minus_one_takes_it_away():
    model, base = adapted()
    with lora_fx.active(model, {"a": 0, "b": -0.0}):
        assert torch.equal(model(X), base(X))
        assert not any(p.requires_grad for p in model.parameters())
        with pytest.raises(FoldError, match="no active adapter"):
            lora_fx.fold(model)
    with lora_fx.active(model, "b", {"a": 0}):
        alone = run_once(model)
    with lora_fx.active(model, "b"):
        assert torch.equal(run_once(model), alone)
    lora_fx.fold(lora_fx.activate(model, "a"), final=True)
    lora_fx.apply(model, Rule(where="*", rank=2, alpha=3), X, name="again")
    other, _ = adapted()
    own = {place.weight: place.adapter for place in inventory(other).places if place.adapter.name == "a"}
    for place in inventory(model).places:
        for factor in "AB":
            place.adapter.get_parameter(factor).data.copy_(own[place.weight].get_parameter(factor))
    lora_fx.activate(model, {"again": -1})
    assert_equivalent(base, model, X)


def test_it_is_folded_by_the_real_number_and_rounded_once():
    model, base = adapted()
    lora_fx.activate(model, {"a": 0.1})
    adapter = next(a for a in inventory(model).adapters if a.name == "a")
    W, A, B = (t.tolist() for t in (base[0].weight, adapter.A, adapter.B))
    folded = lora_fx.fold(model, copy=True)[0].weight
    for o, i in ((0, 0), (9, 5), (4, 2)):
        exact = Fraction(W[o][i]) + Fraction(0.1 * 1.5) * sum(Fraction(B[o][k]) * Fraction(A[k][i]) for k in range(2))
        assert abs(Fraction(float(folded[o, i])) - exact) <= Fraction(torch.finfo(torch.float32).eps) / 2 * abs(exact)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"a": float("nan")}, "nan is no strength"),
        ({"a": float("-inf")}, "-inf is no strength"),
        ({"a": True}, "True is no strength"),
        ({"a": "1"}, "'1' is no strength"),
        ({"a": None}, "None is no strength"),
        ({"a": 10**400}, "is no strength"),
        ({"a": 0.5, "c": 0.5}, "no adapter named 'c'"),
        ({"c": 0}, "no adapter named 'c'"),
        ({1: 0.5}, "1 is no name"),
        ({"b": 1e308}, "is no finite number"),
    ],
)
def test_what_is_no_strength_is_refused_before_anything_changes(given, says):
    model, _ = adapted()
    for adapter in inventory(model).adapters:
        adapter.alpha = 200.0
    before = state(model)
    for verb in (lora_fx.activate, lora_fx.switch):
        with pytest.raises(AdapterError, match=says):
            verb(model, given)
        assert same(state(model), before)
    with pytest.raises(AdapterError, match="'a' stands there twice"):
        lora_fx.activate(model, "a", {"a": 0.5})
    with pytest.raises(AdapterError, match=r"lora_fx.activate\(model, {name: strength}\)"):
        next(iter(inventory(model).adapters)).strength = 0.5


def test_what_is_no_delta_has_no_strength():
    model = nn.Sequential(nn.Linear(6, 10))
    lora_fx.apply(model, Rule(where="*", kind="bottleneck", rank=2), X)
    lora_fx.apply(model, Rule(where="*", rank=2), X, name="b")
    before = state(model)
    with pytest.raises(AdapterError, match="the kind 'bottleneck' has no δ that it could be of"):
        lora_fx.activate(model, {"b": 0.5, "default": 0.5})
    assert same(state(model), before)
    lora_fx.activate(model, {"b": 0.5, "default": 1})


def test_switch_folds_them_with_these_in_the_place_of_those():
    model, base = adapted()
    lora_fx.fold(model)
    for strengths in (STRENGTHS, {"b": 0.5}):
        lora_fx.switch(model, strengths)
        assert_equivalent(by_hand(lora_fx.unfold(copy.deepcopy(model)), base, strengths), model, X)


def test_a_file_has_it_as_it_was_trained(tmp_path):
    model, base = adapted()
    lora_fx.activate(model, {"a": 0.7})
    lora_fx.save_adapter(model, tmp_path, name="a")
    lora_fx.load_adapter(fresh := copy.deepcopy(base), tmp_path, X)
    lora_fx.activate(model, "a")
    assert torch.equal(fresh(X), model(X))
    assert {a.scale for a in inventory(fresh).adapters} == {1.5}


@pytest.mark.parametrize("kind", KINDS)
def test_another_strength_is_no_other_program(kind):
    model, base = adapted(kind)
    with counted(model) as (compiled, graphs):
        for a in (1.0, 0.7, -0.3, 1.0, 2.5):
            lora_fx.activate(model, {"a": a, "b": 0.5})
            with torch.no_grad():
                found = compiled(X)
            assert_agrees(found, by_hand(model, base, {"a": a, "b": 0.5}))
            compiled(X).sum().backward()
        assert len(graphs) == 2  # with gradients and without


@contextmanager
def counted(model: nn.Module) -> Iterator[tuple[nn.Module, list[torch.fx.GraphModule]]]:
    """The model compiled, and the graphs that are."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., torch.Tensor]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    yield torch.compile(model, backend=backend, fullgraph=True), graphs
    torch.compiler.reset()


def assert_agrees(found: torch.Tensor, dense: nn.Module) -> None:
    inputs = normalize_inputs(dense, X)
    (y,) = outputs = run(dense, inputs)
    ((exact, noise),) = noise_floors(dense, inputs, outputs)
    assert compare(y, found, exact, noise, y.dtype)


@pytest.mark.onnx
@pytest.mark.parametrize("form", ["folded", "unfolded", "switchable"])
def test_it_is_exported_as_it_acts(tmp_path, form):
    """An export holds the file, run by ONNX Runtime, against the model as it acts, or raises."""
    model, base = adapted()
    lora_fx.activate(model, STRENGTHS)
    report = lora_fx.export_onnx(model, X, tmp_path / "m.onnx", adapters=form)
    assert report.comparisons
    if form == "switchable":
        file = lora_fx.save_onnx_adapter(model, tmp_path / "a.onnx_adapter", name="a")
        session = Session(tmp_path / "m.onnx", adapters={"a": file})
        (found,) = session.run((X.numpy(),), "a").values()
        dense = by_hand(model, base, {"a": 0.7})
    else:
        session = Session(tmp_path / "m.onnx")
        (found,) = session.run((X.numpy(),)).values()
        dense = by_hand(model, base, STRENGTHS)
    assert_agrees(torch.from_numpy(found), dense)
