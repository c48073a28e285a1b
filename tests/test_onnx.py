"""The ONNX file is the model: the same numbers as torch, the same graph as the base, or nothing is written."""

from __future__ import annotations

import copy
import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn
from torch.export import Dim

import lora_fx
from lora_fx import Rule
from lora_fx.errors import CaptureError, ExportError, PipelineError
from lora_fx.export.onnx import export as onnx_export
from lora_fx.export.onnx import files as onnx_files
from lora_fx.export.onnx import runs as onnx_runs
from lora_fx.export.onnx import weights as onnx_weights
from lora_fx.export.onnx.export import export_onnx
from lora_fx.model.inventory import inventory
from lora_fx.passes.base import Pass, Result, given
from tests import reference
from tests.reference import EVERYTHING
from tests.zoo import case

pytestmark = pytest.mark.onnx
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Net(nn.Module):
    """Convolutions, a batch norm, a zero bias and two equal norms: all that an optimizer likes to merge or drop."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten()
        )
        self.norms = nn.ModuleList([nn.LayerNorm(24), nn.LayerNorm(24)])
        self.hidden, self.head = nn.Linear(24, 10), nn.Linear(10, 7)
        nn.init.zeros_(self.hidden.bias)

    def forward(self, x):
        x = self.body(x)
        for norm in self.norms:
            x = norm(x)
        return self.head(self.hidden(x).tanh())


class Nested(nn.Module):
    """A tuple and a dict as inputs, integers and booleans as outputs."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(6, 9), nn.Linear(5, 9)

    def forward(self, pair, extra, scale=None):
        y = self.left(pair[0]) + self.right(pair[1]) + extra["bias"]
        y = y if scale is None else y * scale
        return {"y": y, "best": y.argmax(-1), "positive": y > 0}


def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(2, 3, 8, 6)


def nested():
    torch.manual_seed(0)
    inputs = {"pair": (torch.randn(3, 6), torch.randn(3, 5)), "extra": {"bias": torch.randn(9)}}
    return Nested().eval(), inputs


def zoo(name):
    return case(name).build


TOKENS = {"input_ids": {0: "batch", 1: "tokens"}}
ALL = ("base", "folded", "unfolded")
MODELS = {
    "net": (net, ({0: "batch"},), ALL),
    "encoder": (zoo("native-encoder"), {"input": {0: Dim("batch", max=64), 1: Dim.DYNAMIC}}, ALL),
    "gpt2": (zoo("gpt2"), TOKENS, ALL),
}


def adapted(model, inputs, rule=EVERYTHING):
    model = lora_fx.apply(copy.deepcopy(model), rule, inputs)
    reference.fill(model)
    return model


