"""Every schedule is the same function of x, A and B, with the same gradients, and is only taken where it may be."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle
import re

import pytest
import torch
from torch import fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx import Rule
from lora_fx.deltas import compiled_schedules, costs, kernels, schedules
from lora_fx.deltas.adapter import Adapter
from lora_fx.deltas.costs import Matmul
from lora_fx.deltas.kernels import Term
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import PlanError, RuleError
from lora_fx.graph.capture import recorded
from tests import reference

IN, OUT, RANK = 5, 7, 2
PARTS = {"whole": [(0, OUT)], "two": [(0, OUT), (0, OUT)], "parts": [(0, 3), (4, 3)], "end": [(5, 2)]}
SHAPES = {"vector": (IN,), "rows": (6, IN), "tokens": (3, 4, IN), "none": (0, IN), "experts": (2, 3, IN)}
TAKES = {
    "linear": {*SHAPES} - {"experts"},
    "matmul": {*SHAPES},
    "mm": {"rows", "none"},
    "addmm": {"rows", "none"},
    "bmm": {"experts"},
    "baddbmm": {"experts"},
}


class Case:
    """One matmul with branches, and inputs for it."""

    def __init__(self, op: str, parts: str, dropped: bool, shape: str, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> torch.Tensor:
            return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)

        self.op, self.parts, self.dropped = op, PARTS[parts], dropped
        self.x = random(*SHAPES[shape]).requires_grad_()
        each = SHAPES[shape][:1] if shape == "experts" else ()
        self.weight = random(OUT, IN) if op == "linear" else random(*each, IN, OUT)
        self.bias = None if op in ("matmul", "mm", "bmm") else random(*each, *([1] if each else []), OUT)
        self.mask = (random(*SHAPES[shape]) > -0.5).to(dtype) / 0.7
        self.factors = []
        for k, (_, features) in enumerate(self.parts):
            self.factors += (
                random(*each, RANK + k, IN).requires_grad_(),
                random(*each, features, RANK + k).requires_grad_(),
            )

    def __call__(self, schedule: str, x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        terms = [
            Term(A, B, 1.5 - k, first, x * self.mask if self.dropped else None)
            for k, (A, B, (first, _)) in enumerate(zip(factors[::2], factors[1::2], self.parts, strict=True))
        ]
        return schedules.matmul(self.op, x, self.weight, self.bias, terms, schedule)

    def magnitudes(self) -> torch.Tensor:
        """The same with every number positive: no part of a sum is larger."""
        other = copy.deepcopy(self)
        for t in (other.weight, *([] if other.bias is None else [other.bias])):
            t.abs_()
        with torch.no_grad():
            return other(schedules.BRANCH, self.x.abs(), *(f.abs() * 2 for f in self.factors))


def assert_same(actual: torch.Tensor, expected: torch.Tensor, magnitudes: torch.Tensor) -> None:
    operations = 2 * (IN + 3 * RANK + 4)  # each rounds by at most eps / 2 of the magnitudes, on either side
    assert bool(((actual - expected).abs() <= operations * torch.finfo(actual.dtype).eps * magnitudes).all())


CASES = [
    (op, parts, dropped, shape)
    for op in kernels.OPS
    for parts in PARTS
    for dropped in (False, True)
    for shape in SHAPES
    if shape in TAKES[op]
]


@pytest.mark.parametrize("schedule", ["in_place", "fused", "dense"])
@pytest.mark.parametrize(("op", "parts", "dropped", "shape"), CASES)
def test_every_schedule_is_the_branch(schedule, op, parts, dropped, shape):
    case = Case(op, parts, dropped, shape)
    expected = case(schedules.BRANCH, case.x, *case.factors)
    assert_same(case(schedule, case.x, *case.factors), expected, case.magnitudes())
    with torch.no_grad():
        assert_same(case(schedule, case.x, *case.factors), expected, case.magnitudes())


@pytest.mark.parametrize("schedule", [schedules.IN_PLACE, schedules.FUSED, schedules.DENSE])
@pytest.mark.parametrize(("op", "parts", "dropped", "shape"), [c for c in CASES if c[3] not in ("none", "vector")])
def test_first_and_second_derivatives_are_those_of_the_function(schedule, op, parts, dropped, shape):
    case = Case(op, parts, dropped, shape)
    inputs = (case.x, *case.factors)
    assert torch.autograd.gradcheck(lambda *args: case(schedule, *args), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *args: case(schedule, *args), inputs, fast_mode=True)


@pytest.mark.parametrize("schedule", [schedules.IN_PLACE, schedules.FUSED, schedules.DENSE])
@pytest.mark.parametrize("frozen", ["x", "A", "B"])
def test_only_what_asks_for_a_gradient_gets_one(schedule, frozen):
    case = Case("linear", "whole", False, "rows")
    inputs = dict(zip(("x", "A", "B"), (case.x, *case.factors), strict=True))
    inputs[frozen].requires_grad_(False)
    case(schedule, *inputs.values()).sum().backward()
    assert {name for name, t in inputs.items() if t.grad is not None} == set(inputs) - {frozen}


@pytest.mark.parametrize("schedule", [schedules.FUSED, schedules.DENSE])
def test_a_second_derivative_reaches_what_a_factor_was_made_of(schedule):
    """A hypernetwork: A is a function of x."""
    case = Case("linear", "whole", False, "rows")

    def run(x, B, how):
        return case(how, x, x[:RANK] ** 2, B)

    for how in (schedules.BRANCH, schedule):
        assert torch.autograd.gradgradcheck(lambda x, B, how=how: run(x, B, how), (case.x, case.factors[1]))


# ── where it is not taken ────────────────────────────────────────────────────────────────────────────────────────────


def scheduled(case: Case, *args: torch.Tensor) -> bool:
    return "_Scheduled" in str(case(schedules.FUSED, *args).grad_fn)


def test_experts_take_it_where_each_has_its_own_tokens():
    case = Case("matmul", "parts", False, "experts")
    shared, repeated = case.x[:1], case.x[:1].expand(2, -1, -1)  # torch.matmul gives the tokens of one to every expert
    assert scheduled(case, repeated, *case.factors) and not scheduled(case, shared, *case.factors)
    found, expected = (case(schedules.FUSED, x, *case.factors) for x in (shared, repeated))
    assert_same(found, expected, case.magnitudes())


def test_it_is_taken_for_ordinary_calls_alone():
    case = Case("linear", "whole", False, "rows", torch.float32)
    inputs = (case.x, *case.factors)
    assert scheduled(case, *inputs)
    with recorded():
        assert not scheduled(case, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert case(schedules.FUSED, *inputs).dtype == torch.bfloat16
    case.bias.requires_grad_()
    assert not scheduled(case, *inputs), "whoever trains the bias gets its gradient"
    case(schedules.FUSED, *inputs).sum().backward()
    assert case.bias.grad is not None
    case.bias.requires_grad_(False)
    case.weight.requires_grad_()
    case(schedules.DENSE, *inputs).sum().backward()
    assert case.weight.grad is not None


@pytest.mark.parametrize("schedule", [schedules.FUSED, schedules.DENSE])
def test_a_backward_inside_of_autocast_is_that_of_its_forward(schedule):
    case = Case("linear", "whole", False, "rows", torch.float32)
    inputs = (case.x, *case.factors)
    expected = torch.autograd.grad(case(schedule, *inputs).sum(), inputs)
    y = case(schedule, *inputs).sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, inputs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("schedule", [schedules.IN_PLACE, schedules.FUSED, schedules.DENSE])
def test_transformed_calls_are_right_too(schedule):
    case = Case("linear", "whole", False, "rows")
    A, B = case.factors
    stacked = torch.stack([A, 2 * A]).detach()
    mapped = torch.func.vmap(lambda a: case(schedule, case.x.detach(), a, B.detach()))(stacked)
    for k in range(2):
        assert_same(mapped[k], case(schedules.BRANCH, case.x, stacked[k], B), case.magnitudes())
    tangent = torch.ones_like(A)
    _, pushed = torch.func.jvp(lambda a: case(schedule, case.x.detach(), a, B.detach()), (A.detach(),), (tangent,))
    assert_same(pushed, 1.5 * case.x @ tangent.T @ B.T, case.magnitudes())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_a_nested_tensor_has_the_branch_of_its_parts(schedule):
    """One of the strided layout, which has neither shape nor strides: torch's encoder makes it of padded batches."""
    parts = [torch.randn(3, IN), torch.randn(5, IN)]
    model = lora_fx.apply(nn.Linear(IN, OUT), Rule(where="*", rank=RANK, schedule=schedule), parts[0])
    reference.fill(model)
    factors = [p for p in model.parameters() if p.requires_grad]

    def found(ys: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return *ys, *torch.autograd.grad(sum(y.sum() for y in ys), factors)

    nested = found(model(torch.nested.nested_tensor(parts)).unbind())
    alone = found([model(x) for x in parts])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.abs_()
    for values in zip(nested, alone, found([model(x.abs()) for x in parts]), strict=True):
        assert_same(*values)


# ── compiled ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def compiled(function, backend: str):
    """What is compiled, and the ops of its graphs once it has run."""
    ops: list[str] = []

    def looked_at(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(function, backend=looked_at, fullgraph=True), ops


@pytest.mark.parametrize(("op", "parts", "dropped", "shape"), [case for case in CASES if case[3] == "rows"])
def test_compiled_it_is_one_op_with_the_same_gradients(monkeypatch, op, parts, dropped, shape):
    monkeypatch.setattr(compiled_schedules, "_LARGE", 0)
    case = Case(op, parts, dropped, shape)
    run, ops = compiled(lambda *args: case(schedules.AUTO, *args), "aot_eager")
    inputs = (case.x, *case.factors)
    expected, found = case(schedules.FUSED, *inputs), run(*inputs)  # whose derivatives are checked above
    assert torch.equal(found, expected)
    assert sum("fused_matmul" in name for name in ops) == 1
    weights = torch.linspace(-1, 2, found.numel(), dtype=found.dtype).view(found.shape)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True):
        assert torch.equal(a, b)


# opcheck looks at .grad of clones it has made, and hides what is said of that from those who see warnings printed only
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("wants", ["x and factors", "factors"])
@pytest.mark.parametrize(("op", "parts", "dropped"), [("linear", "whole", False), ("addmm", "parts", True)])
def test_the_op_keeps_the_rules_of_custom_ops(op, parts, dropped, wants):
    case = Case(op, parts, dropped, "rows")
    x = case.x if wants.startswith("x") else case.x.detach()
    own = [(x * case.mask).detach().requires_grad_(x.requires_grad) for _ in case.parts] if dropped else []
    scales, firsts = [torch.tensor(1.5 - k) for k in range(len(case.parts))], [first for first, _ in case.parts]
    arguments = (op, x, case.weight, case.bias, case.factors[::2], case.factors[1::2], scales, firsts, own)
    torch.library.opcheck(torch.ops.lora_fx.fused_matmul, arguments)


def test_inductor_runs_it(monkeypatch):
    monkeypatch.setattr(compiled_schedules, "_LARGE", 0)
    case = Case("linear", "two", False, "tokens")
    run, ops = compiled(lambda *args: case(schedules.AUTO, *args), "inductor")
    inputs = (case.x, *case.factors)
    expected, found = case(schedules.FUSED, *inputs), run(*inputs)
    assert torch.equal(found, expected) and any("fused_matmul" in name for name in ops)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_what_is_exported_or_transformed_has_no_op_of_ours(monkeypatch):
    monkeypatch.setattr(compiled_schedules, "_LARGE", 0)
    x = torch.randn(4, 6)
    model = lora_fx.apply(nn.Linear(6, 9), Rule(where="*", rank=2), x)
    for strict in False, True:
        nodes = torch.export.export(model, (x,), strict=strict).graph.nodes
        assert not [node for node in nodes if "lora_fx" in str(node.target)]
    case = Case("linear", "whole", False, "rows", torch.float32)
    A, B = (t.detach() for t in case.factors)
    run, ops = compiled(torch.vmap(lambda a: case(schedules.AUTO, case.x.detach(), a, B)), "aot_eager")
    assert_same(run(A[None])[0], case(schedules.BRANCH, case.x.detach(), A, B), case.magnitudes())
    case.bias.requires_grad_()
    run, more = compiled(lambda x: case(schedules.AUTO, x, A, B), "aot_eager")
    run(case.x).sum().backward()
    assert case.bias.grad is not None
    assert not [name for name in (*ops, *more) if "fused_matmul" in name]


def test_a_rewritten_graph_is_pickled_with_its_schedule():
    x = torch.randn(4, 6)
    model = lora_fx.apply(
        fx.symbolic_trace(nn.Sequential(nn.Linear(6, 9))), Rule(rank=2, where="*", schedule="fused"), x
    )
    reference.fill(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), model(x)) and lora_fx.show(again) == lora_fx.show(model)
    assert "schedules_matmul" in lora_fx.show(again)


