"""Ways to export: with a cache for generation, from a checkpoint on disk, from models on meta."""

from __future__ import annotations

import json
import weakref

import numpy
import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.errors import ExportError, FoldError
from lora_fx.export import Session, save_onnx_adapter
from tests import reference

pytestmark = [
    pytest.mark.onnx,
    pytest.mark.filterwarnings("ignore:.*PEFT reads the file, and its merge would be wrong"),  # of a tied weight
]
pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")


# ── a cache ──────────────────────────────────────────────────────────────────────────────────────────────────────────

AXES = {
    "input_ids": {0: "batch", 1: "tokens"},
    "attention_mask": {0: "batch", 1: "past + tokens"},
    "past_key_values": {0: "batch", 2: "past"},
}


class Generating:
    """A small GPT-2 with two adapters, and inputs with a cache in them."""

    def __init__(self) -> None:
        from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel

        torch.manual_seed(1)
        config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=60, n_positions=48)
        self.model = GPT2LMHeadModel(config).eval()
        self.cache, ids = DynamicCache(), torch.randint(0, 60, (2, 6))
        with torch.no_grad():
            self.model(ids[:, :4], past_key_values=self.cache, use_cache=True)
        mask = torch.ones(2, 6, dtype=torch.long)
        self.inputs = {
            "input_ids": ids[:, 4:],
            "attention_mask": mask,
            "past_key_values": self.cache,
            "use_cache": True,
        }
        for name in ("one", "two"):
            lora_fx.apply(self.model, Rule(where="*attn* | *mlp*", rank=3), {"input_ids": ids}, name=name)
        reference.fill(self.model)

    def greedy(self, prompt: torch.Tensor, *names: str) -> numpy.ndarray:
        lora_fx.activate(self.model, *names)
        return self.model.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0).numpy()

    def from_file(self, session: Session, prompt: torch.Tensor, adapter: str | None = None) -> numpy.ndarray:
        """Greedy tokens, token by token, from an empty past on."""
        past = {n: numpy.zeros((1, 2, 0, 8), numpy.float32) for n in session.inputs if n.startswith("past")}
        step = tokens = prompt.numpy()
        for _ in range(10):
            mask = numpy.ones((1, tokens.shape[1]), numpy.int64)
            out = session.run({"input_ids": step, "attention_mask": mask, **past}, adapter)
            step = out["logits"][:, -1:].argmax(-1)
            tokens = numpy.concatenate([tokens, step], 1)
            past = {name.replace("present", "past_key_values"): v for name, v in out.items() if name != "logits"}
        return tokens


@pytest.fixture(scope="module")
def generating() -> Generating:
    return Generating()


@pytest.mark.xdist_group("generating")
def test_a_file_with_a_cache_generates_torchs_tokens_folded(generating, tmp_path):
    before = [layer.keys.clone() for layer in generating.cache.layers]
    lora_fx.activate(generating.model, "one")
    report = lora_fx.export_onnx(
        generating.model, generating.inputs, tmp_path / "m.onnx", dynamic_shapes=AXES, prove=True
    )
    past = [f"past_key_values.{n}.{part}" for n in (0, 1) for part in ("key", "value")]
    assert [i.name for i in report.inputs] == ["input_ids", *past, "attention_mask"]
    assert [o.name for o in report.outputs] == ["logits", *(p.replace("past_key_values", "present") for p in past)]
    assert report.inputs[-1].shape == ("batch", "past + tokens") and len(report.comparisons) == 3
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, generating.cache.layers, strict=True))
    session = Session(report.path)
    for prompt in (torch.tensor([[5]]), torch.tensor([[7, 8, 1, 30]])):
        assert numpy.array_equal(generating.from_file(session, prompt), generating.greedy(prompt, "one"))


@pytest.mark.xdist_group("generating")
def test_a_file_with_a_cache_generates_torchs_tokens_switchable(generating, tmp_path):
    report = lora_fx.export_onnx(
        generating.model, generating.inputs, tmp_path / "m.onnx", dynamic_shapes=AXES, adapters="switchable"
    )
    files = {n: save_onnx_adapter(generating.model, tmp_path / f"{n}.onnx_adapter", name=n) for n in ("one", "two")}
    session, prompt, seen = Session(report.path, adapters=files), torch.tensor([[7, 8, 1, 30]]), set()
    for name in (None, "one", "two"):
        tokens = generating.from_file(session, prompt, name)
        assert numpy.array_equal(tokens, generating.greedy(prompt, *([name] if name else [])))
        seen.add(tokens.tobytes())
    assert len(seen) == 3, "the adapters say the same: they prove nothing"


