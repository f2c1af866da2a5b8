"""Tiny models with random weights of many families, and what ``patch`` makes of each.

    python -m tests.model_zoo                      # try all, print a table
    python -m tests.model_zoo --held-out --write   # write docs/models.md and tokenpool_ext/vit/supported.txt

A family *works* when a patched model runs, its outputs are finite, as large as before and other than before, keeping
all tokens and unpatching give the old outputs to the bit, and the block commutes with a permutation of its tokens,
which ``patch`` itself proves. Otherwise it is *refused* (a TypeError or ValueError of ``patch`` that names the class),
*late* (the model breaks when it runs), *cryptic* (any other error of ``patch``) or *wrong*.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import tokenpool_ext as tp

TINY_TIMM = dict(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=4, num_classes=5)
# name -> overrides; HELD_OUT were never run while the mechanism was written
TIMM = {
    "vit_small_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_rope_reg1_gap_256": {},
    "eva02_tiny_patch14_224": {},
    "eva_giant_patch14_224": {"num_heads": 4},
    "vit_small_patch16_dinov3": {},
    "beit_base_patch16_224": {},
    "beitv2_base_patch16_224": {},
    "deit3_small_patch16_224": {},
    "cait_xxs24_224": {},
    "xcit_nano_12_p16_224": {},
    "vit_relpos_small_patch16_224": {},
    "vit_srelpos_small_patch16_224": {},
    "samvit_base_patch16": {"img_size": 128},
    "mixer_s16_224": {"_as_is": True},
    "vit_little_patch16_reg1_gap_256": {},
    "vit_xsmall_patch16_clip_224": {},
    "vit_small_plus_patch16_dinov3": {},
    "naflexvit_base_patch16_gap": {"img_size": None},
    "vit_base_patch16_xp_224": {},
    "crossvit_tiny_240": {"_as_is": True},
    "swin_tiny_patch4_window7_224": {"_as_is": True},
    "swinv2_tiny_window8_256": {"_as_is": True},
    "pit_ti_224": {"_as_is": True},
    "pvt_v2_b0": {"_as_is": True},
    "levit_128s": {"_as_is": True},
    "coat_tiny": {"_as_is": True},
    "maxvit_tiny_tf_224": {"_as_is": True},
    "hiera_tiny_224": {"_as_is": True},
    "twins_pcpvt_small": {"_as_is": True},
    "tnt_s_patch16_224": {"_as_is": True},
    "volo_d1_224": {"_as_is": True},
    "convit_tiny": {"_as_is": True},
    "visformer_tiny": {"_as_is": True},
    "mvitv2_tiny": {"_as_is": True},
    "nest_tiny": {"_as_is": True},
    "gcvit_xxtiny": {"_as_is": True},
    "efficientformer_l1": {"_as_is": True},
    "resnet18": {"_as_is": True},
    "vit_base_r50_s16_224": {"_as_is": True},
    "flexivit_small": {},
    "vit_dlittle_patch16_reg1_gap_256": {},
    "vit_base_patch16_plus_240": {},
    "vit_so400m_patch14_siglip_gap_224": {},
    "vit_pe_core_tiny_patch16_384": {},
    "aimv2_large_patch14_224": {},
    "vit_intern300m_patch14_448": {},
    "vit_wee_patch16_reg1_gap_256": {},
    "vit_small_r26_s32_224": {"_as_is": True},
    "sam2_hiera_tiny": {"_as_is": True},
    "rope_vit_small": {"_name": "vit_small_patch16_rope_224"},
    "rope_mixed": {"_name": "vit_small_patch16_rope_mixed_224"},
    "parallel_thin": {"_name": "vit_base_patch16_224", "_parallel": True},
}


def timm_model(name: str, **extra):
    import timm

    as_is, name = extra.pop("_as_is", False), extra.pop("_name", name)
    if extra.pop("_parallel", False):
        from timm.models.vision_transformer import ParallelThingsBlock

        extra["block_fn"] = ParallelThingsBlock
    if as_is:
        model = timm.create_model(name, num_classes=5)
    else:
        options = {k: v for k, v in {**TINY_TIMM, **extra}.items() if v is not None}
        model = timm.create_model(name, **options)
    size = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
    if not as_is and options.get("img_size"):
        size = (3, options["img_size"], options["img_size"])
    return model, (torch.randn(2, *size),), {}


SHRINK = dict(
    hidden_size=64,
    d_model=64,
    dim=64,
    embed_dim=64,
    num_hidden_layers=4,
    num_layers=4,
    n_layers=4,
    depth=4,
    encoder_layers=4,
    decoder_layers=2,
    num_decoder_layers=2,
    num_attention_heads=4,
    num_heads=4,
    n_heads=4,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=128,
    mlp_dim=128,
    ffn_dim=128,
    encoder_ffn_dim=128,
    decoder_ffn_dim=128,
    hidden_dim=128,
    d_ff=128,
    d_kv=16,
    head_dim=16,
    vocab_size=120,
    pad_token_id=0,
    projection_dim=32,
    projection_size=32,
    out_hidden_size=64,
    global_attn_indexes=[2],
    decoder_hidden_size=64,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=4,
    decoder_intermediate_size=64,
    pred_hidden_size=32,
    pred_num_hidden_layers=2,
    pred_num_attention_heads=4,
    embedding_size=64,
    num_conv_pos_embeddings=16,
    conv_dim=(32, 32, 32, 32, 32, 32, 32),
    num_labels=5,
    num_hidden_groups=1,
    global_rope_theta=10000.0,
    max_source_positions=50,
    relative_attention_num_buckets=None,
    output_hidden_size=None,
    num_cls_tokens=None,
    neck_hidden_sizes=None,
    reshape_hidden_states=None,
    max_position_embeddings=None,
)
SMALL_IMAGES = {"image_size": 64, "patch_size": 16}


def shrink(config, **extra):
    """A small model's config; what a config does not know is left out."""
    wanted = {**SHRINK, **extra}
    for name, value in wanted.items():
        if value is not None and hasattr(config, name) and getattr(config, name) is not None:
            with contextlib.suppress(Exception):
                setattr(config, name, value)
    for name in list(vars(config)):
        if name.endswith("config") and hasattr(getattr(config, name), "to_dict"):
            shrink(getattr(config, name), **extra)
    return config


