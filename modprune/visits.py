"""Forwarding samples and looking at what comes out of layers on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from modprune._hooks import ADDED, comparing, heard, listening
from modprune._inputs import (
    ONCE,
    batch_size,
    call,
    check_loader,
    device_of,
    first_tensor,
    laid_out,
    split_batch,
    take,
    to_device,
)
from modprune._processes import everyones
from modprune._random import undisturbed
from modprune._state import evaluating, state_kept
from modprune.graph import check_finite
from modprune.samples import Sample


def visit(
    model: nn.Module,
    layers: Iterable[str],
    sample: Sample,
    keep: Callable[[str, Tensor, int], None],
    layout: torch.memory_format = torch.preserve_format,
    whole: bool = True,
) -> None:
    """Forward all pieces of a sample; `keep(layer, features (B, ...), row of the first)` at every layer.

    In eval mode, without gradients; the model is left as found. Images go in with this memory layout. Unless passes are
    to be whole, each ends at the last of the layers: what comes after it is most of the work where it lies early.

    Raises:
        ValueError: for a layer that is not there, is not called once in a pass, or has no row of features for each
            sample.
    """
    row, size, passes, seen = 0, 0, 0, dict.fromkeys(layers, 0)

    def look(layer: str, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None or tensor.ndim < 2 or len(tensor) != size or not tensor.is_floating_point():
            what = "no tensor" if tensor is None else f"{str(tensor.dtype)[6:]} of shape {tuple(tensor.shape)}"
            raise ValueError(
                f"layer {layer} gives {what} for {size} inputs: a floating-point row of features for each is needed; "
                "the criterion 'block_influence' needs none"
            )
        seen[layer] += 1
        keep(layer, tensor, row)
        if not whole and min(seen.values()) == passes:
            raise _Enough

    known = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := [layer for layer in seen if layer.removeprefix(ADDED) not in known]:
        raise ValueError(f"layer {unknown[0]!r}: {type(model).__name__} has no such module; see model.named_modules()")
    modules = {layer: heard(model, layer) for layer in seen}
    with listening(modules, look), evaluating(model), state_kept(model), torch.no_grad():
        for inputs, labels in sample:
            size, passes = len(labels), passes + 1
            with suppress(_Enough):
                call(model, laid_out(to_device(inputs, device_of(model)), layout))
            row += size
    odd = [layer for layer, count in seen.items() if count != len(sample)]
    if odd:
        raise ValueError(f"layer {odd[0]}: not called once in a forward pass, so it has no one feature; leave it out")


class _Enough(BaseException):
    """Ends a forward pass; no exception that a network's own code would catch."""


def pairs(
    model: nn.Module,
    spans: Mapping[str, str],
    loader: Iterable[Any],
    samples: int,
    measure: Callable[[Tensor, Tensor, int], float],
) -> list[list[float]]:
    """`measure(input, output, size)` of each span of layers in each batch, until `samples` have passed; without labels.

    Args:
        model: run in eval mode without gradients, on its own device; left as found.
        spans: from the name of a first sub-module to that of a last, often itself; both called once in a forward pass.
        loader: batches; the first tensor into the first one and the first out of the last one are measured.
        samples: how many, at least; fewer where the loader has no more.
        measure: of two tensors, most often with one row a sample, and how many samples these are.
    """
    check_loader(loader)
    values: list[list[float]] = []
    row: dict[str, float] = {}
    seen = size = 0

    def look(layer: str, x: Tensor, y: Tensor) -> None:
        row[layer] = measure(x, x + y if spans[layer].startswith(ADDED) else y, size)

    modules = {layer: (model.get_submodule(layer), heard(model, last)) for layer, last in spans.items()}
    with comparing(modules, look), evaluating(model), state_kept(model), undisturbed(loader), torch.no_grad():
        for batch in loader:
            inputs = split_batch(batch)[0]
            size = batch_size(inputs)
            if size == 0:
                continue
            row.clear()
            call(model, to_device(inputs, device_of(model)))
            missing = [layer for layer in spans if layer not in row]
            if missing:
                raise ValueError(f"layer {missing[0]}: not called in a forward pass, or with no tensor")
            values.append([row[layer] for layer in spans])
            seen += size
            if seen >= samples:
                break
    if not values:
        raise ValueError(f"the loader gives no batch{ONCE}")
    return values


def pooled(model: nn.Module, layers: Sequence[str], sample: Sample) -> dict[str, Tensor]:
    """For each layer the mean of its features over all positions: (N, channels) float32, on the CPU, of all processes.

    Channels are the second dimension where the layer has convolutions that give so many; the last one (tokens, or
    channels last as in Swin) where it has matrices that do, or other parameters of that size and none of the second's.

    Args:
        model: run in eval mode without gradients, on its own device; left as found.
        layers: names of sub-modules that are called once in a pass.
        sample: what to run it on.

    Raises:
        ValueError: if features hold NaN or infinity; names the layer.
    """
    # Of two samples: whose rows are not theirs may have as many rows by chance where there are more.
    visit(model, layers, two_of(sample), lambda *_: None)
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: str, features: Tensor, _: int) -> None:
        own = [p.shape for p in heard(model, layer).parameters() if p.ndim]
        sizes, rows = {shape[0] for shape in own}, {shape[0] for shape in own if len(shape) == 2}
        convolved = features.shape[1] in {shape[0] for shape in own if len(shape) == features.ndim}
        matched = features.shape[-1] in rows or (features.shape[-1] in sizes and features.shape[1] not in sizes)
        last = matched and not convolved
        if features.ndim > 2:
            features = features.flatten(1, -2).mean(1) if last else features.flatten(2).mean(2)
        parts[layer].append(features.float().cpu())

    visit(model, layers, sample, keep)
    all_parts = everyones({layer: torch.cat(rows) for layer, rows in parts.items()})
    features = {layer: torch.cat([part[layer] for part in all_parts]) for layer in layers}
    for layer, rows in features.items():
        check_finite(rows.abs().amax(1), where=f"layer {layer}: ")
    return features


def two_of(sample: Sample) -> Sample:
    """The first two samples, or the one there is."""
    return [(take(inputs, 0, 2), labels[:2]) for inputs, labels in sample[:1]]
