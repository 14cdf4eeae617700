"""Does the curve depend on k and N? Lu et al. (ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from modprune._inputs import first_sample
from modprune.curve import check_classes, spread
from modprune.features import GIB, LayerGrams
from modprune.graph import check_k, feature_graph_from_gram, graph_modularity
from modprune.samples import Sample, draw_samples, labels_of
from modprune.studies.layers import layers_of
from modprune.studies.study import Parts, Study, looks, panels, rank_correlation, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWS = 5


def ablation(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    ks: Sequence[int] = (3, 5, 7, 9, 11),
    sizes: Sequence[int] = (200, 500, 1000, 2000, 5000),
    repeats: int = 1,
    budget: int = GIB,
    parts: Parts | None = None,
) -> Study:
    """The curve for every k and N of a grid, with its spread, and how alike the curves rank the layers.

    All cells come from the same features: those of a smaller N are up to five disjoint parts of the largest.

    Args:
        model: left as found.
        loader: calibration batches, `(inputs, labels, ...)`.
        ks: neighbours.
        sizes: samples, N.
        repeats: draws of the largest N.
        budget: bytes that features may take at a time.
        parts: where finished draws are kept.

    Raises:
        ValueError: as `modularity_curve`.
    """
    ks, sizes = tuple(dict.fromkeys(ks)), tuple(dict.fromkeys(sizes))  # doubled, cells would hold every curve twice
    check_k(max(ks), min(sizes))
    parts, layers = parts or Parts(), layers_of(model, first_sample(loader))
    drawn = []
    for repeat, sample in enumerate(draw_samples(loader, max(sizes), repeats)):
        drawn.append(parts(f"draw {repeat}", _grid, model, layers, sample, ks, sizes, budget))
    cells = [{"k": k, "samples": n, "q": [q for grid in drawn for q in grid[f"{k}, {n}"]]} for k in ks for n in sizes]
    mean = [np.array(cell["q"]).mean(0) for cell in cells]
    numbers = {"layers": layers, "cells": cells, "rank_correlation": rank_correlation(mean).tolist()}
    return Study("ablation", numbers, draw(numbers), tell(numbers))


def _grid(
    model: nn.Module, layers: Sequence[str], sample: Sample, ks: Sequence[int], sizes: Sequence[int], budget: int
) -> dict[str, list[list[float]]]:
    """For each cell, by "k, N": Q of each of its draws at each layer."""
    labels = labels_of(sample)
    parts = {n: [slice(i * n, i * n + n) for i in range(min(DRAWS, len(labels) // n))] for n in sizes}
    for part in (part for slices in parts.values() for part in slices):
        check_classes(labels[part])
    grid: dict[str, list[list[float]]] = {f"{k}, {n}": [[] for _ in parts[n]] for k in ks for n in sizes}
    for _, gram in tqdm(LayerGrams(model, layers, budget)(sample), "layers", len(layers), leave=False):
        for n, slices in parts.items():
            for draw_, part in enumerate(slices):
                for k in ks:
                    graph = feature_graph_from_gram(gram[part, part].clone(), k)
                    grid[f"{k}, {n}"][draw_].append(graph_modularity(graph, labels[part]))
    return grid


def draw(numbers: Mapping[str, Any]) -> Figure:
    """Left the curves for each k at one N, right for each N at one k: those nearest to the paper's defaults."""
    cells = numbers["cells"]
    n = min({cell["samples"] for cell in cells}, key=lambda n: abs(n - 500))
    k = min({cell["k"] for cell in cells}, key=lambda k: abs(k - 3))
    with style():
        figure, axes = panels(2, 2, 2.6, sharey=True)
        for ax, fixed, free, value in ((axes[0], "samples", "k", n), (axes[1], "k", "samples", k)):
            chosen = [cell for cell in cells if cell[fixed] == value]
            for cell, (ink, marker) in zip(chosen, looks(len(chosen)), strict=True):
                q = np.array(cell["q"])
                x, mean, std = range(q.shape[1]), q.mean(0), spread(q)
                ax.fill_between(x, mean - std, mean + std, color=ink, alpha=0.15, lw=0)
                name = "N" if free == "samples" else "k"
                ax.plot(x, mean, marker=marker, ms=3, lw=1, color=ink, label=f"{name} = {cell[free]}")
            ax.set_title(f"N = {n}" if free == "k" else f"k = {k}")
            ax.set_xlabel("points after the stem")
            ax.legend(frameon=False)
        axes[0].set_ylabel("modularity Q")
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    cells, correlation = numbers["cells"], np.array(numbers["rank_correlation"])
    ks, sizes = sorted({cell["k"] for cell in cells}), sorted({cell["samples"] for cell in cells})
    text = f"Curves of {len(numbers['layers'])} points for k in {ks} and N in {sizes}."
    if len(cells) > 1:
        least = np.unravel_index(correlation.argmin(), correlation.shape)
        a, b = (f"k = {cells[i]['k']}, N = {cells[i]['samples']}" for i in least)
        text += (
            " The rank correlation (Spearman) of two curves is "
            f"{correlation[np.triu_indices(len(cells), 1)].mean():.3f} in the mean and "
            f"{correlation.min():.3f} at the least ({a} against {b})."
        )
    several = [n for n in sizes if any(len(cell["q"]) > 1 for cell in cells if cell["samples"] == n)]
    spreads = [f"{_spread(cells, n):.4f} at N = {n}" for n in dict.fromkeys([*several[:1], *several[-1:]])]
    return text + (f" The largest spread between draws is {' and '.join(spreads)}." if spreads else "")


def _spread(cells: Sequence[Mapping[str, Any]], n: int) -> float:
    return max(float(spread(np.array(cell["q"])).max()) for cell in cells if cell["samples"] == n)
