"""Taking blocks out."""

from __future__ import annotations

import copy
import itertools
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from modprune import surgery
from modprune._depgraph import dependency_graph
from modprune.blocks import find_blocks
from modprune.cost import count_macs, count_params
from modprune.models import resnet20
from modprune.plan import PruningPlan
from modprune.surgery import remove_blocks, removed_blocks

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet20().eval()


def test_removing_an_identity_block_whose_branch_is_zero_changes_nothing():
    model = network()
    with torch.no_grad():
        model.layer2[1].bn2.weight.zero_()
        before = model(X)
        assert torch.equal(remove_blocks(model, ["layer2.1"])(X), before)


@pytest.mark.parametrize("size", range(8))
def test_any_identity_blocks_may_go(size):
    model = network()
    names = [b.name for b in find_blocks(model, X) if b.kind == "identity"]
    assert len(names) == 7
    for subset in itertools.combinations(names, size):
        pruned = remove_blocks(copy.deepcopy(model), subset, kinds=["identity"] * size)
        output = pruned(X[:, :, :8, :8])
        assert output.shape == (2, 10)
        output.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())


@pytest.mark.parametrize("names", [("layer1.0",), ("layer1.1", "layer2.0", "layer3.2"), ("layer2.0", "layer3.0")])
@pytest.mark.parametrize("example", [None, X])
def test_what_goes_is_the_sum_of_the_blocks_and_the_rest_keeps_its_names(names, example):
    model = network()
    blocks = {b.name: b for b in find_blocks(model, X)}
    params, macs, keys = count_params(model), count_macs(model, X), set(model.state_dict())
    remove_blocks(model, names, example_inputs=example)
    assert params - count_params(model) == sum(blocks[name].params for name in names)
    assert macs - count_macs(model, X) == sum(blocks[name].macs for name in names)
    assert set(model.state_dict()) == {key for key in keys if not key.startswith(tuple(n + "." for n in names))}
    plan = removed_blocks(copy.deepcopy(model))
    assert dict(zip(plan.remove, plan.kinds, strict=True)) == {name: blocks[name].kind for name in names}
    loss = model.train()(X).square().sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert {b.name for b in find_blocks(model, X)} == set(blocks) - set(names)
    dependency_graph(model, X)


def test_projection_shortcuts_stay():
    model = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 64, 64)
    block = model.layer2[0]
    remove_blocks(model, ["layer2.0"], example_inputs=x)
    h = torch.randn(1, 64, 8, 8)
    assert torch.equal(model.layer2[0](h), torch.relu(block.downsample(h)))


def test_unsuitable_names_and_wrappers_leave_the_model_whole():
    model = network()
    before = model(X)
    for names, kinds, message in (
        (["layer9.1"], [], "no such block; near: layer"),
        (["?"], [], r"no such block; see model\.named_modules"),
        (["conv1"], [], "cannot be removed"),
        (["layer1.0", "linear"], [], "cannot be removed"),
        ([""], [], "no such block"),
        ("layer1.0", [], r"a list of names is needed, as \['layer1.0'\]"),
        (["layer1.0", "layer1.0"], [], "layer1.0: named more than once"),
        (["layer1", "layer1.0"], [], "layer1.0: named more than once, or inside another"),
        (["layer1.0"], ["identity", "identity"], "2 kinds for 1 blocks"),
        (["layer1.0"], ["square"], "of kind 'square'"),
        (["conv1"], ["plain"], "of kind 'plain'"),
    ):
        for example in [None] if kinds else [None, X]:
            with pytest.raises(ValueError, match=message):
                remove_blocks(model, names, kinds=kinds, example_inputs=example)
    with pytest.raises(ValueError, match="the plan says identity, but here it is of kind transition"):
        remove_blocks(model, ["layer1.0", "layer2.0"], kinds=["identity"] * 2, example_inputs=X)
    with pytest.raises(ValueError, match=r"pass model.module"):
        remove_blocks(nn.DataParallel(model), ["layer1.0"])
    assert torch.equal(model(X), before)
    remove_blocks(model, ["layer1.0"])
    with pytest.raises(ValueError, match="already removed"):
        remove_blocks(model, ["layer1.0"])


class Peeking(nn.Module):
    """Looks inside its blocks, or counts them, in the forward."""

    def __init__(self, peek) -> None:
        super().__init__()
        self.net, self.peek = resnet20(), peek

    def forward(self, x):
        return self.peek(self.net, self.net(x))