def hf(config_name: str, model_name: str | None = None, inputs: str = "image", images=SMALL_IMAGES, **extra):
    import transformers

    config = shrink(getattr(transformers, config_name)(), **{**(images or {}), **extra})
    model = getattr(transformers, model_name or config_name.replace("Config", "Model"))(config)
    return model, (), hf_inputs(inputs, config)


def hf_as_is(config_name: str):
    import transformers

    config = getattr(transformers, config_name)(image_size=224)
    return getattr(transformers, config_name.replace("Config", "Model"))(config), (), hf_inputs("image", config)


def hf_inputs(kind: str, config) -> dict:
    import tokenpool_ext.vit.finding as finding

    size = finding.setting(config, "image_size", default=64)
    size = size if isinstance(size, int) else size[0]
    words = torch.randint(5, 100, (2, 12))
    made: dict = {}
    for part in kind.split("+"):
        if part == "image":
            made["pixel_values"] = torch.randn(2, finding.setting(config, "num_channels", default=3), size, size)
        elif part == "text":
            made["input_ids"] = words
        elif part == "padded":
            mask = torch.ones(2, 12, dtype=torch.long)
            mask[1, 9:] = 0
            made.update(input_ids=words, attention_mask=mask)
        elif part == "decoder":
            made["decoder_input_ids"] = words[:, :5]
        elif part == "video":
            frames = finding.setting(config, "num_frames", "frames_per_clip", default=4)
            made["pixel_values"] = torch.randn(2, frames, 3, size, size)
        elif part == "clip":
            made["pixel_values_videos"] = torch.randn(2, config.frames_per_clip, 3, size, size)
        elif part == "wave":
            made["input_values"] = torch.randn(2, 8000)
        elif part == "mel":
            made["input_features"] = torch.randn(2, config.num_mel_bins, 100)
        elif part == "frames":
            made["input_features"] = torch.randn(2, 50, 160)
        elif part == "spectrogram":
            made["input_values"] = torch.randn(2, config.max_length, config.num_mel_bins)
        elif part == "boxes":
            made["bbox"] = torch.randint(0, 100, (2, 12, 4)).sort(-1)[0][..., [0, 1, 2, 3]]
    return made


