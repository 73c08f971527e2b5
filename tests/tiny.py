"""A whole LTX-2 pipeline, a few megabytes in all, made of random weights: built here, without a network.

Every part is diffusers' and transformers' own class, with the sizes turned down: transformer, video VAE, audio VAE,
vocoder, connectors, a Gemma 3 text encoder, and a tokenizer trained on the sentences below.
"""

from __future__ import annotations

from pathlib import Path

import torch

LAYERS = 2
CALL = {"num_inference_steps": 2, "width": 64, "height": 64, "num_frames": 9, "max_sequence_length": 8}
"""The smallest call that has everything: 8 video tokens, 9 audio tokens, 8 of text."""

UNGUIDED = {"guidance_scale": 1.0, "stg_scale": 0.0, "modality_scale": 1.0}
UNGUIDED |= {f"audio_{name}": value for name, value in UNGUIDED.items()}
"""One forward of the transformer at each step, of one sample."""

_SENTENCES = ["a red fox runs through fresh snow at dawn", "waves break on black rocks, gulls cry", "worst quality"]
_CHANNELS = 16  # of video and audio latents


def pipeline(layers: int = LAYERS, seed: int = 0):
    """A diffusers LTX2Pipeline in bf16 on the CPU; the same weights for the same seed."""
    import diffusers
    import transformers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _tokenizer()
        text_encoder = _text_encoder(transformers, len(tokenizer))
        width = text_encoder.config.text_config.hidden_size
        parts = {
            "transformer": diffusers.LTX2VideoTransformer3DModel(
                in_channels=_CHANNELS,
                out_channels=_CHANNELS,
                num_attention_heads=4,
                attention_head_dim=32,
                cross_attention_dim=128,
                audio_in_channels=_CHANNELS,
                audio_out_channels=_CHANNELS,
                audio_num_attention_heads=4,
                audio_attention_head_dim=32,
                audio_cross_attention_dim=128,
                caption_channels=width,
                num_layers=layers,
                rope_type="split",
            ),
            "connectors": LTX2TextConnectors(
                caption_channels=width,
                text_proj_in_factor=text_encoder.config.text_config.num_hidden_layers + 1,
                video_connector_num_attention_heads=2,
                video_connector_attention_head_dim=width // 2,
                video_connector_num_layers=1,
                video_connector_num_learnable_registers=4,
                audio_connector_num_attention_heads=2,
                audio_connector_attention_head_dim=width // 2,
                audio_connector_num_layers=1,
                audio_connector_num_learnable_registers=4,
                connector_rope_base_seq_len=4096,  # these four have defaults from diffusers 0.38 on
                rope_theta=10000.0,
                rope_double_precision=True,
                causal_temporal_positioning=False,
                rope_type="split",
            ),
            "vae": diffusers.AutoencoderKLLTX2Video(
                latent_channels=_CHANNELS,
                block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 16, 32),
                layers_per_block=(1, 1, 1, 1, 1),
                decoder_layers_per_block=(1, 1, 1, 1),
                spatial_compression_ratio=32,
                temporal_compression_ratio=8,
            ),
            "audio_vae": diffusers.AutoencoderKLLTX2Audio(
                base_channels=_CHANNELS, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=8, mel_bins=8
            ),
            "vocoder": LTX2Vocoder(
                in_channels=2 * 8,  # stereo, mel bins
                hidden_channels=16,
                upsample_kernel_sizes=[16, 15, 8],
                upsample_factors=[6, 5, 8],  # 240 samples for a column of the mel spectrogram, as the real one
                resnet_kernel_sizes=[3],
                resnet_dilations=[[1]],
            ),
        }
        for part in parts.values():
            for parameter in part.parameters():  # norms and tables start as ones and zeros, which hide much
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    parts = {name: part.to(torch.bfloat16).eval() for name, part in parts.items()}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1)
    return diffusers.LTX2Pipeline(
        scheduler=scheduler, tokenizer=tokenizer, text_encoder=text_encoder.to(torch.bfloat16).eval(), **parts
    )


def save(folder: Path, layers: int = LAYERS) -> Path:
    """The pipeline in a folder, as `save_pretrained` writes it."""
    pipeline(layers).save_pretrained(folder)
    return folder


def _tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.train_from_iterator(_SENTENCES, trainers.BpeTrainer(vocab_size=96, special_tokens=list(special.values())))
    return PreTrainedTokenizerFast(tokenizer_object=trained, model_max_length=8, padding_side="left", **special)


def _text_encoder(transformers, vocabulary: int):
    text = transformers.Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        query_pre_attn_scalar=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return transformers.Gemma3ForConditionalGeneration(config)
