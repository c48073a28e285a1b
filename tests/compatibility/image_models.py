"""Images: vit-pytorch, timm and open_clip, each model at a few thousand parameters where it can be made so small."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.compatibility import Model

VIT = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, mlp_dim=48, dim_head=8)
SERIES = dict(seq_len=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, mlp_dim=48, dim_head=8)
VIDEO = dict(image_size=16, image_patch_size=8, frames=4, frame_patch_size=2, num_classes=5, dim=32, depth=2, heads=2,
             mlp_dim=48, dim_head=8)  # fmt: skip
SPACE = dict(ndim=3, input_shape=(4, 16, 16), patch_size=(2, 8, 8), num_classes=5, dim=32, depth=2, heads=2, mlp_dim=48,
             dim_head=8)  # fmt: skip


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in names}


#: module of vit_pytorch → class, settings, shape of the input
VIT_PYTORCH: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    **dict.fromkeys(
        ("vit", "parallel_vit", "vit_5", "vit_for_small_dataset", "vit_with_decorr", "vit_with_keel_post_ln",
         "vit_with_patch_dropout"),
        ("ViT", VIT, (2, 3, 32, 32)),
    ),
    **dict.fromkeys(
        ("simple_vit", "attn_residual_with_dca_simple_vit", "simple_vit_orthog_residual_update",
         "simple_vit_with_patch_dropout", "simple_vit_with_qk_norm", "simple_vit_with_register_tokens",
         "simple_vit_with_relative_proj_pos_bias", "simple_vit_with_specialized_cls", "simple_vit_with_value_residual",
         "simple_flash_attn_vit"),
        ("SimpleViT", VIT, (2, 3, 32, 32)),
    ),
    "simple_vit_with_hyper_connections": ("SimpleViT", VIT | dict(num_residual_streams=2), (2, 3, 32, 32)),
    "simple_vit_with_fft": ("SimpleViT", VIT | dict(freq_patch_size=8), (2, 3, 32, 32)),
    "simple_vit_attn_residual": ("SimpleViTAttnResidual", VIT, (2, 3, 32, 32)),
    "simple_vit_with_sparse_gating": ("SimpleViTWithSparseGating", VIT, (2, 3, 32, 32)),
    "ats_vit": ("ViT", VIT | dict(max_tokens_per_depth=(9, 6)), (2, 3, 32, 32)),
    "cait": ("CaiT", VIT | dict(cls_depth=1), (2, 3, 32, 32)),
    "cct": (
        "CCT",
        dict(img_size=32, embedding_dim=32, n_conv_layers=1, kernel_size=3, num_layers=2, num_heads=2, mlp_ratio=2.0,
             num_classes=5),
        (2, 3, 32, 32),
    ),
    "cross_vit": (
        "CrossViT",
        dict(image_size=32, num_classes=5, depth=1, sm_dim=16, sm_patch_size=8, sm_enc_depth=1, sm_enc_heads=2,
             sm_enc_mlp_dim=24, sm_enc_dim_head=8, lg_dim=32, lg_patch_size=16, lg_enc_depth=1, lg_enc_heads=2,
             lg_enc_mlp_dim=48, lg_enc_dim_head=8, cross_attn_depth=1, cross_attn_heads=2, cross_attn_dim_head=8),
        (2, 3, 32, 32),
    ),
    "crossformer": (
        "CrossFormer",
        dict(num_classes=5, dim=(32, 32, 64, 64), depth=(1, 1, 1, 1), global_window_size=(4, 2, 2, 1),
             local_window_size=2),
        (2, 3, 64, 64),
    ),
    "cvt": (
        "CvT",
        dict(num_classes=5, s1_emb_dim=16, s1_heads=1, s2_emb_dim=24, s2_heads=2, s2_depth=1, s3_emb_dim=32, s3_heads=2,
             s3_depth=1),
        (2, 3, 32, 32),
    ),
    "deepvit": ("DeepViT", VIT, (2, 3, 32, 32)),
    "jet_vit": ("JetViT", VIT | dict(window_size=2), (2, 3, 32, 32)),
    "jumbo_vit": ("JumboViT", VIT, (2, 3, 32, 32)),
    "learnable_memory_vit": ("ViT", VIT, (2, 3, 32, 32)),
    "levit": (
        "LeViT",
        dict(image_size=64, num_classes=5, dim=(16, 24, 32), depth=1, heads=(2, 2, 2), mlp_mult=2, dim_key=8,
             dim_value=8),
        (2, 3, 64, 64),
    ),
    "local_vit": ("LocalViT", VIT, (2, 3, 32, 32)),
    "look_vit": (
        "LookViT",
        dict(dim=32, image_size=32, num_classes=5, depth=1, patch_size=16, heads=2, mlp_factor=2, dim_head=8,
             highres_patch_size=8, highres_mlp_factor=2, cross_attn_heads=2, cross_attn_dim_head=8),
        (2, 3, 32, 32),
    ),
    "looped_vit": (
        "LoopedViT",
        dict(num_classes=5, dim=32, image_size=32, patch_size=8, pre_loop_depth=1, num_looped_blocks=1,
             post_loop_depth=1, loop_depth=2, heads=2, dim_head=8, mlp_dim=48),
        (2, 3, 32, 32),
    ),
    "max_vit": ("MaxViT", dict(num_classes=5, dim=16, depth=(1, 1), dim_head=8, window_size=4, dim_conv_stem=16),
                (2, 3, 32, 32)),
    "max_vit_with_registers": (
        "MaxViT", dict(num_classes=5, dim=16, depth=(1, 1), dim_head=8, window_size=4, dim_conv_stem=16), (2, 3, 32, 32)
    ),
    "mobile_vit": (
        "MobileViT",
        dict(image_size=(64, 64), dims=[16, 24, 32], channels=[8, 8, 8, 8, 12, 12, 16, 16, 16, 16, 24], num_classes=5,
             depths=(1, 1, 1)),
        (2, 3, 64, 64),
    ),
    "nest": (
        "NesT",
        dict(image_size=32, patch_size=4, num_classes=5, dim=16, heads=2, num_hierarchies=2, block_repeats=(1, 1),
             dim_head=8),
        (2, 3, 32, 32),
    ),
    "normalized_vit": ("nViT", VIT, (2, 3, 32, 32)),
    "pit": ("PiT", VIT | dict(depth=(1, 1)), (2, 3, 32, 32)),
    "regionvit": ("RegionViT", dict(dim=(16, 16, 32, 32), depth=(1, 1, 1, 1), window_size=2, num_classes=5),
                  (2, 3, 64, 64)),
    "rvt": ("RvT", VIT, (2, 3, 32, 32)),
    "scalable_vit": (
        "ScalableViT",
        dict(num_classes=5, dim=16, heads=(2, 2), depth=(1, 1), reduction_factor=(2, 1), window_size=(4, None),
             iwsa_dim_key=8, iwsa_dim_value=8, ssa_dim_key=8, ssa_dim_value=8),
        (2, 3, 32, 32),
    ),
    "sep_vit": ("SepViT", dict(num_classes=5, dim=16, depth=(1, 1), heads=(1, 2), window_size=4, dim_head=8),
                (2, 3, 32, 32)),
    "simple_uvit": ("SimpleUViT", VIT | dict(depth=3), (2, 3, 32, 32)),
    "simple_vit_1d": ("SimpleViT", SERIES, (2, 3, 32)),
    "vit_1d": ("ViT", SERIES, (2, 3, 32)),
    "simple_vit_3d": ("SimpleViT", VIDEO, (2, 3, 4, 16, 16)),
    "simple_flash_attn_vit_3d": ("SimpleViT", VIDEO, (2, 3, 4, 16, 16)),
    "vit_3d": ("ViT", VIDEO, (2, 3, 4, 16, 16)),
    "vivit": ("ViViT", without(VIDEO, "depth") | dict(spatial_depth=1, temporal_depth=1), (2, 3, 4, 16, 16)),
    "vit_nd": ("ViTND", SPACE, (2, 3, 4, 16, 16)),
    "vit_nd_rotary": ("ViTND", SPACE, (2, 3, 4, 16, 16)),
    "vit_nd_pope": ("ViTND", SPACE, (2, 3, 4, 16, 16)),
    "t2t": (
        "T2TViT",
        dict(image_size=32, num_classes=5, dim=32, depth=1, heads=2, mlp_dim=48, dim_head=8,
             t2t_layers=((7, 4), (3, 2))),
        (2, 3, 32, 32),
    ),
    "twins_svt": (
        "TwinsSVT",
        dict(num_classes=5, s1_emb_dim=16, s1_local_patch_size=2, s1_global_k=2, s2_emb_dim=16, s2_local_patch_size=2,
             s2_global_k=2, s3_emb_dim=32, s3_local_patch_size=2, s3_global_k=2, s3_depth=1, s4_emb_dim=32,
             s4_local_patch_size=2, s4_global_k=2, s4_depth=1),
        (2, 3, 64, 64),
    ),
    "vit_detpool": ("ViTDetPool", VIT, (2, 3, 32, 32)),
    "vit_with_patch_merger": ("ViT", VIT | dict(patch_merge_layer=1, patch_merge_num_tokens=4), (2, 3, 32, 32)),
    "wwt": ("WWT", without(VIT, "dim_head") | dict(num_slots=4, dim_head=8), (2, 3, 32, 32)),
    "xcit": ("XCiT", VIT | dict(cls_depth=1), (2, 3, 32, 32)),
}  # fmt: skip

#: architectures of timm with what makes them small
TIMM: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    "deit_tiny_distilled_patch16_224": dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    "beit_base_patch16_224": dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    "eva02_tiny_patch14_224": dict(img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=2),
    "cait_xxs24_224": dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    "crossvit_9_240": dict(img_size=48),
    "convit_tiny": dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, local_up_to_layer=1),
    "xcit_nano_12_p16_224": dict(img_size=32, embed_dim=32, depth=2, num_heads=2),
    "swin_tiny_patch4_window7_224": dict(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)),
    "swinv2_tiny_window8_256": dict(img_size=32, window_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2)),
    "mixer_s32_224": dict(img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    "gmlp_s16_224": dict(img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    "resmlp_12_224": dict(img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    "convnext_tiny": dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "convmixer_768_32": dict(dim=32, depth=2),
    "poolformer_s12": dict(layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)),
    "pvt_v2_b0": dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 2, 2, 2)),
    "twins_svt_small": dict(img_size=64, depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(1, 2, 2, 2),
                            wss=(2, 2, 2, 2), sr_ratios=(2, 2, 1, 1)),
    "maxvit_pico_rw_256": dict(img_size=64),
    "coatnet_pico_rw_224": dict(img_size=64),
    "edgenext_xx_small": dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "efficientformerv2_s0": dict(img_size=64),
    "fastvit_t8": dict(layers=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32)),
    "focalnet_tiny_srf": dict(depths=(1, 1, 1, 1), embed_dim=16),
    "davit_tiny": dict(depths=(1, 1, 1, 1), embed_dims=(16, 16, 32, 32), num_heads=(2, 2, 2, 2), window_size=4),
    "mobilevit_xxs": dict(),
    "mobilenetv3_small_050": dict(),
    "efficientnet_b0": dict(),
    "resnet18": dict(),
    "regnety_002": dict(),
    "densenet121": dict(growth_rate=8, block_config=(1, 1, 1, 1)),
    "repvgg_a0": dict(),
    "hgnetv2_b0": dict(),
    "naflexvit_base_patch16_gap": dict(embed_dim=32, depth=2, num_heads=2),
    "mambaout_femto": dict(depths=(1, 1, 1, 1), dims=(16, 16, 32, 32)),
    "nextvit_small": dict(depths=(1, 1, 2, 1)),
    "hiera_tiny_224": dict(img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)),
    "sequencer2d_s": dict(img_size=32, layers=(1, 1, 1, 1), embed_dims=(16, 16, 16, 16), hidden_sizes=(8, 8, 8, 8)),
    "volo_d1_224": dict(img_size=32, layers=(1, 1, 1, 1), embed_dims=(16, 32, 32, 32), num_heads=(2, 2, 2, 2)),
    "visformer_tiny": dict(img_size=32, embed_dim=32, depth=(1, 1, 1), num_heads=2, init_channels=8),
    "tnt_s_patch16_224": dict(img_size=32, embed_dim=32, depth=2, inner_dim=16),
    "nest_tiny": dict(img_size=32, embed_dims=(16, 16, 16), num_heads=(2, 2, 2), depths=(1, 1, 1)),
    "levit_128s": dict(img_size=64, embed_dim=(32, 32, 48), key_dim=8, depth=(1, 1, 1), num_heads=(2, 2, 2)),
    "pit_ti_224": dict(img_size=64),
    "shvit_s1": dict(),
    "starnet_s1": dict(),
    "tiny_vit_5m_224": dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)),
}  # fmt: skip

#: towers for open_clip's model classes, written out, for none of its named configs is small
TEXT = dict(context_length=12, vocab_size=101, width=32, heads=2, layers=2)
VISION = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)
OPEN_CLIP: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIP", dict(vision_cfg=VISION, text_cfg=TEXT)),
    "CLIP-quick-gelu": ("CLIP", dict(vision_cfg=VISION, text_cfg=TEXT, quick_gelu=True)),
    "CLIP-pooler": ("CLIP", dict(vision_cfg=VISION | dict(attentional_pool=True, attn_pooler_heads=2), text_cfg=TEXT)),
    "CustomTextCLIP": ("CustomTextCLIP", dict(vision_cfg=VISION, text_cfg=TEXT)),
    "CoCa": (
        "CoCa",
        dict(vision_cfg=VISION | dict(attentional_pool=True, attn_pooler_heads=2, output_tokens=True),
             text_cfg=TEXT | dict(embed_cls=True, output_tokens=True),
             multimodal_cfg=dict(context_length=12, vocab_size=101, width=32, heads=2, layers=1)),
    ),
    "CLIP-resnet": ("CLIP", dict(vision_cfg=dict(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=16),
                                 text_cfg=TEXT)),
}  # fmt: skip


def _vit_pytorch(module: str) -> tuple[nn.Module, Any]:
    name, settings, shape = VIT_PYTORCH[module]
    return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**settings), (torch.randn(shape),)


def _timm(name: str) -> tuple[nn.Module, Any]:
    import timm

    settings = TIMM[name]
    model = timm.create_model(name, pretrained=False, num_classes=5, **settings)
    size = settings.get("img_size", 64)
    size = size if isinstance(size, int) else size[0]
    return model, (torch.randn(2, 3, size, size),)


def _open_clip(name: str) -> tuple[nn.Module, Any]:
    import open_clip

    cls, settings = OPEN_CLIP[name]
    model = getattr(open_clip, cls)(embed_dim=32, **settings)
    vision = settings["vision_cfg"]
    text = torch.randint(1, 100, (2, 12))
    text[:, 9] = 100  # the end of the text: the largest number is looked for
    return model, (torch.randn(2, 3, vision["image_size"], vision["image_size"]), text)


PACKAGES: tuple[tuple[str, Callable[[str], Any], dict[str, Any]], ...] = (
    ("vit_pytorch", _vit_pytorch, VIT_PYTORCH),
    ("timm", _timm, TIMM),
    ("open_clip", _open_clip, OPEN_CLIP),
)


def models() -> Iterator[Model]:
    for package, make, table in PACKAGES:
        for name in table:
            yield Model(package, name, partial(make, name))
