"""What comes to a model that has adapters already: inactive, under another name, or in the place of old numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.deltas.realisation import Realisation
from lora_fx.errors import AdapterError, FileError, LoraFxError, PlanError
from lora_fx.model.inventory import inventory
from lora_fx.testing import Filling, assert_folds_exactly
from tests.test_active import Configured, same, state
from tests.test_strengths import X, counted

# it has a tied weight, of which only PEFT's merge would make two
pytestmark = pytest.mark.filterwarnings("ignore:.*PEFT reads the file, and its merge would be wrong")


def made() -> nn.Module:
    """A generated forward, one that dispatches, and two layers that share a weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), Configured(10, 5), nn.Linear(5, 5), nn.Linear(5, 5))
    model[3].weight = model[4].weight
    return model.requires_grad_(False)


def saved(folder: Path, seed: int = 0, kind: str = "lora", where: str = "*", **settings) -> Path:
    """A file of an adapter for it, with numbers by this seed."""
    settings = {"rank": 2, "alpha": 3, **settings} if kind in ("lora", "dora", "adalora") else settings
    where = "[02]" if kind == "bias" else where  # the others share their weight
    lora_fx.apply(model := made(), Rule(where=where, kind=kind, **settings), X)
    Filling(seed=seed, size=0.5)(model)
    lora_fx.save_adapter(model, folder / f"{kind}{seed}", peft=kind == "lora" and "dropout" not in settings)
    return folder / f"{kind}{seed}"


def loaded(path: Path, **options) -> nn.Module:
    return lora_fx.load_adapter(made(), path, X, **options)


def acting(model: nn.Module) -> dict[str, bool]:
    return {a.name: a.active for a in inventory(model).adapters}


# ── a second one ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("check", [True, False])
def test_a_second_one_is_inactive_unless_asked(tmp_path, check):
    first, second = saved(tmp_path), saved(tmp_path, seed=1)
    model = loaded(first, check=check)
    alone, others = model(X), state(model)[2]
    assert acting(model) == {"default": True}
    lora_fx.load_adapter(model, second, X, name="b", check=check)
    assert acting(model) == {"default": True, "b": False}
    assert torch.equal(model(X), alone) and {type(m) for m in model} <= {*others.values()}
    assert all(p.requires_grad == ("_default." in n) for n, p in model.named_parameters() if "_lora_" in n)
    lora_fx.activate(model, "b")
    assert torch.equal(model(X), loaded(second)(X))
    assert all(p.requires_grad == ("_b." in n) for n, p in model.named_parameters() if "_lora_" in n)
    lora_fx.load_adapter(model, first, X, name="c", active=True, check=check)
    assert acting(model) == {"default": False, "b": True, "c": True}
    assert acting(loaded(first, active=False)) == {"default": False}


# ── rename ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_renamed_it_is_the_same_under_another_name(tmp_path):
    model = loaded(saved(tmp_path))
    lora_fx.load_adapter(model, saved(tmp_path, seed=1), X, name="b")
    lora_fx.activate(model, {"default": 0.7})
    y, keys = model(X), [*model.state_dict()]
    parameters = dict(model.named_parameters())
    assert lora_fx.rename(model, "default", "task") is model
    assert [*model.state_dict()] == [key.replace("_default", "_task") for key in keys]
    assert all(parameters[n.replace("_task", "_default")] is p for n, p in model.named_parameters())
    assert torch.equal(model(X), y) and acting(model) == {"task": True, "b": False}
    with lora_fx.disabled(model):
        lora_fx.rename(model, "b", "default")
    assert torch.equal(model(X), y) and {*lora_fx.adapters(model)} == {"task", "default"}
    lora_fx.save_adapter(model, tmp_path / "again", name="task")
    lora_fx.activate(model, "task")
    assert torch.equal(loaded(tmp_path / "again")(X), model(X))
    lora_fx.remove(model, "task", "default")
    assert not any("_lora" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("c", "d", "no adapter named 'c'"),
        ("a", "b", "there is an adapter 'b' already"),
        ("a", "a", "there is an adapter 'a' already"),
        ("a", "no name", "'no name' is no identifier"),
        ("a", 3, "3 is no identifier"),
        ("a", "taken", "has something called weight_lora_taken already"),
    ],
)
def test_what_cannot_be_a_name_is_refused(old, new, says):
    model = made()
    for name in "ab":
        lora_fx.apply(model, Rule(where="*", rank=1), X, name=name)
    model[4].weight_lora_taken = 3
    before = state(model)
    with pytest.raises(AdapterError, match=says):
        lora_fx.rename(model, old, new)
    assert same(state(model), before)
    with pytest.raises(PlanError, match="folded"):
        lora_fx.rename(lora_fx.fold(model), "a", "c")


