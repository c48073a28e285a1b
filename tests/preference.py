"""TRL's trainers on an adapted model: SFT, and those that want a reference with the model itself for it. By hand:

    pip install trl && python -m tests.preference

A small Llama with a tokenizer made here, on Python's own documentation; nothing is downloaded. Each runs with a second
model and with `lora_fx.reference(model)`, given to it or as a block around its construction, and must end in the same
bits; the bytes of all tensors that are alive are counted in all, and for TRL with PEFT.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import itertools
import os
import random
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
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


def same(model: nn.Module, wanted: dict[str, torch.Tensor]) -> bool:
    found = model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(t, wanted[name]) for name, t in found.items())


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


def pairs() -> list[dict[str, str]]:
    rng = random.Random(0)
    return [
        {"prompt": " ".join(s[:6]), "chosen": " " + " ".join(s[6:]), "rejected": " " + " ".join(rng.sample(s[6:], 6))}
        for s in sentences()
    ]


def labelled() -> list[dict[str, Any]]:
    names = ("chosen", "rejected")
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in pairs()
        for name in names
    ]


def reward(completions: list[str], **rest: Any) -> list[float]:
    return [sum(len(word) < 5 for word in own.split()) / 8 for own in completions]


@dataclass(frozen=True)
class Method:
    """A trainer of TRL's that wants a reference, and what it is given."""

    name: str
    module: str
    rows: list[dict[str, Any]]
    settings: dict[str, Any]
    others: dict[str, Any] = field(default_factory=dict)
    given: bool = False
    """It takes `ref_model`; others load it by themselves."""
    copies: bool = False
    """It copies the model for want of one."""
    what: str = "loss"

    def run(self, folder: Path, tokenizer: Any, model: nn.Module, block: Any = None, **more: Any) -> tuple[Any, int]:
        """The trainer after its steps, and the bytes alive before the first one."""
        from datasets import Dataset

        module = importlib.import_module(self.module)
        arguments = settings(getattr(module, f"{self.name}Config"), folder / self.name, **self.settings)
        data = Dataset.from_list(self.rows)
        with block or contextlib.nullcontext():
            trainer = getattr(module, f"{self.name}Trainer")(
                model, args=arguments, train_dataset=data, processing_class=tokenizer, **self.others, **more
            )
        held = alive()
        torch.manual_seed(2)
        return train(trainer), held


def methods() -> list[Method]:
    prompts = [{"prompt": " ".join(s[:4])} for s in sentences()]
    online = dict(num_generations=4, max_completion_length=8)
    rewarded: dict[str, Any] = dict(others={"reward_funcs": reward}, what="reward")
    return [
        Method("DPO", "trl", pairs(), dict(max_length=24), given=True),
        Method("KTO", "trl", labelled(), dict(max_length=24), given=True),
        Method("GRPO", "trl", prompts, dict(online, beta=0.04), **rewarded),
        Method("RLOO", "trl", prompts, dict(online, beta=0.04), **rewarded),
        Method("GMPO", "trl.experimental.gmpo", prompts, dict(online, beta=0.04), **rewarded),
        Method(
            "OnlineDPO", "trl.experimental.online_dpo", prompts, dict(max_new_tokens=8, max_length=24),
            others={"reward_funcs": reward}, given=True, copies=True,
        ),
    ]  # fmt: skip


def compared(method: Method, folder: Path, tokenizer: Any) -> list[list[str]]:
    """With the model as its own reference, in each way that there is; and with a second model."""
    from peft import LoraConfig

    def started(block: bool = False, given: bool = False) -> tuple[Any, int]:
        gc.collect()
        before, model = alive(), adapted(folder)
        own = lora_fx.reference(model)
        more = {"ref_model": own} if given else {}
        trainer, held = method.run(folder, tokenizer, model, own if block else None, **more)
        return trainer, held - before

    second, theirs = started()
    kept, found = copy.deepcopy(second.model.state_dict()), losses(second, method.what)
    del second
    rows = [[f"{method.name}, a second model", "{:.3f} → {:.3f}".format(*found), f"{theirs:,}"]]
    ways = {"reference(model)": dict(given=True)} if method.given else {}
    ways |= {} if method.copies else {"with reference(model):": dict(block=True)}
    for way, how in ways.items():
        one, mine = started(**how)
        rows.append([f"{method.name}, {way}", f"the same bits: {same(one.model, kept)}", f"{mine:,}"])
        del one
    gc.collect()
    before = alive()
    config = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear")
    third, pefts = method.run(folder, tokenizer, loaded(folder), peft_config=config)
    rows.append([f"{method.name}, PEFT", "{:.3f} → {:.3f}".format(*losses(third, method.what)), f"{pefts - before:,}"])
    return rows


def main() -> int:
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = made(Path(folder))
        rows = [sft(Path(folder), tokenizer)]
        for method in methods():
            rows += compared(method, Path(folder), tokenizer)
    print(table(["trainer", "result", "bytes alive before the first step"], rows))
    return int(any("False" in cell for cell in itertools.chain(*rows)))


if __name__ == "__main__":
    sys.exit(main())
