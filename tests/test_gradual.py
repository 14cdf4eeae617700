"""Stages come when they are due, and together meet the budget of the whole model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from modprune import GradualPruning, Settled, count_macs, count_params, cubic
from modprune.data import ImageLoader, digits
from modprune.models import resnet20, resnet32

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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"at": (1, 2), "shares": (1,), "blocks": 2}, "2 counts in at and 1 shares: give one share for each"),
        ({"at": (1, 2), "shares": (0.5, 0.9), "blocks": 2}, r"shares=\(0.5, 0.9\): they rise to 1"),
        ({"at": (1,)}, "flops"),
        ({"at": (1,), "blocks": 2, "criterion": "nope"}, "nope"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        GradualPruning(resnet20(), loader(), **arguments)
