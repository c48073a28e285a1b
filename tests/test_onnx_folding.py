"""`fold_onnx`: the branches of a file, ours or PEFT's, become the weights that the torch model folds to."""

from __future__ import annotations

import functools
import re
import warnings
from pathlib import Path

import numpy
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.checks.verification import compare
from lora_fx.errors import ExportError, FoldError
from tests import reference
from tests.reference import EVERYTHING
from tests.zoo import case

pytestmark = pytest.mark.onnx
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def initializers(path: Path) -> dict[str, numpy.ndarray]:
    return {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}


def run(path: Path, feeds: dict[str, numpy.ndarray]) -> list[numpy.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()})


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("native-conv2d", 3), ("native-deconv", 2), ("native-bmm", 3), ("native-addmm", 2), ("native-tied", 3),
        ("native-called-thrice", 4), ("native-gated-mlp", 4), ("native-mha", 2),
    ],
)  # fmt: skip
def test_our_unfolded_file_folds_to_the_folded_file(tmp_path, name, branches):
    model, inputs = case(name).build()
    lora_fx.apply(model.float(), EVERYTHING, inputs, check=False)
    reference.fill(model)
    for form in ("unfolded", "folded"):
        lora_fx.export_onnx(model, inputs, tmp_path / f"{form}.onnx", adapters=form, check=False)
    report = lora_fx.fold_onnx(tmp_path / "unfolded.onnx", tmp_path / "out.onnx")
    mine, theirs = onnx.load(tmp_path / "out.onnx"), onnx.load(tmp_path / "folded.onnx")
    assert sorted(n.op_type for n in mine.graph.node) == sorted(n.op_type for n in theirs.graph.node)
    assert report.sites == branches and f"{branches} branches" in str(report)
    got, want = initializers(tmp_path / "out.onnx"), initializers(tmp_path / "folded.onnx")
    weights = {n: a for n, a in want.items() if a.ndim > 1}
    bits = {a.tobytes() for a in got.values()}
    assert weights and all(a.tobytes() in bits for a in weights.values()), "rounded otherwise than the fold of torch"
    assert {p.key: p.value for p in mine.metadata_props}["lora_fx.form"] == "folded"


def test_several_adapters_of_a_weight_are_rounded_once(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7)).eval(), torch.randn(3, 12)
    for name in ("one", "two", "three"):
        lora_fx.apply(model, Rule(where="*", rank=3), x, name=name)
    lora_fx.activate(reference.fill(model) or model, "one", "two", "three")
    for form in ("unfolded", "folded"):
        lora_fx.export_onnx(model, x, tmp_path / f"{form}.onnx", adapters=form, check=False, external_data=True)
    report = lora_fx.fold_onnx(tmp_path / "unfolded.onnx", tmp_path / "out.onnx")
    assert report.sites == 6 and set(report.weights.values()) == {3} and report.nodes[1] == 3
    got, want = initializers(tmp_path / "out.onnx"), initializers(tmp_path / "folded.onnx")
    assert all(numpy.array_equal(got[name], want[name]) for name in ("0.weight", "2.weight"))
    again = lora_fx.fold_onnx(tmp_path / "unfolded.onnx", tmp_path / "unfolded.onnx", external_data=True)  # onto itself
    assert again.sites == 6 and (tmp_path / "unfolded.onnx.data").exists()
    assert numpy.array_equal(initializers(tmp_path / "unfolded.onnx")["0.weight"], want["0.weight"])


