"""The modularity curve of a network: Q at the stem and after every block (Lu et al., ECCV 2022, sections 3 and 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from modprune._files import to_json
from modprune._hooks import listening
from modprune._inputs import batch_size, call, device_of, first_sample, first_tensor, to_device
from modprune._random import undisturbed
from modprune._state import evaluating, state_kept
from modprune.blocks import Block, Blocks, find_blocks
from modprune.features import GIB, LayerGrams
from modprune.graph import WHOLE, check_k, check_labels, feature_graph_from_gram, graph_modularity
from modprune.samples import Sample, counted, draw_samples, labels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)  # arrays have no one answer
class ModularityCurve:
    """Q per layer.

    Attributes:
        layers: names of the points in forward order: the stem, then every block.
        q: (repeats, layers) float64; every row from samples of its own.
    """

    layers: tuple[str, ...]
    q: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """(layers,): mean Q over the repeats."""
        return self.q.mean(0)

    @property
    def std(self) -> np.ndarray:
        """(layers,): standard deviation of Q over the repeats; 0 for a single one."""
        return spread(self.q)

    @property
    def gain(self) -> np.ndarray:
        """(layers - 1,): Q after each block minus Q at the point before, for `layers[1:]`.

        What a layer between two blocks does (one that narrows the image, say) is in the gain of the block after it.
        """
        return np.diff(self.mean)

    @property
    def noise(self) -> np.ndarray:
        """(layers - 1,): two standard errors of the gain. Gains are differences on the same samples, so the spread
        between repeats that all layers share is not in it. 0 for a single repeat. Too small where the loader holds
        fewer samples than all repeats ask for: those that share samples are alike.
        """
        return 2 * spread(np.diff(self.q, axis=1)) / np.sqrt(len(self.q))

    def plateaus(self) -> tuple[str, ...]:
        """Blocks whose gain lies within the noise: they part the classes no further."""
        return self._blocks(np.abs(self.gain) <= self.noise)

    def degradations(self) -> tuple[str, ...]:
        """Blocks whose gain lies below minus the noise: they mix the classes again."""
        return self._blocks(self.gain < -self.noise)

    def _blocks(self, which: np.ndarray) -> tuple[str, ...]:
        return tuple(layer for layer, yes in zip(self.layers[1:], which, strict=True) if yes)

    def to_json(self, path: str | Path | None = None) -> str:
        """The curve as JSON text; written to `path` as well if given, in one step."""
        data = {
            "layers": list(self.layers),
            "q": self.q.tolist(),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "gain": self.gain.tolist(),
            "noise": self.noise.tolist(),
            "plateaus": list(self.plateaus()),
            "degradations": list(self.degradations()),
        }
        return to_json(data, path)

    def plot(self, ax: Axes | None = None, removed: Sequence[str] = ()) -> Axes:
        """Draw Q per layer with its spread as a band, plateaus and degradations shaded and `removed` blocks marked."""
        from modprune.picture import plot_curve

        return plot_curve(self, ax, removed)


def modularity_curve(
    model: nn.Module,
    loader: Iterable[Any],
    k: int = 3,
    samples: int = 500,
    repeats: int = 5,
    example_inputs: Any = None,
    *,
    blocks: Iterable[Block] | None = None,
    layers: Sequence[str] | None = None,
    budget: int = GIB,
) -> ModularityCurve:
    """Q of the stem (the first layer with parameters) and of every residual block's output, or of `layers`.

    Calibration images come from the training set: a plan chosen on test images is leakage. Features are multiplied in
    float32, whatever the model's precision.

    Args:
        model: left as found: modes, device, RNG.
        loader: `(inputs, labels, ...)` batches or dicts with `labels`; (B,) integer labels, one a sample. Its
            generators, and an epoch of yours that it is amid, are left as found.
        k: neighbours of each sample.
        samples: N, samples of each repeat, up to 8192. Repeats are disjoint as far as the loader lasts.
        repeats: how many times.
        example_inputs: to find the blocks with; one sample of the first batch if None.
        blocks: those of `find_blocks`, where they are known already, or some of them.
        layers: names of the sub-modules to measure instead, in forward order; their first output tensor is the feature,
            with a "+" before the name that and their first input tensor, added up.
        budget: bytes that features may take at a time. Less of it takes more passes and gives the same numbers (up to
            rounding below 32 MiB or so).

    Raises:
        ValueError: for `k`, `samples` or labels that do not fit, for NaN in the features (names the layer), for a model
            without residual blocks, and for samples of fewer than two classes, or of which no two share a class.

    Source: Lu et al. (ECCV 2022), section 3; its defaults are k = 3, N = 500, five repeats.
    """
    samples, repeats = counted(samples, repeats)
    check_k(k, samples)
    if samples > WHOLE:
        raise ValueError(f"samples={samples}: at most {WHOLE} a repeat; use more repeats")
    with evaluating(model), undisturbed(loader):
        if layers is None:
            if example_inputs is None:
                example_inputs = first_sample(loader)
            blocks = find_blocks(model, example_inputs) if blocks is None else Blocks(blocks)
            places = points(model, blocks, example_inputs)
            layers = (places[0], *blocks.names)
        else:
            places = tuple(layers)
            if not places:
                raise ValueError("layers is empty: name at least one sub-module, or leave it out for stem and blocks")
        grams = LayerGrams(model, places, budget)
        q = [q_of(grams, sample, k) for sample in draw_samples(loader, samples, repeats)]
    return ModularityCurve(tuple(layers), np.array(q))


def points(model: nn.Module, blocks: Blocks, example_inputs: Any) -> tuple[str, ...]:
    """The layers at the points of a curve: the first with parameters that runs, and where every block ends.

    Raises:
        ValueError: if there is no block to measure after the stem.
    """
    if not blocks:
        looked = f"; refused: {blocks.refused}" if blocks.refused else ""
        raise ValueError(
            f"{type(model).__name__} has no residual block whose output is shortcut(x) + branch(x){looked}"
        )
    return (_first_layer(model, blocks.names[0], example_inputs), *(block.end for block in blocks))


def _first_layer(model: nn.Module, block: str, example_inputs: Any) -> str:
    """The first layer that ran once and gave a row for each sample, before the block had ended."""
    rows: dict[str, list[int]] = {}
    early: list[str] = []

    def look(name: str, out: Any) -> None:
        feature = first_tensor(out)
        if block not in rows:
            early.append(name)
        rows.setdefault(name, []).append(len(feature) if feature is not None and feature.ndim else -1)

    layers = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # takes no hooks
        and not module._modules.keys() - {"parametrizations"}
        and any(True for _ in module.parameters())
    }
    layers[block] = model.get_submodule(block)
    with listening(layers, look), evaluating(model), state_kept(model), torch.no_grad():
        call(model, to_device(example_inputs, device_of(model)))
    samples = batch_size(example_inputs)
    first = next((name for name in early if rows[name] == [samples] and name != block), None)
    if first is None:
        raise ValueError(
            f"{type(model).__name__} has no layer with parameters that runs once and gives a row for each sample, to "
            "stand before the first block: give modularity_curve the layers, or prune by block_influence, say"
        )
    return first


def q_of(grams: LayerGrams, sample: Sample, k: int) -> list[float]:
    """Q of every layer of `grams` on one sample."""
    labels = labels_of(sample)
    check_classes(labels)
    return [graph_modularity(feature_graph_from_gram(gram, k), labels) for _, gram in grams(sample)]


def check_classes(labels: Tensor) -> None:
    """Raises ValueError unless labels are integers of two classes at least, with two samples of one of them."""
    check_labels(labels, len(labels))
    classes = len(labels.unique())
    if classes < 2:
        raise ValueError(f"all {len(labels)} samples are of one class, so nothing parts: shuffle the loader")
    if classes == len(labels):
        raise ValueError(f"{len(labels)} samples of as many classes: no two share one; raise samples")


def spread(values: np.ndarray) -> np.ndarray:
    """Standard deviation over the first dimension, estimated from these few (n - 1); 0 for a single one."""
    return values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])
