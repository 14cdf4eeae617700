"""Networks under the names of their public CIFAR checkpoints."""

from modprune.models.resnet import resnet20, resnet32, resnet44, resnet56, resnet110

__all__ = ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
