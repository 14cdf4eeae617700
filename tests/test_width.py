"""Channels that go are as if they had been masked; the plan, the file and the report know of them."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.zoo_networks import NETWORKS
from modprune import ModularityPruner, PruningPlan, compare, find_blocks, load, save
from modprune._inputs import call
from modprune.cost import count_macs, count_params
from modprune.models import resnet20
from modprune.surgery import removed_blocks
from modprune.width import choose_cuts, narrow, narrowed_layers

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with batch norms that do something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def masked(model: nn.Module, cuts, silenced) -> nn.Module:
    """The oracle: no channel goes, but those to cut are zero behind the layer `silenced(name)`, a norm or the root."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, channels in cuts:
            layer = model.get_submodule(silenced(name))
            layer.weight[list(channels)] = 0
            if layer.bias is not None:
                layer.bias[list(channels)] = 0
    return model


def outputs(model, inputs):
    with torch.no_grad():
        out = call(model, inputs)
    return out if isinstance(out, torch.Tensor) else out[0] if isinstance(out, tuple) else next(iter(out.values()))


CASES = {
    "resnet20": (resnet20, X, lambda name: name.replace("conv", "bn")),
    "resnet50": (torchvision.models.resnet50, X, lambda name: name.replace("conv", "bn")),
    "resnext": (torchvision.models.resnext50_32x4d, X, lambda name: name.replace("conv", "bn")),
    "vit": (*NETWORKS["vit"], lambda name: name),
    "llama": (*NETWORKS["llama"], lambda name: name.replace("gate", "up")),
    "bert": (*NETWORKS["bert"], lambda name: name),
}


@pytest.mark.parametrize("name", CASES)
def test_cut_channels_are_as_if_masked(name):
    torch.manual_seed(0)
    make, inputs, silenced = CASES[name]
    model = randomised(make()).double()  # sums in another order differ in float32
    inputs = tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
    cuts = choose_cuts(model, find_blocks(model, inputs), inputs, 0.3)
    narrowed = copy.deepcopy(model)
    narrow(narrowed, cuts, inputs)
    assert count_params(narrowed) < 0.95 * count_params(model)
    torch.testing.assert_close(outputs(narrowed, inputs), outputs(masked(model, cuts, silenced), inputs))
    # and the mask is no idle one
    assert not torch.allclose(outputs(narrowed, inputs), outputs(model, inputs), atol=1e-4)


def test_only_inner_channels_go_the_weakest_first():
    model = resnet20().eval()
    with torch.no_grad():
        model.layer2[1].conv1.weight[5:9] = 0
    cuts = dict(choose_cuts(model, find_blocks(model, X), X, 0.125, ignored=["layer3"]))
    assert set(cuts) == {f"layer{s}.{b}.conv1" for s in (1, 2) for b in range(3)}
    assert {name: len(channels) for name, channels in cuts.items()} == dict.fromkeys(cuts, 2) | {
        f"layer2.{b}.conv1": 4 for b in range(3)
    }
    assert cuts["layer2.1.conv1"] == (5, 6, 7, 8)


@pytest.fixture
def loader():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(100, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset(images, torch.arange(100) % 5), 50)


