"""`prove=True`: the folded file is the base graph with correctly rounded sums in it, and any other file is an error."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import ExportError
from lora_fx.export.onnx import export as onnx_export
from lora_fx.export.onnx import optimization as onnx_optimization
from lora_fx.export.onnx import proof as onnx_proof
from lora_fx.export.onnx import weights as onnx_weights
from tests import reference
from tests.onnx_proofs import Variant, export

pytestmark = pytest.mark.onnx
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")

X = torch.linspace(-1, 1, 15).reshape(3, 5)


class Net(nn.Module):
    """A weight that is adapted, one that is not, and one that the forward reads only where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.idle = nn.Linear(5, 9), nn.Linear(9, 4), nn.Linear(5, 7)

    def forward(self, x, more=False):
        y = self.down(self.up(x).tanh())
        return y + self.idle(x).sum() if more else y


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 40), nn.Linear(40, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


def adapted(model: nn.Module, rule: Rule | None = None, inputs=X) -> nn.Module:
    torch.manual_seed(0)
    lora_fx.apply(model.eval(), rule or Rule(where="up", rank=2, alpha=3), inputs)
    reference.fill(model)
    return model


@pytest.mark.parametrize(
    "variant",
    [
        Variant("bert", 20, True, True),
        Variant("native-mha", 18, False, False),
        Variant("native-batchnorm", 23, True, True),
        Variant("native-called-thrice", 23, False, True),
        Variant("native-tied", 18, True, False),
        Variant("convnext", 20, False, False),
    ],
    ids=str,
)
def test_a_sample_of_the_table_of_proofs(variant, tmp_path):
    """The whole table: ``python -m tests.onnx_proofs``."""
    report = export(variant, tmp_path)
    assert report.proof is not None and report.proof.folded and len(report.comparisons) == 3
    assert report.proof.fused == report.proof.base_fused and report.proof.graph == report.graph


def test_the_proof_counts_what_it_saw(tmp_path):
    model = adapted(Net(), Rule(where="up | idle", rank=2), (X, True))
    report = lora_fx.export_onnx(model, X, tmp_path / "m.onnx", prove=True)
    assert dict(report.proof.folded) == {"up.weight": 45} and report.proof.unread == ("idle.weight",)
    assert report.proof.untouched == 3 and not report.proof.evaluated and not report.proof.split
    for said in (
        "proven",
        "45 elements of 1 folded weights",
        "3 initializers",
        "not read by the model here: idle.weight",
    ):
        assert said in str(report)


def test_a_copy_that_the_fold_split_off_stands_for_the_weight_it_was(tmp_path):
    ids = torch.arange(10).reshape(2, 5)
    report = lora_fx.export_onnx(
        adapted(Tied(), Rule(form="linear", rank=2), ids), ids, tmp_path / "m.onnx", prove=True
    )
    assert dict(report.proof.split) == {"embed.weight": "head.weight"} and dict(report.proof.folded) == {
        "head.weight": 12000
    }
    assert "untied: embed.weight from head.weight" in str(report)


def test_a_folded_model_is_proven_and_is_folded_again(tmp_path):
    model = lora_fx.fold(adapted(Net()))
    before = reference.bits(model)
    report = lora_fx.export_onnx(model, X, tmp_path / "m.onnx", prove=True)
    assert report.form == "folded" and dict(report.proof.folded) == {"up.weight": 45}
    assert reference.same_bits(before, reference.bits(model)) and lora_fx.unfold(model) is model


def test_the_file_says_what_was_folded_into_it(tmp_path):
    model = adapted(Net())
    report = lora_fx.export_onnx(model, X, tmp_path / "m.onnx", check=False)
    about = {p.key: p.value for p in onnx.load(report.path).metadata_props}
    assert json.loads(about["lora_fx.weights"])["up.weight"] == [
        {"adapter": "default", "rank": 2, "alpha": 3.0, "scale": 1.5, "role": "other"}
    ]
    assert about["lora_fx.graph"] == report.graph and about["lora_fx.version"]
    with torch.no_grad():
        model.up.weight_lora_default.A[0, 0] += 1e-6
    other = lora_fx.export_onnx(model, X, tmp_path / "n.onnx", check=False)
    again = {p.key: p.value for p in onnx.load(other.path).metadata_props}
    digests = "lora_fx.adapter_sha256", "lora_fx.sha256"
    assert all(again[key] != about[key] for key in digests)
    assert again | dict.fromkeys(digests) == about | dict.fromkeys(digests)
    assert report.comparisons == () and "NOT RUN" in str(report) and "check=False" in str(report)


def test_exporting_makes_no_copy_of_the_model(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("a copy")

    model = adapted(Net())
    monkeypatch.setattr(nn.Module, "__deepcopy__", refuse, raising=False)
    lora_fx.export_onnx(model, X, tmp_path / "m.onnx", check=False, prove=True)


def test_a_model_can_be_exported_as_the_exporter_leaves_it(tmp_path):
    model = adapted(Net())
    plain = lora_fx.export_onnx(model, X[None], tmp_path / "p.onnx", optimize=False, prove=True)
    assert plain.operators["Transpose"] == 2
    assert "Transpose" not in lora_fx.export_onnx(model, X[None], tmp_path / "o.onnx", check=False).operators


def test_names_of_inputs_and_outputs(tmp_path):
    model = adapted(Net())
    report = lora_fx.export_onnx(model, X, tmp_path / "m.onnx", check=False, input_names=["a"], output_names=["tanh"])
    assert [i.name for i in report.inputs] == ["a"] and [o.name for o in report.outputs] == ["tanh"]
    onnx.checker.check_model(str(report.path), full_check=True)
    with pytest.raises(ExportError, match="2 names for 1 tensors") as caught:
        lora_fx.export_onnx(model, X, tmp_path / "n.onnx", check=False, output_names=["a", "b"])
    assert caught.value.place == "output_names" and "one name for each" in caught.value.remedy


def test_an_example_of_one_row_leaves_the_axis_dynamic(tmp_path):
    report = lora_fx.export_onnx(adapted(Net()), X[:1], tmp_path / "m.onnx", dynamic_shapes={"x": {0: "rows"}})
    rows = [comparison.shapes[0][0] for comparison in report.comparisons]
    assert rows[0] == 1 and len({*rows}) == 3 and report.inputs[0].shape == ("rows", 5)


# ── a wrong file is no proof ─────────────────────────────────────────────────────────────────────────────────────────


def unproven(model, tmp_path, *parts: str, **options) -> None:
    kept = reference.bits(model)
    with pytest.raises(ExportError) as caught:
        lora_fx.export_onnx(model, X, tmp_path / "m.onnx", prove=True, check=False, **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert not list(tmp_path.iterdir()) and reference.same_bits(kept, reference.bits(model))


def test_one_element_one_bit_off_is_found(tmp_path, monkeypatch):
    real = onnx_weights.Weight.numbers

    def nudged(self):
        numbers = real(self).clone()
        if self.adapters:
            numbers[1, 2] = torch.nextafter(numbers[1, 2], torch.tensor(torch.inf))
        return numbers

    monkeypatch.setattr(onnx_weights.Weight, "numbers", nudged)
    unproven(adapted(Net()), tmp_path, "up.weight", "1 of 45 elements are not W + δ rounded once", "nothing was")


def test_a_weight_that_no_adapter_is_on_must_stay(tmp_path, monkeypatch):
    def touched(unfilled, weights, real=onnx_export.fill):
        if any(weight.adapters for weight in weights.values()):
            model.down.weight.data[0, 0] += 1
        return real(unfilled, weights)

    model = adapted(Net())
    kept = model.down.weight.data.clone()
    real = onnx_export.save_model

    def restored(graph, path, *options):
        files = real(graph, path, *options)
        model.down.weight.data.copy_(kept)
        return files

    monkeypatch.setattr(onnx_export, "fill", touched)
    monkeypatch.setattr(onnx_export, "save_model", restored)
    unproven(model, tmp_path, "down.weight", "its numbers are not the base's")


@pytest.mark.parametrize("change", ["operator", "attribute", "name", "edge"])
def test_another_graph_is_found(tmp_path, monkeypatch, change):
    import onnx_ir

    real = onnx_export.save_model

    def changed(graph, path, *rest):
        node = next(node for node in graph.graph if node.op_type == "Gemm")
        if change == "operator":
            next(node for node in graph.graph if node.op_type == "Tanh").op_type = "Sigmoid"
        elif change == "attribute":
            node.attributes["alpha"] = onnx_ir.AttrFloat32("alpha", 1.0 + 1e-6)
        elif change == "name":
            node.name = "another"
        else:
            node.replace_input_with(2, None)
        return real(graph, path, *rest)

    monkeypatch.setattr(onnx_export, "save_model", changed)
    unproven(adapted(Net()), tmp_path, "the graph is not the base's", "where the base has", "m.onnx")


def test_branches_that_were_traced_are_found(tmp_path, monkeypatch):
    """What was traced for the file is not the base then, which is translated by itself."""
    monkeypatch.setattr(onnx_weights, "unwired", lambda model: nullcontext())
    unproven(adapted(Net()), tmp_path, "the graph is not the base's")


def test_a_graph_that_was_made_for_the_folded_numbers_is_found(tmp_path, monkeypatch):
    """The optimizer drops a bias of zeros, if it sees them."""

    def sighted(graph, weights, wanted=True):
        if not any(weight.adapters for weight in weights.values()):
            return blind(graph, weights, wanted)
        with monkeypatch.context() as patch:
            patch.setattr(onnx_optimization, "_optimize_blind", lambda graph: (real(graph), drop(graph)))
            found = blind(graph, weights, wanted)
        return dataclasses.replace(found, empty=found.empty - {"up.weight"})

    def drop(graph):
        next(node for node in graph.graph if node.op_type == "Gemm").replace_input_with(2, None)

    real = onnx_optimization._optimize_blind
    blind = onnx_export.blind
    monkeypatch.setattr(onnx_export, "blind", sighted)
    unproven(adapted(Net()), tmp_path, "the graph is not the base's")


@pytest.mark.parametrize("split", [False, True], ids=["the base was traced", "a copy was split off"])
def test_the_base_is_translated_again_where_another_model_was_traced(tmp_path, monkeypatch, split):
    calls, real = [], torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **options: calls.append(0) or real(*given, **options))
    ids = torch.arange(10).reshape(2, 5)
    model, x = (adapted(Tied(), Rule(form="linear", rank=2), ids), ids) if split else (adapted(Net()), X)
    proof = lora_fx.export_onnx(model, x, tmp_path / "m.onnx", prove=True, check=False).proof
    assert len(calls) == 1 + split and bool(proof.split) == split


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped")
def test_a_proof_maps_one_weight_after_another(tmp_path, monkeypatch):
    """A page that was read stays in memory while it is mapped: in the end the whole file would be."""
    seen, real = [], onnx_proof.operators

    def looked(file):
        seen.append(sum("m.onnx.data" in line for line in Path("/proc/self/maps").read_text().splitlines()))
        return real(file)

    monkeypatch.setattr(onnx_proof, "operators", looked)
    ids = torch.arange(10).reshape(2, 5)
    model = adapted(Tied(), Rule(form="linear", rank=2), ids)
    lora_fx.export_onnx(model, ids, tmp_path / "m.onnx", prove=True, check=False, external_data=True)
    assert seen == [0]


def test_with_its_branches_a_file_is_not_proven(tmp_path):
    model = adapted(Net())
    for form in ("unfolded", "switchable"):
        unproven(model, tmp_path, "prove", form, "leave prove out", adapters=form)


def test_numbers_that_do_not_fit_are_refused_before_a_file_is_there(tmp_path):
    model = adapted(Net()).half()
    with torch.no_grad():
        model.up.weight_lora_default.B.fill_(3e4)
        model.up.weight_lora_default.A.fill_(3e4)
    with pytest.raises(lora_fx.LoraFxError, match=r"does not fit|NaN or Inf") as caught:
        lora_fx.export_onnx(model, X.half(), tmp_path / "m.onnx")
    assert caught.value.place == "up.weight" and not list(tmp_path.iterdir())


def test_the_model_is_what_it_was_whatever_ends_the_export(tmp_path, monkeypatch):
    ids = torch.arange(10).reshape(2, 5)
    for form in ("folded", "switchable"):
        model = adapted(Tied(), Rule(form="linear", rank=2), ids)
        before, classes, keys = reference.bits(model), reference.classes(model), set(vars(model))

        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(torch.onnx, "export", stop)
            with pytest.raises(KeyboardInterrupt):
                lora_fx.export_onnx(model, ids, tmp_path / "m.onnx", adapters=form)
        assert reference.same_bits(before, reference.bits(model)) and reference.classes(model) == classes
        assert set(vars(model)) == keys and model.head.weight is model.embed.weight