class Bert(nn.Module):
    """A model of PEFT's called with positional tensors, as the TorchScript exporter wants it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args):
        return self.model(**dict(zip(self.names, args, strict=True)))[0]


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Linear(8, 5)

    def forward(self, x):
        return self.linear(self.conv(x).relu().mean((2, 3)))


def bert():
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=50)
    ids = torch.arange(10).reshape(2, 5)
    return BertModel(config, add_pooling_layer=False), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=16, use_cache=False)
    return GPT2LMHeadModel(config), {"input_ids": torch.arange(10).reshape(2, 5)}


def conv():
    return Conv(), {"x": torch.randn(2, 3, 8, 8)}


@pytest.mark.parametrize(
    ("build", "targets", "exporters"),
    [
        (bert, ["word_embeddings", "query", "value", "dense"], (True, False)),
        (gpt2, ["c_attn", "c_fc", "c_proj"], (True,)),  # transformers' GPT-2 itself has no TorchScript translation
        (conv, ["conv", "linear"], (True, False)),
    ],
    ids=["bert", "gpt2", "conv"],
)
def test_pefts_files_from_both_exporters(tmp_path, build, targets, exporters):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, inputs = build()
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, fan_in_fan_out=build is gpt2
    )
    wrapped = get_peft_model(model, config).eval()
    branches = len({n.rpartition(".lora_")[0] for n, _ in wrapped.named_parameters() if ".lora_" in n})
    merged = Bert(wrapped, tuple(inputs)) if build is not conv else wrapped
    with torch.no_grad():
        expected = merged(*inputs.values())
        wide = merged.double()(*(t.double() if t.is_floating_point() else t for t in inputs.values()))
        merged.float()
    for dynamo in exporters:
        path = tmp_path / f"{dynamo}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            options = dict(dynamo=True, verbose=False) if dynamo else dict(dynamo=False, opset_version=17)
            torch.onnx.export(merged, tuple(inputs.values()), str(path), **options)
        report = lora_fx.fold_onnx(path, tmp_path / "out.onnx")
        assert report.sites == branches and report.nodes[1] <= report.nodes[0] - 3 * branches
        names = [i.name for i in onnxruntime.InferenceSession(str(path)).get_inputs()]
        feeds = dict(zip(names, (t.numpy() for t in inputs.values()), strict=True))
        got = torch.from_numpy(run(tmp_path / "out.onnx", feeds)[0])
        noise = float((expected - wide).norm() / wide.norm())
        assert compare(expected, got, wide, noise, torch.float32)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def refused(path: Path, *parts: str, error: type = ExportError, **options) -> None:
    out = path.with_name("out.onnx")
    out.write_bytes(b"the old file")
    with pytest.raises(error) as caught:
        lora_fx.fold_onnx(path, out, **options)
    assert all(part in str(caught.value) for part in parts), str(caught.value)
    assert out.read_bytes() == b"the old file" and {p.name for p in path.parent.iterdir()} <= {path.name, "out.onnx"}


def exported(tmp_path: Path, model: nn.Module, x: torch.Tensor, **options) -> Path:
    return lora_fx.export_onnx(model.eval(), x, tmp_path / "m.onnx", check=False, **options).path


def test_a_file_without_branches(tmp_path):
    x = torch.randn(3, 12)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 7))
    refused(exported(tmp_path, model, x), "no LoRA branch", "m.onnx", 'adapters="unfolded"')
    lora_fx.apply(model, Rule(where="*", rank=2), x)
    refused(exported(tmp_path, model, x, adapters="switchable"), "no LoRA branch", "slots")
    (tmp_path / "m.onnx").write_bytes(b"nonsense")
    refused(tmp_path / "m.onnx", "cannot be read")
    (tmp_path / "m.onnx").unlink()
    refused(tmp_path / "m.onnx", "cannot be read")


class Odd(nn.Module):
    """A branch that is no branch of the linear layer beside it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.base, self.lora_A = nn.Linear(8, 8, bias=False), nn.Linear(8, 2, bias=False)
        self.lora_B, self.other = nn.Linear(2, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        low = self.lora_B(self.lora_A(x if self.kind != "another input" else x.sin()))
        if self.kind == "beside two":
            return self.other(self.base(x).tanh()).tanh() + low
        if self.kind == "gated":
            return self.base(x) + low * self.other(x)
        if self.kind == "tapped":
            y = self.base(x)
            return (y + low) * y.sigmoid()
        if self.kind == "an output":
            y = self.base(x)
            return y + low, y
        if self.kind == "two sums":
            y = self.base(x)
            return y + low, (y + self.lora_B(self.lora_A(x) * 2)) * y
        if self.kind == "rounded":
            return self.base(x) + self.lora_B(self.lora_A(x.int().float()))
        if self.kind == "an outer sum":
            return self.base(x)[:, None] + low
        return self.base(x) + low


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("another input", ("lora_A", "added to no single linear op of the same input")),
        ("beside two", ("lora_B", "added to no single linear op of the same input")),
        ("gated", ("no LoRA branch",)),
        ("rounded", ("lora_A", "added to no single linear op of the same input")),
        ("an outer sum", ("no LoRA branch",)),
    ],
)
def test_what_is_not_a_branch_is_not_folded(tmp_path, kind, parts):
    refused(exported(tmp_path, Odd(kind), torch.randn(3, 8)), *parts)


