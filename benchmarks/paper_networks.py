"""The paper's networks at a quarter of its width, which two CPU cores can train: `--model FILE:NAME`."""

from __future__ import annotations

from torch import nn

from modprune.models import resnet18 as full_resnet18
from modprune.models import vgg11_bn, vgg16_bn

WIDTH = 0.25


def vgg11() -> nn.Module:
    """VGG11 with batch norm."""
    return vgg11_bn(width=WIDTH)


def vgg16() -> nn.Module:
    """VGG16 with batch norm."""
    return vgg16_bn(width=WIDTH)


def resnet18() -> nn.Module:
    """ResNet18 for CIFAR."""
    return full_resnet18(width=WIDTH)
