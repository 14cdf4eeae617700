"""Loss and Top-1 of an epoch while it runs, and the end of a run whose loss is no number."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor


class Diverged(RuntimeError):
    """The loss is no finite number."""


class Means:
    """Loss and Top-1 of an epoch so far: means over the images of all processes.

    Read in one go now and then: each read stalls a device.
    """

    every = 25

    def __init__(self, title: str, accelerator: Accelerator) -> None:
        self.title, self.accelerator = title, accelerator
        self.pending: list[Tensor] = []
        self.steps: list[list[float]] = []  # of each: sum of the losses, number of right answers, number of images

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        """A step of this process: its mean loss, and the share of right answers."""
        self.pending.append(torch.stack([loss, right, torch.ones_like(loss)]) * images)

    @property
    def due(self) -> bool:
        return len(self.pending) == self.every

    def loss(self) -> float:
        self._read()
        if not self.steps:
            raise ValueError(f"{self.title}: train_loader gives no batch any more: it has to give them every epoch")
        losses, _, images = map(math.fsum, zip(*self.steps, strict=True))
        return losses / images

    def top1(self) -> float | None:
        """In percent; None without labels."""
        self._read()
        _, right, images = map(math.fsum, zip(*self.steps, strict=True))
        return 100 * right / images if math.isfinite(right) else None

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]

    def _read(self) -> None:
        new = self.accelerator.reduce(torch.stack(self.pending)).tolist() if self.pending else []
        for step in new:
            loss, _, images = step
            if not math.isfinite(loss):
                number = len(self.steps) + 1
                raise Diverged(f"{self.title}, step {number}: the loss is {loss / images}; try a lower lr")
            self.steps.append(step)
        self.pending.clear()


def share_right(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The share of (B,) labels that logits (B, classes) get right; NaN without such labels."""
    if labels is None or labels.shape != logits.shape[:1] or logits.ndim != 2:
        return torch.full((), math.nan, device=logits.device)
    return (logits.argmax(1) == labels).float().mean()
