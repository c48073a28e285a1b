"""Files as other runtimes want them. `python -m tests.runtimes` has the runtimes that are too much for a suite."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx.errors import ExportError
from lora_fx.export import Session
from lora_fx.export.onnx.calls import CACHE, cache_word
from lora_fx.export.onnx.files import move_folder
from lora_fx.export.onnx.targets import TARGETS, step_of
from lora_fx.graph.capture import Inputs
from tests import runtimes
from tests.runtimes import ADAPTERS, FED, INPUTS, Places, Switchables

pytestmark = pytest.mark.onnx
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
CausalLMOutputWithPast = pytest.importorskip("transformers").modeling_outputs.CausalLMOutputWithPast

PLACES = Places.found()


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Switchables:
    return Switchables(tmp_path_factory.mktemp("required"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return runtimes.build("gpt2", ADAPTERS[:1], where="*attn*", n_layer=1)


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """Of transformers.js: the target with the most in it."""
    path = tmp_path_factory.mktemp("folders") / "gpt2"
    report = lora_fx.export_onnx(model, INPUTS, path, target="transformers.js", external_data=True, check=False)
    assert report.path == path / "onnx" / "model.onnx" and report.target == "transformers.js"
    assert [file.relative_to(path) for file in report.configs] == [
        *map(Path, ("config.json", "generation_config.json"))
    ]
    return path


def test_a_folder_says_the_tokens_of_torch_from_an_empty_cache_with_padding(folder, model):
    assert [p.name for p in folder.parent.iterdir()] == ["gpt2"]
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    assert files == {"config.json", "generation_config.json", "onnx/model.onnx", "onnx/model.onnx_data"}
    session = Session(folder / "onnx" / "model.onnx")
    shapes = {value.name: value.shape for value in session.session.get_inputs()}
    assert shapes["past_key_values.0.value"] == ["batch_size", 4, "past_sequence_length", 8]
    assert shapes["input_ids"] == shapes["position_ids"] == ["batch_size", "sequence_length"]
    wanted = runtimes.ended(runtimes.greedy(model))
    assert runtimes.ended(runtimes.in_session(session)) == wanted
    lora_fx.deactivate(model)
    plain = runtimes.ended(runtimes.greedy(model))
    lora_fx.activate(model, *ADAPTERS[:1])
    assert plain != wanted


def test_the_configurations_say_what_the_loaders_ask(folder, model):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "gpt2" and config["n_layer"] == 1
    said = {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    assert config["transformers.js_config"] == said
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_the_configuration_of_genai(model):
    step = step_of(model, Inputs((), INPUTS), "genai")
    TARGETS["genai"].check(step)
    config = TARGETS["genai"].configs["genai_config.json"](step, False)
    decoder = config["model"]["decoder"]
    sizes = {"head_size": 8, "hidden_size": 32, "num_key_value_heads": 4, "num_hidden_layers": 1}
    assert (
        sizes.items() <= decoder.items() and config["model"]["context_length"] == config["search"]["max_length"] == 64
    )
    assert decoder["inputs"]["position_ids"] == "position_ids" and config["model"]["type"] == "decoder"
    assert [config["model"][f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 2, 0]
    silent = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    refused(
        lambda: TARGETS["genai"].check(replace(step, config=silent)), "no max_position_embeddings", "set model.config"
    )
    refused(
        lambda: TARGETS["genai"].check(replace(step, cache=((1, 4, 6, 8), (1, 2, 6, 8)))), "2 × 8, 4 × 8", "one shape"
    )


def test_a_step_of_a_model_without_numbers_has_the_same_shapes(model):
    with torch.device("meta"):
        empty = type(runtimes.build("gpt2", (), n_layer=1))(model.config).eval()
    step = step_of(empty, Inputs((), {"input_ids": INPUTS["input_ids"].to("meta")}), "genai")
    there = step_of(model, Inputs((), INPUTS), "genai")
    assert (step.cache, step.vocabulary, step.axes) == (there.cache, there.vocabulary, there.axes)
    assert all(
        type(t) is torch.Tensor and t.is_meta
        for layer in step.inputs.kwargs[cache_word(model)].layers
        for t in (layer.keys, layer.values)
    )


def other_words(model: nn.Module) -> nn.Module:
    """The same, with the other name for its cache: ``cache`` before transformers 5.24, where it is that."""
    was, kind = cache_word(model), type(model)
    assert was == "past_key_values", "what comes after has other words by itself"

    def forward(self, input_ids, cache=None, attention_mask=None, position_ids=None, use_cache=None):
        output = kind.forward(
            self, input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=use_cache,
        )  # fmt: skip
        return {"logits": output.logits, "cache": output.past_key_values}

    model.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return model


@pytest.mark.skipif(hasattr(CausalLMOutputWithPast, "cache"), reason="transformers' own models have these words")
def test_a_model_that_calls_its_cache_by_another_name_gives_the_same_file(tmp_path, model):
    plain, other = (runtimes.build("gpt2", (), n_layer=1) for _ in range(2))
    names = []
    for k, one in enumerate((plain, other_words(other))):
        report = lora_fx.export_onnx(one, INPUTS, tmp_path / f"m{k}", target="transformers.js")
        names.append(([i.name for i in report.inputs], [o.name for o in report.outputs]))
        step = step_of(one, Inputs((), INPUTS), "transformers.js")
        kwargs, axes = (
            {CACHE if name == "cache" else name: value for name, value in given.items()}
            for given in (step.inputs.kwargs, step.axes)
        )
        report = lora_fx.export_onnx(one, kwargs, tmp_path / f"m{k}.onnx", dynamic_shapes=axes, check=False)
        names.append([i.name for i in report.inputs])
    assert sorted(names[0][0]) == sorted(names[2][0]) and sorted(names[1]) == sorted(names[3])
    assert "past_key_values.0.key" in names[2][0] and names[2][1] == names[0][1]


def test_a_folder_that_is_there_keeps_what_else_is_in_it(tmp_path):
    made, target = tmp_path / "made" / "m", tmp_path / "m"
    for folder, said in ((made, "new"), (target, "old")):
        (folder / "onnx").mkdir(parents=True)
        for name in ("config.json", "onnx/model.onnx"):
            (folder / name).write_text(said)
    (target / "tokenizer.json").write_text("kept")
    move_folder(made, [made / "onnx" / "model.onnx"], [made / "config.json"], target)
    found = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert found == {"config.json": "new", "onnx/model.onnx": "new", "tokenizer.json": "kept"}


class Plain(nn.Module):
    """No decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, input_ids):
        return self.head(input_ids)


