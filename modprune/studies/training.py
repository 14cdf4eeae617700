"""Q of every layer over the epochs of a training run: which layers settle when? Lu et al. (ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from modprune._inputs import take
from modprune.curve import ModularityCurve, q_of
from modprune.features import LayerGrams
from modprune.finetune import Epoch, finetune
from modprune.samples import drawn
from modprune.studies.layers import layers_of
from modprune.studies.study import INKS, Parts, Study, looks, panels, plural, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class CurveRecorder:
    """The modularity curve after each epoch of one's own training loop, on the same images every time.

    Args:
        model: the one that is trained; left as found at every call.
        loader: calibration batches, `(inputs, labels, ...)`; read once.
        k, samples, repeats: see `modularity_curve`.
        layers: names of sub-modules; the stem and the blocks, or the weight layers of a chain, if None.

    Raises:
        ValueError: as `modularity_curve`.

    >>> import torch
    >>> from modprune.models import resnet20
    >>> batches = [(torch.randn(40, 3, 8, 8), torch.arange(40) % 4)]
    >>> recorder = CurveRecorder(resnet20(), batches, samples=40)
    >>> len(recorder(1, top1=10.0).layers), recorder.rows[0]["top1"]
    (10, 10.0)
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        *,
        k: int = 3,
        samples: int = 500,
        repeats: int = 1,
        layers: Sequence[str] | None = None,
    ) -> None:
        self.k, self.rows = k, list[dict[str, Any]]()
        self._samples = drawn(loader, samples, repeats)
        self.layers = tuple(layers or layers_of(model, take(self._samples[0][0][0], 0, 1)))
        self._grams = LayerGrams(model, self.layers)

    def __call__(self, epoch: int, **values: float) -> ModularityCurve:
        """Measure now; `values`, such as top1, are kept beside the curve in `rows`."""
        curve = ModularityCurve(self.layers, np.array([q_of(self._grams, s, self.k) for s in self._samples]))
        self.rows = [row for row in self.rows if row["epoch"] < epoch]
        self.rows.append({"epoch": epoch, "q": curve.mean.tolist(), "std": curve.std.tolist(), **values})
        return curve

    def study(self) -> Study:
        """What has been recorded, as a study.

        Raises:
            ValueError: for fewer than two epochs.
        """
        if len(self.rows) < 2:
            raise ValueError(f"{plural(len(self.rows), 'epoch')} recorded: a study of their course needs at least 2")
        numbers = {"k": self.k, "layers": list(self.layers), "epochs": self.rows}
        return Study("training", numbers, draw(numbers), tell(numbers))


def training(
    model: nn.Module,
    loader: Iterable[Any],
    train_loader: Iterable[Any],
    val_loader: Iterable[Any],
    *,
    epochs: int = 30,
    lr: float = 0.1,
    k: int = 3,
    samples: int = 500,
    checkpoints: str | Path | None = None,
    parts: Parts | None = None,
) -> Study:
    """Train `model` in place by `modprune.finetune`, without a teacher, and record its curve after every epoch.

    Args:
        model: with fresh weights, or trained ones to go on with; its curve before the first epoch is recorded too.
        loader: calibration batches, `(inputs, labels, ...)`.
        train_loader, val_loader: see `modprune.finetune`.
        epochs, lr: of the training.
        k, samples: see `modularity_curve`.
        checkpoints: a folder for the state after each epoch; gone on with, if `parts` holds earlier epochs.
        parts: where curves are kept.

    Raises:
        ValueError: as `modularity_curve` and `finetune`.
    """
    parts, recorder = parts or Parts(), CurveRecorder(model, loader, k=k, samples=samples)
    resume = bool(parts.known)
    recorder.rows = parts.known.get("rows", [])

    def after(epoch: Epoch) -> None:
        recorder(epoch.epoch, top1=float(epoch.top1 or 0), loss=epoch.loss)
        parts.keep("rows", recorder.rows)

    if not resume:
        recorder(0)
        parts.keep("rows", recorder.rows)
    finetune(
        model, train_loader, val_loader, checkpoints=checkpoints, resume=resume, after_epoch=after, epochs=epochs, lr=lr
    )
    return recorder.study()


def draw(numbers: Mapping[str, Any]) -> Figure:
    """Q of up to eight layers, from shallow to deep, over the epochs; beside it Top-1."""
    layers, rows = numbers["layers"], numbers["epochs"]
    shown = sorted({round(i) for i in np.linspace(0, len(layers) - 1, min(len(layers), len(INKS)))})
    epochs = [row["epoch"] for row in rows]
    with style():
        figure, axes = panels(2, 2, 2.8)
        for i, (ink, marker) in zip(shown, looks(len(shown)), strict=True):
            axes[0].plot(epochs, [row["q"][i] for row in rows], marker=marker, ms=3, lw=1, color=ink, label=layers[i])
        axes[0].set_ylabel("modularity Q")
        figure.legend(frameon=False, ncols=4, loc="outside lower center")
        known = [row for row in rows if "top1" in row]
        axes[1].plot([row["epoch"] for row in known], [row["top1"] for row in known], "o-", ms=3, lw=1, color=INKS[0])
        axes[1].set_ylabel("Top-1, %")
        for ax in axes:
            ax.set_xlabel("epoch")
            ax.locator_params(axis="x", integer=True, min_n_ticks=1)  # nothing is measured between epochs
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    layers, rows = numbers["layers"], numbers["epochs"]
    q = np.array([row["q"] for row in rows])
    first, last = rows[0]["epoch"], rows[-1]["epoch"]
    when = f"after epochs {first} to {last}" if first else f"before training and after each of {plural(last, 'epoch')}"
    text = (
        f"Q at {len(layers)} points {when}, k = {numbers['k']}. "
        f"First point {q[0, 0]:.3f} to {q[-1, 0]:.3f}, last point {q[0, -1]:.3f} to {q[-1, -1]:.3f}"
    )
    text += f", Top-1 {rows[-1]['top1']:.2f} % at the end." if "top1" in rows[-1] else "."
    since = [rows[settled(q[:, i])]["epoch"] for i in range(len(layers))]
    moved, half = np.ptp(q[1:], 0), len(layers) // 2
    return text + (
        " The epoch from which Q stays within a tenth of its range of its last value: "
        f"{np.mean(since[:half]):.1f} in the mean for the shallow half of the points, "
        f"{np.mean(since[half:]):.1f} for the deep half. After the first epoch Q still moves over a range of "
        f"{moved[:half].mean():.3f} and {moved[half:].mean():.3f} in the mean."
    )


def settled(q: np.ndarray) -> int:
    """First row from which on all lie within a tenth of the range from the last."""
    outside = np.nonzero(np.abs(q - q[-1]) > 0.1 * np.ptp(q))[0]
    return int(outside[-1] + 1) if len(outside) else 0
