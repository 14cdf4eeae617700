"""Training goes on after surgery as if the optimizer had only ever known what is left."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from timm.optim import Lookahead
from torch import nn

from modprune import ModularityPruner, PruningPlan, carry_over
from modprune.models import resnet20

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 0.01),
}
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 4


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.train()(IMAGES), LABELS).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_what_stays_keeps_its_group_and_state(kind):
    torch.manual_seed(0)
    model = resnet20()
    stem, rest = list(model.conv1.parameters()), [p for n, p in model.named_parameters() if n != "conv1.weight"]
    optimizer = OPTIMIZERS[kind]([{"params": stem, "lr": 0.5}, {"params": rest}])
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    steps(model, optimizer, 2)
    before = {n: copy.deepcopy(optimizer.state[p]) for n, p in model.named_parameters()}
    with carry_over(model, optimizer):
        PruningPlan(("layer1.0", "layer3.2")).apply(model)
    now = dict(model.named_parameters())
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, len(now) - 1]
    assert set(optimizer.state) == set(now.values())
    for name, parameter in now.items():
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(before[name][key]))
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.25
    steps(model, optimizer, 1)


def test_names_go_with_their_parameters():
    model = resnet20()
    optimizer = torch.optim.AdamW(model.named_parameters(), 0.01)
    with carry_over(model, optimizer):
        PruningPlan(("layer1.0",)).apply(model)
    (group,) = optimizer.param_groups
    assert dict(zip(group["param_names"], group["params"], strict=True)) == dict(model.named_parameters())


def test_an_optimizer_with_a_list_of_its_own_is_refused_before_the_surgery():
    model = resnet20()
    with (
        pytest.raises(ValueError, match="LBFGS cannot be carried over"),
        carry_over(model, torch.optim.LBFGS(model.parameters())),
    ):
        PruningPlan(("layer1.0",)).apply(model)
    assert type(model.layer1[0]).__name__ == "BasicBlock"


def test_a_schedule_given_for_an_optimizer_is_refused_before_the_surgery():
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for given in (torch.optim.lr_scheduler.StepLR(optimizer, 1), [optimizer]):
        with pytest.raises(ValueError, match=f"{type(given).__name__} is no optimizer"), carry_over(model, given):
            PruningPlan(("layer1.0",)).apply(model)
    assert len(list(model.parameters())) == len(list(resnet20().parameters()))


def test_what_an_optimizer_keeps_under_other_keys_than_parameters_stays():
    model = resnet20()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state["steps"] = 3
    with carry_over(model, optimizer):
        PruningPlan(("layer1.0",)).apply(model)
    assert dict(optimizer.state) == {"steps": 3}


def test_an_optimizer_dealt_out_to_processes_is_refused_before_the_surgery():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = resnet20()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(ValueError, match="has dealt the parameters out"), carry_over(model, optimizer):
            PruningPlan(("layer1.0",)).apply(model)
    finally:
        dist.destroy_process_group()
    assert type(model.layer1[0]).__name__ == "BasicBlock"


def test_training_on_equals_a_fresh_optimizer_given_the_same_state():
    torch.manual_seed(0)
    model = resnet20()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer, 2)
    with carry_over(model, optimizer):
        PruningPlan(("layer2.1",)).apply(model)
    twin = copy.deepcopy(model)
    fresh = OPTIMIZERS["sgd"](twin.parameters())
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(twin, fresh, 2)
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


def test_fused_momentum_goes_on_as_the_other():
    ends = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = resnet20()
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=fused)
        steps(model, optimizer, 1)
        with carry_over(model, optimizer):
            ModularityPruner(model, IMAGES[:1], [(IMAGES, LABELS)], "l1_norm", blocks=1, width=0.5).step()
        steps(model, optimizer, 2)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends)


def test_narrowed_layers_begin_anew_in_their_group():
    torch.manual_seed(0)
    model = resnet20()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    steps(model, optimizer, 1)
    old = set(model.parameters())
    with carry_over(model, optimizer):
        ModularityPruner(model, IMAGES[:1], [(IMAGES, LABELS)], "l1_norm", blocks=1, width=0.5).step()
    assert optimizer.param_groups[0]["params"] == list(model.parameters())
    assert set(optimizer.state) == old & set(model.parameters())
    assert set(optimizer.state) != set(model.parameters())
    steps(model, optimizer, 1)


def test_weights_shared_with_a_block_that_goes_stay():
    model = resnet20()
    model.layer1[1].conv1.weight = model.layer1[0].conv1.weight
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    with carry_over(model, optimizer):
        PruningPlan(("layer1.0",)).apply(model)
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())


def test_of_two_surgeries_the_first_stays_done_when_the_second_fails():
    model = resnet20()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    plan = PruningPlan(("layer1.0",))
    with pytest.raises(ValueError, match="already removed"), carry_over(model, optimizer):
        plan.apply(plan.apply(model))
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())


def test_parameters_of_others_stay_and_an_empty_optimizer_is_refused():
    model, scale = resnet20(), nn.Parameter(torch.ones(()))
    both = OPTIMIZERS["sgd"]([*model.parameters(), scale])
    inner = OPTIMIZERS["sgd"](model.layer1[0].parameters())
    with carry_over(model, both):
        PruningPlan(("layer1.1",)).apply(model)
    assert any(p is scale for p in both.param_groups[0]["params"])
    with pytest.raises(ValueError, match="SGD has no parameter left"), carry_over(model, inner):
        PruningPlan(("layer1.0",)).apply(model)


@pytest.mark.parametrize("wrap", [Lookahead, lambda inner: Lookahead(Lookahead(inner))])
def test_an_optimizer_around_another_shares_its_groups(wrap):
    model = resnet20()
    optimizer = wrap(torch.optim.Adam(model.parameters()))
    steps(model, optimizer, 2)
    with carry_over(model, optimizer):
        PruningPlan(("layer1.0",)).apply(model)
    count = len(list(model.parameters()))
    assert len(optimizer.state_dict()["state"]) == len(optimizer.state_dict()["param_groups"][0]["params"]) == count


class Several(torch.optim.Optimizer):
    """One that steps several."""

    def __init__(self, *inner: torch.optim.Optimizer) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], {})
        self.inner, self.param_groups = {"all": list(inner)}, [group for one in inner for group in one.param_groups]

    def step(self) -> None:
        for one in self.inner["all"]:
            one.step()


def test_optimizers_that_one_holds_in_a_list_go_on():
    model = resnet20()
    layers = [p for n, p in model.named_parameters() if "linear" not in n]
    inner = torch.optim.SGD(layers, 0.1, momentum=0.9), torch.optim.Adam(model.linear.parameters())
    optimizer = Several(*inner)
    steps(model, optimizer, 2)
    with carry_over(model, optimizer):
        PruningPlan(("layer1.0",)).apply(model)
    states = [one.state_dict() for one in inner]
    assert [len(state["state"]) for state in states] == [len(list(model.parameters())) - 2, 2]
    steps(model, optimizer, 1)
    with pytest.raises(ValueError, match="LBFGS"), carry_over(model, Several(torch.optim.LBFGS(model.parameters()))):
        pass
