"""What torch leaves open, or says in a way of its own: rows of padding, complex numbers, `torch.cond`, a last dict."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import export_onnx
from lora_fx.checks.verification import compare, noise_floor
from lora_fx.errors import ExportError
from lora_fx.export.onnx import runs
from lora_fx.export.onnx.padding import Padded
from tests import reference

pytestmark = pytest.mark.onnx
pytest.importorskip("onnxscript")

#: at opsets 18 to 22 attention to nothing is the mean of the values, from 23 on it is 0, as in torch
OLD, NEW = 20, 23


class Decoder(nn.Module):
    """Two layers of causal attention over tokens of which a mask leaves some out.

    Args:
        leaks: a sum over all tokens before carries rows of padding into rows that are none.
        pads: what the mask says of padding.
    """

    def __init__(self, leaks: bool = False, pads: int = 0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.leaks, self.pads = leaks, pads
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(nn.ModuleDict({n: nn.Linear(8, 8) for n in "qkvo"}) for _ in range(2))
        self.head = nn.Linear(8, 16)
        self.register_buffer("fixed", torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]))

    def forward(self, ids, mask=None):
        h = self.embed(ids)
        real = (self.fixed if mask is None else mask) != self.pads
        seen = real[:, None, None, :] & torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        for layer in self.layers:
            q, k, v = (layer[n](h).unflatten(-1, (2, 4)).transpose(1, 2) for n in "qkv")
            h = h + layer["o"](F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2))
            h = h.cumsum(1) if self.leaks else h
        return {"logits": self.head(h), "key": k}


IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


@pytest.mark.parametrize(("mask", "pads"), [(LEFT, 0), (LEFT == 0, 1)], ids=["int", "inverted"])
def test_rows_of_padding_are_held_against_the_mean_and_counted(tmp_path, mask, pads):
    report = export_onnx(Decoder(pads=pads), {"ids": IDS, "mask": mask}, tmp_path / "m.onnx", opset=OLD)
    (comparison,) = report.comparisons
    assert comparison.equivalent and len(comparison.reports) == 2
    assert comparison.padded == (Padded("logits", 2, 10, "mask"), Padded("key", 2, 10, "mask"))
    text = "2 of 10 rows of logits, 2 of 10 rows of key are padding by mask, where attention to nothing is 0 in torch"
    assert text in str(report)


def test_on_every_shape(tmp_path):
    axes = {0: "batch", 1: "tokens"}
    model, inputs = Decoder(), {"ids": IDS, "mask": LEFT}
    lora_fx.apply(model, lora_fx.Rule(where="layers.*", rank=2), inputs)
    reference.fill(model)
    report = export_onnx(model, inputs, tmp_path / "m.onnx", dynamic_shapes=dict.fromkeys(inputs, axes))
    assert len(report.comparisons) == 3
    assert all(c.padded[0].output == "logits" and 0 < c.padded[0].rows < c.padded[0].of for c in report.comparisons)


@pytest.mark.parametrize(("opset", "mask"), [(NEW, LEFT), (OLD, LEFT.flip(1))])
def test_nothing_is_said_where_nothing_differs(tmp_path, opset, mask):
    report = export_onnx(Decoder(), {"ids": IDS, "mask": mask}, tmp_path / "m.onnx", opset=opset)
    assert [c.padded for c in report.comparisons] == [()] and "padding" not in str(report)


@pytest.mark.parametrize("inputs", [{"ids": IDS, "mask": LEFT}, {"ids": IDS}], ids=["leaks", "no mask"])
def test_padding_that_reaches_other_rows_is_refused(tmp_path, inputs):
    """With a remedy that helps, each half of it. Where no input says what is padding, every row may be read."""
    model = Decoder(leaks="mask" in inputs)
    with pytest.raises(ExportError, match="a query attends to nothing") as caught:
        export_onnx(model, inputs, tmp_path / "m.onnx", opset=OLD)
    assert "pass example inputs without padding, or export with opset=23" in str(caught.value)
    assert not [*tmp_path.iterdir()]
    if "mask" in inputs:
        assert export_onnx(model, inputs, tmp_path / "m.onnx", opset=NEW).comparisons
        assert export_onnx(model, inputs | {"mask": torch.ones_like(LEFT)}, tmp_path / "m.onnx").comparisons


@pytest.mark.parametrize("row", [(0, 0), (1, 4)], ids=["padding", "token"])
def test_an_error_in_any_row_is_still_seen(tmp_path, monkeypatch, row):
    real = runs.run_session

    def wrong(*args):
        outputs = real(*args)
        outputs[0][row] += outputs[0].square().mean().sqrt() * 2**-10
        return outputs

    monkeypatch.setattr(runs, "run_session", wrong)
    with pytest.raises(ExportError, match="not the model"):
        export_onnx(Decoder(), {"ids": IDS, "mask": LEFT}, tmp_path / "m.onnx", opset=OLD)
    assert not [*tmp_path.iterdir()]


def test_a_number_that_is_not_finite_gives_no_bound():
    """As in the float64 copy of a model whose mask overflows there: any file would have kept a bound of infinity."""
    exact, own = torch.tensor([math.inf, 1.0]), torch.tensor([3.0, 1.0])
    floor = noise_floor(exact, own)
    assert math.isfinite(floor)
    assert not compare(own, own + 1, exact, floor, torch.float32) and compare(own, own, exact, floor, torch.float32)


class Overflowing(nn.Module):
    """As CANINE: 0 times the least number of the weights' dtype, in float32; NaN where the weights are float64."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(6, 4)

    def forward(self, x):
        return self.l(x) + torch.zeros(1, dtype=torch.float32) * torch.finfo(self.l.weight.dtype).min


