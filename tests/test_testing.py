"""How good `lora_fx.testing` is: what its models cover, what its assertions catch, and what they say then."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
import types
from collections import Counter
from fractions import Fraction

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule, testing
from lora_fx.checks import oracles
from lora_fx.checks.verification import run, verify
from lora_fx.graph.capture import normalize_inputs
from lora_fx.graph.forms import TABLE
from lora_fx.graph.layout import Layout
from lora_fx.model.inventory import inventory
from lora_fx.passes.wiring import wire
from lora_fx.testing import (
    Filling,
    adapters,
    assert_equivalent,
    assert_folds_exactly,
    assert_onnx_equivalent,
    assertions,
    comparing,
    first_difference,
    models,
    random_models,
    rules_for,
)
from lora_fx.testing.random_models import (
    BLOCKS,
    DTYPES,
    HEADS,
    Addmm,
    Attention,
    Bmm,
    Computed,
    Conv,
    Embedding,
    Gated,
    Linear,
    Matmul,
    RandomModel,
)
from lora_fx.testing.strategies import _options
from tests import reference

EVERYTHING = Rule(when=lambda site: not site.weight.problem, rank=1, alpha=2)


def filled(model: RandomModel, rules=EVERYTHING) -> RandomModel:
    return Filling(seed=1, size=1.0)(lora_fx.apply(model, rules, model.example()))


# ── the models ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def drawn() -> list[RandomModel]:
    """What the laws draw from: several runs, because one run of Hypothesis may leave a block out."""
    found = []

    for run_seed in range(4):

        @hypothesis.seed(run_seed)
        @settings(max_examples=300, database=None, phases=[Phase.generate])
        @given(models())
        def collect(pair):
            found.append(pair[0])

        collect()
    return found


def test_every_block_dtype_mode_and_kind_of_sharing_is_drawn(drawn):
    lines = [line.strip() for model in drawn for line in repr(model).splitlines()]
    kinds = Counter(line.partition("(")[0] for line in lines)
    assert not [block.__name__ for block in BLOCKS if kinds[block.__name__] < 3]
    assert kinds["Again"] > 20 and kinds["Tied"] > 20
    for head in HEADS:
        assert sum(model.head == head for model in drawn) > 10, head
    for dtype in DTYPES:
        assert sum(next(model.parameters()).dtype == dtype for model in drawn) > 20
    assert 0.2 < sum(model.training for model in drawn) / len(drawn) < 0.8


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.__name__)
def test_every_option_of_a_block_is_drawn(block):
    drawn = {name: set() for name in block.choices}

    @settings(max_examples=300, derandomize=True, database=None, phases=[Phase.generate])
    @given(_options(block))
    def collect(options):
        for name, values in drawn.items():
            values.add(options[name])

    collect()
    assert not [name for name, values in drawn.items() if values != set(block.choices[name])]


def test_every_form_and_every_way_to_realise_it_is_drawn(drawn):
    forms, realised, taken = Counter(), Counter(), Counter()
    for model in drawn:
        kinds = [type(block) for block in model.blocks]
        if all(taken[kind] >= 2 for kind in kinds):
            continue
        taken.update(kinds)
        for row in lora_fx.plan(model, EVERYTHING, model.example()).rows:
            forms.update(use.form for use in row.uses)
            realised[row.realised] += 1
            realised["dense"] += any(use.call is None for use in row.uses)
            realised["several uses"] += len(row.uses) > 1
            realised["several names"] += len(row.weight.names) > 1
    assert {form.name for form in TABLE} <= set(forms)
    assert min(realised[key] for key in ("graph", "dispatch", "dense", "several uses", "several names")) > 3


@settings(max_examples=40, derandomize=True)
@given(models())
def test_a_model_is_the_program_that_its_repr_shows(pair):
    model, (x,) = pair
    again = eval(repr(model), {**vars(random_models), "torch": torch})
    assert reference.same_bits(reference.bits(model), reference.bits(again)) and repr(again) == repr(model)
    assert [m.training for m in again.modules()] == [m.training for m in model.modules()]
    outputs = [run(m, normalize_inputs(m, x)) for m in (model, again, copy.deepcopy(model), pickle_of(model))]
    assert all(torch.equal(y, outputs[0][0]) for (y,) in outputs)
    assert bool(outputs[0][0].isfinite().all()) and float(outputs[0][0].abs().max()) < 100


def pickle_of(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.__name__)
def test_every_option_of_a_block_runs_in_every_dtype(block):
    for name, values in block.choices.items():
        for value in values:
            for dtype in block.dtypes:
                model = RandomModel(block(**{name: value}), head="linear", outputs=2, dtype=dtype)
                for batch, tokens in ((2, 3), (1, 1)):
                    (y,) = run(model, normalize_inputs(model, model.example(batch, tokens)))
                    assert y.shape[0] == batch and y.shape[2] == 2 and bool(y.isfinite().all()) and bool((y != 0).any())


@pytest.mark.parametrize("block", [Linear, Attention, Conv], ids=lambda b: b.__name__)
def test_a_model_can_be_exported(block):
    model = RandomModel(block(residual=True), Linear(), head="parameter")
    exported = torch.export.export(model, model.example()).module()
    assert torch.equal(exported(*model.example()), model(*model.example()))


def test_a_model_shrinks_to_one_linear():
    model, (x,) = find(models(), lambda pair: True, settings=settings(database=None))
    assert repr(model) == "RandomModel(\n    Linear(inputs=3, outputs=2, bias=True, module=True),\n)"
    assert x.shape == (2, 3, 3)
    chained, _ = find(models(), lambda pair: len(pair[0].blocks) > 1, settings=settings(database=None))
    assert len(chained.blocks) == 2


def test_options_that_a_block_does_not_have_are_refused():
    with pytest.raises(TypeError, match=r"Linear has no option \['size'\]; it has inputs, outputs"):
        Linear(size=3)


def test_strategies_can_be_narrowed():
    @settings(max_examples=30, derandomize=True, database=None)
    @given(models(blocks=[Matmul, Embedding], dtypes=[torch.float64], training=[True], heads=["tied"], max_blocks=2))
    def check(pair):
        model, _ = pair
        assert {type(b) for b in model.blocks} <= {Matmul, Embedding} and len(model.blocks) <= 2
        assert model.training and next(model.parameters()).dtype == torch.float64
        assert model.head == "tied" if isinstance(model.blocks[0], Embedding) else model.head == "none"

    check()


# ── power: what a lost branch does ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "block", BLOCKS if os.environ.get("LORA_FX_PROFILE") == "deep" else BLOCKS[::2], ids=lambda b: b.__name__
)
def test_a_lost_branch_of_any_single_site_is_far_above_the_bound_and_is_named(block):
    """Graph, dispatch and dense: the model with one branch less differs first where that one acts."""
    dtype = torch.float64 if torch.float64 in block.dtypes else torch.float32
    first = () if block.reads_ids else (Linear(),)
    model = filled(RandomModel(*first, block(), Linear(), head="linear", outputs=3, dtype=dtype))
    for n, adapter in enumerate(reference.distinct_adapters(model)):
        name = next(place.weight for place in inventory(model).places if place.adapter is adapter)
        broken = copy.deepcopy(model)
        with torch.no_grad():
            reference.distinct_adapters(broken)[n].B.zero_()
        report = verify(model, broken, model.example())
        assert report.error > 100 * report.bound, f"{name}: {report}"
        if name.startswith(f"blocks.{len(first)}"):
            found = first_difference(model, lora_fx.fold(broken), model.example())
            assert found is not None and name in found.weights and found.report.error > found.report.bound
            assert found.module.startswith(f"blocks.{len(first)}")


@pytest.mark.parametrize(
    ("block", "how"), [(block, how) for block in (Matmul, Bmm, Addmm) for how in block.choices["how"]]
)
def test_every_op_of_a_matmul_is_compared_with_itself(block, how):
    model = filled(RandomModel(Linear(), block(how=how), Linear()))
    broken = copy.deepcopy(model)
    with torch.no_grad():
        next(place.adapter for place in inventory(broken).places if place.path == "blocks.1").B.zero_()
    found = first_difference(model, lora_fx.fold(broken), model.example())
    assert found is not None and "blocks.1.weight" in found.weights


def test_equal_models_differ_nowhere():
    model = square()
    assert first_difference(model, lora_fx.fold(model, copy=True), model.example()) is None


# ── rules and fillings ───────────────────────────────────────────────────────────────────────────────────────────────


def test_rules_are_valid_and_of_every_kind():
    """Parts of a fused weight and single uses of a tied one among them."""
    seen = Counter()
    bases = [
        RandomModel(Attention(fused="interleaved"), Gated(fused=True), head="linear"),
        RandomModel(Embedding(), Gated(), Computed(), head="tied"),
    ]

    @settings(max_examples=60, derandomize=True, database=None, phases=[Phase.generate])
    @given(st.data())
    def check(data):
        model = data.draw(st.sampled_from(bases))
        inputs = model.example()
        rules = data.draw(rules_for(model, inputs, dropout=True))
        rows = lora_fx.plan(model, rules, inputs).rows
        assert rows and all(row.rank >= 1 for row in rows)
        for rule in rules:
            seen.update(key for key in ("where", "role", "form", "when") if getattr(rule, key) is not None)
            seen.update([rule.scaling, "excluded" if rule.rank is None else "adapted"])
            seen["dropout"] += rule.dropout > 0
        seen["rows"] += any(row.rows is not None for row in rows)
        seen["split"] += any(row.split for row in rows)
        seen["higher rank"] += any(row.rank > 1 for row in rows)

    check()
    wanted = ("where", "role", "form", "when", "rslora", "excluded", "dropout", "rows", "split", "higher rank")
    assert all(seen[key] for key in wanted), seen


def test_a_model_without_weights_has_no_rules():
    class Nothing(nn.Module):
        def forward(self, x):
            return x + 1

    with pytest.raises(LoraFxError, match="no weight that can be adapted"):
        find(rules_for(Nothing(), torch.zeros(2)), lambda rules: True, settings=settings(database=None))


def test_fillings_are_deterministic_and_nowhere_zero():
    model = filled(RandomModel(Linear(), Matmul()))
    state = reference.bits(model)
    filling = find(adapters(sizes=[0.5]), lambda f: f.seed > 0, settings=settings(database=None))
    assert filling == Filling(seed=1, size=0.5)
    assert not reference.same_bits(reference.bits(filling(model)), state)
    again = reference.bits(model)
    assert reference.same_bits(reference.bits(filling(model)), again)
    for adapter in reference.distinct_adapters(model):
        assert bool((adapter.A != 0).all()) and bool((adapter.B != 0).all())


# ── the assertions fail when they must, and name the place ──────────────────────────────────────────────────────────


def square(dtype: torch.dtype = torch.float64) -> RandomModel:
    """A model whose second weight has factors of equal shapes."""
    model = RandomModel(Linear(), Linear(inputs=2, outputs=2), Linear(), head="linear", dtype=dtype)
    return filled(model, [Rule(where="blocks.1.*", rank=2, alpha=3), Rule(where="*", rank=1, alpha=3)])


@torch.no_grad()
def swap_factors(adapter) -> None:
    A, B = adapter.A.clone(), adapter.B.clone()
    adapter.A.copy_(B)
    adapter.B.copy_(A)


def drop_scale(adapter) -> None:
    adapter.B.data.div_(adapter.scale)


def skip(adapter) -> None:
    adapter.change(active=False)


@pytest.mark.parametrize("defect", [swap_factors, drop_scale, skip])
def test_the_first_use_that_differs_is_named(defect):
    model = square()
    broken = copy.deepcopy(model)
    defect(broken.blocks[1].linear.weight_lora_default)
    wire(broken)
    with pytest.raises(AssertionError) as caught:
        assert_equivalent(model, broken, model.example())
    message = str(caught.value)
    assert "the models are not the same function: DIFFERENT: error" in message and "noise floor" in message
    assert "first at blocks.1.linear.weight, used by linear in blocks.1.linear: error" in message
    assert repr(RandomModel(Linear(), Linear(inputs=2, outputs=2), Linear(), head="linear", dtype=torch.float64)) in (
        message
    )


def test_models_of_different_shapes_are_no_function_of_each_other():
    a, b = RandomModel(Linear()), RandomModel(Linear(outputs=3))
    with pytest.raises(AssertionError, match="one model returns tensors of shapes"):
        assert_equivalent(a, b, a.example())


def test_equivalent_models_pass_and_the_report_comes_back():
    model = square()
    assert assert_equivalent(model, lora_fx.fold(model, copy=True), model.example()).equivalent
    assert assert_folds_exactly(model, model.example()).equivalent


def fold_with(change):
    """`fold`, and then a change to the folded copy."""
    real = assertions.fold

    def fold(model, **options):
        folded = real(model, **options)
        if options.get("copy"):
            with torch.no_grad():
                change(model, folded)
        return folded

    return fold


def one_step(model, folded):
    weight = folded.blocks[1].linear.weight
    weight.view(-1)[-1] = torch.nextafter(weight.view(-1)[-1], torch.tensor(9.0))


def rounded_twice(model, folded):
    """A delta in the weight's own precision, as other libraries add it."""
    adapter = model.blocks[0].linear.weight_lora_default
    half = torch.bfloat16
    delta = (adapter.B.to(half) @ adapter.A.to(half)) * adapter.scale
    folded.blocks[0].linear.weight.copy_(model.blocks[0].linear.weight + delta)