HF: dict[str, Callable] = {
    "ViT": lambda: hf("ViTConfig"),
    "ViTForImageClassification": lambda: hf("ViTConfig", "ViTForImageClassification"),
    "DeiT": lambda: hf("DeiTConfig"),
    "Dinov2": lambda: hf("Dinov2Config"),
    "Dinov2ForImageClassification": lambda: hf("Dinov2Config", "Dinov2ForImageClassification"),
    "Dinov2WithRegisters": lambda: hf("Dinov2WithRegistersConfig"),
    "DINOv3ViT": lambda: hf("DINOv3ViTConfig"),
    "CLIPVision": lambda: hf("CLIPVisionConfig", "CLIPVisionModel"),
    "CLIP": lambda: hf("CLIPConfig", inputs="image+text"),
    "SiglipVision": lambda: hf("SiglipVisionConfig"),
    "Siglip": lambda: hf("SiglipConfig", inputs="image+text", projection_size=64),
    "Beit": lambda: hf("BeitConfig", use_relative_position_bias=True),
    "BeitAbsolute": lambda: hf("BeitConfig", use_absolute_position_embeddings=True),
    "BeitShared": lambda: hf("BeitConfig", use_shared_relative_position_bias=True),
    "Data2VecVision": lambda: hf("Data2VecVisionConfig", use_relative_position_bias=True),
    "ViTMAEForPreTraining": lambda: hf("ViTMAEConfig", "ViTMAEForPreTraining"),
    "ViTMSN": lambda: hf("ViTMSNConfig"),
    "VideoMAE": lambda: hf("VideoMAEConfig", inputs="video", num_frames=4),
    "Vivit": lambda: hf("VivitConfig", inputs="video", num_frames=4),
    "Timesformer": lambda: hf("TimesformerConfig", inputs="video", num_frames=4),
    "VJEPA2": lambda: hf("VJEPA2Config", inputs="clip", crop_size=64, frames_per_clip=4),
    "IJepa": lambda: hf("IJepaConfig"),
    "YolosForObjectDetection": lambda: hf("YolosConfig", "YolosForObjectDetection", images={"image_size": [64, 64]}),
    "DPTForDepthEstimation": lambda: hf("DPTConfig", "DPTForDepthEstimation", backbone_out_indices=[0, 1, 2, 3]),
    "OwlViTVision": lambda: hf("OwlViTVisionConfig", "OwlViTVisionModel"),
    "BlipVision": lambda: hf("BlipVisionConfig", "BlipVisionModel"),
    "Blip2Vision": lambda: hf("Blip2VisionConfig", "Blip2VisionModel"),
    "AltCLIPVision": lambda: hf("AltCLIPVisionConfig", "AltCLIPVisionModel"),
    "CLIPSeg": lambda: hf("CLIPSegVisionConfig", "CLIPSegVisionModel"),
    "XCLIPVision": lambda: hf("XCLIPVisionConfig", "XCLIPVisionModel", num_frames=2),
    "GroupViTVision": lambda: hf("GroupViTVisionConfig", "GroupViTVisionModel"),
    "GitVision": lambda: hf("GitVisionConfig", "GitVisionModel"),
    "MLCDVision": lambda: hf("MLCDVisionConfig", "MLCDVisionModel"),
    "Aimv2Vision": lambda: hf("Aimv2VisionConfig", "Aimv2VisionModel"),
    "InternVLVision": lambda: hf(
        "InternVLVisionConfig", "InternVLVisionModel", images={"image_size": [64, 64], "patch_size": [16, 16]}
    ),
    "PixtralVision": lambda: hf(
        "PixtralVisionConfig", "PixtralVisionModel", images={"image_size": 64, "patch_size": 16}
    ),
    "FlavaImage": lambda: hf("FlavaImageConfig", "FlavaImageModel"),
    "Vilt": lambda: hf("ViltConfig", inputs="image+text"),
    "SamVision": lambda: hf(
        "SamVisionConfig", "SamVisionModel", images={"image_size": 64, "patch_size": 16}, window_size=2
    ),
    "Hiera": lambda: hf_as_is("HieraConfig"),
    "Swin": lambda: hf_as_is("SwinConfig"),
    "Swinv2": lambda: hf_as_is("Swinv2Config"),
    "Segformer": lambda: hf("SegformerConfig", images={"image_size": 64}),
    "Pvt": lambda: hf("PvtConfig", images={"image_size": 64}),
    "Levit": lambda: hf("LevitConfig", images=None, hidden_size=None),
    "Cvt": lambda: hf("CvtConfig", images=None, embed_dim=None, depth=None, num_heads=None),
    "MobileViT": lambda: hf("MobileViTConfig", images=None),
    "Dinov2Backbone": lambda: hf("Dinov2Config", "Dinov2Backbone", _out_features=["stage4"], out_features=["stage4"]),
    "Bert": lambda: hf("BertConfig", inputs="text"),
    "BertPadded": lambda: hf("BertConfig", inputs="padded"),
    "Roberta": lambda: hf("RobertaConfig", inputs="padded"),
    "DistilBert": lambda: hf("DistilBertConfig", inputs="padded"),
    "Electra": lambda: hf("ElectraConfig", inputs="padded"),
    "Albert": lambda: hf("AlbertConfig", inputs="text"),
    "DebertaV2": lambda: hf("DebertaV2Config", inputs="text"),
    "MPNet": lambda: hf("MPNetConfig", inputs="padded"),
    "ModernBert": lambda: hf("ModernBertConfig", inputs="padded"),
    "CLIPText": lambda: hf("CLIPTextConfig", "CLIPTextModel", inputs="text"),
    "SiglipText": lambda: hf("SiglipTextConfig", "SiglipTextModel", inputs="text"),
    "T5Encoder": lambda: hf("T5Config", "T5EncoderModel", inputs="padded"),
    "Bart": lambda: hf("BartConfig", inputs="text"),
    "GPT2": lambda: hf("GPT2Config", inputs="text", n_embd=64, n_layer=4, n_head=4),
    "Llama": lambda: hf("LlamaConfig", inputs="text"),
    "LayoutLM": lambda: hf("LayoutLMConfig", inputs="text+boxes"),
    "FNet": lambda: hf("FNetConfig", inputs="text"),
    "Longformer": lambda: hf("LongformerConfig", inputs="text", attention_window=4),
    "Wav2Vec2": lambda: hf("Wav2Vec2Config", inputs="wave"),
    "Hubert": lambda: hf("HubertConfig", inputs="wave"),
    "WavLM": lambda: hf("WavLMConfig", inputs="wave"),
    "Data2VecAudio": lambda: hf("Data2VecAudioConfig", inputs="wave"),
    "AST": lambda: hf("ASTConfig", inputs="spectrogram", images={"patch_size": 16}, max_length=64),
    "WhisperEncoder": lambda: whisper(),
    "Wav2Vec2Bert": lambda: hf("Wav2Vec2BertConfig", inputs="frames"),
    "DetrEncoder": lambda: hf("DetrConfig", images=None, use_timm_backbone=False, inputs="image"),
    "Llava": lambda: llava(),
    "Qwen2VL vision": lambda: packed("qwen2_vl", "Qwen2VLVision"),
    "Qwen2.5VL vision": lambda: packed("qwen2_5_vl", "Qwen2_5_VLVision", fullatt_block_indexes=[3]),
    "Esm": lambda: hf("EsmConfig", inputs="text", mask_token_id=4, max_position_embeddings=64),
}


