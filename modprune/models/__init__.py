"""Networks under the names of their public CIFAR checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from modprune.models.resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56, resnet110
from modprune.models.resnet18 import CifarResNet18, resnet18
from modprune.models.vgg import CifarVGG, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn

MODELS: dict[str, Callable[..., nn.Module]] = {
    build.__name__: build
    for build in (
        resnet20, resnet32, resnet44, resnet56, resnet110, resnet18, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn,
    )
}  # fmt: skip

__all__ = [
    "MODELS",
    "CifarResNet",
    "CifarResNet18",
    "CifarVGG",
    "resnet18",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg11_bn",
    "vgg13_bn",
    "vgg16_bn",
    "vgg19_bn",
]
