"""Our own format holds every kind to the bit, and what was tampered with in its header is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lora_fx
from lora_fx import Kind, Rule, load_adapter, register_kind, save_adapter
from lora_fx.deltas.kinds import REQUIRED
from lora_fx.errors import FileError
from lora_fx.export.adapters.folder import TENSORS
from lora_fx.model.inventory import inventory
from tests import reference
from tests.adapters import assert_same, assert_untouched, edit, files, fresh, refused, whole
from tests.dora import (
    IDS,
    RULES,
    TWO,
    Layers,
    move,
    out,
    rewrite,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")  # PEFT's


def test_our_header_and_the_config_must_agree(tmp_path):
    for name, rules, says in (("dora", RULES["plain"], True), ("lora", [Rule(where="plain", rank=2)], False)):
        folder = tmp_path / name
        save_adapter(move(lora_fx.apply(fresh(Layers), rules, IDS, check=False)), folder)
        edit(folder, use_dora=not says)
        refused(lambda f=folder: load_adapter(fresh(Layers), f), f"it says {not says}", "use_dora", remedy="both files")
        edit(folder, use_dora=says)
        assert load_adapter(fresh(Layers), folder, check=False)


@pytest.mark.parametrize("kind", ["lora", "full", "bias"])
def test_another_kind_in_our_header_of_a_file_of_peft(kind, tmp_path):
    save_adapter(move(lora_fx.apply(fresh(Layers), RULES["plain"], IDS, check=False)), tmp_path)
    rewrite(tmp_path, lambda folder: folder.header["adapters"][0].update(kind=kind, settings={}))
    with pytest.raises(FileError, match="needs rank" if kind == "lora" else "does not describe"):
        load_adapter(fresh(Layers), tmp_path)
    rewrite(tmp_path, lambda folder: folder.header["adapters"][0].update(kind="lora", settings={"rank": 2}))
    refused(
        lambda: load_adapter(fresh(Layers), tmp_path),
        "was written with the kind 'lora'",
        "use_dora",
        remedy="both files",
    )


def test_a_file_of_ours_from_before_there_was_dora(tmp_path):
    """Neither its config nor its header says anything of it."""
    save_adapter(move(lora_fx.apply(fresh(Layers), Rule(where="plain", rank=2), IDS, check=False)), tmp_path)
    rewrite(tmp_path, lambda folder: (folder.config.pop("use_dora"), folder.header["config"].pop("use_dora")))
    assert load_adapter(fresh(Layers), tmp_path, check=False)
    edit(tmp_path, use_dora=True)
    refused(lambda: load_adapter(fresh(Layers), tmp_path), "it says True", "use_dora", remedy="both files")


@pytest.mark.parametrize("kind, tensor", [("dora", "magnitude"), ("full", "weight"), ("bias", "shift")])
@pytest.mark.parametrize("as_peft", [True, False])
def test_a_tensor_that_is_not_finite_is_not_saved(kind, tensor, as_peft, tmp_path):
    ours = move(lora_fx.apply(fresh(Layers), {**OWN[kind][0], "where": "plain"}, IDS, check=False))
    (adapter,) = inventory(ours).adapters
    with torch.no_grad():
        adapter.get_parameter(tensor)[3] = math.inf
    refused(
        lambda: save_adapter(ours, tmp_path / "a", peft=as_peft), "NaN or Inf", f", {tensor} of", remedy="checkpoint"
    )
    assert not list(tmp_path.iterdir())


POWER = Kind(  # δ = size·tanh(gain) ⊙ |W|^power
    "power",
    shapes=lambda space: {"gain": (*space.batch, space.out, 1), "pull": (*space.batch, 1, space.inner)},
    start=lambda theta, weight: (theta.gain.zero_(), theta.pull.fill_(1)),
    delta=lambda weight, theta: theta.size * theta.gain.tanh() * theta.pull * weight.abs().pow(theta.power),
    settings={"size": REQUIRED, "power": 2, "rank": None, "words": "none"},
)
OWN: dict[str, list[dict[str, Any]]] = {  # as rules are given; a rule knows the kinds that there are when it is made
    "lora": [dict(where="plain | embed", rank=2, alpha=3, scaling="rslora", dropout=0.25), dict(where="*", rank=3)],
    "dora": [dict(where="plain | conv*", dropout=0.5, **TWO), dict(where="*", kind="dora", rank=3)],
    "adalora": [dict(where="*", kind="adalora", rank=2, alpha=3)],
    "bias": [dict(where="plain | mix | conv1 | conv2", kind="bias")],
    "full": [dict(where="*", kind="full")],
    "power": [
        dict(where="plain", kind="power", rank=5, settings={"size": 0.5, "words": "ja, 'ö'"}),
        dict(where="*", kind="power", settings={"size": 2, "power": 3}),
    ],
    "mixed": [
        dict(where="embed", **TWO), dict(where="plain", rank=2, alpha=3), dict(where="bare | conv3", kind="full"),
        dict(where="mix | conv1", kind="bias"), dict(where="*", kind="power", settings={"size": 0.3}),
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def power():
    with register_kind(POWER, size=0.5):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rules", OWN.values(), ids=OWN)
def test_our_own_format_holds_every_kind(rules, dtype, tmp_path, power):
    base = fresh(Layers, dtype)
    ours = move(lora_fx.apply(copy.deepcopy(base), rules, IDS, check=False))
    save_adapter(ours, tmp_path, peft=False)
    theta = [t.numel() for name, t in reference.bits(ours).items() if "_lora_" in name]
    assert sum(t.numel() for t in load_file(tmp_path / TENSORS).values()) == sum(theta)
    for example in (IDS, None):  # without inputs nothing is captured: the file says how each weight is read
        again = load_adapter(copy.deepcopy(base), tmp_path, example)
        assert_same(ours, again)
        assert torch.equal(out(again), out(ours)) and not torch.equal(out(again), out(base))
    assert reference.same_bits(*(reference.bits(lora_fx.fold(model)) for model in (ours, again)))


def test_two_kinds_of_one_weight_under_one_name(tmp_path):
    ours = lora_fx.apply(fresh(Layers), Rule(where="plain", **TWO), IDS)
    lora_fx.apply(ours, Rule(where="plain", kind="bias"), IDS)
    save_adapter(move(ours), tmp_path, peft=False)
    assert_same(ours, load_adapter(fresh(Layers), tmp_path, IDS))


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """Of the first adapter."""
    return lambda folder: change(folder.header["adapters"][0])


def lack(tensor: str) -> Callable[[Any], Any]:
    return lambda folder: folder.tensors.pop(folder.header["adapters"][0]["keys"][tensor])


def reshape(tensor: str, *shape: int) -> Callable[[Any], Any]:
    def change(folder: Any) -> None:
        folder.tensors[folder.header["adapters"][0]["keys"][tensor]] = torch.ones(shape)

    return change


TAMPERED = {
    "an unknown kind": ("dora", header(lambda e: e.update(kind="dore")), "there is no kind 'dore'", "register_kind"),
    "a kind that is no text": ("dora", header(lambda e: e.update(kind=["dora"])), "there is no kind", "register_kind"),
    "another kind": ("dora", header(lambda e: e.update(kind="full")), "no setting", ""),
    "a kind of biases": ("dora", header(lambda e: e.update(kind="bias", settings={})), "does not describe", "again"),
    "a bias on axes": ("bias", header(lambda e: e.update(sides="i")), "does not describe", "again"),
    "no magnitude": ("dora", lack("magnitude"), "plain.weight.magnitude", "again"),
    "no weight": ("full", lack("weight"), "plain.weight.weight", ""),
    "no shift": ("bias", lack("shift"), "shift", ""),
    "a key less": ("dora", header(lambda e: e["keys"].pop("magnitude")), "magnitude", ""),
    "a key more": ("full", header(lambda e: e["keys"].update(other=e["keys"]["weight"])), "not other, weight", "again"),
    "a magnitude for rows": ("dora", reshape("magnitude", 9, 1), "magnitude has the shape (9, 1)", "base model"),
    "a flat magnitude": ("dora", reshape("magnitude", 10), "magnitude has the shape (10,)", "base model"),
    "another weight": ("full", reshape("weight", 6, 10), "weight has the shape (6, 10)", "base model"),
    "another shift": ("bias", reshape("shift", 9, 1), "shift has the shape (9, 1)", "base model"),
    "another rank": ("dora", header(lambda e: e["settings"].update(rank=5)), "A has the shape (2, 6)", "base model"),
    "another setting": ("dora", header(lambda e: e["settings"].update(size=1)), "size=1 is no setting", "it has rank"),
    "no rank": ("dora", header(lambda e: e["settings"].pop("rank")), "needs rank", ""),
    "a setting for none": ("full", header(lambda e: e["settings"].update(rank=1)), "rank=1 is no setting", "has none"),
    "no settings": ("dora", header(lambda e: e.pop("settings")), "does not describe", "again"),
    "a rank in words": ("dora", header(lambda e: e["settings"].update(rank="two")), "wants ('two', 6)", "base model"),
    "half a rank": ("dora", header(lambda e: e["settings"].update(rank=2.0)), "rank=2.0", ""),
    "an alpha in words": ("dora", header(lambda e: e["settings"].update(alpha="3")), "alpha", ""),
    "a dropout of 2": ("dora", header(lambda e: e["settings"].update(dropout=2)), "dropout", ""),
    "a scaling of none": ("dora", header(lambda e: e["settings"].update(scaling="none")), "scaling='none'", ""),
    "its own setting lost": ("power", header(lambda e: e["settings"].pop("size")), "needs size", ""),
    "a setting it has not": ("power", header(lambda e: e["settings"].update(alpha=2)), "alpha=2 is no setting", ""),
}  # fmt: skip


@pytest.mark.parametrize("kind, change, reason, remedy", TAMPERED.values(), ids=TAMPERED)
def test_a_header_that_says_something_else(kind, change, reason, remedy, tmp_path, power):
    ours = lora_fx.apply(fresh(Layers), {**OWN[kind][0], "where": "plain"}, IDS, check=False)
    save_adapter(move(ours), tmp_path / "a", peft=False)
    rewrite(tmp_path / "a", change)
    model, written = fresh(Layers), files(tmp_path)
    before = whole(model)
    refused(lambda: load_adapter(model, tmp_path / "a", IDS), reason, TENSORS, remedy=remedy)
    assert_untouched(model, before)
    assert files(tmp_path) == written


def test_a_kind_that_is_not_registered_here(tmp_path):
    with register_kind(replace(POWER, name="elsewhere"), size=0.5):
        rule = Rule(where="plain", kind="elsewhere", settings={"size": 1})
        save_adapter(move(lora_fx.apply(fresh(Layers), rule, IDS, check=False)), tmp_path, peft=False)
    model = fresh(Layers)
    before = whole(model)
    refused(lambda: load_adapter(model, tmp_path, IDS), "there is no kind 'elsewhere'", TENSORS, remedy="register_kind")
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [math.nan, {1, 2}, (1, 2), torch.ones(2), print], ids=str)
def test_a_setting_that_no_file_can_hold(value, tmp_path, power):
    rule = Rule(where="plain", kind="power", settings={"size": 0.5, "words": value})
    ours = lora_fx.apply(fresh(Layers), rule, IDS, check=False)
    refused(lambda: save_adapter(ours, tmp_path / "a", peft=False), "words=", "plain.weight", remedy="")
    assert not list(tmp_path.iterdir())
