"""What comes after a cut in the studies of cuts: batch-norm statistics measured anew, or fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from modprune._inputs import ONCE, call, device_of, split_batch, to_device
from modprune.data import set_epoch
from modprune.finetune import finetune
from modprune.plan import PruningPlan

BATCHES = 20


def cut(model: nn.Module, remove: Sequence[str], example_inputs: Any) -> nn.Module:
    """A copy of `model` without these blocks."""
    return PruningPlan(tuple(remove)).apply(copy.deepcopy(model), example_inputs)


def has_statistics(model: nn.Module) -> bool:
    """Whether there is a batch norm whose statistics can be measured anew."""
    return any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules())


def recover(pruned: nn.Module, loader: Iterable[Any], teacher: nn.Module, epochs: int, lr: float) -> None:
    """Fine-tune on `loader` with `teacher`, or for 0 epochs measure the batch-norm statistics on 20 batches of it.

    Raises:
        ValueError: if it gives no batch.
    """
    if epochs:
        # A whole epoch of rising rate, as long trainings have it, would be all of a short one.
        finetune(pruned, loader, teacher=teacher, epochs=epochs, lr=lr, warmup=min(1.0, epochs / 10))
        return
    set_epoch(loader, 0)  # the same images after every cut
    device = device_of(pruned)
    batches = [to_device(split_batch(batch)[0], device) for batch in islice(loader, BATCHES)]
    if not batches:  # the old statistics would be gone, with nothing in their place
        raise ValueError(f"the training loader gives no batch{ONCE}")
    with torch.no_grad():
        update_bn([(inputs,) for inputs in batches], _Spread(pruned))


class _Spread(nn.Module):
    """Calls a model with inputs of any form, which `update_bn` does not."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Any) -> Any:
        return call(self.model, inputs)