# Never run while the mechanism was written, only to count at the end.
HELD_OUT_TIMM = {
    "vit_base_patch32_clip_quickgelu_224": {},
    "vit_medium_patch16_gap_240": {},
    "vit_base_patch14_reg4_dinov2": {"num_heads": 2},
    "vit_betwixt_patch16_rope_reg4_gap_256": {},
    "vit_small_patch16_dinov3_qkvb": {},
    "vit_base_patch16_siglip_gap_224": {},
    "vit_base_patch16_rope_mixed_ape_224": {},
    "eva02_base_patch14_224": {},
    "beit3_base_patch16_224": {},
    "vit_relpos_base_patch16_cls_224": {},
    "vit_relpos_medium_patch16_rpn_224": {},
    "deit3_medium_patch16_224": {},
    "deit_base_distilled_patch16_224": {},
    "cait_s24_224": {},
    "naflexvit_base_patch16_siglip": {"img_size": None},
    "vit_pwee_patch16_reg1_gap_256": {},
    "vit_base_mci_224": {"_as_is": True},
    "convit_small": {"_as_is": True},
    "swin_s3_tiny_224": {"_as_is": True},
    "davit_tiny": {"_as_is": True},
    "focalnet_tiny_srf": {"_as_is": True},
    "edgenext_xx_small": {"_as_is": True},
    "mobilevit_xxs": {"_as_is": True},
    "efficientvit_b0": {"_as_is": True},
    "efficientvit_m0": {"_as_is": True},
    "tiny_vit_5m_224": {"_as_is": True},
    "repvit_m0_9": {"_as_is": True},
    "fastvit_t8": {"_as_is": True},
    "poolformer_s12": {"_as_is": True},
    "caformer_s18": {"_as_is": True},
    "gmlp_s16_224": {"_as_is": True},
    "resmlp_12_224": {"_as_is": True},
    "convnext_atto": {"_as_is": True},
    "hieradet_small": {"_as_is": True},
    "sequencer2d_s": {"_as_is": True},
    "nextvit_small": {"_as_is": True},
    "inception_next_tiny": {"_as_is": True},
}
HELD_OUT: dict[str, Callable] = {
    "DeiTForImageClassificationWithTeacher": lambda: hf("DeiTConfig", "DeiTForImageClassificationWithTeacher"),
    "ViTForMaskedImageModeling": lambda: hf("ViTConfig", "ViTForMaskedImageModeling"),
    "BeitForSemanticSegmentation": lambda: hf("BeitConfig", "BeitForSemanticSegmentation", out_indices=[0, 1, 2, 3]),
    "Siglip2Vision": lambda: siglip2(),
    "Owlv2Vision": lambda: hf("Owlv2VisionConfig", "Owlv2VisionModel"),
    "ChineseCLIPVision": lambda: hf("ChineseCLIPVisionConfig", "ChineseCLIPVisionModel"),
    "InstructBlipVision": lambda: hf("InstructBlipVisionConfig", "InstructBlipVisionModel"),
    "InstructBlipVideoVision": lambda: hf("InstructBlipVideoVisionConfig", "InstructBlipVideoVisionModel"),
    "Idefics2Vision": lambda: hf("Idefics2VisionConfig", "Idefics2VisionTransformer"),
    "Idefics3Vision": lambda: hf("Idefics3VisionConfig", "Idefics3VisionTransformer"),
    "SmolVLMVision": lambda: hf("SmolVLMVisionConfig", "SmolVLMVisionTransformer"),
    "Kosmos2": lambda: hf("Kosmos2VisionConfig", "Kosmos2VisionModel"),
    "JanusVision": lambda: hf("JanusVisionConfig", "JanusVisionModel"),
    "MetaClip2Vision": lambda: hf("MetaClip2VisionConfig", "MetaClip2VisionModel"),
    "VideoMAEForVideoClassification": lambda: hf(
        "VideoMAEConfig", "VideoMAEForVideoClassification", inputs="video", num_frames=4
    ),
    "VivitForVideoClassification": lambda: hf(
        "VivitConfig", "VivitForVideoClassification", inputs="video", num_frames=4
    ),
    "Dinov2WithRegistersBackbone": lambda: hf(
        "Dinov2WithRegistersConfig", "Dinov2WithRegistersBackbone", _out_features=["stage4"], out_features=["stage4"]
    ),
    "VitDet": lambda: hf("VitDetConfig", images={"image_size": 64, "patch_size": 16}),
    "ViTHybrid": lambda: hf("ViTHybridConfig", images=None),
    "DinatModel": lambda: hf_as_is("DinatConfig"),
    "PoolFormer": lambda: hf_as_is("PoolFormerConfig"),
    "PvtV2": lambda: hf("PvtV2Config", images={"image_size": 64}, hidden_size=None),
    "GLPN": lambda: hf("GLPNConfig", images=None),
    "EfficientFormer": lambda: hf_as_is("EfficientFormerConfig"),
    "Donut swin": lambda: hf_as_is("DonutSwinConfig"),
    "MobileViTV2": lambda: hf("MobileViTV2Config", images=None),
    "CLIPTextWithProjection": lambda: hf("CLIPTextConfig", "CLIPTextModelWithProjection", inputs="text"),
    "XLMRoberta": lambda: hf("XLMRobertaConfig", inputs="padded"),
    "Camembert": lambda: hf("CamembertConfig", inputs="padded"),
    "BertGeneration": lambda: hf("BertGenerationConfig", "BertGenerationEncoder", inputs="padded"),
    "Ernie": lambda: hf("ErnieConfig", inputs="padded"),
    "NomicBert": lambda: hf("NomicBertConfig", inputs="padded"),
    "RoFormer": lambda: hf("RoFormerConfig", inputs="padded"),
    "Deberta": lambda: hf("DebertaConfig", inputs="padded"),
    "DebertaV2 relative": lambda: hf(
        "DebertaV2Config",
        inputs="padded",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=32,
    ),
    "UMT5Encoder": lambda: hf("UMT5Config", "UMT5EncoderModel", inputs="padded"),
    "MT5Encoder": lambda: hf("MT5Config", "MT5EncoderModel", inputs="padded"),
    "Pegasus": lambda: hf("PegasusConfig", inputs="text"),
    "Marian": lambda: hf("MarianConfig", inputs="text", decoder_start_token_id=0, eos_token_id=1),
    "MBart": lambda: hf("MBartConfig", inputs="text"),
    "Nystromformer": lambda: hf("NystromformerConfig", inputs="text"),
    "BigBird": lambda: hf("BigBirdConfig", inputs="text", attention_type="original_full"),
    "Mistral": lambda: hf("MistralConfig", inputs="text"),
    "Qwen2": lambda: hf("Qwen2Config", inputs="text"),
    "GPTNeoX": lambda: hf("GPTNeoXConfig", inputs="text"),
    "Mamba": lambda: hf("MambaConfig", inputs="text"),
    "SEW": lambda: hf("SEWConfig", inputs="wave"),
    "UniSpeech": lambda: hf("UniSpeechConfig", inputs="wave"),
    "UniSpeechSat": lambda: hf("UniSpeechSatConfig", inputs="wave"),
    "Wav2Vec2Conformer": lambda: hf("Wav2Vec2ConformerConfig", inputs="wave"),
    "ASTForAudioClassification": lambda: hf(
        "ASTConfig", "ASTForAudioClassification", inputs="spectrogram", images={"patch_size": 16}, max_length=64
    ),
    "LayoutLMv3": lambda: hf(
        "LayoutLMv3Config", inputs="text+image+boxes", images={"input_size": 64, "patch_size": 16}
    ),
    "Flava": lambda: hf("FlavaConfig", inputs="text+image"),
    "Blip": lambda: hf("BlipConfig", inputs="text+image"),
    "Qwen3VL vision": lambda: packed("qwen3_vl", "Qwen3VLVision"),
    "Glm4v vision": lambda: packed("glm4v", "Glm4vVision"),
}


