"""The kind `bias`: where the bias of a site is found, and where it is refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import PlanError
from lora_fx.model.inventory import inventory
from tests.kinds import Uses, fill, refused


def test_a_site_without_a_bias_is_refused_by_name():
    refused(Rule(where="raw", kind="bias"), PlanError, "raw: the kind 'bias' adapts a bias, and the weight has none")
    refused(Rule(where="conv* | up", kind="bias"), PlanError, "conv.weight: .*has none")


def test_a_bias_that_others_read_too_is_refused():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.bias = self.a.bias

        def forward(self, x):
            return self.b(self.a(x))

    shared, x = Shared(), torch.randn(2, 4)
    with pytest.raises(PlanError, match="linear in b reads it too"):
        lora_fx.apply(shared, Rule(where="a", kind="bias"), x)
    fill(lora_fx.apply(shared, Rule(where="a | b", kind="bias"), x))
    assert lora_fx.certify(shared, x)


def test_a_bias_is_found_where_it_is_added():
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.shift = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return (x @ self.w + self.shift).relu()

    added, x = Added(), torch.randn(2, 4)
    fill(lora_fx.apply(added, Rule(where="w", kind="bias"), x))
    assert [place.weight for place in inventory(added).places] == ["shift"]
    assert lora_fx.certify(added, x)


def test_the_biases_of_torchs_own_recurrent_modules():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x):
            return self.net(x)[0]

    net, x = Net(), torch.randn(2, 5, 4)
    base = copy.deepcopy(net)
    lora_fx.apply(net, Rule(where="*", kind="bias"), x)
    assert {place.attribute for place in inventory(net).places} == {"bias_ih_l0", "bias_hh_l0"}
    assert torch.equal(net(x), base(x))
    fill(net)
    assert lora_fx.certify(net, x) and not torch.equal(net(x), base(x))


@pytest.mark.parametrize(
    "read", [lambda b: b.view(-1), lambda b: b.to(torch.float32), lambda b: b.to(torch.float32)[0]]
)
def test_a_bias_is_found_behind_views_and_casts(read):
    torch.manual_seed(0)
    layer, x = Uses(lambda x, w, b: F.linear(x, w, read(b)), (5, 4), (1, 5)).float(), torch.randn(3, 4)
    layer.b = nn.Parameter(layer.b.double())
    if read(layer.b).dtype == torch.float64:
        layer.float()
    base = copy.deepcopy(layer)
    fill(lora_fx.apply(layer, Rule(where="w", kind="bias"), x))
    assert [place.weight for place in inventory(layer).places] == ["b"]
    assert lora_fx.certify(layer, x) and not torch.equal(layer(x), base(x))


def test_a_part_of_a_weight_whose_bias_is_one_number_has_none_of_its_own():
    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.b = nn.Parameter(torch.randn(8, 24)), nn.Parameter(torch.randn(1))

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (x @ self.w + self.b).chunk(3, -1))
            return F.scaled_dot_product_attention(q, k, v)

    fused, x = Fused(), torch.randn(2, 5, 8)
    with pytest.raises(PlanError, match=r"its bias has 1 elements for 24 features: no part of it is attention\.query"):
        lora_fx.apply(fused, Rule(role="attention.query", kind="bias"), x)
    fill(lora_fx.apply(fused, Rule(where="w", kind="bias"), x))
    assert lora_fx.certify(fused, x)
