"""The feature graph of one layer and its modularity: pure tensors in, a number out.

Lu et al., "Understanding the Dynamics of DNNs Using Graph Modularity" (ECCV 2022), section 3; modularity after
Newman, "Modularity and community structure in networks" (PNAS 2006).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from modprune._inputs import is_whole

# Up to N = WHOLE samples (256 MiB), and N = A_COLUMN times the columns of the features, the whole N x N matrix of
# similarities is held: its symmetry saves half of the products. Otherwise rows are worked off in blocks that stay in
# the cache between the steps, which costs less than to mirror a matrix that is large beside its features.
WHOLE, A_COLUMN = 8192, 8
BLOCK = 2**21
# Columns of such a matrix that are computed at a time: narrower panels multiply more slowly, wider ones compute more
# entries twice.
PANEL = 128
# Columns per run: only the runs with the largest maxima are sorted.
RUN = 64
# Squares and products of float32 norms within these bounds neither overflow nor vanish.
SAFE_NORMS = (1e-15, 1e15)


@dataclass(frozen=True)
class FeatureGraph:
    """A directed weighted k-nearest-neighbour graph.

    Attributes:
        neighbours: (N, k) int64, for each sample its k most similar others.
        weights: (N, k) float32, their cosine similarities; 0 where that is not positive, which means no edge.
    """

    neighbours: Tensor
    weights: Tensor


def modularity(features: Tensor, labels: Tensor, k: int = 3) -> float:
    """Q: how well `labels` partition the k-nearest-neighbour graph of `features` by cosine similarity.

    Args:
        features: (N, ...) floating point, any device; each sample is flattened. Half precision is computed in float32.
        labels: (N,) integers; any values, equal ones are one class.
        k: neighbours of each sample, from 1 to N - 1.

    Returns:
        Q, from -0.5 to 1; 0 with a RuntimeWarning where no pair of samples has positive similarity.

    Raises:
        ValueError: for shapes, types or `k` that do not fit, and for NaN or infinite features.

    Source: Lu et al. (ECCV 2022), section 3.

    >>> features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    >>> round(modularity(features, torch.tensor([0, 0, 1, 1]), k=1), 6)
    0.5
    """
    check_features(features)
    check_labels(labels, len(features))  # before the work, not after
    return graph_modularity(feature_graph(features, k), labels)


def feature_graph(features: Tensor, k: int = 3) -> FeatureGraph:
    """The k-nearest-neighbour graph of (N, ...) floating point features by cosine similarity.

    Memory beside the features: N x N float32 where N is at most 8192 and eight times the number of columns; else N k
    and a block of rows.

    Raises:
        ValueError: if features are not floating point, hold NaN or infinity or no columns, or `k` is not in 1..N-1.
    """
    check_features(features)
    k = check_k(k, len(features))
    rows = features.detach().flatten(1)
    rows = rows if rows.dtype == torch.float64 else rows.float()
    norms = _norms(rows)
    if _unsafe(rows, norms):
        rows = rows / rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
        norms = _norms(rows)
    inverse = _inverse(norms)
    if len(rows) <= min(WHOLE, A_COLUMN * rows.shape[1]):
        return _nearest(inner_products(rows), inverse, k)
    size = max(1, BLOCK // len(rows))
    # In one place from the start: small pieces kept between the blocks would keep the heap from using these again.
    neighbours = torch.empty(len(rows), k, dtype=torch.int64, device=rows.device)
    weights = torch.empty(len(rows), k, dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), size):
        part = _nearest(_product(rows[start : start + size], rows), inverse, k, start)
        neighbours[start : start + size], weights[start : start + size] = part.neighbours, part.weights
    return FeatureGraph(neighbours, weights)


def feature_graph_from_gram(gram: Tensor, k: int = 3) -> FeatureGraph:
    """The same graph from the (N, N) matrix of inner products of the samples, which is overwritten.

    Raises:
        ValueError: if a diagonal entry is NaN or infinite, or `k` is not in 1..N-1.
    """
    k = check_k(k, len(gram))
    norms = gram.diagonal().clone().sqrt()
    check_finite(norms)
    return _nearest(gram, _inverse(norms), k)


def graph_modularity(graph: FeatureGraph, labels: Tensor) -> float:
    """Q of the undirected graph `(A + A^T) / 2` under the partition `labels` ((N,) integers), in float64."""
    check_labels(labels, len(graph.weights))
    # On the CPU, which has float64, as not all devices have, and sums in one order.
    neighbours, weights, labels = graph.neighbours.cpu(), graph.weights.cpu().double(), labels.cpu()
    total = weights.sum()
    if total == 0:
        warnings.warn("the feature graph has no edge (no two samples are similar): Q = 0", RuntimeWarning, stacklevel=2)
        return 0.0
    classes, labels = labels.unique(return_inverse=True)
    inside = weights[labels[:, None] == labels[neighbours]].sum() / total
    strength = weights.sum(1).index_add(0, neighbours.flatten(), weights.flatten()) / 2
    share = strength.new_zeros(len(classes)).index_add(0, labels, strength) / total
    return float(inside - share.square().sum())


def check_k(k: int, samples: int) -> int:
    """`k`, as Python's own integer; raises ValueError unless 1 <= k < samples."""
    if not is_whole(k) or not 1 <= k < samples:
        raise ValueError(f"k={k!r} with {samples} samples: k is an integer, at least 1 and below the number of samples")
    return int(k)


