"""Accelerate as a guest finds it: what other Accelerators of the process have settled stays theirs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState, is_initialized
from accelerate.utils import GradientAccumulationPlugin
from torch import nn

from modprune._processes import meet, place


@contextmanager
def accelerate_left_as_found() -> Iterator[None]:
    """Device, precision and accumulation are shared by all Accelerators of a process: ours bind nobody else's.

    Nor is somebody's accumulation to bind ours, in the middle of which no optimizer takes a step.
    """
    placed, settled = bool(PartialState._shared_state), is_initialized()
    accumulation = dict(GradientState._shared_state)
    GradientState._reset_state()
    try:
        yield
    finally:
        GradientState._reset_state()
        GradientState._shared_state.update(accumulation)
        if not settled:
            AcceleratorState._reset_state(reset_partial_state=not placed)


def accelerator_for(device: torch.device, precision: str) -> Accelerator:
    """In this precision, "bf16" or "no", unless somebody's Accelerator in this process has settled it before."""
    meet(device)
    each_step = GradientAccumulationPlugin(num_steps=1)  # whatever somebody's environment says of accumulation
    made = Accelerator(
        mixed_precision=None if is_initialized() else precision, cpu=device.type == "cpu", device_placement=False,
        gradient_accumulation_plugin=each_step,
    )  # fmt: skip
    if made.num_processes != place()[1]:
        raise RuntimeError(
            f"torch.distributed has {place()[1]} processes and accelerate sees {made.num_processes}: start with "
            "torchrun or accelerate launch, or set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT before"
        )
    return made


def prepared(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
    """The network and the optimizer that a step goes through, as accelerate has them.

    The model itself stays as it was. Without the casts that accelerate puts around `forward`, what is measured between
    the steps is measured in the model's own precision (a step casts by itself); without accelerate's mark, somebody's
    own Accelerator does not take it for prepared later.
    """
    parts = {model, getattr(model, "_orig_mod", model)}  # of a model that torch.compile has wrapped
    found = {part: dict(vars(part)) for part in parts}
    net, optimizer = accelerator.prepare(model, optimizer)
    for part, own in found.items():
        vars(part).clear()
        vars(part).update(own)
    return net, optimizer
