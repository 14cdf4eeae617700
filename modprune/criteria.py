"""What is lost if a block goes: a score per block, by name or by a callable of one's own.

A criterion is a callable `(model, blocks, loader) -> BlockScores`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from modprune.blocks import Blocks
from modprune.curve import ModularityCurve, modularity_curve
from modprune.features import pairs


@dataclass(frozen=True)
class BlockScores:
    """Scores of blocks.

    Attributes:
        names: of the blocks.
        values: (repeats, blocks) float64; higher means more is lost if the block goes.
        curve: the curve that they were read off, if they were.
    """

    names: tuple[str, ...]
    values: np.ndarray
    curve: ModularityCurve | None = None

    @property
    def mean(self) -> dict[str, float]:
        """Mean score over the repeats by name."""
        return dict(zip(self.names, self.values.mean(0).tolist(), strict=True))


Criterion = Callable[[nn.Module, Blocks, Iterable[Any]], BlockScores]


def modularity(model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
    """The gain of each block: Q after it minus Q before it (Lu et al., ECCV 2022, section 5), with its defaults."""
    curve = modularity_curve(model, loader, blocks=blocks)
    return BlockScores(blocks.names, np.diff(curve.q, axis=1), curve)


def block_influence(model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
    """1 - cosine of what goes into a block and what comes out, over 500 samples; needs no labels.

    Each sample is flattened; a repeat is a batch. Blocks that change the shape have nothing to compare and score 1.
    Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect" (2024), section 3.
    """
    return BlockScores(blocks.names, np.array(pairs(model, blocks.names, loader, 500, _turned)))


def _turned(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return 1.0
    return 1 - float(F.cosine_similarity(x.flatten(1).double(), y.flatten(1).double()).mean())


CRITERIA: dict[str, Criterion] = {"modularity": modularity, "block_influence": block_influence}


def resolve(criterion: str | Criterion) -> Criterion:
    """The criterion of that name; a callable is its own.

    >>> resolve("magic")
    Traceback (most recent call last):
    ValueError: criterion 'magic' is unknown: give one of modularity, block_influence, or a callable
    """
    if callable(criterion):
        return criterion
    if criterion not in CRITERIA:
        raise ValueError(f"criterion {criterion!r} is unknown: give one of {', '.join(CRITERIA)}, or a callable")
    return CRITERIA[criterion]
