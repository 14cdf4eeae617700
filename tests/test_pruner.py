"""The pruner joins the parts: budget met, exact choice, model and ignored layers left alone."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from modprune import compare, evaluate, finetune, load, pruner, save
from modprune.blocks import find_blocks
from modprune.budget import Budget, Candidate
from modprune.cost import count_macs, count_params
from modprune.criteria import BlockScores, Modularity
from modprune.data import ImageLoader, digits
from modprune.gradual import GradualPruning
from modprune.models import resnet32, vgg11_bn
from modprune.pruner import ModularityPruner
from tests.oracles import best_set

X = torch.zeros(1, 3, 8, 8)


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet32()


def loader() -> ImageLoader:
    return ImageLoader(digits(True), 100)


def by_name(scores: dict[str, float]):
    def criterion(model, blocks, loader):
        return BlockScores(blocks.names, np.array([[scores.get(name, 1.0) for name in blocks.names]]))

    return criterion


def test_modularity_chooses_exactly_what_brute_force_chooses():
    model = network()
    pruner = ModularityPruner(model, X, loader(), flops=0.5, params=0.3)
    plan = pruner.plan()
    found = find_blocks(model, X)
    candidates = [Candidate(b.name, plan.scores[b.name], b.macs, b.params) for b in found]
    assert pruner.scores is not None
    assert pruner.scores.curve is not None
    assert list(plan.scores.values()) == pytest.approx(pruner.scores.curve.gain.tolist())
    assert plan.remove == best_set(candidates, Budget(0.5, 0.3), count_macs(model, X), count_params(model))
    assert plan == ModularityPruner(model, X, loader(), flops=0.5, params=0.3).plan()


def test_step_frees_what_the_plan_says():
    model = network()
    before = count_macs(model, X), count_params(model)
    pruner = ModularityPruner(model, X, loader(), flops=0.4)
    plan = pruner.plan()
    assert (count_macs(model, X), count_params(model)) == before
    assert pruner.step() is model
    assert 1 - count_macs(model, X) / before[0] == pytest.approx(plan.freed["flops"])
    assert 1 - count_params(model) / before[1] == pytest.approx(plan.freed["params"])
    assert plan.freed["flops"] >= 0.4


def test_a_budget_of_time(monkeypatch):
    """Stage 3 takes most of the time, whatever this machine says; equal blocks count alike; a transition's shortcut
    is not saved.
    """
    model = network()
    takes = {"": 10.0} | {b.name: 2.0 if b.name.startswith("layer3") else 0.1 for b in find_blocks(model, X)}
    takes["layer1.0"], takes["layer1.1"] = 0.0, 0.2
    monkeypatch.setattr(pruner, "latency_by_module", lambda *_: takes)
    plan = ModularityPruner(model, X, loader(), by_name({}), latency=0.35, iterative_steps=2).plan()
    assert [name[:6] for name in plan.remove] == ["layer3", "layer3"]
    assert 0.35 <= plan.freed["latency"] <= 0.4
    assert plan.freed["flops"] < 0.35


def test_time_is_measured_where_it_is_the_budget():
    model = network()
    plan = ModularityPruner(model, X, loader(), by_name({}), latency=0.2).plan()
    assert 0.2 <= plan.freed["latency"] < 0.5
    assert "latency" not in ModularityPruner(model, X, loader(), by_name({}), flops=0.2).plan().freed


class Nested(nn.Module):
    """`x + conv(inner(x))`: no block of its own as long as the inner ones are there, which hold most of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(Plus(), Plus())
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x + self.conv(self.inner(x))


class Plus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())

    def forward(self, x):
        return x + self.f(x)


def test_parameters_that_blocks_share_among_themselves_are_freed_with_the_last():
    shared = Plus()
    blocks = [shared, Plus(), Plus()]
    blocks[1].f = shared.f
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks, nn.Flatten())
    for lowest, steps in product(({"1": 0, "2": 0}, {"1": 0, "3": 0}), (1, 2)):
        trial, whole = copy.deepcopy(model), count_params(model)
        pruner = ModularityPruner(trial, X, [], by_name(lowest), blocks=2, iterative_steps=steps)
        freed = pruner.plan().freed["params"]
        assert freed == pytest.approx(1 - count_params(pruner.step()) / whole)
        assert freed == pytest.approx(count_params(blocks[2]) / whole)


def test_stages_choose_among_the_blocks_of_the_whole_model():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Nested(), Nested()), torch.randn(1, 3, 6, 6)
    names = find_blocks(model, x).names
    assert names == ("1.inner.0", "1.inner.1", "2.inner.0", "2.inner.1")
    scores = {name: float(i) for i, name in enumerate(names)}
    plan = ModularityPruner(model, x, [], by_name(scores), blocks=3, iterative_steps=3).plan()
    assert plan.remove == names[:3]
    assert plan.freed["params"] == pytest.approx(3 * 148 / count_params(model))


def test_stages_remove_as_many_blocks_as_asked_for_or_say_what_is_missing():
    model, bad = network(), {f"layer1.{i}": -1.0 for i in range(4)}
    plan = ModularityPruner(model, X, loader(), by_name(bad), flops=0.1, blocks=2, iterative_steps=4).plan()
    assert len(plan.remove) == 2
    with pytest.raises(ValueError, match=r"no single block meets flops=0.08: so many free at most 6.9%"):
        ModularityPruner(model, X, loader(), by_name({}), flops=0.08, blocks=1, iterative_steps=4).plan()


def test_a_budget_met_early_ends_the_stages():
    every = {block.name: -1.0 for block in find_blocks(network(), X)}
    plan = ModularityPruner(network(), X, loader(), by_name(every), flops=0.1, iterative_steps=2).plan()
    assert plan.remove == tuple(every)


def test_a_network_without_any_product_can_lose_parameters():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x + torch.tanh(x * self.gate)

    model, x = nn.Sequential(*(nn.Sequential(Gate()) for _ in range(3))), torch.randn(40, 4)
    assert count_macs(model, x) == 0
    plan = ModularityPruner(model, x, [(x, torch.arange(40) % 2)], "block_influence", params=0.3).plan()
    assert (len(plan.remove), plan.freed["flops"]) == (1, 0)
    gradual = GradualPruning(model, [(x, torch.arange(40) % 2)], "block_influence", at=[1], params=0.3)
    assert len(gradual(1).remove) == 1


def test_ignored_layers_stay():
    model, scores = network(), {"layer1.1": -5.0, "layer2.3": -4.0, "layer3.3": -3.0, "layer3.4": -2.0}
    pruner = ModularityPruner(model, X, loader(), by_name(scores), blocks=2,
                              ignored_layers=[model.layer1, "layer2.3.conv1"])  # fmt: skip
    assert pruner.plan().remove == ("layer3.3", "layer3.4")
    with pytest.raises(ValueError, match="no module of the model"):
        ModularityPruner(model, X, loader(), blocks=2, ignored_layers=["layer7"])


def test_ignored_layers_stay_by_every_name_and_as_the_end_of_a_plain_unit():
    options = {"example_inputs": torch.zeros(1, 3, 32, 32), "loader": [], "criterion": "l1_norm", "blocks": 1}
    first = ModularityPruner(vgg11_bn(width=0.125), **options).plan().remove[0]
    activation = f"features.{int(first.split('.')[1]) + 2}"
    second = ModularityPruner(vgg11_bn(width=0.125), **options, ignored_layers=[activation]).plan().remove[0]
    assert first != second
    shared = network()
    shared.layer1[2].conv1 = shared.layer1[0].conv1
    pruner = ModularityPruner(shared, X, [], "l1_norm", blocks=5, ignored_layers=[shared.layer1[0].conv1])
    assert not {"layer1.0", "layer1.2"} & set(pruner.plan().remove)