# ── other numbers in place ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "full", "bias"])
def test_replaced_it_is_what_a_fresh_model_loads(tmp_path, kind):
    first, second = saved(tmp_path, kind=kind), saved(tmp_path, seed=1, kind=kind)
    model, fresh = loaded(first), loaded(second)
    kept = dict(model.named_parameters())
    lora_fx.load_adapter(model, second, name="default")
    assert all(kept[name] is p for name, p in model.named_parameters()) and same(state(model), state(fresh))
    assert torch.equal(model(X), fresh(X)) and not torch.equal(model(X), loaded(first)(X))


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora"])
def test_a_lower_rank_is_filled_with_zeros_and_saved_without_them(tmp_path, kind):
    """Ranks of 2, 4 and 1 in the room for 4, by 3/2, −1/2 and 5. Not said, there is room for the first one."""
    two = saved(tmp_path, kind=kind)
    four = saved(tmp_path, seed=1, kind=kind, rank=4, alpha=-2)
    one = saved(tmp_path, seed=2, kind=kind, rank=1, alpha=5)
    model = loaded(two, max_rank=4)
    kept = dict(model.named_parameters())
    for path in (two, four, one, two):
        lora_fx.load_adapter(model, path, name="default")
        fresh = loaded(path)
        report = lora_fx.verify(fresh, model, X)
        assert report, str(report)
        assert all(kept[name] is p for name, p in model.named_parameters())
        adapters = [[(a.rank, a.alpha, a.scale) for a in inventory(m).adapters] for m in (model, fresh)]
        assert adapters[0] == adapters[1] and {a.width for a in inventory(model).adapters} == {4}
        lora_fx.save_adapter(model, tmp_path / "again", peft=kind == "lora")
        assert same(state(loaded(tmp_path / "again")), state(fresh))
        assert_folds_exactly(model, X)
    certificate = lora_fx.certify(model, X)
    assert certificate, str(certificate)
    again = lora_fx.load_adapter(loaded(four), two, name="default")
    assert {(a.rank, a.width) for a in inventory(again).adapters} == {(2, 4)} and lora_fx.verify(again, fresh, X)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(X).square().sum().backward()
        optimizer.step()
    lora_fx.save_adapter(model, tmp_path / "trained", peft=kind == "lora")  # the zeros are zeros still
    assert lora_fx.verify(loaded(tmp_path / "trained"), model, X)


@pytest.mark.parametrize("kind", ["lora", "adalora", "full", "bias"])
def test_replaced_nothing_is_compiled_anew(tmp_path, kind):
    files = [saved(tmp_path, kind=kind), saved(tmp_path, seed=1, kind=kind)]
    if kind == "lora":
        files.append(saved(tmp_path, seed=2, kind=kind, rank=1, alpha=7))
    model = loaded(files[0], max_rank=4)
    realised = {a.realised for a in inventory(model).adapters}
    assert realised == {Realisation.DISPATCH, *([Realisation.GRAPH] if kind in ("lora", "adalora") else [])}
    with counted(model) as (compiled, graphs), torch.no_grad():
        for path in (*files, *files):
            lora_fx.load_adapter(model, path, name="default")
            compiled(X)
            assert lora_fx.verify(loaded(path), model, X) and torch.equal(compiled(X), compiled(X))
        assert len(graphs) == 1


def test_dropout_follows_the_file(tmp_path):
    plain, dropping = saved(tmp_path), saved(tmp_path, seed=1, dropout=0.5)
    model = loaded(plain)
    lora_fx.load_adapter(model, dropping, name="default")
    assert {a.dropout.p for a in inventory(model).adapters} == {0.5}
    fresh, found = loaded(dropping), []
    for own in (model, fresh):
        torch.manual_seed(0)
        found.append(own.train()(X))
    assert torch.equal(*found)
    lora_fx.load_adapter(model, plain, name="default")
    assert {a.dropout.p for a in inventory(model).adapters} == {0.0}


def test_strength_and_activity_stay_unless_asked(tmp_path):
    first, second = saved(tmp_path), saved(tmp_path, seed=1)
    model = loaded(first)
    lora_fx.load_adapter(model, first, X, name="b")
    lora_fx.activate(model, {"default": 0.7})
    for name in ("default", "b"):
        lora_fx.load_adapter(model, second, name=name)
    assert acting(model) == {"default": True, "b": False}
    assert {a.name: a.strength for a in inventory(model).adapters} == {"default": 0.7, "b": 1.0}
    lora_fx.load_adapter(model, second, name="b", active=True)
    lora_fx.load_adapter(model, second, name="default", active=False)
    assert acting(model) == {"default": False, "b": True}
    assert torch.equal(model(X), loaded(second)(X))


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "pissa", "full", "bottleneck"])
def test_where_a_file_has_nothing_the_adapter_adds_nothing(tmp_path, kind):
    """And it may be trained, and replaced, and saved from there."""
    settings = {"pissa": {"rank": 2}, "bottleneck": {"rank": 2}}.get(kind, {})
    whole, part = (saved(tmp_path / where, 1, kind, where, **settings) for where in ("[02]", "0"))
    model = loaded(whole, name="a", max_rank=3) if kind in ("lora", "dora") else loaded(whole, name="a")
    parameters, before = [*model.parameters()], torch.get_rng_state()
    lora_fx.load_adapter(model, part, name="a")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    wanted = loaded(part, name="a")
    assert torch.equal(model(X), wanted(X)) and not torch.equal(model(X), loaded(whole, name="a")(X))
    assert (acting(model), lora_fx.adapters(model)) == ({"a": True}, {"a": ["0.weight", "2.weight"]})
    model(X).square().sum().backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model[2].parameters())
    lora_fx.save_adapter(model, tmp_path / "again", name="a", peft=kind == "lora")
    assert torch.equal(loaded(tmp_path / "again", name="a")(X), wanted(X))
    lora_fx.load_adapter(model, whole, name="a")
    assert torch.equal(model(X), loaded(whole, name="a")(X))


