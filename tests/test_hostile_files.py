"""Files of anyone: damaged ones, ones that ask for much, ones that point elsewhere. Each gets one of our errors."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.errors import ExportError, FileError, RuleError
from lora_fx.export import Session, onnx_digest, save_onnx_weights
from lora_fx.export.adapters import patterns
from lora_fx.export.onnx import loading
from tests import damage, hostile

pytestmark = pytest.mark.onnx
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SLOW = [name for name in hostile.CASES if "pattern in" in name][1:]  # a second each: python -m tests.hostile
FLIPS = 16  # in each kind of file; python -m tests.damage has 10,000


def refused(call: Callable[[], Any], *parts: str, kind: type[LoraFxError] = ExportError) -> None:
    with pytest.raises(kind) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return damage.write(tmp_path_factory.mktemp("whole"))


# ── small files that ask for much ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says how much memory was taken")
@pytest.mark.parametrize("name", [name for name in hostile.CASES if name not in SLOW])
def test_a_small_file_cannot_ask_for_much(files, name):  # with all that is imported once
    said, seconds, memory = hostile.measured(name)
    assert not said.startswith(("accepted", "RAW")), said
    assert seconds <= hostile.SECONDS and memory <= hostile.MEMORY, (seconds, memory)


def test_a_pattern_that_repeats_is_matched_as_peft_matches_it(tmp_path):
    """In a process of its own, and the plain ones in this one: the same names."""
    names = [hostile.WEIGHT, "language_model"]
    for pattern in (r".*(?<!value)_projection_a", r"(?!x)language.*_[a-b]", hostile.WEIGHT.replace(".", r"\.")):
        model = hostile.Net()
        lora_fx.load_adapter(model, hostile.peft_folder(tmp_path, target_modules=pattern), torch.ones(3, 8))
        assert model.get_submodule(names[0]).weight.requires_grad is False and lora_fx.certify(model, torch.ones(3, 8))
    for pattern in (r".*_b", r"language_mode", "("):
        wrong = hostile.peft_folder(tmp_path, target_modules=pattern)
        refused(lambda wrong=wrong: hostile.load(wrong), "target_modules", pattern, kind=FileError)


class Several(nn.Module):
    """Eight layers, each of which a pattern may be asked about."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6, bias=False) for _ in range(8))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


SLOWLY = {  # each repeats, none matches a layer
    "target_modules": r"layers\.(\d|\d\d)+",
    "exclude_modules": r"(z+)+e",
    "rank_pattern": {r"(z+)+r": 3},
    "alpha_pattern": {r"(z+)+a": 3},
    "modules_to_save": [r"(z+)+s"],
}
CONFIGS = {
    "load": lambda folder: lora_fx.load_adapter(Several(), folder / "a", torch.ones(2, 6)),
    "fold": lambda folder: lora_fx.fold_checkpoint(folder / "base", folder / "a", folder / "out"),
    "rules": lambda folder: lora_fx.plan(Several(), lora_fx.rules_from_peft(folder / "a"), torch.ones(2, 6)),
}


def several(folder: Path) -> Path:
    """A base and an adapter of it, whose options are all patterns that take a process of their own."""
    (folder / "base").mkdir()
    save_file(Several().state_dict(), folder / "base" / "model.safetensors")
    lora_fx.save_adapter(lora_fx.apply(Several(), Rule(where="*", rank=2), torch.ones(2, 6)), folder / "a")
    said = json.loads((folder / "a" / "adapter_config.json").read_text())
    (folder / "a" / "adapter_config.json").write_text(json.dumps({**said, **SLOWLY}))
    tensors = load_file(folder / "a" / "adapter_model.safetensors")
    save_file(tensors, folder / "a" / "adapter_model.safetensors")  # without our header
    return folder


