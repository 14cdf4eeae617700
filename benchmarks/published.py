"""ResNet56 on CIFAR-10 as others have published it: the points that ours stand beside."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """A pruned network: what goes (`kind`: "blocks" or "channels"), Top-1 before and after, percent removed."""

    method: str
    kind: str
    base: float
    top1: float
    macs: float
    params: float | None = None


def _speed_up(factor: float) -> float:
    """Percent of the MACs removed, from how many times fewer are left."""
    return 100 * (1 - 1 / factor)


LU = Point("Lu et al., graph modularity", "blocks", 93.27, 93.38, 60.30, 43.00)
# The rows of Lu et al., ECCV 2022, on their base of 93.27 %.
LAYERS = (
    Point("Chen et al., Shallowing Deep Networks", "blocks", 93.27, 93.29, 34.80, 42.30),
    Point("DBP-0.5", "blocks", 93.27, 93.39, 53.41),
    LU,
)
# Fang et al., CVPR 2023, and the rows they compare with. Their network has projection shortcuts.
CHANNELS = (
    Point("DepGraph, sparse learning", "channels", 93.53, 93.77, _speed_up(2.13)),
    Point("DepGraph, sparse learning", "channels", 93.53, 93.64, _speed_up(2.57)),
    Point("DepGraph", "channels", 93.53, 93.46, _speed_up(2.11)),
    Point("DepGraph", "channels", 93.53, 93.36, _speed_up(2.51)),
    Point("GReg-2", "channels", 93.36, 93.36, _speed_up(2.55)),
    Point("C-SGD", "channels", 93.39, 93.44, _speed_up(2.55)),
    Point("ResRep", "channels", 93.71, 93.71, _speed_up(2.12)),
)
