"""GraphModule in, the same GraphModule out, with the branch as nodes of its `.graph`."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.checks.verification import compare, run
from lora_fx.graph.capture import normalize_inputs
from lora_fx.model.inventory import inventory
from tests import reference

RULE = Rule(where="*", rank=2, alpha=3)
X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Leaves(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))


class Attributes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(10, 6)), nn.Parameter(torch.randn(10, 8))
        self.c = nn.Parameter(torch.randn(8, 2, 3))

    def forward(self, x):
        return torch.einsum("bi,iho->bho", torch.matmul(F.linear(x, self.a), self.b), self.c)


class Thrice(nn.Module):
    """One leaf called three times, and a leaf that multiplies with its own child's weight."""

    def __init__(self):
        super().__init__()
        self.again, self.last = nn.Linear(6, 6), Bypass()

    def forward(self, x):
        return self.last(self.again(self.again(self.again(x))))


class Bypass(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 4)

    def forward(self, x):
        return F.linear(x, self.inner.weight)


class KeepBypass(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, Bypass) or super().is_leaf_module(module, name)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = fx.symbolic_trace(Leaves()), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.inner(x))


def thrice() -> fx.GraphModule:
    model = Thrice()
    return fx.GraphModule(model, KeepBypass().trace(model))


def exported(model: nn.Module, x: torch.Tensor) -> fx.GraphModule:
    with warnings.catch_warnings(action="ignore"):  # torch's own, about its treespecs
        return torch.export.export(model, (x,)).module()


def copied(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        return copy.deepcopy(module)


BUILD = {
    "leaves": lambda: fx.symbolic_trace(Leaves()).double(),
    "attributes": lambda: fx.symbolic_trace(Attributes()).double(),
    "called-thrice": lambda: thrice().double(),
    "nested": lambda: Nested().double(),
    "exported": lambda: copied(exported(Leaves().double(), X)),
}


@pytest.fixture(params=BUILD)
def model(request) -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return BUILD[request.param]()


def graph_modules(model: nn.Module) -> list[fx.GraphModule]:
    return [module for module in model.modules() if isinstance(module, fx.GraphModule)]


def names(graph: fx.Graph) -> str:
    return " ".join(node.name if node.op != "output" else "→" for node in graph.nodes)


def texts(model: nn.Module) -> list[list[str]]:
    return [reference.graph_lines(module.graph) for module in graph_modules(model)]


def output(model: nn.Module) -> torch.Tensor:
    return run(model, normalize_inputs(model, X))[0]


def adapted(model: nn.Module) -> nn.Module:
    lora_fx.apply(model, RULE, X)
    reference.fill(model)
    return model


def assert_equal_up_to_rounding(a: torch.Tensor, b: torch.Tensor) -> None:
    report = compare(a, b, b, torch.finfo(b.dtype).eps, b.dtype)
    assert report, str(report)


def test_the_branch_of_an_attribute_is_nodes_behind_its_use():
    gm = adapted(BUILD["attributes"]())
    assert names(gm.graph) == (
        "x a a_lora_default_a a_lora_default_b a_lora_default_multiplier linear linear_1 mul linear_2 add "
        "b b_lora_default_a b_lora_default_b b_lora_default_multiplier matmul linear_3 mul_1 linear_4 add_1 "
        "c c_lora_default_a c_lora_default_b c_lora_default_multiplier "
        "einsum transpose unflatten movedim einsum_1 mul_2 einsum_2 add_2 →"
    )


def test_an_adapted_leaf_is_inlined_with_its_branch():
    gm = BUILD["leaves"]()
    before = len(gm.graph.nodes)
    assert names(gm.graph) == "x up relu down →"
    adapted(gm)
    assert names(gm.graph) == (
        "x up_weight up_weight_lora_default_a up_weight_lora_default_b up_weight_lora_default_multiplier up_bias "
        "linear linear_1 mul linear_2 add relu "
        "down_weight down_weight_lora_default_a down_weight_lora_default_b down_weight_lora_default_multiplier "
        "down_bias "
        "linear_3 linear_4 mul_1 linear_5 add_1 →"
    )
    # Each leaf's node gives way to two parameters and a linear; its branch is A, B, scale, two linears, mul, add.
    assert len(gm.graph.nodes) - before == 2 * (3 - 1) + 2 * 7


def test_each_call_of_a_leaf_has_the_one_adapter():
    gm = adapted(BUILD["called-thrice"]())
    reads = [n.target for n in gm.graph.nodes if n.op == "get_attr"]
    assert reads.count("again.weight_lora_default.A") == 3
    assert reads.count("last.inner.weight_lora_default.B") == 1
    assert not [n for n in gm.graph.nodes if n.op == "call_module"]


def test_apply_returns_the_same_object_and_b_zero_is_bitwise_invisible(model):
    cls, modules, before = type(model), graph_modules(model), output(model)
    assert lora_fx.apply(model, RULE, X) is model
    assert type(model) is cls
    assert all(a is b for a, b in zip(graph_modules(model), modules, strict=True))
    assert torch.equal(output(model), before)


def test_the_rewritten_graph_is_valid_and_recompiles(model):
    adapted(model)
    before = output(model)
    for module in graph_modules(model):
        module.graph.lint()
        module.recompile()
        module.recompile()
    assert torch.equal(output(model), before)


def test_it_is_the_model_with_the_dense_sum(model):
    base = copied(model)
    plain = output(base)
    adapted(model)
    dense = reference.run_dense(base, reference.dense_weights(model), normalize_inputs(base, X))[0]
    assert_equal_up_to_rounding(output(model), dense)
    assert not compare(output(model), plain, plain, torch.finfo(plain.dtype).eps, plain.dtype)


def test_only_the_factors_get_gradients(model):
    adapted(model)
    model(X).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "_lora_" in name
    }


