"""The paper's models as shapes: on meta, where nothing is allocated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lora_fx.errors import LoraFxError


@dataclass(frozen=True)
class Architecture:
    """One of the models that the paper adapts."""

    name: str
    layers: int
    width: int
    build: Callable[[Architecture], nn.Module]
    sites: dict[str, dict[str, str]]
    """q, k, v, o, the MLP's ``down``, the ``words`` of the embedding → the keys of a rule that asks for it."""
    inputs: Callable[[], Any] = lambda: None
    """Of a model in which only its program tells the parts of a weight apart; the others are planned by their names."""

    def on_meta(self) -> nn.Module:
        with torch.device("meta"):
            return self.build(self)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise LoraFxError(
            f"transformers cannot be imported: {error}",
            place="the shapes of RoBERTa, DeBERTa and GPT-2",
            remedy="pip install 'lora-fx[paper]'",
        ) from error
    return transformers


def _roberta(a: Architecture) -> nn.Module:
    t = _transformers()
    config = t.RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, hidden_size=a.width,
        num_hidden_layers=a.layers, num_attention_heads=a.width // 64, intermediate_size=4 * a.width,
    )  # fmt: skip
    return nn.ModuleDict({"model": t.RobertaModel(config)})


def _deberta(a: Architecture) -> nn.Module:
    t = _transformers()
    config = t.DebertaV2Config(
        vocab_size=128100, hidden_size=a.width, num_hidden_layers=a.layers, num_attention_heads=a.width // 64,
        intermediate_size=4 * a.width, relative_attention=True, position_buckets=256, norm_rel_ebd="layer_norm",
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
        conv_kernel_size=3, conv_act="gelu",
    )  # fmt: skip
    return nn.ModuleDict({"model": t.DebertaV2Model(config)})


def gpt2(layers: int, width: int, vocabulary: int = 50257) -> nn.Module:
    """GPT-2 of this shape, with random weights; 24 layers, 1,024 wide, is GPT-2 medium.

    Raises:
        LoraFxError: transformers is not there.
    """
    t = _transformers()
    end = min(50256, vocabulary - 1)
    config = dict(vocab_size=vocabulary, bos_token_id=end, eos_token_id=end)
    return t.GPT2LMHeadModel(t.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 64, **config))


def _gpt2(a: Architecture) -> nn.Module:
    return gpt2(a.layers, a.width)


class _Block(nn.Module):
    """One of GPT-3's, as the paper speaks of it: four matrices of attention, two of the MLP, all with a bias."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)


def _gpt3(a: Architecture) -> nn.Module:
    """Vocabulary and positions of GPT-2 and GPT-3 (Brown et al. 2020), the head tied to the embedding."""
    blocks = nn.ModuleList(_Block(a.width) for _ in range(a.layers))
    parts = {"tokens": nn.Embedding(50257, a.width), "positions": nn.Embedding(2048, a.width)}
    return nn.ModuleDict({**parts, "blocks": blocks, "norm": nn.LayerNorm(a.width)})


def gpt3_that_runs(layers: int = 96, width: int = 12288) -> nn.Module:
    """GPT-3's shape on meta, as a GPT-2 of that size: with a forward."""
    t = _transformers()
    with torch.device("meta"):
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=width, n_layer=layers, n_head=width // 128, n_positions=2048))


def _named(*where: str) -> dict[str, dict[str, str]]:
    return {site: {"where": own} for site, own in zip((*"qkvo", "down", "words"), where, strict=True)}


_BEHIND = (
    "*.attention.output.dense",
    "*.layer.[0-9].output.dense | *.layer.[0-9][0-9].output.dense",
    "*.word_embeddings",
)
_ROBERTA = _named("*.self.query", "*.self.key", "*.self.value", *_BEHIND)
_DEBERTA = _named("*.query_proj", "*.key_proj", "*.value_proj", *_BEHIND)
_ROLES = {s: {"role": f"attention.{r}"} for s, r in zip("qkvo", ("query", "key", "value", "output"), strict=True)}
_ROLES |= {"down": {"role": "mlp.down"}, "words": {"where": "*.wte", "role": "embedding"}}


def _tokens() -> Any:
    return {"input_ids": torch.zeros(1, 4, dtype=torch.long)}


ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("RoBERTa base", 12, 768, _roberta, _ROBERTA),
        Architecture("RoBERTa large", 24, 1024, _roberta, _ROBERTA),
        Architecture("DeBERTa XXL", 48, 1536, _deberta, _DEBERTA),
        Architecture("GPT-2 M", 24, 1024, _gpt2, _ROLES, _tokens),
        Architecture("GPT-2 L", 36, 1280, _gpt2, _ROLES, _tokens),
        Architecture("GPT-3", 96, 12288, _gpt3, _named("*.q", "*.k", "*.v", "*.o", "*.down", "tokens")),
    )
}
