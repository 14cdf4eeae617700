"""Blocks are found by structure; counts are written down by hand from the papers; the model is left as found."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from modprune.blocks import find_blocks
from modprune.cost import count_params
from modprune.models import resnet20, resnet56

# (identity, transition): He et al. 2016, table 1; Sandler et al. 2018, table 2 (repeats with stride 1 and equal width);
# Liu et al. 2022 (3 + 3 + 9 + 3); Dosovitskiy et al. 2021 (12 layers); Huang et al. 2017 has none.
EXPECTED = {
    "resnet18": (5, 3),
    "resnet50": (12, 4),
    "mobilenet_v2": (10, 0),
    "convnext_tiny": (18, 0),
    "densenet121": (0, 0),
    "alexnet": (0, 0),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_counts_of_torchvision_networks(name):
    blocks = find_blocks(getattr(torchvision.models, name)(), torch.randn(1, 3, 64, 64))
    kinds = Counter(block.kind for block in blocks)
    assert (kinds["identity"], kinds["transition"]) == EXPECTED[name]


def test_resnet56():
    blocks = find_blocks(resnet56(), torch.zeros(2, 3, 32, 32))
    assert blocks.names == tuple(f"layer{s}.{b}" for s in (1, 2, 3) for b in range(9))
    assert [b.name for b in blocks if b.kind == "transition"] == ["layer2.0", "layer3.0"]
    assert [blocks[i].params for i in (0, 10, 20)] == [4672, 18560, 73984]
    assert all(b.macs == 2 * 16 * 16 * 9 * 32 * 32 and b.exact for b in blocks if b.kind == "identity")
    assert blocks[0].layers == tuple(f"layer1.0.{layer}" for layer in ("conv1", "bn1", "conv2", "bn2"))


class Residual(nn.Module):
    """`x + f(x)`, with what a test wants wrong about it."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(body, nn.ReLU())

    def forward(self, x, other=None):
        return x + self.body(x) if other is None else x + self.body(other)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(4, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(self.block(self.stem(x))))


class Fed(Twice):
    def forward(self, x):
        return self.head(self.block(self.stem(x), torch.tanh(self.head.weight[:1] * x)))


@pytest.mark.parametrize(("model", "reason"), [(Twice(), "called 2 times"), (Fed(), "another layer feeds")])
def test_refusals_say_why(model, reason):
    blocks = find_blocks(model, torch.randn(3, 4))
    assert not blocks
    assert reason in blocks.refused["block"]


def test_a_body_without_shortcut_is_no_block():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4))
    assert find_blocks(model, torch.randn(2, 4)) == ()


def test_the_model_is_left_as_found():
    model = resnet20().train()
    model.layer1.eval()
    model.conv1.weight.requires_grad_(False)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    find_blocks(model, torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_inputs_that_do_not_fit_are_one_line():
    with pytest.raises(RuntimeError, match="CifarResNet does not run on the example inputs") as caught:
        find_blocks(resnet20(), torch.zeros(1, 1, 32, 32))
    assert "\n" not in str(caught.value)


def test_a_projection_shortcut_is_kept_out_of_the_cost():
    model = torchvision.models.resnet18()
    block = next(b for b in find_blocks(model, torch.zeros(1, 3, 64, 64)) if b.name == "layer2.0")
    assert block.params == count_params(model.layer2[0]) - count_params(model.layer2[0].downsample)
    assert not any("downsample" in layer for layer in block.layers)


def test_gelu_after_the_sum_is_inexact():
    class Post(Residual):
        def forward(self, x):
            return F.gelu(x + self.body(x))

    model = nn.Sequential(nn.Linear(4, 4), Post(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert [(b.kind, b.exact) for b in find_blocks(model, torch.randn(3, 4))] == [("identity", False)]


def test_a_block_on_the_input_itself_is_seen():
    model = nn.Sequential(Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4)), nn.Linear(4, 2))
    assert find_blocks(model, torch.randn(3, 4)).names == ("0", "1")
    assert find_blocks(model, (torch.randn(3, 4),)).names == ("0", "1")
