"""VGGs with batch norm for 32x32 images (Simonyan and Zisserman, ICLR 2015), with three linear layers of 512.

Names and shapes are those of the public CIFAR checkpoints: `features.0` ..., `classifier.0`, `.3`, `.6`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

POOL = 0
STAGES = {
    11: (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    13: (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL),
    16: (64, 64, POOL, 128, 128, POOL, *(256,) * 3, POOL, *(512,) * 3, POOL, *(512,) * 3, POOL),
    19: (64, 64, POOL, 128, 128, POOL, *(256,) * 4, POOL, *(512,) * 4, POOL, *(512,) * 4, POOL),
}


class CifarVGG(nn.Module):
    """Convolutions of 3x3 with batch norm and ReLU, halved five times, then three linear layers.

    Args:
        depth: 11, 13, 16 or 19 weight layers.
        num_classes: size of the output.
        width: factor of all channels: 0.25 is a quarter of the paper's.

    Raises:
        ValueError: for another depth.
    """

    def __init__(self, depth: int, num_classes: int = 10, width: float = 1.0) -> None:
        super().__init__()
        if depth not in STAGES:
            raise ValueError(f"depth={depth}: one of {', '.join(map(str, STAGES))} is needed")
        self._made_with = {"depth": int(depth), "width": float(width)}
        layers: list[nn.Module] = []
        channels, last = 3, int(512 * width)
        for planes in STAGES[depth]:
            if planes == POOL:
                layers.append(nn.MaxPool2d(2))
                continue
            out = int(planes * width)
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
            channels = out
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(
            *(nn.Linear(last, last), nn.ReLU(inplace=True), nn.Dropout()),
            *(nn.Linear(last, last), nn.ReLU(inplace=True), nn.Dropout()),
            nn.Linear(last, num_classes),
        )
        for module in self.features:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of the constructor that make this network anew, unpruned, but for the size of another head."""
        return {**self._made_with, "num_classes": int(self.classifier[-1].out_features)}  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) images -> (N, num_classes) logits."""
        return self.classifier(self.features(x).flatten(1))


def vgg11_bn(num_classes: int = 10, width: float = 1.0) -> CifarVGG:
    """VGG11: 9,756,426 parameters at full width."""
    return CifarVGG(11, num_classes, width)


def vgg13_bn(num_classes: int = 10, width: float = 1.0) -> CifarVGG:
    """VGG13: 9,941,322 parameters at full width."""
    return CifarVGG(13, num_classes, width)


def vgg16_bn(num_classes: int = 10, width: float = 1.0) -> CifarVGG:
    """VGG16: 15,253,578 parameters at full width."""
    return CifarVGG(16, num_classes, width)


def vgg19_bn(num_classes: int = 10, width: float = 1.0) -> CifarVGG:
    """VGG19: 20,565,834 parameters at full width."""
    return CifarVGG(19, num_classes, width)
