"""What stands in a block's place."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from modprune.bypass import PassThrough, bypassed
from modprune.models import resnet20
from modprune.surgery import remove_blocks

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


@pytest.mark.parametrize("kind", ["transition", "plain"])
def test_other_kinds_are_bypassed_as_surgery_would(kind):
    model, name, images = {
        "transition": (torchvision.models.resnet18(), "layer2.0", X),
        "plain": (torchvision.models.vgg11_bn(), "features.11", torch.randn(1, 3, 32, 32)),
    }[kind]
    cut = remove_blocks(copy.deepcopy(model.eval()), [name], kinds=[kind])
    block = model.get_submodule(name)
    with torch.no_grad(), bypassed(model, name, kind):
        assert torch.equal(model(images), cut(images))
    assert model.get_submodule(name) is block


def test_an_activation_that_others_share_stays():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.conv2, self.bn2, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))

    model = Shared().eval()
    pruned = remove_blocks(copy.deepcopy(model), ["conv2"], example_inputs=X)
    assert torch.equal(pruned(X), model.relu(model.bn1(model.conv1(X))))


@pytest.mark.parametrize("name", ["layer1.0", "layer2.0"])
def test_copies_keep_the_forward_hooks(name):
    model, heard = resnet20(), []
    model.get_submodule(name).register_forward_hook(lambda *_: heard.append(name))
    remove_blocks(model, [name])
    copy.deepcopy(copy.deepcopy(model))(torch.zeros(1, 3, 8, 8))
    assert heard == [name]
