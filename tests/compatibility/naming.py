"""Roles by name: what the authors of a model call a weight, against what lora_fx reads off the dataflow.

Names are a second opinion, of people who do not know lora_fx. Only names that mean one thing wherever they occur are
here; what is not known to the table says nothing. `other` is no contradiction: the analysis abstains there. Neither is
`conv`, which says how a weight multiplies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

QUERY, KEY, VALUE, OUT = "attention.query", "attention.key", "attention.value", "attention.output"
UP, GATE, DOWN = "mlp.up", "mlp.gate", "mlp.down"
SILENT = {"other", "conv"}

#: a gate and what it gates in one weight: nobody calls a gate alone so
PACKED = f"{GATE}, {UP}"

#: pattern over the module's path → the roles that do not contradict the name; the first that matches counts
NAMES: tuple[tuple[str, frozenset[str]], ...] = tuple(
    (pattern, frozenset(roles.split("|")))
    for pattern, roles in (
        (r"(^|\.|_)(qkv|c_attn|query_key_value|Wqkv|to_qkv|qkv_proj)$|attn\.in_proj_weight$", f"{QUERY}|{KEY}|{VALUE}"),
        (r"(^|\.|_)(kv|to_kv|kv_proj|key_value)$", f"{KEY}|{VALUE}"),
        (r"(^|\.)(q_proj|query_proj|q_lin|to_q|wq|query|linear_q|q_linear)$", QUERY),
        (r"(^|\.)(k_proj|key_proj|k_lin|to_k|wk|linear_k|k_linear)$", KEY),
        (r"(^|\.)(v_proj|value_proj|v_lin|to_v|wv|linear_v|v_linear)$", VALUE),
        (r"att\w*\.(self\.)?key$", KEY),
        (r"att\w*\.(self\.)?value$", VALUE),
        (r"att\w*\.(o_proj|out_proj|to_out\.0|to_out|out_lin|output\.dense|wo|o_lin|linear_out)$", OUT),
        (r"(^|\.)(gate_proj|wi_0|w1_gate)$", GATE),
        (r"(^|\.)(up_proj|wi_1)$", UP),
        (r"(^|\.)(down_proj|DenseReluDense\.wo)$", DOWN),
        (r"(mlp|ffn|feed_forward|feedforward)\.(fc1|c_fc|lin1|dense_h_to_4h)$", f"{UP}|{PACKED}"),
        (r"(mlp|ffn|feed_forward|feedforward)\.(fc2|lin2|dense_4h_to_h)$", DOWN),
        (r"intermediate\.dense$", UP),
        (r"(^|\.)lm_head$", "embedding|lm_head"),  # it may be tied
        (r"(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings)$", "embedding|lm_head"),
    )
)


def meant(weight: str) -> frozenset[str]:
    """The roles that this name allows; empty where it says nothing."""
    path = weight.removesuffix(".weight")
    return next((roles for pattern, roles in NAMES if re.search(pattern, path)), frozenset())


def contradictions(rows: Iterable[Any]) -> tuple[int, int, list[str]]:
    """Of a plan's rows: how many roles agree with their names, how many abstain, and the contradictions as text."""
    agreeing, abstained, wrong = 0, 0, []
    for row in rows:
        allowed = [roles for name in row.weight.names if (roles := meant(name))]
        if not allowed:
            continue
        own = {*row.role.split(", ")} - SILENT
        if not own:
            abstained += 1
        elif any(own <= roles or row.role in roles for roles in allowed):
            agreeing += 1
        else:
            wrong.append(f"{row.weight.name} is taken for {row.role}")
    return agreeing, abstained, wrong