def test_a_captured_program_shows_the_branch():
    model = lora_fx.apply(nn.Linear(6, 9), Rule(where="*", rank=2, schedule="dense"), torch.randn(4, 6))
    names = [n.name for n in lora_fx.capture(model, torch.randn(4, 6)).capture.graph.nodes]
    assert [n for n in names if n.startswith(("linear", "add"))] == ["linear", "linear_1", "linear_2", "add"]


# ── choosing one ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Model(nn.Module):
    def __init__(self, inputs: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.first, self.conv = nn.Linear(inputs, hidden), nn.Conv1d(hidden, 8, 1)

    def forward(self, x):
        return self.conv(self.first(x).transpose(1, 2))


def test_the_plan_says_which_and_what_it_is_expected_to_take():
    for tokens, taken in (3, "in_place"), (3000, "dense"):
        model, x = Model(128, 128), torch.randn(2, tokens, 128)
        linear, conv = lora_fx.plan(model, Rule(where="*", rank=2), x).rows
        assert (linear.schedule, conv.schedule, conv.expected) == (taken, "branch", None)
        case, n = Matmul(128, 128, 2, 4), 2 * tokens
        assert linear.expected == costs.expected(taken, case, n) / costs.expected("plain", case, n)
    assert f"{linear.expected:.2f} ×" in str(lora_fx.plan(model, Rule(where="first", rank=2), x))
    half = lora_fx.plan(Model(128, 128).bfloat16(), Rule(where="first", rank=2), x.bfloat16()).rows[0]
    assert half.schedule == "fused" and half.expected > linear.expected, "dense loses digits there"
    unseen = lora_fx.plan(Model(), Rule(where="first", rank=2)).rows[0]
    assert (unseen.schedule, unseen.expected) == ("auto", None)
    assert lora_fx.plan(Model(), Rule(where="first", rank=2, schedule="dense")).rows[0].schedule == "dense"


@pytest.mark.parametrize(("tokens", "function", "sums"), [(8, False, 0), (600, True, 0), (5000, True, 2)])
def test_auto_takes_what_the_costs_say(monkeypatch, tokens, function, sums):
    """In place where calls are small, a function of ours where passes cost more than calling it, then the dense sum."""
    made = []
    honest = kernels.weight_sum
    monkeypatch.setattr(kernels, "weight_sum", lambda *args: made.append(1) or honest(*args))
    A, B = torch.randn(2, 512).requires_grad_(), torch.zeros(512, 2).requires_grad_()
    x, weight = torch.randn(tokens, 512, requires_grad=True), torch.randn(512, 512)
    y = schedules.matmul("linear", x, weight, None, ((A, B, 1.5, 0, None),), schedules.AUTO)
    assert ("_Scheduled" in str(y.grad_fn)) == function
    y.sum().backward()
    assert len(made) == sums


def test_the_costs_tell_launches_passes_and_matmuls_apart():
    small, large = (Matmul(w, w, 8, 4) for w in (64, 1024))
    three = schedules.IN_PLACE, schedules.FUSED, schedules.DENSE
    assert costs.cheapest(three, small, 8) == schedules.IN_PLACE, "launches and calls"
    assert costs.cheapest(three, large, 256) == schedules.FUSED, "passes over x and y"
    assert costs.cheapest(three, large, 8192) == schedules.DENSE, "passes over x and y, more than those over W"
    for device in (costs.CPU, costs.H100, costs.GPU):
        for m, tokens in itertools.product((small, large), (8, 8192)):
            plain, *others = (costs.expected(name, m, tokens, device) for name in ("plain", *three, "branch"))
            assert 0 < plain < min(others)
            assert all(
                own < costs.expected(name, m, 2 * tokens, device) for own, name in zip(others, three, strict=False)
            )
    assert costs.device_class(torch.device("meta")) is costs.device_class(torch.device("cpu")) is costs.CPU
    assert costs.device_class(torch.device("xpu")) is costs.GPU


# ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────────────


class Ops(TorchDispatchMode):
    """What is computed, casts too: views are not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and func.name() not in ("aten::_unsafe_view", "aten::detach"):
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dispatched", [False, True], ids=["as a graph", "dispatched"])
@pytest.mark.parametrize("shape", [(512, 256), (4, 128, 256)])
def test_an_adapted_linear_in_bfloat16_has_ten_more_ops_than_the_frozen_one(monkeypatch, shape, dispatched):
    """Forward and backward; factors are in float32 and have a scale. PEFT has 15, and 10 with factors in bfloat16."""
    monkeypatch.setattr(schedules, "_modes", lambda: 0)  # a mode that records would get the plain branch
    base, x = nn.Linear(256, 512).bfloat16().requires_grad_(False), torch.randn(shape).bfloat16().requires_grad_()
    model = lora_fx.apply(copy.deepcopy(base), Rule("*", rank=4, alpha=8), None if dispatched else x, check=False)
    reference.fill(model)
    counts = []
    for module in base, model:
        x.grad = None
        with Ops() as ops:
            module(x).backward(torch.ones(*shape[:-1], 512, dtype=x.dtype))
        counts.append(len(ops.names))
    assert model.weight_lora_default.A.grad.dtype == torch.float32
    assert counts[1] - counts[0] <= 10, ops.names


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
def test_factors_written_to_behind_their_version_counters_act_in_the_next_call(schedule):
    x = torch.randn(6, 8).double() if schedule == schedules.DENSE else torch.randn(6, 8).bfloat16()
    model = lora_fx.apply(nn.Linear(8, 5).to(x.dtype), Rule("*", rank=2, schedule=schedule), x, check=False)
    reference.fill(model)
    adapter, before = model.weight_lora_default, model(x)
    version = adapter.B._version
    adapter.B.data.mul_(-3)
    assert adapter.B._version == version
    fresh = copy.deepcopy(model)
    assert torch.equal(model(x), fresh(x)) and not torch.equal(model(x), before)


@pytest.mark.parametrize(
    ("rule", "dtype", "why"),
    [
        (dict(where="conv", schedule="fused"), torch.float32, "conv has no other form than the parallel branch"),
        (dict(where="conv", schedule="in_place"), torch.float32, "conv has no other form than the parallel branch"),
        (dict(where="first", schedule="dense"), torch.bfloat16, "W + s·B·A would be rounded to torch.bfloat16"),
        (dict(where="first", schedule="dense", dropout=0.1), torch.float32, "dropout=0.1 acts on the branch alone"),
    ],
)
def test_a_schedule_that_a_site_cannot_take_is_refused(rule, dtype, why):
    model = Model().to(dtype)
    before = reference.bits(model)
    with pytest.raises(PlanError, match=re.escape(why)) as caught:
        lora_fx.apply(model, Rule(rank=2, **rule), torch.randn(2, 3, 8).to(dtype))
    assert caught.value.place == f"{rule['where']}.weight" and repr(rule["schedule"]) in caught.value.reason
    assert "leave the schedule out" in caught.value.remedy
    assert reference.same_bits(reference.bits(model), before)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(RuleError, match="schedule='fast' is unknown") as caught:
        Rule(where="*", rank=2, schedule="fast")
    assert "auto, branch, in_place, fused, dense" in caught.value.remedy


# ── what comes after may write into the output ───────────────────────────────────────────────────────────────────────

WRITES = {
    "relu": lambda y: y.relu_(),
    "add": lambda y: y.add_(1.5),
    "mul": lambda y: y.mul_(2.5),
    "silu": lambda y: nn.functional.silu(y, inplace=True),
    "dropout": lambda y: nn.functional.dropout(y, 0.5, inplace=True),
    "elements": lambda y: y.__setitem__((..., slice(0, 3)), 0.25) or y,
    "through a view": lambda y: y.view(-1).mul_(y.detach().view(-1).sign()) is None or y,
}


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize(("op", "parts", "dropped", "shape"), [c for c in CASES if c[1] in ("whole", "parts")])
def test_the_model_may_write_into_what_it_gets(schedule, op, parts, dropped, shape):
    """Outputs and gradients are the bits of a model that writes into a copy."""
    case = Case(op, parts, dropped, shape)
    inputs = (case.x, *case.factors)
    for write in WRITES.values():
        both = []
        for first in (torch.Tensor.clone, lambda y: y):
            torch.manual_seed(0)
            y = write(first(case(schedule, *inputs)))
            both.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
        assert all(map(torch.equal, *both))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 4, 8), (2, 3, 4, 8)])
@pytest.mark.parametrize("shown", [True, False], ids=["as a graph", "dispatched"])
def test_an_activation_in_place_after_a_linear_trains(kind, shape, shown):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)), torch.randn(shape)
    expected = model(x)
    model = lora_fx.apply(model, Rule(where="0", rank=2, kind=kind), x if shown else None)
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        before = model(x)
    before.mul_(model[0].weight_lora_default.B.sum())  # with the gradient that comes after
    model(x).sum().backward()
    assert model[0].weight_lora_default.B.grad is not None


def test_the_compiled_op_gives_what_may_be_written_to():
    case = Case("linear", "whole", False, "tokens")
    A, B = case.factors
    y, *_ = torch.ops.lora_fx.fused_matmul(
        "linear", case.x, case.weight, case.bias, [A], [B], [torch.tensor(1.5)], [0], []
    )
    expected = torch.autograd.grad(y.clone().relu_().sum(), (case.x, A, B), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(y.relu_().sum(), (case.x, A, B)), expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "order"), [((40, 1024, 8), (0, 2, 1)), ((600, 1024, 3), (2, 0, 1)), ((1024,), (0,)), ((3, 1024), (0, 1))]
)
def test_a_fresh_adapter_is_invisible_however_x_lies(shape, order, dtype):
    """torch's linear goes another way where x of several axes does not lie in order, and rounds in other places."""
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype).permute(order)
    model = nn.Linear(1024, 24).to(dtype)
    expected = model(x)
    model = lora_fx.apply(model, Rule(where="*", rank=2), x, check=False)
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("op", ["linear", "matmul"])
@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("tokens", [2, 64, 300])
def test_a_fresh_sum_multiplies_to_the_same_bits_however_w_lies(op, ordered, tokens):
    torch.manual_seed(0)
    shape = (96, 320) if op == "linear" else (320, 96)
    x, A, B, W = torch.randn(tokens, 320), torch.randn(4, 320), torch.zeros(96, 4), torch.randn(shape)
    W = W if ordered else W.t().contiguous().t()
    y = schedules.matmul(op, x, W, None, ((A, B, 2.0, 0, None),), schedules.DENSE)
    assert torch.equal(y, kernels.OPS[op](x, W, None))


