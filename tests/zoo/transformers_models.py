"""Tiny random-weight models of transformers, which is imported inside `build()` only.

A row is the class, its config and the role of each weight. How a fused weight is split was read in the model's source;
the comment beside it says how. A matrix between the last block and the classifier or LM head (a pooler, the transform
of an MLM head) is `other`, though a nonlinearity stands between the two.
"""

import warnings
from copy import deepcopy

import torch

from tests.zoo import Case, fresh, fused

Q, K, V, OUT = "attention.query", "attention.key", "attention.value", "attention.output"
GATE, UP, DOWN = "mlp.gate", "mlp.up", "mlp.down"

TEXT = dict(vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, bos_token_id=1,
            eos_token_id=2)  # fmt: skip
WIDE = TEXT | dict(intermediate_size=56, max_position_embeddings=32)
DECODER = WIDE | dict(use_cache=False)
GQA = DECODER | dict(num_key_value_heads=2)
HEADS = GQA | dict(head_dim=6)  # heads × head_dim = 24, not hidden_size: q, k, v and o are not square
GPT = TEXT | dict(max_position_embeddings=32, n_inner=56, use_cache=False)
PAIR = TEXT | dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                   encoder_ffn_dim=56, decoder_ffn_dim=48, decoder_start_token_id=1, max_position_embeddings=32,
                   use_cache=False)  # fmt: skip
T5 = TEXT | dict(d_kv=6, d_ff=56, num_decoder_layers=2, decoder_start_token_id=1, use_cache=False)
VISION = dict(hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, image_size=16,
              patch_size=4, num_labels=5)  # fmt: skip
MOE = GQA | dict(num_experts_per_tok=2)
EAGER = dict(attn_implementation="eager")
LOOP, GROUPED_MM, BATCHED_MM = (dict(experts_implementation=how) for how in ("eager", "grouped_mm", "batched_mm"))
DEFAULT_ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
GPT_OSS = MOE | DEFAULT_ROPE | dict(head_dim=6, num_local_experts=4)


def names(suffixes, *roles):
    """The n-th of these name endings has the n-th role."""
    return dict(zip((f"*.{s}" for s in suffixes.split()), roles, strict=True))


def weights(suffixes, *roles):
    return names(" ".join(f"{s}.weight" for s in suffixes.split()), *roles)


LM_HEAD = {"lm_head.weight": "lm_head"}
CLASSIFIER = {"classifier.weight": "lm_head"}
LM = weights("embed_tokens", "embedding") | LM_HEAD
QKVO = weights("q_proj k_proj v_proj o_proj", Q, K, V, OUT)
QKV_OUT = weights("q_proj k_proj v_proj out_proj", Q, K, V, OUT)
GATED = weights("gate_proj up_proj down_proj", GATE, UP, DOWN)
FC = weights("fc1 fc2", UP, DOWN)
LLAMA = QKVO | GATED | LM
ROUTED = QKVO | LM | weights("mlp.gate", "router")
GPT_EMBED = {"transformer.wte.weight": "embedding", "transformer.wpe.weight": "embedding"}
GPT_MLP = weights("mlp.c_fc mlp.c_proj", UP, DOWN)
H_4H = weights("dense dense_h_to_4h dense_4h_to_h", OUT, UP, DOWN) | LM_HEAD
BERT = weights("query key value attention.output.dense intermediate.dense output.dense", Q, K, V, OUT, UP, DOWN)
BERT_EMBED = weights("word_embeddings position_embeddings token_type_embeddings", *3 * ["embedding"])
MLM = {"lm_head.dense.weight": "other", "lm_head.decoder.weight": "lm_head"}
SHARED = {"*shared.weight": "embedding"} | LM
T5_ATTENTION = weights("q k v o relative_attention_bias", Q, K, V, OUT, "embedding")
POSITIONS = weights("embed_positions", "embedding")
PATCHES = weights("projection", "conv")
DINO_QKVO = weights("query key value attention.output.dense", Q, K, V, OUT)
NO_SITES = dict.fromkeys(["*token", "*.position_embeddings"])  # tokens and position tables that are only added

