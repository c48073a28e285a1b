"""Models whose forwards write to their parameters: what a verb runs is put back, and no such weight is adapted.

In place below `torch.no_grad`, through an alias, by `W.data = …` or another Parameter, by a lookup with max_norm.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import lora_fx
from lora_fx import Rule
from lora_fx.changes import in_turn
from lora_fx.checks.verification import run
from lora_fx.errors import ExportError, LoraFxError, PlanError
from lora_fx.graph.capture import Inputs
from lora_fx.graph.own_state import uncompiled, undisturbed
from lora_fx.graph.places import storage_of
from lora_fx.graph.written import Looking, Writes
from lora_fx.testing.comparing import same_bits

IDS = torch.arange(8).reshape(2, 4)


class Model(nn.Module):
    """A table, a router, and two layers; `first` is called at the head of each forward."""

    def __init__(self, first: Callable[[Any], Any] = lambda model: None, max_norm: float | None = None) -> None:
        super().__init__()
        self.first = first
        self.table = nn.Embedding(8, 6, max_norm=max_norm)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 4)
        self.u = nn.Parameter(torch.randn(10))
        self.mean, self.var = nn.Parameter(torch.zeros(4), False), nn.Parameter(torch.ones(4), False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.first(self)
        return self.down(torch.relu(self.up(self.table(ids)))) / (1 + self.u.norm())


def _data(m: Any) -> None:
    m.up.weight.data = m.up.weight.data * 0.9


def _multiplied(m: Any) -> None:
    with torch.no_grad():
        m.up.weight.mul_(0.9)


def _multiplied_unseen(m: Any) -> None:
    m.up.weight.data[2:4].mul_(0.9)


def _clamped(m: Any) -> None:
    with torch.no_grad():
        torch._foreach_clamp_max_([m.u, m.up.weight], 0.2)


def _cast(m: Any) -> None:
    m.up = m.up.to(torch.bfloat16).to(torch.float32)


def _another(m: Any) -> None:
    m.up.weight = nn.Parameter(m.up.weight * 0.9)


def _iterated(m: Any) -> None:
    """A power iteration, of which `u` is a parameter."""
    with torch.no_grad():
        m.u.copy_(F.normalize(m.up.weight @ F.normalize(m.up.weight.T @ m.u, dim=0), dim=0))


def _averaged(m: Any) -> None:
    """The schema of a batch norm does not say that it writes these."""
    F.batch_norm(torch.arange(12.0).reshape(3, 4), m.mean, m.var, training=True)


def _unfrozen(m: Any) -> None:
    m.mean.requires_grad_(not m.mean.requires_grad)


def _followed(m: Any) -> None:
    """An average of what trains, in train mode alone: of a teacher that is a part of its student."""
    if m.training:
        with torch.no_grad():
            m.mean.lerp_(m.down.bias, 0.1)
            m.u.data = m.u.data * 0.5


def _followed_in_training(m: Any) -> None:
    if torch.is_grad_enabled():
        m.mean.data.lerp_(m.down.bias.detach(), 0.1)


MADE = {
    "max_norm": functools.partial(Model, max_norm=0.5),
    **{
        f.__name__: functools.partial(Model, f)
        for f in (
            _data, _multiplied, _multiplied_unseen, _clamped, _cast, _another, _iterated, _averaged, _unfrozen,
            _followed, _followed_in_training,
        )
    },
}  # fmt: skip
#: of those, the weight that a forward writes to, and what the refusal says of it
WRITTEN = {
    "max_norm": ("table", "max_norm"), "_data": ("up", "weight.data ="), "_multiplied": ("up", "by aten.mul_"),
    "_multiplied_unseen": ("up", "by aten.mul_"), "_clamped": ("up", "by aten._foreach_clamp_max_"),
    "_cast": ("up", "weight.data ="), "_another": ("up", "weight.data ="),
}  # fmt: skip


def _made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MADE[name]()


def _adapted(name: str, where: str = "down") -> nn.Module:
    model = lora_fx.apply(_made(name), Rule(where=f"{where}.weight", rank=2), IDS)
    with torch.no_grad():
        model.get_submodule(where).weight_lora_default.B.normal_()
    return model


def _state(model: nn.Module) -> dict[str, tuple]:
    return {
        name: (p, p.data_ptr(), p.dtype, p.requires_grad, p.detach().clone())
        for name, p in model.named_parameters()
        if "_lora_" not in name
    }


def _unchanged(model: nn.Module, state: dict[str, tuple], trained: bool = True) -> bool:
    """Objects, memory and bits; and which are trained, where nothing has frozen the model."""
    now = _state(model)
    return now.keys() == state.keys() and all(
        p is q and rest[:2] == more[:2] and (rest[2] == more[2] or not trained) and same_bits(rest[3], more[3])
        for (p, *rest), (q, *more) in zip(now.values(), state.values(), strict=True)
    )


@pytest.mark.parametrize("name", MADE)
def test_a_weight_beside_one_that_is_written_to_is_adapted_and_all_is_put_back(name):
    model = _made(name)
    state = _state(model)
    lora_fx.capture(model, IDS)
    assert _unchanged(model, state)
    lora_fx.apply(model, Rule(where="down.weight", rank=2), IDS)
    assert _unchanged(model, state, trained=False)

    adapted = _adapted(name)
    dense, adapter, state = _made(name), adapted.down.weight_lora_default, _state(adapted)
    with torch.no_grad():
        dense.down.weight += adapter.scale * adapter.B @ adapter.A
    assert lora_fx.verify(dense, adapted, IDS)
    assert lora_fx.certify(adapted, IDS)
    assert lora_fx.verify(dense, lora_fx.fold(adapted, copy=True), IDS)
    assert _unchanged(adapted, state)
    assert not lora_fx.verify(_made(name), adapted, IDS)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_weight_that_is_written_to_is_refused_and_the_model_is_what_it_was(name):
    model, (where, what) = _made(name), WRITTEN[name]
    state = _state(model)
    with pytest.raises(PlanError, match=r"the model itself while it runs|is written to by each lookup") as caught:
        lora_fx.apply(model, Rule(where=f"{where}.weight", rank=2), IDS)
    assert what in caught.value.reason and caught.value.place == f"{where}.weight"
    assert "leave it out" in caught.value.remedy
    assert _unchanged(model, state)
    plan = lora_fx.plan(model, Rule(where="*.weight", rank=2, otherwise="skip"), IDS)
    assert f"{where}.weight" not in [row.name for row in plan.rows] and len(plan.rows) == 2
    with pytest.raises(LoraFxError):  # below fake tensors torch itself refuses to set data
        lora_fx.plan(model.to("meta"), Rule(where=f"{where}.weight", rank=2), IDS)


def test_a_table_with_max_norm_is_refused_without_inputs_too():
    with pytest.raises(PlanError, match="scales its rows down to max_norm"):
        lora_fx.apply(_made("max_norm"), Rule(where="table.weight", rank=2))


@pytest.mark.parametrize("write", [_data, _multiplied, _clamped])
def test_a_weight_that_is_written_to_in_train_mode_alone_is_refused(write):
    torch.manual_seed(0)
    model = Model(lambda m: None)
    model.register_forward_hook(lambda m, *_: write(m) if m.training else None)  # no output of this run shows it
    state = _state(model)
    with pytest.raises(PlanError, match="in train mode the model itself writes to the weight"):
        lora_fx.apply(model, Rule(where="up.weight", rank=2), IDS)
    assert _unchanged(model, state)


def test_what_is_replaced_by_the_same_numbers_is_adapted():
    def flattened(m: Any) -> None:
        m.up.weight.data = m.up.weight.data.clone()

    torch.manual_seed(0)
    model = Model(flattened)
    state = _state(model)
    lora_fx.plan(model, Rule(where="up.weight", rank=2), IDS)
    assert _unchanged(model, state)


def test_tied_and_offset_views_of_one_storage_are_put_back():
    model = _made("_multiplied")
    both = torch.randn(20, 6)
    model.up.weight, model.again = nn.Parameter(both[:10]), nn.Parameter(both[10:])
    state = _state(model)
    run(model, Inputs((IDS,), {}))
    assert _unchanged(model, state)


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an op makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in own:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("writes", [False, True])
def test_a_parameter_is_copied_where_an_op_writes_to_it_alone(writes):
    layer = nn.Linear(4096, 4096, bias=False, dtype=torch.bfloat16)
    if writes:
        layer.register_forward_pre_hook(lambda m, _: m.weight.data.neg_())
    state, x = _state(layer), torch.ones(1, 4096, dtype=torch.bfloat16)
    with _Largest() as largest:
        run(layer, Inputs((x,), {}))
    assert largest.bytes == (2 * 4096**2 if writes else 2 * 4096)
    assert _unchanged(layer, state)


class Reads(Model):
    """A frozen layer, and a cut in the flow of gradients, as many write them."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        self.first(self)
        return self.down(F.linear(self.table(ids), self.up.weight.data).data)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_read_as_data_is_recorded(device):
    graph = lora_fx.capture(Reads().to(device), IDS).graph
    ops = [node.name for node in graph.nodes if node.op == "call_function"]
    assert ops == ["embedding", "detach", "linear", "detach_1", "linear_1"]
    assert all(
        any(used in node.all_input_nodes for node in graph.nodes) for used in graph.nodes if used.name in ops[:4]
    )


