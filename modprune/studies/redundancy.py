"""Does removing what raises Q cost accuracy, and removing what does not, not? Lu et al. (ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn
from tqdm import tqdm

from modprune._inputs import first_sample
from modprune.blocks import find_blocks
from modprune.curve import modularity_curve
from modprune.evaluate import evaluate
from modprune.samples import drawn
from modprune.studies.layers import layers_of
from modprune.studies.plateaus import by_gain
from modprune.studies.recovery import cut, has_statistics, recover
from modprune.studies.study import Parts, Study, looks, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STAGES = ("at once", "batch norm", "fine-tuned")


def redundancy(
    model: nn.Module,
    loader: Iterable[Any],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    cuts: int = 3,
    epochs: int = 0,
    lr: float = 0.05,
    k: int = 3,
    samples: int = 500,
    repeats: int = 5,
    parts: Parts | None = None,
) -> Study:
    """Cuts of 1 to `cuts` blocks of the least gain, and as many of the largest: change of Q beside change of Top-1.

    Args:
        model: left as found.
        loader: calibration batches, `(inputs, labels, ...)`.
        train_loader: what each cut recovers on.
        val_loader: what Top-1 is measured on; nothing is chosen by it.
        cuts: blocks of the largest cut.
        epochs, lr: of the fine-tuning of each cut, the uncut network as teacher; 0 leaves it out.
        k, samples, repeats: see `modularity_curve`.
        parts: where finished cuts are kept.

    Raises:
        ValueError: as `modularity_curve`, and if the network has fewer than 2 x `cuts` blocks.
    """
    parts, example = parts or Parts(), first_sample(loader)
    layers = layers_of(model, example)
    images = [piece for sample in drawn(loader, samples, repeats) for piece in sample]  # the same for all cuts
    curve = modularity_curve(model, images, k, samples, repeats, layers=layers)
    order = by_gain(curve, find_blocks(model, example).names)
    if not 0 < 2 * cuts <= len(order):
        raise ValueError(f"cuts={cuts}: of {len(order)} blocks, from 1 to {len(order) // 2} can be cut at either end")
    gain = dict(zip(layers[1:], curve.gain.tolist(), strict=True))
    before = {"q": float(curve.mean[-1]), "top1": parts("whole", lambda: evaluate(model, val_loader).top1)}

    def state(pruned: nn.Module) -> dict[str, float]:
        # A removed block leaves a pass-through under its name, so the last layer is always there.
        q = modularity_curve(pruned, images, k, samples, repeats, layers=layers[-1:]).mean[-1]
        return {"q": float(q), "top1": evaluate(pruned, val_loader).top1}

    def measured(remove: list[str]) -> dict[str, Any]:
        pruned = cut(model, remove, example)
        states = {STAGES[0]: state(pruned)}
        if has_statistics(pruned):
            recover(pruned, train_loader, model, 0, lr)
            states[STAGES[1]] = state(pruned)
        if epochs:
            recover(pruned, train_loader, model, epochs, lr)
            states[STAGES[2]] = state(pruned)
        return {"removed": remove, "gain": sum(gain[name] for name in remove), "states": states}

    ends = {"redundant": order, "needed": order[::-1]}
    bar = tqdm([(kind, count) for kind in ends for count in range(1, cuts + 1)], "cuts", leave=False)
    rows = [{"kind": end, "blocks": n} | parts(f"{end} {n}", measured, ends[end][:n]) for end, n in bar]
    numbers = {"k": k, "samples": samples, "epochs": epochs, "before": before, "cuts": rows}
    return Study("redundancy", numbers, draw(numbers), tell(numbers))


def draw(numbers: Mapping[str, Any]) -> Figure:
    """A panel for each state after the cut: change of Q at the last layer across, change of Top-1 upwards."""
    rows, before = numbers["cuts"], numbers["before"]
    stages = [stage for stage in STAGES if stage in rows[0]["states"]]
    with style():
        figure, axes = panels(len(stages), len(stages), 2.4)
        for ax, stage in zip(axes, stages, strict=True):
            for kind, (ink, marker) in zip(("redundant", "needed"), looks(2), strict=True):
                mine = [row for row in rows if row["kind"] == kind]
                x = [row["states"][stage]["q"] - before["q"] for row in mine]
                y = [row["states"][stage]["top1"] - before["top1"] for row in mine]
                ax.plot(x, y, marker=marker, ms=5, lw=0.7, color=ink, label=kind)
                for row, *at in zip(mine, x, y, strict=True):
                    ax.annotate(str(row["blocks"]), at, xytext=(4, 3), textcoords="offset points", fontsize=7)
            ax.axhline(0, color="0.7", lw=0.6, zorder=0)
            ax.set_title(stage)
            ax.set_xlabel("change of Q, last layer")
            ax.locator_params(axis="x", nbins=4)
        axes[0].set_ylabel("change of Top-1, points")
        axes[0].legend(frameon=False)
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    rows, before = numbers["cuts"], numbers["before"]
    lines = [f"Before: Q of the last layer {before['q']:.3f}, Top-1 {before['top1']:.2f} %."]
    for stage in rows[0]["states"]:
        for row in (rows[len(rows) // 2 - 1], rows[-1]):
            state = row["states"][stage]
            lines.append(
                f"{row['blocks']} {row['kind']} removed, {stage}: Q {state['q'] - before['q']:+.3f}, Top-1 "
                f"{state['top1'] - before['top1']:+.2f} points."
            )
    last = list(rows[0]["states"])[-1]
    q, top1 = ([row["states"][last][name] for row in rows] for name in ("q", "top1"))
    if np.std(q) > 0 and np.std(top1) > 0:
        lines.append(f"Correlation of the two changes over all cuts, {last}: {np.corrcoef(q, top1)[0, 1]:.3f}.")
    return " ".join(lines)