STACKED = fused((Q, 32), (K, 32), (V, 32))  # all queries, all keys, all values
PER_HEAD = fused((Q, 8), (K, 8), (V, 8), times=4)  # q, k, v of head 0, then of head 1, …
ONE_KV = fused((Q, 32), (K, 8), (V, 8))  # multi-query: four query heads, then the one key, the one value
GROUPED = fused((Q, 16), (K, 8), (V, 8), times=2)  # per key/value head: its two query heads, its key, its value
GQA_STACKED = fused((Q, 32), (K, 16), (V, 16))  # all queries, then the two key heads, the two value heads
FOUR_CORES = fused((Q, 8), (V, 8), (K, 8), times=4)  # a block for each of 4 TPU cores, in it query, VALUE, key


def halves(size):
    """What the activation is applied to comes first, its factor second (`gate, up = y.chunk(2)`)."""
    return fused((GATE, size), (UP, size))


def experts(size):
    """(experts, 2 * size, hidden) and (experts, hidden, size)"""
    return names("experts.gate_up_proj experts.down_proj", halves(size), DOWN)


GPT_OSS_ROLES = (  # (experts, in, out); gate = y[..., ::2], up = y[..., 1::2]
    QKVO | LM | weights("router", "router") | {"*_proj_bias": None}
    | names("experts.gate_up_proj experts.down_proj", fused((GATE, 1), (UP, 1), times=56), DOWN)
)  # fmt: skip


def tokens():
    return {"input_ids": torch.randint(3, 101, (2, 7))}


def masked():
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 5:] = 0
    return tokens() | {"attention_mask": mask}


def pair():
    return tokens() | {"decoder_input_ids": torch.randint(3, 101, (2, 5))}


def pixels():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def row(name, family, cls, config, roles, inputs=tokens, may_abstain=(), earlier=None):
    def make():
        import transformers

        with warnings.catch_warnings(action="ignore"):  # some of its modules call torch.jit.script when imported
            model = getattr(transformers, cls)
        return model(model.config_class(**deepcopy(config))), inputs()

    return Case(name, family, fresh(make), roles, frozenset(may_abstain), earlier)


