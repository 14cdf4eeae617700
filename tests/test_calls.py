"""Calls of sub-modules are noted as they were."""

from __future__ import annotations

import torch
from torch import nn

from modprune import find_blocks
from modprune._autograd import edge, identity_path
from modprune._calls import record_calls
from modprune._state import traceable


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