def bias_moved(model, folded):
    folded.blocks[2].linear.bias[0] += 1


def not_original(model, folded):
    folded.blocks[0].__class__ = type("Linear", (Linear,), {})


def key_left(model, folded):
    folded.blocks[0].register_buffer("left", torch.zeros(1))


def other_graph(model, folded):
    folded.blocks[1].linear.forward = lambda x: (
        nn.functional.linear(x, folded.blocks[1].linear.weight * 1) + (folded.blocks[1].linear.bias)
    )


def touched_itself(model, folded):
    model.blocks[0].linear.weight[0, 0] += 1


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (
            one_step,
            torch.float32,
            r"blocks\.1\.linear\.weight: 1 of 4 folded elements are not W \+ δ",
        ),
        (rounded_twice, torch.bfloat16, r"blocks\.0\.linear\.weight: \d of 6 folded elements"),
        (bias_moved, torch.float32, r"blocks\.2\.linear\.bias: no adapter acts on it, and its bits have changed"),
        (not_original, torch.float32, r"blocks\.0: the class is .*Linear"),
        (key_left, torch.float32, r"blocks\.0\.left: this state_dict key is not the base model's"),
        (other_graph, torch.float32, "the folded model's graph is not the base model's"),
        (touched_itself, torch.float32, r"blocks\.0\.linear\.weight: folding a copy has changed the model itself"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_a_wrong_fold_is_told_by_what_is_wrong(monkeypatch, change, dtype, message):
    model = filled(RandomModel(Linear(), Linear(inputs=2, outputs=2), Linear(), dtype=dtype))
    monkeypatch.setattr(assertions, "fold", fold_with(change))
    with pytest.raises(AssertionError, match=message) as caught:
        assert_folds_exactly(model, model.example())
    assert "RandomModel(\n    Linear(" in str(caught.value)


def test_an_untied_fold_is_told(monkeypatch):
    def untie(model, folded):
        folded.last.weight = nn.Parameter(folded.last.weight.detach().clone())

    model = filled(RandomModel(Embedding(), Linear(), head="tied"), Rule(where="*", rank=1))
    assert_folds_exactly(model, model.example())
    monkeypatch.setattr(assertions, "fold", fold_with(untie))
    message = r"last\.weight: it shared its storage with blocks\.0\.table\.weight, and does no longer"
    with pytest.raises(AssertionError, match=message):
        assert_folds_exactly(model, model.example())


def test_a_fold_into_the_other_use_of_a_tied_weight_is_told(monkeypatch):
    def fold_both(model, folded):
        folded.blocks[0].table.weight.copy_(folded.last.weight)

    model = filled(RandomModel(Embedding(), Linear(), head="tied"), Rule(role="lm_head", rank=1))
    assert_folds_exactly(model, model.example())
    monkeypatch.setattr(assertions, "fold", fold_with(fold_both))
    with pytest.raises(AssertionError, match=r"blocks\.0\.table\.weight: no adapter acts on it"):
        assert_folds_exactly(model, model.example())


@pytest.mark.parametrize("which", ["again", "back"])
def test_a_second_fold_that_adds_and_an_unfold_that_rounds_are_told(monkeypatch, which):
    model = filled(RandomModel(Linear(), Linear()))

    def fold_again(folded, **options):
        if not options:
            folded.blocks[0].linear.weight.data.mul_(2)
            return folded
        return lora_fx.fold(folded, **options)

    def unfold_badly(folded):
        lora_fx.unfold(folded).blocks[1].linear.weight.data.mul_(1 + 2**-20)
        return folded

    if which == "again":
        monkeypatch.setattr(assertions, "fold", fold_again)
    else:
        monkeypatch.setattr(assertions, "unfold", unfold_badly)
    message = {
        "again": r"blocks\.0\.linear\.weight: folding a second time changes it",
        "back": r"blocks\.1\.linear\.weight: unfolding does not give its bits back",
    }
    with pytest.raises(AssertionError, match=message[which]):
        assert_folds_exactly(model, model.example())


class Routed(nn.Module):
    """What the router says decides which module runs: a captured graph shows one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.one, self.other = nn.Linear(6, 5), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.one(x) if self.router(x).sum() > 0 else self.other(x).tanh()


def test_routed_models_fold_on_the_path_of_their_own_numbers():
    """A router chooses other experts for other weights: the graph is the base's on the folded numbers."""
    torch.manual_seed(0)
    x, turned = torch.randn(3, 6), 0
    model = lora_fx.apply(Routed(), Rule(where="router", rank=1, alpha=2), x)
    for seed in range(8):
        Filling(seed=seed, size=4.0)(model)
        both = lora_fx.fold(model, copy=True), comparing.base_of(model)
        lines = [comparing.graph_lines(lora_fx.capture(m, x).graph) for m in both]
        turned += lines[0] != lines[1]
        assert_folds_exactly(model, x)
    assert 0 < turned < 8


@pytest.mark.onnx
def test_the_exported_file_is_run_against_torch(tmp_path, monkeypatch):
    model = square(torch.float32)
    report = assert_onnx_equivalent(model, model.example(), tmp_path / "model.onnx")
    assert report.form == "folded" and (tmp_path / "model.onnx").exists()
    real = assertions._run_file
    monkeypatch.setattr(assertions, "_run_file", lambda *args: [t + 1 for t in real(*args)])
    with pytest.raises(AssertionError, match="output 0 of the exported file is not the model's: DIFFERENT"):
        assert_onnx_equivalent(model, model.example())


@pytest.mark.onnx
def test_a_file_that_onnx_runtime_cannot_run_is_not_called_equivalent():
    model = filled(RandomModel(Linear(), dtype=torch.bfloat16))
    with pytest.raises(AssertionError, match="ONNX Runtime has not run the file"):
        assert_onnx_equivalent(model, model.example())


# ── rounding ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("sides", "shape", "rows"),
    [
        *[("oi", (3, 4), None), ("io", (4, 3), (0, 2)), ("boi", (2, 3, 4), (1,)), ("iob", (4, 3, 2), None)],
        *[("oiio", (2, 3, 4, 5), None), ("oio", (2, 3, 2), (0, 3, 1)), ("bobi", (2, 3, 4, 5), (2, 0))],
    ],
)
def test_the_delta_of_the_checks_is_the_sum_that_a_loop_makes(sides, shape, rows):
    """On whole numbers, where no sum is rounded."""
    adapter = lora_fx.Adapter(Layout(sides, shape), rank=2, alpha=3, rows=rows)
    A, B = (factor.data.copy_(torch.randint(-9, 9, factor.shape)) for factor in (adapter.A, adapter.B))
    found = oracles.delta(torch.zeros(shape), adapter)
    assert found.shape == shape
    for index in itertools.product(*map(range, shape)):
        at = {side: tuple(n for n, s in zip(index, sides, strict=True) if s == side) for side in "boi"}
        size = {side: tuple(n for n, s in zip(shape, sides, strict=True) if s == side) for side in "oi"}
        row, column = (int(np.ravel_multi_index(at[side], size[side])) for side in "oi")
        if rows is not None:
            row = rows.index(row) if row in rows else None
        whole = 0.0 if row is None else float(B[at["b"]][row] @ A[at["b"]][:, column])
        assert float(found[index]) == 1.5 * whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("near_ties", [False, True])
