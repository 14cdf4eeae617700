"""Finding the blocks of networks of their usual sizes, against forward passes and torch-pruning's dependency graph.

    python -m benchmarks.find_speed

One network a family, random weights, one sample.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn

from benchmarks._env import write_result
from benchmarks.zoo import times
from modprune.specs import build_model

IMAGES = {
    "torchvision": (
        *(
            "resnet50",
            "resnext50_32x4d",
            "regnet_y_800mf",
            "mobilenet_v3_large",
            "efficientnet_b0",
            "efficientnet_v2_s",
        ),
        *("convnext_tiny", "vit_b_16", "swin_t", "swin_v2_t", "maxvit_t", "vgg16_bn", "inception_v3", "densenet121"),
    ),
    "timm": (
        *("resnetv2_50", "resnest26d", "darknet53", "ghostnet_100", "mixer_s16_224", "poolformer_s12"),
        *("xcit_nano_12_p16_224", "edgenext_small", "levit_128", "volo_d1_224", "cait_xxs24_224"),
    ),
}
TOKENS = torch.arange(128)[None]
# Sizes of the configs' own defaults but for the decoder, whose default has billions of parameters.
OTHERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "transformers:bert": (lambda: transformers.BertModel(transformers.BertConfig()), TOKENS),
    "transformers:whisper (encoder)": (
        lambda: transformers.WhisperModel(transformers.WhisperConfig()).encoder,
        torch.randn(1, 80, 3000),
    ),
    "transformers:wav2vec2": (
        lambda: transformers.Wav2Vec2Model(transformers.Wav2Vec2Config()),
        torch.randn(1, 16000),
    ),
    "transformers:llama": (
        lambda: transformers.LlamaModel(
            transformers.LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, vocab_size=8000)
        ),
        TOKENS,
    ),
}


def main() -> None:
    """Measure, and write benchmarks/results/find-speed.json."""
    networks, rows = dict(OTHERS), []
    for spec in [f"{library}:{name}" for library, names in IMAGES.items() for name in names]:
        size = 299 if spec.endswith("inception_v3") else 224
        networks[spec] = partial(build_model, spec), torch.randn(1, 3, size, size)
    for name, (build, inputs) in networks.items():
        torch.manual_seed(0)
        rows.append({"network": name, **times(build().eval(), inputs)})
        print(rows[-1], flush=True)
    print(write_result("find-speed", {"command": "python -m benchmarks.find_speed", "networks": rows}))


if __name__ == "__main__":
    main()
