"""How inputs travel: example inputs, batches and the calls that take them.

`example_inputs` is a tensor, a tuple (or list) of positional arguments, or a dict of keyword arguments, as in
torch-pruning. A batch is `(inputs, labels, ...)` or a dict that holds `labels`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`, with a tuple spread over positional and a dict over keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor inside it on `device`; containers keep their type."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(to_device(item, device) for item in value)
    return value


def first_tensor(value: Any) -> Tensor | None:
    """The first tensor in an output: itself, or the first found in a tuple, list or dict; None if there is none."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch as `(inputs, labels)`; labels are None where the batch has none.

    Raises:
        ValueError: if the batch is neither a tuple of at least two items, a dict, nor a tensor.
    """
    if isinstance(batch, dict):
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        return inputs, batch.get("labels")
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], torch.as_tensor(batch[1])
    raise ValueError(
        f"a batch of type {type(batch).__name__} is not understood: "
        "a loader gives (inputs, labels, ...), or a dict with 'labels'"
    )


def batch_size(inputs: Any) -> int:
    """How many samples `inputs` holds: the first tensor's first dimension, or the length of a list of tensors.

    Detectors take such a list of images of several sizes as their first argument.
    """
    arguments = list(inputs.values()) if isinstance(inputs, dict) else inputs
    if isinstance(arguments, (tuple, list)) and arguments and _is_list_of_tensors(arguments[0]):
        return len(arguments[0])
    tensor = first_tensor(inputs)
    if tensor is None or tensor.ndim == 0:
        raise ValueError("the inputs hold no tensor with a batch dimension")
    return tensor.shape[0]


def take(inputs: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of inputs: every tensor with a batch dimension, and every list of tensors, is cut."""
    if isinstance(inputs, (tuple, list)):  # these are arguments, even if all are tensors
        return type(inputs)(_cut(item, start, stop) for item in inputs)
    return _cut(inputs, start, stop)


def _cut(value: Any, start: int, stop: int) -> Any:
    if isinstance(value, Tensor):
        return value[start:stop] if value.ndim else value
    if _is_list_of_tensors(value):
        return value[start:stop]
    if isinstance(value, dict):
        return {key: _cut(item, start, stop) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_cut(item, start, stop) for item in value)
    return value


def join(pieces: Sequence[Any]) -> Any:
    """Inputs of one form as a single batch: what `take` took apart.

    Raises:
        RuntimeError: if their tensors are of several sizes.
    """
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(list(pieces)) if first.ndim else first
    if isinstance(first, dict):
        return {key: join([piece[key] for piece in pieces]) for key in first}
    if isinstance(first, (tuple, list)):
        columns = [[piece[i] for piece in pieces] for i in range(len(first))]
        return type(first)(
            [image for images in c for image in images] if _is_list_of_tensors(c[0]) else join(c) for c in columns
        )
    return first


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode inside the block; every module's own mode and torch's RNG are put back after it."""
    modes = {module: module.training for module in model.modules()}
    device = device_of(model)
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode
