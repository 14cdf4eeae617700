"""ResNets for 32x32 images (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2).

Names and shapes are those of the public CIFAR checkpoints: `conv1`, `bn1`, `layer1.0.conv1` ... `linear`, with
padded shortcuts without parameters (option A of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


class PadShortcut(nn.Module):
    """Option A: every second pixel in both directions, the new channels zero, half of them on either side.

    Args:
        channels: how many zero channels to add; even.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.border = channels // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + channels, ceil(H / 2), ceil(W / 2))."""
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.border, self.border))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm beside a shortcut, ReLU after the sum."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = PadShortcut(planes - in_planes) if stride > 1 else nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_planes, H, W) -> (N, planes, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A stem of 16 channels, three stages of 16, 32 and 64 channels, global average pooling, one linear layer.

    Args:
        blocks: number of blocks in each of the three stages, at least 1, as in `(3, 3, 3)`.
        num_classes: size of the output.
        in_channels: channels of the input: 3 for CIFAR, 1 for grey images.
    """

    def __init__(self, blocks: Sequence[int], num_classes: int = 10, in_channels: int = 3) -> None:
        super().__init__()
        self._made_with = {"blocks": [int(count) for count in blocks], "in_channels": int(in_channels)}
        self.conv1 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks[0], stride=1)
        self.layer2 = _stage(16, 32, blocks[1], stride=2)
        self.layer3 = _stage(32, 64, blocks[2], stride=2)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the constructor that make this network anew, unpruned, but for the size of another head."""
        return {**self._made_with, "num_classes": int(self.linear.out_features)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) images -> (N, num_classes) logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(in_planes: int, planes: int, count: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_planes, planes, stride)
    return nn.Sequential(first, *(BasicBlock(planes, planes, 1) for _ in range(count - 1)))


def resnet20(num_classes: int = 10) -> CifarResNet:
    """ResNet20: three blocks a stage, 269,722 parameters."""
    return CifarResNet((3, 3, 3), num_classes)


def resnet32(num_classes: int = 10) -> CifarResNet:
    """ResNet32: five blocks a stage, 464,154 parameters."""
    return CifarResNet((5, 5, 5), num_classes)


def resnet44(num_classes: int = 10) -> CifarResNet:
    """ResNet44: seven blocks a stage, 658,586 parameters."""
    return CifarResNet((7, 7, 7), num_classes)


def resnet56(num_classes: int = 10) -> CifarResNet:
    """ResNet56: nine blocks a stage, 853,018 parameters."""
    return CifarResNet((9, 9, 9), num_classes)


def resnet110(num_classes: int = 10) -> CifarResNet:
    """ResNet110: eighteen blocks a stage, 1,727,962 parameters."""
    return CifarResNet((18, 18, 18), num_classes)
