"""What stands beside the factors in an adapter's file, folded into a checkpoint on disk: heads and norms that trained,
`lora_bias`, token rows, resized vocabularies, and weights that are tied."""

from __future__ import annotations

import json
import shutil
import warnings
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

import lora_fx
from lora_fx.export.adapters.folder import TENSORS
from lora_fx.export.checkpoints.checkpoint import MANIFEST
from tests.checkpoints import IDS, contents, folder, llama, pair, plain, refused, same, saved, tensors, trained

pytestmark = pytest.mark.usefixtures("small_blocks")


def test_what_was_trained_beside_it_takes_the_place_of_the_base(tmp_path):
    model = llama()
    base = saved(model, tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "norm"])
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(model, config)
        trained(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
    lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out", keep=True)
    found, kept = tensors(tmp_path / "out"), load_file(tmp_path / "adapter" / TENSORS)
    for name in ("lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], kept[f"base_model.model.{name}"])
        assert not torch.equal(found[name], tensors(base)[name])


def tied_llama(tied: bool = True, rows: int = 32, shift: float = 0.0) -> nn.Module:
    """With biases in its attention, some that are not zero, and a vocabulary that was resized."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, tie_word_embeddings=tied, attention_bias=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 if name.endswith("bias") else 0.0)
        if rows > 32:
            model.resize_token_embeddings(rows, mean_resizing=False)
            for table in {model.get_input_embeddings(), model.get_output_embeddings()}:
                table.weight[32:] += shift
    return model


Q = ["q_proj"]
BESIDE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora_bias": ({}, dict(target_modules=["q_proj", "v_proj"], lora_bias=True, rank_pattern={"v_proj": 3})),
    "lora_bias and bias": ({}, dict(target_modules=Q, lora_bias=True, bias="lora_only", use_rslora=True)),
    "rows": (dict(tied=False), dict(target_modules=Q, trainable_token_indices=[31, 3, 4])),
    "rows of both": (
        dict(tied=False),
        dict(target_modules=Q, trainable_token_indices={"embed_tokens": [1, 3], "lm_head": [0, 31]}),
    ),
    "tied rows": ({}, dict(target_modules=Q, trainable_token_indices=[31, 3])),
    "tied rows, said twice": (
        {}, dict(target_modules=Q, trainable_token_indices={"embed_tokens": [31, 3], "lm_head": [31, 3]}),
    ),
    "a resized vocabulary": (dict(rows=36), dict(target_modules=Q, trainable_token_indices=[34, 3])),
    "a resized vocabulary, untied": (dict(rows=36, tied=False), dict(target_modules=Q)),
    "a resized vocabulary, adapted": (
        dict(rows=36), dict(target_modules=[*Q, "embed_tokens"], ensure_weight_tying=True),
    ),
    "saved whole": (dict(tied=False), dict(target_modules=Q, modules_to_save=["embed_tokens", "lm_head", "norm"])),
    "saved whole, tied": ({}, dict(target_modules=Q, modules_to_save=["embed_tokens"], ensure_weight_tying=True)),
    "factors, tied": ({}, dict(target_modules=[*Q, "embed_tokens"], ensure_weight_tying=True)),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*its merge would be wrong:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BESIDE)
def test_what_stands_beside_the_factors_is_folded_as_in_the_model(case, dtype, tmp_path):
    """PEFT's file, and ours of the same: each to the bits of the fold in the model, and back."""
    made, settings = BESIDE[case]
    config = peft.LoraConfig(r=2, lora_alpha=3, **settings)
    base = saved(tied_llama(**made, shift=0.1).to(dtype), tmp_path / "base")
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(tied_llama(**made).to(dtype), config, autocast_adapter_dtype=False)
        trained(adapted)
        adapted.save_pretrained(tmp_path / "theirs", save_embedding_layers=made.get("rows", 32) > 32)
    model = LlamaForCausalLM.from_pretrained(base, dtype=dtype)
    lora_fx.load_adapter(model, tmp_path / "theirs", IDS, check=False)
    lora_fx.save_adapter(model, tmp_path / "own", peft=False)
    lora_fx.save_adapter(model, tmp_path / "ours", peft=case != "rows of both")
    lora_fx.fold(model, final=True)
    wanted, before = model.state_dict(), tensors(base)
    for name in ("theirs", "ours", "own"):
        found = lora_fx.fold_checkpoint(base, tmp_path / name, tmp_path / "out", keep=True)
        after = tensors(tmp_path / "out")
        assert not same(after, wanted) and {*found.tensors} == {*same(after, before)}
        assert json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"] == [*found.tensors]
        assert lora_fx.verify_checkpoint(tmp_path / "out", base=base, adapters=[tmp_path / name])
        lora_fx.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
        assert contents(tmp_path / "back") == contents(base)
        for place in ("out", "back"):
            shutil.rmtree(tmp_path / place)


def test_a_task_head_is_folded_into_a_base_that_has_it(tmp_path):
    """An untouched SEQ_CLS adapter; and into a base without a head it is refused, with what to do."""
    config = {**tied_llama().config.to_dict(), "tie_word_embeddings": False, "num_labels": 3, "pad_token_id": 0}
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**config)).eval()
    base, bare = saved(model, tmp_path / "base"), saved(tied_llama(False), tmp_path / "bare")
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=Q))
        trained(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
    found = lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out").tensors
    assert found == ("model.layers.0.self_attn.q_proj.weight", "score.weight")
    head = load_file(tmp_path / "adapter" / TENSORS)["base_model.model.score.weight"]
    assert torch.equal(tensors(tmp_path / "out")["score.weight"], head)
    why = r"has no score.weight, which was trained whole[\s\S]*AutoModelForSequenceClassification"
    refused(why, bare, tmp_path / "adapter", tmp_path / "more")


def test_rows_have_strengths_and_cost_no_more_than_they_are(tmp_path):
    """Blocks of a table without such a row are copied, and the way back is of those rows alone."""
    base = plain(tmp_path, {"embed.weight": torch.randn(64, 25)}, vocab_size=64)
    rows = torch.randn(2, 25)
    adapter = folder(tmp_path, {"embed.token_adapter.trainable_tokens_delta": rows}, trainable_token_indices=[40, 7])
    found = lora_fx.fold_checkpoint(base, {adapter: 0.5}, tmp_path / "out", keep=True)
    before, after = (tensors(place)["embed.weight"] for place in (base, tmp_path / "out"))
    wanted = before.double()
    wanted[[40, 7]] += 0.5 * (rows.double() - wanted[[40, 7]])
    assert torch.equal(after, wanted.float()) and found.kept_bytes < 2 * (25 * 4 + 100)
    lora_fx.unfold_checkpoint(tmp_path / "out", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


def test_a_tied_head_with_factors_of_its_own_is_refused(tmp_path):
    base = plain(tmp_path, {"embed.weight": torch.zeros(8, 4)}, vocab_size=8, tie_word_embeddings=True)
    table = {"embed.lora_embedding_A": torch.randn(2, 8), "embed.lora_embedding_B": torch.randn(4, 2)}
    head = {"head.lora_A.weight": table["embed.lora_embedding_B"].T, "head.lora_B.weight": torch.randn(8, 2)}
    refused("where it is tied to the embedding", base, folder(tmp_path, table | head), tmp_path / "out")
    head["head.lora_B.weight"] = table["embed.lora_embedding_A"].T
    assert lora_fx.fold_checkpoint(base, folder(tmp_path, table | head), tmp_path / "out").tensors == ("embed.weight",)


TOKENS = "embed.token_adapter.trainable_tokens_delta"
ROWS: dict[str, tuple[list[int] | dict[str, list[int]], dict[str, Any], str]] = {
    "an unknown tie": ([1, 2], {}, r"its config does not say tie_word_embeddings\n.*config.json: true or false"),
    "two of one": ([1, 2], {"tie_word_embeddings": True}, "embed.weight and head.weight are stored as two"),
    "too far": ([1, 8], {"tie_word_embeddings": False}, r"\[1, 8\] are no rows of embed.weight[\s\S]*resize_token"),
    "twice": ([1, 1], {"tie_word_embeddings": False}, "each once"),
    "words": (["a", "b"], {"tie_word_embeddings": False}, "is not a list of integers"),  # type: ignore[list-item]
    "too few": ([1], {"tie_word_embeddings": False}, r"its shape is \(2, 4\), for 1 rows"),
    "of another table": ({"other": [1, 2]}, {"tie_word_embeddings": False}, "it names no rows for"),
}


@pytest.mark.parametrize("what", ROWS)
def test_rows_of_which_too_little_is_known_are_refused(what, tmp_path):
    rows, config, match = ROWS[what]
    base = plain(tmp_path, {"embed.weight": torch.zeros(8, 4), "head.weight": torch.ones(8, 4)})
    (base / "config.json").write_text(json.dumps({"vocab_size": 8, **config}))
    adapter = folder(tmp_path, {TOKENS: torch.ones(2, 4)}, trainable_token_indices=rows)
    refused(match, base, adapter, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("where", ["embedding", "head"])
def test_a_weight_that_may_be_tied_is_refused(where, tmp_path):
    numbers = {"embed.weight": torch.zeros(8, 4), "head.weight": torch.zeros(8, 4)}
    table = {"embed.lora_embedding_A": torch.zeros(2, 8), "embed.lora_embedding_B": torch.zeros(4, 2)}
    factors = table if where == "embedding" else pair("head", 8, 4)
    adapter = folder(tmp_path, factors)
    base = plain(tmp_path, numbers, vocab_size=8)
    lora_fx.fold_checkpoint(base, adapter, tmp_path / "out")
    for said in ({"vocab_size": 8}, {"vocab_size": 8, "tie_word_embeddings": True}):
        (base / "config.json").write_text(json.dumps(said))
        refused("may be read by two modules", base, adapter, tmp_path / "more")
    save_file({"embed.weight": torch.zeros(8, 4)}, base / "model.safetensors")
    if where == "head":
        refused("where it is tied to the embedding", base, adapter, tmp_path / "more")


def test_a_parameter_without_a_module_in_its_name_is_of_the_modules_that_have_it(tmp_path):
    """target_parameters=["gamma"], beside a plain layer, which has no gamma."""
    numbers = {"mix.gamma": torch.randn(6, 4), "up.weight": torch.randn(6, 4)}
    factors = pair("mix", 6, 4) | pair("up", 6, 4)
    adapter = folder(tmp_path, factors, target_modules=["up"], target_parameters=["gamma", "delta"])
    found = lora_fx.fold_checkpoint(plain(tmp_path, numbers), adapter, tmp_path / "out")
    assert found.tensors == ("mix.gamma", "up.weight")
    after = tensors(tmp_path / "out")
    for path, name in (("mix", "mix.gamma"), ("up", "up.weight")):
        A, B = (factors[f"{path}.lora_{factor}.weight"].double() for factor in "AB")
        assert torch.equal(after[name], (numbers[name].double() + 4 * B @ A).float())


SHAPE = dict(vocab_size=32, d_model=16, decoder_start_token_id=0, pad_token_id=0)
PAIRS = {
    "t5": T5ForConditionalGeneration(T5Config(**SHAPE, d_kv=8, d_ff=24, num_layers=1, num_heads=2)),
    "bart": BartForConditionalGeneration(
        BartConfig(**SHAPE, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
                   encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_rows_of_the_one_table_of_an_encoder_and_a_decoder(name, tmp_path):
    """Encoder, decoder and head read it: its rows, as the fold in the model has them."""
    base, inputs = saved(PAIRS[name].eval(), tmp_path / "base"), IDS | {"decoder_input_ids": IDS["input_ids"]}
    targets = ["q", "v"] if name == "t5" else ["q_proj", "v_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, trainable_token_indices=[3, 31])
    with warnings.catch_warnings(action="ignore"):
        adapted = peft.get_peft_model(type(PAIRS[name]).from_pretrained(base), config).eval()
        trained(adapted)
        adapted.save_pretrained(tmp_path / "adapter")
    model = lora_fx.load_adapter(type(PAIRS[name]).from_pretrained(base), tmp_path / "adapter", inputs)
    assert lora_fx.verify(model, adapted, inputs)
    lora_fx.fold(model, final=True)
    found = lora_fx.fold_checkpoint(base, tmp_path / "adapter", tmp_path / "out")
    assert any("shared" in tensor for tensor in found.tensors)
    assert not same(tensors(tmp_path / "out"), model.state_dict())