DECODERS = (
    row("gpt2", "decoder", "GPT2LMHeadModel", GPT,  # Conv1D: (in, out); `.split(hidden, dim=2)`
        weights("attn.c_attn attn.c_proj", STACKED, OUT) | GPT_MLP | GPT_EMBED | LM_HEAD),
    row("llama", "decoder", "LlamaForCausalLM", HEADS, LLAMA),
    row("llama-classifier", "decoder", "LlamaForSequenceClassification", HEADS | dict(num_labels=5),
        QKVO | GATED | weights("embed_tokens", "embedding") | {"score.weight": "lm_head"}),
    row("mistral", "decoder", "MistralForCausalLM", HEADS | EAGER | dict(sliding_window=4), LLAMA),
    row("qwen2", "decoder", "Qwen2ForCausalLM", GQA | dict(tie_word_embeddings=True), LLAMA),
    row("qwen3", "decoder", "Qwen3ForCausalLM", HEADS, LLAMA),
    row("gemma2", "decoder", "Gemma2ForCausalLM", HEADS | EAGER, LLAMA),
    row("gemma3", "decoder", "Gemma3ForCausalLM", HEADS, LLAMA),
    row("phi", "decoder", "PhiForCausalLM", GQA, weights("q_proj k_proj v_proj dense", Q, K, V, OUT) | FC | LM),
    row("phi3", "decoder", "Phi3ForCausalLM", GQA,  # qkv: `[..., :query_pos]`, … ; `gate, up = .chunk(2)`
        weights("qkv_proj o_proj gate_up_proj down_proj", GQA_STACKED, OUT, halves(56), DOWN) | LM),
    row("gpt-neox", "decoder", "GPTNeoXForCausalLM", DECODER,  # `.view(…, heads, 3 * head_dim).chunk(3, -1)`
        weights("query_key_value embed_in", PER_HEAD, "embedding") | H_4H),
    row("falcon", "decoder", "FalconForCausalLM", DECODER | dict(ffn_hidden_size=56),  # `.view(…, heads + 2, head_dim)`
        weights("query_key_value word_embeddings", ONE_KV, "embedding") | H_4H),
    row("falcon-grouped", "decoder", "FalconForCausalLM",  # `.view(…, kv_heads, heads // kv_heads + 2, head_dim)`
        DECODER | EAGER | dict(ffn_hidden_size=56, new_decoder_architecture=True, num_kv_heads=2),
        weights("query_key_value word_embeddings", GROUPED, "embedding") | H_4H),
    row("bloom", "decoder", "BloomForCausalLM", TEXT | dict(use_cache=False),  # `.view(…, heads, 3, head_dim)`
        weights("query_key_value word_embeddings", PER_HEAD, "embedding") | H_4H),
    row("persimmon", "decoder", "PersimmonForCausalLM", DECODER,  # `.view(…, heads, 3, head_dim)`
        weights("query_key_value", PER_HEAD) | H_4H | LM),
    row("opt", "decoder", "OPTForCausalLM", DECODER | dict(ffn_dim=56, word_embed_proj_dim=24),
        QKV_OUT | FC | LM | POSITIONS | weights("project_in project_out", "other", "other")),
    row("gptj", "decoder", "GPTJForCausalLM", GPT | dict(rotary_dim=4),
        QKV_OUT | weights("fc_in fc_out wte", UP, DOWN, "embedding") | LM_HEAD),
    row("codegen", "decoder", "CodeGenForCausalLM", GPT | dict(rotary_dim=4),  # `.reshape(…, 4, -1)`, then q, v, k
        weights("qkv_proj out_proj fc_in fc_out wte", FOUR_CORES, OUT, UP, DOWN, "embedding") | LM_HEAD),
    row("gpt-neo", "decoder", "GPTNeoForCausalLM",
        DECODER | dict(attention_types=[[["global", "local"], 1]], window_size=4),
        QKV_OUT | GPT_MLP | GPT_EMBED | LM_HEAD),
    row("gpt-bigcode", "decoder", "GPTBigCodeForCausalLM", GPT,  # `.split((hidden, head_dim, head_dim))`
        weights("attn.c_attn attn.c_proj", ONE_KV, OUT) | GPT_MLP | GPT_EMBED | LM_HEAD),
    row("starcoder2", "decoder", "Starcoder2ForCausalLM", HEADS, QKVO | GPT_MLP | LM),
    row("mpt", "decoder", "MptForCausalLM", TEXT | dict(expansion_ratio=2, max_seq_len=32),  # `.chunk(3, dim=2)`
        weights("Wqkv out_proj up_proj down_proj wte", STACKED, OUT, UP, DOWN, "embedding") | LM_HEAD),
    row("olmo2", "decoder", "Olmo2ForCausalLM", GQA, LLAMA),
    row("stablelm", "decoder", "StableLmForCausalLM", GQA | dict(use_qkv_bias=True), LLAMA),
    row("cohere", "decoder", "CohereForCausalLM", GQA | dict(use_qk_norm=True),
        LLAMA | dict.fromkeys(["*.q_norm.weight", "*.k_norm.weight"])),
    row("glm", "decoder", "GlmForCausalLM", HEADS,  # `gate, up = .chunk(2)`
        QKVO | weights("gate_up_proj down_proj", halves(56), DOWN) | LM),
    row("nemotron", "decoder", "NemotronForCausalLM", HEADS, QKVO | weights("up_proj down_proj", UP, DOWN) | LM),
    row("xlnet", "decoder", "XLNetLMHeadModel", TEXT | dict(d_inner=56, d_head=8, use_mems_eval=False),
        # q, k, v, r: (hidden, heads, dim); o: (hidden, heads, dim) too, multiplied from its other end
        names("rel_attn.q rel_attn.k rel_attn.v rel_attn.o rel_attn.r", Q, K, V, OUT, "other")
        | weights("layer_1 layer_2 word_embedding", UP, DOWN, "embedding") | {"lm_loss.weight": "lm_head"}
        | dict.fromkeys(["*_bias", "*.seg_embed", "*.mask_emb"])),
)  # fmt: skip

