"""The laws L1 to L9 of the design, for every architecture of the zoo: all its weights adapted, in float64, θ ≠ θ₀.

`lora` over all of it; each other kind over every twelfth architecture, and over all with ``LORA_FX_PROFILE=deep``.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from functools import cached_property

import pytest
import torch

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import SLACK, compare, run, worst
from lora_fx.graph.capture import no_fast_paths, normalize_inputs, output_tensors
from lora_fx.graph.program import Program
from lora_fx.model.inventory import inventory
from tests import reference
from tests.zoo import ZOO, Case

pytestmark = pytest.mark.laws

#: CPU kernels of grouped_mm take no float64: these run in float32
FLOAT32_ONLY = {"qwen3-moe-grouped", "gpt-oss-grouped"}


THETA = ("A", "B", "magnitude", "P", "singular", "Q", "shift", "weight")
DEEP = os.environ.get("LORA_FX_PROFILE") == "deep"
KINDS = [(case, "lora") for case in ZOO]
OTHERS = "dora", "adalora", "bias", "full"
KINDS += [(case, kind) for k, kind in enumerate(OTHERS) for case in (ZOO if DEEP else ZOO[k::12])]


def label(chosen: tuple[Case, str]) -> str:
    case, kind = chosen
    return case.name if kind == "lora" else f"{case.name}-{kind}"


@dataclass(frozen=True)
class Dense:
    """The outputs of the base with W + s·B·A in the place of W."""

    outputs: list[torch.Tensor]
    noise: list[float]
    """How far one rounding step in each adapted weight, where it is read, moves them, relative to their size."""


class Adapted:
    """One case, built once: the base, the adapted model with θ ≠ θ₀, and the inputs."""

    def __init__(self, case: Case, kind: str) -> None:
        self.case = case
        model, inputs = case.build()
        if case.name in FLOAT32_ONLY:
            self.inputs = normalize_inputs(model, inputs)
        else:
            model, self.inputs = reference.in_double(model, inputs)
        self.base = model.requires_grad_(False)  # frozen: some kernels choose another path for trainable weights
        try:
            self.fresh = lora_fx.apply(
                copy.deepcopy(model), reference.everything(model, self.inputs, kind), self.inputs
            )
        except lora_fx.errors.RuleError as error:
            assert kind == "bias" and "matches nothing" in error.reason
            pytest.skip(f"{case.name} has no bias")
        self.model = copy.deepcopy(self.fresh)
        reference.fill(self.model)
        self._dense: dict[bool, Dense] = {}

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        """W + s·B·A of every adapted parameter, in float64."""
        return reference.dense_weights(self.model)

    @cached_property
    def program(self) -> Program:
        """Of the base, as it was built; weights are read in the same dtypes in train mode."""
        return lora_fx.capture(self.base, self.inputs)

    def dense(self, training: bool) -> Dense:
        """The base with these weights, in that mode."""
        if training not in self._dense:
            base = modes(copy.deepcopy(self.base), training)
            self._dense[training] = dense(base, self.weights, self.inputs, self.program)
        return self._dense[training]


@pytest.fixture(scope="module", params=KINDS, ids=label)
def adapted(request) -> Adapted:
    return Adapted(*request.param)


#: Laws about rules, which random models try in more ways than the architectures of the zoo differ in.
FEW = pytest.mark.parametrize(
    "adapted", [(case, "lora") for case in (ZOO if DEEP else ZOO[::8])], ids=label, indirect=True
)


#: by turns, from model to model: every `apply` here checks itself in both
MODES = pytest.mark.parametrize("training", [False, True] if DEEP else [None], indirect=True)


@pytest.fixture
def training(request, adapted) -> bool:
    return bool(ZOO.index(adapted.case) % 2) if request.param is None else request.param


def modes(model: torch.nn.Module, training: bool) -> torch.nn.Module:
    """In train mode the branch's dropout is 0 here, and equal seeds make the model's own dropout equal."""
    for module in model.modules():
        module.training = training
    return model


def assert_same_function(a, b, noise_of) -> None:
    reports = [compare(x, y, y, noise, y.dtype) for x, y, noise in zip(a, b, noise_of, strict=True)]
    assert worst(reports), str(worst(reports))


def dense(base, weights, inputs, program) -> Dense:
    generator = torch.Generator().manual_seed(0)
    outputs = reference.run_dense(base, weights, inputs)
    own = dict(base.named_parameters(remove_duplicate=False))
    steps = {name: max(use.rounding for use in w.uses) for w in program.weights if w.uses for name in w.names}
    moved = {}
    for name, weight in weights.items():
        signs = torch.randint(0, 2, weight.shape, generator=generator).double() * 2 - 1
        moved[name] = weight * (1 + 2 * steps.get(name, torch.finfo(own[name].dtype).eps / 2) * signs)
    again = reference.run_dense(base, moved, inputs)
    noise = [float((x - y).double().norm() / y.double().norm()) for x, y in zip(again, outputs, strict=True)]
    return Dense(outputs, noise)


@MODES
def test_l1_with_b_zero_insert_is_bitwise_invisible(adapted, training):
    with no_fast_paths():  # torch's fused encoder rounds differently from its own unfused path
        before = run(modes(copy.deepcopy(adapted.base), training), adapted.inputs)
        after = run(modes(copy.deepcopy(adapted.fresh), training), adapted.inputs)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@MODES
def test_l2_adapted_is_the_base_with_the_dense_sum(adapted, training):
    base, model = modes(copy.deepcopy(adapted.base), training), modes(copy.deepcopy(adapted.model), training)
    dense, plain = adapted.dense(training), run(base, adapted.inputs)
    assert any(not torch.equal(a, b) for a, b in zip(dense.outputs, plain, strict=True)), "the adapters have no effect"
    assert_same_function(run(model, adapted.inputs), dense.outputs, dense.noise)


def test_l3_l4_l5_l7_fold_is_the_same_function_the_base_graph_and_undone_bit_for_bit(adapted):
    model = copy.deepcopy(adapted.model)
    state, before = reference.bits(model), run(model, adapted.inputs)
    noise = adapted.dense(adapted.base.training).noise

    lora_fx.fold(model)
    assert_same_function(run(model, adapted.inputs), before, noise)
    assert reference.classes(model) == reference.classes(adapted.base)
    assert list(model.state_dict()) == list(adapted.base.state_dict())
    # Where a router chooses experts, other numbers take another path: then it is the base's path for these numbers.
    program = adapted.program
    if adapted.case.family == "moe" or adapted.case.name == "native-experts":
        base = copy.deepcopy(adapted.base)
        base.load_state_dict(model.state_dict())
        program = lora_fx.capture(base, adapted.inputs)
    assert reference.graph_lines(lora_fx.capture(model, adapted.inputs).graph) == reference.graph_lines(program.graph)

    once = reference.bits(model)
    assert reference.same_bits(reference.bits(lora_fx.fold(model)), once)

    lora_fx.unfold(model)
    assert reference.same_bits(reference.bits(model), state)
    assert all(torch.equal(a, b) for a, b in zip(run(model, adapted.inputs), before, strict=True))


def gradients(model: torch.nn.Module, inputs) -> dict[str, bool]:
    """name → whether a gradient reaches it, for a random cotangent on every output."""
    generator = torch.Generator().manual_seed(0)
    outputs = [t for t in output_tensors(inputs.call(model)) if t.requires_grad]
    sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs).backward()
    return {name: p.grad is not None and bool((p.grad != 0).any()) for name, p in model.named_parameters()}


def test_l6_exactly_the_adapters_get_gradients_and_each_one_does(adapted):
    base, model = copy.deepcopy(adapted.base).requires_grad_(True), copy.deepcopy(adapted.model)
    reached = gradients(
        base, adapted.inputs
    )  # some models compute positions without gradients: no adapter changes that
    unreachable = {f"{name}_lora_default.{tensor}" for name, does in reached.items() if not does for tensor in THETA}
    with_gradient = {name for name, does in gradients(model, adapted.inputs).items() if does}
    adapters = {name for name, p in model.named_parameters() if p.requires_grad}
    assert adapters == {
        f"{p.path}.{p.child}.{tensor}".lstrip(".") for p in _registered(model) for tensor in p.adapter._parameters
    }
    assert with_gradient == adapters - unreachable


def _registered(model):
    return [place for place in inventory(model).places if place.child in place.owner._modules]


@FEW
def test_l8_the_order_of_disjoint_rules_does_not_matter(adapted):
    names = [row.weight.name for row in lora_fx.plan(adapted.base, reference.EVERYTHING, adapted.inputs).rows]
    even = Rule(when=lambda site: site.weight.name in names[::2], rank=2, alpha=5)
    odd = Rule(when=lambda site: site.weight.name in names[1::2], rank=1)
    outputs = []
    for rules in ([even, odd], [odd, even]):
        model = lora_fx.apply(copy.deepcopy(adapted.base), rules, adapted.inputs, check=False)
        reference.fill(model)
        outputs.append(run(model, adapted.inputs))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


@FEW
def test_l9_untouched_weights_are_bitwise_untouched(adapted):
    base = adapted.base
    sites = lora_fx.plan(base, reference.EVERYTHING, adapted.inputs).sites
    chosen = sites[len(sites) // 2]
    model = copy.deepcopy(base)
    rule = Rule(when=lambda site: site.weight.name == chosen.weight.name, rank=1)
    lora_fx.apply(model, rule, adapted.inputs)
    reference.fill(model)
    lora_fx.fold(model, final=True)
    names = set(chosen.weight.names)
    after, before = reference.bits(model), reference.bits(base)
    assert {name for name in after if not torch.equal(after[name], before[name])} == names
    assert reference.classes(model) == reference.classes(base)


@pytest.mark.parametrize("adapted", [(case, "lora") for case in ZOO], ids=label, indirect=True)
def test_the_slack_is_far_below_what_a_lost_branch_makes(adapted):
    """The bound would not hide a missing site: dropping any single branch is an error many times the bound."""
    weights, dense = adapted.weights, adapted.dense(adapted.base.training)
    smallest = min(
        max(
            float((x - y).double().norm() / y.double().norm()) / max(n, torch.finfo(y.dtype).eps / 2)
            for x, y, n in zip(_without(adapted, weights, names), dense.outputs, dense.noise, strict=True)
        )
        for names in _storages(adapted.base, weights)
    )
    assert smallest > 10 * SLACK


def _storages(base, weights) -> list[tuple[str, ...]]:
    by_storage: dict[int, list[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        if name in weights:
            by_storage.setdefault(parameter.data_ptr(), []).append(name)
    return [tuple(names) for names in by_storage.values()][:4]


def _without(adapted, weights, names):
    return reference.run_dense(adapted.base, {n: w for n, w in weights.items() if n not in names}, adapted.inputs)


def test_every_name_of_a_tied_weight_is_adapted():
    owners = {place.path for place in inventory(lora_fx.apply(*_gpt2(), check=False)).places}
    assert {"transformer.wte", "lm_head"} <= owners


def _gpt2():
    from tests.zoo import case

    model, inputs = case("gpt2").build()
    return model, reference.EVERYTHING, inputs
