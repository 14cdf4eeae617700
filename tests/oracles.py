"""Independent answers to compare with: networkx for Q, brute force for plans."""

from __future__ import annotations

import itertools
from fractions import Fraction

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from modprune.budget import Budget, Candidate
from modprune.graph import FeatureGraph


def networkx_q(graph: FeatureGraph, labels: Tensor) -> float:
    """Modularity by networkx of the undirected graph `(A + A^T) / 2`."""
    undirected = nx.Graph()
    undirected.add_nodes_from(range(len(labels)))
    for i, (js, ws) in enumerate(zip(graph.neighbours.tolist(), graph.weights.tolist(), strict=True)):
        for j, w in zip(js, ws, strict=True):
            if w > 0:
                before = undirected.get_edge_data(i, j, {"weight": 0.0})["weight"]
                undirected.add_edge(i, j, weight=before + w / 2)
    communities = [set(np.flatnonzero(labels.numpy() == c).tolist()) for c in np.unique(labels.numpy())]
    return nx.community.modularity(undirected, communities, weight="weight")


def loop_knn(features: Tensor, k: int) -> list[dict[int, float]]:
    """The k largest positive cosines of each sample, by a loop in float64."""
    rows = features.flatten(1).double()
    norms = rows.norm(dim=1)
    result = []
    for i in range(len(rows)):
        cosines = {
            j: float(rows[i] @ rows[j] / (norms[i] * norms[j])) if norms[i] > 0 and norms[j] > 0 else 0.0
            for j in range(len(rows))
            if j != i
        }
        best = sorted(cosines, key=lambda j: -cosines[j])[:k]
        result.append({j: cosines[j] for j in best if cosines[j] > 0})
    return result


def best_set(candidates: list[Candidate], budget: Budget, macs: int, params: int) -> tuple[str, ...] | None:
    """The choice among all subsets; None where no subset meets the budget."""
    best: tuple[tuple[object, ...], tuple[int, ...]] | None = None
    for size in range(1, len(candidates) + 1):
        if budget.blocks is not None and size != budget.blocks:
            continue
        for chosen in itertools.combinations(range(len(candidates)), size):
            freed = sum(candidates[i].macs for i in chosen), sum(candidates[i].params for i in chosen)
            if freed[0] < Fraction(budget.flops or 0) * macs or freed[1] < Fraction(budget.params or 0) * params:
                continue
            score = sum(Fraction(candidates[i].score) for i in chosen)
            key = (score, *freed, tuple(sorted(-i for i in chosen)))
            if best is None or key < best[0]:
                best = key, chosen
    return None if best is None else tuple(candidates[i].name for i in best[1])


def snapshot(model: nn.Module) -> list[object]:
    """All that a visit could change, comparable by `==`."""
    modules = [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    tensors = [(k, t.clone().view(-1).tolist()) for k, t in model.state_dict(keep_vars=False).items()]
    return [modules, tensors, [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist()]