@pytest.mark.xdist_group("generating")
def test_a_file_for_the_prompt_gives_the_cache(generating, tmp_path):
    lora_fx.activate(generating.model, "two")
    inputs = {"input_ids": torch.tensor([[3, 9, 4]]), "use_cache": True}
    report = lora_fx.export_onnx(generating.model, inputs, tmp_path / "m.onnx", dynamic_shapes={"input_ids": {1: "n"}})
    assert [o.name for o in report.outputs[:2]] == ["logits", "present.0.key"] and len(report.comparisons) == 3


@pytest.mark.xdist_group("generating")
def test_caches_that_have_no_flat_form_are_refused(generating, tmp_path):
    from transformers import DynamicCache, StaticCache

    static = StaticCache(config=generating.model.config, max_cache_len=8)
    for cache, said in ((static, "StaticCache"), (DynamicCache(config=generating.model.config), "is empty")):
        with pytest.raises(ExportError, match=said) as caught:
            lora_fx.export_onnx(generating.model, {**generating.inputs, "past_key_values": cache}, tmp_path / "m.onnx")
        assert caught.value.place == "example_inputs" and "cache" in caught.value.remedy
    assert not list(tmp_path.iterdir()) and "forward" not in generating.model.__dict__


# ── a checkpoint ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Net(nn.Module):
    """A tied weight, a buffer that no checkpoint holds, and one that every checkpoint does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid, self.head = nn.Embedding(90, 12), nn.Linear(12, 12), nn.Linear(12, 90, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 12), persistent=False)
        self.register_buffer("scale", torch.linspace(1, 2, 12))

    def forward(self, ids):
        return self.head((self.mid(self.embed(ids) * self.scale) + self.shift).tanh())


IDS = torch.arange(12).reshape(3, 4)


def checkpoint(folder, model: nn.Module, sharded: bool = False):
    from safetensors.torch import save_file

    tensors = {n: t.detach().clone() for n, t in model.state_dict().items() if "_lora_" not in n and n != "head.weight"}
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return folder / "model.safetensors"
    names = {}
    for n, (key, tensor) in enumerate(tensors.items()):
        save_file({key: tensor}, folder / f"part{n}.safetensors")
        names[key] = f"part{n}.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    return folder


def on_meta(dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.device("meta"):
        model = Net().to(dtype).eval()
    model._buffers["shift"] = torch.linspace(-1, 1, 12, dtype=dtype)
    return model


@pytest.fixture
def real(tmp_path):
    torch.manual_seed(0)
    model = Net().eval()
    lora_fx.apply(model, [Rule(where="mid", rank=2), Rule(form="linear", rank=3)], IDS)
    reference.fill(model)
    lora_fx.save_adapter(model, tmp_path / "adapter")
    return model


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("form", ["folded", "unfolded"])
def test_a_model_on_meta_is_the_model_in_memory(tmp_path, real, sharded, form):
    place = checkpoint(tmp_path, real, sharded)
    model = lora_fx.load_adapter(on_meta(), tmp_path / "adapter", IDS)
    options = dict(dynamic_shapes={"ids": {0: "batch"}}, adapters=form, prove=form == "folded")
    made = lora_fx.export_onnx(model, IDS, tmp_path / "meta.onnx", weights=place, **options)
    wanted = lora_fx.export_onnx(real, IDS, tmp_path / "real.onnx", **options)
    assert "on meta" in made.not_run and made.comparisons == () and made.graph == wanted.graph
    a, b = ({i.name: i for i in onnx.load(report.path).graph.initializer} for report in (made, wanted))
    assert a.keys() == b.keys() and all(a[n].SerializeToString() == b[n].SerializeToString() for n in a)
    assert all(p.is_meta for n, p in model.named_parameters() if "_lora_" not in n) and not model.shift.is_meta


def test_a_switchable_graph_from_a_checkpoint_takes_the_adapters_of_the_model(tmp_path, real):
    place, model = checkpoint(tmp_path, real), lora_fx.load_adapter(on_meta(), tmp_path / "adapter", IDS)
    made = lora_fx.export_onnx(model, IDS, tmp_path / "m.onnx", weights=place, adapters="switchable")
    file = save_onnx_adapter(real, tmp_path / "a.onnx_adapter")
    session = Session(made.path, adapters={"a": file})
    for name in (None, "a"):
        lora_fx.activate(real, *(["default"] if name else []))
        with torch.no_grad():
            wanted = real(IDS)
        (got,) = session.run(IDS, name).values()
        assert lora_fx.checks.verification.compare(wanted, got, wanted.double(), 0.0, torch.float32)
    with pytest.raises(ExportError, match="on meta: which base model this is cannot be told"):
        save_onnx_adapter(model, tmp_path / "b.onnx_adapter")


def test_what_is_stored_in_float32_is_folded_in_it_and_rounded_once(tmp_path, real):
    place = checkpoint(tmp_path, real)
    model = lora_fx.load_adapter(on_meta(torch.float16), tmp_path / "adapter", IDS)
    made = lora_fx.export_onnx(model, IDS, tmp_path / "half.onnx", weights=place, prove=True)
    values = {i.name: onnx.numpy_helper.to_array(i) for i in onnx.load(made.path).graph.initializer}
    exact = lora_fx.fold(real.double(), copy=True, final=True).mid.weight.detach()
    got = torch.from_numpy(values["mid.weight.transposed"].T.copy())
    assert got.dtype == torch.float16 and torch.equal(got, lora_fx.deltas.rounding.round_once(exact, torch.float16))


def test_nothing_is_read_before_it_is_written(tmp_path, real, monkeypatch):
    """One tensor in memory at a time."""
    from lora_fx.export.onnx import weights as onnx_weights

    place, model = checkpoint(tmp_path, real), lora_fx.load_adapter(on_meta(), tmp_path / "adapter", IDS)
    alive, most, read = [], [0], onnx_weights._read

    def counting(file, name):
        tensor = read(file, name)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(ref() is not None for ref in alive))
        return tensor

    monkeypatch.setattr(onnx_weights, "_read", counting)
    monkeypatch.setattr("lora_fx.export.onnx.optimization._FOLDABLE", 0)  # as if every weight were large
    lora_fx.export_onnx(model, IDS, tmp_path / "m.onnx", weights=place, external_data=True)
    assert len(alive) >= 4 and most[0] <= 2


def refused(call, *parts: str, error: type = ExportError) -> None:
    with pytest.raises(error) as caught:
        call()
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path, real):
    from safetensors.torch import save_file

    out, place = tmp_path / "m.onnx", checkpoint(tmp_path, real)

    def export(model=None, weights=place):
        model = model or lora_fx.load_adapter(on_meta(), tmp_path / "adapter", IDS)
        lora_fx.export_onnx(model, IDS, out, weights=weights)

    refused(lambda: export(Net().eval()), "has its numbers already", "weights")
    refused(lambda: export(weights=tmp_path / "none"), "no such file or folder", "none")
    refused(lambda: export(weights=tmp_path / "adapter" / "adapter_config.json"), "cannot be read")
    (tmp_path / "empty").mkdir()
    refused(lambda: export(weights=tmp_path / "empty"), "holds no .safetensors file")
    (tmp_path / "bad.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    refused(lambda: export(weights=tmp_path / "bad.index.json"), "no index of files beside")
    everything = on_meta()
    everything._buffers["shift"] = everything.shift.to("meta")
    refused(lambda: export(everything), "shift is on meta, and in none of its files", "buffers that no checkpoint")
    names = ("embed.weight", "mid.weight", "mid.bias", "scale")
    save_file({name: torch.zeros(3, 3) for name in names}, tmp_path / "o.safetensors")
    refused(lambda: export(weights=tmp_path / "o.safetensors"), "shape (3, 3) where the model has")
    damaged = tmp_path / "d.safetensors"
    damaged.write_bytes(place.read_bytes()[:-40])
    refused(lambda: export(weights=damaged), "cannot be read", "d.safetensors")
    tensors = {n: t.clone() for n, t in real.state_dict().items() if "_lora_" not in n and n != "head.weight"}
    tensors["mid.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "n.safetensors")
    refused(lambda: export(weights=tmp_path / "n.safetensors"), "mid.weight", "is not finite", error=FoldError)
    refused(lambda: lora_fx.export_onnx(on_meta(), IDS, out), "on meta", "pass weights=")
    assert not out.exists()
