"""How inputs travel: example inputs, batches and the calls that take them.

`example_inputs` is a tensor, a tuple (or list) of positional arguments, or a dict of keyword arguments, as in
torch-pruning. A batch is `(inputs, labels, ...)` or a dict that holds `labels`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import chain
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

ONCE = "; one that can be read only once, as a generator, may have been read before: give a list or a DataLoader"


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`, with a tuple spread over positional and a mapping over keyword arguments.

    On copies: a model may write into what it is given, and the same samples go into it again.

    Raises:
        RuntimeError: for errors of other kinds than ValueError, RuntimeError and OSError; one line.
    """
    inputs = map_tensors(Tensor.clone, inputs)
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        if isinstance(inputs, (tuple, list)):
            return model(*inputs)
        return model(inputs)
    except (ValueError, RuntimeError, OSError):
        raise
    except Exception as error:
        hint = "; of a dict all but 'labels' are its arguments" if isinstance(inputs, Mapping) else ""
        if isinstance(inputs, list):
            hint = "; of a list each item is an argument: a list of images goes as ([image, ...],)"
        what = f"{type(error).__name__}: {first_line(error)}"
        raise RuntimeError(f"{type(model).__name__} fails on its inputs with {what}{hint}") from error


def first_line(error: Exception) -> str:
    """An error's message, cut to its first line; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, 3.0 and integers of numpy and torch among them."""
    try:
        operator.index(value)
    except TypeError:
        return isinstance(value, Real) and float(value).is_integer()
    return True


def check_loader(loader: object) -> None:
    """Raises ValueError unless there may be batches in it."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise ValueError(f"a loader of type {type(loader).__name__}: give batches, as a list or a DataLoader")


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU if it has none."""
    for tensor in chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a module was given, positional before keyword; of a tuple that comes first, its items.

    A Sequential whose layers have several values to hand on hands on one tuple of them.
    """
    given = [*args, *kwargs.values()]
    return [*given[0], *given[1:]] if given and isinstance(given[0], tuple) else given


def to_device(value: Any, device: torch.device) -> Any:
    """`value` with every tensor inside it on `device`; a mapping becomes a dict, other containers keep their type."""
    # A copy to the CPU that does not block may be read before it is there.
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"), value)


def laid_out(value: Any, layout: torch.memory_format) -> Any:
    """`value` with every (B, C, H, W) floating point tensor inside it in this memory format."""

    def lay_out(tensor: Tensor) -> Tensor:
        is_images = tensor.ndim == 4 and tensor.is_floating_point()
        return tensor.to(memory_format=layout) if is_images else tensor

    return map_tensors(lay_out, value)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of every tensor inside it; a mapping becomes a dict, other containers keep their type."""
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return like(value, [map_tensors(function, item) for item in value])
    return function(value) if isinstance(value, Tensor) else value


def like(value: Any, items: list[Any]) -> Any:
    """A tuple, named tuple or list such as `value`, of other items."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def has_gradients(tensor: Tensor) -> bool:
    """Whether a tensor can require gradients, by its type."""
    return tensor.is_floating_point() or tensor.is_complex()


def first_tensor(value: Any) -> Tensor | None:
    """The first of `tensors_in`; None if there is none."""
    return next(tensors_in(value), None)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of an output in order: itself, or those in tuples, lists and mappings; caches are left aside."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def opened(output: Any) -> Any:
    """A model's output as tensors and containers: of a dataclass its fields, of any other object its attributes."""
    if isinstance(output, (Tensor, Mapping, tuple, list)):
        return output
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    return getattr(output, "__dict__", {})


def first_sample(loader: Iterable[Any]) -> Any:
    """The inputs of the first sample of a loader, as a batch of one.

    Raises:
        ValueError: if it gives no batch with a sample.
    """
    check_loader(loader)
    for batch in loader:
        inputs = split_batch(batch)[0]
        if batch_size(inputs):
            return take(inputs, 0, 1)
    raise ValueError(f"the loader gives no batch{ONCE}")


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """A batch as `(inputs, labels)`; labels are None where the batch has none that make a tensor.

    Raises:
        ValueError: if the batch is neither a tuple or list of something, a mapping, nor a tensor.
    """
    if isinstance(batch, Mapping):
        return {key: value for key, value in batch.items() if key != "labels"}, _as_labels(batch.get("labels"))
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)) and batch:
        return batch[0], _as_labels(batch[1]) if len(batch) > 1 else None
    raise ValueError(
        f"a batch of type {type(batch).__name__} is not understood: a loader gives (inputs, labels, ...), "
        "or a dict with 'labels'; where none are needed, inputs alone"
    )


def check_range(labels: Tensor, classes: int) -> None:
    """Raises ValueError unless labels lie in 0..classes - 1."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels from {labels.min()} to {labels.max()} with {classes} classes: labels lie in 0..{classes - 1}; "
            "check the data and the number of classes"
        )


def _as_labels(value: Any) -> Tensor | None:
    try:
        return value if value is None or isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # texts, or the boxes of a detector
        return None


def batch_size(inputs: Any) -> int:
    """How many samples `inputs` holds: the first tensor's first dimension, or the length of a list of tensors.

    Detectors take such a list of images of several sizes as their first argument.
    """
    arguments = list(inputs.values()) if isinstance(inputs, Mapping) else inputs
    if isinstance(arguments, (tuple, list)) and arguments and _is_list_of_tensors(arguments[0]):
        return len(arguments[0])
    tensor = first_tensor(inputs)
    if tensor is None or tensor.ndim == 0:
        raise ValueError(
            f"inputs of type {type(inputs).__name__} hold no tensor with a batch dimension: give a torch.Tensor, or a "
            "tuple or dict of them"
        )
    return tensor.shape[0]


def take(inputs: Any, start: int, stop: int) -> Any:
    """Samples `start` to `stop` of inputs: what is as long as the batch is cut, other tensors (masks) stay."""
    size = batch_size(inputs)

    def cut(value: Any) -> Any:
        return value[start:stop] if _is_batch(value, size) else value

    return _map_arguments(lambda value: cut(value) if _is_list_of_tensors(value) else map_tensors(cut, value), inputs)


def join(pieces: Sequence[Any]) -> Any:
    """Inputs of one form as a single batch: what `take` took apart.

    Raises:
        RuntimeError: if their tensors are of several sizes.
    """
    sizes = [batch_size(piece) for piece in pieces]

    def joined(parts: Sequence[Any], nested: bool = True) -> Any:
        first = parts[0]
        if isinstance(first, Tensor):
            whole = all(_is_batch(part, size) for part, size in zip(parts, sizes, strict=True))
            return torch.cat(list(parts)) if whole else first
        if isinstance(first, Mapping):
            return {key: joined([part[key] for part in parts]) for key in first}
        if nested and _is_list_of_tensors(first):
            return [image for part in parts for image in part]
        if isinstance(first, (tuple, list)):
            return like(first, [joined([part[i] for part in parts]) for i in range(len(first))])
        return first

    return joined(pieces, nested=False)


def _map_arguments(function: Callable[[Any], Any], inputs: Any) -> Any:
    """`function` of each argument: a list of tensors at the top is several arguments, below it is one."""
    if isinstance(inputs, Mapping):
        return {key: function(item) for key, item in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return like(inputs, [function(item) for item in inputs])
    return function(inputs)


def _is_batch(value: Any, size: int) -> bool:
    """Whether a value has something for each of `size` samples."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) == size
    return _is_list_of_tensors(value) and len(value) == size


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)