ENCODERS = (
    row("bert", "encoder", "BertForSequenceClassification", WIDE | dict(num_labels=5),
        {"bert.pooler.dense.weight": "other"} | BERT | BERT_EMBED | CLASSIFIER, masked),
    row("roberta", "encoder", "RobertaForMaskedLM", WIDE, BERT | BERT_EMBED | MLM),
    row("distilbert", "encoder", "DistilBertForMaskedLM", TEXT | dict(hidden_dim=56, max_position_embeddings=32),
        weights("q_lin k_lin v_lin out_lin lin1 lin2", Q, K, V, OUT, UP, DOWN)
        | weights("word_embeddings position_embeddings", "embedding", "embedding")
        | {"vocab_transform.weight": "other", "vocab_projector.weight": "lm_head"}),
    row("albert", "encoder", "AlbertForMaskedLM", WIDE | dict(embedding_size=20),  # both layers are one layer
        weights("query key value attention.dense ffn ffn_output", Q, K, V, OUT, UP, DOWN) | BERT_EMBED
        | {"*.embedding_hidden_mapping_in.weight": "other", "*.dense.weight": "other", "*.decoder.weight": "lm_head"}),
    row("electra", "encoder", "ElectraForTokenClassification", WIDE | dict(embedding_size=20, num_labels=5),
        BERT | BERT_EMBED | CLASSIFIER | {"electra.embeddings_project.weight": "other"}, masked),
    row("deberta-v2", "encoder", "DebertaV2ForSequenceClassification",
        WIDE | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4, num_labels=5),
        weights("query_proj key_proj value_proj pos_key_proj pos_query_proj", Q, K, V, "other", "other")
        | {"pooler.dense.weight": "other", "*.rel_embeddings.weight": None}  # read whole, as an activation
        | weights("attention.output.dense intermediate.dense output.dense", OUT, UP, DOWN)
        | weights("word_embeddings position_embeddings", "embedding", "embedding") | CLASSIFIER),
    row("modernbert", "encoder", "ModernBertForMaskedLM",  # `.view(…, 3, heads, head_dim)`; Wi: act(first) * second
        WIDE | EAGER | dict(local_attention=4, cls_token_id=1, sep_token_id=2,
                            layer_types=["full_attention", "sliding_attention"]),
        weights("Wqkv attn.Wo Wi mlp.Wo tok_embeddings", STACKED, OUT, halves(56), DOWN, "embedding")
        | {"head.dense.weight": "other", "decoder.weight": "lm_head"}),
    row("mpnet", "encoder", "MPNetForMaskedLM", WIDE,
        weights("q k v o intermediate.dense output.dense", Q, K, V, OUT, UP, DOWN)
        | weights("word_embeddings position_embeddings relative_attention_bias", *3 * ["embedding"]) | MLM),
    row("esm", "encoder", "EsmForMaskedLM", WIDE | dict(mask_token_id=3, position_embedding_type="rotary"),
        BERT | weights("word_embeddings", "embedding") | MLM | {"esm.contact_head.*": None}),  # this head never runs it
)  # fmt: skip