def test_a_buffer_whose_data_is_replaced_is_put_back():
    def counted(m: Any) -> None:
        m.seen.data = m.seen.data + 1
        m.cache.data = torch.ones(3)

    torch.manual_seed(0)
    model = Model(counted)
    model.register_buffer("seen", torch.zeros(2))
    model.cache = torch.zeros(2)
    before = [(t, t.data_ptr()) for t in (model.seen, model.cache)]
    lora_fx.capture(model, IDS)
    assert [(model.seen, model.seen.data_ptr()), (model.cache, model.cache.data_ptr())] == before
    assert not model.seen.any() and model.cache.tolist() == [0, 0]


@pytest.mark.parametrize("where", ["up.weight", "a tensor"])
def test_an_export_of_what_sets_data_is_refused(where, tmp_path):
    """torch's exporter ended the process, in `run_decompositions`."""

    def clipped(m: Any) -> None:
        y = torch.ones(2)
        y.data = y.data * 2

    torch.manual_seed(0)
    model = Model(_data if where == "up.weight" else clipped)
    state = _state(model)
    with pytest.raises(ExportError, match=f"gives {where} another tensor by `.data =`"):
        lora_fx.export_onnx(model, IDS, tmp_path / "model.onnx")
    assert _unchanged(model, state) and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["_multiplied", "_multiplied_unseen", "_followed"])