class Exported:
    """One architecture in several files: base, folded, unfolded."""

    def __init__(self, name: str, folder: Path) -> None:
        build, self.dynamic, forms = MODELS[name]
        self.base, self.inputs = build()
        self.model = adapted(self.base, self.inputs)
        self.before = reference.bits(self.model), reference.classes(self.model)
        self.paths = {form: folder / f"{form}.onnx" for form in forms}
        self.reports = {form: self.export(form) for form in forms}

    def export(self, form):
        model = self.base if form == "base" else self.model
        options = dict(adapters="unfolded") if form == "unfolded" else {}
        return export_onnx(model, self.inputs, self.paths[form], dynamic_shapes=self.dynamic, **options)

    def file(self, form):
        return onnx.load(self.paths[form])


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(f"onnx-{n}")) for n in MODELS])
def exported(request, tmp_path_factory) -> Exported:
    return Exported(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def adapted_net():
    model, x = net()
    return adapted(model, x), x


def structure(file) -> list[tuple]:
    """The nodes with their wiring and attributes: all of a graph but the numbers in its initializers."""
    attributes = [sorted(a.SerializeToString() for a in node.attribute) for node in file.graph.node]
    return [
        (node.op_type, node.domain, tuple(node.input), tuple(node.output), *own)
        for node, own in zip(file.graph.node, attributes, strict=True)
    ]


def values(file) -> dict[str, torch.Tensor]:
    return {i.name: torch.from_numpy(onnx.numpy_helper.to_array(i).copy()) for i in file.graph.initializer}


def run(path, **feeds):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return session.run(None, {name: feeds[name].numpy() for name in names})


# ── the same graph, the same numbers ─────────────────────────────────────────────────────────────────────────────────


def test_the_folded_file_has_the_graph_of_the_base_file(exported):
    base, folded = exported.file("base"), exported.file("folded")
    assert structure(folded) == structure(base)
    assert {n: v.shape for n, v in values(folded).items()} == {n: v.shape for n, v in values(base).items()}
    assert exported.reports["folded"].operators == exported.reports["base"].operators
    assert any(not torch.equal(v, values(base)[n]) for n, v in values(folded).items())


def test_the_reports_say_what_is_in_the_files(exported):
    for form, report in exported.reports.items():
        assert report.form == form and report.adapters == (() if form == "base" else ("default",))
        assert report.nodes == len(exported.file(form).graph.node)
        assert report.initializers == len(exported.file(form).graph.initializer)
        assert report.bytes == exported.paths[form].stat().st_size


@pytest.mark.xdist_group("onnx-encoder")
@pytest.mark.parametrize("exported", ["encoder"], indirect=True)
def test_an_unfolded_branch_is_four_nodes(exported):
    branches = len(reference.distinct_adapters(exported.model))
    assert exported.reports["unfolded"].nodes == exported.reports["base"].nodes + 4 * branches


def test_the_files_are_compared_with_torch_on_every_dynamic_shape(exported):
    for report in exported.reports.values():
        assert len(report.comparisons) == (1 if exported.dynamic is None else 3)
        assert all(comparison.equivalent for comparison in report.comparisons) and not report.not_run
        assert 0 <= report.largest < math.inf
        shapes = [comparison.shapes[0] for comparison in report.comparisons]
        if exported.dynamic is not None:
            assert len({*shapes}) == 3 and shapes[0][0] not in (shapes[1][0], shapes[2][0])
        assert str(report.nodes) in str(report) and "equivalent" in str(report)


def test_the_users_model_is_bitwise_what_it_was(exported):
    bits, classes = exported.before
    assert reference.same_bits(reference.bits(exported.model), bits)
    assert reference.classes(exported.model) == classes


def test_a_folded_weight_in_the_file_is_bitwise_the_folded_weight(exported):
    folded = lora_fx.fold(exported.model, copy=True, final=True)
    file, found = values(exported.file("folded")), 0
    fused = {"body.0.weight", "body.0.bias"}  # the batch norm behind it is in them
    for name, weight in folded.named_parameters():
        if name in file and name not in fused:
            assert torch.equal(file[name], weight.detach()), name
            found += 1
        elif f"{name}.transposed" in file:
            assert torch.equal(file[f"{name}.transposed"], weight.detach().mT), name
            found += 1
    assert found > 3


def test_the_file_says_who_made_it_and_not_where(exported):
    for form, path in exported.paths.items():
        raw, file = path.read_bytes(), exported.file(form)
        assert b"site-packages" not in raw and b"stack_trace" not in raw and os.getcwd().encode() not in raw
        assert file.producer_name == "pytorch" and not any(node.doc_string for node in file.graph.node)
        about = {p.key: p.value for p in file.metadata_props}
        assert file.producer_version == torch.__version__ and about["lora_fx.form"] == form
        assert json.loads(about["lora_fx.adapters"]) == ([] if form == "base" else ["default"])


def test_dynamic_axes_have_the_names_they_were_given(exported):
    shape = exported.reports["folded"].inputs[0].shape
    if exported.dynamic is None:
        assert all(isinstance(size, int) for size in shape)
    else:
        assert shape[0] == "batch"
        assert exported.reports["folded"].outputs[0].shape[0] == "batch"


# ── the graph cannot depend on the numbers ───────────────────────────────────────────────────────────────────────────


def test_zeros_ones_and_equal_weights_leave_the_graph_alone(tmp_path):
    model, x = net()
    plain = export_onnx(model, x, tmp_path / "plain.onnx")
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.fill_(n % 2)
    constant = export_onnx(model, x, tmp_path / "constant.onnx")
    assert constant.operators == plain.operators and constant.initializers == plain.initializers
    assert structure(onnx.load(constant.path)) == structure(onnx.load(plain.path))


class Tied(nn.Module):
    """One table as embedding and head, large enough for torch not to evaluate its transpose."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 40), nn.Linear(40, 300, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.embed(ids).tanh())


@pytest.mark.parametrize("early", [False, True], ids=["folded here", "folded before"])
def test_a_tied_weight_that_a_fold_splits_keeps_the_graph(tmp_path, early):
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.randint(0, 300, (2, 5))
    base = export_onnx(model, ids, tmp_path / "base.onnx")
    model = adapted(model, ids, Rule(form="linear", rank=2))
    (storage,) = inventory(model).storages()
    assert storage.split
    folded = export_onnx(lora_fx.fold(model, copy=True) if early else model, ids, tmp_path / "folded.onnx")
    assert folded.operators == base.operators and folded.form == "folded"


def test_a_batch_norm_that_is_called_twice(tmp_path):
    """Its buffers do several things in the graph, as a shared weight does."""
    linear, norm = nn.Linear(7, 7), nn.BatchNorm1d(7)
    norm.running_mean, norm.running_var = torch.randn(7), torch.rand(7) + 0.5
    model, x = nn.Sequential(linear, norm, nn.Tanh(), linear, norm).eval(), torch.randn(3, 7)
    model = adapted(model, x, Rule(where="*", rank=2))
    for form in ("folded", "unfolded", "switchable"):
        assert export_onnx(model, x, tmp_path / f"{form}.onnx", adapters=form).comparisons
    assert export_onnx(model, x, tmp_path / "proven.onnx", prove=True).proof.folded


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_a_convolution_without_a_bias_is_given_none(tmp_path, spatial):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[spatial - 1]
    model, x = conv(4, 6, 3, groups=2, bias=False).eval(), torch.randn(2, 4, *[5] * spatial)
    made = export_onnx(model, x, tmp_path / "m.onnx", optimize=False)
    assert made.operators == {"Conv": 1} and made.comparisons


# ── ways to call ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nested_keyword_inputs_and_integer_outputs(tmp_path):
    model, inputs = nested()
    axes = {"pair": ({0: "rows"}, {0: "rows"})}
    report = export_onnx(adapted(model, inputs), inputs, tmp_path / "m.onnx", dynamic_shapes=axes)
    assert [o.dtype for o in report.outputs] == ["float", "int64", "bool"]
    assert [r.dtype for r in report.comparisons[0].reports] == ["float32", "int64", "bool"]
    assert report.comparisons[1].shapes[0][0] != 3
    assert [i.shape[0] for i in report.inputs] == ["rows", "rows", 9]


def test_keyword_inputs_in_another_order_than_the_signature(tmp_path):
    model, inputs = nested()
    swapped = {"extra": inputs["extra"], "pair": inputs["pair"]}
    report = export_onnx(model, swapped, tmp_path / "m.onnx", dynamic_shapes={"extra": None})
    assert [i.shape for i in report.inputs] == [(3, 6), (3, 5), (9,)]


def test_a_folded_model_is_exported_as_it_is(tmp_path, adapted_net):
    model, x = adapted_net
    folded = lora_fx.fold(model, copy=True)
    first = export_onnx(model, x, tmp_path / "a.onnx")
    second = export_onnx(folded, x, tmp_path / "b.onnx")
    assert first.path.read_bytes() == second.path.read_bytes() and second.adapters == ("default",)
    assert lora_fx.unfold(folded) is folded  # and what unfolding needs is still there


def test_flags_gradients_and_random_state_stay(tmp_path, adapted_net):
    model, x = copy.deepcopy(adapted_net[0]), adapted_net[1]
    model.train()
    model.body.eval()
    flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    bits, state = reference.bits(model), torch.get_rng_state()
    export_onnx(model, x, tmp_path / "m.onnx", adapters="unfolded")
    assert flags == ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    assert reference.same_bits(bits, reference.bits(model)) and torch.equal(state, torch.get_rng_state())
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("opset", [18, 24])
def test_the_first_and_the_last_opset(tmp_path, adapted_net, opset):
    report = export_onnx(*adapted_net, tmp_path / "m.onnx", opset=opset)
    assert report.opset == opset == onnx.load(report.path).opset_import[0].version


def test_weights_in_a_file_of_their_own(tmp_path, adapted_net):
    model, x = adapted_net
    for _ in range(2):  # the second one replaces the first
        report = export_onnx(model, x, tmp_path / "m.onnx", external_data=True)
    assert report.data == tmp_path / "m.onnx.data" and sorted(p.name for p in tmp_path.iterdir()) == [
        "m.onnx",
        "m.onnx.data",
    ]
    assert report.bytes == sum(p.stat().st_size for p in tmp_path.iterdir())
    (got,) = run(report.path, x=x)
    with torch.no_grad():
        assert (torch.from_numpy(got) - model(x)).abs().max() <= report.largest


def test_the_console_stays_clean(tmp_path, adapted_net, capfd):
    export_onnx(*adapted_net, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")


def test_bfloat16_is_checked_but_not_run_and_says_so(tmp_path):
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5)).bfloat16().eval()
    report = export_onnx(model, torch.randn(2, 6, dtype=torch.bfloat16), tmp_path / "m.onnx")
    assert report.path.exists() and report.comparisons == () and math.isnan(report.largest)
    assert "CPUExecutionProvider has no kernel" in report.not_run and "NOT RUN" in str(report)


def test_float16_is_run(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).half().eval()
    report = export_onnx(adapted(model, torch.randn(3, 12).half()), torch.randn(3, 12).half(), tmp_path / "m.onnx")
    assert report.comparisons[0].reports[0].dtype == "float16" and report.comparisons[0].equivalent


# ── a wrong file is caught, and nothing is half-written ──────────────────────────────────────────────────────────────


def untouched(folder: Path, kept: bytes = b"the old file") -> bool:
    return [p.name for p in folder.iterdir()] == ["m.onnx"] and (folder / "m.onnx").read_bytes() == kept


@pytest.fixture
def old(tmp_path) -> Path:
    (tmp_path / "m.onnx").write_bytes(b"the old file")
    return tmp_path / "m.onnx"


def test_a_wrong_weight_in_the_file_is_caught(old, monkeypatch, adapted_net):
    save = onnx_export.save_model

    def corrupt(model, path, *options):
        files = save(model, path, *options)
        file = onnx.load(path)
        weight = next(i for i in file.graph.initializer if i.name == "head.weight")
        array = onnx.numpy_helper.to_array(weight).copy()
        array[0, 0] += 0.01
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
        onnx.save(file, path)
        return files

    monkeypatch.setattr(onnx_export, "save_model", corrupt)
    with pytest.raises(ExportError, match=r"ONNX Runtime is not the model(.|\n)*DIFFERENT"):
        export_onnx(*adapted_net, old)
    assert untouched(old.parent)


def test_a_file_without_its_adapters_is_caught(old, monkeypatch, adapted_net):
    model, x = adapted_net
    monkeypatch.setattr(onnx_weights.Weight, "numbers", lambda self: self.load())
    with pytest.raises(ExportError, match="ONNX Runtime is not the model"):
        export_onnx(model, x, old)
    assert untouched(old.parent)


def test_a_wrong_integer_is_caught(old, monkeypatch):
    original = onnx_runs.run_session

    def shifted(*args):
        y, best, positive = original(*args)
        return [y, (best + 1) % 9, positive]

    monkeypatch.setattr(onnx_runs, "run_session", shifted)
    with pytest.raises(ExportError, match=r"ONNX Runtime is not the model(.|\n)*int64"):
        export_onnx(*nested(), old)
    assert untouched(old.parent)


def test_an_integer_that_rounding_decides_may_differ():
    one, two = torch.tensor([1, 5]), torch.tensor([2, 5])
    assert onnx_runs._judge(one, two, one, two)  # float64 with rounded weights is undecided itself
    assert not onnx_runs._judge(one, two, one, one)


@pytest.mark.parametrize("step", ["check_file", "open_session", "_info"])
def test_an_error_on_the_way_leaves_the_old_file(old, monkeypatch, adapted_net, step):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_export, step, fail)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(*adapted_net, old)
    assert untouched(old.parent)


def test_an_error_between_the_two_files_leaves_the_old_ones(tmp_path, monkeypatch):
    """tests/test_faults.py kills the process there, at every touch of a file."""
    path = tmp_path / "m.onnx"
    for taken in (False, True):  # no old data, then some that the old graph reads
        before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        with monkeypatch.context() as patch:
            replace = os.replace

            def fail(source, target, replace=replace):
                if Path(target) == path:
                    raise OSError("no space")
                replace(source, target)

            patch.setattr(os, "replace", fail)
            with pytest.raises(ExportError, match="no space"):
                export_onnx(nn.Linear(40, 30), torch.zeros(2, 40), path, external_data=True)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before and bool(before) == taken
        export_onnx(nn.Linear(40, 30), torch.zeros(2, 40), path, external_data=True)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


X = torch.zeros(2, 4)
LINEAR = nn.Linear(4, 3)
REFUSED = {
    "opset 17": (LINEAR, X, dict(opset=17), ExportError, "opset 17 is not supported(.|\n)*18 to 24"),
    "opset 25": (LINEAR, X, dict(opset=25), ExportError, "opset 25 is not supported"),
    "opset True": (LINEAR, X, dict(opset=True), ExportError, "opset True"),
    "adapters": (LINEAR, X, dict(adapters="merged"), ExportError, "'merged'(.|\n)*folded"),
    "no module": (torch.tanh, X, {}, ExportError, "no torch.nn.Module"),
    "meta": (nn.Linear(4, 3, device="meta"), X, {}, ExportError, "weight: the tensor is on meta"),
    "shape": (LINEAR, torch.zeros(2, 5), {}, CaptureError, "does not run on the example inputs"),
    "keyword": (LINEAR, {"wrong": X}, {}, CaptureError, "wrong"),
    "branching": (Branching(), torch.ones(2, 4), {}, ExportError, "torch.onnx.export refuses the model"),
    "axis": (LINEAR, X, dict(dynamic_shapes={"input": {2: "batch"}}), ExportError, "axis numbers from 0 to 1"),
    "input": (LINEAR, X, dict(dynamic_shapes={"inputs": {0: "batch"}}), ExportError, "inputs(.|\n)*input"),
    "shapes": (LINEAR, X, dict(dynamic_shapes=7), ExportError, "dynamic_shapes: dynamic_shapes is 7(.|\n)*pass a dict"),
    "parts": (
        Nested(),
        nested()[1],
        dict(dynamic_shapes={"pair": (None,)}),
        ExportError,
        r"(?s)pair.*\(None,\).*2 entries",
    ),
    "inline": (
        LINEAR,
        X,
        dict(external_data=False),
        ExportError,
        "(?s)external_data: 60 bytes.*leave external_data out",
    ),
    "too many": (LINEAR, X, dict(dynamic_shapes=(None, None)), ExportError, "2 entries for 1 inputs"),
    "static": (LINEAR, X, dict(dynamic_shapes={"input": {1: Dim("width")}}), ExportError, "axis 1 must be 4"),
    "no tensor": (Nested(), nested()[1] | {"scale": 2.0}, dict(dynamic_shapes={"scale": {0: "a"}}), ExportError, "2.0"),
    "bfloat16 conv": (nn.Conv1d(4, 3, 1).bfloat16(), X.bfloat16().T[None], {}, ExportError, "onnx.checker refuses"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_the_value_and_the_remedy_and_write_nothing(name, old, capfd, monkeypatch):
    model, inputs, options, error, text = REFUSED[name]
    if name == "inline":  # as if 2 GiB were not even the size of this layer
        monkeypatch.setattr(onnx_files, "INLINE", 40)
    with pytest.raises(error, match=text) as caught:
        export_onnx(model, inputs, old, **options)
    assert caught.value.place and caught.value.remedy
    assert untouched(old.parent)


class Picky(nn.Module):
    """Runs on one size only, and says that it would run on any."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        if not torch.compiler.is_compiling() and x.shape[0] != 2:
            raise ValueError("two rows, please")
        return self.linear(x)


def refused(old, place, value, remedy, *args, **options):
    with pytest.raises(ExportError) as caught:
        export_onnx(*args, old, **options)
    error = caught.value
    assert place in error.place and value in error.reason and remedy in error.remedy, str(error)
    assert untouched(old.parent)


def test_a_model_that_runs_on_no_other_size_is_refused(old):
    shapes = {"x": {0: Dim("rows")}}
    refused(old, "dynamic_shapes", "two rows, please", "make those axes static", Picky(), X, dynamic_shapes=shapes)


def test_another_opset_than_asked_for_is_refused(old, monkeypatch):
    real = torch.onnx.export

    def lying(*args, **kwargs):
        program = real(*args, **kwargs)
        program.model.opset_imports[""] = 19
        return program

    monkeypatch.setattr(torch.onnx, "export", lying)
    refused(old, "Linear", "wrote opset 19 where 20 was asked for", "opset=19", LINEAR, X, opset=20)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("_session", ("m.onnx", "does not load the file", "another opset")),
        ("_run_session", ("the file", "does not run the file on inputs of shapes", "fewer axes dynamic")),
        ("_judge", ("output", "(9, 9) where torch returns", "dynamic_shapes")),
    ],
)
def test_what_the_runtime_does_wrong_is_told(old, monkeypatch, adapted_net, name, parts):
    class Failing(onnx_runs.Apart):
        def __init__(self, path) -> None:
            if name == "_session":
                raise RuntimeError("broken")
            super().__init__(path)

        def run(self, feeds):
            if name == "_run_session":
                raise RuntimeError("broken")
            return [numpy.zeros((9, 9), numpy.float32) for _ in super().run(feeds)]

    monkeypatch.setattr(onnx_runs, "Apart", Failing)
    refused(old, *parts, *adapted_net)


