"""What PEFT's format cannot say: refused for PEFT, by reason and remedy, and held by our own format."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import run
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.export.adapters.folder import CONFIG
from lora_fx.graph.capture import normalize_inputs
from tests.adapters import (
    IDS,
    TWO,
    Attention,
    Experts,
    Linears,
    Odd,
    Outside,
    OwnConvs,
    OwnForwards,
    RawParameters,
    Tied,
    adapted,
    assert_same,
    assert_untouched,
    fresh,
    gpt2,
    inner,
    numbers,
    refused,
    whole,
)
from tests.dora import Layers, move

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's

DORA = dict(kind="dora", **TWO)
X, WIDE, CONV = numbers(2, 4, 6), numbers(2, 4, 12), numbers(2, 6, 4)
UNSAID = {
    "groups": (Odd, X, [Rule(where="grouped", **TWO)], "one group", "grouped"),
    "a dilation": (Odd, X, [Rule(where="dilated", **TWO)], "no dilation", "dilated"),
    "a transposed convolution": (Odd, X, [Rule(where="up", **TWO)], "ConvTranspose1d", "up"),
    "a recurrent weight": (Odd, X, [Rule(where="lstm.weight_ih_l0", **TWO)], "LSTM", "lstm"),
    "read": (Odd, X, [Rule(where="read", **TWO)], "a module inside it", "read"),
    "a module of two names": (Odd, X, [Rule(where="named", **TWO)], "named = again", "named"),
    "a parameter of the model": (Odd, X, [Rule(where="top", **TWO)], "the model itself", "top"),
    "in a ParameterDict": (Odd, X, [Rule(where="heads.w", **TWO)], "the w of ParameterDict", "heads.w"),
    "a forward of its own": (
        OwnConvs, CONV, [Rule(where="padded", **TWO)], "Padded has a forward of its own", "padded"),
    "a _conv_forward of its own": (
        OwnConvs, CONV, [Rule(where="cast", **TWO)], "Cast has a _conv_forward of its own", "cast"),
    "a hook": (OwnConvs, CONV, [Rule(where="hooked", **TWO)], "it has the hook OwnConvs", "hooked"),
    "attention with a forward of its own": (
        OwnConvs, CONV, [Rule(where="looking.in_proj*", **TWO)], "Looking has a forward of its own", "looking"),
    "its way out": (
        OwnConvs, CONV, [Rule(where="looking.out_proj", **TWO)], "Looking has a forward of its own", "looking"),
    "scales": (
        gpt2, {"input_ids": IDS}, [Rule(role="*.query", rank=1, alpha=3), Rule(role="*.value", rank=2)],
        "no power of two", "transformer.h.0.attn.c_attn.weight"),
    "dropouts": (
        Linears, numbers(4, 6), [Rule(where="lin", rank=2, dropout=0.5), Rule(where="*", rank=2)], "0, 0.5", "lin"),
    "a dropped parameter": (Experts, numbers(4, 7), [Rule(where="*", rank=2, dropout=0.5)], "dropout=0.5", "raw.w"),
    "a fused encoder": (
        inner(lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), numbers(2, 3, 6),
        [Rule(where="*linear1", rank=2)], "TransformerEncoderLayer", "0.linear1.weight"),
    "turned attention": (
        lambda: nn.ModuleDict({"a": Attention(), "c": Conv1D(4, 5)}), None,
        [Rule(where="c | a.attention.in_proj*", rank=2)], "fan_in_fan_out", "c"),
    "dora of attention in": (
        Attention, WIDE, [Rule(where="*in_proj*", **DORA)],
        "PEFT has no DoRA for attention, which it adapts as attention", "in_proj_weight"),
    "dora of attention out": (Attention, WIDE, [Rule(where="*out_proj*", **DORA)], "as attention", "out_proj"),
    "dora of a raw parameter": (
        inner(RawParameters), numbers(4, 7), [Rule(where="*w", **DORA)], "as parameter", "0.w"),
    "dora of experts": (
        inner(RawParameters), numbers(4, 7), [Rule(where="*experts", **DORA)], "as parameter", "0.experts"),
    "dora that is read outside": (
        inner(Outside), numbers(3, 6), [Rule(where="*read", **DORA)], "reads the weight", "0.read.weight"),
    "dora that is read at the top": (
        Outside, numbers(3, 6), [Rule(where="read", **DORA)],
        "the model reads the weight of a module inside it, and PEFT adapts only calls of that module", "read.weight"),
    "dora of queries": (
        gpt2, {"input_ids": IDS}, [Rule(role="attention.query", **DORA)],
        "it is a part of the weight, and PEFT's DoRA trains all sizes of it", "c_attn.weight"),
    "dora of a tied table": (Tied, IDS, [Rule(where="table", **DORA)], "the model reads it as", "table.weight"),
    "two kinds": (
        Layers, IDS, [Rule(where="plain", **DORA), Rule(where="mix", rank=2)],
        "kinds dora, lora, and PEFT keeps one", "plain.weight"),
    "full": (
        Layers, IDS, [Rule(where="plain", kind="full")],
        "the kind 'full' is none of a LoRA file of PEFT's", "plain.weight"),
    "biases": (Layers, IDS, [Rule(where="plain | conv*1", kind="bias")], "'bias' is none of", "plain.bias"),
}  # fmt: skip


@pytest.mark.parametrize("make, x, rules, reason, place", UNSAID.values(), ids=UNSAID)
def test_what_peft_cannot_say_goes_into_our_own_format(
    make: Any, x: Any, rules: Any, reason: str, place: str, tmp_path: Path
) -> None:
    ours = move(lora_fx.apply(fresh(make), rules, x))
    before = whole(ours)
    why = "PEFT adds the branch outside" if make is OwnConvs else ""
    refused(lambda: save_adapter(ours, tmp_path / "a"), reason, place, why, remedy="peft=False")
    assert not list(tmp_path.iterdir())
    assert_untouched(ours, before)
    save_adapter(ours, tmp_path / "a", peft=False)
    again = load_adapter(fresh(make), tmp_path / "a", x)
    assert_same(ours, again)
    if x is not None:
        mine, theirs, base = (run(model, normalize_inputs(model, x)) for model in (ours, again, fresh(make)))
        assert all(map(torch.equal, mine, theirs)) and not any(map(torch.equal, mine, base))
    with pytest.raises(KeyError, match="LORA_FX"):
        peft.PeftModel.from_pretrained(fresh(make), tmp_path / "a")


@pytest.mark.parametrize(
    "make, x, target, reason",
    [
        (OwnForwards, IDS, "warm", "Warm has a forward of its own"),
        (OwnForwards, IDS, "table", "Next has a forward of its own"),
        (OwnForwards, IDS, "hooked", "it has the hook doubled"),
        (OwnForwards, IDS, "replaced", "its forward is replaced on the instance"),
        (OwnConvs, numbers(2, 6, 4), "padded", "Padded has a forward of its own"),
        (OwnConvs, numbers(2, 6, 4), "looking", "Looking has a forward of its own"),
    ],
)
def test_what_peft_adds_outside_of_a_forward_is_not_read(
    make: Any, x: Any, target: str, reason: str, tmp_path: Path
) -> None:
    peft.get_peft_model(fresh(make), peft.LoraConfig(r=2, target_modules=[target])).save_pretrained(tmp_path)
    model = fresh(make)
    before = whole(model)
    refused(lambda: load_adapter(model, tmp_path, x), reason, "target_modules", "PEFT adds the branch outside")
    assert_untouched(model, before)


def test_accelerates_hooks_change_nothing_that_peft_adds_to(tmp_path: Path) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    def make() -> nn.Module:
        model = Linears()
        hooks.add_hook_to_module(model.lin, hooks.SequentialHook(hooks.AlignDevicesHook(execution_device="cpu")))
        return model

    ours = adapted(make, [Rule(where="lin", **TWO)], numbers(4, 6))
    save_adapter(ours, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == "lin"
    assert lora_fx.verify(ours, peft.PeftModel.from_pretrained(fresh(make), tmp_path).eval(), numbers(4, 6))


def test_a_weight_that_is_computed_takes_no_file_of_pefts(tmp_path: Path) -> None:
    peft.get_peft_model(fresh(Linears), peft.LoraConfig(r=2, target_modules=["head"])).save_pretrained(tmp_path)
    model = fresh(Linears)
    nn.utils.parametrizations.weight_norm(model.head)
    refused(lambda: load_adapter(model, tmp_path, numbers(4, 6)), "something computes it", "head.weight")


def test_peft_would_renormalise_the_factors_of_a_table(tmp_path: Path) -> None:
    ours = adapted(lambda: nn.Sequential(nn.Embedding(17, 5)), [Rule(where="*", rank=2)], None)
    ours[0].max_norm = 1.0
    refused(lambda: save_adapter(ours, tmp_path / "a"), "max_norm", "0.weight", remedy="peft=False")