PAIRS = (
    row("t5", "encoder-decoder", "T5ForConditionalGeneration", T5,
        T5_ATTENTION | weights("wi wo", UP, DOWN) | SHARED, pair),
    row("t5-gated", "encoder-decoder", "T5ForConditionalGeneration",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        T5_ATTENTION | weights("wi_0 wi_1 wo", GATE, UP, DOWN) | SHARED, pair),
    row("bart", "encoder-decoder", "BartForConditionalGeneration", PAIR | EAGER,
        QKV_OUT | FC | POSITIONS | SHARED, lambda: pair() | masked()),
    row("marian", "encoder-decoder", "MarianMTModel", PAIR, QKV_OUT | FC | POSITIONS | SHARED, pair),
)  # fmt: skip

VISIONS = (
    row("vit", "vision", "ViTForImageClassification", VISION | EAGER,
        QKVO | FC | weights("projection", "conv") | CLASSIFIER | NO_SITES, pixels),
    row("swin", "vision", "SwinForImageClassification",
        dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4,
             mlp_ratio=1.75, num_labels=5),
        QKVO | FC | weights("projection reduction", "conv", "other") | CLASSIFIER | {"*_bias_table": None}, pixels),
    row("clip", "vision", "CLIPModel",
        dict(text_config=WIDE, projection_dim=20, vision_config=VISION | dict(hidden_size=24, intermediate_size=40)),
        QKV_OUT | FC | weights("token_embedding position_embedding patch_embedding", "embedding", "embedding", "conv")
        | {"*_projection.weight": "lm_head"}, lambda: tokens() | pixels()),
    row("dinov2", "vision", "Dinov2ForImageClassification", VISION | dict(mlp_ratio=3),
        QKVO | PATCHES | FC | CLASSIFIER | NO_SITES, pixels, earlier=DINO_QKVO | PATCHES | FC | CLASSIFIER | NO_SITES),
    row("dinov2-swiglu", "vision", "Dinov2ForImageClassification",
        VISION | EAGER | dict(mlp_ratio=3, use_swiglu_ffn=True),
        QKVO | PATCHES | GATED | CLASSIFIER | NO_SITES, pixels,
        earlier=DINO_QKVO | PATCHES | CLASSIFIER | NO_SITES  # `x1, x2 = .chunk(2); silu(x1) * x2`
        | weights("weights_in weights_out", halves(64), DOWN)),
    row("convnext", "vision", "ConvNextForImageClassification",
        dict(hidden_sizes=[12, 20], depths=[1, 2], num_stages=2, patch_size=2, layer_scale_init_value=1.0,
             num_labels=5),
        weights("pwconv1 pwconv2", UP, DOWN) | CLASSIFIER | {"*": "conv"}, pixels),
    row("resnet", "vision", "ResNetForImageClassification",
        dict(embedding_size=8, hidden_sizes=[16, 24], depths=[1, 2], num_labels=5),
        {"classifier.1.weight": "lm_head", "*.convolution.weight": "conv"},
        lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    row("segformer", "vision", "SegformerForSemanticSegmentation",
        dict(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[16, 24], patch_sizes=[3, 3],
             strides=[2, 2], num_attention_heads=[2, 3], mlp_ratios=[2, 3], decoder_hidden_size=20, num_labels=5),
        QKVO | FC | {"decode_head.linear_projections.*": "other", "*": "conv"}, pixels,
        may_abstain=["*.mlp.fc?.weight"]),  # a convolution stands between the two matrices of the MLP
)  # fmt: skip

