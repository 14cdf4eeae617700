"""Autograd's graph is read right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modprune._autograd import differentiable_tensors, edge, identity_path, last_sum, operands


@pytest.mark.parametrize(
    ("function", "path", "sums"),
    [
        (lambda x, w: x + w * x, "branch", 2),
        (lambda x, w: (w * x + x.t().t()).relu(), "branch", 2),
        (lambda x, w: x - w * x, "branch", 0),
        (lambda x, w: w * x - x, "", 0),
        (lambda x, w: x + w, "other", 2),
        (lambda x, w: x + x.sin(), "", 2),
        (lambda x, w: w * x, "", 0),
        (lambda x, w: torch.add(w * x, x, alpha=3), "", 0),
        (lambda x, w: (x + w * x + 0).tanh(), "branch", 2),
        (lambda x, w: x + w * x + w * x, "branch", 2),
        (lambda x, w: F.layer_norm(x + w * x, (2,)), "branch", 0),  # post-norm
        (lambda x, w: F.group_norm(x + w * x, 2), "branch", 0),
        (lambda x, w: F.batch_norm(x + w * x, torch.zeros(2), torch.ones(2)).relu(), "branch", 0),
        (lambda x, w: F.batch_norm(x, torch.zeros(2), torch.ones(2)) + w * x, "", 2),  # the shortcut is norm(x)
        (lambda x, w: F.layer_norm(F.layer_norm(x + w * x, (2,)) + w, (2,)), "branch", 0),
        (lambda x, w: F.layer_norm(x, (2,)) + w * x, "", 2),  # the shortcut is norm(x)
    ],
)
def test_paths_and_sums(function, path, sums):
    x, w = torch.randn(2, 2, requires_grad=True).clone(), nn.Parameter(torch.randn(2, 2))
    y = function(x, w)
    assert identity_path(edge(y), edge(x), {}) == path
    total = last_sum(edge(y))
    assert (0 if total is None else len(operands(total))) == sums


def test_the_other_half_of_a_split_is_another_value():
    x, other = torch.randn(2, 4, requires_grad=True).clone().chunk(2, dim=1)
    w = nn.Parameter(torch.randn(2, 2))
    assert identity_path(edge(other + w * x), edge(x), {}) == ""
    assert identity_path(edge(x + w * x), edge(x), {}) == "branch"


def test_tensors_of_an_output_are_found_in_any_form():
    a, b = torch.ones(2, requires_grad=True) * 1, torch.ones(2)
    found = differentiable_tensors({"x": (a, [b, None]), "y": a})
    assert [t is a for t in found] == [True, True]
    assert differentiable_tensors("text") == []
