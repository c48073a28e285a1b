"""The memory of training GPT-3 (4.2: 1.2 TB → 350 GB with r = 4 on q and v), on its shape alone."""

from __future__ import annotations

import torch

import lora_fx
from lora_fx import Memory, Rule
from lora_fx.paper.architectures import gpt3_that_runs

THEIRS = "theirs: 1.2 TB → 350 GB"


def gpt3_memory(layers: int = 96, width: int = 12288, tokens: int = 2048) -> Memory:
    """Of a step with one sequence in 16 bits with Adam, r = 4 on q and v.

    Raises:
        LoraFxError: transformers, which has the model, is not there.
    """
    rule = Rule(role="attention.query | attention.value", rank=4)
    inputs = {"input_ids": torch.zeros(1, tokens, dtype=torch.long)}
    return lora_fx.memory(gpt3_that_runs(layers, width), rule, "adam", torch.float16, inputs)


def shown(memory: Memory) -> str:
    """The table, and the paper's numbers beside it."""
    full, adapted = memory.full.state, memory.adapted.state
    return (
        f"{memory}\nstate (without activations): {full / 1e9:,.1f} GB → {adapted / 1e9:,.1f} GB "
        f"= {full / 2**40:.2f} TiB → {adapted / 2**30:.1f} GiB ({THEIRS}; 1.2 is {full / 2**40:.2f} TiB cut)"
    )