def test_an_export_leaves_parameters_alone(name, tmp_path):
    model = _adapted(name)
    state, plain = _state(model), copy.deepcopy(model)
    lora_fx.export_onnx(model, IDS, tmp_path / "model.onnx")
    assert _unchanged(model, state)
    assert lora_fx.verify(plain, model, IDS)


def _squares(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).square().mean()


@pytest.mark.parametrize("name", MADE)
def test_suggest_fold_and_remove_leave_parameters_alone(name):
    model = _made(name)
    state = _state(model)
    lora_fx.suggest(model, 28, [IDS], _squares, Rule(where="down.weight", rank=1))
    assert _unchanged(model, state)
    model = _adapted(name)
    state = _state(model)
    lora_fx.fold(model)
    lora_fx.certify(model, IDS)
    lora_fx.unfold(model)
    assert _unchanged(model, state)
    lora_fx.remove(model, "default")
    assert _unchanged(model, state)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, Stopped])
@pytest.mark.parametrize("verb", [lora_fx.capture, lora_fx.certify, lambda m, x: lora_fx.verify(m, m, x)])
def test_a_run_that_ends_after_it_has_written_leaves_parameters_alone(verb, error):
    """In the first forward that reaches it, whichever run that is."""

    def stopped(m: Any) -> None:
        _multiplied(m)
        _iterated(m)
        m.down.bias.data = m.down.bias.data + 1
        if armed:
            raise error

    torch.manual_seed(0)
    armed: list[int] = []
    model = lora_fx.apply(Model(stopped), Rule(where="down.weight", rank=2), IDS)
    state = _state(model)
    armed.append(1)
    with pytest.raises(LoraFxError if error is ValueError else error):
        verb(model, IDS)
    assert _unchanged(model, state)