@pytest.mark.parametrize("path", ["missing/m.onnx", ".", "m.onnx/inside.onnx"])
def test_a_path_that_cannot_be_written(path, old):
    with pytest.raises(ExportError, match="the path") as caught:
        export_onnx(LINEAR, X, old.parent / path)
    assert caught.value.remedy and untouched(old.parent)


def test_a_folder_without_permission(old, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(onnx_files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ExportError, match="Permission denied"):
        export_onnx(LINEAR, X, old)


def test_a_full_disk(old, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_export, "save_model", full)
    with pytest.raises(ExportError, match="No space left"):
        export_onnx(LINEAR, X, old)
    assert untouched(old.parent)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package, old, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match=rf"{package} cannot be imported(.|\n)*lora-fx\[onnx\]"):
        export_onnx(LINEAR, X, old)
    assert untouched(old.parent)


# ── the export as passes ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_export_is_a_pipeline_that_takes_passes_of_others(old, adapted_net):
    """One that counts nodes before they are written, and refuses: no file, and the model rests as it was."""

    @dataclass(frozen=True)
    class Budget(Pass):
        most: int

        name = "budget"
        requires = (given(onnx_export.Optimised),)

        def call(self, model, facts):
            found = len([*facts[onnx_export.Optimised].graph.graph])
            if found > self.most:
                raise ExportError(f"{found} nodes are too many", place="the graph", remedy="allow more")
            return Result(model, modified=False)

    model, x = adapted_net
    before, classes = reference.bits(model), reference.classes(model)
    whole = lora_fx.pipeline("export_onnx", x, old, prove=True)
    assert whole.names == ("prepare", "certify", "translate", "optimise", "write", "run", "prove", "publish")
    assert "Translated" in str(whole) and "run" not in lora_fx.pipeline("export_onnx", x, old, check=False).names
    short = whole.without("run", "certify", "prove")
    with pytest.raises(ExportError, match="nodes are too many"):
        short.after("optimise", Budget(1))(model)
    assert untouched(old.parent)
    run = short.after("optimise", Budget(1000))(model)
    assert run.facts[onnx_export.ExportReport].not_run and not untouched(old.parent)
    assert run.model is model and not run.modified and classes == reference.classes(model)
    assert reference.same_bits(before, reference.bits(model))
    with pytest.raises(PipelineError, match="'prove' requires Translated"):
        whole.without("translate", "optimise", "write", "run")