def test_depth_then_width_in_one_plan_one_file_and_one_report(tmp_path, loader):
    torch.manual_seed(0)
    model = resnet20().to(memory_format=torch.channels_last)
    frozen = ["conv1.weight", "layer1.1.conv1.weight", "layer1.1.bn1.bias"]  # the last two get narrower
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    original, example = copy.deepcopy(model), torch.zeros(1, 3, 16, 16)
    pruner = ModularityPruner(model, example, loader, "block_influence", blocks=3, width=0.25)
    plan = pruner.plan()
    assert (len(plan.remove), len(plan.width)) == (3, 6)
    assert PruningPlan.from_json(plan.to_json()) == plan
    assert pruner.step() is model
    freed = 1 - count_macs(model, example) / count_macs(original, example)
    assert plan.freed["flops"] == pytest.approx(freed)
    assert plan.freed["params"] == pytest.approx(1 - count_params(model) / count_params(original))
    assert set(frozen) == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert original.get_parameter(frozen[1]).shape != model.get_parameter(frozen[1]).shape
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)
    again = plan.apply(copy.deepcopy(original), example)
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor)

    save(model.eval(), tmp_path / "m.safetensors")
    for loaded in (load(tmp_path / "m.safetensors"), load(tmp_path / "m.safetensors", resnet20())):
        assert torch.equal(loaded.to(memory_format=torch.channels_last).eval()(X), model(X))
        assert removed_blocks(loaded).remove == removed_blocks(model).remove
        assert narrowed_layers(loaded) == narrowed_layers(model)
        assert loaded.layer3[0].conv1.out_channels == model.layer3[0].conv1.out_channels
    report = compare(original.eval(), model, example, loader)
    assert report.pruned.params == count_params(model)


def test_narrowed_layers_lie_in_memory_as_they_did_when_they_come_from_a_file(tmp_path, loader):
    model = resnet20().to(memory_format=torch.channels_last)
    ModularityPruner(model, X, loader, "l1_norm", blocks=1, width=0.5).step()
    save(model, tmp_path / "narrow.safetensors")
    found = load(tmp_path / "narrow.safetensors", resnet20().to(memory_format=torch.channels_last))
    for name, parameter in found.named_parameters():
        assert parameter.stride() == model.get_parameter(name).stride(), name


def test_a_state_of_something_else_than_tensors_has_no_width(loader):
    class Counting(type(resnet20())):
        def get_extra_state(self):
            return {"steps": 3}

    model = Counting((1, 1, 1))
    ModularityPruner(model, torch.zeros(1, 3, 16, 16), loader, "l1_norm", blocks=1, width=0.25).step()
    assert narrowed_layers(model)


def test_a_file_of_narrowed_layers_does_not_fit_another_network(tmp_path):
    model = resnet20()
    narrow(model, choose_cuts(model, find_blocks(model, X), X, 0.5), X)
    save(model, tmp_path / "m.safetensors")
    for other, message in (
        (resnet20(num_classes=7), "number of classes"),
        (torchvision.models.resnet18(), "another network"),
    ):
        before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "m.safetensors", other)
        assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())


@pytest.mark.parametrize(
    ("width", "message"),
    [
        ((("layer1.9.conv1", (0,)),), "has no such layer"),
        ((("layer1.0.conv1", ()),), "0 channels to cut are not some of its 16"),
        ((("layer1.0.conv1", (16,)),), "not some of its 16"),
        ((("layer1.0.conv1", tuple(range(16))),), "not some of its 16"),
    ],
)
def test_plans_that_do_not_fit_leave_the_model(width, message):
    model = resnet20()
    with pytest.raises(ValueError, match=message):
        PruningPlan(("layer2.1",), width=width).apply(model, X)
    assert count_params(model) == count_params(resnet20())
    with pytest.raises(ValueError, match="give example_inputs"):
        PruningPlan(width=(("layer1.0.conv1", (0,)),), remove=()).apply(model)


def test_cutting_what_the_output_carries_is_refused():
    model = resnet20()
    with pytest.raises(RuntimeError, match=r"cutting channels of \S+ failed: .* had shape .*; cut only channels that"):
        PruningPlan(("layer2.1",), width=(("linear", (1, 2)),)).apply(model, X)
    assert count_params(model) == count_params(resnet20())


@pytest.mark.parametrize("width", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_out_of_range(loader, width):
    with pytest.raises(ValueError, match=f"width={width}: a fraction between 0 and 1"):
        ModularityPruner(resnet20(), X, loader, blocks=1, width=width)


class Plus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x):
        return x + self.b(self.a(x).relu())


def test_no_block_left_is_no_reason_to_cut_the_trunk():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Plus(), nn.Conv2d(8, 5, 1))
    with pytest.raises(ValueError, match=r"has no channels inside its blocks .* or no block is left"):
        ModularityPruner(model, X, [], "l1_norm", blocks=1, width=0.5).plan()