SPEECH = (
    row("whisper", "speech", "WhisperForConditionalGeneration",
        PAIR | dict(num_mel_bins=10, max_source_positions=9, max_target_positions=12),
        # the decoder slices or indexes its position table, which is no lookup
        {"model.decoder.embed_positions.weight": None, "proj_out.weight": "lm_head"} | QKV_OUT | FC | POSITIONS
        | weights("embed_tokens conv1 conv2", "embedding", "conv", "conv"),
        lambda: {"input_features": torch.randn(2, 10, 18), "decoder_input_ids": torch.randint(3, 101, (2, 5))}),
    row("wav2vec2", "speech", "Wav2Vec2ForCTC",
        WIDE | EAGER | dict(conv_dim=[12, 20], conv_stride=[3, 2], conv_kernel=[5, 3], num_conv_pos_embeddings=4,
                            num_conv_pos_embedding_groups=2, apply_spec_augment=False),
        QKV_OUT | LM_HEAD | weights("conv feature_projection.projection", "conv", "other")
        | weights("intermediate_dense output_dense", UP, DOWN) | {"*.original?": None},  # computed (weight norm)
        lambda: {"input_values": torch.randn(2, 60)}),
)  # fmt: skip

MOES = (  # experts.gate_up_proj (experts, 2 * size, hidden): `gate, up = .chunk(2)`
    row("mixtral-eager", "moe", "MixtralForCausalLM",
        MOE | LOOP | dict(head_dim=6, num_local_experts=4), ROUTED | experts(56)),
    row("qwen2-moe-eager", "moe", "Qwen2MoeForCausalLM",
        MOE | LOOP | dict(num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40),
        ROUTED | experts(24) | GATED | weights("shared_expert_gate", "other")),  # one scalar per token
    row("qwen3-moe-grouped", "moe", "Qwen3MoeForCausalLM",
        MOE | GROUPED_MM | dict(head_dim=6, num_experts=4, moe_intermediate_size=24), ROUTED | experts(24)),
    row("olmoe-batched", "moe", "OlmoeForCausalLM", MOE | BATCHED_MM | dict(num_experts=4), ROUTED | experts(56)),
    row("gpt-oss-eager", "moe", "GptOssForCausalLM", GPT_OSS | LOOP, GPT_OSS_ROLES),
    row("gpt-oss-grouped", "moe", "GptOssForCausalLM", GPT_OSS | GROUPED_MM, GPT_OSS_ROLES),
    row("dbrx", "moe", "DbrxForCausalLM",
        DEFAULT_ROPE | dict(
            vocab_size=101, d_model=32, n_heads=4, n_layers=2, max_seq_len=32, use_cache=False,
            attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=1e4),
            ffn_config=dict(ffn_hidden_size=56, moe_num_experts=4, moe_top_k=2, ffn_act_fn={"name": "silu"})),
        # Wqkv: `.split([hidden, 2 * head_dim, 2 * head_dim])`; w1, v1, w2: (experts * size, hidden), viewed per expert
        weights("Wqkv out_proj router.layer wte", GQA_STACKED, OUT, "router", "embedding") | LM_HEAD
        | names("w1 v1 w2", GATE, UP, DOWN)),
    row("deepseek-v3", "moe", "DeepseekV3ForCausalLM",
        DECODER | LOOP | dict(
            q_lora_rank=20, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
            num_key_value_heads=4, num_local_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
            first_k_dense_replace=1, moe_intermediate_size=24),
        # kv_b: per head 6 key and 5 value features; kv_a: 16 latent features, then 4 that join the key of every head
        weights("q_a_proj q_b_proj kv_b_proj o_proj", "other", Q, fused((K, 6), (V, 5), times=4), OUT)
        | weights("kv_a_proj_with_mqa", fused(("other", 16), (K, 4))) | experts(24) | GATED | LM
        | weights("mlp.gate", "router"),
        may_abstain=["*.kv_a_proj_with_mqa.weight", "*.kv_b_proj.weight"]),  # in-place copies make up the key
)  # fmt: skip

SSMS = (
    row("mamba", "ssm", "MambaForCausalLM", TEXT | dict(state_size=6, time_step_rank=5, use_cache=False),
        weights("conv1d in_proj x_proj dt_proj out_proj", "conv", *4 * ["other"])
        | weights("embeddings", "embedding") | LM_HEAD | {"*.A_log": None}),
)  # fmt: skip

CASES = DECODERS + ENCODERS + PAIRS + VISIONS + SPEECH + MOES + SSMS
