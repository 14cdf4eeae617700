"""How far apart two layers are: abs(Q_i - Q_j), inside blocks and after them, beside CKA.

Lu et al. (ECCV 2022); Kornblith et al., "Similarity of Neural Network Representations Revisited" (2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from modprune._inputs import first_sample
from modprune.blocks import find_blocks
from modprune.curve import check_classes
from modprune.features import GIB, LayerGrams
from modprune.graph import feature_graph_from_gram, graph_modularity, inner_products
from modprune.samples import Sample, draw_samples, labels_of
from modprune.studies.layers import in_order, layers_of, weight_layers
from modprune.studies.study import INKS, Parts, Study, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def difference(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    k: int = 3,
    samples: int = 500,
    repeats: int = 1,
    budget: int = GIB,
    parts: Parts | None = None,
) -> Study:
    """Differences of Q between all pairs of points, those inside blocks told from those after them, and linear CKA.

    Args:
        model: left as found.
        loader: calibration batches, `(inputs, labels, ...)`.
        k, samples, repeats: see `modularity_curve`.
        budget: bytes that features may take at a time.
        parts: where finished repeats are kept.

    Raises:
        ValueError: as `modularity_curve`.
    """
    parts, example = parts or Parts(), first_sample(loader)
    after = set(layers_of(model, example))
    inside = {layer for block in find_blocks(model, example) for layer in block.layers if block.kind != "plain"}
    inside = (inside & set(weight_layers(model))) - after
    layers = in_order(model, tuple(name for name, _ in model.named_modules() if name in after | inside), example)
    measured = [
        parts(f"repeat {repeat}", _repeat, LayerGrams(model, layers, budget), sample, k)
        for repeat, sample in enumerate(draw_samples(loader, samples, repeats))
    ]
    q = np.mean([part["q"] for part in measured], 0)
    numbers = {
        "k": k,
        "samples": samples,
        "layers": layers,
        "place": ["inside" if layer in inside else "after" for layer in layers],
        "q": q.tolist(),
        "difference": np.abs(q[:, None] - q[None]).tolist(),
        "cka": np.mean([part["cka"] for part in measured], 0).tolist(),
    }
    return Study("difference", numbers, draw(numbers), tell(numbers))


def _repeat(grams: LayerGrams, sample: Sample, k: int) -> dict[str, Any]:
    labels = labels_of(sample)
    check_classes(labels)
    q, centred = [], []
    for _, gram in tqdm(grams(sample), "layers", len(grams.layers), leave=False):
        centred.append(_centred(gram).flatten())
        q.append(graph_modularity(feature_graph_from_gram(gram, k), labels))
    return {"q": q, "cka": inner_products(torch.stack(centred)).tolist()}


def _centred(gram: Tensor) -> Tensor:
    """Inner products of the features less their mean, scaled to norm 1; all 0 where the features are all alike."""
    centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
    return centred / centred.norm().clamp_min(torch.finfo(gram.dtype).tiny)


def draw(numbers: Mapping[str, Any]) -> Figure:
    """The two heatmaps, points in forward order; ticks at the sides mark the points after blocks, names new stages."""
    after = [i for i, place in enumerate(numbers["place"]) if place == "after"]
    names = [numbers["layers"][i] for i in after]
    stages = [name.rpartition(".")[0] for name in names]
    shown = ["" if i == 0 or stages[i] == stages[i - 1] else name for i, name in enumerate(names)]
    with style():
        figure, axes = panels(2, 2, 3.1)
        for ax, name, title, colours in (
            (axes[0], "difference", r"$|Q_i - Q_j|$ (white: alike)", "Greys"),
            (axes[1], "cka", "linear CKA (white: alike)", "Greys_r"),
        ):
            image = ax.imshow(numbers[name], cmap=colours, origin="lower", interpolation="nearest")
            figure.colorbar(image, ax=ax, shrink=0.8)
            ax.set_title(title)
            ax.set_xticks(after, shown)
            ax.set_yticks(after, shown)
            ax.tick_params(length=3, color=INKS[1])
            ax.set_xlabel("points in forward order; ticks: after a block")
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    inside = np.array([place == "inside" for place in numbers["place"]])
    d, cka = np.array(numbers["difference"]), np.array(numbers["cka"])
    text = (
        f"{len(inside)} points, {int(inside.sum())} inside blocks and {int((~inside).sum())} at the stem or after a "
        f"block; {numbers['samples']} images, k = {numbers['k']}."
    )
    for name, rows, columns in (
        ("between two points after blocks", ~inside, ~inside),
        ("between two points inside", inside, inside),
        ("between a point inside and one after", inside, ~inside),
    ):
        pairs = rows[:, None] & columns[None] & ~np.eye(len(inside), dtype=bool)
        if pairs.any():
            text += f" Mean difference of Q {name}: {d[pairs].mean():.4f} (CKA {cka[pairs].mean():.3f})."
    near = np.diff(numbers["q"])
    change = inside[1:] != inside[:-1]
    if change.any() and not change.all():
        text += (
            f" From one point to the next, Q changes by {np.abs(near[change]).mean():.4f} where the path enters or "
            f"leaves a block and by {np.abs(near[~change]).mean():.4f} elsewhere."
        )
    return text
