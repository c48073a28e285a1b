"""Adapt a transformers model with its Trainer: a small byte-level Llama learns to SHOUT the Python manual.

python examples/transformers_trainer.py     (needs transformers and accelerate; about twenty seconds)
"""

import math
import tempfile
from pydoc_data.topics import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments, set_seed

import lora_fx
from lora_fx import Rule

LENGTH = 64


def windows(text: str) -> list[dict[str, torch.Tensor]]:
    """Byte-level tokens, 64 at a time."""
    tokens = torch.tensor(list(text.encode()))
    pieces = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def train(model: LlamaForCausalLM, data: list, steps: int, rate: float) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch, max_steps=steps, learning_rate=rate, per_device_train_batch_size=16, warmup_steps=20,
            lr_scheduler_type="cosine", use_cpu=True, save_strategy="no", report_to="none",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()


@torch.no_grad()
def bits(model: LlamaForCausalLM, data: list) -> str:
    tokens = torch.stack([piece["input_ids"] for piece in data])
    return f"{model(input_ids=tokens, labels=tokens).loss / math.log(2):.2f} bits per byte"


def sample(model: LlamaForCausalLM, prompt: str) -> str:
    tokens = torch.tensor([list(prompt.encode())])
    written = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=60, do_sample=False)
    return repr(bytes(written[0].tolist()).decode(errors="replace"))


set_seed(0)
torch.set_num_threads(1)  # a model this small is fastest on one
text = "\n".join(topics[name] for name in sorted(topics))
plain, loud = windows(text), windows(text.upper())
cut = len(plain) * 9 // 10  # train on what comes before, test on a hundred windows after it
plain_test, loud_test = plain[cut : cut + 100], loud[cut : cut + 100]

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.1,
    bos_token_id=None, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
model = LlamaForCausalLM(config)
train(model, plain[:cut], steps=240, rate=6e-3)
print("base, plain text:    ", bits(model, plain_test))
print("base, loud text:     ", bits(model, loud_test))
print("base writes          ", sample(model, "The class "))

rules = [
    Rule(role="attention.*", rank=8, alpha=16),
    Rule(role="mlp.* | lm_head | embedding", rank=8, alpha=16),
]
print(lora_fx.plan(model, rules))
lora_fx.apply(model, rules)
train(model, loud[:cut], steps=120, rate=1e-2)
print("adapted, loud text:  ", bits(model, loud_test))

with tempfile.TemporaryDirectory() as folder:
    lora_fx.save_adapter(model, folder)  # PEFT's own format
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if "lora" not in k})
    lora_fx.load_adapter(fresh, folder)
lora_fx.fold(model)
print("folded writes        ", sample(model, "THE CLASS "))
print("reloaded writes      ", sample(fresh, "THE CLASS "))
lora_fx.unfold(model)
lora_fx.deactivate(model)
print("switched off writes  ", sample(model, "The class "))
