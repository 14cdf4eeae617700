"""The constants of a training run, and the schedule of its rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Recipe:
    """Constants of a training run.

    Attributes:
        epochs: passes over the data.
        lr: peak rate; rises linearly over `warmup` epochs, then falls to zero along a cosine.
        momentum, weight_decay: of SGD; the momentum is Nesterov's.
        warmup: in epochs; at most half of them.
        distill: weight of the teacher's term in the loss, from 0 to 1.
        temperature: T of the teacher's term.
    """

    epochs: int = 40
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 1.0
    distill: float = 0.9
    temperature: float = 4.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not isinstance(value, Real):
                raise ValueError(f"{name}={value!r}: a number is needed")
        at_least_zero = {"lr": self.lr, "weight_decay": self.weight_decay, "warmup": self.warmup}
        for name, value in at_least_zero.items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}={value}: a finite number, at least 0, is needed")
        if not isinstance(self.epochs, Integral) or self.epochs < 1:
            raise ValueError(f"epochs={self.epochs}: a whole number, at least 1, is needed")
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill={self.distill}: a weight from 0 to 1 is needed")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: a number from 0 up to, not including, 1 is needed")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature={self.temperature}: a finite number above 0 is needed")
        for name, value in vars(self).items():  # numpy's numbers are none that a state can be read back with
            object.__setattr__(self, name, int(value) if name == "epochs" else float(value))


def warmup_cosine(step: int, warmup: float, total: int) -> float:
    """Factor of the peak rate at a step: linear up to 1 at `warmup`, at most half of `total`, then a cosine to 0."""
    warmup = min(warmup, total / 2)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))