def test_iterations_meet_the_same_budget_and_measure_anew():
    seen = []

    def criterion(model, blocks, loader):
        seen.append(len(blocks))
        return BlockScores(blocks.names, np.arange(len(blocks), dtype=float)[None])

    model = network()
    before = copy.deepcopy(model)
    plan = ModularityPruner(model, X, loader(), criterion, blocks=5, iterative_steps=3).plan()
    assert len(plan.remove) == 5
    assert seen == [15, 13, 12]
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no budget"),
        ({"flops": 1.0}, "flops=1.0: a fraction"),
        ({"blocks": 1, "criterion": "magic"}, "criterion 'magic' is unknown: give one of modularity"),
        ({"blocks": 1, "criterion": ["dbp"]}, r"criterion \['dbp'\] is unknown: give one of modularity"),
        ({"blocks": 1, "width": "0.3"}, "width='0.3': a fraction"),
        *(
            ({"blocks": 1, "iterative_steps": n}, f"iterative_steps={n!r}: a whole number")
            for n in (0, 1.5, "2", np.inf)
        ),
        ({"blocks": 1, "ignored_layers": None}, r"ignored_layers=None: a list of modules or of their names"),
        ({"blocks": 1, "ignored_layers": "layer1"}, r"names is needed, as \['layer1'\]"),
        ({"blocks": 1, "iterative_steps": 1.5}, "iterative_steps=1.5: a whole number"),
    ],
)
def test_arguments_are_checked_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        ModularityPruner(network(), X, loader(), **arguments)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_wrapped_model_is_refused_at_once():
    with pytest.raises(ValueError, match="the model is compiled"):
        ModularityPruner(torch.compile(network()), X, loader(), blocks=1)
    in_place = network()
    in_place.compile(backend="eager")
    with pytest.raises(ValueError, match=r"compiled in place: copy\.deepcopy"):
        ModularityPruner(in_place, X, loader(), blocks=1)
    ModularityPruner(copy.deepcopy(in_place), X, loader(), blocks=1)


def test_a_default_device_that_is_another_than_the_models_is_of_no_concern(tmp_path):
    """On the meta device nothing that is made could be used, as little as on another one of a tensor on the CPU."""
    data, results = digits(True).subset(torch.arange(200)), []
    for default in ("cpu", "meta"):
        model, original = network(), network()
        with torch.device(default):
            batches, plain = ImageLoader(data, 50, pad=1, shuffle=True), ImageLoader(data, 100)
            scorer = Modularity(samples=80, repeats=3)
            pruned = ModularityPruner(model, X, batches, scorer, blocks=2, width=0.2).step()
            finetune(pruned, batches, teacher=original, epochs=1, lr=1e-3, progress=False)
            save(pruned, tmp_path / "pruned.safetensors")
            compare(original, pruned, X, plain)
            results.append(evaluate(pruned, plain))
        results.append(evaluate(load(tmp_path / "pruned.safetensors", original), ImageLoader(data, 100)))
    assert len(set(results)) == 1


def test_inference_mode_leaves_nothing_behind(tmp_path):
    whole, fresh = network(), network()
    with torch.inference_mode():
        pruner = ModularityPruner(whole, X, loader(), "l1_norm", blocks=3, width=0.2, iterative_steps=2)
        model = pruner.step()
        save(model, tmp_path / "a.safetensors")
        loaded = load(tmp_path / "a.safetensors", fresh)
        assert torch.is_inference_mode_enabled()
    for trained in (model.train(), loaded.train()):
        trained(X.repeat(2, 1, 1, 1)).sum().backward()


def test_what_cannot_be_had_says_the_most():
    with pytest.raises(ValueError, match=r"flops=0.999 cannot be met: removing all 15 removable blocks frees only 9\d"):
        ModularityPruner(network(), X, loader(), by_name({}), flops=0.999).plan()
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    with pytest.raises(ValueError, match="Sequential has no block that can be removed"):
        ModularityPruner(plain, X, loader(), blocks=1).plan()