def _further_weights(folder):
    lora_fx.apply(model := made(), Rule(where="*", rank=2), X)
    lora_fx.apply(model, Rule(where="0", kind="bias"), X)
    lora_fx.save_adapter(model, folder / "further", peft=False)
    return folder / "further", "is not on 0.bias"


def _one_of_two(folder):
    """Two layers share a weight, and PEFT's file is for one of them."""
    path = saved(folder, seed=7)
    file = path / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(file).items() if key.split(".")[2] in "04"}, file)
    said = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(
        json.dumps({**said, "target_modules": ["0", "4"], "target_parameters": None})
    )
    return path, r"nothing for 3.weight, which is one weight with 4.weight here"


def _higher_rank(folder):
    return saved(folder, seed=4, rank=5), "its rank is 5, and the adapter has room for 3"


def _other_kind(folder):
    return saved(folder, seed=5, kind="dora"), "of the kind 'dora', and the adapter of 'lora'"


def _nan(folder):
    from safetensors import safe_open

    path = saved(folder, seed=6)
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    [*tensors.values()][-1][0, 0] = float("nan")
    save_file(tensors, file, said)
    return path, "NaN"


def _nowhere(folder):
    return folder / "nowhere", "nowhere"


@pytest.mark.parametrize("broken", [_further_weights, _one_of_two, _higher_rank, _other_kind, _nan, _nowhere])
def test_what_does_not_fit_is_refused_and_the_model_is_what_it_was(tmp_path, broken):
    model = loaded(saved(tmp_path), max_rank=3)
    path, says = broken(tmp_path)
    before, y = state(model), model(X)
    with pytest.raises(LoraFxError, match=says):
        lora_fx.load_adapter(model, path, name="default")
    assert same(state(model), before) and torch.equal(model(X), y)


def test_an_infinite_delta_is_undone(tmp_path, monkeypatch):
    """After everything has been written."""
    from lora_fx.export.adapters import replace

    model = loaded(saved(tmp_path), max_rank=3)
    before = state(model), [(a.rank, a.alpha) for a in inventory(model).adapters]

    def refuse(adapter, parameter, name):
        raise FileError("not finite", place=name, remedy="none")

    monkeypatch.setattr(replace, "refuse_infinite", refuse)
    with pytest.raises(FileError, match="not finite"):
        lora_fx.load_adapter(model, saved(tmp_path, seed=1, rank=1, alpha=9, dropout=0.5), name="default")
    assert same(state(model), before[0])
    assert [(a.rank, a.alpha) for a in inventory(model).adapters] == before[1]
    assert {a.dropout.p for a in inventory(model).adapters} == {0.0}


@pytest.mark.parametrize("most", [0, -1, True, 2.0, "8"])
def test_what_is_no_rank_is_refused(tmp_path, most):
    path = saved(tmp_path)
    with pytest.raises(FileError, match="is no rank"):
        loaded(path, max_rank=most)
    with pytest.raises(FileError, match="its rank is 2, and max_rank=1"):
        loaded(path, max_rank=1)
    with pytest.raises(FileError, match="has the room it has"):
        lora_fx.load_adapter(loaded(path), path, name="default", max_rank=8)


def test_numbers_in_the_room_are_not_left_out_of_a_file(tmp_path):
    model = loaded(saved(tmp_path), max_rank=3)
    next(iter(inventory(model).adapters)).A.data[2, 0] = 1.0
    with pytest.raises(AdapterError, match="A has numbers behind its rank of 2, in the room for 3"):
        lora_fx.save_adapter(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    assert copy.deepcopy(model)[0].weight_lora_default.width == 3


def test_a_kind_that_says_it_pads_is_tried():
    """δ = s·B·A, and the same divided by how many ranks there are."""
    from lora_fx.deltas.kinds import factor_shapes

    def start(theta, weight):
        theta.A.normal_()
        theta.B.zero_()

    settings = {"rank": ..., "alpha": None}
    for by, says in ((lambda theta: 1, ""), (lambda theta: theta.A.shape[-2], "one more rank of zeros moves δ by")):
        kind = lora_fx.Kind(
            "mean", factor_shapes, start, factors=lambda t, by=by: (t.A / by(t), t.B), settings=settings, pads=True
        )
        if says:
            with pytest.raises(LoraFxError, match=says):
                lora_fx.register_kind(kind)
        else:
            lora_fx.register_kind(kind).remove()