def siglip2():
    import transformers

    config = shrink(transformers.Siglip2VisionConfig(), patch_size=16, num_patches=16)
    inputs = dict(
        pixel_values=torch.randn(2, 16, 3 * 16 * 16),
        pixel_attention_mask=torch.ones(2, 16, dtype=torch.long),
        spatial_shapes=torch.tensor([[4, 4], [4, 4]]),
    )
    return transformers.Siglip2VisionModel(config), (), inputs


def packed(module: str, prefix: str, **extra):
    """The vision tower of a model that packs images of several sizes into one sequence."""
    import importlib

    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    pattern = (
        prefix.replace("_VLVision", "_(VL)?Vision").replace("VLVision", "(VL)?Vision")
        + "(Model|Transformer|TransformerPretrainedModel)$"
    )
    name = next(n for n in vars(modeling) if re.match(pattern, n))
    config = shrink(getattr(configuration, f"{prefix}Config")(), patch_size=4, **extra)
    channels = getattr(config, "in_channels", None) or getattr(config, "in_chans", 3)
    merge = config.spatial_merge_size
    grid = torch.tensor([[1, 4 * merge, 4 * merge], [1, 2 * merge, 4 * merge]])
    inputs = torch.randn(24 * merge**2, channels * config.temporal_patch_size * 16)
    return getattr(modeling, name)(config), (inputs, grid), {}


