"""Networks under the names of their public CIFAR checkpoints."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from modprune.models.resnet import CifarResNet, resnet20, resnet32, resnet44, resnet56, resnet110

MODELS: dict[str, Callable[..., nn.Module]] = {
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
}

__all__ = ["MODELS", "CifarResNet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