@pytest.mark.parametrize(
    ("peek", "problem"),
    [
        (lambda net, y: y * net.layer2[1].conv1.weight.sum(), "removing net.layer2.1 failed: .*no attribute 'weight'"),
        (lambda net, y: y[:, : 2 + len(list(net.layer2[1].children()))], r"removing net.layer2.1 failed: .*had shape"),
    ],
)
def test_a_failed_proof_puts_the_blocks_back_and_names_the_one_at_fault(peek, problem):
    model = Peeking(peek).eval()
    before, modules = model(X), list(model.modules())
    with pytest.raises(RuntimeError, match=problem + ".*; the model is as it was"):
        remove_blocks(model, ["net.layer1.0", "net.layer2.1", "net.layer3.1"], example_inputs=X)
    assert list(model.modules()) == modules
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("roll", [random.random, np.random.random, lambda: torch.rand(()).item()])
def test_a_network_that_rolls_dice_is_not_blamed_for_it_and_they_are_put_back(roll):
    model = Peeking(lambda net, y: y + roll()).eval()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    remove_blocks(model, ["net.layer2.1"], example_inputs=X)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states


class Dropping(nn.Module):
    """A residual block that drops at random in eval mode too, as for an estimate of its doubt."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return x + nn.functional.dropout(self.conv(x), 0.3, training=True)


def test_blocks_that_roll_dice_go_though_those_after_them_roll_others_then():
    model = remove_blocks(nn.Sequential(Dropping(), Dropping()), ["0"], example_inputs=X)
    assert removed_blocks(model).remove == ("0",)


def test_a_network_that_steers_by_attributes_of_its_layers():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False).eval()
    x = torch.randn(2, 5, 16)
    blocks = find_blocks(model, x)
    assert blocks.names == ("layers.0", "layers.1", "layers.2")
    assert {block.exact for block in blocks} == {False}  # post-norm
    expected = model.layers[2](x)
    remove_blocks(model, ["layers.0", "layers.1"], example_inputs=x)
    torch.testing.assert_close(model(x), expected)


class NormedSum(nn.Module):
    """A residual block whose norm and activation follow the sum."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.branch, self.norm = nn.Conv2d(8, 8, 3, padding=1), norm

    def forward(self, x):
        return torch.relu(self.norm(x + self.branch(x)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(4, 8), nn.InstanceNorm2d(8, affine=True)], ids=str)
def test_a_block_goes_with_the_norm_behind_its_sum(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), *(NormedSum(copy.deepcopy(norm)) for _ in range(3)), nn.Flatten()).eval()
    x = torch.randn(2, 3, 8, 8)
    assert [(block.name, block.kind, block.exact) for block in find_blocks(model, x)] == [
        (name, "identity", False) for name in "123"
    ]
    expected = nn.Sequential(model[0], model[1], model[3], model[4])(x)
    remove_blocks(model, ["2"], example_inputs=x)
    assert torch.equal(model(x), expected)
    assert not list(model[2].parameters())


class Detector(nn.Module):
    """Gives back as many rows as it finds."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.net, self.batch_first = resnet20(), batch_first

    def forward(self, x):
        y = self.net(x)
        found = y[: 1 + len(list(self.net.layer1[1].children()))]  # fewer once that block is gone
        return found if self.batch_first else [{"boxes": found.repeat(3, 1), "kind": y}]


def test_what_a_detector_finds_may_change_in_number_but_not_the_batch():
    x = X.repeat(3, 1, 1, 1)
    remove_blocks(Detector(False).eval(), ["net.layer1.1"], example_inputs=x)
    with pytest.raises(RuntimeError, match="the output had shape"):
        remove_blocks(Detector(True).eval(), ["net.layer1.1"], example_inputs=x)


def test_parameters_that_do_not_fall_as_they_should_are_a_failure(monkeypatch):
    model = network()
    monkeypatch.setattr(surgery, "stand_ins", lambda model, name, *_: {name: copy.deepcopy(model.layer1[1])})
    with pytest.raises(RuntimeError, match=r"removing layer1.0 .*269,722 parameters are left where 265,050 at most"):
        remove_blocks(model, ["layer1.0"], outputs=[()], example_inputs=X)
    assert not removed_blocks(model).remove


def test_a_convolution_inside_a_residual_block_is_no_plain_unit():
    for example in (None, X):
        with pytest.raises(ValueError, match=r"layer1.0.conv2: cannot be removed"):
            remove_blocks(network(), ["layer1.0.conv2"], example_inputs=example)


def test_plain_units():
    features = torchvision.models.vgg.make_layers([4, 4, "M", 8, 8, 8], batch_norm=True)
    model = nn.Sequential(OrderedDict(features=features, pool=nn.AdaptiveAvgPool2d(1), head=nn.Flatten())).eval()
    x = torch.randn(2, 3, 16, 16)
    blocks = find_blocks(model, x)
    assert blocks.names == ("features.3", "features.10", "features.13")
    for example in (None, x):
        pruned = remove_blocks(copy.deepcopy(model), blocks.names[1:], example_inputs=example)
        assert count_params(model) - count_params(pruned) == 2 * (8 * 8 * 9 + 8 + 2 * 8)
        assert removed_blocks(pruned) == PruningPlan(blocks.names[1:], ("plain", "plain"), ((), ()))
        assert torch.equal(pruned.features(x), model.features[:10](x))
        assert not find_blocks(pruned, x).names[1:]


class Tuples(nn.Module):
    """A block that gives back a pair and takes a mask by name, as decoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, mask=None):
        return x + self.f(x), mask


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Linear(4, 4), nn.ModuleList([Tuples(), Tuples()])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x, _ = block(x=x, mask=None)
        return x


