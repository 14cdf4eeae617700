"""Does a cut of the flat part leave the rest of the curve as it was? Lu et al. (ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from modprune._inputs import first_sample
from modprune.blocks import find_blocks
from modprune.curve import ModularityCurve, modularity_curve
from modprune.samples import drawn
from modprune.studies.layers import layers_of
from modprune.studies.recovery import cut, has_statistics, recover
from modprune.studies.study import Parts, Study, looks, panels, plural, rank_correlation, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plateaus(
    model: nn.Module,
    loader: Iterable[Any],
    train_loader: Iterable[Any],
    *,
    cuts: Sequence[int] = (1, 2, 4),
    epochs: int = 0,
    lr: float = 0.05,
    k: int = 3,
    samples: int = 500,
    repeats: int = 5,
    parts: Parts | None = None,
) -> Study:
    """Curves of cuts of one network, by more and more of its blocks, those with the least gain first.

    Args:
        model: left as found.
        loader: calibration batches, `(inputs, labels, ...)`.
        train_loader: what each cut recovers on.
        cuts: how many blocks each cut lacks.
        epochs, lr: of the fine-tuning of each cut, the uncut network as teacher; 0 renews batch-norm statistics alone.
        k, samples, repeats: see `modularity_curve`.
        parts: where finished cuts are kept.

    Raises:
        ValueError: as `modularity_curve`, and for cuts of more blocks than there are.
    """
    parts, example = parts or Parts(), first_sample(loader)
    layers, removable = layers_of(model, example), find_blocks(model, example).names
    most = len(set(removable) & set(layers[1:])) - 1
    if not 0 < min(cuts) <= max(cuts) <= most:
        raise ValueError(f"cuts={tuple(cuts)}: from 1 to {most} blocks can be cut")
    images = [piece for sample in drawn(loader, samples, repeats) for piece in sample]  # the same for all cuts
    whole = np.array(
        parts("whole", lambda: modularity_curve(model, images, k, samples, repeats, layers=layers).q.tolist())
    )
    order = by_gain(ModularityCurve(layers, whole), removable)

    def measured(count: int) -> dict[str, Any]:
        pruned = cut(model, order[:count], example)
        recover(pruned, train_loader, model, epochs, lr)
        stay = [layer for layer in layers if layer not in order[:count]]
        q = modularity_curve(pruned, images, k, samples, repeats, layers=stay).q
        return {"removed": order[:count], "layers": stay, "q": q.tolist()}

    bar = tqdm(sorted(set(cuts)), "cuts", leave=False)
    rows = [{"cut": count} | parts(f"cut {count}", measured, count) for count in bar]
    numbers = {
        "k": k,
        "samples": samples,
        "epochs": epochs,
        "batch_norm": has_statistics(model),
        "layers": layers,
        "q": whole.tolist(),
        "cuts": rows,
    }
    return Study("plateaus", numbers, draw(numbers), tell(numbers))


def by_gain(curve: ModularityCurve, removable: Sequence[str]) -> list[str]:
    """The layers of a curve that can be removed, least gain first."""
    return [layer for i in np.argsort(curve.gain, kind="stable") if (layer := curve.layers[1:][i]) in set(removable)]


def draw(numbers: Mapping[str, Any]) -> Figure:
    """All curves over the points of the whole network; where a block is gone the line goes on straight."""
    place = {layer: i for i, layer in enumerate(numbers["layers"])}
    with style():
        figure, (ax,) = panels(1, 1, 3.0)
        rows = [{"cut": 0, "layers": numbers["layers"], "q": numbers["q"]}, *numbers["cuts"]]
        for row, (ink, marker) in zip(rows, looks(len(rows)), strict=True):
            label = f"{plural(row['cut'], 'block')} fewer" if row["cut"] else "whole"
            x = [place[layer] for layer in row["layers"]]
            ax.plot(x, np.mean(row["q"], 0), marker=marker, ms=4, lw=1, color=ink, label=label)
        ax.set_xlabel("points of the whole network after the stem")
        ax.set_ylabel("modularity Q")
        ax.legend(frameon=False)
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    epochs = numbers["epochs"]
    renewed = "after measuring batch-norm statistics anew" if numbers["batch_norm"] else "at once"
    after = f"after {plural(epochs, 'epoch')} of fine-tuning" if epochs else renewed
    lines = [f"Blocks with the least gain removed, and the curve measured again {after}."]
    whole = dict(zip(numbers["layers"], np.mean(numbers["q"], 0), strict=True))
    for row in numbers["cuts"]:
        q, before = np.mean(row["q"], 0), np.array([whole[layer] for layer in row["layers"]])
        same = rank_correlation([q, before])[0, 1]
        lines.append(
            f"{row['cut']} removed: Q at the points that stay differs by {np.abs(q - before).mean():.4f} in the mean "
            f"and {np.abs(q - before).max():.4f} at the most; rank correlation of the two curves {same:.3f}; "
            f"last point {before[-1]:.3f} before, {q[-1]:.3f} after."
        )
    return " ".join(lines)
