"""x-transformers: one attention and feed-forward under many switches, each a model of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.compatibility import Model

LAYERS = dict(dim=32, depth=2, heads=4, attn_dim_head=8)

#: name → settings of the layers
DECODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rotary": dict(rotary_pos_emb=True),
    "rotary-xpos": dict(rotary_xpos=True),
    "alibi": dict(alibi_pos_bias=True, alibi_num_heads=2),
    "rel-pos-bias": dict(rel_pos_bias=True),
    "dynamic-pos-bias": dict(dynamic_pos_bias=True),
    "glu": dict(ff_glu=True),
    "swiglu": dict(ff_swish=True, ff_glu=True),
    "relu-squared": dict(ff_relu_squared=True),
    "no-bias": dict(ff_no_bias=True),
    "rmsnorm": dict(use_rmsnorm=True),
    "simple-rmsnorm": dict(use_simple_rmsnorm=True),
    "scalenorm": dict(use_scalenorm=True),
    "sandwich-norm": dict(sandwich_norm=True),
    "post-norm": dict(pre_norm=False),
    "qk-norm": dict(attn_qk_norm=True),
    "qk-norm-scaled": dict(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "talking-heads": dict(attn_pre_talking_heads=True, attn_post_talking_heads=True),
    "one-kv-head": dict(attn_one_kv_head=True),
    "grouped-query": dict(attn_kv_heads=2),
    "gate-values": dict(attn_gate_values=True),
    "gate-value-heads": dict(attn_gate_value_heads=True),
    "sparse-topk": dict(attn_sparse_topk=3),
    "on-attention": dict(attn_on_attn=True),
    "memory-kv": dict(attn_num_mem_kv=3),
    "null-kv": dict(attn_add_zero_kv=True),
    "values-latent": dict(attn_value_dim_head=6),
    "flash": dict(attn_flash=True),
    "gate-residual": dict(gate_residual=True),
    "scale-residual": dict(scale_residual=True),
    "macaron": dict(macaron=True),
    "shift-tokens": dict(shift_tokens=1),
    "residual-attention": dict(residual_attn=True),
    "value-residual": dict(add_value_residual=True),
    "hyper-connections": dict(num_residual_streams=2),
    "weight-tied": dict(weight_tie_layers=True),
    "sandwich-coef": dict(sandwich_coef=1),
    "dyt": dict(use_dynamic_tanh=True),
    "softclamp": dict(attn_softclamp_logits=True),
    "cog": dict(attn_cog_signed=True),
    "selective": dict(attn_selective=True),
}


def _decoder(name: str) -> tuple[nn.Module, Any]:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(**(LAYERS | DECODERS[name]))
    return TransformerWrapper(num_tokens=101, max_seq_len=16, attn_layers=layers), (torch.randint(0, 101, (2, 7)),)


def _encoder() -> tuple[nn.Module, Any]:
    from x_transformers import Encoder, TransformerWrapper

    return TransformerWrapper(num_tokens=101, max_seq_len=16, attn_layers=Encoder(**LAYERS)), (
        torch.randint(0, 101, (2, 7)),
    )


def _tied() -> tuple[nn.Module, Any]:
    from x_transformers import Decoder, TransformerWrapper

    model = TransformerWrapper(num_tokens=101, max_seq_len=16, tie_embedding=True, attn_layers=Decoder(**LAYERS))
    return model, (torch.randint(0, 101, (2, 7)),)


def _memory_tokens() -> tuple[nn.Module, Any]:
    from x_transformers import Encoder, TransformerWrapper

    model = TransformerWrapper(
        num_tokens=101,
        max_seq_len=16,
        num_memory_tokens=3,
        l2norm_embed=True,
        emb_dim=24,
        attn_layers=Encoder(**LAYERS),
    )
    return model, (torch.randint(0, 101, (2, 7)),)


def _pair() -> tuple[nn.Module, Any]:
    from x_transformers import XTransformer

    side = dict(num_tokens=101, depth=1, heads=2, attn_dim_head=8, max_seq_len=16)
    model = XTransformer(dim=32, **{f"{s}_{k}": v for s in ("enc", "dec") for k, v in side.items()})
    return model, (torch.randint(0, 101, (2, 7)), torch.randint(0, 101, (2, 6)))


def _images() -> tuple[nn.Module, Any]:
    from x_transformers import Encoder, ViTransformerWrapper

    model = ViTransformerWrapper(image_size=32, patch_size=8, num_classes=5, attn_layers=Encoder(**LAYERS))
    return model, (torch.randn(2, 3, 32, 32),)


def _continuous() -> tuple[nn.Module, Any]:
    from x_transformers import ContinuousTransformerWrapper, Decoder

    model = ContinuousTransformerWrapper(dim_in=6, dim_out=5, max_seq_len=16, attn_layers=Decoder(**LAYERS))
    return model, (torch.randn(2, 7, 6),)


def _cross() -> tuple[nn.Module, Any]:
    from x_transformers import Decoder

    return Decoder(cross_attend=True, **LAYERS), {"x": torch.randn(2, 7, 32), "context": torch.randn(2, 5, 32)}


OTHERS = {
    "Encoder": _encoder, "tied-embedding": _tied, "memory-tokens": _memory_tokens, "XTransformer": _pair,
    "ViTransformerWrapper": _images, "ContinuousTransformerWrapper": _continuous, "cross-attention": _cross,
}  # fmt: skip


def models() -> Iterator[Model]:
    for name in DECODERS:
        yield Model("x_transformers", name, partial(_decoder, name))
    for name, make in OTHERS.items():
        yield Model("x_transformers", name, make)
