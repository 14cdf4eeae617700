"""Of a transition the shortcut stays, with the values that it had in the block; or the block is refused."""

from __future__ import annotations

import copy
import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from modprune import GradualPruning, PruningPlan, load, save
from modprune._trace import shortcut_only
from modprune.blocks import find_blocks
from modprune.cost import count_macs, count_params

X = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(0))


class Transition(nn.Module):
    """`join(self, x)` of a branch and a shortcut that halve the image and double the channels."""

    def __init__(self, join) -> None:
        super().__init__()
        self.join = join
        self.branch, self.shortcut = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.Conv2d(8, 16, 1, 2, bias=False)
        self.wide, self.act, self.inner = nn.Conv2d(8, 16, 1), nn.PReLU(16), nn.ReLU(inplace=True)
        self.register_buffer("kernel", torch.rand(16, 1, 1))
        self.last, self.heard = None, []

    def forward(self, x):
        return self.join(self, x)


class Masked(Transition):
    def forward(self, x, mask=None):
        return self.branch(x) + (self.shortcut(x) if mask is None else self.shortcut(x) * mask)


def remembering(m, x):
    y = m.branch(x) if m.last is None else 0.9 * m.branch(x) + 0.1 * m.last.mean()
    m.last = y.detach()
    m.heard.append(y)
    return y + m.shortcut(x)


def doubled(x):
    return F.avg_pool2d(x, 2).repeat(1, 2, 1, 1)


def padded(m, x):
    y, short = m.branch(x), F.avg_pool2d(x, 2)
    return y + F.pad(short, (0, 0, 0, 0, 0, y.size(1) - short.size(1)))


def taking_more(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


class Decorated(Transition):
    @taking_more
    def forward(self, x, **kwargs):
        return self.branch(x) + self.shortcut(x)


def network(join, kind=Transition) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 1), kind(join), nn.AdaptiveAvgPool2d(1)).eval()


GOOD = {
    "plain": lambda m, x: m.branch(x) + m.shortcut(x),
    "activation after the sum": lambda m, x: m.act(m.branch(x) + m.shortcut(x)),
    "shared with the branch": lambda m, x: m.act(m.act(m.branch(x)) + m.shortcut(x)),
    "plus a number": lambda m, x: F.relu(m.branch(x) + m.shortcut(x) + 0),
    "constants": lambda m, x: m.branch(x) + F.avg_pool2d(x, 2).repeat(1, 2, 1, 1) * m.kernel * torch.tensor(0.5),
    "notes of its own": remembering,
    "over a number": lambda m, x: m.act(m.branch(x) + doubled(x)) / 2**0.5,
    "times a buffer": lambda m, x: m.kernel * (m.branch(x) + doubled(x)),
    "decorated": lambda m, x: m.branch(x) + m.shortcut(x),
    "a product of values": lambda m, x: m.branch(x) + (y := m.shortcut(x)) @ y.mT,
}


@pytest.mark.parametrize("name", GOOD)
def test_what_stays_is_the_shortcut_and_comes_back_from_a_file(name, tmp_path):
    kind = Decorated if name == "decorated" else Transition
    model = network(GOOD[name], kind)
    with torch.no_grad():
        model(X)
    own, heard = set(vars(model[1])), list(model[1].heard)
    block = find_blocks(model, X)[0]
    assert block.kind == "transition"
    assert set(vars(model[1])) == own
    assert isinstance(model[1].last, torch.Tensor | None)  # and nothing of the trace
    assert len(model[1].heard) == len(heard)
    expected = copy.deepcopy(model)
    nn.init.zeros_(expected[1].branch.weight)
    expected[1].last = None
    macs, params = count_macs(model, X), count_params(model)
    PruningPlan((block.name,)).apply(model, X)
    assert (macs - count_macs(model, X), params - count_params(model)) == (block.macs, block.params)
    torch.testing.assert_close(model(X), expected(X))
    save(model, tmp_path / "m.safetensors")
    assert torch.equal(load(tmp_path / "m.safetensors", network(GOOD[name], kind)).eval()(X), model(X))


