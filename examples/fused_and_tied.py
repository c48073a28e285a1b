"""Weights that names cannot tell apart: the query rows of a fused projection, one use of a tied table.

python examples/fused_and_tied.py           (a few seconds)
"""

import copy

import torch
from torch import nn
from torch.nn import functional as F

import lora_fx
from lora_fx import Rule


class Language(nn.Module):
    """One matrix makes query, key and value, interleaved per head; one table embeds words and predicts them."""

    def __init__(self, words: int = 100, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Embedding(words, width)
        self.fused, self.back = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, words, bias=False)
        self.head.weight = self.table.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        q, k, v = self.fused(x).unflatten(-1, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.back(mixed.transpose(1, 2).flatten(2)))


torch.manual_seed(0)
model, tokens = Language().eval(), torch.randint(0, 100, (2, 12))
base = copy.deepcopy(model)

rules = [Rule(role="attention.query", rank=4), Rule(role="lm_head", rank=4)]
print(lora_fx.plan(model, rules, tokens))
lora_fx.apply(model, rules, tokens)
print("\nthe forward of `fused`, rewritten:\n" + str(lora_fx.show(model.fused)) + "\n")

print("freshly adapted = base, bit for bit:", torch.equal(model(tokens), base(tokens)))
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            parameter.normal_()  # as if it had been trained
folded = lora_fx.fold(model, copy=True)
print("folded against adapted:", lora_fx.verify(model, folded, tokens))

changed = (folded.fused.weight != base.fused.weight).any(dim=1)
print("rows that folding changed, head by head (q k v):", *changed.view(4, 3, 8).sum(dim=2).tolist())
print("the embedding is bitwise what it was:", torch.equal(folded.table.weight, base.table.weight))
print("the head has a copy of its own:", folded.head.weight is not folded.table.weight)

try:  # what matches nothing is refused, with what it could have matched
    lora_fx.plan(base, Rule(role="attention.querry", rank=4), tokens)
except lora_fx.LoraFxError as error:
    print("\na typo:", error)