def whisper():
    import transformers
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = shrink(transformers.WhisperConfig())
    return WhisperEncoder(config), (), {"input_features": torch.randn(2, config.num_mel_bins, 100)}


def llava():
    import transformers

    vision = shrink(transformers.CLIPVisionConfig(), **SMALL_IMAGES)
    text = shrink(transformers.LlamaConfig())
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=119)
    words = torch.randint(5, 100, (2, 24))
    words[:, 2:18] = 119
    return (
        transformers.LlavaForConditionalGeneration(config),
        (),
        {"input_ids": words, "pixel_values": torch.randn(2, 3, 64, 64)},
    )


class PlainBlock(nn.Module):
    def __init__(self, d=32, h=4):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.h = h

    def attend(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        return self.proj(((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def forward(self, x):
        x = x + self.attend(self.n1(x))
        return x + self.down(torch.relu(self.up(self.n2(x))))


class PlainModel(nn.Module):
    def __init__(self, block=PlainBlock, depth=4, n=16, d=32):
        super().__init__()
        self.stem = nn.Linear(8, d)
        self.cls_token = nn.Parameter(torch.randn(1, 1, d))
        self.pos = nn.Parameter(torch.randn(1, n + 1, d))
        self.stages = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(d, 5)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), self.stem(x)], 1) + self.pos
        for block in self.stages:
            x = block(x)
        return self.head(x.mean(1))


def encoder(batch_first: bool):
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first)
    x = torch.randn(2, 10, 32) if batch_first else torch.randn(10, 2, 32)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), (x,), {}


