"""Running a model over a loader and handing out inner products of its features, within a memory budget.

Q needs of a layer only the inner products of its samples, so features are dropped as soon as these are summed up. A
layer is worked off in slabs of columns; what does not fit the budget at once is left to a further forward pass. The
slabs do not depend on the budget, so neither do the sums, unless it is too small for one slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from modprune._hooks import comparing, listening
from modprune._inputs import (
    ONCE,
    batch_size,
    call,
    device_of,
    first_sample,
    first_tensor,
    join,
    laid_out,
    split_batch,
    take,
    to_device,
)
from modprune._processes import everyones, place, to_owners, total
from modprune._random import undisturbed
from modprune._state import evaluating, state_kept
from modprune.graph import check_finite, inner_products

GIB = 2**30
SLAB = 16384
FEW = 64  # columns that a pass has to be worth

Sample = list[tuple[Any, Tensor]]
"""Pieces of batches, `(inputs, labels)` each, that together hold the asked number of samples."""


class Slab(NamedTuple):
    """Columns `start` to `stop` of a layer's flattened features."""

    layer: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.stop - self.start


def draw_samples(loader: Iterable[Any], samples: int, repeats: int) -> Iterator[Sample]:
    """`repeats` times `samples` labelled samples: disjoint, in the loader's order, as long as the loader lasts.

    Where it holds fewer than samples x repeats, the rest are random subsets of all it holds, the same in every run.

    Of several processes each draws its share of them: from its own loader, or where all have the same one (its first
    sample tells), as if there were one process.

    Raises:
        ValueError: if the loader holds fewer than `samples`, or gives no labels; for less than one of either.
    """
    for name, value in (("samples", samples), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name}={value}: at least 1 is needed")
    rank, processes = place()
    if processes == 1:
        return _draw_here(loader, samples, repeats)
    if samples < processes:
        raise ValueError(f"samples={samples} for {processes} processes: at least one for each is needed")
    first = first_tensor(first_sample(loader))
    firsts = everyones(None if first is None else first.flatten().tolist())  # numpy has no bfloat16
    if any(other != firsts[0] for other in firsts):
        return _draw_here(loader, samples // processes + (rank < samples % processes), repeats)
    share = slice(rank * samples // processes, (rank + 1) * samples // processes)
    return (_part(sample, share) for sample in _draw_here(loader, samples, repeats))


def drawn(loader: Iterable[Any], samples: int, repeats: int) -> list[Sample]:
    """All that `draw_samples` gives, with the loader as it was."""
    with undisturbed(loader):
        return list(draw_samples(loader, samples, repeats))


def labels_of(sample: Sample) -> Tensor:
    """(N,): the labels of a sample, from all processes."""
    labels = torch.cat([labels for _, labels in sample])
    return torch.cat(everyones(labels.cpu())).to(labels.device)


def _part(sample: Sample, part: slice) -> Sample:
    pieces, start = [], 0
    for inputs, labels in sample:
        a, b = (min(max(bound - start, 0), len(labels)) for bound in (part.start, part.stop))
        if a < b:
            pieces.append((take(inputs, a, b), labels[a:b]))
        start += len(labels)
    return pieces


def _draw_here(loader: Iterable[Any], samples: int, repeats: int) -> Iterator[Sample]:
    drawn = 0
    for sample in _consecutive(loader, samples):
        yield sample
        drawn += 1
        if drawn == repeats:  # not one batch more than that is asked for
            return
    batches = list(map(_labelled, loader))
    pool = [(take(x, i, i + 1), y[i : i + 1]) for x, y in batches for i in range(len(y))]
    size = max((len(y) for _, y in batches), default=1)
    if len(pool) < samples:
        enough = f": ask for {len(pool)} at most" if pool else ONCE
        raise ValueError(f"the loader holds {len(pool)} samples, {samples} are asked for{enough}")
    for repeat in range(drawn, repeats):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(repeat))
        chosen = [pool[i] for i in order[:samples].tolist()]
        yield [piece for start in range(0, samples, size) for piece in _joined(chosen[start : start + size])]


def _joined(pieces: Sample) -> Sample:
    """The pieces as one batch, or as they are where their sizes differ."""
    try:
        return [(join([inputs for inputs, _ in pieces]), torch.cat([labels for _, labels in pieces]))]
    except RuntimeError:
        return pieces


class LayerGrams:
    """Inner products of a model's features, layer by layer.

    Features lie in one allocation, `budget` bytes at most, that all passes and all samples share. On the CPU images
    are forwarded channels last, which is faster, where the model takes them so.

    Args:
        model: run in eval mode without gradients, on its own device; left as found.
        layers: names of sub-modules; the first tensor of their output is the feature, one row a sample.
        budget: bytes that features and their products may take, beside the forward pass itself.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], budget: int = GIB) -> None:
        self.model, self.layers, self.budget = model, layers, budget
        self._arena = torch.empty(0)
        self._layout = torch.channels_last if device_of(model).type == "cpu" else torch.preserve_format
        self._channels_last: set[str] = set()
        self._scales: dict[str, float] = {}

    def __call__(self, sample: Sample) -> Iterator[tuple[str, Tensor]]:
        """For each layer, in the given order, the (N, N) float32 inner products of the N flattened features.

        Up to a power of two, where features are so large or small that float32 would not hold their squares.

        Of several processes each forwards its share of the N samples and multiplies its share of the slabs.

        Raises:
            ValueError: if a layer is not called once in a pass, or has no row of features for each sample, or features
                hold NaN or infinity; names the layer. For a budget that hardly holds the products alone.
        """
        counts = everyones(sum(len(labels) for _, labels in sample))
        samples = sum(counts)
        columns = self._columns(sample)
        passes = list(_passes(columns, samples, self.budget))
        # Sized for the largest pass: to grow it later would briefly hold two copies.
        self._reserve(samples * max(sum(slab.width for slab in slabs) for slabs in passes))
        gram: Tensor | None = None
        for slabs in passes:
            features = self._collect(sample, slabs, columns, counts)
            for slab in slabs:
                if slab in features:
                    products = inner_products(features[slab])
                    gram = products if gram is None else gram.add_(products)
                if slab.stop == columns[slab.layer]:
                    gram = total(self._arena.new_zeros(samples, samples) if gram is None else gram)
                    check_finite(gram.diagonal(), where=f"layer {slab.layer}: ")
                    # In no context of ours: whoever stops reading here would be left in it.
                    yield slab.layer, gram
                    gram = None

    def _reserve(self, values: int) -> None:
        """An arena of so many values at least, on the model's device."""
        device = device_of(self.model)
        if self._arena.numel() < values or self._arena.device != device:
            self._arena = torch.empty(0)  # the old one goes before the new one comes
            self._arena = torch.empty(values, dtype=torch.float32, device=device)

    def _columns(self, sample: Sample) -> dict[str, int]:
        """How many values a sample has in each layer, from a pass of two, which settles layout and scale as well."""
        columns: dict[str, int] = {}
        scales: dict[str, float] = {}
        last: set[str] = set()

        def look(layer: str, x: Tensor, _: int) -> None:
            columns[layer], scales[layer] = x[0].numel(), _scale(x)
            if not x.is_contiguous() and x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
                last.add(layer)

        # Two samples, not one: with a batch of one, `view` may succeed in any layout.
        few = _two_of(sample)
        try:
            visit(self.model, self.layers, few, look, self._layout)
        except RuntimeError:  # `view` asks for channels first; whatever else it is comes again
            self._layout = torch.preserve_format
            last.clear()
            visit(self.model, self.layers, few, look, self._layout)
        # One order of columns, and one scale, for all processes.
        self._channels_last, self._scales = everyones((last, scales))[0]
        return {layer: columns[layer] for layer in self.layers}

    def _collect(
        self, sample: Sample, slabs: Sequence[Slab], columns: dict[str, int], counts: Sequence[int]
    ) -> dict[Slab, Tensor]:
        """One forward pass over the sample: for each slab of this process its columns, (samples, width) float32.

        They lie in the arena.
        """
        samples, first = sum(counts), sum(counts[: place()[0]])
        sizes = [samples * slab.width for slab in slabs]
        parts = self._arena[: sum(sizes)].split(sizes)
        kept = {slab: part.view(samples, -1) for slab, part in zip(slabs, parts, strict=True)}

        def keep(layer: str, tensor: Tensor, row: int) -> None:
            flat = (tensor.permute(0, 2, 3, 1) if layer in self._channels_last else tensor).flatten(1)
            if flat.shape[1] != columns[layer]:
                raise ValueError(
                    f"layer {layer}: {flat.shape[1]} values a sample, {columns[layer]} in the first one: "
                    "give inputs of one size"
                )
            flat = flat if self._scales[layer] == 1 else flat * self._scales[layer]
            for slab, features in kept.items():
                if slab.layer == layer:
                    features[first + row : first + row + len(flat)] = flat[:, slab.start : slab.stop]

        layers = dict.fromkeys(slab.layer for slab in slabs)
        visit(self.model, layers, sample, keep, self._layout, whole=False)  # `_columns` has seen whole ones
        own = slabs[place()[0] :: len(counts)]
        return dict(zip(own, to_owners(list(kept.values()), counts), strict=True))


def _scale(x: Tensor) -> float:
    """A power of two, which rounds nothing, by which to multiply features for float32 to hold the squares of most."""
    largest = float(x.flatten(1).abs().amax(1).min()) if x.numel() else 0.0
    return 1.0 if 1e-9 < largest < 1e9 or not 0 < largest < math.inf else 2.0 ** min(126, -math.frexp(largest)[1])


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
    visit(model, layers, _two_of(sample), lambda *_: None)
    parts: dict[str, list[Tensor]] = {layer: [] for layer in layers}

    def keep(layer: str, features: Tensor, _: int) -> None:
        own = [p.shape for p in model.get_submodule(layer).parameters() if p.ndim]
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


def _two_of(sample: Sample) -> Sample:
    return [(take(inputs, 0, 2), labels[:2]) for inputs, labels in sample[:1]]


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

    known = dict(model.named_modules(remove_duplicate=False))
    if unknown := [layer for layer in seen if layer not in known]:
        raise ValueError(f"layer {unknown[0]!r}: {type(model).__name__} has no such module; see model.named_modules()")
    heard = {layer: known[layer] for layer in seen}
    with listening(heard, look), evaluating(model), state_kept(model), torch.no_grad():
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
    values: list[list[float]] = []
    row: dict[str, float] = {}
    seen = size = 0

    def look(layer: str, x: Tensor, y: Tensor) -> None:
        row[layer] = measure(x, y, size)

    modules = {layer: (model.get_submodule(layer), model.get_submodule(last)) for layer, last in spans.items()}
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


def _passes(columns: dict[str, int], samples: int, budget: int) -> Iterator[list[Slab]]:
    """Slabs of all layers in order, as many a pass as the budget holds; a single one is made to fit."""
    room = budget // (4 * samples) - 2 * samples  # columns, beside the products of a slab and their sum
    if room < FEW:
        least = 4 * samples * (2 * samples + FEW)
        raise ValueError(f"budget={budget} for {samples} samples: at least {least} bytes are needed; or fewer samples")
    width = min(SLAB, room)
    batch: list[Slab] = []
    free = room
    for slab in [Slab(layer, a, min(a + width, m)) for layer, m in columns.items() for a in range(0, m, width)]:
        if batch and slab.width > free:
            yield batch
            batch, free = [], room
        batch.append(slab)
        free -= slab.width
    yield batch


def _consecutive(loader: Iterable[Any], samples: int) -> Iterator[Sample]:
    sample: Sample = []
    missing = samples
    for inputs, labels in map(_labelled, loader):
        start = 0
        while start < len(labels):
            stop = min(len(labels), start + missing)
            sample.append((take(inputs, start, stop), labels[start:stop]))
            missing -= stop - start
            start = stop
            if missing == 0:
                yield sample
                sample, missing = [], samples


def _labelled(batch: Any) -> tuple[Any, Tensor]:
    inputs, labels = split_batch(batch)
    if labels is None:
        raise ValueError(
            "the loader gives no labels, and modularity measures how labels part: "
            "give (inputs, labels), or take the criterion 'block_influence' or 'cka', which need none"
        )
    if labels.shape != (batch_size(inputs),):
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for {batch_size(inputs)} inputs: one each is needed; the criteria "
            "'block_influence' and 'cka' need none"
        )
    return inputs, labels
