"""Stages come when they are due, and together meet the budget of the whole model."""

from __future__ import annotations

import copy
import json
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modprune import (
    GradualPruning,
    ModularityPruner,
    Settled,
    carry_over,
    count_macs,
    count_params,
    cubic,
    modularity_curve,
)
from modprune.criteria import BlockScores, Modularity
from modprune.data import ImageLoader, digits
from modprune.models import resnet20, resnet32
from modprune.surgery import removed_blocks

X = torch.zeros(1, 3, 8, 8)


def loader() -> ImageLoader:
    return ImageLoader(digits(True), 64)


def test_cubic_rises_to_one_in_ever_smaller_steps():
    shares = cubic(4)
    steps = [b - a for a, b in zip((0.0, *shares), shares, strict=False)]
    assert shares[-1] == 1
    assert steps == sorted(steps, reverse=True)
    assert shares[0] == pytest.approx(1 - 0.75**3)
    assert cubic(1) == (1.0,)


def test_each_stage_meets_its_share_of_the_whole_models_budget():
    torch.manual_seed(0)
    model = resnet32()
    macs, params = count_macs(model, X), count_params(model)
    prune = GradualPruning(
        model, loader(), "l1_norm", at=(2, 3, 5), shares=(0.3, 0.6, 1), flops=0.5, params=0.2, example_inputs=X
    )
    gone = {}
    for count in range(1, 7):
        gone[count] = prune(count), 1 - count_macs(model, X) / macs, 1 - count_params(model) / params
    assert [count for count, (plan, *_) in gone.items() if plan] == [2, 3, 5]
    for count, share in ((2, 0.3), (3, 0.6), (5, 1)):
        assert gone[count][1] >= 0.5 * share - 1e-9
        assert gone[count][2] >= 0.2 * share - 1e-9
    assert gone[2][1] < 0.25  # a stage removes no more than it has to: a block is 6.5 % of the MACs
    assert gone[6][1] < 0.5 + 2 * 0.065
    assert not set(prune.plans[0].remove) & set(prune.plans[1].remove)


def scored(*low: str):
    """A criterion by which these blocks are worth nothing, or less, and the others much."""

    def criterion(model, blocks, loader):
        return BlockScores(blocks.names, np.array([[-0.1 if name in low else 5.0 for name in blocks.names]]))

    return criterion


def test_a_stage_of_so_many_blocks_meets_what_they_stand_for():
    budget = {"blocks": 4, "params": 0.6}  # with the two of layer3 55 %, with two of layer2 as well 69 %
    prune = GradualPruning(resnet20(), loader(), scored("layer1.0", "layer1.1"), at=(1, 2), **budget, example_inputs=X)
    plan = prune(1)  # 0.875 of 4 blocks are all 4, and so it is the whole 60 %
    assert len(plan.remove) == 4
    assert plan.freed["params"] >= 0.6
    assert prune(2) is None


class Deep(nn.Module):
    """Many parameters, few MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1))

    def forward(self, x):
        return x + self.body(x)


class Wide(Deep):
    """Many MACs, few parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())


