"""Quantised exports: numbers that fit into the integers come out as they are, and slots stay in float."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import ExportError
from lora_fx.export import Session, save_onnx_adapter
from lora_fx.export.onnx import quantization
from lora_fx.export.onnx.export import export_onnx

pytestmark = pytest.mark.onnx
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

BLOCK = 32


class Net(nn.Module):
    """A Gemm, and a product whose weight is (in, out): there a graph reads A and B of the slot as they are."""

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(64, 48)
        self.w = nn.Parameter(torch.randn(48, 6))

    def forward(self, x):
        return self.lin(x).relu() @ self.w


@torch.no_grad()
def fill(weight: torch.Tensor, least: int, most: int, block: int) -> None:
    """Whole numbers along the first axis, the least and the most in every block: quantising these loses nothing."""
    weight.copy_(torch.randint(least, most + 1, weight.shape).float())
    for start in range(0, len(weight), block):
        weight[start], weight[start + 1] = least, most


def net(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A model, and inputs, of numbers that fit. int8 rounds what comes to a product too: it has one product alone."""
    torch.manual_seed(0)
    model = (Net() if kind == "int4" else nn.Sequential(nn.Linear(64, 48))).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            weight = parameter.data if name == "w" else parameter.data.t()
            fill(weight, *((-8, 7, BLOCK) if kind == "int4" else (-128, 127, len(weight))))
    x = torch.randint(0, 256, (5, 64)).float()
    x[0, :2] = torch.tensor([0.0, 255.0])
    return model, x


@torch.no_grad()
def adapt(model: nn.Module, x: torch.Tensor, *names: str) -> None:
    for name in names:
        lora_fx.apply(model, Rule("*", rank=2, alpha=2), x, name=name, check=False)
    for name, parameter in model.named_parameters():
        if name.endswith((".A", ".B")):
            parameter.normal_()


def within_rounding(report: lora_fx.ExportReport) -> bool:
    """Every output is as near to torch's as that of the float file has to be."""
    bounds = {comparison.adapter: comparison.worst.bound for comparison in report.comparisons}
    return all(loss.relative <= bounds[loss.adapter] for loss in report.quantized.losses)


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_numbers_that_fit_come_out_as_they_are_and_slots_stay_in_float(kind, tmp_path):
    model, x = net(kind)
    weights = sum(p.ndim == 2 for p in model.parameters())
    adapt(model, x, "one", "two")
    report = export_onnx(model, x, tmp_path / "m.onnx", adapters="switchable", quantize=kind)
    assert [loss.adapter for loss in report.quantized.losses] == ["no adapter", "one", "two"]
    assert within_rounding(report), report
    assert (report.quantized.kind, report.quantized.products, report.quantized.left) == (kind, weights, {})
    before, after = report.quantized.bytes
    assert after == report.bytes == (tmp_path / "m.onnx").stat().st_size < before
    save_onnx_adapter(model, tmp_path / "two.onnx_adapter", name="two")
    session = Session(tmp_path / "m.onnx", adapters={"two": tmp_path / "two.onnx_adapter"})
    with torch.no_grad():
        lora_fx.activate(model, "two")
        (found,), wanted = session.run(x, "two").values(), model(x)
    bound = next(c.worst.bound for c in report.comparisons if c.adapter == "two")
    assert lora_fx.checks.verification.relative_error(found, wanted, wanted) <= bound


@pytest.mark.parametrize("external", [False, True])
def test_a_folded_weight_is_quantised_after_the_fold_and_proven_before(external, tmp_path):
    model, x = net("int4")
    adapt(model, x, "task")
    with torch.no_grad():  # W + δ is what fits, and W is not
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B")):
                parameter.copy_(torch.randint(-1, 2, parameter.shape))
        folded = dict(lora_fx.fold(copy.deepcopy(model)).named_parameters())
        for name in ("lin.weight", "w"):
            weight = model.get_parameter(name)
            weight.sub_(folded[name] - weight)
    report = export_onnx(model, x, tmp_path / "m.onnx", prove=True, quantize="int4", external_data=external)
    assert report.proof is not None and report.proof.folded.keys() == {"lin.weight", "w"}
    assert within_rounding(report), report
    assert (report.data is not None) == external and len([*tmp_path.iterdir()]) == 1 + external
    assert report.operators["MatMulNBits"] == 2 and "Gemm" not in report.operators
    assert "proven: " in str(report) and "then quantised to int4: 2 products" in str(report)