def test_layers_that_share_weights_keep_their_channels():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Plus(), Plus(), Plus(), nn.Conv2d(8, 5, 1))
    model[2].a.weight = model[1].a.weight
    assert [name for name, _ in choose_cuts(model, find_blocks(model, X), X, 0.5)] == ["3.a"]


def test_parametrized_layers_are_left_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Plus(), weight_norm(nn.Conv2d(8, 5, 1)), weight_norm(nn.Conv2d(5, 2, 1)))
    cuts = choose_cuts(model, find_blocks(model, X), X, 0.5)
    narrowed = copy.deepcopy(model)
    narrow(narrowed, cuts, X)
    assert [name for name, _ in cuts] == ["1.a"]
    torch.testing.assert_close(outputs(narrowed, X), outputs(masked(model, cuts, lambda name: name), X))


def test_no_channels_that_can_go():
    model = torchvision.models.alexnet().eval()
    with pytest.raises(ValueError, match="has no channels inside its blocks"):
        choose_cuts(model, find_blocks(model, X), X, 0.5, ignored=["features", "classifier"])


class Gated(nn.Module):
    def __init__(self, gate) -> None:
        super().__init__()
        self.a, self.b, self.gate = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), gate

    def forward(self, x):
        return x + self.b(self.gate(self.a(x)))


@pytest.mark.parametrize(
    ("gate", "apart"),
    [
        (lambda h: h * h.mean((2, 3), keepdim=True).sigmoid(), True),
        (lambda h: h * h.mean(-1, keepdim=True).sigmoid(), True),
        (lambda h: h * h.mean(1, keepdim=True).sigmoid(), False),
        (lambda h: h * h.mean(-3, keepdim=True).sigmoid(), False),
        (lambda h: h * h.mean().sigmoid(), False),
        (lambda h: h.roll((1, 1), (2, 3)), True),
        (lambda h: h.roll(1, 1), False),
        (lambda h: h.unflatten(1, (2, 4)).transpose(1, 2).reshape(h.shape), False),  # a channel shuffle
        (lambda h: h.flatten(2).unflatten(2, h.shape[2:]), True),
    ],
)
def test_channels_that_are_averaged_or_rolled_together_stay(gate, apart):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Gated(gate), nn.Flatten(), nn.Linear(8 * 64 * 64, 4)).eval()
    blocks = find_blocks(model, X)
    if not apart:
        with pytest.raises(ValueError, match="has no channels inside its blocks"):
            choose_cuts(model, blocks, X, 0.5)
        return
    cuts = choose_cuts(model, blocks, X, 0.5)
    narrowed = copy.deepcopy(model)
    narrow(narrowed, cuts, X)
    torch.testing.assert_close(outputs(narrowed, X), outputs(masked(model, cuts, lambda name: name), X))


class Transposed(nn.Module):
    def __init__(self, shrunk: int, grown: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, shrunk, 3, 2, 1), nn.Conv2d(grown, 16, 1)
        self.up, self.bn = nn.ConvTranspose2d(shrunk, grown, 2, 2), nn.BatchNorm2d(grown)

    def forward(self, x):
        return x + self.b(self.bn(self.up(self.a(x).relu())).relu())


@pytest.mark.parametrize("sizes", [(32, 8), (8, 32)])
def test_transposed_convolutions_are_cut_and_come_back(sizes, tmp_path):
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3), Transposed(*sizes), Transposed(*sizes), nn.AdaptiveAvgPool2d(1))

    model, x = make(), torch.randn(2, 3, 18, 18)
    ModularityPruner(model, x, [], "l1_norm", blocks=1, width=0.25).step()
    block = next(module for module in model.modules() if isinstance(module, Transposed))
    assert (block.up.in_channels, block.up.out_channels) == tuple(3 * size // 4 for size in sizes)
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors", make())
    assert repr(again) == repr(model)
    assert torch.equal(outputs(again.eval(), x), outputs(model.eval(), x))
