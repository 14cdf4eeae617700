"""What is heard of modules while a model runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modprune._hooks import comparing, listening


class TwoWays(nn.Module):
    """Writes into what it is given, and gives a tuple back."""

    def forward(self, *, x: Tensor, mask: None = None) -> tuple[None, Tensor]:
        return None, x.add_(1)


def test_a_span_is_compared_with_what_went_in_before_it_was_written_into():
    first, last = TwoWays(), nn.Tanh()
    heard: list[tuple[str, float, float]] = []
    spans = {"span": (first, last), "alone": (first, first), "mute": (nn.Identity(), last)}
    with comparing(spans, lambda name, x, y: heard.append((name, float(x), float(y)))):
        last(first(x=torch.zeros(()))[1] - 1)
        last(torch.zeros(()))  # nothing has gone into its span
    assert heard == [("alone", 0.0, 1.0), ("span", 0.0, 0.0)]
    assert not any((first._forward_pre_hooks, first._forward_hooks, last._forward_hooks))


def test_listening_hears_every_run_until_it_ends():
    layer, heard = nn.ReLU(), []
    with listening({"relu": layer}, lambda name, out: heard.append((name, float(out)))):
        layer(torch.ones(()))
        layer(-torch.ones(()))
    layer(torch.ones(()))
    assert heard == [("relu", 1.0), ("relu", 0.0)]
