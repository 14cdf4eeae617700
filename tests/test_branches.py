"""Branches whose sums lie in the code around them: found where two are alike, measured by the sum, zero once gone."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from modprune import ModularityPruner, PruningPlan, find_blocks, load, modularity, modularity_curve, save
from modprune.cost import count_macs, count_params
from modprune.criteria import Ablation, BlockInfluence
from modprune.evaluate import evaluate
from modprune.pruner import BlockScores
from modprune.surgery import removed_blocks

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
LOADER = [(torch.randn(30, 6, 8, generator=torch.Generator().manual_seed(i)), torch.arange(30) % 3) for i in range(3)]
ADD = {
    "sum": lambda x, y: x + y,
    "the other way round": lambda x, y: y + x,
    "in place": lambda x, y: y.add_(x),
    "into the input": lambda x, y: x.add_(y),
}


class Mix(nn.Module):
    """Attention of a kind, with its norm inside."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(8), nn.Linear(6, 6), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.mix(self.norm(x).mT).mT.relu())


class Feed(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))

    def forward(self, x):
        return self.net(x)


class Loop(nn.Module):
    """As most transformers are written by hand: the sums are in the loop."""

    def __init__(self, layers=None, add=ADD["sum"]) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.ModuleList([Mix(), Feed()]) for _ in range(3)] if layers is None else layers
        self.layers, self.norm, self.add = nn.ModuleList(layers), nn.LayerNorm(8), add

    def forward(self, x):
        for mix, feed in self.layers:
            x = self.add(x, mix(x))
            x = self.add(x, feed(x))
        return self.norm(x)


class Network(nn.Module):
    def __init__(self, body: nn.Module, classes: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.body, self.head = nn.Linear(8, 8), body, nn.Linear(8, classes)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean(1))


def network(add="sum") -> nn.Module:
    return Network(Loop(add=ADD[add])).eval()


NAMES = tuple(f"body.layers.{i}.{j}" for i in range(3) for j in range(2))


@pytest.mark.parametrize("add", ADD)
def test_the_branches_of_a_loop_are_the_blocks_and_not_the_loop(add):
    model = network(add)
    before = model(X)
    blocks = find_blocks(model, X)
    assert (blocks.names, {block.kind for block in blocks}) == (NAMES, {"branch"})
    assert blocks[1].end == "+body.layers.0.1"
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("add", ADD)
@pytest.mark.parametrize("gone", [NAMES[:1], NAMES[1::2], NAMES])
def test_what_is_left_computes_what_the_code_without_them_does(add, gone, tmp_path):
    model, blocks = network(add), find_blocks(network(add), X)
    macs, params = count_macs(model, X), count_params(model)
    nothing = lambda module, args, out: torch.zeros_like(out)  # noqa: E731
    skipping = copy.deepcopy(model)
    for name in gone:
        skipping.get_submodule(name).register_forward_hook(nothing)
    by_plan = PruningPlan(gone, ("branch",) * len(gone), ((),) * len(gone))
    whole = copy.deepcopy(model)
    PruningPlan(gone).apply(model, X)
    assert torch.equal(model(X), skipping(X))
    own = [block for block in blocks if block.name in gone]
    assert params - count_params(model) == sum(block.params for block in own)
    assert macs - count_macs(model, X) == sum(block.macs for block in own)
    assert removed_blocks(model) == by_plan
    assert torch.equal(PruningPlan.from_json(by_plan.to_json()).apply(whole)(X), model(X))  # without inputs
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors", network(add)).eval()(X), model(X))
    if add != "into the input":  # which spoils the gradients of the whole network too
        model.train()(X).sum().backward()


def test_a_branch_ends_with_the_sum():
    model = network()
    curve = modularity_curve(model, LOADER, samples=90, repeats=1)
    assert curve.layers == ("stem", *NAMES)
    images, labels = (torch.cat(parts) for parts in zip(*LOADER, strict=True))
    with torch.no_grad():
        x = model.stem(images)
        sums = [x] + [x := x + branch(x) for layer in model.body.layers for branch in layer]
    assert curve.q[0] == pytest.approx([modularity(y, labels) for y in sums], abs=1e-6)
    influence = BlockInfluence(samples=90)(model, find_blocks(model, X), LOADER).values.mean(0)
    turned = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(sums)]
    assert influence == pytest.approx([float(value) for value in turned], abs=1e-6)