REFUSED = {
    "unknown": (dict(target="tflite"), "target='tflite' is unknown", "'transformers.js'"),
    "names": (dict(target="genai", dynamic_shapes={}), "names of its own", "leave dynamic_shapes out"),
    "both names": (dict(target="genai", input_names=["a"], output_names=["b"]), "leave input_names and output_names"),
    "slots": (dict(slots="some"), "slots='some' is unknown", "'required'"),
    "no slots": (dict(slots="required"), "the graph has no slots", 'adapters="switchable"'),
    "genai": (
        dict(target="genai", adapters="switchable", slots="required"),
        "genai gives a graph nothing for required",
    ),
    "optimum": (dict(target="optimum", adapters="switchable"), "it would fail, or be the base model", 'target="genai"'),
}


@pytest.mark.parametrize("options, parts", [(o, p) for o, *p in REFUSED.values()], ids=REFUSED)
def test_what_a_target_cannot_serve_is_refused_at_once(tmp_path, model, options, parts):
    refused(lambda: lora_fx.export_onnx(model, INPUTS, tmp_path / "m", **options), *parts)
    assert [*tmp_path.iterdir()] == []


def refused(call, *parts: str) -> None:
    with pytest.raises(ExportError) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


@pytest.mark.parametrize("target", [name for name, row in TARGETS.items() if row.graph])
def test_models_and_inputs_that_are_no_decoders_are_refused_before_the_export(tmp_path, model, target, monkeypatch):
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: pytest.fail("the export ran"))

    def export(subject, inputs):
        return lambda: lora_fx.export_onnx(subject, inputs, tmp_path / "m", target=target)

    refused(export(Plain(), torch.zeros(2, 4)), f"target='{target}' runs decoders", "attention_mask", 'target="ort"')
    refused(export(model, {"input_ids": torch.ones(1, 3, dtype=torch.int64)}), "4 or more", "[1, 3]")
    mask = {**INPUTS, "attention_mask": torch.ones_like(INPUTS["input_ids"])}
    refused(export(model, mask), "takes input_ids alone", "with attention_mask")
    (tmp_path / "m").write_text("a file")
    refused(export(model, INPUTS), "the path is a file", "pass the path of a folder")
    assert [p.read_text() for p in tmp_path.iterdir()] == ["a file"]


