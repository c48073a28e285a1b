"""Every use of a weight with a kind that is no product, against W' by hand: outputs, gradients, parts and dropout."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Adapter, Rule
from lora_fx.deltas.dropping import BranchDropout
from lora_fx.errors import PlanError
from lora_fx.graph.layout import Layout
from lora_fx.model.inventory import inventory
from tests import reference
from tests.kinds import SETTINGS, Uses, assert_same, fill


def test_dropout_needs_a_branch_input():
    lstm = nn.LSTM(4, 3, batch_first=True)
    with pytest.raises(PlanError, match="reads whole: there is no branch input to drop"):
        lora_fx.apply(lstm, Rule(where="*", kind="dora", rank=1, dropout=0.1), torch.randn(2, 5, 4))


TOKENS = torch.tensor([[0, 3, 6], [6, 1, 3]])
READ = {
    "linear": (lambda x, w, b: F.linear(x, w, b), (3, 4), (5, 4), (5,)),
    "linear with a size of 0": (lambda x, w, b: F.linear(x, w, b), (3, 4), (5, 4), (5,)),
    "linear without a bias": (lambda x, w, b: F.linear(x, w).mul_(2) + b, (3, 4), (5, 4), (5,)),
    "square": (lambda x, w, b: x @ w + b, (3, 4), (4, 4), (4,)),
    "addmm": (lambda x, w, b: torch.addmm(b, x, w, beta=2), (3, 4), (4, 5), (5,)),
    "addmm times 3": (lambda x, w, b: torch.addmm(b, x, w, alpha=3), (3, 4), (4, 5), (5,)),
    "a slice": (lambda x, w, b: F.linear(x, w[1:4], b[1:4]), (3, 4), (5, 4), (5,)),
    "a slice of the inputs": (
        lambda x, w, b: F.linear(x, w[:, 2:], b) + F.linear(x, w[:, :4], b),
        (3, 4),
        (5, 6),
        (5,),
    ),
    "einsum": (lambda x, w, b: torch.einsum("bi,ihd->bhd", x, w) + b, (3, 4), (4, 2, 3), (3,)),
    "convolution": (lambda x, w, b: F.conv1d(x, w, b), (2, 4, 5), (6, 4, 3), (6,)),
    "groups": (lambda x, w, b: F.conv1d(x, w, b, groups=2), (2, 4, 5), (6, 2, 3), (6,)),
    "embedding": (lambda x, w, b: F.embedding(x, w) * b, None, (7, 4), (4,)),
    "tied": (lambda x, w, b: F.linear(F.embedding(x, w).tanh(), w, b), None, (7, 4), (7,)),
    "whole": (lambda x, w, b: F.bilinear(x, x, w, b), (3, 4), (5, 4, 4), (5,)),
    "experts": (lambda x, w, b: torch.bmm(x, w) + b, (2, 3, 4), (2, 4, 5), (5,)),
    "detached": (lambda x, w, b: F.linear(x, w, b) * F.linear(x, w.detach()), (3, 4), (5, 4), (5,)),
}


def canonical(sides: str, tensor: torch.Tensor) -> torch.Tensor:
    """(batch…, out, in), one axis at a time."""
    order = [k for side in "boi" for k, own in enumerate(sides) if own == side]
    size = [math.prod(n for n, own in zip(tensor.shape, sides, strict=True) if own == side) for side in "oi"]
    return tensor.permute(order).reshape(*(n for n, own in zip(tensor.shape, sides, strict=True) if own == "b"), *size)


def as_it_lay(sides: str, matrix: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    order = [k for side in "boi" for k, own in enumerate(sides) if own == side]
    return matrix.reshape([shape[k] for k in order]).permute([order.index(k) for k in range(len(order))])


def turned_by_hand(adapter, weight: torch.Tensor, scale: float) -> torch.Tensor:
    """W' with the paper's gradients: the norm is a constant."""
    theta, sides, W = dict(adapter.named_parameters()), adapter.layout.sides, canonical(adapter.layout.sides, weight)
    own = list(adapter.rows or range(W.shape[-2]))
    if adapter.kind.name == "full":
        turned = theta["weight"]
    else:
        V = W[..., own, :] + scale * theta["B"] @ theta["A"]
        turned = theta["magnitude"] * V / V.detach().square().sum(-1, keepdim=True).sqrt()
    return as_it_lay(sides, W.detach().index_copy(-2, torch.tensor(own), turned), weight.shape)


def read_with(use: str, kind: str) -> tuple[Uses, Adapter, torch.Tensor]:
    """Adapted without the check, which mends or refuses what the algebra got wrong."""
    torch.manual_seed(0)
    function, size, *shapes = READ[use]
    x = TOKENS if size is None else torch.randn(size, dtype=torch.float64, requires_grad=True)
    layer = Uses(function, *shapes)
    lora_fx.apply(layer, Rule(where="w", kind=kind, **SETTINGS[kind]), x.detach(), check=False)
    return fill(layer), inventory(layer).places[0].adapter, x


@pytest.mark.parametrize("kind", ["dora", "full"])
@pytest.mark.parametrize("use", list(READ))
def test_every_use_and_its_gradients_are_those_of_the_adapted_weight(use, kind):
    layer, adapter, x = read_with(use, kind)
    if kind == "dora" and "size of 0" in use:
        with torch.no_grad():
            adapter.magnitude[0] = 0
    inputs = [*adapter.parameters(), *([x] if x.requires_grad else [])]
    cotangent, pairs = torch.randn_like(layer(x)), []
    for again in (False, True):
        own = turned_by_hand(adapter, layer._parameters["w"], 3 / 2)
        outputs = layer(x), layer.function(x, own, layer._parameters["b"])
        first, second = (torch.autograd.grad(y, inputs, cotangent, create_graph=again) for y in outputs)
        pairs += [outputs, *zip(first, second, strict=True)]
    curved = [sum(g.square().sum() for g in own) for own in (first, second)]
    if curved[1].requires_grad:
        more = [torch.autograd.grad(c, inputs, allow_unused=True, materialize_grads=True) for c in curved]
        pairs += zip(*more, strict=True)
    for a, b in pairs:
        assert_same(a, b)


@pytest.mark.parametrize("use", list(READ))
def test_two_kinds_add_up_in_every_use(use):
    layer, dora, x = read_with(use, "dora")
    lora_fx.apply(layer, Rule(where="w", kind="full"), x.detach(), name="full", check=False)
    lora_fx.activate(fill(layer, share=0.3), "default", "full")
    W, full = layer._parameters["w"], next(a for a in inventory(layer).adapters if a is not dora)
    total = turned_by_hand(dora, W, 3 / 2) + turned_by_hand(full, W, 1.0) - W
    assert_same(layer(x), layer.function(x, total, layer._parameters["b"]))


@pytest.mark.parametrize("rows", [None, (1, 2), (0, 3), (1, 3)])
@pytest.mark.parametrize(("sides", "shape"), [("oi", (4, 4)), ("io", (3, 5)), ("boi", (2, 5, 3)), ("oii", (4, 3, 2))])
def test_dora_of_a_part_is_that_of_its_own_rows(sides, shape, rows):
    adapter = Adapter(Layout(sides, shape), kind="dora", rank=2, alpha=3, rows=rows, dtype=torch.float64)
    weight = torch.randn(shape, dtype=torch.float64)
    adapter.start(weight)
    assert not bool(adapter.delta(weight).any())
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
        W = canonical(sides, weight)
        own = list(rows or range(W.shape[-2]))
        V = W[..., own, :] + 3 / 2 * adapter.B @ adapter.A
        wanted = torch.zeros_like(W)
        wanted[..., own, :] = adapter.magnitude * V / V.square().sum(-1, keepdim=True).sqrt() - W[..., own, :]
        assert_same(canonical(sides, adapter.delta(weight)), wanted)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("role", ["attention.key", "attention.key | attention.value"])
def test_dora_of_one_part_beside_its_matmul(role):
    torch.manual_seed(0)
    fused, x = Attention().double(), torch.randn(2, 5, 8, dtype=torch.float64)
    lora_fx.apply(fused, Rule(role=role, kind="dora", rank=2), x, check=False)
    fill(fused)
    total, base = reference.dense_weights(fused)["qkv.weight"], fused.qkv._parameters["weight"]
    assert torch.equal(total[:8], base[:8]) and not torch.equal(total[8:16], base[8:16])
    assert_same(fused.qkv(x), F.linear(x, total, fused.qkv.bias))


@pytest.mark.parametrize("use", ["linear", "convolution", "addmm"])
def test_dropout_of_dora_acts_on_its_branch_input_in_train_mode(use):
    """y = x·Wᵀ + (c − 1) ⊙ x̃·Wᵀ + c ⊙ s·x̃·Aᵀ·Bᵀ, x̃ after dropout, as PEFT has it."""
    torch.manual_seed(0)
    function, size, *shapes = READ[use]
    layer, x = Uses(function, *shapes), torch.randn(size, dtype=torch.float64)
    lora_fx.apply(layer, Rule(where="w", kind="dora", dropout=0.5, **SETTINGS["dora"]), x, check=False)
    W, b, adapter = layer._parameters["w"], layer._parameters["b"], inventory(fill(layer)).places[0].adapter
    whole = turned_by_hand(adapter, W, 3 / 2)
    assert_same(layer.eval()(x), function(x, whole, b))
    torch.manual_seed(3)
    found = layer.train()(x)
    torch.manual_seed(3)
    dropped = BranchDropout(0.5)(x)
    assert bool((dropped == 0).any())
    branch = function(dropped, whole, b) - function(dropped, W, b)
    assert_same(found, function(x, W, b) + branch)


def test_dropout_of_dora_on_an_embedding_takes_whole_tokens():
    ids = torch.arange(40)
    table = nn.Embedding(40, 6).double()
    fill(lora_fx.apply(table, Rule(where="*", kind="dora", rank=2, dropout=0.5), ids))
    base = table._parameters["weight"].detach()
    branch = table.eval()(ids) - base
    found = table.train()(ids)
    kept = (found != base).any(1)
    assert 0 < int(kept.sum()) < 40
    assert_same(found[kept], base[kept] + 2 * branch[kept])


def test_dropout_needs_a_branch_of_the_kind():
    layer, x = nn.Conv1d(4, 6, 3, groups=2), torch.randn(2, 4, 5)
    with pytest.raises(PlanError, match="conv reads whole: there is no branch input to drop"):
        lora_fx.apply(layer, Rule(where="*", kind="dora", rank=2, dropout=0.1), x)
    assert lora_fx.apply(layer, Rule(where="*", kind="dora", rank=2), x)
