"""AdaLoRA's files as PEFT writes them: what its training has left of each layer, and the scale that it has there."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_fx
from lora_fx import load_adapter
from lora_fx.checks.verification import compare, noise_floors
from lora_fx.errors import FileError
from lora_fx.export.adapters.folder import CONFIG, TENSORS
from lora_fx.graph.capture import Inputs
from lora_fx.model.inventory import inventory
from tests import reference

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


class Layers(nn.Module):
    """Every layer for which PEFT has AdaLoRA; none is square."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.mix, self.conv = nn.Linear(6, 10), Conv1D(8, 10), nn.Conv2d(1, 4, 2)
        nn.init.normal_(self.mix.weight, std=0.4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.mix(self.plain(x).tanh()).tanh().reshape(-1, 1, 2, 4)).flatten(1)


def base() -> nn.Module:
    torch.manual_seed(0)
    return Layers()


def trained(folder, steps: int = 10, **config) -> nn.Module:
    """In eval mode; after ten steps half of the ranks are left, and of one layer none."""
    settings = dict(init_r=4, target_r=2, total_step=10, tinit=1, tfinal=3, deltaT=1, lora_alpha=6, lora_dropout=0.1)
    config = peft.AdaLoraConfig(target_modules=["plain", "mix", "conv"], **{**settings, **config})
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05)
    torch.manual_seed(1)
    for step in range(steps):
        model(X).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


def ranks(model: nn.Module) -> dict[str, int]:
    return {place.weight: place.adapter.rank for place in inventory(model).places}


@pytest.mark.parametrize(
    ("steps", "config"),
    [(10, {}), (3, {}), (0, {"init_lora_weights": False}), (10, {"lora_alpha": 0, "use_rslora": True, "target_r": 1})],
    ids=["pruned", "while it falls", "without a pattern", "without an alpha"],
)
def test_we_read_what_peft_saves(steps, config, tmp_path):
    theirs = trained(tmp_path, steps, **config)
    assert not steps or sum(map(sum, theirs.peft_config["default"].rank_pattern.values())) < 12
    wanted = theirs(X).detach()
    ours = load_adapter(base().eval(), tmp_path, X)
    found = ours(X).detach()
    ((_, noise),) = noise_floors(ours, Inputs((X,), {}), [found])
    assert compare(found, wanted, wanted, noise, torch.float32)
    assert not torch.equal(wanted, base()(X))
    tensors = load_file(tmp_path / TENSORS)
    assert ranks(ours) == {
        f"{name}.weight": len(tensors[f"base_model.model.{name}.lora_E"])
        for name in ("plain", "mix", "conv")
        if len(tensors[f"base_model.model.{name}.lora_E"])
    }
    assert lora_fx.certify(ours, X)
    again = tmp_path / "own"
    lora_fx.save_adapter(ours, again, peft=False)
    assert reference.same_bits(reference.bits(load_adapter(base().eval(), again, X)), reference.bits(ours))
    lora_fx.fold(ours)
    assert compare(ours(X).detach(), wanted, wanted, noise, torch.float32)


def test_a_layer_of_which_nothing_is_left_has_no_adapter(tmp_path):
    trained(tmp_path, target_r=1)
    pattern = json.loads((tmp_path / CONFIG).read_text())["rank_pattern"]
    assert not all(map(any, pattern.values()))
    found = ranks(load_adapter(base(), tmp_path, X))
    assert 0 < sum(found.values()) == sum(map(sum, pattern.values())) and len(found) < 3


def change(folder, *, config=(), drop=(), tensors=()) -> None:
    known = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({k: v for k, v in {**known, **dict(config)}.items() if k not in drop}))
    own = load_file(folder / TENSORS) | dict(tensors)
    save_file({k: v for k, v in own.items() if k not in drop}, folder / TENSORS)


P = "base_model.model.plain.lora_"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"config": {"rank_pattern": {"plain.lora_E": [True] * 3}}}, "of 3 ranks whether they act, and init_r is 4"),
        ({"config": {"rank_pattern": {"plain.lora_E": [True] * 4}}}, r"plain.lora_. its shape|lora_B: its shape is"),
        ({"config": {"rank_pattern": {"plain.lora_E": 4}}}, "rank_pattern: .* is not a table of lists"),
        ({"config": {"init_r": 0}}, "init_r: 0 is not a positive integer"),
        ({"config": {"init_r": None}}, "init_r: None is not"),
        ({"config": {"kasa_config": {"a": 1}}}, "kasa_config"),
        ({"drop": [f"{P}E"]}, "lora_E: the key is missing"),
        ({"tensors": {f"{P}A": torch.full((2, 6), float("nan"))}}, "NaN"),
        ({"tensors": {"base_model.model.other.lora_A": torch.ones(2, 2)}}, "no layer that the config names has"),
    ],
)
def test_a_damaged_file_is_refused(changed, words, tmp_path):
    trained(tmp_path, target_r=3)
    change(tmp_path, **changed)
    model = base()
    state = reference.bits(model)
    with pytest.raises(FileError, match=words):
        load_adapter(model, tmp_path, X)
    assert reference.same_bits(reference.bits(model), state)


def test_a_layer_for_which_peft_has_none_is_refused(tmp_path):
    trained(tmp_path)
    change(tmp_path, config={"target_modules": ["embed"], "rank_pattern": {}})
    with pytest.raises(FileError, match="PEFT has no AdaLoRA for embed, which it adapts as embedding"):
        load_adapter(_Table(), tmp_path, torch.tensor([1]))


class _Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 6)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids)


def test_peft_has_no_word_for_ours(tmp_path):
    trained(tmp_path)
    model = load_adapter(base(), tmp_path, X)
    with pytest.raises(FileError, match="the kind 'adalora' is none of a LoRA file"):
        lora_fx.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
