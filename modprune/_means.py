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
    """Loss and share of right answers, step by step, each the mean over the processes.

    Read in one go now and then: each read stalls a device.
    """

    every = 25

    def __init__(self, title: str, accelerator: Accelerator) -> None:
        self.title, self.accelerator = title, accelerator
        self.pending: list[Tensor] = []
        self.losses: list[float] = []
        self.right: list[float] = []

    def add(self, loss: Tensor, right: Tensor) -> None:
        self.pending.append(torch.stack([loss, right]))

    @property
    def due(self) -> bool:
        return len(self.pending) == self.every

    def loss(self) -> float:
        self._read()
        if not self.losses:
            raise ValueError(f"{self.title}: train_loader gives no batch any more: it has to give them every epoch")
        return math.fsum(self.losses) / len(self.losses)

    def top1(self) -> float | None:
        """In percent; None without labels."""
        self._read()
        mean = 100 * math.fsum(self.right) / len(self.right)
        return mean if math.isfinite(mean) else None

    def state_dict(self) -> dict[str, Any]:
        self._read()
        return {"losses": self.losses, "right": self.right}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.losses, self.right = state["losses"], state["right"]

    def _read(self) -> None:
        new = self.accelerator.reduce(torch.stack(self.pending), "mean").tolist() if self.pending else []
        for step, (loss, right) in enumerate(new, len(self.losses) + 1):
            if not math.isfinite(loss):
                raise Diverged(f"{self.title}, step {step}: the loss is {loss}; try a lower lr")
            self.losses.append(loss)
            self.right.append(right)
        self.pending.clear()


def share_right(logits: Tensor, labels: Tensor | None) -> Tensor:
    """The share of (B,) labels that logits (B, classes) get right; NaN without such labels."""
    if labels is None or labels.shape != logits.shape[:1] or logits.ndim != 2:
        return torch.full((), math.nan, device=logits.device)
    return (logits.argmax(1) == labels).float().mean()
