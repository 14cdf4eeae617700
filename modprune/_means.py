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
        self.pending: list[tuple[Tensor, int]] = []
        self.steps = 0
        self.sums = [0.0, 0.0, 0.0]  # of the losses, of the right answers, of the images

    def add(self, loss: Tensor, right: Tensor, images: int) -> None:
        """A step of this process: its mean loss, and the share of right answers."""
        self.pending.append((torch.stack([loss, right]), images))

    @property
    def due(self) -> bool:
        return len(self.pending) == self.every

    def loss(self) -> float:
        self._read()
        if not self.steps:
            raise ValueError(f"{self.title}: train_loader gives no batch any more: it has to give them every epoch")
        return self.sums[0] / self.sums[2]

    def top1(self) -> float | None:
        """In percent; None without labels."""
        self._read()
        top1 = 100 * self.sums[1] / self.sums[2]
        return top1 if math.isfinite(top1) else None

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"steps": self.steps, "sums": self.sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.sums = state["steps"], state["sums"]

    def _read(self) -> None:
        if not self.pending:
            return
        means, images = zip(*self.pending, strict=True)
        counts = means[0].new_tensor(images)[:, None]
        for loss, right, count in self.accelerator.reduce(torch.cat([torch.stack(means) * counts, counts], 1)).tolist():
            self.steps += 1
            if not math.isfinite(loss):
                raise Diverged(f"{self.title}, step {self.steps}: the loss is {loss / count}; try a lower lr")
            self.sums = [total + more for total, more in zip(self.sums, (loss, right, count), strict=True)]
        self.pending.clear()


def share_right(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The share of (B,) labels that logits (B, classes) get right; NaN without such labels."""
    if labels is None or labels.shape != logits.shape[:1] or logits.ndim != 2:
        return torch.full((), math.nan, device=logits.device)
    return (logits.argmax(1) == labels).float().mean()
