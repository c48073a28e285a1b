"""Checkpoints whose tensors transformers renames and merges when it loads them: experts, folded where they lie."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import lora_fx
from lora_fx import Rule
from lora_fx.deltas.adapter import Adapter
from lora_fx.errors import FileError
from lora_fx.export.checkpoints.checkpoint import read_checkpoint
from lora_fx.export.checkpoints.loaded import Loaded
from lora_fx.export.checkpoints.shares import Share
from lora_fx.graph.layout import Layout
from tests.checkpoints import IDS, contents, folder, pair, plain, refused, same, saved, tensors, trained

pytestmark = pytest.mark.usefixtures("small_blocks")

SIZES = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=32, use_cache=False,
    tie_word_embeddings=False, pad_token_id=0, bos_token_id=0, eos_token_id=0,
)  # fmt: skip


def mixtral(intermediate_size: int = 24) -> nn.Module:
    return _made(MixtralForCausalLM, MixtralConfig(**SIZES, intermediate_size=intermediate_size, num_local_experts=3))


def phimoe() -> nn.Module:
    return _made(PhimoeForCausalLM, PhimoeConfig(**SIZES, intermediate_size=24, num_local_experts=3))


def qwen3() -> nn.Module:
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, intermediate_size=32, num_experts=11, head_dim=8)
    return _made(Qwen3MoeForCausalLM, config)


def olmoe() -> nn.Module:
    """Its merged gate and up are square."""
    sizes = {**SIZES, "num_key_value_heads": 2}
    return _made(OlmoeForCausalLM, OlmoeConfig(**sizes, intermediate_size=8, num_experts=3, num_experts_per_tok=2))


def deepseek() -> nn.Module:
    """Its first layer has no experts, the others have shared ones besides."""
    config = DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 2, "num_hidden_layers": 2}, moe_intermediate_size=24, intermediate_size=24,
        n_routed_experts=4, first_k_dense_replace=1, n_group=1, topk_group=1, num_experts_per_tok=2,
        kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    )  # fmt: skip
    return _made(DeepseekV3ForCausalLM, config)


def _made(model: type, config) -> nn.Module:
    torch.manual_seed(0)
    return model(config).eval()


EXPERTS = [Rule(where="*experts* | *.gate | *q_proj", rank=2, alpha=3)]


def folded(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    """The tensors that transformers writes of the model when it is folded."""
    lora_fx.fold(model, final=True)
    model.save_pretrained(folder)
    return tensors(folder)


@pytest.mark.parametrize("build", [mixtral, phimoe, qwen3, olmoe, deepseek])
def test_experts_are_folded_where_they_lie(build, tmp_path):
    """From files in PEFT's format, and in our own."""
    model = build().to(torch.bfloat16)
    base = saved(model, tmp_path / "base")
    lora_fx.apply(model, EXPERTS, IDS)
    trained(model)
    for name in ("peft", "own"):
        lora_fx.save_adapter(model, tmp_path / name, peft=name == "peft")
    wanted = folded(model, tmp_path / "wanted")
    for name in ("peft", "own"):
        done = lora_fx.fold_checkpoint(base, tmp_path / name, tmp_path / "out" / name, keep=name == "peft")
        found = tensors(tmp_path / "out" / name)
        assert {*wanted} == {*found} and not same(found, wanted)
        assert sum(".experts." in tensor for tensor in done.tensors) == sum(".experts." in tensor for tensor in found)
    lora_fx.unfold_checkpoint(tmp_path / "out" / "peft", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_pefts_own_adapters_of_experts(tmp_path):
    """PEFT wraps a module once for each of its parameters: which is the inner one, the shapes say."""
    base = saved(mixtral(), tmp_path / "base")
    config = peft.LoraConfig(
        r=2, lora_alpha=6, target_modules=["q_proj"],
        target_parameters=["mlp.experts.down_proj", "experts.gate_up_proj", "mlp.gate.weight"],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of its own converting
        model = peft.get_peft_model(MixtralForCausalLM.from_pretrained(base), config)
        trained(model)
        model.save_pretrained(tmp_path / "adapter")
    twin = lora_fx.load_adapter(MixtralForCausalLM.from_pretrained(base).eval(), tmp_path / "adapter", IDS)
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    found, wanted = tensors(tmp_path / "out"), folded(twin, tmp_path / "wanted")
    assert not same(found, wanted) and len(same(found, tensors(base))) == 3 * 3 + 2


def expert_tensors(first: int, second: int, inner: int = 6) -> dict[str, torch.Tensor]:
    """Of two experts."""
    sizes = {"w1": (first, inner), "w3": (second, inner)}
    return {f"m.experts.{e}.{name}.weight": torch.zeros(size) for name, size in sizes.items() for e in range(2)}


def dense(adapter: Adapter) -> torch.Tensor:
    """δ in the weight's own axes, exact: its factors are small integers."""
    layout = adapter.layout
    delta = torch.zeros(*layout.batch, layout.size("o"), layout.size("i"))
    delta[..., list(adapter.rows or range(layout.size("o"))), :] = adapter.scale * (adapter.B @ adapter.A)
    return delta if layout.sides.endswith("oi") else delta.mT


def test_an_adapter_of_before_they_were_stacked(tmp_path):
    """On disk it fits. For the model PEFT writes it anew, and the error says how."""
    base = saved(mixtral(), tmp_path / "base")
    entry, block = {}, "model.layers.0.block_sparse_moe.experts"
    for e in range(3):
        for name, out, inner in (("w1", 24, 16), ("w2", 16, 24), ("w3", 24, 16)):
            entry |= pair(f"{block}.{e}.{name}", out, inner)
    adapter = folder(tmp_path, entry, target_modules=["w1", "w2", "w3"])
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    stacked = r"block_sparse_moe\.experts\.0\.w1 is stacked into model\.layers\.0\.mlp\.experts\.gate_up_proj"
    with pytest.raises(FileError, match=rf"{stacked}[\s\S]*PeftModel\.from_pretrained"):
        lora_fx.load_adapter(MixtralForCausalLM.from_pretrained(base), adapter, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says of its own converting
        model = peft.PeftModel.from_pretrained(MixtralForCausalLM.from_pretrained(base), adapter)
        model.save_pretrained(tmp_path / "anew")
    twin = lora_fx.load_adapter(MixtralForCausalLM.from_pretrained(base).eval(), tmp_path / "anew", IDS)
    assert not same(tensors(tmp_path / "out"), folded(twin, tmp_path / "wanted"))


@pytest.mark.parametrize("sides", ["boi", "bio"])
@pytest.mark.parametrize("rows", [None, (0, 3, 5), (1, 2)], ids=["all", "some", "of the first"])
def test_parts_are_what_the_whole_is_there(sides, rows, tmp_path):
    """Experts (2, 6, 12), in each a matrix of 4 and one of 2."""
    base = plain(tmp_path, expert_tensors(4, 2, 12), model_type="mixtral")
    loaded = Loaded.of(read_checkpoint(base))
    adapter = Adapter(Layout(sides, (2, 6, 12)), rows=rows, rank=2, alpha=6)
    with torch.no_grad():
        adapter.A.copy_(torch.randint(1, 5, adapter.A.shape))
        adapter.B.copy_(torch.randint(1, 5, adapter.B.shape))
    wanted = dense(adapter)
    found = torch.zeros_like(wanted)
    for share in loaded.on_disk(Share("m.experts.gate_up_proj", adapter), "here"):
        expert = int(share.tensor.split(".")[2])
        found[expert, slice(0, 4) if "w1" in share.tensor else slice(4, 6)] += dense(share.adapter)
    assert torch.equal(found, wanted) and wanted.any()


BOTH = expert_tensors(4, 4)
UNLIKE: dict[str, dict[str, torch.Tensor]] = {
    "one is missing": {k: v for k, v in BOTH.items() if k != "m.experts.1.w3.weight"},
    "of two shapes": {**BOTH, "m.experts.1.w3.weight": torch.zeros(5, 6)},
    "of two dtypes": {k: v.half() if "w1" in k else v for k, v in BOTH.items()},
    "of two widths": {k: v[:, :5].clone() if "w1" in k else v for k, v in BOTH.items()},
    "of vectors": {k: v[0].clone() for k, v in BOTH.items()},
}


@pytest.mark.parametrize("what", [*UNLIKE, "another model's", "no transformers", "a kind that takes all"])
def test_what_is_not_merged_so_is_refused(what, tmp_path, monkeypatch):
    kind = "llama" if what == "another model's" else "mixtral"
    base = plain(tmp_path, UNLIKE.get(what, BOTH), model_type=kind)
    why = r"has no m\.experts\.gate_up_proj[\s\S]*load it into its model"
    config = {"r": 1, "target_parameters": ["m.experts.gate_up_proj"]}
    entry = {"m.experts.lora_A.weight": torch.ones(2, 6), "m.experts.lora_B.weight": torch.ones(8, 2)}
    if what == "a kind that takes all":
        entry, config = {"m.experts.gate_up_proj": torch.ones(2, 8, 6)}, {"modules_to_save": ["experts"]}
        why = "lies as 4 tensors, and full takes all"
    if what == "no transformers":
        monkeypatch.setitem(sys.modules, "transformers.conversion_mapping", None)
    refused(why, base, folder(tmp_path, entry, **config), tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_another_way_of_merging_is_not_taken_for_this_one(tmp_path):
    """ernie4_5_vl_moe deals its experts out, to text and to vision."""
    names = [f"a.mlp.experts.{e}.{n}_proj.weight" for e in range(4) for n in ("gate", "up", "down")]
    base = plain(tmp_path, {name: torch.zeros(4, 4) for name in names}, model_type="ernie4_5_vl_moe")
    loaded = Loaded.of(read_checkpoint(base))
    assert not loaded.parts and {*loaded.checkpoint.tensors} == {*names}


def test_a_name_that_stands_for_two_is_none(tmp_path):
    """A tensor under its name on disk, and under the model's besides."""
    names = ("a.block_sparse_moe.gate.weight", "a.mlp.gate.weight")
    base = plain(tmp_path, {name: torch.zeros(3, 6) for name in names}, model_type="mixtral")
    assert {*Loaded.of(read_checkpoint(base)).checkpoint.tensors} == {*names}


def test_more_rows_of_a_table_under_another_name(tmp_path):
    """The manifest has the name on disk, and the way back finds it by the model's."""
    before = {"model.embed_tokens.weight": torch.randn(8, 4), "model.layers.0.up.weight": torch.zeros(6, 4)}
    base = plain(tmp_path, before, model_type="ernie4_5_vl_moe", vocab_size=8)
    table = before["model.embed_tokens.weight"].clone()
    table[6:] = 1
    within = "model.language_model"
    entry = {f"{within}.embed_tokens.weight": table, **pair(f"{within}.layers.0.up", 6, 4)}
    lora_fx.fold_checkpoint(base, folder(tmp_path, entry), tmp_path / "out", keep=True)
    assert torch.equal(tensors(tmp_path / "out")["model.embed_tokens.weight"], table)
    lora_fx.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
