"""The dropout of branches: of every sixteen bits it decides as it says, and where a call is seen it is torch's."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lora_fx
from lora_fx import Rule
from lora_fx.deltas.dropping import BranchDropout, decided, random_bits
from lora_fx.errors import AdapterError
from tests import reference

EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)


@pytest.mark.parametrize("p", [2**-7, 0.05, 0.1, 1 / 3, 0.5, 0.9, 1 - 2**-7])
def test_of_all_values_of_sixteen_bits_so_many_drop_and_the_mean_is_one(p):
    mask = decided(EVERY, p, torch.float64)
    dropped = round(p * 2**16)
    assert int((mask == 0).sum()) == dropped
    assert mask.unique().tolist() == [0, 2**16 / (2**16 - dropped)]


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_is_drawn(bit):
    """Each is 1 in half of 2¹⁶ draws, within eight standard deviations."""
    torch.manual_seed(bit)
    draws = random_bits(2**18).view(torch.int64)
    assert draws.numel() == 2**16 and abs(int((draws >> bit & 1).sum()) - 2**15) <= 8 * 2**7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 5, 2)])
def test_what_is_kept_is_scaled_and_so_is_its_gradient(shape, dtype):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype).add_(4).requires_grad_()
    y = BranchDropout(0.5)(x)
    assert y.dtype == dtype and torch.equal(y, torch.where(y == 0, 0, 2 * x))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, torch.where(y == 0, 0, 2 * torch.ones_like(x)))


def test_it_lies_as_x_does():
    x = torch.randn(4, 5, 6).permute(2, 0, 1)
    assert BranchDropout(0.5)(x).stride() == x.stride() == F.dropout(x).stride()


@pytest.mark.parametrize("p", [0.0, 1e-3, 0.999, 1.0])
def test_near_zero_and_one_and_outside_of_training_it_is_that_of_torch(p):
    x, mine = torch.randn(100), BranchDropout(p)
    for drop in (mine, mine.eval(), BranchDropout(0.5).eval()):
        torch.manual_seed(0)
        found = drop(x)
        torch.manual_seed(0)
        assert torch.equal(found, F.dropout(x, drop.p, drop.training))


SEEN = {
    "captured": lambda drop, x: make_fx(drop)(x)(x),
    "scripted": lambda drop, x: torch.jit.trace(drop, x, check_trace=False)(x),
    "exported": lambda drop, x: torch.export.export(drop, (x,), strict=False).module()(x),
    "transformed": lambda drop, x: torch.vmap(drop, randomness="same")(x),
}


@pytest.mark.parametrize("how", SEEN)
def test_a_call_that_is_seen_is_one_of_torch(how):
    x, drop, theirs = torch.randn(6, 8), BranchDropout(0.5), nn.Dropout(0.5)
    found = []
    for own in (drop, theirs):
        torch.manual_seed(0)
        found.append(SEEN[how](own, x))
    assert torch.equal(*found)


def test_a_checkpoint_drops_the_same_again_whatever_counted_the_forward():
    drop, x = BranchDropout(0.5), torch.randn(6, 8, requires_grad=True)
    found = []
    for again in (False, True):
        torch.manual_seed(0)
        with FlopCounterMode(display=False):
            y = checkpoint(lambda x: drop(x).sin(), x, use_reentrant=False) if again else drop(x).sin()
        found.append(torch.autograd.grad(y.sum(), x)[0])
    assert torch.equal(*found)


def test_each_adapter_is_looked_up_once_in_a_call_and_each_gives_its_own():
    """The source that is shown says what each line reads; the code that runs reads each child once."""
    base, x = nn.Linear(8, 5), torch.randn(3, 8)
    model = lora_fx.apply(copy.deepcopy(base), Rule("*", rank=2), x, check=False)
    model = lora_fx.apply(model, Rule("*", rank=3), x, check=False, name="other")
    reference.fill(model)
    with torch.no_grad():
        W = sum((a.scale * a.B @ a.A for a in (model.weight_lora_default, model.weight_lora_other)), base.weight)
        reach = F.linear(x.abs(), W.abs()) + base.bias.abs()
        assert bool(((model(x) - F.linear(x, W, base.bias)).abs() <= 64 * torch.finfo(x.dtype).eps * reach).all())
    asked: list[str] = []
    cls = type(model)
    cls.__getattr__ = lambda self, name: (asked.append(name), nn.Module.__getattr__(self, name))[1]
    try:
        model(x)
    finally:
        del cls.__getattr__
    assert sorted(asked) == ["bias", "weight", "weight_lora_default", "weight_lora_other"]
    assert len(re.findall(r"self\.weight_lora_other\.", lora_fx.show(model))) == 3


@pytest.mark.parametrize(
    "mapped",
    [lambda m: torch.vmap(m), lambda m: torch.vmap(torch.vmap(m, randomness="same")), torch.func.jacfwd],
    ids=["vmap", "nested", "jacfwd"],
)
def test_a_vmap_that_may_not_draw_is_refused_with_the_way_that_works(mapped):
    x = torch.randn(2, 3, 8)
    model = lora_fx.apply(nn.Linear(8, 5), Rule("*", rank=2, dropout=0.3), x).train()
    with pytest.raises(AdapterError, match=r"dropout=0\.3 draws.*'error'\n.*randomness='different'"):
        mapped(model)(x)
    for how in ("different", "same"):
        assert torch.vmap(model, randomness=how)(x).shape == (2, 3, 5)
    assert torch.equal(mapped(model.eval())(x), mapped(model)(x))