WRITTEN = {
    "module": lambda m, x: m.inner(m.branch(x) + F.relu(m.shortcut(x))),
    "sequential": lambda m, x: m.last(m.branch(x) + m.shortcut(x).tanh()),
    "function": lambda m, x: F.relu(m.branch(x) + m.shortcut(x).sigmoid(), inplace=True),
    "positional": lambda m, x: F.relu(m.branch(x) + m.shortcut(x).sigmoid(), True),
    "method": lambda m, x: (m.branch(x) + m.inner(m.shortcut(x))).clamp_(0, 6),
    "view": lambda m, x: (m.branch(x) + m.shortcut(x).relu().flatten(2).view(2, 16, 8, 8)).relu_(),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_stays_can_be_trained_where_a_layer_writes_into_the_sum(name):
    model = network(WRITTEN[name])
    model[1].last = nn.Sequential(nn.ReLU(inplace=True))
    expected = copy.deepcopy(model)
    nn.init.zeros_(expected[1].branch.weight)
    PruningPlan(("1",)).apply(model, X)
    torch.testing.assert_close(model(X), expected(X))
    for network_ in (model.train(), expected.train()):
        network_(X).square().sum().backward()
    torch.testing.assert_close(model[1].shortcut.weight.grad, expected[1].shortcut.weight.grad)


def test_nothing_is_copied_for_a_gradient_that_does_not_need_it():
    block = Transition(lambda m, x: m.inner(m.branch(x) + m.shortcut(x)))
    assert "clone" not in shortcut_only(block).code
    block.shortcut = nn.Sequential(block.shortcut, nn.BatchNorm2d(16))
    assert "clone" not in shortcut_only(block).code
    block.shortcut.append(nn.ReLU())
    assert "clone" in shortcut_only(block).code


def test_what_a_layer_after_the_block_writes_into_is_named():
    model = network(lambda m, x: m.branch(x) + m.shortcut(x).relu())
    model.insert(2, nn.ReLU(inplace=True))
    with pytest.raises(RuntimeError, match="writes in place into what now goes through 1"):
        PruningPlan(("1",)).apply(model, X)
    model[2].inplace = False
    PruningPlan(("1",)).apply(model, X).train()(X).sum().backward()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(8, 16, 1, 2)

    def forward(self, x):
        return self.one(x), self.other(x)


class Paired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.both = Pair()

    def forward(self, x):
        one, other = self.both(x)
        return one + other


def test_a_branch_that_one_module_makes_with_the_shortcut_is_refused():
    model = network(None)
    model[1] = Paired()
    assert find_blocks(model, X).refused["1"] == "its branch has no parameters of its own"


@pytest.mark.parametrize(
    ("join", "reason"),
    [
        (lambda m, x: m.branch(m.inner(x)) + m.shortcut(x), "gives other values"),  # the shortcut sees what is written
        (lambda m, x: (y := m.branch(x)) + F.interpolate(m.wide(x), size=y.shape[2:]), "asks its branch for a shape"),
        (padded, "asks its branch for a shape"),
    ],
)
def test_a_shortcut_that_cannot_be_parted_is_refused(join, reason):
    blocks = find_blocks(network(join), X)
    assert not blocks
    assert reason in blocks.refused["1"]


def test_values_that_overflow_say_nothing():
    assert find_blocks(network(GOOD["plain"]), 1e38 * X).names == ("1",)


def test_a_trace_that_goes_another_way_than_the_block_is_refused_in_silence(capfd):
    assert "does not run" in find_blocks(network(None, Masked), X).refused["1"]
    assert capfd.readouterr().err == ""


def test_a_forward_of_the_module_alone_is_refused():
    model = network(GOOD["plain"])
    model[1].forward = types.MethodType(lambda m, x: m.branch(x) + 0.5 * m.shortcut(x), model[1])
    assert "its forward is set on the module itself" in find_blocks(model, X).refused["1"]


def test_the_cost_of_a_parametrized_shortcut_stays():
    model = network(GOOD["plain"])
    spectral_norm(model[1].branch)
    spectral_norm(model[1].shortcut)
    block = find_blocks(model, X)[0]
    macs, params = count_macs(model, X), count_params(model)
    PruningPlan(("1",)).apply(model, X)
    assert (macs - count_macs(model, X), params - count_params(model)) == (block.macs, block.params)


class Listed(nn.Module):
    """A weight of its own on the shortcut; what the branch is made of lies in a list that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(16, 8, 1, 1))
        self.branch = nn.ModuleList([nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)])

    def forward(self, x):
        return F.conv2d(x, self.weight) + self.branch[1](F.relu(self.branch[0](x)))


def test_the_cost_of_a_weight_beside_a_list_stays():
    model = network(None)
    model[1] = Listed()
    macs, params = count_macs(model, X), count_params(model)
    block = find_blocks(model, X)[0]
    PruningPlan(("1",)).apply(model, X)
    assert (macs - count_macs(model, X), params - count_params(model)) == (block.macs, block.params)


class Attention(nn.Module):
    """The layer of Compact Transformers: a norm after the first sum, none after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.norm, self.mlp = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(x + self.mix(x))
        return x + self.mlp(x).relu()


class Twofold(nn.Module):
    """`join(x, mix(x))` and `join(x, mlp(x))` after it."""

    def __init__(self, join) -> None:
        super().__init__()
        self.mix, self.mlp, self.join = nn.Linear(8, 8), nn.Linear(8, 8), join

    def forward(self, x):
        x = self.join(x, self.mix(x))
        return self.join(x, self.mlp(x).relu())


JOINS = {
    "clone": lambda x, f: x.clone() + f,
    "by name": lambda x, f: torch.add(input=x, other=f),
    "difference": lambda x, f: x - f,
    "alpha": lambda x, f: torch.add(x, f, alpha=0.5),
    "product": lambda x, f: torch.addcmul(x, f, f),
    "clamped": lambda x, f: (x + f).clamp(-1, 1),
    "type": lambda x, f: (x.float() + f).type_as(x),
}


@pytest.mark.parametrize("block", [Attention(), *(Twofold(join) for join in JOINS.values())], ids=["norm", *JOINS])
def test_a_plan_by_hand_removes_the_same_with_and_without_example_inputs(block):
    model, x = nn.Sequential(nn.Linear(4, 8), block, nn.Linear(8, 2)), torch.randn(3, 4)
    one, other = (PruningPlan(("1",)).apply(copy.deepcopy(model), *given) for given in ((x,), ()))
    assert torch.equal(one(x), other(x))
    assert count_params(one) == count_params(other) == 40 + 18


class Down(nn.Module):
    """A transition that gives its inner features back too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.shortcut = nn.Conv2d(8, 16, 1, 2)

    def forward(self, x):
        inner = self.first(x).relu()
        return (self.shortcut(x) + self.last(inner)).relu_(), inner


class First(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x):
        return self.pair(x)[0]


def test_what_a_second_value_is_made_from_stays():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), First(Down()), nn.Conv2d(16, 2, 1)).eval()
    (block,) = find_blocks(model, X)
    expected = model[2](model[1].pair.shortcut(model[0](X)).relu())
    macs, params = count_macs(model, X), count_params(model)
    assert block.params == count_params(model[1].pair.last)
    PruningPlan((block.name,)).apply(model, X)
    assert torch.equal(model(X), expected)
    assert (macs - count_macs(model, X), params - count_params(model)) == (block.macs, block.params)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x):
        return x + self.body(x)


def group() -> nn.Module:
    inner = [Residual(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1))) for _ in range(2)]
    return Residual(nn.Sequential(*inner, nn.Conv2d(8, 8, 1)))


def test_what_looks_like_a_block_once_others_are_gone_is_none():
    model = nn.Sequential(nn.Conv2d(8, 8, 1), group(), group(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    whole = find_blocks(model, X).names
    batches = [(X, torch.tensor([0, 1]))]
    prune = GradualPruning(model, batches, "l1_norm", at=(1, 2), shares=(0.5, 1), blocks=4, example_inputs=X)
    assert sorted(prune(1).remove + prune(2).remove) == sorted(whole)
    assert find_blocks(model, X).refused == dict.fromkeys(("1", "2"), "blocks inside it have been removed")


@pytest.mark.parametrize("mean", [lambda a, b: (a + b) / 2, lambda a, b: 0.5 * (a + b), lambda a, b: (a + b) * (a > 0)])
def test_a_mean_of_two_heads_has_no_shortcut_and_hides_no_unit(mean):
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(8, 4, 1), nn.Sequential(nn.Conv2d(8, 16, 1), nn.Conv2d(16, 4, 1))

        def forward(self, x):
            return mean(self.one(x), self.other(x))

    blocks = find_blocks(
        nn.Sequential(
            nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            Heads(),
        ),
        X,
    )
    assert blocks.names == ("3",)


def test_two_sides_that_cost_the_same_have_no_shortcut():
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.one(x) + self.other(x)

    blocks = find_blocks(nn.Sequential(nn.Conv2d(8, 8, 1), Heads()), X)
    assert not blocks
    assert "both sides of its sum hold as many parameters" in blocks.refused["1"]


class Around(nn.Module):
    """A shortcut around a whole stage, beside those of its blocks."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks, self.level = nn.Sequential(*blocks), nn.Conv2d(8, 16, 1, 2)

    def forward(self, x):
        return F.relu(self.level(x) + self.blocks(x))


class Plain(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(before, after, 3, after // before, 1), nn.Conv2d(after, after, 3, padding=1)
        self.short = nn.Conv2d(before, after, 1, 2) if before < after else nn.Identity()

    def forward(self, x):
        return F.relu(self.two(F.relu(self.one(x))) + self.short(x))


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_shortcut_around_a_stage_leaves_its_blocks_what_they_are(count):
    model = nn.Sequential(nn.Conv2d(8, 8, 1), Around(Plain(8, 16), *(Plain(16, 16) for _ in range(count))))
    assert find_blocks(model, X).names == tuple(f"1.blocks.{i}" for i in range(count + 1))
