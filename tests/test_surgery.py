"""Taking blocks out."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

from modprune._depgraph import dependency_graph
from modprune.blocks import find_blocks
from modprune.cost import count_macs, count_params
from modprune.models import resnet20
from modprune.surgery import remove_blocks, removed_blocks

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet20().eval()


def test_removing_an_identity_block_whose_branch_is_zero_changes_nothing():
    model = network()
    with torch.no_grad():
        model.layer2[1].bn2.weight.zero_()
        before = model(X)
        assert torch.equal(remove_blocks(model, ["layer2.1"])(X), before)


@pytest.mark.parametrize("names", [("layer1.0",), ("layer1.1", "layer2.0", "layer3.2"), ("layer2.0", "layer3.0")])
@pytest.mark.parametrize("example", [None, X])
def test_what_goes_is_the_sum_of_the_blocks_and_the_rest_keeps_its_names(names, example):
    model = network()
    blocks = {b.name: b for b in find_blocks(model, X)}
    params, macs, keys = count_params(model), count_macs(model, X), set(model.state_dict())
    remove_blocks(model, names, example_inputs=example)
    assert params - count_params(model) == sum(blocks[name].params for name in names)
    assert macs - count_macs(model, X) == sum(blocks[name].macs for name in names)
    assert set(model.state_dict()) == {key for key in keys if not key.startswith(tuple(n + "." for n in names))}
    assert removed_blocks(copy.deepcopy(model)) == {name: blocks[name].kind for name in names}
    loss = model.train()(X).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {b.name for b in find_blocks(model, X)} == set(blocks) - set(names)
    dependency_graph(model, X)


def test_projection_shortcuts_stay():
    model = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 64, 64)
    block = model.layer2[0]
    remove_blocks(model, ["layer2.0"], example_inputs=x)
    h = torch.randn(1, 64, 8, 8)
    assert torch.equal(model.layer2[0](h), torch.relu(block.downsample(h)))


def test_unsuitable_names_and_wrappers_leave_the_model_whole():
    model = network()
    before = model(X)
    for names, message in (
        (["layer9.1"], "no such block; near: layer"),
        (["conv1"], "cannot be removed"),
        (["layer1.0", "linear"], "cannot be removed"),
        ([""], "no such block"),
    ):
        with pytest.raises(ValueError, match=message):
            remove_blocks(model, names)
    with pytest.raises(ValueError, match=r"pass model.module"):
        remove_blocks(nn.DataParallel(model), ["layer1.0"])
    assert torch.equal(model(X), before)
    remove_blocks(model, ["layer1.0"])
    with pytest.raises(ValueError, match="already removed"):
        remove_blocks(model, ["layer1.0"])


def test_a_failed_proof_puts_the_blocks_back():
    model = network()
    before = model(X)
    with pytest.raises(RuntimeError, match=r"layer2\.0 failed.*the model is as it was"):
        remove_blocks(model, ["layer2.0"], kinds=["identity"], example_inputs=X)
    assert torch.equal(model(X), before)


def test_the_dependency_graph_leaves_the_model_as_found_and_says_what_failed():
    model = network().train()
    model.conv1.weight.requires_grad_(False)
    with torch.no_grad():
        dependency_graph(model, X)
    assert model.training
    assert not model.conv1.weight.requires_grad
    with pytest.raises(RuntimeError, match=r"no dependency graph of CifarResNet: .*channels"):
        dependency_graph(model, torch.zeros(1, 1, 32, 32))
