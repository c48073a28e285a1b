"""What a user sets on adapters and parameters: it acts in the forward, and everywhere else, or it is refused.

Held against y = x·(W + Σ δ)ᵀ in float64, with δ out of plain torch (`reference`), on models whose weights are read by
generated forwards, by graphs, and by dispatch.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from typing import Any

import pytest
import torch
from torch import fx, nn

import lora_fx
from lora_fx import Adapter, Rule
from lora_fx.checks.verification import compare
from lora_fx.errors import AdapterError
from lora_fx.graph.capture import normalize_inputs, output_tensors
from lora_fx.model.inventory import inventory
from tests import reference

X = torch.randn(2, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """A linear, a convolution, a table and a fused weight; the attention dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.lin, self.conv, self.table = nn.Linear(6, 9), nn.Conv1d(9, 8, 3, padding=1), nn.Embedding(7, 8)
        self.attention, self.raw = nn.MultiheadAttention(8, 2, batch_first=True), nn.Parameter(torch.randn(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv(self.lin(x).tanh().transpose(1, 2)).transpose(1, 2)
        h = h + self.table(torch.arange(4))
        return self.attention(h, h, h, need_weights=False)[0].tanh() @ self.raw


def graph() -> nn.Module:
    return fx.symbolic_trace(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)))


#: name → (the model, the kind and schedule of its adapters)
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "mixed": (Mixed, {}),
    "branch": (Mixed, {"schedule": "branch"}),
    "graph": (graph, {}),
    "fused-graph": (graph, {"schedule": "fused"}),
    "dora": (graph, {"kind": "dora"}),
    "rslora": (Mixed, {"scaling": "rslora"}),
}


def adapters(model: nn.Module) -> list[Adapter]:
    return reference.distinct_adapters(model)


def adapted(case: str, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """The base, and its copy with random θ."""
    build, own = CASES[case]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        base = build().double()
        model = lora_fx.apply(copy.deepcopy(base), Rule(where="*", rank=2, **{**own, **settings}), X)
    reference.fill(model)
    return base, model


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return output_tensors(normalize_inputs(model, X).call(model))[0].clone()


def assert_dense(model: nn.Module, base: nn.Module, out: torch.Tensor | None = None) -> None:
    """The model is the base with W + δ, with δ from what the adapters say now."""
    dense = reference.run_dense(base, reference.dense_weights(model), normalize_inputs(base, X))[0]
    report = compare(output(model) if out is None else out, dense, dense, torch.finfo(dense.dtype).eps, dense.dtype)
    assert report, str(report)


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


# ── scale ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("twin", [lambda m: m, copied, pickled], ids=["itself", "copied", "pickled"])
@pytest.mark.parametrize("case", CASES)
def test_a_scale_that_is_set_acts_at_once_and_everywhere(case, twin, tmp_path):
    base, model = adapted(case)
    model = twin(model)
    before = output(model)
    for k, adapter in enumerate(adapters(model)):
        adapter.alpha *= 0.25 * (k + 1)
    now = output(model)
    assert not torch.equal(now, before)
    assert_dense(model, base)
    if twin is copied:
        return
    assert lora_fx.certify(model, X)
    lora_fx.save_adapter(model, tmp_path / "adapter", peft=False)
    other = lora_fx.load_adapter(copy.deepcopy(base), tmp_path / "adapter", X)
    assert [a.scale for a in adapters(other)] == [a.scale for a in adapters(model)]
    assert torch.equal(output(other), now)
    folded = output(lora_fx.fold(copy.deepcopy(model)))
    assert_dense(model, base, folded)


def test_scale_and_alpha_are_two_words_for_one_number():
    for case, divisor in (("graph", 2), ("rslora", 2**0.5)):
        adapter = adapters(adapted(case)[1])[0]
        adapter.scale = 3
        assert (adapter.alpha, adapter.scale) == (3 * divisor, 3 * divisor / divisor)
        assert adapter.settings["alpha"] == adapter.alpha and f"scale={adapter.scale:g}" in repr(adapter)


def test_a_compiled_model_follows_a_scale():
    base, model = adapted("fused-graph")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_dense(model, base, compiled(X).detach())
    for scale in (0.5, 3.0, 1.0):
        for adapter in adapters(model):
            adapter.scale = scale
        assert_dense(model, base, compiled(X).detach())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), True, "2", None, torch.tensor(2.0)], ids=repr)
