"""The laws L1 to L14 of the design, over random models, rules and adapters (`lora_fx.testing`), in every dtype.

Run them longer with ``LORA_FX_PROFILE=deep python -m pytest -m laws tests/test_random_laws.py``: ten times as many
examples, drawn anew each time.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.checks.verification import run
from lora_fx.graph.capture import Inputs, no_fast_paths, normalize_inputs, output_tensors
from lora_fx.model.inventory import inventory
from lora_fx.testing import (
    Filling,
    adapters,
    assert_equivalent,
    assert_folds_exactly,
    assert_onnx_equivalent,
    models,
    rules_for,
)
from lora_fx.testing.random_models import BLOCKS, ConvTranspose, GroupedExperts, Whole
from tests import reference

pytestmark = pytest.mark.laws


def examples(count: int) -> settings:
    """Ten times as many examples in the deep profile, two in five of them in the ci one, which has 15 minutes."""
    return settings(max_examples=count * 10 if os.environ.get("LORA_FX_PROFILE") == "deep" else count * 2 // 5)


@dataclass
class Drawn:
    """A base model, the same with adapters in it, and how it came about: all that a failing example has to show."""

    base: nn.Module
    model: nn.Module
    inputs: Inputs
    rules: list[Rule]
    filling: Filling | None
    strength: float

    def __repr__(self) -> str:
        rules = ", ".join(rule.label for rule in self.rules)
        (x,) = self.inputs.args
        return f"\n{self.base!r}\nof {tuple(x.shape)}, with [{rules}], filled by {self.filling}, times {self.strength}"

    def _repr_pretty_(self, printer, cycle) -> None:  # Hypothesis prints a dataclass field by field otherwise
        printer.text(repr(self))


#: half of the examples act as they were trained
STRENGTHS = (1.0, 1.0, 0.7, -1.5)

#: half of the examples are of `lora`, with which the other kinds mix
KINDS = ("lora", "lora", "dora", "full", "bias")


@st.composite
def adapted(draw, filled: bool = True, dropout: bool = False, sizes=(1.0, 0.25, 1e-3), kinds=KINDS, **narrow) -> Drawn:
    model, example_inputs = draw(models(**narrow))
    base = copy.deepcopy(model).requires_grad_(False)  # some kernels choose another path for trainable weights
    rules = draw(rules_for(model, example_inputs, dropout=dropout, kinds=kinds))
    filling = draw(adapters(sizes=sizes)) if filled else None
    strength = draw(st.sampled_from(STRENGTHS))
    lora_fx.apply(model, rules, example_inputs)
    lora_fx.activate(model, {"default": strength})
    if filling:
        filling(model)
    return Drawn(base, model, normalize_inputs(model, example_inputs), rules, filling, strength)


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def dense(drawn: Drawn) -> nn.Module:
    """The base model with W + Σ s·B·A in the place of each adapted weight; the uses of a split one apart."""
    model, twins = copy.deepcopy(drawn.base), {}
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, total in reference.dense_weights(drawn.model).items():
        path, _, attribute = name.rpartition(".")
        owner, old = model.get_submodule(path), named[name]
        key = id(old), tuple(total.flatten().tolist())
        twins.setdefault(key, nn.Parameter(total.to(old.dtype), requires_grad=False))
        setattr(owner, attribute, twins[key])
    return model


@examples(20)
@given(st.booleans(), st.data())
def test_l1_with_b_zero_insert_is_bitwise_invisible(training, data):
    # In train mode the branch's dropout draws random numbers that the model's own dropout then gets others of.
    drawn = data.draw(adapted(filled=False, dropout=not training, training=[training]))
    with no_fast_paths():  # torch's fused encoder rounds differently from its own unfused path
        before, after = run(drawn.base, drawn.inputs), run(drawn.model, drawn.inputs)
    assert same(before, after)
    names = list(drawn.base.state_dict())
    assert [name for name in drawn.model.state_dict() if "_lora_default" not in name] == names


@examples(30)
@given(adapted())
def test_l2_adapted_is_functional_call_with_the_dense_sum(drawn):
    weights, other = reference.dense_weights(drawn.model), dense(drawn)
    called = reference.run_dense(drawn.base, weights, drawn.inputs)
    assert same(called, run(other, drawn.inputs))
    assert_equivalent(other, drawn.model, drawn.inputs)
    if drawn.filling.size == 1.0:
        assert not same(called, run(drawn.base, drawn.inputs)), "the adapters have no effect"


@examples(20)
@given(adapted())
def test_l3_fold_is_the_adapted_model_within_the_noise_floor_and_exact(drawn):
    assert_folds_exactly(drawn.model, drawn.inputs)


@examples(20)
@given(adapted())
def test_l4_the_graph_of_the_folded_model_is_the_graph_of_the_base(drawn):
    base, folded = copy.deepcopy(drawn.base), lora_fx.fold(drawn.model)
    _untie_like(base, folded)
    graphs = [reference.graph_lines(lora_fx.capture(m, drawn.inputs).graph) for m in (base, folded)]
    assert graphs[0] == graphs[1]
    assert reference.classes(folded) == reference.classes(base)
    assert list(folded.state_dict()) == list(base.state_dict())


def _untie_like(base: nn.Module, folded: nn.Module) -> None:
    """A fold gives the one adapted use of a tied weight a copy of its own: so does this."""
    named = dict(base.named_parameters(remove_duplicate=False))
    first: dict[int, str] = {}
    for name, parameter in named.items():
        twin = first.setdefault(id(parameter), name)
        if folded.get_parameter(twin) is not folded.get_parameter(name):
            path, _, attribute = name.rpartition(".")
            setattr(base.get_submodule(path), attribute, nn.Parameter(parameter.detach().clone(), requires_grad=False))


@examples(20)
@given(adapted(), st.integers(1, 3))
def test_l5_unfolding_gives_every_bit_back(drawn, times):
    model, state, before = drawn.model, reference.bits(drawn.model), run(drawn.model, drawn.inputs)
    classes = reference.classes(model)
    for _ in range(times):
        lora_fx.unfold(lora_fx.fold(model))
    assert reference.same_bits(reference.bits(model), state)
    assert reference.classes(model) == classes
    assert same(run(model, drawn.inputs), before)


@examples(20)
@given(adapted(sizes=(1.0,)))
def test_l6_exactly_the_adapters_get_gradients_and_each_one_does(drawn):
    base = copy.deepcopy(drawn.base).requires_grad_(True)
    reached = _with_gradient(base, drawn.inputs)
    for adapter in reference.distinct_adapters(drawn.model):
        adapter.dropout.eval()  # it may drop all of two ids
    found = _with_gradient(drawn.model, drawn.inputs) & {name for name, _ in drawn.model.named_parameters()}
    expected = {
        f"{place.path}.{place.child}.{factor}".lstrip(".")
        for place in inventory(drawn.model).places
        if place.child in place.owner._modules and place.weight in reached
        for factor in place.adapter._parameters
    }
    assert found == expected
    trainable = {name for name, p in drawn.model.named_parameters() if p.requires_grad}
    assert expected <= trainable and all("_lora_default" in name for name in trainable)


def _with_gradient(model: nn.Module, inputs: Inputs) -> set[str]:
    """Every name of the parameters that a random cotangent on the outputs reaches."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    outputs = [t for t in output_tensors(inputs.call(model)) if t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator).to(t.dtype)).sum() for t in outputs).backward()
    named = model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if p.grad is not None and bool((p.grad != 0).any())}


