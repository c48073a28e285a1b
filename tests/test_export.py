"""One ONNX file, and it is right: the base's own graph, torch's numbers in ONNX Runtime, and nothing after an error."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import CaptureError, ExportError
from lora_fx.export import onnx_files
from tests import reference
from tests.zoo import case

pytestmark = pytest.mark.onnx


class Net(nn.Module):
    """A convolution, a fused qkv with SDPA, a residual: and an integer beside the floats."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(5, 12, 3, padding=1), nn.LayerNorm(12)
        self.qkv, self.out, self.head = nn.Linear(12, 36), nn.Linear(12, 12), nn.Linear(12, 7)

    def forward(self, x):
        x = self.norm(self.conv(x).transpose(1, 2))
        q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        logits = self.head(x + self.out(y))
        return logits, logits.argmax(-1)


X = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0))
DYNAMIC = ({0: "batch", 2: "length"},)


@pytest.fixture(scope="module")
def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = lora_fx.apply(Net().eval(), Rule(where="*", rank=2, alpha=4), X)
    reference.fill(model)
    return model


def nodes(path) -> list[tuple]:
    import onnx

    graph = onnx.load(path).graph
    return [(n.op_type, tuple(n.input), tuple(n.output)) for n in graph.node]


def test_the_folded_graph_is_the_base_graph_and_the_branches_are_nodes_without_it(adapted, tmp_path):
    base = copy.deepcopy(adapted)
    lora_fx.remove(base, "default")
    state, classes = reference.bits(adapted), reference.classes(adapted)
    reports = {
        form: lora_fx.export_onnx(model, X, tmp_path / form, dynamic_shapes=DYNAMIC, adapters=adapters)
        for form, model, adapters in (
            ("base", base, "folded"),
            ("folded", adapted, "folded"),
            ("unfolded", adapted, "unfolded"),
        )
    }
    assert nodes(tmp_path / "base") == nodes(tmp_path / "folded")
    assert reports["unfolded"].nodes > reports["folded"].nodes == reports["base"].nodes
    assert reports["folded"].form == "folded" and reports["folded"].adapters == ("default",)
    assert reference.same_bits(reference.bits(adapted), state) and reference.classes(adapted) == classes
    for report in reports.values():
        assert len(report.comparisons) == 2 and all(c.equivalent for c in report.comparisons)
        assert report.comparisons[0].shapes != report.comparisons[1].shapes  # the second one is new to the file
        assert len(report.comparisons[0].reports) == 2  # the integer output is compared as well


def test_the_file_tells_what_it_is_and_nothing_of_this_machine(adapted, tmp_path):
    import onnx

    lora_fx.export_onnx(adapted, X, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    properties = {p.key: p.value for p in model.metadata_props}
    assert any("default" in value for value in properties.values())
    raw = (tmp_path / "model.onnx").read_bytes()
    assert str(tmp_path).encode() not in raw and b"site-packages" not in raw and b".py" not in raw
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["gpt2", "bert", "native-encoder"])
def test_models_of_any_origin(name, tmp_path):
    model, inputs = case(name).build()
    lora_fx.apply(model, Rule(when=lambda s: min(s.in_features, s.out_features) > 1, rank=2), inputs)
    reference.fill(model)
    report = lora_fx.export_onnx(model, inputs, tmp_path / "model.onnx")
    assert report.form == "folded" and all(c.equivalent for c in report.comparisons)
    assert not any(hasattr(type(m), "training") and m.training for m in model.modules())


def test_keyword_inputs_with_dynamic_axes_run_at_another_length(tmp_path):
    import onnxruntime

    model, inputs = case("llama").build()
    shapes = {"input_ids": {0: "batch", 1: "tokens"}}
    ids = {"input_ids": inputs["input_ids"]}
    lora_fx.export_onnx(model, ids, tmp_path / "model.onnx", dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    longer = torch.arange(3 * 11).reshape(3, 11)
    (logits, *_) = session.run(None, {session.get_inputs()[0].name: longer.numpy()})
    assert logits.shape[:2] == (3, 11)


def test_a_file_that_is_not_the_model_is_an_error_and_leaves_the_old_one(adapted, tmp_path, monkeypatch):
    import onnx
    from onnx import numpy_helper

    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old file")

    def damaged(file):
        model = onnx.load(file)
        weight = max(model.graph.initializer, key=lambda t: len(t.raw_data))
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
        onnx.save(model, file)

    check = onnx_files._check_file
    monkeypatch.setattr(onnx_files, "_check_file", lambda file: (damaged(file), check(file)))
    with pytest.raises(ExportError) as caught:
        lora_fx.export_onnx(adapted, X, path)
    assert caught.value.reason and caught.value.place and caught.value.remedy
    assert path.read_bytes() == b"the old file" and [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize(
    ("change", "kind", "parts"),
    [
        (dict(path="missing/model.onnx"), ExportError, ("does not exist", "missing")),
        (dict(path="."), ExportError, ("is a folder",)),
        (dict(opset=17), ExportError, ("opset 17", "18 to 24")),
        (dict(opset=25), ExportError, ("opset 25",)),
        (dict(opset="20"), ExportError, ("opset '20'",)),
        (dict(adapters="both"), ExportError, ("adapters='both'", "unfolded")),
        (dict(example_inputs=torch.zeros(2, 4, 9)), CaptureError, ("example_inputs",)),
        (dict(dynamic_shapes=({7: "batch"},)), ExportError, ("7",)),
        (dict(dynamic_shapes={"y": {0: "batch"}}), ExportError, ("y",)),
    ],
    ids=["no-folder", "folder", "opset-17", "opset-25", "opset-text", "adapters", "inputs", "axis", "input-name"],
)
def test_refusals_write_nothing(adapted, tmp_path, monkeypatch, change, kind, parts):
    monkeypatch.chdir(tmp_path)
    state = reference.bits(adapted)
    arguments = dict(example_inputs=X, path="model.onnx") | change
    with pytest.raises(kind) as caught:
        lora_fx.export_onnx(adapted, **arguments)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert caught.value.reason and caught.value.place and caught.value.remedy
    assert not list(tmp_path.iterdir()) and reference.same_bits(reference.bits(adapted), state)


def test_meta_models_and_missing_packages_are_refused(adapted, tmp_path, monkeypatch):
    with torch.device("meta"):
        empty = Net()
    with pytest.raises(ExportError, match="on meta"):
        lora_fx.export_onnx(empty, X.to("meta"), tmp_path / "model.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"onnxruntime cannot be imported[\s\S]*lora-fx\[onnx\]"):
        lora_fx.export_onnx(adapted, X, tmp_path / "model.onnx")