def test_a_decoder_that_returns_no_cache_is_refused(tmp_path, model, monkeypatch):
    forward = type(model).forward

    def without(self, *args, past_key_values=None, use_cache=None, **kwargs):
        return forward(self, *args, use_cache=False, **kwargs)

    without.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(type(model), "forward", without)
    refused(
        lambda: lora_fx.export_onnx(model, INPUTS, tmp_path / "m", target="optimum"),
        "does not give logits and a cache", 'target="ort"',
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "other", "parts"),
    [("olmo2", {}, ("olmo2 4 × 8", "the model's is 2 × 8")), ("qwen3", {"head_dim": 16}, ("qwen3 2 × 8", "is 2 × 16"))],
)
def test_a_cache_of_another_shape_than_optimum_makes_is_refused(tmp_path, name, other, parts):
    """optimum-onnx 0.1 knows the grouped heads of some architectures, and the size of a head of fewer."""
    model = runtimes.build(name, adapters=(), **other)
    refused(lambda: lora_fx.export_onnx(model, INPUTS, tmp_path / "m", target="optimum"), *parts, "transformers.js")
    assert [*tmp_path.iterdir()] == []


# ── required slots ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("ending", [".safetensors", ".onnx_adapter"])
def test_a_session_serves_required_slots_by_both_kinds_of_file(case, ending, tmp_path):
    if ending == ".safetensors":
        files = {name: case.folder / f"{name}{ending}" for name in ADAPTERS}
    else:
        files = {n: lora_fx.save_onnx_adapter(runtimes.net(), tmp_path / f"{n}{ending}", name=n) for n in ADAPTERS}
    session = Session(case.folder / "required.onnx", adapters=files)
    given = session.session.get_inputs()
    assert not session.session.get_overridable_initializers() and len(given) == 2 + 2 * 3
    assert session.inputs == ("ids", "x") and [i.name for i in case.report.inputs] == ["ids", "x"]
    for name in ("", *ADAPTERS, ""):
        for fed in (FED, {key: tensor.numpy() for key, tensor in FED.items()}):
            assert case.close(name, torch.as_tensor(session.run(fed, name or None)["logits"]))
    assert not case.close("", torch.as_tensor(session.run(FED, ADAPTERS[0])["logits"]))


def test_the_runtime_itself_asks_for_what_is_required(case):
    session = Session(case.folder / "required.onnx").session
    with pytest.raises(ValueError, match=r"Required inputs \(\[.*lora_A"):
        session.run(None, {key: tensor.numpy() for key, tensor in FED.items()})


def test_damaged_and_foreign_files_of_tensors_are_refused(case, tmp_path):
    session, whole = Session(case.folder / "required.onnx"), (case.folder / "one.safetensors").read_bytes()
    refused(lambda: session.load_adapter(case.folder / "foreign.safetensors"), "it is for base model")
    session.load_adapter(case.folder / "one.safetensors", "right")
    right, file = session.run(FED, "right")["logits"], tmp_path / "damaged.safetensors"
    data = 8 + int.from_bytes(whole[:8], "little")
    for at in (*range(0, data, 7), *range(data, len(whole), 13)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        try:
            session.load_adapter(file)
        except ExportError:
            continue
        assert at < data and torch.equal(session.run(FED, "damaged")["logits"], right)
    from safetensors.numpy import save_file

    save_file({"head.weight.lora_A": numpy.zeros((2, 12), numpy.float32)}, file)
    refused(lambda: session.load_adapter(file), "does not say which base model")


@pytest.fixture(scope="module")
def javascript(case) -> Path:
    return case.for_javascript()


@pytest.mark.skipif(PLACES.modules is None, reason="no node, or no node_modules: LORA_FX_MODULES names their folder")
@pytest.mark.parametrize("package", ["onnxruntime-node", "onnxruntime-web"])
def test_a_runtime_in_javascript_serves_required_slots(case, javascript, package):
    found = runtimes.in_node(PLACES.modules, package, javascript)
    assert case.wrong(found) == []
    silent = found["silent"]  # A and B given to a graph with defaults, without our loader
    if package == "onnxruntime-node":
        assert case.close("", silent) and not case.close(ADAPTERS[0], silent)
    else:
        assert silent.startswith("invalid input")