@pytest.mark.parametrize("verb", CONFIGS)
def test_all_patterns_of_a_file_share_one_budget(verb, tmp_path, monkeypatch):
    """Each is matched once, in a process that is given what those before it have left."""
    given, run = [], patterns.subprocess.run

    def started(*arguments, input, **options):
        given.append(json.loads(input)[3])
        return run(*arguments, input=input, **options)

    several(tmp_path)
    monkeypatch.setattr(patterns.subprocess, "run", started)
    CONFIGS[verb](tmp_path)
    assert 2 <= len(given) <= len(SLOWLY) and given[0] == patterns.SECONDS
    assert given == sorted({*given}, reverse=True)


def test_what_is_left_of_the_budget_is_all_that_a_pattern_gets():
    matcher, names = patterns.Matcher(), ["a" * 24]
    assert matcher.matching(["(a|b)+"], names, "here") == [{names[0]: "a"}] and matcher.left < patterns.SECONDS
    matcher.left = patterns.LEAST
    with pytest.raises(FileError, match="all patterns of the file have together"):
        matcher.matching(["(a|aa)+(a|aa)+(a|aa)+!"], names, "here")
    matcher.left = 0.5
    assert matcher.matching(["(a|b)+"], names, "here") == [{names[0]: "a"}] and matcher.left == 0.5  # it is known


def test_very_many_names_are_patterns_that_take_long(monkeypatch):
    """Two hundred thousand plain names: matched within the budget too, or refused."""
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    matcher = patterns.Matcher(0.05)
    with pytest.raises(FileError, match="all patterns of the file have together"):
        matcher.matching([f"layers.{n}" for n in range(30_000)], ["layers.7"] * 100, "here")


# ── flipped bits ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", damage.TARGETS)
def test_a_flipped_bit_is_refused(files, name):
    found = list(damage.outcomes(files, name, FLIPS, seed=1))
    raw = [said for outcome, said in found if outcome == damage.RAW]
    assert len(found) == FLIPS and not raw, raw
    if not damage.own_seal(name):
        assert all(outcome in (damage.REFUSED, damage.SAME) for outcome, _ in found)
        assert sum(outcome == damage.REFUSED for outcome, _ in found) > FLIPS / 2


