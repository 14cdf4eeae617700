"""Do attacks blur the classes? Q under attack against Q of the clean images. Lu et al. (ECCV 2022)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from modprune._inputs import device_of, split_batch
from modprune._state import evaluating
from modprune.curve import check_classes, q_of
from modprune.distill import logits_of
from modprune.features import LayerGrams
from modprune.samples import Sample
from modprune.studies.adversarial import ATTACKS
from modprune.studies.layers import layers_of
from modprune.studies.study import Parts, Study, looks, panels, plural, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 100


def attacks(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    names: Sequence[str] = tuple(ATTACKS),
    k: int = 3,
    samples: int = 500,
    parts: Parts | None = None,
) -> Study:
    """The curve of images that the network gets right, and of the same images under each attack.

    As the paper selects them: images that the network classifies correctly, and for each attack those of them that it
    turns wrong, held against the same ones clean.

    Args:
        model: an image classifier, left as found.
        loader: batches of normalised images, `(images, labels, ...)`.
        mean, std: per channel, what the images were normalised by: attacks work on [0, 1].
        names: of the attacks: "fgsm", "pgd", "cw", "jsma", "one_pixel", "local_search".
        k, samples: see `modularity_curve`.
        parts: where finished attacks are kept.

    Raises:
        ValueError: as `modularity_curve`; for an unknown attack; for fewer correct images than `samples`.
    """
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise ValueError(f"attack {unknown[0]!r} is unknown: give some of {', '.join(ATTACKS)}")
    parts, device = parts or Parts(), device_of(model)
    shift, scale = (torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (mean, std))

    def classify(images: Tensor) -> Tensor:
        return logits_of(model((images - shift) / scale))

    def batches_of(images: Tensor, labels: Tensor) -> Sample:
        normed = ((batch - shift) / scale for batch in images.split(BATCH))
        return list(zip(normed, labels.split(BATCH), strict=True))

    with evaluating(model):
        images, labels = _correct(classify, loader, samples, shift, scale)
        layers = layers_of(model, (images[:1] - shift) / scale)
        check_classes(labels)

        def measured(name: str) -> dict[str, Any]:
            batches = zip(images.split(BATCH), labels.split(BATCH), strict=True)
            total = -(-len(images) // BATCH)
            hit = torch.cat([ATTACKS[name](classify, *b) for b in tqdm(batches, name, total, leave=False)])
            with torch.no_grad():
                wrong = torch.cat([classify(x).argmax(1) for x in hit.split(BATCH)]) != labels
            grams = LayerGrams(model, layers)
            row: dict[str, Any] = {
                "fooled": int(wrong.sum()),
                "distance": float((hit - images)[wrong].flatten(1).norm(dim=1).mean()) if wrong.any() else 0.0,
            }
            if int(wrong.sum()) > k and 1 < len(labels[wrong].unique()) < int(wrong.sum()):
                for kind, x in (("q", hit), ("clean", images)):
                    row[kind] = q_of(grams, batches_of(x[wrong], labels[wrong]), k)
            return row

        clean = parts("clean", lambda: q_of(LayerGrams(model, layers), batches_of(images, labels), k))
        rows = [{"attack": name} | parts(name, measured, name) for name in dict.fromkeys(names)]
    numbers = {"k": k, "samples": samples, "layers": layers, "clean": clean, "attacks": rows}
    return Study("attacks", numbers, draw(numbers), tell(numbers))


def _correct(
    classify: Callable[[Tensor], Tensor], loader: Iterable[Any], samples: int, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The first `samples` images, in [0, 1], that the network gets right, and their labels."""
    kept: list[tuple[Tensor, Tensor]] = []
    for batch in loader:
        inputs, labels = split_batch(batch)
        if labels is None:
            raise ValueError("the batches hold no labels: give (images, labels)")
        images, labels = (inputs.to(shift.device) * scale + shift).clamp(0, 1), labels.to(shift.device)
        with torch.no_grad():
            right = classify(images).argmax(1) == labels
        kept.append((images[right], labels[right]))
        if sum(len(y) for _, y in kept) >= samples:
            images, labels = (torch.cat(parts)[:samples] for parts in zip(*kept, strict=True))
            return images, labels
    found = sum(len(y) for _, y in kept)
    raise ValueError(
        f"the network gets {plural(found, 'image')} right, {samples} are asked for: ask for {found} at most"
    )


def draw(numbers: Mapping[str, Any]) -> Figure:
    """Left Q along the layers, clean and under each attack; right the change that each attack makes."""
    rows = [row for row in numbers["attacks"] if "q" in row]
    x = range(len(numbers["layers"]))
    with style():
        figure, axes = panels(2, 2, 2.7)
        axes[0].plot(x, numbers["clean"], color="black", lw=1.6, label="clean")
        for row, (ink, marker) in zip(rows, looks(len(rows)), strict=True):
            axes[0].plot(x, row["q"], marker=marker, ms=3, lw=1, color=ink, label=row["attack"])
            axes[1].plot(x, np.subtract(row["q"], row["clean"]), marker=marker, ms=3, lw=1, color=ink)
        axes[1].axhline(0, color="black", lw=1.6)
        axes[0].set_ylabel("modularity Q")
        axes[1].set_ylabel("Q under attack less Q clean")
        axes[0].legend(frameon=False)
        for ax in axes:
            ax.set_xlabel("points after the stem")
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    lines = [
        f"{numbers['samples']} images that the network gets right; for each attack, those that it turns wrong, held "
        f"against the same ones clean; k = {numbers['k']}."
    ]
    for row in numbers["attacks"]:
        if row["fooled"] == 0:
            lines.append(f"{row['attack']}: changes the answer to no image, so there is nothing to compare.")
        elif "q" not in row:
            lines.append(
                f"{row['attack']}: changes the answer to {plural(row['fooled'], 'image')}, too few for a graph."
            )
        else:
            change = np.subtract(row["q"], row["clean"])
            lines.append(
                f"{row['attack']}: {plural(row['fooled'], 'image')} turned wrong, mean distance {row['distance']:.2f}; "
                f"Q of the first point {change[0]:+.3f}, of the last {change[-1]:+.3f}."
            )
    return " ".join(lines)