@pytest.mark.parametrize("example", [None, X[0, 0, :, :4]])
def test_blocks_that_give_tuples(example):
    model = Decoder()
    remove_blocks(model, ["blocks.0", "blocks.1"], example_inputs=example)
    assert torch.equal(model(X[0, 0, :, :4]), model.stem(X[0, 0, :, :4]))


class Same(Tuples):
    """Gives the sum twice."""

    def forward(self, x, mask=None):
        y = x + self.f(x)
        return y, y


def test_a_value_given_twice_is_given_twice():
    model, x = Decoder(), X[0, 0, :, :4]
    model.blocks = nn.ModuleList([Same(), Same()])
    model.forward = lambda x: model.blocks[1](model.blocks[0](model.stem(x))[1])[1]
    assert find_blocks(model, x)[0].outputs == (0, 0)
    remove_blocks(model, ["blocks.0", "blocks.1"], example_inputs=x)
    assert torch.equal(model(x), model.stem(x))


class Sized(nn.Module):
    """Gives the sizes of the image back, as it was given them beside another number."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x, heads, height, width, flag=True):
        return x + self.f(x), height, width


@pytest.mark.parametrize(
    ("height", "width", "clear"), [(2, 3, True), (3, 3, True), (1, 1, True), (8, 3, False), (2, 8, False)]
)
def test_which_of_several_equal_numbers_comes_back_is_not_guessed(height, width, clear):
    model = nn.Sequential(nn.Linear(4, 4), Sized())
    model.forward = lambda x: model[1](model[0](x), 8, height, width, True)[0]
    blocks = find_blocks(model, X[0, 0, :, :4])
    assert (blocks.names == ("1",)) == clear
    assert clear or "give example inputs that differ in them" in blocks.refused["1"]
    assert not clear or blocks[0].outputs == (0, 2, 3)


def test_lazy_layers_have_to_run_before():
    model = nn.Sequential(nn.LazyLinear(4), Tuples(), Tuples())
    model[1].f = nn.LazyLinear(4)
    with pytest.raises(ValueError, match=r"^1.f.weight: has no shape yet.*run the model on one batch"):
        remove_blocks(model, ["1"])
    remove_blocks(model, ["2"])  # those of others may come later


class Gates(Tuples):
    """Its second value is made in it."""

    def forward(self, x, mask=None):
        return x + self.f(x), self.f(x)


def test_whether_a_second_value_is_used_is_not_guessed():
    model = Decoder()
    model.blocks = nn.ModuleList([Gates()])
    with pytest.raises(ValueError, match=r"^blocks.0: cannot be removed: .* made in it; give example_inputs"):
        remove_blocks(model, ["blocks.0"])
    assert isinstance(model.blocks[0], Gates)
    remove_blocks(model, ["blocks.0"], example_inputs=X[0, 0, :, :4])
    assert model.blocks[0](X)[1] is None


def test_form_of_the_weights_and_modes_stay():
    model = torchvision.models.resnet18().to(memory_format=torch.channels_last, dtype=torch.float64).train()
    model.layer2[0].downsample[1].eval()
    kept = {name: (t.dtype, t.stride()) for name, t in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    remove_blocks(model, ["layer1.0", "layer2.0", "layer4.1"], example_inputs=x)
    assert all(kept[name] == (t.dtype, t.stride()) for name, t in model.state_dict().items())
    assert all(modes[name] == module.training for name, module in model.named_modules())


def test_the_kind_found_without_inputs_is_the_kind_found_with_them():
    for name in ("resnet18", "mobilenet_v3_small", "regnet_y_400mf", "convnext_tiny", "swin_t"):
        model = getattr(torchvision.models, name)()
        x = torch.randn(1, 3, 64, 64)
        blocks = find_blocks(model, x)
        params = count_params(model)
        macs = count_macs(model, x)
        remove_blocks(model, blocks.names)
        plan = removed_blocks(model)
        assert set(zip(plan.remove, plan.kinds, plan.outputs, strict=True)) == {
            (block.name, block.kind, block.outputs) for block in blocks
        }
        assert params - count_params(model) == sum(block.params for block in blocks)
        assert macs - count_macs(model, x) == sum(block.macs for block in blocks)


def test_where_torch_pruning_gives_up_depth_pruning_stands(monkeypatch):
    def fail(*_):
        raise RuntimeError("no dependency graph")

    monkeypatch.setattr(surgery, "dependency_graph", fail)
    model = network()
    with pytest.warns(RuntimeWarning, match=r"not to be trusted: no dependency graph"):
        remove_blocks(model, ["layer1.0"], example_inputs=X)
    assert removed_blocks(model).remove == ("layer1.0",)