@pytest.mark.parametrize("name", ["alpha", "scale"])
def test_what_is_no_finite_number_is_no_scale(name, value):
    adapter = adapters(adapted("graph")[1])[0]
    with pytest.raises(AdapterError, match=f"{name} of adapter 'default'.*is no finite number"):
        setattr(adapter, name, value)
    assert (adapter.alpha, adapter.scale) == (2, 1)


def test_a_kind_without_a_scale_says_so():
    model = lora_fx.apply(nn.Sequential(nn.Linear(6, 4)).double(), Rule(where="*", kind="full"), X)
    with pytest.raises(AdapterError, match="scale of adapter 'default': the kind 'full' has none"):
        adapters(model)[0].scale = 2


# ── dropout ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("case", ["branch", "graph", "mixed"])
def test_the_probability_of_a_dropout_is_read_when_the_forward_runs(case):
    build, own = CASES[case]
    model = build().double().eval()
    lora_fx.apply(model, Rule(form="linear | conv", rank=2, dropout=0.5, **own), X)
    reference.fill(model)
    plain = output(model)
    model.train()
    assert not torch.equal(output(model), plain)
    for p, drops in ((0.0, False), (0.25, True), (0.0, False)):
        for adapter in adapters(model):
            adapter.dropout.p = p
        torch.manual_seed(0)
        assert torch.equal(output(model), plain) is not drops


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_probability_that_was_set_is_saved(kind, tmp_path):
    model = lora_fx.apply(nn.Sequential(nn.Linear(6, 4)), Rule(where="*", kind=kind, rank=2, dropout=0.5), X.float())
    adapters(model)[0].dropout.p = 0.125
    for peft in (True, False):
        lora_fx.save_adapter(model, tmp_path / str(peft), peft=peft)
        other = lora_fx.load_adapter(nn.Sequential(nn.Linear(6, 4)), tmp_path / str(peft), X.float())
        assert adapters(other)[0].dropout.p == adapters(other)[0].settings["dropout"] == 0.125
    assert json.loads((tmp_path / "True" / "adapter_config.json").read_text())["lora_dropout"] == 0.125


def test_a_probability_that_no_file_can_say_is_refused(tmp_path):
    model = lora_fx.apply(nn.Sequential(nn.Linear(6, 4)), Rule(where="*", rank=2, dropout=0.5), X.float())
    adapters(model)[0].dropout.p = 1.0
    for peft in (True, False):
        with pytest.raises(lora_fx.LoraFxError, match=r"0\.weight: its dropout has p=1\.0, which is no probability"):
            lora_fx.save_adapter(model, tmp_path / "adapter", peft=peft)


@pytest.mark.parametrize("case", CASES)
def test_where_the_rule_had_no_dropout_none_can_be_set(case):
    model = adapted(case)[1].train()
    before = output(model)
    for adapter in adapters(model):
        adapter.dropout.p = 0.0
        with pytest.raises(AdapterError, match=r"p=0\.1 would not act[\s\S]*give the rule a dropout above 0"):
            adapter.dropout.p = 0.1
    assert torch.equal(output(model), before)
    assert not any(isinstance(module, nn.Dropout) for adapter in adapters(model) for module in adapter.modules())


