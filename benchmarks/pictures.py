"""The pictures of README.md and benchmarks/README.md, drawn from the results.

python -m benchmarks.pictures
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks._env import RESULTS
from benchmarks.published import CHANNELS, LAYERS, Point
from benchmarks.tables import OURS, load
from modprune import ModularityCurve
from modprune.picture import BLUE, GREY, RED, save_picture

LEFT, BELOW = {"xytext": (-7, 0), "ha": "right", "va": "center"}, {"xytext": (-6, -8), "ha": "left", "va": "top"}
ABOVE = {"xytext": (0, 7), "ha": "center", "va": "bottom"}
SIDES = (LEFT, ABOVE, BELOW, LEFT)  # of the star of each of `OURS` where its name hides none
MARKS = {"blocks": ("s", BLUE), "channels": ("o", GREY)}


def curve() -> None:
    """Write benchmarks/results/resnet56-cifar10-curve.png: Q per layer, and the blocks that the first run removed."""
    run = load("resnet56-cifar10-first")
    measured = ModularityCurve(tuple(run["curve"]["layers"]), np.array(run["curve"]["q"]))
    save_picture(measured.plot(removed=run["removed"]), RESULTS / "resnet56-cifar10-curve.png")


def pareto() -> None:
    """Write benchmarks/results/pareto.png: Top-1 of pruned ResNet56 against what is removed, beside the published.

    Time is ours alone: nobody publishes it.
    """
    runs = [load(name) for name in OURS]
    reports = [run["report"] for run in runs]
    names = [
        f"{len(run['removed'])} {what.replace('blocks and', '+')}"
        for run, what in zip(runs, OURS.values(), strict=True)
    ]
    base = reports[0]["original"]["accuracy"]["top1"]
    axes = Figure(figsize=(11, 4), layout="constrained").subplots(1, 3, sharey=True)
    for ax, what in zip(axes, ("MACs", "parameters", "time of a batch of 64"), strict=True):
        ax.axhline(base, color="black", lw=0.8, ls=":", label="unpruned, ours")
        if what != "time of a batch of 64":
            published(ax, what)
        ours = [(removed(report)[what], report["pruned"]["accuracy"]["top1"]) for report in reports]
        ax.plot(*zip(*ours, strict=True), "*", color=RED, ms=15, label="modprune", zorder=3)
        for place, name, where in zip(ours, names, SIDES, strict=True):
            ax.annotate(name, place, textcoords="offset points", fontsize=7, color=RED, **where)
        ax.set_xlabel(f"{what} removed, %")
        ax.set_xlim(0, 84)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("Top-1 on CIFAR-10, %")
    axes[0].figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    save_picture(axes[0], RESULTS / "pareto.png")


def published(ax: Axes, what: str) -> None:
    """The others' points: squares lose blocks, circles channels."""
    for kind, points in (("blocks", LAYERS), ("channels", CHANNELS)):
        places = [(_removed(point, what), point.top1) for point in points]
        known = [(x, y) for x, y in places if x is not None]
        mark, colour = MARKS[kind]
        if known:
            ax.plot(*zip(*known, strict=True), mark, color=colour, mfc="none", label=f"published, {kind}")


def _removed(point: Point, what: str) -> float | None:
    return point.macs if what == "MACs" else point.params


def removed(report: dict[str, Any]) -> dict[str, float]:
    """Percent of the MACs, of the parameters and of the time of a forward pass of 64 images that is gone."""
    before, after = (report[which]["seconds"]["64"] for which in ("original", "pruned"))
    return {
        "MACs": 100 * report["flops_removed"]["fvcore"],
        "parameters": 100 * report["params_removed"],
        "time of a batch of 64": 100 * (1 - after / before),
    }


if __name__ == "__main__":
    curve()
    pareto()