def test_what_is_written_every_other_step_is_put_back():
    """Another verb meets another step."""

    def sometimes(m: Any) -> None:
        if m.step % 2:
            _iterated(m)

    torch.manual_seed(0)
    model = Model(sometimes)
    model.step = 0
    lora_fx.apply(model, Rule(where="down.weight", rank=2), IDS)
    for verb in (lambda m, x: lora_fx.verify(m, m, x), lora_fx.certify):
        model.step = 1
        state = _state(model)
        verb(model, IDS)
        assert _unchanged(model, state)


def test_what_is_compiled_runs_as_python_where_it_is_looked_at_and_compiled_where_it_counts():
    ran: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            ran.append("compiled")
            return graph.forward(*args)

        return run

    torch.manual_seed(0)
    model, double = Model(_iterated), torch.compile(lambda y: 2 * y, backend=backend)
    model.register_forward_hook(lambda m, given, y: (ran.append("looked at or run"), double(y))[1])
    state = _state(model)
    with in_turn():
        run(model, Inputs((IDS,), {}))
        assert ran == ["looked at or run", "looked at or run", "compiled"]
        run(model, Inputs((IDS,), {}))
    assert ran[3:] == ["looked at or run", "compiled"]
    assert _unchanged(model, state)


def test_what_only_looks_lets_each_schedule_run():
    """Of W + δ: below any other dispatch mode there is but `branch`."""
    torch.manual_seed(0)
    layer = lora_fx.apply(nn.Linear(64, 64), Rule(where="*", rank=4, schedule="fused"), torch.ones(2, 64))
    x = torch.randn(3, 64)
    with Looking(Writes(layer)):
        named = layer(x).grad_fn.name()
    assert named == layer(x).grad_fn.name()
    with _Largest():
        assert layer(x).grad_fn.name() != named


def test_what_rwkv_scales_down_is_put_back():
    """In eval mode its forward divides the weights of later layers in place, once."""
    from transformers import RwkvConfig, RwkvModel

    torch.manual_seed(0)
    config = RwkvConfig(hidden_size=32, num_hidden_layers=4, vocab_size=50, intermediate_size=64, rescale_every=2)
    model = RwkvModel(config)
    state = _state(model)
    lora_fx.apply(model, Rule(where="*.key.weight", rank=2), IDS)
    assert _unchanged(model, state, trained=False)


def test_a_look_that_finds_no_memory_is_not_passed_over():
    """The run after it would find some: where dynamo is loaded, the look is a run of its own."""
    assert torch._dynamo  # loads it
    model, short = nn.Linear(4, 4), [True]

    def forward(module: nn.Module, args: Any) -> None:
        if short:
            short.pop()
            raise torch.OutOfMemoryError("no memory, says the test")

    model.register_forward_pre_hook(forward)
    with pytest.raises(torch.OutOfMemoryError, match="says the test"):
        run(model, Inputs((torch.ones(2, 4),), {}))
    assert not short


def test_what_runs_as_python_anyway_is_looked_at_while_it_runs():
    assert torch._dynamo  # loads it
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()

    def look() -> None:
        raise AssertionError("once more, for nothing")

    with torch.no_grad(), uncompiled(), undisturbed(model, look) as writes:
        model.weight.data.mul_(2)
    assert torch.equal(model.weight, before) and writes.written == {storage_of(model.weight)}