class Full(Overflowing):
    """As XGLM, which raises there: the least number of the weights' dtype is none of float32."""

    def forward(self, x):
        return torch.maximum(self.l(x), torch.full((), torch.finfo(self.l.weight.dtype).min))


@pytest.mark.parametrize("kind", [Overflowing, Full])
def test_where_float64_overflows_the_models_own_dtype_says_what_rounding_does(kind, tmp_path):
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    model = lora_fx.apply(kind(), lora_fx.Rule(where="l", rank=2), x)
    nn.init.normal_(model.l.weight_lora_default.B)
    assert export_onnx(model, x, tmp_path / "m.onnx", opset=OLD).comparisons
    other = copy.deepcopy(model)
    lora_fx.fold(other)
    report = lora_fx.verify(model, other, x)
    assert report and report.noise > 0
    with torch.no_grad():
        other.l.bias.mul_(2)
    assert not lora_fx.verify(model, other, x)


# ── what torch says in a way of its own ──────────────────────────────────────────────────────────────────────────────


class Rotary(nn.Module):
    """Complex numbers in a buffer and in a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)
        angle = torch.outer(torch.arange(5.0), torch.tensor([1.0, 0.1, 0.01, 0.001]))
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angle), angle))
        self.mix = nn.Parameter(torch.randn(4, 6, dtype=torch.complex64))

    def forward(self, x):
        turned = torch.view_as_complex(self.l(x).unflatten(-1, (4, 2))) * self.freqs_cis
        return torch.view_as_real(turned @ self.mix)


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l, self.a, self.b = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x):
        h = self.l(x)
        return torch.cond(h.sum() > 0, lambda h: h @ self.a, lambda h: (h @ self.b).relu(), (h,))


class LastDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)

    def forward(self, x, more):
        return self.l(x) * more["scale"] + more["shift"]


class OneHead(nn.Module):
    """Falcon's attention: two heads of queries, one of keys and values."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.l = heads, nn.Linear(8, 8)

    def forward(self, x):
        q = self.l(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k = q[:, : self.heads]
        return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=self.heads == 2)


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
CASES = {
    "complex": (Rotary, (X,), OLD),
    "cond": (Branches, (X,), OLD),
    "cond, the other way": (Branches, (-X,), OLD),
    "last dict": (LastDict, (X, {"scale": X.flip(0), "shift": X.flip(1)}), OLD),
    "one head of keys": (lambda: OneHead(1), (X,), NEW),
    "as many heads": (lambda: OneHead(2), (X,), NEW),
}


@pytest.mark.parametrize("name", CASES)
def test_what_torch_says_in_a_way_of_its_own(tmp_path, name):
    build, inputs, opset = CASES[name]
    torch.manual_seed(0)
    model = build()
    lora_fx.apply(model, lora_fx.Rule(where="l", rank=2), inputs)
    reference.fill(model)
    with torch.no_grad():
        before = model(*inputs)
    report = export_onnx(model, inputs, tmp_path / "m.onnx", opset=opset, prove=True)
    (comparison,) = report.comparisons
    assert comparison.equivalent and comparison.worst.bound < 2**-10  # complex weights made real would move it by more
    with torch.no_grad():  # a failed `torch.cond` would have been the last one of the process
        assert torch.equal(model(*inputs), before)