def test_stages_lead_to_every_budget_that_can_be_met():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Wide(), Deep(), Wide(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    budget = {"blocks": 2, "flops": 0.45, "params": 0.6}  # no single block meets half of both
    for criterion in (scored("1"), scored("2"), scored("1", "3")):
        trial = copy.deepcopy(model)
        at_once = ModularityPruner(trial, X, loader(), criterion, **budget).plan()
        staged = ModularityPruner(trial, X, loader(), criterion, **budget, iterative_steps=2).plan()
        assert staged.remove == at_once.remove
        prune = GradualPruning(trial, loader(), criterion, at=(1, 2), shares=(0.5, 1), **budget)
        assert sorted(prune(1).remove + prune(2).remove) == sorted(at_once.remove)


def test_an_optimizer_that_cannot_go_on_does_not_undo_the_stage():
    model = resnet20()
    first = torch.optim.SGD(model.layer1[0].parameters(), 0.1)
    prune = GradualPruning(model, loader(), scored("layer1.0"), at=(1, 2), shares=(0.5, 1), blocks=2)
    with pytest.raises(ValueError, match="no parameter"):
        prune(1, first)
    prune(2)
    prune(3)
    assert len(removed_blocks(model).remove) == 2


def test_a_stage_whose_count_was_missed_comes_with_the_next():
    prune = GradualPruning(resnet20(), loader(), "l1_norm", at=(1, 3), blocks=4, shares=(0.5, 1))
    assert [plan and len(plan.remove) for plan in map(prune, (2, 3, 4))] == [2, 2, None]
    prune = GradualPruning(resnet20(), loader(), "l1_norm", at=(1, 3), blocks=4, shares=(0.5, 1))
    assert [plan and len(plan.remove) for plan in map(prune, (5, 6))] == [2, 2]


def test_stages_that_never_came_due_are_told():
    model = resnet20()
    prune = GradualPruning(model, loader(), "l1_norm", at=(1, 9), shares=(0.5, 1), blocks=4)
    prune(1)
    with pytest.warns(UserWarning, match=r"1 of 2 stages .*at=\(1, 9\)\), 2 blocks went"):
        prune.warn_if_unfinished()
    prune(9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune.warn_if_unfinished()


def test_a_wrapped_model_is_refused_before_anything_goes():
    with pytest.raises(ValueError, match=r"wrapped in DataParallel: pass model\.module"):
        GradualPruning(torch.nn.DataParallel(resnet20()), loader(), "l1_norm", at=(1,), blocks=1)


def test_a_failed_stage_comes_again():
    def broken(model, blocks, loader):
        raise RuntimeError("no luck")

    prune = GradualPruning(resnet20(), loader(), broken, at=(1,), blocks=2)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no luck"):
            prune(1)


def test_it_goes_on_in_another_process():
    torch.manual_seed(0)
    model, options = (
        resnet20(),
        {"criterion": "l1_norm", "at": np.array([1, 2]), "flops": 0.5, "shares": (np.float32(0.5), 1)},
    )
    prune = GradualPruning(model, loader(), **options)
    other = copy.deepcopy(model)
    prune(1)
    state, weights = json.loads(json.dumps(prune.state_dict())), copy.deepcopy(model.state_dict())
    for start in (other, copy.deepcopy(model)):  # whole, and already without what had gone
        again = GradualPruning(start, loader(), **options, state=state)
        start.load_state_dict(weights)
        assert again.state_dict() == prune.state_dict() == state
        assert again(1) is None
    assert again(2) == prune(2)
    done = GradualPruning(copy.deepcopy(start), loader(), **options, state=again.state_dict())
    assert done(3) is None


def test_what_cannot_go_on_leaves_the_model_as_it_was():
    options = {"criterion": "l1_norm", "at": (1, 2), "blocks": 4, "shares": (0.5, 1)}
    model = resnet20()
    prune = GradualPruning(model, loader(), **options)
    prune(1)
    state, further = prune.state_dict(), copy.deepcopy(model)
    GradualPruning(further, loader(), **options, state=state)(2)
    assert len(removed_blocks(further).remove) == 4
    other = json.loads(state["gone"]) | {"remove": ["layer9.1", "layer1.1"]}
    for start, change, given, message in (
        (further, {}, {}, "the model has lost .* since that state: give it as it was first, whole"),
        (resnet20(), {}, {"blocks": 6}, "of budget={'blocks': 4}, where this is {'blocks': 6}: "),
        (resnet20(), {}, {"shares": (0.8, 1)}, r"of shares=\[0.5, 1.0\], where this is \[0.8, 1.0\]: go on"),
        (resnet20(), {"gone": json.dumps(other)}, {}, "'layer9.1': CifarResNet has no such block"),
        (resnet20(), {"plans": 3}, {}, "state={.*: what state_dict gave is needed"),
        (resnet20(), {"stage": 3}, {}, "state={.*: what state_dict gave is needed"),
        (resnet20(), {"stage": -1}, {}, "state={.*: what state_dict gave is needed"),
        (resnet20(), {"whole": {"flops": 0, "params": 0}}, {}, "state={.*: what state_dict gave is needed"),
        (resnet20(), {"count": "x"}, {}, "state={.*: what state_dict gave is needed"),
        (resnet20(), {"gone": 3}, {}, "state={.*: what GradualPruning.state_dict gave is needed"),
    ):
        before = removed_blocks(start)
        with pytest.raises(ValueError, match=message):
            GradualPruning(start, loader(), **(options | given), state=state | change)
        assert removed_blocks(start) == before


def test_the_rng_is_left_alone():
    data = torch.utils.data.TensorDataset(torch.randn(40, 3, 8, 8), torch.arange(40) % 4)
    shuffling = torch.utils.data.DataLoader(data, 20, shuffle=True)
    model, before = resnet20(), torch.get_rng_state()
    GradualPruning(model, shuffling, at=(1,), blocks=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_optimizer_goes_on_with_its_momentum():
    torch.manual_seed(0)
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    prune = GradualPruning(model, loader(), "l1_norm", at=(1,), blocks=3)
    kept = {}
    for step, (x, y, _) in enumerate(loader(), 1):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if step == 1:
            before = {id(p): s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
            prune(step, optimizer)
            kept = {id(p): s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
            assert all(torch.equal(before[key], value) for key, value in kept.items())
            assert set(kept) == {id(p) for p in model.parameters()}
        if step == 3:
            break
    assert len(kept) < len(before)


def test_settled_means_that_no_point_has_moved():
    torch.manual_seed(0)
    model = resnet20()
    settled = Settled(loader(), tolerance=1e-6, samples=100)
    prune = GradualPruning(model, loader(), "l1_norm", at=settled, blocks=2, shares=(0.5, 1))
    assert prune(1) is None  # nothing to hold it against
    with torch.no_grad():
        model.layer2[0].conv1.weight.normal_()
    assert prune(2) is None  # it has moved
    assert prune(3) is not None
    assert prune(4) is None  # another network now
    assert prune(5) is not None
    assert prune(6) is None  # all is gone that has to
    assert sum(len(plan.remove) for plan in prune.plans) == 2


def test_settled_has_its_tolerance():
    model = resnet20()
    before = modularity_curve(model, loader(), samples=100, repeats=1).mean
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.layer3[2].conv1.weight.mul_(0.5)
    step = float(np.abs(modularity_curve(moved, loader(), samples=100, repeats=1).mean - before).max())
    assert step > 0
    for tolerance, expected in ((0.99 * step, False), (1.01 * step, True)):
        settled = Settled(loader(), tolerance=tolerance, samples=100)
        assert [settled(1, model), settled(2, moved)] == [False, expected]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": (1, 2), "shares": (1,), "blocks": 2}, "2 counts in at and 1 shares: give one share for each"),
        ({"at": (1, 2), "shares": (0.5, 0.9), "blocks": 2}, r"shares=\(0.5, 0.9\): they rise from above 0 to 1"),
        *(({"at": (1, 2, 3), "shares": s, "blocks": 2}, "they rise from") for s in [(0, 0.5, 1), (0.5, 0.5, 1), "abc"]),
        ({"at": (1, 2), "shares": (np.nan, 1), "blocks": 2}, r"shares=\(nan, 1\): they rise from"),
        ({"at": (), "blocks": 2}, r"at=\(\): whole counts from 1 on that rise"),
        ({"at": (3, 1), "blocks": 2}, r"at=\(3, 1\): whole counts from 1 on that rise"),
        ({"at": (1.5,), "blocks": 2}, r"at=\(1.5,\): whole counts from 1 on that rise"),
        ({"at": "12", "blocks": 2}, "at=12: whole counts from 1 on that rise"),
        ({"at": 5, "blocks": 2}, "at=5: whole counts from 1 on that rise"),
        ({"at": np.array([3, 1]), "blocks": 2}, r"at=\[3 1\]: whole counts from 1 on that rise"),
        ({"at": (1,)}, "flops"),
        ({"at": (1,), "flops": 0.99}, "flops=0.99"),
        ({"at": (1,), "blocks": 2, "criterion": "nope"}, "nope"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(resnet20(), loader(), **arguments)


def test_the_loop_goes_on_where_its_workers_persist():
    data = digits(True)
    rows = TensorDataset(data.images[:128] / 255, data.labels[:128], torch.arange(128))
    batches = DataLoader(rows, 16, num_workers=1, persistent_workers=True)
    prune = GradualPruning(resnet20(), batches, Modularity(samples=32, repeats=1), at=(2, 4), shares=(0.5, 1), blocks=2)
    seen = [(index, prune(count)) for count, (_, _, index) in enumerate(batches, 1)]
    assert torch.cat([index for index, _ in seen]).tolist() == list(range(128))
    assert [count for count, (_, plan) in enumerate(seen, 1) if plan] == [2, 4]


def test_an_optimizer_with_groups_by_layer_goes_on_in_another_process():
    torch.manual_seed(0)

    def begin(weights=None):
        model = resnet20()
        groups = [{"params": list(layer.parameters()), "lr": 0.1 / (1 + i)} for i, layer in enumerate(model.layer1)]
        return model, torch.optim.SGD([*groups, {"params": model.linear.parameters()}], 0.1, momentum=0.9)

    model, optimizer = begin()
    images = next(iter(loader()))[0]
    model(images).sum().backward()
    optimizer.step()
    prune = GradualPruning(model, loader(), "l1_norm", at=(1, 2), blocks=8)
    prune(1, optimizer)
    kept = copy.deepcopy((prune.state_dict(), model.state_dict(), optimizer.state_dict()))
    again, other = begin()
    with carry_over(again, other):
        GradualPruning(again, loader(), "l1_norm", at=(1, 2), blocks=8, state=kept[0])
    again.load_state_dict(kept[1])
    other.load_state_dict(kept[2])
    for one, its in ((model, optimizer), (again, other)):
        its.zero_grad()
        one(images).sum().backward()
        its.step()
    assert all(map(torch.equal, model.parameters(), again.parameters()))