# ── what is fixed ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("active", False, r"lora_fx\.activate.*lora_fx\.deactivate"),
        ("rank", 4, "apply again"),
        ("rows", (0, 1), "apply again"),
        ("kind", "dora", "apply again"),
        ("role", "mlp.up", "apply again"),
        ("scaling", "rslora", "apply again"),
        ("schedule", "branch", "apply again"),
        ("settings", {}, "apply again"),
        ("name", "other", "lora_fx.rename"),
        ("dropout", nn.Identity(), r"set dropout\.p"),
        ("realised", "dispatch", "no use of the weight is left out"),
        ("read_outside", "", "finds it in the model"),
        ("layout", None, "how the model reads the weight"),
    ],
)
def test_what_is_fixed_names_what_to_do(name, value, remedy):
    model = adapted("mixed")[1]
    before, adapter = output(model), adapters(model)[0]
    was = getattr(adapter, name)
    with pytest.raises(AdapterError, match=rf"{name} of adapter 'default'[\s\S]*→.*{remedy}"):
        setattr(adapter, name, value)
    assert getattr(adapter, name) == was and torch.equal(output(model), before)


def test_the_settings_cannot_be_written_into():
    adapter = adapters(adapted("graph")[1])[0]
    with pytest.raises(TypeError, match="does not support item assignment"):
        adapter.settings["alpha"] = 5


# ── what trains ──────────────────────────────────────────────────────────────────────────────────────────────────────


def tower() -> nn.Module:
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.LayerNorm(9), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3)).double()


FIRST, SECOND = Rule(where="0.weight", rank=2, alpha=3), Rule(where="2.weight | 0.weight", rank=1)


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def chosen() -> nn.Module:
    """An adapter with a frozen A, beside a head and a norm that train."""
    model = lora_fx.apply(tower(), FIRST, X)
    reference.fill(model)
    model[0].weight_lora_default.A.requires_grad_(False)
    for part in (model[1], model[4]):
        part.requires_grad_(True)
    return model


BESIDE = {"1.weight", "1.bias", "4.weight", "4.bias"}
MINE = BESIDE | {"0.weight_lora_default.B"}
OTHERS = {f"{k}.weight_lora_other.{factor}" for k in (0, 2) for factor in "AB"}


def test_the_first_adapter_freezes_the_model_once():
    model = tower()
    model[4].requires_grad_(False)
    lora_fx.apply(model, FIRST, X)
    assert trains(model) == {"0.weight_lora_default.A", "0.weight_lora_default.B"}
    lora_fx.remove(model, "default")
    assert trains(model) == set()


def test_what_the_user_says_of_requires_grad_stays():
    model = chosen()
    assert trains(model) == MINE
    lora_fx.apply(model, SECOND, X, name="other")
    assert trains(model) == MINE | OTHERS
    both = ("default", "other")
    for names in [("default",), (), ("other",), both, both, (), ("default",), both]:
        lora_fx.activate(model, *names)
        own = (MINE - BESIDE if "default" in names else set()) | (OTHERS if "other" in names else set())
        assert trains(model) == BESIDE | own, names
    lora_fx.deactivate(model)
    lora_fx.activate(model, "default", "other")
    assert trains(model) == MINE | OTHERS
    lora_fx.remove(model, "other")
    assert trains(model) == MINE
    lora_fx.remove(model, "default")
    assert trains(model) == BESIDE


def test_folds_and_switches_keep_what_trains():
    model = lora_fx.apply(chosen(), SECOND, X, name="other")
    lora_fx.fold(model)
    assert trains(model) == BESIDE
    lora_fx.unfold(model)
    assert trains(model) == MINE | OTHERS
    lora_fx.switch(model, "default")
    lora_fx.switch(model, "other")
    lora_fx.unfold(model)
    assert trains(model) == BESIDE | OTHERS
    lora_fx.activate(model, "default")
    assert trains(model) == MINE


@pytest.mark.parametrize("twin", [copied, pickled])
def test_a_copy_of_a_deactivated_model_knows_what_trained(twin):
    model = twin(lora_fx.deactivate(chosen()))
    assert trains(model) == BESIDE
    assert trains(lora_fx.activate(model, "default")) == MINE