def test_what_another_tool_has_changed_is_told_by_its_digest(files, tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for name in ("beside.onnx", "beside.onnx.data"):
        (folder / name).write_bytes((files / name).read_bytes())
    file = folder / "beside.onnx"
    first = onnx_digest(file)
    assert loading.said(file) == first == onnx_digest(files / "beside.onnx")
    Session(file), Session(file, digest=first)
    proto = onnx.load(file, load_external_data=False)
    proto.doc_string = "quantised since"
    onnx.save(proto, file)
    then = onnx_digest(file)
    refused(lambda: Session(file), "changed since", f"digest={then!r}")
    refused(lambda: Session(file, digest=first), f"its digest is {then}", first)
    session = Session(file, digest=then)
    assert session.outputs == Session(files / "beside.onnx").outputs
    (folder / "beside.onnx.data").write_bytes((folder / "beside.onnx.data").read_bytes()[::-1])
    refused(lambda: Session(file, digest=then), "its digest is")
    del proto.metadata_props[:]
    onnx.save(proto, file)
    refused(lambda: Session(file), "it has no digest", "from before lora_fx wrote one", "pass digest=")


def test_files_from_before_digests_and_numbers_that_are_none(files, tmp_path):
    from safetensors.numpy import load_file, save_file

    shared = Session(files / "base.onnx", shared=True)
    numbers = load_file(files / "task.safetensors")
    graph = onnx.load(files / "base.onnx", load_external_data=False)
    of = {entry.key: entry.value for entry in graph.metadata_props}["lora_fx.graph"]
    save_file(numbers, tmp_path / "old.safetensors", {"lora_fx.graph": of})
    refused(lambda: shared.task(tmp_path / "old.safetensors"), "it has no digest", "save_onnx_weights")
    old = (files / "a.onnx_adapter").read_bytes()
    (tmp_path / "old.onnx_adapter").write_bytes(old[: loading._unsealed(files / "a.onnx_adapter")])
    switchable = Session(files / "switchable.onnx")
    refused(lambda: switchable.load_adapter(tmp_path / "old.onnx_adapter"), "it has no digest", "save_onnx_adapter")
    next(iter(numbers.values())).flat[0] = numpy.nan
    import safetensors.numpy

    data = lora_fx.reading.packed(numbers, safetensors.numpy, {"lora_fx.graph": of}, loading.SEAL, of)
    (tmp_path / "nan.safetensors").write_bytes(data)
    refused(lambda: shared.task(tmp_path / "nan.safetensors"), "holds NaN or Inf")
    model = onnx.load(files / "folded.onnx")
    weight = next(t for t in model.graph.initializer if t.name in numbers)
    array = onnx.numpy_helper.to_array(weight).copy()
    array.flat[0] = numpy.inf
    weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    onnx.save(model, tmp_path / "inf.onnx")
    out = tmp_path / "w.safetensors"
    refused(lambda: save_onnx_weights(files / "base.onnx", tmp_path / "inf.onnx", out), "holds NaN or Inf", weight.name)
    assert not out.exists()


def without(table: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in table.items() if k != key}


def test_a_manifest_says_all_that_is_asked_of_it(files, tmp_path):
    proto = onnx.load(files / "switchable.onnx")
    (entry,) = [entry for entry in proto.metadata_props if entry.key == "lora_fx.slots"]
    whole = json.loads(entry.value)
    slot = next(iter(whole["inputs"]))
    texts = ["", "[]", "1", "[" * 10_000, '{"version": 1}', "null"]
    texts += [json.dumps(without(whole, key)) for key in whole]
    own = whole["inputs"][slot]
    odd = [("shape", [0, 0]), ("shape", [0, 10**12]), ("shape", "x"), ("dtype", "object"), ("rank", 10**12)]
    slots = [*(without(own, key) for key in own), *({**own, key: value} for key, value in odd)]
    texts += [json.dumps({**whole, "inputs": {slot: said}}) for said in slots]
    for text in texts:
        entry.value = text
        onnx.save(proto, tmp_path / "m.onnx")
        loading.seal(tmp_path / "m.onnx")
        refused(lambda: Session(tmp_path / "m.onnx"), "no slots for adapters that this version")


# ── files that point elsewhere, and that do not say what they have ───────────────────────────────────────────────────


READERS = {"fold_onnx": hostile.fold, "Session": hostile.read, "onnx_digest": onnx_digest}


def beside(folder: Path) -> tuple[Path, Any]:
    """A file with its weights in another one, and its message."""
    file = hostile.onnx_file(folder, *hostile.branch())
    onnx.save(onnx.load(file), file, save_as_external_data=True, size_threshold=0, location="data")
    return file, onnx.load(file, load_external_data=False)


@pytest.mark.parametrize("reader", READERS)
def test_external_data_is_in_the_files_folder_and_inside_of_its_file(tmp_path, reader):
    folder = tmp_path / "inside"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(4096))
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "inner").symlink_to("data")
    file, proto = beside(folder)
    entries = {entry.key: entry for entry in proto.graph.initializer[0].external_data}
    whole = {key: entry.value for key, entry in entries.items()}
    outside = {
        "/etc/passwd": "no file in this one's folder", "../secret": "no file in this one's folder",
        "a/../../secret": "no file in this one's folder", "": "no file in this one's folder",
        "c:\\data": "no file in this one's folder", "*/_ORT_MEM_ADDR_/*": "cannot be read", "link": "a link out of",
        "missing": "cannot be read", ".": "is no regular file but a folder", "x" * 5000: "cannot be read",
    }  # fmt: skip
    cases = [("location", location, said) for location, said in outside.items()]
    cases += [("offset", value, "offset of its numbers") for value in ("-1", "x", "²", "9" * 5000, "1.5")]
    cases += [("offset", "4096", "are 256 bytes, and it has 256 from 4,096 on"), ("length", "-4", "the length")]
    cases += [("length", "255", "it has 255 from"), ("length", "257", "it has 257 from")]
    for key, value, said in cases:
        entries[key].value = value
        onnx.save(proto, file)
        refused(lambda: READERS[reader](file), said, str(folder))
        entries[key].value = whole[key]
    entries["location"].value = "inner"  # a link that stays inside
    onnx.save(proto, file)
    assert len(onnx_digest(file)) == 64
    entries["location"].key = "basepath"
    onnx.save(proto, file)
    refused(lambda: READERS[reader](file), "each of which must be one of")
    entries["location"].key, entries["location"].value = "location", "data"
    onnx.save(proto, file)
    data = (folder / "data").read_bytes()
    (folder / "data").write_bytes(data[:100])
    refused(lambda: READERS[reader](file), "of the 100 in 'data'")
    (folder / "data").write_bytes(data)
    assert not list(folder.glob("out*"))
    hostile.fold(file)


