"""A model is as it was found, whatever it keeps, caches or counts in a forward pass."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from modprune import PruningPlan, find_blocks
from modprune._state import copied, evaluating, state_kept, traceable
from tests.oracles import snapshot
from tests.test_strangers import Net, Residual

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Caching(nn.Linear):
    """Keeps what it makes in its first pass, in every way that modules do."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.by_device, self.history, self.last, self.passes = {"old": 1}, [], None, 0

    def forward(self, x):
        self.by_device["cpu"] = self.weight * 2
        self.history.append(self.weight * 2)
        self.last = self.extra = self.weight * 2
        self.passes += 1
        return super().forward(x)


def test_what_a_module_caches_in_a_pass_does_not_stay():
    model = Caching()
    by_device, history = model.by_device, model.history
    with traceable(model):
        model(torch.ones(1, 2))
    copy.deepcopy(model)
    assert model.by_device is by_device
    assert model.history is history
    assert (by_device, history, model.last, hasattr(model, "extra")) == ({"old": 1}, [], None, False)
    assert model.passes == 0


def test_a_buffer_that_a_pass_replaced_is_back():
    class Replaces(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("last", torch.zeros(2))

        def forward(self, x):
            self.last = super().forward(x).mean(0)
            return self.last

    model = Replaces()
    buffer = model.last
    with traceable(model):
        model(torch.ones(1, 2))
    assert model.last is buffer
    copy.deepcopy(model)


@pytest.mark.parametrize("passes", [1, 0])
def test_a_buffer_is_written_to_only_if_it_has_changed(passes):
    model = nn.BatchNorm1d(2)
    mean, version = model.running_mean.clone(), model.running_mean._version
    with state_kept(model):
        for _ in range(passes):
            model(torch.randn(4, 2))
    assert torch.equal(model.running_mean, mean)
    assert (model.running_mean._version == version) == (passes == 0)


class Storing(Net):
    """Keeps its feature in a container of its caller's choice."""

    def __init__(self, store, keep) -> None:
        super().__init__(Residual(), Residual())
        self.store, self.keep = store, keep

    def forward(self, x):
        self.keep(self.store, self.stem(x))
        return super().forward(x)


@pytest.mark.parametrize(
    ("store", "keep"),
    [
        (OrderedDict(a=1), lambda store, x: store.update(x=x)),
        (defaultdict(list), lambda store, x: store["x"].append(x)),
        (deque([1], maxlen=2), lambda store, x: store.append(x)),
        ({"a": ([],)}, lambda store, x: store["a"][0].append(x)),
        (SimpleNamespace(x=None, all=[]), lambda store, x: (setattr(store, "x", x), store.all.append(x))),
        ({1}, lambda store, x: store.add(x)),
    ],
)
def test_every_container_holds_what_it_held(store, keep):
    model, before = Storing(store, keep).eval(), copy.deepcopy(store)
    find_blocks(model, X)
    assert model.store is store
    assert store == before
    PruningPlan(("blocks.1",)).apply(copy.deepcopy(model), X)


class Remembering(nn.Module):
    """What it gives depends on what it was given before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.state = nn.Conv2d(8, 8, 1), None

    def forward(self, x):
        y = self.conv(x)
        self.state = y if self.state is None else self.state / 2 + y
        return x + torch.tanh(self.state)


def test_a_network_with_a_memory_remembers_nothing_of_the_search_and_the_proof():
    model = Net(Remembering(), Remembering(), Remembering()).eval()
    expected = copy.deepcopy(model)
    expected.blocks[1] = nn.Identity()
    with torch.no_grad():
        assert find_blocks(model, X).names == ("blocks.0", "blocks.1", "blocks.2")
        PruningPlan(("blocks.1",)).apply(model, X)
        assert torch.equal(model(X), expected(X))


class Sized(nn.Module):
    """Makes a table for the size of its input, in a buffer, and notes the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.size = nn.Conv2d(8, 8, 1), 4
        self.register_buffer("table", torch.ones(4, 4))

    def forward(self, x):
        if x.shape[-1] != self.size:
            self.size, self.table = x.shape[-1], torch.ones(x.shape[-1], x.shape[-1])
        return x + self.conv(x) * self.table


def test_a_table_and_the_note_of_its_size_come_back_together():
    model = Net(Sized(), Sized())
    find_blocks(model, X)
    assert model.blocks[0].size == len(model.blocks[0].table) == 4
    model(X[..., :4, :4])


class Rescaling(Net):
    """Changes its weights in its first pass in eval mode, as RWKV does, and notes that."""

    def __init__(self) -> None:
        super().__init__(Residual(), Residual())
        self.rescaled = False

    def forward(self, x):
        if not self.training and not self.rescaled:
            self.rescaled = True
            with torch.no_grad():
                self.head.weight /= 2
        return super().forward(x)


class Capturing(Net):
    """Makes hooks in its first pass and notes that, as transformers do to give features back."""

    def __init__(self) -> None:
        super().__init__(Residual(), Residual(), Residual())
        self.ready, self.features = False, []

    def forward(self, x):
        if not self.ready:
            self.ready = True
            for block in self.blocks:
                block.register_forward_hook(lambda _, __, out: self.features.append(out))
        self.features = []
        return super().forward(x), *self.features


def test_hooks_that_a_network_makes_itself_are_made_once():
    model = Capturing().eval()
    assert len(find_blocks(model, X)) == 3
    assert len(model(X)) == 4
    fresh = Capturing().eval()
    PruningPlan(("blocks.1",)).apply(fresh, X)
    assert len(fresh(X)) == 4


class Growing(Net):
    """Makes a layer without weights in every pass."""

    def __init__(self) -> None:
        super().__init__(Residual(), Residual())
        self.seen = []

    def forward(self, x):
        self.resize = nn.Upsample(size=x.shape[-2:])
        self.seen.append(x)
        return super().forward(self.resize(x))


def test_layers_that_come_or_fill_themselves_in_a_pass_are_no_obstacle():
    growing, lazy = Growing(), Net(Residual(), nn.LazyConv2d(8, 1), Residual())
    assert find_blocks(growing, X).names == ("blocks.0", "blocks.1")
    assert growing.seen == []
    assert find_blocks(lazy, X).names == ("blocks.0", "blocks.2")


class Building(nn.Module):
    """Makes its network when it is first used."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def forward(self, x):
        if self.net is None:
            self.net = Net(Residual(), Residual())
        return self.net(x)


def test_a_network_that_has_changed_or_made_itself_knows_that_it_has():
    model = Rescaling()
    expected = copy.deepcopy(model).eval()(X)
    find_blocks(model, X)
    torch.testing.assert_close(model.eval()(X), expected)
    building = Building().eval()
    find_blocks(building, X)
    built = building.net
    PruningPlan(("net.blocks.0",)).apply(building, X)
    building(X)
    assert building.net is built


class LowRank(nn.Linear):
    """As those of LoRA: its product is in the weights while it is evaluated."""

    merged = False

    def train(self, mode=True):
        if mode == self.merged:
            self.bias.data += -1 if mode else 1
            self.merged = not mode
        return super().train(mode)


class Frozen(nn.BatchNorm1d):
    """Never trains, whatever it is told."""

    def train(self, mode=True):
        return super().train(False)


@pytest.mark.parametrize("inner", [True, False])
def test_modes_come_back_by_what_train_does(inner):
    model = nn.Sequential(LowRank(2, 2), nn.Sequential(LowRank(2, 2), nn.Dropout()), Frozen(2))
    nn.init.zeros_(model[0].bias)
    nn.init.zeros_(model[1][0].bias)
    model.train()
    model[1].train(inner)
    modes = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert model[0].merged
    assert [module.training for module in model.modules()] == modes
    assert all(map(torch.equal, weights, model.parameters()))


class Noisy(nn.Module):
    """Counts its calls in a buffer and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x + torch.rand(()))


def test_buffers_and_random_numbers_come_back():
    model = Noisy()
    before = snapshot(model)
    with traceable(model):
        model(torch.zeros(1, 2))
    assert snapshot(model) == before


def test_a_copy_holds_the_values_of_the_model_and_nothing_else_of_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    model[2].weight.requires_grad_(False)
    model.tied = model[0].weight
    trial = copied(model)
    assert all(a is not b for a, b in zip(model.parameters(), trial.parameters(), strict=True))
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(model.parameters(), trial.parameters(), strict=True))
    assert [p.requires_grad for p in trial.parameters()] == [p.requires_grad for p in model.parameters()]
    assert trial.tied is trial[0].weight
    trial.train()(torch.randn(2, 3, 2, 2))
    assert not torch.equal(model[1].running_mean, trial[1].running_mean)
