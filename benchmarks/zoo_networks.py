"""Small transformers, built from their configs, with inputs that fit: part of what `benchmarks.zoo` measures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_TEXT = {**_SIZES, "vocab_size": 100}
_DECODER = {**_TEXT, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 2, "vocab_size": 100, "use_cache": False}
_IMAGE: dict[str, Any] = {**_SIZES, "image_size": 32, "patch_size": 8}
_PYRAMID = {"hidden_sizes": [16, 32], "depths": [2, 3]}
_SWIN: dict[str, Any] = {
    **{"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2]},
    "window_size": 4,
}
_SPEECH = {
    **_SIZES,
    **{"conv_dim": (16, 16), "conv_stride": (5, 4), "conv_kernel": (10, 8), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
}
_SEQ2SEQ = {
    **{"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 100},
    **{"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_layers": 3, "decoder_layers": 2},
}
_WHISPER = {
    **_SEQ2SEQ,
    **{"num_mel_bins": 8, "max_source_positions": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"decoder_start_token_id": 1},
}


def _tokens() -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(0))
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def _images(size: int = 32) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}


def _sound(shape: tuple[int, ...], name: str = "input_values") -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _auto(kind: str, sizes: dict[str, Any], of: str = "AutoModel") -> Any:
    return getattr(transformers, of).from_config(transformers.AutoConfig.for_model(kind, **sizes))


Network = tuple[Callable[[], Any], Any]

# Name -> how to build it, and inputs.
NETWORKS: dict[str, Network] = {
    "vit": (lambda: _auto("vit", _IMAGE, "AutoModelForImageClassification"), _images()),
    "deit": (lambda: _auto("deit", _IMAGE), _images()),
    "beit": (lambda: _auto("beit", _IMAGE), _images()),
    "dinov2": (lambda: _auto("dinov2", _IMAGE), _images()),
    "swin": (lambda: _auto("swin", _SWIN), _images()),
    "convnext": (lambda: _auto("convnext", {**_PYRAMID, "num_stages": 2}), _images()),
    "resnet": (lambda: _auto("resnet", {**_PYRAMID, "embedding_size": 16, "layer_type": "basic"}), _images()),
    "regnet": (lambda: _auto("regnet", {**_PYRAMID, "embedding_size": 16, "groups_width": 8}), _images()),
    "poolformer": (
        lambda: _auto(
            "poolformer",
            {**_PYRAMID, "num_encoder_blocks": 2, "patch_sizes": [7, 3], "strides": [4, 2], "padding": [2, 1]},
        ),
        _images(),
    ),
    "clip_vision": (
        lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**_IMAGE)),
        _images(),
    ),
    "bert": (lambda: _auto("bert", _TEXT, "AutoModelForSequenceClassification"), _tokens()),
    "roberta": (lambda: _auto("roberta", _TEXT), _tokens()),
    "distilbert": (
        lambda: _auto("distilbert", {"vocab_size": 100, "dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}),
        _tokens(),
    ),
    "albert": (lambda: _auto("albert", {**_TEXT, "embedding_size": 16}), _tokens()),
    "gpt2": (lambda: _auto("gpt2", _GPT2), _tokens()),
    "llama": (lambda: _auto("llama", _DECODER | {"use_cache": False}, "AutoModelForCausalLM"), _tokens()),
    "qwen2": (lambda: _auto("qwen2", _DECODER), _tokens()),  # gives its cache back, as it comes
    "gemma2": (lambda: _auto("gemma2", _DECODER | {"use_cache": False, "head_dim": 16}), _tokens()),
    "t5_encoder": (
        lambda: transformers.T5EncoderModel(
            transformers.T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, vocab_size=100)
        ),
        _tokens(),
    ),
    "bart": (lambda: _auto("bart", _SEQ2SEQ | {"use_cache": False, "max_position_embeddings": 64}), _tokens()),
    "whisper_encoder": (
        lambda: _auto("whisper", _WHISPER).encoder,
        _sound((2, 8, 100), "input_features"),
    ),
    "wav2vec2": (lambda: _auto("wav2vec2", _SPEECH), _sound((2, 2000))),
    "wav2vec2_stable": (
        lambda: _auto("wav2vec2", {**_SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
        _sound((2, 2000)),
    ),
}