def test_a_branch_left_over_is_an_error(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.gated = Odd("good"), Odd("gated")

        def forward(self, x):
            return self.gated(self.good(x))

    path = exported(tmp_path, Two(), torch.randn(3, 8))
    refused(path, "1 branches were found, and more are there: gated.lora_A", "still in use")


def test_a_sum_that_is_not_finite(tmp_path):
    x = torch.randn(3, 12)
    model = lora_fx.apply(nn.Sequential(nn.Linear(12, 20)), Rule(where="*", rank=2), x)
    with torch.no_grad():
        model[0].weight_lora_default.B.fill_(3e38)
        model[0].weight_lora_default.A.fill_(3e38)
    path = exported(tmp_path, model, x, adapters="unfolded")
    refused(path, "is not finite in torch.float32", error=FoldError)


def test_a_convolution_with_a_factor_for_each_group(tmp_path):
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Conv1d(4, 6, 3, groups=2, bias=False)
            self.lora_A, self.lora_B = (
                nn.Conv1d(4, 2, 3, groups=2, bias=False),
                nn.Conv1d(2, 6, 1, groups=2, bias=False),
            )

        def forward(self, x):
            return self.base(x) + self.lora_B(self.lora_A(x))

    refused(exported(tmp_path, Grouped(), torch.randn(2, 4, 9)), "another factor for each group", "lora_A")


def folded_right(path: Path, random: int = 1, **options) -> lora_fx.export.OnnxFold:
    """The report of a fold whose file gives what the old one gives, to the bit: in a file of small whole numbers."""
    model = onnx.load(path)
    for held in model.graph.initializer:
        if held.data_type == onnx.TensorProto.FLOAT and held.dims:
            numbers = numpy.random.default_rng(len(held.name)).integers(-2, 3, [*held.dims]).astype(numpy.float32)
            held.CopyFrom(onnx.numpy_helper.from_array(numbers, held.name))
    onnx.save(model, path)
    report = lora_fx.fold_onnx(path, path.with_name("out.onnx"), **options)
    draw = numpy.random.default_rng(random).integers
    feeds = {
        value.name: draw(-2, 3, [size.dim_value or 3 for size in value.type.tensor_type.shape.dim]).astype(
            numpy.float32
        )
        for value in model.graph.input
    }
    for want, got in zip(run(path, feeds), run(path.with_name("out.onnx"), feeds), strict=True):
        assert numpy.array_equal(want, got)
    return report


@pytest.mark.parametrize("kind", ["tapped", "an output", "two sums"])
def test_a_product_that_is_read_without_its_branch_stays_beside_the_folded_one(tmp_path, kind):
    report = folded_right(exported(tmp_path, Odd(kind), torch.randn(3, 8)))
    after = onnx.load(tmp_path / "out.onnx").graph
    products = [node.input[1] for node in after.node if node.op_type in ("MatMul", "Gemm")]
    assert report.sites == (2 if kind == "two sums" else 1) == len(products) - 1
    assert len({*products}) == len(products) and not [node for node in after.node if node.op_type == "Add"]


def test_a_partial_sum_that_is_read_is_folded_too(tmp_path):
    """y = x·W + x·A·B + x·C·D, whose first sum is an output as well: two products, each with a weight of its own."""
    node = onnx.helper.make_node
    more = [
        node("Add", ["p", "d"], ["s"]), node("MatMul", ["x", "lora_A2"], ["z2"]),
        node("MatMul", ["z2", "lora_B2"], ["d2"]),
        node("Add", ["d2", "s"], ["t"]), node("Concat", ["s", "t"], ["y"], axis=0),
    ]  # fmt: skip
    path = summed(tmp_path, *more, lora_A2=normal(6, 2), lora_B2=normal(2, 8))
    assert folded_right(path).weights == {"W.folded": 2, "W": 1}
    assert [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node] == ["MatMul", "MatMul", "Concat"]


@pytest.mark.parametrize("tapped", [False, True])
def test_who_asks_for_a_shape_keeps_no_branch(tmp_path, tapped):
    node = onnx.helper.make_node
    more = [
        node("Add", ["p", "d"], ["s"]), node("Shape", ["s"], ["n"]), node("MatMul", ["z", "lora_B2"], ["d2"]),
        node("Add", ["s", "d2"], ["t"]), node("Add", ["t", "p" if tapped else "b"], ["u"]),
        node("Expand", ["u", "n"], ["y"]),
    ]  # fmt: skip
    path = summed(tmp_path, *more, lora_B2=normal(2, 8), b=normal(8))
    assert folded_right(path).sites == 2


def test_a_model_of_pefts_that_runs_with_its_adapter_disabled_beside_itself(tmp_path):
    """As preference training and contrastive decoding do it: torch's exporter finds that the first product is one."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 7))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)

    class Preference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = peft.get_peft_model(net, config)

        def forward(self, x):
            with self.policy.disable_adapter():
                frozen = self.policy(x)
            return self.policy(x) - frozen

    report = lora_fx.fold_onnx(exported_by_torch(tmp_path, Preference().eval()), tmp_path / "out.onnx")
    assert report.sites == 2 and all(comparison.equivalent for comparison in report.comparisons)
    held = {name for name, array in initializers(tmp_path / "out.onnx").items() if array.ndim == 2}
    assert len(held) == 4 and sum(name.endswith(".folded") for name in held) == 2


def exported_by_torch(tmp_path: Path, model: nn.Module) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(3, 12),), str(tmp_path / "m.onnx"), dynamo=True, verbose=False)
    return tmp_path / "m.onnx"


def test_a_sequence_in_the_graph_stays_one(tmp_path):
    """As torch writes a split without its optimizer; `onnx_ir` infers a tensor there, and no runtime loads that."""
    node = onnx.helper.make_node
    nodes = [
        node("Add", ["p", "d"], ["s"]), node("SplitToSequence", ["s", "two"], ["parts"], axis=1),
        node("Identity", ["parts"], ["same"]), node("SequenceAt", ["same", "one"], ["y"]),
    ]  # fmt: skip
    path = summed(tmp_path, *nodes, two=numpy.array(2), one=numpy.array(1))
    assert folded_right(path, unnamed=True).sites == 1


def made(tmp_path: Path, nodes: list, numbers: dict[str, numpy.ndarray], **inputs: tuple[int, ...]) -> Path:
    """A file of these nodes, whose output is ``y``."""
    float_ = onnx.TensorProto.FLOAT
    values = [onnx.helper.make_tensor_value_info(name, float_, shape) for name, shape in inputs.items()]
    result = onnx.helper.make_tensor_value_info("y", float_, None)
    held = [onnx.numpy_helper.from_array(array, name) for name, array in numbers.items()]
    graph = onnx.helper.make_graph(nodes, "made", values, [result], held)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def normal(*shape: int) -> numpy.ndarray:
    return numpy.random.default_rng(0).normal(size=shape).astype(numpy.float32)


def test_one_delta_through_two_ops_is_two_weights(tmp_path):
    """A and B are square and stand in both of them, once transposed: the deltas differ, and so do the weights."""
    node = onnx.helper.make_node
    nodes = []
    for k, gemm in enumerate(({}, {"transB": 1})):
        nodes += [
            node("Gemm", ["x", "W"], [f"p{k}"], **gemm),
            node("Gemm", ["x", "A"], [f"z{k}"], **gemm),
            node("MatMul", [f"z{k}", "B"], [f"d{k}"]),
            node("Add", [f"p{k}", f"d{k}"], [f"s{k}"]),
        ]
    path = made(
        tmp_path,
        [*nodes, node("Concat", ["s0", "s1"], ["y"], axis=1)],
        {"W": normal(6, 6), "A": normal(6, 6), "B": normal(6, 6)},
        x=(3, 6),
    )
    x, A, B = (torch.from_numpy(normal(*shape)) for shape in ((3, 6), (6, 6), (6, 6)))
    report = lora_fx.fold_onnx(path, tmp_path / "out.onnx", unnamed=True)
    assert report.sites == 2 and sorted(report.weights) == ["W", "W.folded"]

    def both(*tensors: torch.Tensor) -> torch.Tensor:
        x, A, B = tensors
        return torch.cat([x @ (w + a @ B) for w, a in ((A, A), (A.T, A.T))], 1)  # W and A are the same numbers

    wide, (got,) = both(*(t.double() for t in (x, A, B))), run(tmp_path / "out.onnx", {"x": x.numpy()})
    expected = torch.from_numpy(run(path, {"x": x.numpy()})[0])
    noise = float((expected - wide).norm() / wide.norm())
    assert compare(expected, torch.from_numpy(got), wide, noise, torch.float32)


def test_an_output_keeps_its_name_and_nothing_changes_before_all_is_found(tmp_path):
    import onnx_ir

    from lora_fx.export.onnx.branches import Reader

    node = onnx.helper.make_node
    nodes = [
        node("MatMul", ["x", "W"], ["p"]), node("MatMul", ["x", "A"], ["z"]), node("MatMul", ["z", "B"], ["d"]),
        node("Add", ["p", "d"], ["y"]),
    ]  # fmt: skip
    path = made(tmp_path, nodes, {"W": normal(6, 8), "A": normal(6, 2), "B": normal(2, 8)}, x=(3, 6))
    model = onnx_ir.load(path)
    text = onnx_ir.to_proto(model).SerializeToString(deterministic=True)
    (site,) = Reader(model, "m.onnx", unnamed=True).sites()
    assert len(site.branches) == 1 and onnx_ir.to_proto(model).SerializeToString(deterministic=True) == text
    lora_fx.fold_onnx(path, tmp_path / "out.onnx", unnamed=True)
    folded = onnx.load(tmp_path / "out.onnx").graph
    assert [o.name for o in folded.output] == ["y"] and [n.op_type for n in folded.node] == ["MatMul"]


def test_batches_of_factors_under_a_reshape_are_no_branch(tmp_path):
    """Through a Reshape a row may meet another expert's factors."""
    node = onnx.helper.make_node
    nodes = [
        node("MatMul", ["x", "W"], ["p"]), node("Reshape", ["x", "to"], ["r"]), node("MatMul", ["r", "A"], ["z"]),
        node("MatMul", ["z", "B"], ["d"]), node("Reshape", ["d", "back"], ["e"]), node("Add", ["p", "e"], ["y"]),
    ]  # fmt: skip
    numbers = {"W": normal(4, 8, 8), "A": normal(4, 8, 1), "B": normal(4, 1, 8)}
    shapes = {"to": numpy.array([3, 4, 3, 8]), "back": numpy.array([4, 9, 8])}
    path = made(tmp_path, nodes, numbers | shapes, x=(4, 9, 8))
    refused(path, "A and B are two narrow linear ops", unnamed=True)


def test_a_pointwise_factor_with_other_groups_is_no_branch(tmp_path):
    node = onnx.helper.make_node
    nodes = [
        node("Conv", ["x", "W"], ["p"]), node("Conv", ["x", "A"], ["z"]), node("Conv", ["z", "B"], ["d"], group=2),
        node("Add", ["p", "d"], ["y"]),
    ]  # fmt: skip
    path = made(tmp_path, nodes, {"W": normal(6, 8, 3), "A": normal(2, 8, 3), "B": normal(6, 1, 1)}, x=(2, 8, 9))
    refused(path, "A and B are two narrow linear ops", unnamed=True)


# ── whose branch it is, and who else reads ───────────────────────────────────────────────────────────────────────────


def summed(
    tmp_path: Path, *more, down: str = "lora_A", up: str = "lora_B", base: list | None = None, **numbers
) -> Path:
    """y = x·W + x·down·up, and more nodes."""
    node = onnx.helper.make_node
    nodes = [
        *(base or []), node("MatMul", ["x", "W"], ["p"]), node("MatMul", ["x", down], ["z"]),
        node("MatMul", ["z", up], ["d"]), *more,
        *([] if any("y" in n.output for n in more) else [node("Add", ["p", "d"], ["y"])]),
    ]  # fmt: skip
    own = {"W": normal(6, 8), down: normal(6, 2), up: normal(2, 8)}
    return made(tmp_path, nodes, {n: a for n, a in {**own, **numbers}.items() if a is not None}, x=("rows", 6))


def test_a_bottleneck_of_the_models_own_is_folded_only_when_asked(tmp_path):
    path = summed(tmp_path, down="down", up="up")
    refused(path, "no branch has the names of an adapter", "W + down · up", "unnamed=True")
    report = lora_fx.fold_onnx(path, tmp_path / "out.onnx", unnamed=True)
    assert report.sites == 1 and "asked for" in report.branches[0].why and len(report.comparisons) == 2


def test_a_second_branch_with_other_names_stays_and_is_said(tmp_path):
    node = onnx.helper.make_node
    more = [
        node("Add", ["p", "d"], ["s"]), node("MatMul", ["x", "low"], ["l"]), node("MatMul", ["l", "high"], ["h"]),
        node("Add", ["h", "s"], ["y"]),
    ]  # fmt: skip
    report = lora_fx.fold_onnx(summed(tmp_path, *more, low=normal(6, 2), high=normal(2, 8)), tmp_path / "out.onnx")
    assert [b.factors for b in report.branches] == [("lora_A", "lora_B")] and "lora_A" in report.branches[0].why
    assert [b.factors for b in report.left] == [("low", "high")] and "LEFT IN" in str(report)
    assert len({c.shapes for c in report.comparisons}) == 2 and all(c.equivalent for c in report.comparisons)


@pytest.mark.parametrize("how", ["scaled", "cast", "dequantised"])
def test_factors_and_weights_that_the_graph_computes(tmp_path, how):
    """As Olive and others write them: lora_B times alpha / r, in half precision, in whole numbers."""
    node, half, whole = onnx.helper.make_node, onnx.TensorProto.FLOAT16, onnx.TensorProto.INT8
    if how == "scaled":
        first = [node("Div", ["alpha", "r"], ["s"]), node("Mul", ["B", "s"], ["lora_B"]), node("Neg", ["V"], ["W"])]
    else:
        to = half if how == "cast" else whole
        back = [node("Cast", ["Bc"], ["lora_B"], to=1), node("Cast", ["Wc"], ["W"], to=1)]
        back[:1] = [node("DequantizeLinear", ["Bc", "r"], ["lora_B"])] if how == "dequantised" else back[:1]
        first = [node("Cast", ["B"], ["Bc"], to=to), node("Cast", ["V"], ["Wc"], to=half), *back]
    numbers = {"B": normal(2, 8), "V": normal(6, 8), "lora_B": None, "W": None}
    path = summed(tmp_path, base=first, alpha=numpy.float32(4), r=numpy.float32(2), **numbers)
    report = folded_right(path)
    assert report.sites == 1 and [*report.weights] == ["W.folded"]
    assert "MatMul" in (ops := [n.op_type for n in onnx.load(tmp_path / "out.onnx").graph.node]) and len(ops) == 1


def test_a_convolution_whose_branch_spells_its_defaults_out(tmp_path):
    node = onnx.helper.make_node
    spelt = {"strides": [1, 1], "dilations": [1, 1], "group": 1, "auto_pad": "NOTSET"}
    nodes = [
        node("Conv", ["x", "W"], ["p"], pads=[1, 1, 1, 1]), node("Conv", ["x", "lora_A"], ["z"], pads=[1] * 4, **spelt),
        node("Conv", ["z", "lora_B"], ["d"], pads=[0] * 4, **spelt), node("Add", ["p", "d"], ["y"]),
    ]  # fmt: skip
    numbers = {"W": normal(5, 4, 3, 3), "lora_A": normal(2, 4, 3, 3), "lora_B": normal(5, 2, 1, 1)}
    assert folded_right(made(tmp_path, nodes, numbers, x=(2, 4, 9, 9))).sites == 1


def test_a_quantised_base_is_not_made_float(tmp_path):
    node = onnx.helper.make_node
    numbers = {"W": None, "Q": numpy.ones((6, 8), numpy.int8), "s": numpy.float32(0.5).reshape(())}
    path = summed(tmp_path, base=[node("DequantizeLinear", ["Q", "s"], ["W"])], **numbers)
    refused(path, "the weight is quantised", "stored in float", "quantise that one")


def nodes_of(*rows: str) -> list:
    """``op inputs -> output``, one node each."""
    return [
        onnx.helper.make_node(op, given.split(), [to]) for op, given, to in (re.split(" (.*) -> ", r) for r in rows)
    ]


PLAIN = ("MatMul x W -> p", "MatMul x lora_A -> z", "MatMul z lora_B -> d")
WIDE, NARROW, ROWS = normal(8) + 2, normal(2) + 2, normal(6) + 2

#: what stands in the way → the nodes, their other constants, what is said of it, and what to do
MET = {
    "lora_bias": ([*PLAIN, "Add d b -> e", "Add p e -> y"], {"b": WIDE}, "b is added to the branch", "merge it"),
    "lora_bias in a Gemm": (
        [*PLAIN[:2], "Gemm z lora_B b -> d", "Add p d -> y"], {"b": WIDE},
        "Gemm d adds b to the product, as PEFT's lora_bias does", "merge_and_unload",
    ),
    "a bias of A": (
        [PLAIN[0], "Gemm x lora_A b -> z", PLAIN[2], "Add p d -> y"], {"b": NARROW}, "Gemm z adds b", "merge it",
    ),
    "a sum in a Gemm": ([*PLAIN[:2], "Gemm z lora_B p -> y"], {}, "Gemm y adds its C, p", "optimize=False"),
    "a vector": ([*PLAIN, "Mul d v -> e", "Add p e -> y"], {"v": WIDE}, "scaled by v, [8]", "into lora_A or lora_B"),
    "a vector within": (
        [*PLAIN[:2], "Mul z v -> u", "MatMul u lora_B -> d", "Add p d -> y"], {"v": NARROW},
        "scaled by v, [2]", "into lora_A",
    ),
    "x scaled": (
        ["MatMul x W -> p", "Mul x v -> u", "MatMul u lora_A -> z", PLAIN[2], "Add p d -> y"], {"v": ROWS},
        "its input is multiplied by v first", "multiply that into lora_A",
    ),
    "DoRA": (
        [*PLAIN, "Sub v one -> w", "Mul w p -> q", "Mul v d -> r", "Add q r -> s", "Add p s -> y"],
        {"v": WIDE, "one": numpy.ones(1, numpy.float32)}, "as DoRA does it", "merge_and_unload",
    ),
    "a sum less": ([*PLAIN, "Relu p -> q", "Sub q d -> y"], {}, "lora_A and lora_B are two narrow", "here to Relu"),
    "not linear": ([*PLAIN[:2], "Relu z -> u", "MatMul u lora_B -> d", "Add p d -> y"], {}, "Relu u takes it", "fold"),
}  # fmt: skip


@pytest.mark.parametrize("name", MET)
def test_what_an_adapter_meets_is_named(tmp_path, name):
    rows, numbers, *parts = MET[name]
    own = {"W": normal(6, 8), "lora_A": normal(6, 2), "lora_B": normal(2, 8)}
    refused(made(tmp_path, nodes_of(*rows), {**own, **numbers}, x=("rows", 6)), *parts)


def own(inner: int = 6, outer: int = 8) -> dict[str, numpy.ndarray]:
    return {"W": normal(inner, outer), "lora_A": normal(inner, 2), "lora_B": normal(2, outer), "b": WIDE[:outer]}


@pytest.mark.parametrize(
    ("rows", "left"),
    [
        (["Neg d -> e", "Add e p -> y"], ["MatMul"]),
        (["Sub p d -> y"], ["MatMul"]),
        (["Sub d p -> y"], ["MatMul", "Neg"]),
        (["Sub p b -> q", "Add q d -> y"], ["MatMul", "Sub"]),
        (["Sum p b d -> y"], ["MatMul", "Add"]),
        (["Sum d d p -> y"], ["MatMul"]),
    ],
)
def test_sums_that_are_spelled_otherwise(tmp_path, rows, left):
    path = made(tmp_path, nodes_of(*PLAIN, *rows), own(), x=("rows", 6))
    assert all(lora_fx.fold_onnx(path, path).comparisons)
    assert [node.op_type for node in onnx.load(path).graph.node] == left


def test_a_difference_of_the_models_own_stays_as_it_was(tmp_path):
    """Narrow, and no adapter by its names."""
    rows = [
        "MatMul x down -> u",
        "MatMul u up -> v",
        "Sub p v -> q",
        "Add q d -> r",
        "MatMul x W2 -> p2",
        "Sub p2 v -> s",
    ]
    more = {"down": normal(6, 2), "up": normal(2, 8), "W2": normal(6, 8)}
    path = made(tmp_path, nodes_of(*PLAIN, *rows, "Mul r s -> y"), {**own(), **more}, x=("rows", 6))
    lora_fx.fold_onnx(path, path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert kinds == ["MatMul", "MatMul", "MatMul", "Sub", "MatMul", "Sub", "Mul"]


@pytest.mark.parametrize(
    ("inputs", "outputs", "parts"),
    [
        (["W", "lora_A", "lora_B", "b"], ["y"], ("lora_A: it is an input of the graph, too", "keep_initializers_as")),
        (["W"], ["y"], ("W: it is an input of the graph, too",)),
        ([], ["y", "d"], ("lora_A: d is an output of the graph", "take that out")),
        ([], ["y", "z"], ("lora_A: z is an output of the graph", "take that out")),
    ],
)
def test_what_a_graph_takes_and_gives_is_named(tmp_path, inputs, outputs, parts):
    held = own()
    path = made(tmp_path, nodes_of(*PLAIN, "Add p d -> y"), held, x=("rows", 6))
    model = onnx.load(path)
    value = functools.partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    model.graph.input.extend(value(name, shape=held[name].shape) for name in inputs)
    model.graph.output.extend(value(name, shape=None) for name in outputs[1:])
    onnx.save(model, path)
    refused(path, *parts)


@pytest.mark.parametrize("op", ["If", "Loop"])
def test_an_adapter_in_a_body_is_named(tmp_path, op):
    value, float_ = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    branch = nodes_of(*(row.replace(" x ", " v " if op == "Loop" else " x ") for row in PLAIN), "Add p d -> o")
    numbers = {"W": normal(6, 6), "lora_A": normal(6, 2), "lora_B": normal(2, 6)}
    if op == "If":
        bodies = {
            f"{n}_branch": onnx.helper.make_graph(branch, n, [], [value("o", float_, None)]) for n in ("then", "else")
        }
        node = onnx.helper.make_node("If", ["c"], ["y"], **bodies)
    else:
        given = [value("i", 7, []), value("c", 9, []), value("v", float_, None)]
        given_back = [value("c2", 9, None), value("o", float_, None)]
        body = onnx.helper.make_graph([*branch, *nodes_of("Identity c -> c2")], "body", given, given_back)
        node = onnx.helper.make_node("Loop", ["n", "k", "x"], ["y"], body=body)
        numbers |= {"n": numpy.array(3), "k": numpy.array(True)}
    start = nodes_of("ReduceMax x -> m", "IsNaN m -> c") if op == "If" else []
    for reduce in start[:1]:
        reduce.attribute.append(onnx.helper.make_attribute("keepdims", 0))
    path = made(tmp_path, [*start, node], numbers, x=("rows", 6))
    refused(path, "inside of the " + ("then_branch of If" if op == "If" else "body of Loop"), "without torch.cond")


@pytest.mark.parametrize(("setting", "part"), [("use_dora", "as DoRA does it"), ("lora_bias", "PEFT's lora_bias")])
def test_settings_of_pefts_in_torchscripts_files(tmp_path, setting, part):
    """Whose names are gone: what is left is the place beside base_layer."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, **{setting: True})
    model = peft.get_peft_model(nn.Sequential(nn.Linear(12, 16), nn.ReLU()), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(3, 5, 12),), str(tmp_path / "m.onnx"), dynamo=False, opset_version=17)
    refused(tmp_path / "m.onnx", part, "merge_and_unload")


def test_what_an_if_captures_is_read_without_the_adapter(tmp_path):
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    bodies = {
        f"{name}_branch": onnx.helper.make_graph(
            [node(op, ["p"], [name])], name, [], [value(name, onnx.TensorProto.FLOAT, None)]
        )
        for name, op in (("then", "Abs"), ("else", "Neg"))
    }
    more = [node("If", ["c"], ["i"], **bodies), node("Add", ["p", "d"], ["s"]), node("Mul", ["s", "i"], ["y"])]
    assert folded_right(summed(tmp_path, *more, c=numpy.array(True)), unnamed=True).sites == 1


def test_a_mask_of_dropout_is_no_product(tmp_path):
    node = onnx.helper.make_node
    more = [
        node("Dropout", ["d"], ["e", "mask"]), node("Cast", ["mask"], ["f"], to=onnx.TensorProto.FLOAT),
        node("Add", ["p", "f"], ["y"]),
    ]  # fmt: skip
    refused(summed(tmp_path, *more), "no LoRA branch")


def test_a_wrong_fold_is_not_written(tmp_path, monkeypatch):
    from lora_fx.export.onnx import folding

    real = folding.folded_weight
    path = summed(tmp_path)
    monkeypatch.setattr(folding, "folded_weight", lambda *args: real(*args) * 1.01)
    refused(path, "the folded file is not the file that was given", "'y'", "nothing was written")
    assert not lora_fx.fold_onnx(path, tmp_path / "out.onnx", check=False).comparisons


def test_files_that_are_no_graph_are_refused(tmp_path):
    node = onnx.helper.make_node
    circle = [node("Add", ["p", "t"], ["s"]), node("Identity", ["s"], ["t"]), node("Add", ["s", "d"], ["y"])]
    refused(summed(tmp_path, *circle), "reads t, which it or a later node makes", "a circle has none")
    path = summed(tmp_path)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="m.data", size_threshold=0)
    data = (tmp_path / "m.data").read_bytes()
    (tmp_path / "m.data").write_bytes(data[:40])
    with pytest.raises(ExportError):
        lora_fx.fold_onnx(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists() or (tmp_path / "out.onnx").read_bytes() == b"the old file"
