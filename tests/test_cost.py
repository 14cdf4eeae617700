"""Costs against counts by hand and the published figures."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from modprune.cost import count_macs, count_params, latency, macs_by_counter, macs_by_module
from modprune.models import resnet20, resnet56


def resnet_macs(blocks: int) -> int:
    """3x3 convolutions of a CIFAR ResNet, written out: stem, stages at 32, 16 and 8 pixels, the linear layer."""
    total = 3 * 16 * 9 * 32**2 + 64 * 10
    for width, size, entering in ((16, 32, 16), (32, 16, 16), (64, 8, 32)):
        total += (entering * width + (2 * blocks - 1) * width * width) * 9 * size**2
    return total


@pytest.mark.parametrize(("make", "blocks"), [(resnet20, 3), (resnet56, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_equal_the_count_by_hand(make, blocks, batch):
    assert count_macs(make(), torch.zeros(batch, 3, 32, 32)) == resnet_macs(blocks)


def test_published_figures():
    macs = macs_by_counter(resnet56(), torch.zeros(1, 3, 32, 32))
    assert {name: round(count / 1e6, 3) for name, count in macs.items()} == {
        "modprune": 125.486,
        "fvcore": 126.555,
        "thop": 127.616,
    }
    assert count_params(resnet56()) == 853_018


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = 5
    by_hand = tokens * (4 * 8 * 8 + 2 * 8 * 16) + 2 * tokens * tokens * 8
    assert count_macs(layer, torch.zeros(1, tokens, 8)) == by_hand


def test_modules_add_up():
    macs = macs_by_module(resnet20(), torch.zeros(1, 3, 32, 32))
    assert macs[""] == sum(macs[name] for name in ("conv1", "layer1", "layer2", "layer3", "linear"))


def test_counting_leaves_the_model_as_found():
    model = torchvision.models.resnet18().train()
    model.bn1.weight.requires_grad_(False)
    keys, state = set(model.state_dict()), model.bn1.running_mean.clone()
    macs_by_counter(model, torch.randn(1, 3, 64, 64))
    assert set(model.state_dict()) == keys
    assert model.training
    assert not model.bn1.weight.requires_grad
    assert torch.equal(model.bn1.running_mean, state)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_larger_network_takes_longer():
    times = latency({"small": resnet20(), "large": resnet56()}, torch.zeros(1, 3, 32, 32), seconds=0.5)
    assert times["large"] > times["small"] > 0
