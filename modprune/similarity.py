"""How alike two layers' features of the same samples are, in float64, of which few are held at a time."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SLAB, FEW = 2**14, 8  # columns, and samples, that are held in float64 at a time


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of two layers' features of the same samples, from unbiased estimates of its three HSICs.

    1 for equal features, about 0 for unrelated ones, 0 where one of the two is constant.

    Args:
        x, y: (N, ...) each; N at least 4.
    """
    k, gram = _gram(x), _gram(y)
    between, within = _hsic(k, gram), _hsic(k, k) * _hsic(gram, gram)
    if not math.isfinite(within):
        raise ValueError("features of a block hold NaN or infinity: check the model and its inputs")
    return between / within**0.5 if within > 0 else 0.0


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine of tokens where features are (B, T, C), else of samples; of what is equal, zeros too, it is 1.

    Args:
        x, y: (B, ...) each, of one shape.
    """
    return float(torch.cat([_cosines(a, b) for a, b in zip(x.split(FEW), y.split(FEW), strict=True)]).mean())


def _gram(x: Tensor) -> Tensor:
    """Inner products (N, N) of flattened rows, summed up over slabs of columns."""
    total = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for columns in x.flatten(1).split(SLAB, 1):
        exact = columns.double()
        total.addmm_(exact, exact.T)
    return total


def _hsic(k: Tensor, gram: Tensor) -> float:
    """The unbiased HSIC of two (N, N) Gram matrices: Song et al., JMLR 2012, equation 5."""
    n = len(k)
    k, gram = (g - torch.diag(g.diagonal()) for g in (k, gram))
    trace, cross = (k * gram).sum(), k.sum(0) @ gram.sum(0)
    return float(trace + k.sum() * gram.sum() / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)) / (n * (n - 3))


def _cosines(x: Tensor, y: Tensor) -> Tensor:
    x, y = (z.double() if z.ndim == 3 else z.flatten(1).double() for z in (x, y))
    return torch.where((x == y).all(-1), 1, F.cosine_similarity(x, y, dim=-1))
