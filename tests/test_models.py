"""The built-in networks: sizes as published, and blocks as their papers have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from modprune import count_macs, count_params, find_blocks, modularity_curve
from modprune.criteria import BlockInfluence
from modprune.models import MODELS, resnet18, vgg11_bn
from modprune.studies.layers import layers_of

IMAGE = torch.zeros(1, 3, 32, 32)
# Parameters and millions of MACs: of He et al. (2016) by hand; of the VGGs and ResNet18 as their public CIFAR
# checkpoints state them.
SIZES = {
    "resnet20": (269_722, 40.55), "resnet32": (464_154, 68.86), "resnet44": (658_586, 97.17),
    "resnet56": (853_018, 125.49), "resnet110": (1_727_962, 252.89), "resnet18": (11_173_962, 555.42),
    "vgg11_bn": (9_756_426, 153.29), "vgg13_bn": (9_941_322, 228.79), "vgg16_bn": (15_253_578, 313.73),
    "vgg19_bn": (20_565_834, 398.66),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_the_published_ones(name):
    params, macs = SIZES[name]
    assert count_params(MODELS[name]()) == params
    assert count_macs(MODELS[name](), IMAGE) / 1e6 == pytest.approx(macs, rel=0.005)


def test_a_quarter_of_the_width_is_a_sixteenth_of_the_macs():
    assert count_macs(vgg11_bn(width=0.25), IMAGE) < count_macs(vgg11_bn(), IMAGE) / 14


def test_blocks_and_points():
    found = find_blocks(resnet18(width=0.25), IMAGE)
    assert [block.kind for block in found] == ["identity", "identity", *["transition", "identity"] * 3]
    found = find_blocks(vgg11_bn(width=0.25), IMAGE)
    # Of the eight convolutions, those that keep the shape: 256-256, 512-512 and the last two.
    assert [block.name for block in found] == ["features.11", "features.18", "features.22", "features.25"]
    assert len(layers_of(vgg11_bn(width=0.25), IMAGE)) == 10


def test_of_a_plain_unit_its_activation_is_measured():
    model = vgg11_bn(width=0.25).eval()
    blocks = find_blocks(model, IMAGE)
    assert all(isinstance(model.get_submodule(block.end), nn.ReLU) for block in blocks)
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 4
    curve = modularity_curve(model, [(images, labels)], samples=40, repeats=1)
    ends = modularity_curve(model, [(images, labels)], samples=40, repeats=1, layers=[block.end for block in blocks])
    assert curve.layers[1:] == blocks.names
    assert np.array_equal(curve.q[:, 1:], ends.q)
    with torch.no_grad():
        before, after = (model.features[: int(at.split(".")[1])](images) for at in (blocks[0].name, blocks[0].end))
        cosine = F.cosine_similarity(before.flatten(1), after.relu().flatten(1)).mean()
    influence = BlockInfluence(40)(model, blocks, [images]).mean[blocks[0].name]
    assert influence == pytest.approx(1 - float(cosine), abs=1e-6)