def test_misrounded_elements_are_those_that_fractions_call_misrounded(dtype, near_ties, monkeypatch):
    """In parts of two rows."""
    monkeypatch.setattr(oracles, "_PART", 14)
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, bias=False).to(dtype)
    lora_fx.apply(layer, Rule(where="*", rank=2, alpha=3), torch.randn(2, 7).to(dtype))
    Filling(seed=0, size=1.0)(layer)
    adapter = layer.weight_lora_default
    if near_ties:
        with torch.no_grad():
            layer.weight.copy_((1 + torch.rand(5, 7)).to(dtype))
            adapter.A[0], adapter.B[:, 0] = torch.finfo(dtype).eps / 2, 2 / 3
            adapter.A[1] *= 2.0**-40
    weight, folded = layer.weight.detach().clone(), lora_fx.fold(layer, copy=True).weight.detach()
    assert not oracles.misrounded(weight, folded, [adapter]).numel()
    moved = folded.clone()
    moved.view(-1)[::3] = oracles._step(folded.reshape(-1)[::3], 1)
    wrong = oracles.misrounded(weight, moved, [adapter]).tolist()
    assert wrong == [k for k in range(0, 35, 3) if not nearest(weight, moved, adapter, k)] and len(wrong) >= 6


def nearest(weight, folded, adapter, k) -> bool:
    row, column = divmod(k, 7)
    exact = Fraction(float(weight[row, column])) + Fraction(adapter.scale) * sum(
        Fraction(float(b)) * Fraction(float(a))
        for b, a in zip(adapter.B[row].tolist(), adapter.A[:, column].tolist(), strict=True)
    )
    value = folded[row, column]
    others = [oracles._step(value[None], by) for by in (-1, 1)]
    return all(abs(Fraction(float(value)) - exact) <= abs(Fraction(float(o)) - exact) for o in others)