def test_fold_restores_the_graph_node_for_node_and_unfold_the_branches(model):
    before, bits = texts(model), reference.bits(model)
    adapted(model)
    branched, out = texts(model), output(model)
    assert branched != before
    lora_fx.fold(model)
    assert texts(model) == before
    assert model.state_dict().keys() == bits.keys()
    assert_equal_up_to_rounding(output(model), out)
    lora_fx.unfold(model)
    assert texts(model) == branched
    assert torch.equal(output(model), out)
    lora_fx.remove(model, "default")
    assert texts(model) == before
    assert reference.same_bits(reference.bits(model), bits)


def test_deactivated_is_the_original_graph(model):
    before, plain = texts(model), output(model)
    adapted(model)
    out = output(model)
    lora_fx.deactivate(model)
    assert texts(model) == before
    assert torch.equal(output(model), plain)
    lora_fx.activate(model, "default")
    assert torch.equal(output(model), out)


def test_a_second_adapter_adds_its_nodes_to_the_same_graph(model):
    base = copied(model)
    adapted(model)
    lora_fx.apply(model, Rule(where="*", rank=1), X, name="second")
    reference.fill(model)
    dense = reference.run_dense(base, reference.dense_weights(model), normalize_inputs(base, X))[0]
    assert_equal_up_to_rounding(output(model), dense)


def pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize(
    "duplicate", [copied, pickled, lambda m: copied(copied(m))], ids=["deepcopy", "pickle", "twice"]
)
@pytest.mark.parametrize("state", ["adapted", "deactivated", "folded"])
def test_a_copy_in_any_state_goes_on_by_itself(model, state, duplicate, request):
    if duplicate is pickled and "exported" in request.node.name:
        pytest.skip("torch pickles no module that torch.export made")
    plain, bare = output(model), texts(model)
    adapted(model)
    out = output(model)
    if state == "folded":
        lora_fx.fold(model)
    elif state == "deactivated":
        lora_fx.deactivate(model)
    now = output(model)
    twin = duplicate(model)
    assert torch.equal(output(twin), now)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert list(twin.state_dict()) == list(model.state_dict())
    if state == "folded":
        lora_fx.unfold(twin)
    elif state == "deactivated":
        lora_fx.activate(twin, "default")
    assert torch.equal(output(twin), out)
    lora_fx.remove(twin, "default")
    assert torch.equal(output(twin), plain)
    assert texts(twin) == bare
    assert torch.equal(output(model), now)


@pytest.mark.parametrize("with_inputs", [True, False])
def test_torch_exports_own_module_is_refused_and_the_model_it_shares_weights_with_is_untouched(with_inputs):
    # It holds the user's Parameter objects, and cannot change its mode. A deepcopy of it is a model of its own: BUILD.
    model = Leaves().double()
    shared = exported(model, X)
    assert shared.get_parameter("up.weight") is model.up.weight
    bits, flags = reference.bits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(LoraFxError, match=r"torch\.export[\s\S]*copy\.deepcopy"):
        lora_fx.apply(shared, RULE, X if with_inputs else None)
    assert reference.same_bits(reference.bits(model), bits)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_folding_a_copy_of_an_export_leaves_the_original_model_alone():
    model = Leaves().double()
    bits = reference.bits(model)
    lora_fx.fold(adapted(copied(exported(model, X))))
    assert reference.same_bits(reference.bits(model), bits)
    assert all(p.requires_grad for p in model.parameters())


def test_a_leaf_with_a_hook_stays_a_call_so_that_the_hook_runs():
    gm = BUILD["leaves"]()
    base = copied(gm)
    seen = []
    gm.up.register_forward_hook(lambda module, args, out: seen.append(module))
    adapted(gm)
    assert [n.target for n in gm.graph.nodes if n.op == "call_module"] == ["up"]
    out = output(gm)
    seen.clear()
    gm(X)
    assert seen == [gm.up]
    dense = reference.run_dense(base, reference.dense_weights(gm), normalize_inputs(base, X))[0]
    assert_equal_up_to_rounding(out, dense)


def test_without_example_inputs_the_branch_acts_too():
    gm = BUILD["leaves"]()
    base = copied(gm)
    lora_fx.apply(gm, RULE)
    reference.fill(gm)
    dense = reference.run_dense(base, reference.dense_weights(gm), normalize_inputs(base, X))[0]
    assert_equal_up_to_rounding(output(gm), dense)


def test_an_adapter_goes_into_a_program_in_our_own_format(tmp_path):
    """PEFT's says what a layer is by its class, and an exported program has none; the remedy is what is done here."""
    x = torch.randn(3, 6, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double().eval()
    program = torch.export.export(model, (x,))
    lora_fx.apply(model, Rule(where="0", rank=2), x)
    with torch.no_grad():
        for adapter in inventory(model).adapters:
            adapter.B.normal_()
    lora_fx.save_adapter(model, tmp_path / "theirs")
    lora_fx.save_adapter(model, tmp_path / "own", peft=False)
    with pytest.raises(LoraFxError, match=r"ExportedProgram is no torch.nn.Module\n.*copy.deepcopy\(program.module"):
        lora_fx.load_adapter(program, tmp_path / "own", x)
    with pytest.raises(LoraFxError, match=r"comes from torch.export\n.*peft=False"):
        lora_fx.load_adapter(copy.deepcopy(program.module()), tmp_path / "theirs", x)
    loaded = lora_fx.load_adapter(copy.deepcopy(program.module()), tmp_path / "own", x)
    assert lora_fx.verify(loaded, model, x) and lora_fx.verify(lora_fx.fold(loaded), model, x)
