"""`lora_fx.memory`: bytes before anything runs, against the bytes that are there when it does."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import nn

import lora_fx
from lora_fx import LoraFxError, Rule
from lora_fx.checks.footprint import Footprint, kept
from lora_fx.cli import main
from lora_fx.demo.experiment import VisionTransformer
from lora_fx.errors import CaptureError
from lora_fx.paper.training_memory import gpt3_memory


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = (
            nn.LayerNorm(32),
            nn.Linear(32, 96),
            nn.Linear(96, 32),
            nn.Dropout(0.1),
        )

    def forward(self, x):
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    return GPT2LMHeadModel(config)


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=64, intermediate_size=172, num_hidden_layers=2, vocab_size=96, **heads)
    )


IDS = {"input_ids": torch.arange(64).reshape(2, 32)}
MODELS = {
    "mlp": (lambda: nn.Sequential(Block(), Block()), torch.ones(4, 16, 32), Rule(where="*.up", rank=4)),
    "vit": (
        lambda: VisionTransformer(width=32, depth=2, heads=4), torch.ones(8, 1, 8, 8),
        Rule(role="attention.* | mlp.*", rank=4, dropout=0.1),
    ),
    "gpt2": (gpt2, IDS, Rule(role="attention.query | attention.value", rank=8)),
    "llama": (llama, IDS, Rule(role="attention.* | mlp.*", rank=8)),
}  # fmt: skip


def there(model: nn.Module, inputs: Any, make: Any, own: tuple = ()) -> Footprint:
    """What a real step holds."""
    model.train()
    given = list(inputs.values()) if isinstance(inputs, dict) else [inputs]
    outputs = []

    def forward():
        outputs.append(model(**inputs, use_cache=False) if isinstance(inputs, dict) else model(inputs))

    activations = kept(forward, [*model.parameters(), *model.buffers(), *given])
    output = getattr(outputs[0], "logits", outputs[0])
    output.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make(trained)
    optimizer.step()
    adapters = {p.data_ptr(): p for p in own}
    weights = {t.untyped_storage().data_ptr(): t for t in (*model.parameters(), *model.buffers())}

    def size(tensors: Any) -> int:
        return sum(t.untyped_storage().nbytes() for t in tensors)

    return Footprint(
        weights=size(weights.values()) - size(adapters.values()), adapters=size(adapters.values()),
        gradients=size(p.grad for p in trained),
        optimizer=size(t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)),
        activations=activations,
    )  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_it_is_what_is_measured(name):
    build, inputs, rule = MODELS[name]
    optimizer = torch.optim.Adagrad if name == "mlp" else torch.optim.AdamW
    torch.manual_seed(0)
    model = build()
    said = lora_fx.memory(model, rule, optimizer, inputs=inputs)
    full = there(copy.deepcopy(model), inputs, optimizer)
    adapted = lora_fx.apply(model, rule, inputs, check=False)
    own = tuple(p for n, p in adapted.named_parameters() if "_lora_" in n)
    real = there(adapted, inputs, optimizer, own)
    assert said.trainable == sum(p.numel() for p in own)
    for ours, theirs in ((said.full, full), (said.adapted, real)):
        exact = ("weights", "adapters", "gradients", "optimizer")
        assert [getattr(ours, part) for part in exact] == [getattr(theirs, part) for part in exact]
        assert abs(ours.activations / theirs.activations - 1) < 0.05
        assert abs(ours.total / theirs.total - 1) < 0.05
    assert said.full.activations == full.activations  # no mask and no repeated keys, as where transformers sees a trace


def test_only_what_is_kept_is_counted():
    """Of y = w·x, both are kept for backward: w is there anyway, x once, whoever keeps it."""
    w = torch.ones(10, requires_grad=True)
    x = torch.ones(10, requires_grad=True).exp()
    assert kept(lambda: (w * x, x.sin() * w[2]), [w]) == 40 + 40
    assert kept(lambda: (w * x, x.sin() * w[2]), [w, x]) == 40


def test_it_changes_nothing_and_the_model_may_be_on_meta():
    build, inputs, rule = MODELS["vit"]
    model = build().eval()
    model.requires_grad_(False)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    said = lora_fx.memory(model, rule, inputs=inputs)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    assert not lora_fx.adapters(model) and torch._subclasses.FakeTensor.__name__ == "FakeTensor"
    with torch.device("meta"):
        shape = build()
    assert lora_fx.memory(shape, rule, inputs=inputs) == said


def test_a_narrower_dtype_halves_what_the_model_holds():
    build, inputs, rule = MODELS["mlp"]
    wide = lora_fx.memory(build(), rule, inputs=inputs)
    narrow = lora_fx.memory(build(), rule, dtype=torch.bfloat16, inputs=inputs.bfloat16())
    assert 2 * narrow.full.weights == wide.full.weights and 2 * narrow.full.gradients == wide.full.gradients
    assert narrow.adapted.adapters == wide.adapted.adapters  # factors stay in float32


def test_the_report_is_a_table_and_json():
    build, inputs, rule = MODELS["mlp"]
    said = lora_fx.memory(build(), rule, inputs=inputs)
    found = json.loads(json.dumps(said.to_json()))
    for column, own in ((found["adapted"], said.adapted), (found["full"], said.full)):
        parts = [column[part] for part in ("weights", "adapters", "gradients", "optimizer", "activations")]
        assert column["total"] == sum(parts) == own.total and column["state"] == sum(parts[:4])
    lines = str(said).splitlines()
    assert [line.split()[0] for line in lines[2:9]] == [
        "weights", "adapters", "gradients", "optimizer", "state", "activations", "total"
    ]  # fmt: skip
    assert said.full.total < 1e7 and "adapted, kB" in lines[0]
    assert f"{said.full.weights / 1e3:,.2f}" in lines[2] and f"{said.trainable:,} of {said.parameters:,}" in lines[-1]


@pytest.mark.parametrize(("width", "unit"), [(2, "bytes"), (64, "kB"), (2048, "MB"), (32768, "GB")])
def test_a_small_model_is_no_row_of_zeros(width, unit):
    with torch.device("meta"):
        model, x = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False)), torch.zeros(2, width)
    lines = str(lora_fx.memory(model, Rule(where="*", rank=1), inputs=x)).splitlines()
    assert f"adapted, {unit}" in lines[0] and float(lines[2].split()[1].replace(",", "")) >= 1


def test_what_cannot_be_measured_is_refused():
    build, inputs, rule = MODELS["mlp"]
    model = build()
    with pytest.raises(LoraFxError, match="'lion' is no optimizer"):
        lora_fx.memory(model, rule, "lion", inputs=inputs)
    with pytest.raises(LoraFxError, match="its state cannot be seen on meta"):
        lora_fx.memory(model, rule, lambda parameters: 1 / 0, inputs=inputs)
    with pytest.raises(CaptureError):
        lora_fx.memory(model, rule, inputs=torch.ones(4, 16, 31))
    with pytest.raises(CaptureError, match="no example inputs"):
        lora_fx.memory(model, rule)
    lora_fx.apply(model, rule, inputs)
    with pytest.raises(LoraFxError, match="it has adapters already"):
        lora_fx.memory(model, rule, inputs=inputs)


def test_gpt3_holds_what_the_paper_says_with_adapters(tmp_path, capsys):
    """A layer more is as much more for each: two small shapes give the whole of it, in weights, to the byte."""
    one, two = gpt3_memory(1, 12288, tokens=8), gpt3_memory(2, 12288, tokens=8)

    def whole(part):
        return part(one) + 95 * (part(two) - part(one))

    assert whole(lambda m: m.full.weights) == 2 * 174_604_259_328
    assert (
        round(whole(lambda m: m.full.state) / 1e9) == 1397 and round(whole(lambda m: m.full.state) / 2**40, 2) == 1.27
    )
    assert round(whole(lambda m: m.adapted.state) / 1e9) == 350
    assert main(["paper", "memory", "--layers", "1", "-o", str(tmp_path)]) == 0
    assert "theirs: 1.2 TB → 350 GB" in capsys.readouterr().out
    assert json.loads((tmp_path / "memory.json").read_text())["layers"] == 1
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
