"""ResNet18 for 32x32 images: ImageNet's four stages behind a 3x3 stem, with projection shortcuts.

He et al., "Deep Residual Learning for Image Recognition" (CVPR 2016), as CIFAR work commonly has it.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modprune.models.resnet import BasicBlock


class ProjectionBlock(BasicBlock):
    """A `BasicBlock` whose shortcut is a 1x1 convolution with batch norm where the shape changes (option B)."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__(in_planes, planes, stride)
        if stride > 1:
            projection = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(planes))


class CifarResNet18(nn.Module):
    """Two blocks in each of four stages, global average pooling, one linear layer.

    Args:
        num_classes: size of the output.
        width: factor of all channels, 64 to 512.
    """

    def __init__(self, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        self._made_with = {"width": float(width)}
        planes = [int(n * width) for n in (64, 128, 256, 512)]
        self.conv1 = nn.Conv2d(3, planes[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.layer1 = _stage(planes[0], planes[0], stride=1)
        self.layer2 = _stage(planes[0], planes[1], stride=2)
        self.layer3 = _stage(planes[1], planes[2], stride=2)
        self.layer4 = _stage(planes[2], planes[3], stride=2)
        self.linear = nn.Linear(planes[3], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the constructor that make this network anew, unpruned, but for the size of another head."""
        return {**self._made_with, "num_classes": int(self.linear.out_features)}

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) images -> (N, num_classes) logits."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer4(self.layer3(self.layer2(self.layer1(out))))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _stage(in_planes: int, planes: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ProjectionBlock(in_planes, planes, stride), ProjectionBlock(planes, planes, 1))


def resnet18(num_classes: int = 10, width: float = 1.0) -> CifarResNet18:
    """ResNet18 for CIFAR: 11,173,962 parameters at full width."""
    return CifarResNet18(num_classes, width)
