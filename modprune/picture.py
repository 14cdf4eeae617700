"""The picture of a modularity curve."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modprune._files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from modprune.curve import ModularityCurve

BLUE, GREY, RED = "#1f5a96", "#8c8c8c", "#c8442f"


def plot_curve(curve: ModularityCurve, ax: Axes | None = None, removed: Sequence[str] = ()) -> Axes:
    """Mean Q per layer in a band of one standard deviation; plateaus grey, degradations red, removed blocks crossed."""
    own = ax is None
    if ax is None:
        from matplotlib.figure import Figure  # no pyplot: no window, no state of the user's is touched

        ax = Figure(figsize=(max(6.0, 0.28 * len(curve.layers)), 4.2), layout="constrained").add_subplot()
    n, x = len(curve.q), range(len(curve.layers))
    for names, colour, hatch, label in (
        (curve.plateaus(), GREY, None, "plateau"),
        (curve.degradations(), RED, "////", "degradation"),  # hatched, to be told apart in print
    ):
        for name in names:
            end, first = curve.layers.index(name), name == names[0]
            ax.axvspan(end - 1, end, color=colour, alpha=0.22, lw=0, hatch=hatch, label=label if first else None)
    ax.fill_between(x, curve.mean - curve.std, curve.mean + curve.std, color=BLUE, alpha=0.2, lw=0)
    ax.plot(x, curve.mean, "o-", color=BLUE, ms=4, label=f"Q, mean and spread of {n}" if n > 1 else "Q")
    gone = [i for i, layer in enumerate(curve.layers) if layer in set(removed)]
    if gone:
        ax.plot(gone, curve.mean[gone], "x", color="black", ms=9, mew=2, label="removed", zorder=3)
    ax.set_xticks(x, curve.layers, rotation=90, fontsize=8)
    ax.set_xlim(-0.5, len(curve.layers) - 0.5)
    ax.set_ylabel("modularity Q")
    ax.grid(axis="y", alpha=0.3)
    # Above, it hides no region; where the axes are somebody's, a title may stand there.
    above: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4, "frameon": False}
    inside: Any = {"loc": "upper left", "framealpha": 0.9, "edgecolor": "none"}
    ax.legend(fontsize=8, **(above if own else inside))
    return ax


def save_picture(ax: Axes, path: str | Path) -> None:
    """Write the figure of `ax` as a PNG, in one step.

    Raises:
        ValueError: for a name that is no PNG's; OSError: if it cannot be written.
    """
    check_png(path)
    buffer = io.BytesIO()
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


def check_png(path: str | Path) -> None:
    """Raises ValueError for a name that is no PNG's."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path}: the picture is a PNG: give a name that ends in .png")
