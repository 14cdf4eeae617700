"""Inner products of the features of a model's layers, within a memory budget.

Q needs of a layer only the inner products of its samples, so features are dropped as soon as these are summed up. A
layer is worked off in slabs of columns; what does not fit the budget at once is left to a further forward pass. The
slabs do not depend on the budget, so neither do the sums, unless it is too small for one slab.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from modprune._inputs import device_of
from modprune._processes import everyones, place, to_owners, total
from modprune.graph import check_finite, inner_products
from modprune.samples import Sample
from modprune.visits import two_of, visit

GIB = 2**30
SLAB = 16384
FEW = 64  # columns that a pass has to be worth


class Slab(NamedTuple):
    """Columns `start` to `stop` of a layer's flattened features."""

    layer: str
    start: int
    stop: int

    @property
    def width(self) -> int:
        """Columns."""
        return self.stop - self.start


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
        self._arena = torch.empty(0, device="cpu")
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
            self._arena = torch.empty(0, device="cpu")  # the old one goes before the new one comes
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
        few = two_of(sample)
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