def vision(name: str, **extra):
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=5, **extra)
    return model, (torch.randn(2, 3, 224, 224),), {}


def tv_vit():
    from torchvision.models.vision_transformer import VisionTransformer

    return VisionTransformer(64, 16, 4, 4, 32, 64, num_classes=5), (torch.randn(2, 3, 64, 64),), {}


def open_clip(which: str):
    from open_clip.transformer import TextTransformer, VisionTransformer

    if which == "text":
        return (
            TextTransformer(12, 100, 32, 4, 4, output_dim=16),
            (torch.cat([torch.randint(5, 90, (2, 11)), torch.full((2, 1), 99)], 1),),
            {},
        )
    return VisionTransformer(64, 16, 32, 4, 4, 4.0, output_dim=16), (torch.randn(2, 3, 64, 64),), {}


OTHER: dict[str, Callable] = {
    "hand-written": lambda: (PlainModel(), (torch.randn(2, 16, 8),), {}),
    "nn.TransformerEncoder": lambda: encoder(True),
    "nn.TransformerEncoder (N, B, D)": lambda: encoder(False),
    "torchvision vit": tv_vit,
    "torchvision swin_t": lambda: vision("swin_t"),
    "torchvision maxvit_t": lambda: vision("maxvit_t"),
    "open_clip vision": lambda: open_clip("vision"),
    "open_clip text": lambda: open_clip("text"),
}


def zoo(held_out: bool = False) -> dict[str, Callable]:
    found: dict[str, Callable] = {}
    for name, extra in TIMM.items():
        found[f"timm {name}"] = lambda name=name, extra=extra: timm_model(name, **dict(extra))
    found.update({f"transformers {name}": build for name, build in HF.items()})
    found.update(OTHER)
    for name, extra in HELD_OUT_TIMM.items() if held_out else ():
        found[f"timm {name}"] = lambda name=name, extra=extra: timm_model(name, **dict(extra))
    found.update({f"transformers {name}": build for name, build in HELD_OUT.items()} if held_out else {})
    return found


def tensors(out) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out]
    if hasattr(out, "to_tuple"):
        out = out.to_tuple()
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, (tuple, list)):
        return [t for value in out for t in tensors(value)]
    return []