def check_features(features: Tensor) -> None:
    """Raises ValueError unless features are a floating-point tensor with a row for each sample."""
    if not isinstance(features, Tensor):
        raise ValueError(f"features in a {type(features).__name__}: a tensor is needed, as torch.as_tensor makes it")
    if not features.is_floating_point() or features.ndim < 2 or features[:1].numel() == 0:
        raise ValueError(
            f"features of shape {tuple(features.shape)} and type {features.dtype}: "
            "floating point with a row of at least one value for each sample is needed"
        )


def check_labels(labels: Tensor, samples: int) -> None:
    """Raises ValueError unless labels are a tensor of `samples` integers."""
    if not isinstance(labels, Tensor):
        raise ValueError(f"labels in a {type(labels).__name__}: a tensor is needed, as torch.as_tensor makes it")
    if labels.shape != (samples,):
        raise ValueError(f"labels of shape {tuple(labels.shape)} for {samples} samples: one label each is needed")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels of type {labels.dtype}: integers that number the classes are needed")


def _norms(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=1)
    # An overflowing norm of finite values is no fault of theirs: those rows are looked at again.
    suspects = torch.nonzero(~norms.isfinite()).flatten()
    if len(suspects):
        check_finite(rows[suspects].abs().amax(1), suspects)
    return norms


def check_finite(values: Tensor, names: Tensor | None = None, where: str = "") -> None:
    """Raises ValueError unless the one value of each sample is finite; names the first of `names` that is not."""
    bad = torch.nonzero(~values.isfinite()).flatten()
    if len(bad):
        sample = int(bad[0] if names is None else names[bad[0]])
        raise ValueError(f"{where}the features of sample {sample} hold NaN or infinity: check the model and its inputs")


def _unsafe(rows: Tensor, norms: Tensor) -> bool:
    """Whether a product of norms may overflow or vanish; a norm of 0 may be a row of zeros or one that has vanished."""
    low, high = SAFE_NORMS
    return bool((norms > high).any() or rows[norms < low].any())


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, norms.reciprocal(), 0)


def inner_products(rows: Tensor) -> Tensor:
    """`rows @ rows.T`; on the CPU panel by panel, each without the rows that an earlier one has given."""
    if rows.device.type != "cpu":
        return _product(rows, rows)
    products = rows.new_empty(len(rows), len(rows))
    for start in range(0, len(rows), PANEL):
        stop = start + PANEL
        panel = _product(rows[start:], rows[start:stop])
        products[start:, start:stop] = panel
        products[start:stop, stop:] = panel[PANEL:].T
    return products


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T`; on the CPU by oneDNN, whose kernels use AVX-512 on every processor that has it."""
    plain = left.device.type == "cpu" and left.dtype == torch.float32 and left.is_contiguous()
    if plain and right.is_contiguous() and torch.backends.mkldnn.is_available():  # with strides, it takes minutes
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    with _whole_float32(left.device.type):
        return left @ right.T


@contextmanager
def _whole_float32(device: str) -> Iterator[None]:
    """Neither autocast nor TF32, whatever the caller has chosen: of such cosines too many are equal."""
    with torch.autocast(device, enabled=False):
        if device != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        name, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
        chosen = getattr(matmul, name)
        setattr(matmul, name, exact)
        try:
            yield
        finally:
            setattr(matmul, name, chosen)


def _nearest(gram: Tensor, inverse: Tensor, k: int, start: int = 0) -> FeatureGraph:
    """The k largest cosines of each row of a block of inner products (B, N) whose first row is sample `start`."""
    gram *= inverse
    gram.diagonal(start).fill_(-torch.inf)
    values, neighbours = _largest(gram, k)
    weights = values * inverse[start : start + len(gram), None]
    return FeatureGraph(neighbours, weights.clamp_min(0).float())


def _largest(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`rows.topk(k, dim=1)` for rows (B, N), faster where N is large.

    The k largest values lie in the k runs of columns with the largest maxima, and a maximum is cheaper than a sort.
    """
    runs = rows.shape[1] // RUN
    if runs < 8 * k:
        return rows.topk(k, dim=1)
    head, tail = rows[:, : runs * RUN].unflatten(1, (runs, RUN)), rows[:, runs * RUN :]
    best = head.amax(2).topk(k, dim=1).indices
    candidates = torch.cat([head.gather(1, best[..., None].expand(-1, -1, RUN)).flatten(1), tail], 1)
    values, at = candidates.topk(k, dim=1)
    run = at // RUN
    in_head = best.gather(1, run.clamp_max(k - 1)) * RUN + at % RUN
    return values, torch.where(run < k, in_head, at + (runs - k) * RUN)
