"""diffusers: UNets, transformers and autoencoders, each from settings that make it tiny."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.compatibility import Model

HEADS = dict(num_layers=1, num_attention_heads=2, attention_head_dim=8)
JOINT = HEADS | dict(in_channels=4, joint_attention_dim=16)
TIME = torch.tensor([3, 7])


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape)


def _positions(count: int) -> torch.Tensor:
    return torch.stack([torch.arange(count)] * 3, dim=-1).float()


def _packed(**more: Any) -> dict[str, Any]:
    """A sequence of image patches and one of words, with their positions."""
    given = {"hidden_states": noise(9, 4), "encoder_hidden_states": noise(5, 16), "timestep": torch.tensor([0.3, 0.7])}
    return given | {"img_ids": _positions(9), "txt_ids": _positions(5)} | more


#: class → settings, and a function that makes keyword inputs
MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "UNet2DModel": (
        dict(sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, layers_per_block=1,
             down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")),
        lambda: {"sample": noise(3, 16, 16), "timestep": TIME},
    ),
    "UNet2DConditionModel": (
        dict(sample_size=16, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, layers_per_block=1,
             cross_attention_dim=12, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D")),
        lambda: {"sample": noise(4, 16, 16), "timestep": TIME, "encoder_hidden_states": noise(5, 12)},
    ),
    "UNet1DModel": (
        dict(sample_size=64, block_out_channels=(32, 32, 64), in_channels=2, out_channels=2, extra_in_channels=64),
        lambda: {"sample": noise(2, 64), "timestep": TIME},
    ),
    "UNet3DConditionModel": (
        dict(sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, layers_per_block=1,
             cross_attention_dim=12, down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
             up_block_types=("UpBlock3D", "CrossAttnUpBlock3D")),
        lambda: {"sample": noise(4, 3, 8, 8), "timestep": TIME, "encoder_hidden_states": noise(5, 12)},
    ),
    "UNetSpatioTemporalConditionModel": (
        dict(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=12,
             num_attention_heads=2, num_frames=2, addition_time_embed_dim=8, projection_class_embeddings_input_dim=24,
             down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
             up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")),
        lambda: {"sample": noise(2, 8, 8, 8), "timestep": torch.tensor(5), "encoder_hidden_states": noise(1, 12),
                 "added_time_ids": torch.tensor([[6, 127, 0], [7, 90, 0]])},
    ),
    "ControlNetModel": (
        dict(block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4, layers_per_block=1,
             cross_attention_dim=12, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             conditioning_embedding_out_channels=(4, 8)),
        lambda: {"sample": noise(4, 16, 16), "timestep": TIME, "encoder_hidden_states": noise(5, 12),
                 "controlnet_cond": noise(3, 32, 32)},
    ),
    "UVit2DModel": (
        dict(hidden_size=32, cond_embed_dim=16, micro_cond_encode_dim=8, micro_cond_embed_dim=40,
             encoder_hidden_size=12, vocab_size=41, codebook_size=40, in_channels=16, block_out_channels=16,
             num_res_blocks=1, block_num_heads=2, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
             sample_size=8),
        lambda: {"input_ids": torch.randint(0, 40, (2, 8, 8)), "encoder_hidden_states": noise(5, 12),
                 "pooled_text_emb": noise(16), "micro_conds": torch.rand(2, 5)},
    ),
    "Transformer2DModel": (
        HEADS | dict(in_channels=16, norm_num_groups=4, cross_attention_dim=12),
        lambda: {"hidden_states": noise(16, 8, 8), "encoder_hidden_states": noise(5, 12)},
    ),
    "TransformerTemporalModel": (
        HEADS | dict(in_channels=16, norm_num_groups=4),
        lambda: {"hidden_states": noise(16, 4, 4), "num_frames": 2},
    ),
    "DiTTransformer2DModel": (
        HEADS | dict(in_channels=4, out_channels=8, sample_size=8, num_embeds_ada_norm=20),
        lambda: {"hidden_states": noise(4, 8, 8), "timestep": TIME, "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        HEADS | dict(sample_size=8, caption_channels=12, cross_attention_dim=16, use_additional_conditions=False),
        lambda: {"hidden_states": noise(4, 8, 8), "encoder_hidden_states": noise(5, 12), "timestep": TIME,
                 "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
    ),
    "SD3Transformer2DModel": (
        JOINT | dict(sample_size=8, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
                     pos_embed_max_size=8, num_layers=2),
        lambda: {"hidden_states": noise(4, 8, 8), "encoder_hidden_states": noise(5, 16), "timestep": TIME,
                 "pooled_projections": noise(12)},
    ),
    "FluxTransformer2DModel": (
        JOINT | dict(num_single_layers=1, pooled_projection_dim=12, axes_dims_rope=(2, 2, 4)),
        lambda: _packed(pooled_projections=noise(12)),
    ),
    "ChromaTransformer2DModel": (
        JOINT | dict(num_single_layers=1, axes_dims_rope=(2, 2, 4), approximator_num_channels=8,
                     approximator_hidden_dim=16, approximator_layers=1),
        _packed,
    ),
    "AuraFlowTransformer2DModel": (
        dict(sample_size=8, in_channels=4, out_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
             attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
             pos_embed_max_size=16),
        lambda: {"hidden_states": noise(4, 8, 8), "encoder_hidden_states": noise(5, 12), "timestep": TIME},
    ),
    "CogVideoXTransformer3DModel": (
        HEADS | dict(in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=12, sample_width=8,
                     sample_height=8, sample_frames=5, max_text_seq_length=5),
        lambda: {"hidden_states": noise(2, 4, 8, 8), "encoder_hidden_states": noise(5, 12), "timestep": TIME},
    ),
    "CogView3PlusTransformer2DModel": (
        HEADS | dict(in_channels=4, out_channels=4, text_embed_dim=12, time_embed_dim=8, condition_dim=4,
                     pos_embed_max_size=8, sample_size=8),
        lambda: {"hidden_states": noise(4, 8, 8), "encoder_hidden_states": noise(5, 12), "timestep": TIME,
                 "original_size": torch.tensor([[8.0, 8.0]] * 2), "target_size": torch.tensor([[8.0, 8.0]] * 2),
                 "crop_coords": torch.zeros(2, 2)},
    ),
    "LatteTransformer3DModel": (
        HEADS | dict(in_channels=4, out_channels=8, sample_size=8, patch_size=2, cross_attention_dim=16,
                     caption_channels=12, video_length=2, norm_type="ada_norm_single", num_embeds_ada_norm=20,
                     activation_fn="gelu-approximate", norm_elementwise_affine=False, attention_bias=True),
        lambda: {"hidden_states": noise(4, 2, 8, 8), "encoder_hidden_states": noise(5, 12), "timestep": TIME},
    ),
    "Lumina2Transformer2DModel": (
        dict(sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
             num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(64, 32, 32), cap_feat_dim=12),
        lambda: {"hidden_states": noise(4, 8, 8), "timestep": torch.tensor([0.3, 0.7]),
                 "encoder_hidden_states": noise(5, 12), "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "SanaTransformer2DModel": (
        dict(in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=8,
             num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
             sample_size=8),
        lambda: {"hidden_states": noise(4, 8, 8), "encoder_hidden_states": noise(5, 12), "timestep": TIME},
    ),
    "PriorTransformer": (
        HEADS | dict(embedding_dim=12, num_embeddings=5, additional_embeddings=4),
        lambda: {"hidden_states": noise(12), "timestep": torch.tensor(3), "proj_embedding": noise(12),
                 "encoder_hidden_states": noise(5, 12)},
    ),
    "WanTransformer3DModel": (
        HEADS | dict(attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12, freq_dim=8, ffn_dim=24,
                     rope_max_seq_len=16),
        lambda: {"hidden_states": noise(4, 2, 8, 8), "timestep": TIME, "encoder_hidden_states": noise(5, 12)},
    ),
    "LTXVideoTransformer3DModel": (
        HEADS | dict(in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=12),
        lambda: {"hidden_states": noise(8, 4), "encoder_hidden_states": noise(5, 12), "timestep": TIME,
                 "encoder_attention_mask": torch.ones(2, 5), "num_frames": 2, "height": 2, "width": 2},
    ),
    "MochiTransformer3DModel": (
        HEADS | dict(in_channels=4, pooled_projection_dim=8, text_embed_dim=12, time_embed_dim=8,
                     max_sequence_length=5),
        lambda: {"hidden_states": noise(4, 2, 8, 8), "encoder_hidden_states": noise(5, 12), "timestep": TIME,
                 "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool)},
    ),
    "QwenImageTransformer2DModel": (
        JOINT | dict(out_channels=1, axes_dims_rope=(2, 2, 4)),
        lambda: {"hidden_states": noise(9, 4), "encoder_hidden_states": noise(5, 16),
                 "timestep": torch.tensor([0.3, 0.7]), "img_shapes": [[(1, 3, 3)]] * 2,
                 "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.long)},
    ),
    "StableAudioDiTModel": (
        HEADS | dict(sample_size=8, in_channels=4, out_channels=4, num_key_value_attention_heads=1,
                     cross_attention_dim=8, time_proj_dim=8, global_states_input_dim=12, cross_attention_input_dim=12),
        lambda: {"hidden_states": noise(4, 8), "timestep": torch.tensor([0.3, 0.7]),
                 "encoder_hidden_states": noise(5, 12), "global_hidden_states": noise(1, 12),
                 "rotary_embedding": (torch.randn(9, 4), torch.randn(9, 4))},
    ),
    "StableCascadeUNet": (
        dict(in_channels=4, out_channels=4, timestep_ratio_embedding_dim=8, conditioning_dim=16,
             block_out_channels=(16, 16), num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1),
             up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1), up_blocks_repeat_mappers=(1, 1),
             clip_text_pooled_in_channels=12, clip_seq=2),
        lambda: {"sample": noise(4, 8, 8), "timestep_ratio": torch.tensor([0.3, 0.7]),
                 "clip_text_pooled": noise(1, 12)},
    ),
    "T5FilmDecoder": (
        dict(input_dims=8, targets_length=6, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=24),
        lambda: {"encodings_and_masks": [(noise(5, 16), torch.ones(2, 5))], "decoder_input_tokens": noise(6, 8),
                 "decoder_noise_time": torch.tensor([0.3, 0.7])},
    ),
    "T2IAdapter": (dict(channels=[8, 16], num_res_blocks=1), lambda: {"x": noise(3, 32, 32)}),
    "AutoencoderKL": (
        dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, sample_size=16,
             down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        lambda: {"sample": noise(3, 16, 16)},
    ),
    "AsymmetricAutoencoderKL": (
        dict(down_block_out_channels=(8, 16), up_block_out_channels=(8, 16), norm_num_groups=4,
             down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        lambda: {"sample": noise(3, 16, 16)},
    ),
    "AutoencoderKLTemporalDecoder": (
        dict(block_out_channels=(32, 32), layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 2),
        lambda: {"sample": noise(3, 16, 16), "num_frames": 2},
    ),
    "AutoencoderTiny": (
        dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
             num_decoder_blocks=(1, 1)),
        lambda: {"sample": noise(3, 16, 16)},
    ),
    "AutoencoderDC": (
        dict(latent_channels=4, attention_head_dim=4, encoder_block_types=("ResBlock", "EfficientViTBlock"),
             decoder_block_types=("ResBlock", "EfficientViTBlock"), encoder_block_out_channels=(8, 8),
             decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)), decoder_qkv_multiscales=((), (5,)),
             encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1)),
        lambda: {"sample": noise(3, 16, 16)},
    ),
    "AutoencoderOobleck": (
        dict(encoder_hidden_size=12, decoder_channels=12, decoder_input_channels=6, downsampling_ratios=[2, 4],
             channel_multiples=[1, 2]),
        lambda: {"sample": noise(2, 64)},
    ),
    "VQModel": (
        dict(block_out_channels=(8, 16), norm_num_groups=4, latent_channels=3, num_vq_embeddings=16,
             down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
        lambda: {"sample": noise(3, 16, 16)},
    ),
}  # fmt: skip


def _make(name: str) -> tuple[nn.Module, Any]:
    import diffusers.models

    settings, inputs = MODELS[name]
    return getattr(diffusers.models, name)(**settings), inputs()


def models() -> Iterator[Model]:
    for name in MODELS:
        yield Model("diffusers", name, partial(_make, name))