@examples(20)
@given(adapted())
def test_l7_folding_twice_is_folding_once(drawn):
    once = reference.bits(lora_fx.fold(drawn.model))
    assert reference.same_bits(reference.bits(lora_fx.fold(drawn.model)), once)
    final = lora_fx.fold(lora_fx.unfold(drawn.model), final=True)
    assert reference.same_bits(reference.bits(final), once)


@examples(20)
@given(adapted(kinds=("lora",)), st.data())
def test_l8_the_order_of_disjoint_rules_does_not_matter(drawn, data):
    found = {}  # a weight with several names has one rule here: by any of them it is found
    for place in inventory(drawn.model).places:
        found.setdefault(id(place.parameter), place.weight)
    names = list(found.values())
    kind = data.draw(st.sampled_from(("lora", "dora")))
    rules = [Rule(where=name, kind=kind, rank=1, alpha=n + 1) for n, name in enumerate(names)]
    ordered, shuffled = copy.deepcopy(drawn.base), copy.deepcopy(drawn.base)
    lora_fx.apply(ordered, rules, drawn.inputs, check=False)
    drawn.filling(ordered)
    lora_fx.apply(shuffled, data.draw(st.permutations(rules)), drawn.inputs, check=False)
    shuffled.load_state_dict(ordered.state_dict())
    assert same(run(ordered, drawn.inputs), run(shuffled, drawn.inputs))


