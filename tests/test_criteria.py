"""A criterion gives a score to each block, whatever form the network's values have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.zoo_networks import NETWORKS
from modprune import ModularityPruner, find_blocks
from modprune.criteria import block_influence
from modprune.models import resnet20

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Turn(nn.Module):
    """`x + f(x)`: turns x by an angle that is known beforehand."""

    def __init__(self, matrix) -> None:
        super().__init__()
        self.f = nn.Linear(2, 2, bias=False)
        self.f.weight.data = torch.tensor(matrix) - torch.eye(2)

    def forward(self, x):
        return x + self.f(x)


def test_influence_is_one_minus_the_cosine():
    same, quarter, back = [[3.0, 0.0], [0.0, 3.0]], [[0.0, -1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, -1.0]]
    model = nn.Sequential(Turn(same), Turn(quarter), Turn(back))
    x = torch.randn(5, 2)
    scores = block_influence(model, find_blocks(model, x), [x, x])
    assert scores.values.shape == (2, 3)
    assert list(scores.mean.values()) == pytest.approx([0, 1, 2], abs=1e-6)


def test_blocks_that_change_the_shape_score_one_and_loaders_need_no_labels():
    model = resnet20()
    blocks = find_blocks(model, X)
    scores = block_influence(model, blocks, [X, X[:3]])
    assert [scores.mean[b.name] for b in blocks if b.kind == "transition"] == [1.0, 1.0]
    assert (scores.values >= 0).all()
    assert not any(module._forward_hooks for module in model.modules())
    plan = ModularityPruner(model, X[:1], [X], "block_influence", blocks=2).plan()
    assert plan.criterion == "block_influence"
    assert set(plan.remove) == set(sorted(plan.scores, key=lambda name: plan.scores[name])[:2])


def test_five_hundred_samples_are_enough():
    seen = []
    model = nn.Sequential(Turn([[1.0, 0.0], [0.0, 2.0]]))
    model.register_forward_hook(lambda *_: seen.append(1))
    batches = [torch.ones(300, 2)] * 5
    assert block_influence(model, find_blocks(model, batches[0]), batches).values.shape == (2, 1)
    with pytest.raises(ValueError, match="gives no batch"):
        block_influence(model, find_blocks(model, batches[0]), [])


@pytest.mark.parametrize("name", ["swin", "bert", "llama", "whisper_encoder", "poolformer"])
@pytest.mark.parametrize("criterion", ["modularity", "block_influence"])
def test_tokens_tuples_and_dicts(name, criterion):
    """The pruner runs on networks whose blocks and outputs are tuples, dicts or token sequences, with dict loaders."""
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model = make()
    labels = {"labels": torch.tensor([0, 1])} if criterion == "modularity" else {}
    batches = [{key: value.roll(i, -1) for key, value in inputs.items()} | labels for i in range(5)]
    if criterion == "modularity":
        model = model.eval()

        def measure(model, blocks, loader):
            from modprune import modularity_curve
            from modprune.criteria import BlockScores

            curve = modularity_curve(model, loader, samples=10, repeats=2, blocks=blocks)
            return BlockScores(blocks.names, curve.q[:, 1:] - curve.q[:, :-1], curve)

        criterion = measure
    pruner = ModularityPruner(model, inputs, batches, criterion, blocks=1)
    assert len(pruner.plan().remove) == 1
    assert find_blocks(pruner.step(), inputs).names != ()