class CountingConv(nn.Conv2d):
    """It has state of its own, so no generated forward."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize(("conv", "realisation"), [(nn.Conv2d, "graph"), (CountingConv, "dispatch")])
def test_a_fresh_adapter_is_invisible_to_what_asks_for_strides(conv, realisation):
    """An axis of one element has a stride by which torch's convolutions choose their kernels."""
    torch.manual_seed(0)
    layers = [conv(32, 32, 3, stride=2, padding=1, bias=False), nn.Conv2d(32, 32, 3, padding=1)]
    model = nn.Sequential(*layers).requires_grad_(False)
    x = torch.randn(2, 32, 2, 2).contiguous(memory_format=torch.channels_last)
    first, wanted = layers[0](x), model(x)
    lora_fx.apply(model, Rule("*", rank=2), x)
    assert {a.realised for a in layers[0].modules() if isinstance(a, Adapter)} == {Realisation(realisation)}
    assert layers[0](x).stride() == first.stride()
    assert torch.equal(model(x), wanted)


def test_what_keeps_the_results_of_ops_sees_none_written_to():
    """Selective checkpointing gives a second run what a matmul gave the first."""
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    case = Case("linear", "whole", False, "rows")
    inputs = (case.x, *case.factors)
    keeps = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    for schedule in schedules.SCHEDULES:
        expected = torch.autograd.grad(case(schedules.BRANCH, *inputs).square().sum(), inputs)
        y = checkpoint(lambda *a, how=schedule: case(how, *a), *inputs, use_reentrant=False, context_fn=keeps)
        assert all(map(torch.equal, torch.autograd.grad(y.square().sum(), inputs), expected))