def liven(model: nn.Module) -> nn.Module:
    """Initial weights are so small that attention is uniform and blocks do nothing."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.normal_(std=p.shape[1] ** -0.5)
            elif re.search("gamma|lambda|scale|layer_scale|ls[12]", name):
                p.fill_(0.5)
    return model.eval()


@torch.no_grad()
def attempt(build: Callable) -> tuple[str, str]:
    """(verdict, reason) of one family."""
    torch.manual_seed(0)
    try:
        model, args, kwargs = build()
        liven(model)
        run = lambda: (torch.manual_seed(1), tensors(model(*args, **kwargs)))[1]  # noqa: E731
        plain = run()
    except Exception as error:
        return "not built", f"{type(error).__name__}: {error}".splitlines()[0][:150]
    try:
        tp.patch(model, keep_ratio=0.5)
    except (TypeError, ValueError) as error:
        text = str(error)
        return ("refused" if text.startswith("patch:") else "cryptic"), text
    except Exception as error:
        return "cryptic", f"{type(error).__name__}: {error}".splitlines()[0][:200]
    try:
        ours = run()
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        return "late", f"{type(error).__name__}: {error} ({line.filename}:{line.lineno})".replace("\n", " ")[:300]
    if [t.shape for t in ours] != [t.shape for t in plain]:
        return "wrong", f"shapes {[tuple(t.shape) for t in plain][:4]} became {[tuple(t.shape) for t in ours][:4]}"
    if not all(torch.isfinite(a).all() or not torch.isfinite(b).all() for a, b in zip(ours, plain)):
        return "wrong", "not finite"
    if all(torch.equal(a, b) for a, b in zip(ours, plain)):
        return "wrong", "nothing changed"
    setup = tp.vit.patching.patches(model)[0][1].setup
    tp.patch(model, keep_ratio=1.0)
    if not all(torch.equal(a, b) for a, b in zip(run(), plain)):
        return "wrong", "keeping all tokens changes the output"
    tp.unpatch(model)
    if not all(torch.equal(a, b) for a, b in zip(run(), plain)):
        return "wrong", "unpatch does not give the old output"
    path = tp.vit.finding.find_blocks(model).name
    return "works", f"{path}; prefix {setup.prefix}; {setup.position}; sizes {setup.track_size}"


def versions() -> str:
    import importlib.metadata as metadata

    found = []
    for name in ("torch", "timm", "transformers", "torchvision", "open_clip_torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found.append(f"{name} {metadata.version(name)}")
    return ", ".join(found)


def write(rows: list[tuple[str, str, str]], held_out: set[str]) -> None:
    """docs/models.md and the list that ``tokenpool_ext.supported()`` returns."""
    root = Path(__file__).parents[1]
    built = [row for row in rows if row[1] != "not built"]
    lines = [
        "# Which models `patch` takes",
        "",
        "Made by `python -m tests.model_zoo --held-out --write`: small models with random weights, patched with",
        f"`keep_ratio=0.5`, on a CPU; {versions()}.",
        "",
        "- *works*: runs, outputs finite, as large as before and changed; keeping all tokens and unpatching give the",
        "  old outputs to the bit; blocks commute with permutations of their tokens. Said beside it: the blocks, how",
        "  many tokens in front (prefix) are not pooled, that pooling is after the block, whether sizes are tracked.",
        "- *refused*: by an error of `patch` that names the class. *late*: breaks when it runs. *cryptic*: any other",
        "  error.",
        "- *: first run when all was written. One, UMT5, then broke in its forward, and the probe was mended.",
        "",
        "| | " + " | ".join(VERDICTS) + " |",
        "|---|" + "---|" * len(VERDICTS),
    ]
    for label, chosen in (("all", built), ("of them first run at the end", [r for r in built if r[0] in held_out])):
        lines.append(f"| {label} | " + " | ".join(str(sum(r[1] == v for r in chosen)) for v in VERDICTS) + " |")
    lines += ["", "| family | | blocks, or the reason |", "|---|---|---|"]
    for name, verdict, reason in built:
        text = reason.replace("patch: ", "").replace("|", "/").split("; name one")[0].split(", not as a sequence")[0]
        lines.append(f"| {name}{'*' if name in held_out else ''} | {verdict} | {text[:160]} |")
    document = root / "docs" / "models.md"
    uses = document.read_text().partition("\n## ")  # made by model_uses.py
    document.write_text("\n".join(lines) + "\n" + uses[1] + uses[2])
    listed = [f"# {versions()}; made by python -m tests.model_zoo"] + sorted(r[0] for r in built if r[1] == "works")
    (root / "tokenpool_ext" / "vit" / "supported.txt").write_text("\n".join(listed) + "\n")


VERDICTS = ("works", "refused", "late", "cryptic", "wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="a regular expression of names")
    parser.add_argument("--held-out", action="store_true", help="also the families kept for the end")
    parser.add_argument("--write", action="store_true", help="write docs/models.md and supported.txt")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    rows, known = [], set(zoo())
    for name, build in zoo(options.held_out).items():
        if not re.search(options.only, name):
            continue
        rows.append((name, *attempt(build)))
        print("{1:<10} {0:<42} {2:.230}".format(*rows[-1]), flush=True)
    print({v: sum(row[1] == v for row in rows) for v in (*VERDICTS, "not built")})
    if options.write:
        write(rows, {row[0] for row in rows} - known)


if __name__ == "__main__":
    main()