def test_a_loaded_adapter_leaves_the_others_alone(tmp_path):
    lora_fx.save_adapter(lora_fx.apply(tower(), SECOND, X, name="other"), tmp_path, name="other")
    assert trains(lora_fx.load_adapter(tower(), tmp_path, X)) == OTHERS
    assert trains(lora_fx.load_adapter(chosen(), tmp_path, X)) == MINE | OTHERS


def test_exactly_what_has_requires_grad_gets_a_gradient():
    model = lora_fx.activate(lora_fx.deactivate(chosen()), "default")
    model(X).square().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == MINE


def test_a_refused_switch_leaves_the_adapters_that_are_folded_as_they_were():
    model = lora_fx.apply(chosen(), SECOND, X, name="other")
    with torch.no_grad():
        model[2].weight_lora_other.A[0, 0] = torch.nan
    lora_fx.switch(model, "default")
    with pytest.raises(lora_fx.LoraFxError, match="NaN"):
        lora_fx.switch(model, "other")
    lora_fx.unfold(model)
    assert [a.active for a in adapters(model)] == [a.name == "default" for a in adapters(model)]
    assert trains(model) == MINE


# ── what was trained beside ──────────────────────────────────────────────────────────────────────────────────────────


def saves(model: nn.Module, path: Any, how: str, **options: Any) -> None:
    if how == "onnx":
        pytest.importorskip("onnxruntime")
        lora_fx.save_onnx_adapter(model, path / "adapter.onnx_adapter", **options)
    else:
        lora_fx.save_adapter(model, path / "adapter", peft=how == "peft", **options)


@pytest.mark.parametrize("how", ["peft", "own", "onnx"])
def test_what_trains_beside_an_adapter_is_not_left_out_in_silence(how, tmp_path):
    model = chosen().float()
    reason = r"^1\.weight: it has requires_grad.*so have 1\.bias, 4\.weight, 4\.bias\n"
    with pytest.raises(lora_fx.LoraFxError, match=rf"{reason}[\s\S]*kind=\"full\".*beside=\"ignore\""):
        saves(model, tmp_path, how, beside="refuse")
    assert not list(tmp_path.iterdir())
    with pytest.raises(lora_fx.LoraFxError, match=r"beside: 'all' is unknown\n.*'refuse', 'ignore'"):
        saves(model, tmp_path, how, beside="all")
    if how != "onnx":
        saves(model, tmp_path / "saved", how)
        again = lora_fx.load_adapter(tower().float(), tmp_path / "saved" / "adapter", X.float())
        assert {place.weight for place in inventory(again).places} == {"0.weight", *BESIDE}
        shutil.rmtree(tmp_path / "saved")
    saves(model, tmp_path, how, beside="ignore")
    (made,) = tmp_path.iterdir()
    model.requires_grad_(False)
    saves(model, tmp_path / "frozen", how) if how != "onnx" else None
    assert made.exists()


def test_the_remedy_of_what_trains_beside_holds(tmp_path):
    model = lora_fx.apply(tower(), [FIRST, Rule(where="4.weight", kind="full")], X)
    lora_fx.apply(model, Rule(where="2.weight | 4.weight", kind="bias"), X, name="biases")
    reference.fill(model)
    other = tower()
    for name in ("default", "biases"):
        lora_fx.save_adapter(model, tmp_path / name, name=name, peft=False)
        lora_fx.load_adapter(other, tmp_path / name, X)
    assert torch.equal(output(other), output(model))


def test_another_adapter_is_nothing_that_trains_beside(tmp_path):
    model = lora_fx.apply(lora_fx.apply(tower(), FIRST, X), SECOND, X, name="other")
    lora_fx.save_adapter(model, tmp_path, name="other")
    assert adapters(lora_fx.load_adapter(tower(), tmp_path, X))[0].name == "other"