def test_ablation_skips_it():
    model = network()
    scores = Ablation(samples=90)(model, find_blocks(model, X), LOADER).mean
    whole = evaluate(model, LOADER).loss
    PruningPlan(NAMES[2:3]).apply(model, X)
    assert scores[NAMES[2]] == pytest.approx(evaluate(model, LOADER).loss - whole, abs=1e-6)


def test_stages_go_on_where_no_two_alike_are_left():
    order = lambda model, blocks, loader: BlockScores(blocks.names, [list(range(len(blocks)))])  # noqa: E731
    pruner = ModularityPruner(network(), X, LOADER, order, blocks=6, iterative_steps=6)
    assert pruner.plan().remove == NAMES
    assert find_blocks(pruner.step(), X) == ()


class Once(nn.Module):
    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        for branch in self.branches:
            x = x + branch(x)
        return x


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (lambda: nn.Sequential(Once(Feed()), Once(Feed())), {"body.0": "identity", "body.1": "identity"}),
        (lambda: nn.Sequential(Once(Mix(), Feed()), Once(Mix(), Feed())), {"body.0": "identity", "body.1": "identity"}),
        (lambda: Once(Feed(), Feed(24)), {"body": "identity"}),
        (lambda: nn.Sequential(Once(Once(Feed()), Once(Feed()))), {f"body.0.branches.{i}": "identity" for i in (0, 1)}),
    ],
    ids=["wrapper", "layer", "unlike", "blocks inside"],
)
def test_a_module_that_is_a_block_stays_the_block(body, found):
    model = Network(body())
    assert {block.name: block.kind for block in find_blocks(model, X)} == found


def test_what_is_used_elsewhere_or_called_twice_is_none():
    class Kept(Loop):
        def forward(self, x):
            outs = [layer[1](x) for layer in self.layers]
            return sum(x + out for out in outs) + outs[0]

    assert find_blocks(Network(Kept()), X).names == ("body.layers.1.1", "body.layers.2.1")
    twice = nn.ModuleList([Mix(), Feed()])
    blocks = find_blocks(
        Network(Loop([twice, nn.ModuleList([Mix(), Feed()]), nn.ModuleList([Mix(), Feed()]), twice])), X
    )
    assert len(blocks) == 4
    assert set(blocks.refused) == {"body.layers.0.0", "body.layers.0.1"}


def test_blocks_beside_the_branches_of_a_loop_are_blocks():
    class Beside(Loop):
        def forward(self, x):
            for mix, feed, block in self.layers:
                x = block(x + mix(x))
                x = x + feed(x)
            return x

    body = Beside([nn.ModuleList([Mix(), Feed(), Once(nn.Sequential(nn.Linear(8, 8)))]) for _ in range(2)])
    blocks = find_blocks(Network(body), X)
    assert [block.kind for block in blocks] == ["branch", "identity", "branch"] * 2


def test_by_name_alone_nothing_tells_that_it_is_one():
    model = network()
    with pytest.raises(ValueError, match=r"body\.layers\.0\.0: cannot be removed: .*give example_inputs, or kinds"):
        PruningPlan(NAMES[:1]).apply(model)
    with pytest.raises(ValueError, match=r"layer '\+nothing': Network has no such module"):
        modularity_curve(model, LOADER, samples=30, repeats=1, layers=["+nothing"])


def test_what_gives_a_tuple_is_none():
    class Weighted(Mix):
        def forward(self, x):
            return super().forward(x), None

    class Opening(Loop):
        def forward(self, x):
            for mix, feed in self.layers:
                x = x + mix(x)[0]
                x = x + feed(x)
            return x

    body = Opening([nn.ModuleList([Weighted(), Feed()]) for _ in range(2)])
    assert find_blocks(Network(body), X).names == ("body.layers.0.1", "body.layers.1.1")