@examples(20)
@given(adapted())
def test_l9_untouched_weights_are_bitwise_untouched(drawn):
    named = dict(drawn.base.named_parameters(remove_duplicate=False))
    owned = {name: id(module) for name, module in drawn.base.named_modules(remove_duplicate=False)}
    places = {_place(name, owned) for name in reference.dense_weights(drawn.model)}
    touched = {name for name in named if _place(name, owned) in places}
    own = {name: t for name, t in reference.bits(drawn.model).items() if "_lora_default" not in name}
    before = reference.bits(drawn.base)
    assert reference.same_bits(own, before), "insert has written to a weight"
    after = reference.bits(lora_fx.fold(drawn.model, final=True))
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert after.keys() == before.keys() and changed <= touched
    if drawn.filling.size == 1.0:
        assert changed


def _place(name: str, owned: dict[str, int]) -> tuple[int, str]:
    """The module that holds a parameter, and its attribute: the same for a module under two names."""
    path, _, attribute = name.rpartition(".")
    return owned[path], attribute


#: What torch can export and ONNX Runtime's CPU provider run. torch translates neither `grouped_mm` in float32 nor
#: `conv_tbc`. The runtime has no float64 kernel of erf, and dies of attention in float16 with a kdim and no bias.
ONNX = dict(
    blocks=[b for b in BLOCKS if b not in (GroupedExperts, Whole)],
    dtypes=(torch.float32,),
    training=(False,),
    max_blocks=2,
)


def runs_in_onnx(drawn: Drawn) -> bool:
    """ONNX Runtime refuses an output padding as large as the stride, which a dilation makes possible in torch."""
    geometries = [b._options["geometry"] for b in drawn.base.blocks if isinstance(b, ConvTranspose)]
    return all(output_padding < stride for _, stride, _, output_padding, _ in geometries)


@pytest.mark.onnx
@examples(6)
@given(adapted(**ONNX).filter(runs_in_onnx))
def test_l10_onnx_runtime_of_the_folded_file_is_torch_of_the_adapted_model(drawn):
    assert_onnx_equivalent(drawn.model, drawn.inputs)


@pytest.mark.onnx
@examples(5)
@given(adapted(**ONNX).filter(runs_in_onnx))
def test_l11_the_onnx_graph_of_the_folded_model_is_the_one_of_the_base(drawn):
    with tempfile.TemporaryDirectory() as folder:
        path, axes = Path(folder) / "m.onnx", {"x": {0: "batch"}}
        report = lora_fx.export_onnx(drawn.model, drawn.inputs, path, dynamic_shapes=axes, prove=True, check=False)
    assert report.proof.folded or report.proof.evaluated or report.proof.unread


@pytest.mark.onnx
@examples(5)
@given(adapted(**ONNX, kinds=("lora",)).filter(runs_in_onnx))
def test_l14_a_switchable_graph_is_the_base_and_every_adapter(drawn):
    with tempfile.TemporaryDirectory() as folder:
        report = lora_fx.export_onnx(drawn.model, drawn.inputs, Path(folder) / "m.onnx", adapters="switchable")
    assert {comparison.adapter for comparison in report.comparisons} == {"no adapter", *lora_fx.adapters(drawn.model)}


@examples(20)
@given(adapted(dropout=True), st.booleans())
def test_l12_saved_and_loaded_into_a_fresh_model_it_is_the_same_model(drawn, peft):
    """As it was trained, at whichever strength it acts."""
    fresh = copy.deepcopy(drawn.base)
    with tempfile.TemporaryDirectory() as folder:
        try:
            lora_fx.save_adapter(drawn.model, folder, peft=peft)
        except lora_fx.errors.FileError:  # what PEFT has no word for is refused, and our own format takes it
            assert peft
            lora_fx.save_adapter(drawn.model, folder, peft=False)
        lora_fx.load_adapter(fresh, folder, drawn.inputs)
    assert reference.same_bits(reference.bits(fresh), reference.bits(drawn.model))
    lora_fx.activate(drawn.model, "default")
    for model in (fresh, drawn.model):
        model.eval()
    assert same(run(fresh, drawn.inputs), run(drawn.model, drawn.inputs))