def test_a_float64_fold_may_be_off_by_its_own_sums_roundings_and_no_more():
    layer = filled(RandomModel(Linear(inputs=5, outputs=3), dtype=torch.float64))
    name, acting = next(iter(inventory(layer).by_weight(active=True).items()))
    weight, folded = layer.get_parameter(name), lora_fx.fold(layer, copy=True).get_parameter(name).detach()
    assert not oracles.misrounded(weight, folded, acting).numel()
    assert oracles.misrounded(weight, folded * (1 + 2**-40), acting).numel() == folded.numel()


# ── the package ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_library_is_imported_without_hypothesis():
    code = "import sys, lora_fx; print([m for m in ('hypothesis', 'lora_fx.testing') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_without_hypothesis_the_cure_is_named():
    code = """
import sys
sys.modules["hypothesis"] = None
import lora_fx
try:
    import lora_fx.testing
except lora_fx.LoraFxError as error:
    print(error.place, "|", error.remedy)
"""
    said = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    assert said == 'lora_fx.testing | pip install "lora-fx[testing]"'


def test_the_lines_of_the_documentation_run():
    lines = testing.__doc__.partition("\n\n")[2].partition("\n\nThe assertions")[0]
    source = "import lora_fx\nfrom hypothesis import given, settings, strategies as st\n" + "\n".join(
        line.removeprefix("    ") for line in lines.splitlines()
    )
    module = types.ModuleType("users_tests")
    exec(source, module.__dict__)
    settings(max_examples=5, derandomize=True, database=None)(module.test_our_pipeline)()