def _changed(folder: Path, change: Callable[[Any], None]) -> Path:
    file = hostile.onnx_file(folder, *hostile.branch())
    proto = onnx.load(file)
    change(proto)
    onnx.save(proto, file)
    return file


def _circle(proto: Any) -> None:
    proto.graph.node[1].input[0] = "up"


def _negative(proto: Any) -> None:
    proto.graph.initializer[0].dims[0] = -8


def _mismatched(proto: Any) -> None:
    proto.graph.initializer[1].dims[0] = 7


def _no_graph(proto: Any) -> None:
    proto.ClearField("graph")


def _no_type(proto: Any) -> None:
    proto.graph.initializer[0].data_type = 99


def _own_caller(proto: Any) -> None:
    from onnx import helper

    node = helper.make_node("f", ["a"], ["b"], domain="own")
    proto.functions.append(helper.make_function("own", "f", ["a"], ["b"], [node], list(proto.opset_import)))
    proto.graph.node[-1].output[0] = "z"
    proto.graph.node.append(helper.make_node("f", ["z"], ["y"], domain="own"))


def _outside_of_a_function(proto: Any) -> None:
    from onnx import helper

    _own_caller(proto)
    tensor = helper.make_tensor("t", onnx.TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "data"
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    proto.functions[0].node[0].CopyFrom(helper.make_node("Add", ["a", "c"], ["b"]))
    proto.functions[0].node.insert(0, node)


def _rank_without_a_number(proto: Any) -> None:
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(numpy.ones((8, 3), numpy.float32), "lora_A"))


