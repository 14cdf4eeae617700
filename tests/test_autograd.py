"""Autograd's graph is read right, and the model is left as found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modprune import find_blocks
from modprune._autograd import (
    differentiable_tensors,
    edge,
    identity_path,
    last_sum,
    operands,
    record_calls,
    traceable,
)
from tests.oracles import snapshot


class Noisy(nn.Module):
    """Counts its calls in a buffer and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x + torch.rand(()))


def test_buffers_and_random_numbers_come_back():
    model = Noisy()
    before = snapshot(model)
    with traceable(model):
        model(torch.zeros(1, 2))
    assert snapshot(model) == before


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
    total = last_sum(y.grad_fn)
    assert (0 if total is None else len(operands(total))) == sums


def test_the_other_half_of_a_split_is_another_value():
    x, other = torch.randn(2, 4, requires_grad=True).clone().chunk(2, dim=1)
    w = nn.Parameter(torch.randn(2, 2))
    assert identity_path(edge(other + w * x), edge(x), {}) == ""
    assert identity_path(edge(x + w * x), edge(x), {}) == "branch"


def test_calls_are_counted_and_keep_what_went_in():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)))
    with traceable(model):
        assert list(record_calls(model, torch.ones(1, 2))[0]) == ["1"]
        calls, output = record_calls(model, torch.tensor([[1.0, 2.0]]), leaves=True)
    assert list(calls) == ["0", "1", "1.0"]
    assert calls["0"].x.tolist() == [[1.0, 2.0]]
    assert calls["1"].end == edge(output)
    assert [seen.times for seen in calls.values()] == [1, 1, 1]


class InPlace(nn.Module):
    """Adds into a view of what a layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x):
        y = self.layer(x)[:, :2]
        y += x
        return y


def test_a_sum_in_place_into_a_view_is_seen_and_done():
    model, x = nn.Sequential(nn.Linear(2, 2), InPlace()), torch.randn(1, 2)
    with traceable(model):
        calls, output = record_calls(model, x)
    seen = calls["1"]
    assert find_blocks(model, x).names == ("1",)
    assert identity_path(seen.end, seen.start, {}) == "branch"
    assert torch.equal(output, model(x))


def test_tensors_of_an_output_are_found_in_any_form():
    a, b = torch.ones(2, requires_grad=True) * 1, torch.ones(2)
    found = differentiable_tensors({"x": (a, [b, None]), "y": a})
    assert [t is a for t in found] == [True, True]
    assert differentiable_tensors("text") == []