# ── refused calls ────────────────────────────────────────────────────────────────────────────────────────────────────


def _no_such_site(d: Drawn, folder: Path) -> None:
    lora_fx.apply(d.model, [*d.rules, Rule(where="no.such.weight", rank=1)], d.inputs, name="more")


def _rank_too_large(d: Drawn, folder: Path) -> None:
    lora_fx.apply(d.model, [*d.rules[:-1], Rule(where="*", rank=10_000)], d.inputs, name="more")


def _same_name(d: Drawn, folder: Path) -> None:
    lora_fx.apply(d.model, d.rules, d.inputs)


def _wrong_inputs(d: Drawn, folder: Path) -> None:
    lora_fx.apply(d.model, d.rules, torch.zeros(2, 2, 2, 2, 2, 2), name="more")


def _nan_in_a_factor(d: Drawn, folder: Path) -> None:
    lora_fx.fold(d.model)


def _infinite_sum(d: Drawn, folder: Path) -> None:
    lora_fx.fold(d.model, final=True)


def _not_folded(d: Drawn, folder: Path) -> None:
    lora_fx.unfold(d.model)


def _unknown_adapter(d: Drawn, folder: Path) -> None:
    lora_fx.switch(d.model, "nobody")


def _no_file(d: Drawn, folder: Path) -> None:
    lora_fx.load_adapter(d.model, folder / "nowhere", d.inputs, name="more")


def _truncated_file(d: Drawn, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    lora_fx.load_adapter(d.model, folder, d.inputs, name="more")


def _file_of_another_model(d: Drawn, folder: Path) -> None:
    other = nn.Sequential(nn.Linear(31, 37))
    lora_fx.apply(other, Rule(where="*", rank=2), torch.zeros(1, 31))
    lora_fx.save_adapter(other, folder / "other", peft=False)
    lora_fx.load_adapter(d.model, folder / "other", d.inputs, name="more")


def _no_folder_for_the_file(d: Drawn, folder: Path) -> None:
    lora_fx.export_onnx(d.model, d.inputs, folder / "no" / "such" / "model.onnx")


def _poison(d: Drawn, value: float) -> None:
    with torch.no_grad():
        *_, parameter = reference.distinct_adapters(d.model)[-1].parameters()
        parameter.view(-1)[-1] = value


#: what is refused, and what has to be done to the model before
REFUSED: dict[Callable[[Drawn, Path], None], float | None] = {
    _no_such_site: None, _rank_too_large: None, _same_name: None, _wrong_inputs: None, _nan_in_a_factor: math.nan,
    _infinite_sum: -math.inf, _not_folded: None, _unknown_adapter: None, _no_file: None, _truncated_file: None,
    _file_of_another_model: None, _no_folder_for_the_file: None,
}  # fmt: skip


def _everything(model: nn.Module) -> tuple:
    flags = [(m.training, sorted(m.__dict__), dict(m._forward_hooks)) for m in model.modules()]
    return reference.classes(model), flags, [p.requires_grad for p in model.parameters()]


@examples(30)
@given(adapted(), st.sampled_from(list(REFUSED)))
def test_l13_after_a_refused_call_the_model_is_bitwise_what_it_was(drawn, refused):
    with tempfile.TemporaryDirectory() as folder:
        lora_fx.save_adapter(drawn.model, folder, peft=False)
        if REFUSED[refused] is not None:
            _poison(drawn, REFUSED[refused])
        before, state, outputs = _everything(drawn.model), reference.bits(drawn.model), run(drawn.model, drawn.inputs)
        with pytest.raises(LoraFxError) as caught:
            refused(drawn, Path(folder))
    assert caught.value.reason and caught.value.place and caught.value.remedy
    assert _everything(drawn.model) == before
    assert reference.same_bits(reference.bits(drawn.model), state)
    after = run(drawn.model, drawn.inputs)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, outputs, strict=True))
