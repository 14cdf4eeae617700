"""Blocks traced alone."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from modprune import find_blocks
from modprune._trace import shortcut_only, traced_kind, traced_outputs


def test_the_shortcut_alone_keeps_its_parameters_names_modes_and_numbers():
    block = torchvision.models.resnet18().layer2[0].eval()
    block.train()
    block.downsample[1].eval()
    block.downsample[1].weight.requires_grad_(False)
    kept = shortcut_only(block)
    assert set(kept.state_dict()) == {key for key in block.state_dict() if key.startswith("downsample.")}
    assert all(p is block.get_parameter(name) for name, p in kept.named_parameters())
    assert [kept.get_submodule(n).training for n in ("", "downsample.1", "downsample.0")] == [True, False, True]
    x = torch.randn(2, 64, 8, 8)
    assert torch.equal(kept(x), torch.relu(block.downsample(x)))


def test_parameters_that_the_block_holds_itself_go_with_the_branch():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.short, self.long, self.gamma = nn.Linear(4, 2), nn.Linear(4, 2), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.gamma * self.long(x).relu().sin() + self.short(x)

    kept = shortcut_only(Scaled())
    assert {name for name, _ in kept.named_parameters()} == {"short.weight", "short.bias"}


class Post(nn.Module):
    """What `join(x, f(x))` gives, for a kind to be read off."""

    def __init__(self, join) -> None:
        super().__init__()
        self.f, self.silent, self.join = nn.Linear(4, 4), nn.Sequential(nn.Identity(), nn.Dropout()), join
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.join(self, x, self.f(x))


@pytest.mark.parametrize(
    ("join", "kind"),
    [
        (lambda m, x, f: x + f, "identity"),
        (lambda m, x, f: m.silent(x) + f, "identity"),
        (lambda m, x, f: torch.relu(torch.add(f, x.permute(1, 0).permute(1, 0))), "identity"),
        (lambda m, x, f: (x + f) + m.f(x + f), "identity"),
        (lambda m, x, f: x.sin() + f, "transition"),
        (lambda m, x, f: torch.add(f, x, alpha=2), ""),
        (lambda m, x, f: x * f, ""),
        (lambda m, x, f: x.sin() + 1, ""),
        (lambda m, x, f: torch.tanh(x + f + 0), "identity"),
        (lambda m, x, f: m.norm(x + f), "identity"),
        (lambda m, x, f: nn.functional.layer_norm(x + f, (4,)).relu(), "identity"),
        (lambda m, x, f: m.norm(x) + f, "transition"),
    ],
)
def test_the_kind_is_read_off_the_block_alone(join, kind):
    assert traced_kind(Post(join)) == kind


def test_a_block_in_a_block_is_seen_through():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.f = Post(lambda m, x, f: x + f), nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

        def forward(self, x):
            x = self.inner(x)
            return x + self.f(x)

    assert traced_kind(Outer()) == find_blocks(nn.Sequential(Outer()), torch.randn(2, 4))[0].kind == "identity"


def test_the_form_is_read_off_the_block_alone():
    assert traced_outputs(Post(lambda m, x, f: (x + f, None, x))) == (0, -1, 0)
    assert traced_outputs(Post(lambda m, x, f: x + f)) == ()
    with pytest.raises(ValueError, match="a second value that is made in it"):
        traced_outputs(Post(lambda m, x, f: (x + f, f)))


def test_what_cannot_be_traced_says_what_to_give():
    with pytest.raises(ValueError, match=r"torch.fx cannot trace it \(symbolically traced"):
        traced_kind(Post(lambda m, x, f: x if x.sum() > 0 else f))
    with pytest.raises(ValueError, match=r"its output is not shortcut"):
        shortcut_only(nn.Sequential(nn.Linear(2, 2)))
