"""What PEFT's format cannot say: refused for PEFT, by reason and remedy, and held by our own format."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import Rule
from lora_fx.export.adapters.files import load_adapter, save_adapter
from lora_fx.export.adapters.folder import CONFIG
from tests.adapters import (
    IDS,
    TWO,
    Attention,
    Experts,
    Linears,
    Odd,
    OwnConvs,
    OwnForwards,
    adapted,
    assert_same,
    assert_untouched,
    fresh,
    gpt2,
    numbers,
    refused,
    state,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's

ODD = {
    "grouped": "one group", "dilated": "no dilation", "up": "ConvTranspose1d", "lstm.weight_ih_l0": "LSTM",
    "read": "a module inside it", "named": "named = again", "top": "the model itself",
    "heads.w": "the w of ParameterDict",
}  # fmt: skip


@pytest.mark.parametrize("where, reason", ODD.items())
def test_what_peft_cannot_say(where: str, reason: str, tmp_path: Path) -> None:
    x = numbers(2, 4, 6)
    ours = adapted(Odd, [Rule(where=where, rank=2, alpha=3)], x)
    refused(lambda: save_adapter(ours, tmp_path / "a"), reason, remedy="peft=False")
    assert not list(tmp_path.iterdir())
    save_adapter(ours, tmp_path / "a", peft=False)
    assert_same(ours, load_adapter(fresh(Odd), tmp_path / "a", x))
    with pytest.raises(KeyError, match="LORA_FX"):
        peft.PeftModel.from_pretrained(fresh(Odd), tmp_path / "a")


OUTSIDE = {
    "padded": "Padded has a forward of its own", "cast": "Cast has a _conv_forward of its own",
    "hooked": "it has the hook OwnConvs", "looking.in_proj*": "Looking has a forward of its own",
    "looking.out_proj": "Looking has a forward of its own",
}  # fmt: skip


@pytest.mark.parametrize("where, reason", OUTSIDE.items())
def test_what_peft_would_add_outside_of_a_forward(where: str, reason: str, tmp_path: Path) -> None:
    x = numbers(2, 6, 4)
    ours = adapted(OwnConvs, [Rule(where=where, rank=2, alpha=3)], x)
    refused(lambda: save_adapter(ours, tmp_path / "a"), reason, why="PEFT adds the branch outside", remedy="peft=False")
    save_adapter(ours, tmp_path / "a", peft=False)
    assert_same(ours, load_adapter(fresh(OwnConvs), tmp_path / "a", x))


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
    before = state(model)
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


MIXED = {
    "scales": (gpt2, {"input_ids": IDS}, [Rule(role="*.query", rank=1, alpha=3), Rule(role="*.value", rank=2)],
               "transformer.h.0.attn.c_attn.weight", "no power of two"),
    "dropouts": (Linears, numbers(4, 6), [Rule(where="lin", rank=2, dropout=0.5), Rule(where="*", rank=2)],
                 "lin", "0, 0.5"),
    "dropped parameter": (Experts, numbers(4, 7), [Rule(where="*", rank=2, dropout=0.5)], "raw.w", "dropout=0.5"),
    "fused encoder": (lambda: nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)), numbers(2, 3, 6),
                      [Rule(where="*linear1", rank=2)], "0.linear1.weight", "TransformerEncoderLayer"),
    "turned attention": (lambda: nn.ModuleDict({"a": Attention(), "c": Conv1D(4, 5)}), None,
                         [Rule(where="c | a.attention.in_proj*", rank=2)], "c", "fan_in_fan_out"),
}  # fmt: skip


@pytest.mark.parametrize("make, x, rules, place, reason", MIXED.values(), ids=MIXED)
def test_what_peft_cannot_say_together(make: Any, x: Any, rules: Any, place: str, reason: str, tmp_path: Path) -> None:
    ours = adapted(make, rules, x)
    refused(lambda: save_adapter(ours, tmp_path / "a"), reason, place, remedy="peft=False")
    save_adapter(ours, tmp_path / "a", peft=False)
    assert_same(ours, load_adapter(fresh(make), tmp_path / "a", x))


def test_peft_would_renormalise_the_factors_of_a_table(tmp_path: Path) -> None:
    ours = adapted(lambda: nn.Sequential(nn.Embedding(17, 5)), [Rule(where="*", rank=2)], None)
    ours[0].max_norm = 1.0
    refused(lambda: save_adapter(ours, tmp_path / "a"), "max_norm", "0.weight", remedy="peft=False")
