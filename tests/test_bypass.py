"""What stands in a block's place."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from modprune.bypass import PassThrough, bypassed, shortcut_only, traced_kind, traced_outputs
from modprune.models import resnet20

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("outputs", "args", "kwargs", "expected"),
    [
        ((), ("x",), {}, "x"),
        ((), ("x", "mask"), {"cache": None}, "x"),
        ((), (), {"hidden": "x", "mask": "m"}, "x"),
        ((0,), ("x",), {}, ("x",)),
        ((0, -1, 5), ("x",), {"mask": "m"}, ("x", None, None)),
        ((0, 1), ("x",), {"size": 7}, ("x", 7)),
        ((0, 1), (("x", "y"),), {}, ("x", "y")),
    ],
)
def test_the_first_argument_comes_back_in_the_form_of_the_block(outputs, args, kwargs, expected):
    assert PassThrough(outputs)(*args, **kwargs) == expected


def test_a_bypassed_identity_block_of_zeros_changes_nothing_and_comes_back():
    model = resnet20().eval()
    block = model.layer2[1]
    with torch.no_grad():
        before = model(X)
        with bypassed(model, "layer2.1"):
            assert not torch.equal(model(X), before)
            assert model.layer2[1].training is False
        assert model.layer2[1] is block
        block.bn2.weight.zero_()
        zero = model(X)
        with bypassed(model, "layer2.1") as same:
            assert same is model
            assert torch.equal(model(X), zero)


def test_the_block_comes_back_after_an_error():
    model = resnet20().eval()
    block = model.layer2[0]
    with pytest.raises(RuntimeError, match="channels"), bypassed(model, "layer2.0"):
        model(X)
    assert model.layer2[0] is block


@pytest.mark.parametrize("name", ["layer9", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError, match="CifarResNet has no such module"), bypassed(resnet20(), name):
        pass


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
    ],
)
def test_the_kind_is_read_off_the_block_alone(join, kind):
    assert traced_kind(Post(join)) == kind


def test_the_form_is_read_off_the_block_alone():
    assert traced_outputs(Post(lambda m, x, f: (x + f, f, x))) == (0, -1, 0)
    assert traced_outputs(Post(lambda m, x, f: x + f)) == ()


def test_what_cannot_be_traced_says_what_to_give():
    with pytest.raises(ValueError, match=r"torch.fx cannot trace it \(symbolically traced"):
        traced_kind(Post(lambda m, x, f: x if x.sum() > 0 else f))
    with pytest.raises(ValueError, match=r"its output is not shortcut"):
        shortcut_only(nn.Sequential(nn.Linear(2, 2)))


def test_a_stand_in_of_ones_own():
    model = torchvision.models.resnet18().eval()
    block: BasicBlock = model.layer2[0]
    with bypassed(model, "layer2.0", shortcut_only(block)):
        assert model(X).shape == (2, 1000)
    assert model.layer2[0] is block