@pytest.mark.parametrize("kind", quantization.KINDS)
def test_a_weight_that_two_products_share(kind, tmp_path):
    """onnxruntime 1.26 would turn it twice, which a square one lets it do without a word."""
    torch.manual_seed(0)
    lin, x = nn.Linear(64, 64), torch.randn(5, 64)
    made = [
        export_onnx(nn.Sequential(lin, nn.Tanh(), other).eval(), x, tmp_path / "m.onnx", quantize=kind).quantized
        for other in (lin, copy.deepcopy(lin))
    ]
    assert made[0].losses == made[1].losses and [one.products for one in made] == [2, 2]


@pytest.mark.parametrize("kind, opset", [("int4", 18), ("int8", 24)])
def test_the_error_is_reported_and_the_file_has_a_digest_of_its_own(kind, opset, tmp_path):
    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(5, 64)
    adapt(model, x, "task")
    report = export_onnx(model, x, tmp_path / "m.onnx", opset=opset, quantize=kind)
    (found,), (loss,) = Session(tmp_path / "m.onnx").run(x).values(), report.quantized.losses
    with torch.no_grad():
        difference = found.double() - model(x).double()
        size = model(x).double().square().mean().sqrt()
    assert loss.largest == report.quantized.largest == float(difference.abs().max())
    assert loss.relative == report.quantized.relative == float(difference.square().mean().sqrt() / size) > 0
    floats = export_onnx(model, x, tmp_path / "f.onnx", opset=opset)
    assert report.graph != floats.graph and floats.quantized is None
    assert not within_rounding(report) and report.largest == floats.largest


def test_nothing_is_run_without_check_and_no_logger_is_set_up(tmp_path, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    model, x = net("int4")
    for kind in quantization.KINDS:
        report = export_onnx(model, x, tmp_path / "m.onnx", quantize=kind, check=False)
        assert not report.quantized.losses and "off from torch" not in str(report)
    assert root.handlers == []


# ── refused ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(tmp_path, *words: str, model=None, x=None, **options) -> None:
    model, x = (model, x) if model is not None else net("int4")
    (tmp_path / "m.onnx").write_text("before")
    with pytest.raises(ExportError) as caught:
        export_onnx(model, x, tmp_path / "m.onnx", **{"quantize": "int4", **options})
    assert all(word in str(caught.value) for word in words), caught.value
    assert (tmp_path / "m.onnx").read_text() == "before" and len([*tmp_path.iterdir()]) == 1


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path):
    refused(tmp_path, "quantize='int3'", "choose 'int8' or 'int4'", quantize="int3")
    refused(tmp_path, "A and B are weights of the graph", "switchable", adapters="unfolded")
    refused(tmp_path, "hold all weights in memory", weights=tmp_path)
    conv = nn.Sequential(nn.Conv1d(3, 4, 2)).eval()
    refused(tmp_path, "no node multiplies", "a MatMul or a Gemm", model=conv, x=torch.randn(2, 3, 5))


@pytest.mark.parametrize(
    "kind, dtype, takes", [("int8", torch.float16, "float32"), ("int4", torch.float64, "float32 or float16")]
)
def test_floats_that_the_tool_does_not_take_are_refused(kind, dtype, takes, tmp_path):
    model, x = net("int4")
    words = ("w: it is", str(dtype).removeprefix("torch."), f"computes with {takes}", "model.float()")
    refused(tmp_path, *words, model=model.to(dtype), x=x.to(dtype), quantize=kind)


def test_float16_is_quantised_to_four_bits(tmp_path):
    model, x = nn.Sequential(nn.Linear(64, 48)).eval(), torch.randint(0, 2, (5, 64)).half()
    fill(model[0].weight.data.t(), -8, 7, BLOCK)
    report = export_onnx(model.half(), x, tmp_path / "m.onnx", quantize="int4")
    assert report.quantized.products == 1 and within_rounding(report), report


def test_what_a_tool_raises_or_returns_is_our_error(tmp_path, monkeypatch):
    def fails(*given):
        raise KeyError("a tensor")

    def infinite(file, made, external):
        quantization.KINDS["int8"].run(file, made, external)
        model = onnx.load(made)
        scale = next(t for t in model.graph.initializer if t.name.endswith("_scale"))
        scale.float_data[:] = [float("inf")] * len(scale.float_data)
        onnx.save(model, made)

    for run, words in ((fails, ("tool for broken does not take the file", "KeyError")), (infinite, ("NaN or Inf",))):
        kinds = {**quantization.KINDS, "broken": quantization.Tool(run, (torch.float32,))}
        with monkeypatch.context() as patch:
            patch.setattr(quantization, "KINDS", kinds)
            refused(tmp_path, *words, quantize="broken")
