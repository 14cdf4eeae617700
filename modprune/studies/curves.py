"""Curves of several networks side by side: where Q rises, where it is flat, where it falls. Lu et al. (ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from modprune._inputs import first_sample
from modprune.curve import ModularityCurve, modularity_curve
from modprune.picture import plot_curve
from modprune.studies.layers import layers_of
from modprune.studies.study import Parts, Study, panels, plural, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def curves(
    networks: Mapping[str, tuple[nn.Module, Iterable[Any]]],
    *,
    k: int = 3,
    samples: int = 500,
    repeats: int = 5,
    parts: Parts | None = None,
) -> Study:
    """The modularity curve of each network.

    Args:
        networks: by title, each with the calibration batches of its data set, `(inputs, labels, ...)`.
        k, samples, repeats: see `modularity_curve`.
        parts: where finished curves are kept.

    Raises:
        ValueError: as `modularity_curve`, and for no network.
    """
    if not networks:
        raise ValueError("no network is given: give at least one")
    parts = parts or Parts()

    def measured(model: nn.Module, loader: Iterable[Any]) -> dict[str, Any]:
        example = first_sample(loader)
        curve = modularity_curve(model, loader, k, samples, repeats, layers=layers_of(model, example))
        flat, falling = curve.plateaus(), curve.degradations()
        return {"layers": curve.layers, "q": curve.q.tolist(), "plateaus": flat, "degradations": falling}

    bar = tqdm(networks.items(), "networks", leave=False)
    rows = [{"network": title} | parts(title, measured, *pair) for title, pair in bar]
    numbers = {"k": k, "samples": samples, "networks": rows}
    return Study("curves", numbers, draw(numbers), tell(numbers))


def draw(numbers: Mapping[str, Any]) -> Figure:
    """Small multiples: a panel for each network, Q on one scale."""
    rows = numbers["networks"]
    with style():
        figure, axes = panels(len(rows), min(3, len(rows)), 2.1, sharey=True)
        for ax, row in zip(axes, rows, strict=True):
            plot_curve(ModularityCurve(tuple(row["layers"]), np.array(row["q"])), ax)
            last = len(row["layers"]) - 1
            ax.set_xticks(sorted({0, last // 2, last}), sorted({0, last // 2, last}), rotation=0, fontsize=7)
            ax.set_title(row["network"].replace(", ", "\n"))  # a panel is a third of the page wide
            ax.set_xlabel("points after the stem")
            ax.get_lines()[0].set_markersize(2.5)
            ax.get_legend().remove()
            if ax is not axes[0]:
                ax.set_ylabel("")
        named = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend([*named.values()], [*named], frameon=False, ncols=3, loc="outside lower center")
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    lines = [
        f"Modularity Q of the {numbers['k']}-nearest-neighbour graph of {numbers['samples']} images at every point, "
        f"mean and spread over {plural(len(numbers['networks'][0]['q']), 'draw')}."
    ]
    for row in numbers["networks"]:
        q = np.mean(row["q"], 0)
        top = int(q.argmax())
        lines.append(
            f"{row['network']}: from {q[0]:.3f} to {q[-1]:.3f} over {len(q)} points, highest at {row['layers'][top]} "
            f"({q[top]:.3f}); {plural(len(row['plateaus']), 'plateau')} and "
            f"{plural(len(row['degradations']), 'degradation')} in {plural(len(q) - 1, 'step')}."
        )
    return " ".join(lines)
