"""Networks under the names of their public CIFAR checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from modprune.models.resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56, resnet110
from modprune.models.resnet18 import CifarResNet18, resnet18
from modprune.models.vgg import CifarVGG, vgg11_bn, vgg13_bn, vgg16_bn, vgg19_bn

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet18": resnet18,
    "vgg11_bn": vgg11_bn,
    "vgg13_bn": vgg13_bn,
    "vgg16_bn": vgg16_bn,
    "vgg19_bn": vgg19_bn,
}

__all__ = ["MODELS", "CifarResNet", "CifarResNet18", "CifarVGG", *MODELS]
