"""TRL's trainers on an adapted model: SFT, then DPO and GRPO with the model itself as their reference. Run by hand:

    pip install trl && python -m tests.preference

A small Llama with a tokenizer made here, on Python's own documentation; nothing is downloaded. DPO and GRPO run twice,
with `lora_fx.reference(model)` and with a second model, and must end in the same bits; the bytes of all tensors that
are alive are counted in both, and for TRL with PEFT.
"""

from __future__ import annotations

import copy
import gc
import itertools
import os
import random
import sys
import tempfile
import warnings
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

import lora_fx
from lora_fx import Rule
from lora_fx.tables import table

STEPS = 20
RULES = [Rule(where="lm_head"), Rule(form="linear", rank=8, alpha=16)]


def sentences() -> list[list[str]]:
    text = " ".join(topics[name] for name in sorted(topics))
    words = [word for word in text.split() if word.isalpha() and word.isascii()]
    return [words[n : n + 12] for n in range(0, 12 * 400, 12)]


def made(folder: Path) -> Any:
    """The tokenizer; the base model lies in the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *sorted({word for sentence in sentences() for word in sentence})]
    plain = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def loaded(folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder)


def adapted(folder: Path) -> nn.Module:
    torch.manual_seed(1)
    return lora_fx.apply(loaded(folder), RULES)


def alive() -> int:
    """Bytes of all tensors that there are, each storage once."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensors = [own for own in gc.get_objects() if isinstance(own, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def settings(kind: Any, folder: Path, **more: Any) -> Any:
    return kind(
        str(folder), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, save_steps=10,
        report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, dataloader_pin_memory=False, seed=0, **more,
    )  # fmt: skip


def train(trainer: Any) -> Any:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer


def losses(trainer: Any, what: str = "loss") -> tuple[float, float]:
    """Over the first and over the last five steps."""
    found = [entry[what] for entry in trainer.state.log_history if what in entry]
    return sum(found[:5]) / 5, sum(found[-5:]) / 5


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def sft(folder: Path, tokenizer: Any) -> list[str]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([{"text": " ".join(sentence)} for sentence in sentences()])
    arguments = settings(SFTConfig, folder / "sft", max_length=16)
    trainer = SFTTrainer(adapted(folder), args=arguments, train_dataset=data, processing_class=tokenizer)
    train(trainer)
    size = (folder / "sft" / "checkpoint-10" / "model.safetensors").stat().st_size
    whole = (folder / "model.safetensors").stat().st_size
    return ["SFT", "{:.3f} → {:.3f}".format(*losses(trainer)), f"checkpoint {size:,} bytes, the base {whole:,}"]


def dpo(folder: Path, tokenizer: Any) -> list[list[str]]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(s[:6]), "chosen": " " + " ".join(s[6:]), "rejected": " " + " ".join(rng.sample(s[6:], 6))}
        for s in sentences()
    ]

    def run(model: nn.Module, name: str, **more: Any) -> tuple[Any, int]:
        arguments = settings(DPOConfig, folder / name, max_length=24)
        data = Dataset.from_list(rows)
        trainer = DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer, **more)
        held = alive()
        return train(trainer), held

    before = alive()
    model = adapted(folder)
    one, mine = run(model, "dpo", ref_model=lora_fx.reference(model))
    mine -= before
    found, kept = losses(one), copy.deepcopy(model)
    del one, model
    before = alive()
    two, theirs = run(adapted(folder), "dpo2", ref_model=loaded(folder))
    theirs -= before
    bits = same(kept, two.model)
    del two, kept
    before = alive()
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    third, pefts = run(loaded(folder), "dpo3", peft_config=config)
    return [
        ["DPO, reference(model)", "{:.3f} → {:.3f}".format(*found), f"{mine:,} bytes alive before the first step"],
        ["DPO, a second model", f"the same bits: {bits}", f"{theirs:,}"],
        ["DPO, PEFT", "{:.3f} → {:.3f}".format(*losses(third)), f"{pefts - before:,}"],
    ]


def grpo(folder: Path, tokenizer: Any) -> list[list[str]]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    def reward(completions: list[str], **rest: Any) -> list[float]:
        return [sum(len(word) < 5 for word in own.split()) / 8 for own in completions]

    data = Dataset.from_list([{"prompt": " ".join(s[:4])} for s in sentences()])
    trained = []
    for beta in (0.0, 0.04):
        model = adapted(folder)
        more = dict(num_generations=4, max_completion_length=8, beta=beta)
        arguments = settings(GRPOConfig, folder / f"grpo{beta}", **more)
        trainer = GRPOTrainer(model, reward, args=arguments, train_dataset=data, processing_class=tokenizer)
        if not beta:  # with one model in memory: TRL loads a second where beta is set when the trainer is made
            trainer.ref_model, trainer.beta = lora_fx.reference(model), 0.04
            add_fused_lm_head(trainer.ref_model, temperature=trainer.temperature)
        torch.manual_seed(2)
        trained.append(train(trainer))
    one, two = trained
    return [
        ["GRPO, reference(model)", "reward {:.3f} → {:.3f}".format(*losses(one, "reward")), f"β = {one.beta}"],
        ["GRPO, a second model", f"the same bits: {same(one.model, two.model)}", f"β = {two.beta}"],
    ]


def main() -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = made(Path(folder))
        rows = [sft(Path(folder), tokenizer), *dpo(Path(folder), tokenizer), *grpo(Path(folder), tokenizer)]
    print(table(["trainer", "result", ""], rows))
    return int(any("False" in cell for cell in itertools.chain(*rows)))


if __name__ == "__main__":
    sys.exit(main())