DAMAGES = {
    "a circle": (_circle, "which it or a later node"),
    "a negative size": (_negative, "its shape is [-8, 8]"),
    "a size that is another": (_mismatched, "[7, 2] are 56 bytes, and it has 64"),
    "no graph": (_no_graph, "it has no graph"),
    "no type": (_no_type, "its type is 99"),
    "a function that calls itself": (_own_caller, "'f' calls itself"),
    "numbers of a function in another file": (_outside_of_a_function, "in a function"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("reader", READERS)
def test_a_graph_that_does_not_hang_together(tmp_path, reader, name):
    change, said = DAMAGES[name]
    file = _changed(tmp_path, change)
    refused(lambda: READERS[reader](file), said, str(file))
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def test_a_delta_of_no_rank_and_over_a_thousand_branches(tmp_path):
    from onnx.helper import make_node

    file = _changed(tmp_path, _rank_without_a_number)
    refused(lambda: hostile.fold(file), "m.onnx")
    nodes, constants = hostile.branch()
    nodes[-1].output[0] = "s0"
    for n in range(1200):
        nodes.append(make_node("MatMul", ["x", "lora_A"], [f"d{n}"]))
        nodes.append(make_node("MatMul", [f"d{n}", "lora_B"], [f"u{n}"]))
        nodes.append(make_node("Add", [f"s{n}", f"u{n}"], ["y" if n == 1199 else f"s{n + 1}"]))
    file = hostile.onnx_file(tmp_path, nodes, constants)
    assert lora_fx.fold_onnx(file, tmp_path / "out.onnx", check=False).sites == 1201


# ── what a file says in the place of a number ────────────────────────────────────────────────────────────────────────

ODD = (1e308, -1e39, float("nan"), float("inf"), -1, 10**30, 10**4000, "x", "", [], [1], {}, {"a": 1}, True, None, [[]])
OPTIONS = ("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "target_modules", "layers_pattern")


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_that_is_none(tmp_path, option):
    for value in ODD:
        for check in (True, False):
            folder = hostile.peft_folder(tmp_path, **{option: value})
            try:
                model = lora_fx.load_adapter(hostile.Net(), folder, torch.ones(3, 8), check=check)
            except LoraFxError as error:
                assert len(str(error)) < 20_000 and error.remedy
            else:
                assert bool(model(torch.ones(3, 8)).isfinite().all())
    for value in (1e308, -1e39, float("nan")):
        folder = hostile.peft_folder(tmp_path, lora_alpha=value)
        call = partial(lora_fx.load_adapter, hostile.Net(), folder, check=False)
        refused(call, "lora_alpha", "is not a finite number in float32", kind=FileError)


TOML = ('"x"', '""', "-1", "1.5", "1e308", "nan", "true", "[]", '["a"]', "[[1]]", "{a=1}", "1979-05-27", "9" * 30)
LAYERS = ('"²"', '"' + "9" * 5000 + '"', "[true]", "[1.5]", '"1-"', '"0-3;7"')


@pytest.mark.parametrize("key", [name for name in Rule.__dataclass_fields__ if name != "op"])
def test_a_rule_in_a_file_that_is_none(tmp_path, key):
    for value in (*TOML, *(LAYERS if key == "layers" else ())):
        said = {"where": '"*"', "rank": "2", key: value}
        try:
            hostile.rule("\n".join(f"{k} = {v}" for k, v in said.items()))(tmp_path)()
        except LoraFxError as error:
            assert len(str(error)) < 20_000 and error.remedy
        else:
            assert key not in ("when", "pattern", "layers")


def test_rules_that_are_none(tmp_path):
    file = tmp_path / "rules.toml"
    for text in ("rule = 1", "rule = [1]", "a = 1", "", "x = " + "[" * 5000, "x = " + "9" * 5000, "\0"):
        file.write_text(text)
        refused(lambda: lora_fx.plan(hostile.Net(), file, torch.ones(3, 8)), str(file), kind=RuleError)
    for rules in ({"rule": 1}, {"rule": [1]}, "a\0b", 1, None, {"where": "*", 3: 4}):
        refused(lambda rules=rules: lora_fx.plan(hostile.Net(), rules, torch.ones(3, 8)), kind=RuleError)
    wide = Rule(layers=range(10**15), rank=2)
    assert wide._in_layers(10**14) and not wide._in_layers(None) and not Rule(layers="3, 5-7", rank=2)._in_layers(4)


def test_every_reader_takes_regular_files_only(files, tmp_path):
    """A pipe keeps a reader waiting for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    session, shared = Session(files / "switchable.onnx"), Session(files / "base.onnx", shared=True)
    calls = {
        "adapter": lambda place: session.load_adapter(place),
        "task": lambda place: shared.task(place),
        "base": lambda place: save_onnx_weights(place, files / "folded.onnx", tmp_path / "w"),
        "folded": lambda place: save_onnx_weights(files / "base.onnx", place, tmp_path / "w"),
        "fold": lambda place: lora_fx.fold_onnx(place, tmp_path / "o.onnx"),
        "weights": lambda place: lora_fx.export_onnx(
            nn.Linear(2, 2, device="meta"), torch.ones(1, 2), tmp_path / "m.onnx", weights=place, check=False
        ),
    }
    for call in calls.values():
        refused(lambda call=call: call(pipe), "no regular file but a pipe")
        refused(lambda call=call: call(Path("/dev/zero")), "no regular file but a device")
