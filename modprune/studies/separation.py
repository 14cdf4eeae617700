"""Do the classes part as Q rises? t-SNE and feature graph of every layer beside its Q. Lu et al. (ECCV 2022).

Van der Maaten and Hinton, "Visualizing Data using t-SNE" (2008), by scikit-learn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from modprune._inputs import first_sample
from modprune.curve import check_classes
from modprune.features import GIB, LayerGrams
from modprune.graph import FeatureGraph, feature_graph_from_gram, graph_modularity
from modprune.samples import draw_samples, labels_of
from modprune.studies.layers import layers_of
from modprune.studies.study import INKS, MARKERS, Parts, Study, extra, panels, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def separation(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    k: int = 3,
    samples: int = 500,
    seed: int = 0,
    budget: int = GIB,
    parts: Parts | None = None,
) -> Study:
    """Two dimensions by t-SNE for every point of the curve, from the cosines that the feature graph is made of.

    Args:
        model: left as found.
        loader: calibration batches, `(inputs, labels, ...)`.
        k, samples: see `modularity_curve`.
        seed: of t-SNE.
        budget: bytes that features may take at a time.
        parts: where finished layers are kept.

    Raises:
        ValueError: as `modularity_curve`.
        ModuleNotFoundError: without networkx; names the extra to install.
    """
    extra("networkx")  # better told now than after the long part
    parts = parts or Parts()
    layers = layers_of(model, first_sample(loader))
    sample = next(draw_samples(loader, samples, 1))
    labels = labels_of(sample)
    check_classes(labels)
    rows = []
    for layer, gram in tqdm(LayerGrams(model, layers, budget)(sample), "t-SNE", len(layers), leave=False):
        at = parts(layer, _embedded, gram, seed)
        graph = feature_graph_from_gram(gram, k)
        rows.append({
            "layer": layer,
            "q": graph_modularity(graph, labels),
            "silhouette": _silhouette(at, labels),
            "at": at,
            "edges": _edges(graph),
        })  # fmt: skip
    numbers = {"k": k, "samples": samples, "seed": seed, "labels": labels.tolist(), "layers": rows}
    return Study("separation", numbers, draw(numbers), tell(numbers))


def _embedded(gram: Tensor, seed: int) -> list[list[float]]:
    """(N, 2) from inner products, beginning with the first two principal components."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    cosine = (gram * unit[:, None] * unit).double().cpu()
    centred = cosine - cosine.mean(0) - cosine.mean(1, keepdim=True) + cosine.mean()
    values, vectors = torch.linalg.eigh(centred)
    start = vectors[:, -2:] * values[-2:].clamp_min(0).sqrt()
    start = 1e-4 * start / start[:, 1].std().clamp_min(1e-30)
    distance = (1 - cosine).clamp_min(0).fill_diagonal_(0).numpy()
    perplexity = min(30.0, (len(cosine) - 1) / 3)
    tsne = TSNE(init=start.numpy(), metric="precomputed", perplexity=perplexity, random_state=seed)
    # Its pool of threads and torch's would wait for each other, where cores are few, longer than they work.
    with threadpool_limits(1):
        at: list[list[float]] = tsne.fit_transform(distance).round(3).tolist()
    return at


def _edges(graph: FeatureGraph) -> list[list[int]]:
    """Pairs of samples with an edge between them, each once."""
    rows = torch.arange(len(graph.weights), device=graph.weights.device)[:, None].expand_as(graph.neighbours)
    pairs = torch.stack([rows, graph.neighbours.cpu()], -1)[graph.weights.cpu() > 0]
    edges: list[list[int]] = pairs.sort(1).values.unique(dim=0).tolist()
    return edges


def _silhouette(at: list[list[float]], labels: Tensor) -> float:
    """How far the classes lie apart in the picture, from -1 to 1 (Rousseeuw 1987)."""
    from sklearn.metrics import silhouette_score

    return float(silhouette_score(at, labels.cpu().numpy()))


def draw(numbers: Mapping[str, Any]) -> Figure:
    """A panel for each layer: its feature graph, classes by colour and marker; the last shows Q along the layers."""
    networkx = extra("networkx")
    rows, labels = numbers["layers"], np.array(numbers["labels"])
    with style():
        figure, axes = panels(len(rows) + 1, 4, 1.7)
        for ax, row in zip(axes, rows, strict=False):
            at, graph = np.array(row["at"]), networkx.Graph(row["edges"])
            if row["edges"]:
                edges = networkx.draw_networkx_edges(graph, at, ax=ax, width=0.25, edge_color="0.75")
                edges.set_rasterized(True)  # thousands of them would be most of the SVG file
            for n, label in enumerate(np.unique(labels)):
                mine = at[labels == label]
                ink, marker = f"C{n % 10}", MARKERS[(n + n // 10) % len(MARKERS)]  # a hundred pairs
                ax.scatter(*mine.T, s=4, marker=marker, color=ink, linewidths=0)
            ax.set_title(f"{row['layer']}: Q = {row['q']:.3f}", fontsize=7)
            ax.set_axis_off()
        axes[-1].plot([row["q"] for row in rows], "o-", ms=3, color=INKS[0])
        axes[-1].set_title("Q along the layers", fontsize=7)
        axes[-1].set_xlabel("points in forward order")
        classes = axes[0].collections[-len(np.unique(labels)) :]
        figure.legend(
            classes,
            np.unique(labels),
            title="class",
            ncols=10,
            markerscale=2,
            frameon=False,
            loc="outside lower center",
        )
    return figure


def tell(numbers: Mapping[str, Any]) -> str:
    """What was measured, in words."""
    rows = numbers["layers"]
    q, apart = ([row[name] for row in rows] for name in ("q", "silhouette"))
    text = (
        f"t-SNE of {numbers['samples']} images at {len(rows)} points, from the same cosines as the feature graph, "
        f"whose edges (k = {numbers['k']}) are drawn beneath. "
        f"Q goes from {q[0]:.3f} at {rows[0]['layer']} to {q[-1]:.3f} at {rows[-1]['layer']}; the silhouette of the "
        f"classes in the picture from {apart[0]:.3f} to {apart[-1]:.3f}."
    )
    if np.std(q) > 0 and np.std(apart) > 0:
        text += f" Their correlation over the layers is {np.corrcoef(q, apart)[0, 1]:.3f}."
    return text
