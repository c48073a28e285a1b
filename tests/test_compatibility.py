"""The compatibility run is told by what it says of models that are right, wrong, loud and late."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import lora_fx
from tests import zoo
from tests.compatibility import Model, checking, naming, onnx_files, onnx_report, report, running
from tests.compatibility.__main__ import main
from tests.compatibility.transformers_models import tiny


class Small(nn.Module):
    """Two linears, and a place where a fault can be planted."""

    def __init__(self, fault=None) -> None:
        super().__init__()
        self.up, self.down, self.fault = nn.Linear(6, 9), nn.Linear(9, 5), fault

    def forward(self, x):
        if self.fault:
            self.fault()
        return self.down(self.up(x).relu())


def small(fault=None) -> Model:
    return Model("ours", "small", lambda: (Small(fault), torch.randn(3, 6)))


@pytest.mark.filterwarnings("ignore:.*PEFT reads the file, and its merge would be wrong")  # as of every tied weight
@pytest.mark.parametrize("name", ["gpt2", "qwen2-moe-eager"])
def test_a_model_of_the_zoo_is_right(name):
    row = checking.check(Model("zoo", name, zoo.case(name).build))
    assert row.verdict == "right" and not row.faults, row
    assert row.adapters > 4 and row.agreeing > 2


def test_another_scale_than_was_asked_for_is_wrong_in_the_branch_and_in_the_fold(monkeypatch):
    def careless(verb, rule, *rest, pipeline=lora_fx.pipeline):
        return pipeline(verb, replace(rule, alpha=2.8), *rest)

    monkeypatch.setattr(lora_fx, "pipeline", careless)
    row = checking.check(small())
    assert row.verdict == "wrong"
    assert {text.partition(":")[0] for text in row.wrong} == {"outputs", "gradients", "training", "fold"}


def test_a_fold_that_rounds_once_more_is_wrong(monkeypatch):
    def careless(model, fold=lora_fx.fold):
        fold(model)
        weight = model.up.weight.data
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(10.0))
        return model

    monkeypatch.setattr(lora_fx, "fold", careless)
    row = checking.check(small())
    assert row.verdict == "wrong"
    assert row.wrong == ["fold: up.weight: 1 elements are not W + s·B·A, rounded once"]


def test_what_is_none_of_our_errors_is_raw_and_what_is_one_is_a_refusal(monkeypatch):
    def raising(error):
        def save(*args, **options):
            raise error

        return save

    monkeypatch.setattr(lora_fx, "save_adapter", raising(KeyError("weight")))
    row = checking.check(small())
    assert row.verdict == "raw" and row.raw[0].startswith("save: KeyError: 'weight'")
    ours = lora_fx.errors.AdapterError("no adapter", place="up.weight", remedy="apply one")
    monkeypatch.setattr(lora_fx, "save_adapter", raising(ours))
    row = checking.check(small())
    assert row.verdict == "refused" and not row.faults
    assert row.refused == ["save: AdapterError: up.weight: no adapter"]


class No:
    rows = (SimpleNamespace(weight="up.weight", module="up", problem="it is missed"),)
    whole = ()

    def __bool__(self) -> bool:
        return False


def test_a_certificate_that_says_no_is_told(monkeypatch):
    monkeypatch.setattr(lora_fx, "certify", lambda *args: No())
    row = checking.check(small())
    assert row.verdict == "not certified" and row.faults == ["up.weight in up: it is missed"]


def test_a_model_that_does_not_run_by_itself_is_not_counted():
    def fault():
        raise ValueError("no such input")

    row = checking.check(small(fault))
    assert row.verdict == "does not run" and row.idle == "ValueError: no such input" and not row.faults
    row = checking.check(Model("ours", "noise", lambda: (Noisy(), torch.ones(2, 4))))
    assert row.verdict == "does not run" and "NaN" in row.idle


class Noisy(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x):
        return super().forward(x) * torch.nan


def test_a_model_that_ends_its_process_or_takes_too_long_is_one_row_and_no_more():
    def endless():
        while True:
            pass

    models = [small(lambda: os._exit(3)), small(endless), small()]
    rows = list(running.run(models, 3, running.Limits(seconds=4.0)))
    said = sorted(text for row in rows for text in row.raw)
    assert len(rows) == 3 and len(said) == 2
    assert said[0].startswith("the process ended with 3") and said[1].startswith("the time limit")


def test_roles_are_held_against_names_that_mean_one_thing():
    def row(name, role):
        return SimpleNamespace(weight=SimpleNamespace(name=name, names=(name,)), role=role)

    rows = [
        row("layers.0.self_attn.q_proj.weight", "attention.query"),
        row("layers.0.attention.query_key_value.weight", "attention.query, attention.key, attention.value"),
        row("layers.0.mlp.gate_proj.weight", "router"),
        row("layers.0.self_attn.k_proj.weight", "other"),
        row("something.weight", "mlp.up"),
    ]
    assert naming.contradictions(rows) == (2, 1, ["layers.0.mlp.gate_proj.weight is taken for router"])


def test_a_config_is_made_small_and_stays_consistent():
    large = dict(hidden_size=4096, num_attention_heads=32, num_hidden_layers=36, vocab_size=150000, pad_token_id=149999,
                 head_dim=None, layer_types=["sliding"] * 5 + ["full"] * 31, per_layer=[1] * 36, use_cache=True,
                 inner=dict(d_kv=128), scale=0.5)  # fmt: skip
    assert tiny(large) == dict(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, vocab_size=101, pad_token_id=59, head_dim=8,
        layer_types=["sliding", "full"], per_layer=[1, 1], use_cache=False, inner=dict(d_kv=8), scale=0.5,
    )  # fmt: skip


def test_the_table_counts_each_model_once_by_the_worst_that_happened(tmp_path):
    rows = [
        checking.Row("p", "a", 3), checking.Row("p", "b", 2, wrong=["fold: x"], raw=["run: KeyError: y.z.w"]),
        checking.Row("p", "c", 2, refused=["apply: PlanError: a.b: no"]), checking.Row("p", "d", idle="no inputs"),
    ]  # fmt: skip
    for row in rows:
        report.append(tmp_path / "rows", row)
    assert report.read(tmp_path / "rows") == rows
    text = report.report(rows, {"p": "1.0", "torch": "2.13.0"})
    assert "| p | 1.0 | 3 | 7 | 1 | 1 | 0 | 1 | 0 | 0 | 0 | 1 |" in text
    assert "- apply: PlanError: …: no: c" in text and "**p**: a, b, c." in text


def test_an_unknown_package_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--here", "--package", "nobody"])
    assert "invalid choice: 'nobody'" in capsys.readouterr().err


# ── ONNX files ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def files(monkeypatch):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_files, "OPSETS", (20,))
    return onnx_files


def test_files_of_a_model_are_right_folded_and_switchable(files):
    row = files.check(small())
    assert row.verdict == "right" and row.adapters == 2, row
    assert row.files == {"folded 20": "batch", "switchable 20": "batch"} and not row.theirs


def test_a_file_with_another_weight_is_wrong(files, monkeypatch):
    import onnx

    def careless(model, inputs, path, export=lora_fx.export_onnx, **options):
        export(model, inputs, path, **options)
        file = onnx.load(path)
        weights = [t for t in file.graph.initializer if t.name == "up.weight"]
        numbers = onnx.numpy_helper.to_array(weights[0]).copy()
        numbers[0, 0] += 0.01
        weights[0].CopyFrom(onnx.numpy_helper.from_array(numbers, weights[0].name))
        onnx.save(file, path)

    monkeypatch.setattr(lora_fx, "export_onnx", careless)
    monkeypatch.setattr(files, "FORMS", ("switchable",))
    row = files.check(small())
    assert row.verdict == "wrong" and not row.files
    assert "switchable, opset 20, batch: 4 of 4 slots fed" in row.wrong[0] and "DIFFERENT" in row.wrong[0]


def test_a_refusal_is_ours_where_torch_exports_the_base_and_torchs_where_it_does_not(files, monkeypatch):
    def refusing(*given, **options):
        raise lora_fx.errors.ExportError("no such graph", place="up.weight", remedy="none")

    monkeypatch.setattr(lora_fx, "export_onnx", refusing)
    monkeypatch.setattr(files, "FORMS", ("folded",))
    monkeypatch.setattr(files, "LEVELS", ("fixed",))
    row = files.check(small())
    assert row.verdict == "refused" and not row.faults and not row.theirs
    assert row.refused == ["folded, opset 20, fixed: ExportError: up.weight: no such graph"]
    row = files.check(Model("ours", "random", lambda: (Drawing(), torch.randn(2, 4))))
    assert row.verdict == "torch refuses" and not row.refused
    assert all("torch's exporter: " in text for text in row.theirs) and len(row.theirs) == 1


class Drawing(nn.Linear):
    """What it does depends on numbers: torch.export has no graph of it."""

    def __init__(self) -> None:
        super().__init__(4, 4)

    def forward(self, x):
        return super().forward(x) if float(x.detach().abs().sum()) > 0 else x


def test_each_family_has_its_line(tmp_path):
    right = onnx_files.FilesRow("zoo", "whisper", 3, files={"folded 20": "batch", "switchable 23": "fixed"})
    theirs = onnx_files.FilesRow("zoo", "mamba", 2, theirs=["folded, opset 20, batch: torch's exporter: no"])
    report.append(tmp_path / "rows", right)
    assert report.read(tmp_path / "rows", onnx_files.FilesRow) == [right]
    text = onnx_report.report([right, theirs], {"torch": "2.13.0"})
    assert "| speech | 1 | 1 | 0 | 0 | 1 | 0 | 1 | 1 | 0 | 0 | 0 | 0 |" in text
    assert "| state space and recurrence | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1 | 0 | 0 | 0 |" in text
    assert "- batch: torch's exporter: no: mamba" in text and "**speech**: whisper." in text
