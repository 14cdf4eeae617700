"""Costs against counts by hand and the published figures."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from modprune.cost import (
    count_macs,
    count_params,
    latency,
    latency_by_module,
    mac_differences,
    macs_by_counter,
    macs_by_module,
)
from modprune.models import resnet20, resnet56


def resnet_macs(blocks: int) -> int:
    """3x3 convolutions of a CIFAR ResNet, written out: stem, stages at 32, 16 and 8 pixels, the linear layer."""
    total = 3 * 16 * 9 * 32**2 + 64 * 10
    for width, size, entering in ((16, 32, 16), (32, 16, 16), (64, 8, 32)):
        total += (entering * width + (2 * blocks - 1) * width * width) * 9 * size**2
    return total


@pytest.mark.parametrize(("make", "blocks"), [(resnet20, 3), (resnet56, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_macs_equal_the_count_by_hand(make, blocks, batch):
    assert count_macs(make(), torch.zeros(batch, 3, 32, 32)) == resnet_macs(blocks)


def test_published_figures():
    macs = macs_by_counter(resnet56(), torch.zeros(1, 3, 32, 32))
    assert {name: round(count[""] / 1e6, 3) for name, count in macs.items()} == {
        "modprune": 125.486,
        "fvcore": 126.555,
        "thop": 127.616,
    }
    assert count_params(resnet56()) == 853_018


@pytest.mark.parametrize(("name", "millions"), [("resnet50", 4089.2), ("vit_b_16", 17563.8)])
def test_published_figures_of_larger_networks(name, millions):
    with torch.device("meta"):
        macs = count_macs(getattr(torchvision.models, name)(), torch.zeros(1, 3, 224, 224))
    assert round(macs / 1e6, 1) == millions


@pytest.mark.parametrize("batch", [1, 2])
def test_differences_are_explained_by_hand(batch):
    """Batch norm of c channels on s x s pixels: fvcore counts 2 and thop 4 for each element."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    images, elements = torch.zeros(batch, 3, 5, 5), 4 * 5 * 5
    macs = macs_by_counter(model, images)
    assert mac_differences(model, macs) == {
        "fvcore": {"BatchNorm2d": 2 * elements},
        "thop": {"BatchNorm2d": 4 * elements},
    }
    assert macs["fvcore"][""] - macs["modprune"][""] == 2 * elements


class Listed(nn.Module):
    """Calls what a list holds, and never the list."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) for _ in range(2)])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_a_list_of_modules_explains_nothing():
    model = Listed()
    differences = mac_differences(model, macs_by_counter(model, torch.zeros(1, 4, 5, 5)))
    assert differences == {name: {"BatchNorm2d": 2 * n * 4 * 5 * 5} for name, n in (("fvcore", 2), ("thop", 4))}


def test_attention_is_what_the_cross_checks_miss():
    layer, tokens = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), torch.zeros(1, 5, 8)
    missed = mac_differences(layer, macs_by_counter(layer, tokens))
    assert missed["fvcore"]["MultiheadAttention"] == -2 * 5 * 5 * 8  # Q K^T and its product with V
    assert missed["thop"]["MultiheadAttention"] == -2 * 5 * 5 * 8 - 5 * 4 * 8 * 8  # and all four projections


class Odd(nn.Module):
    """Beyond thop, which sees layers alone, and beyond fvcore, whose tracer takes no plain numbers as outputs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 3))

    def forward(self, x, _):
        return {"logits": nn.functional.linear(x, self.weight), "size": 3}


def test_a_counter_that_cannot_is_left_out():
    inputs = torch.zeros(1, 3), torch.zeros(5, 5)
    assert macs_by_counter(Odd(), inputs) == {"modprune": {"": 12}}
    assert latency({"odd": Odd()}, inputs, batch=2, seconds=0)["odd"] > 0


class Cached(nn.Linear):
    """Makes something in its first pass that all later ones use."""

    scale: torch.Tensor | None = None

    def forward(self, x):
        self.scale = torch.ones(3) if self.scale is None else self.scale
        return super().forward(x) * self.scale


def test_a_measured_model_can_still_be_trained():
    model = Cached(3, 3)
    latency({"a": model}, torch.zeros(1, 3), seconds=0)
    model(torch.zeros(1, 3)).sum().backward()


class Masked(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) + mask.sum()


def test_masks_are_not_repeated():
    seen = []
    model = Masked(3, 3)
    model.register_forward_pre_hook(lambda _, inputs: seen.append([tuple(i.shape) for i in inputs]))
    latency({"a": model}, (torch.zeros(1, 3), torch.zeros(5, 5)), batch=4, seconds=0)
    assert seen[0] == [(4, 3), (5, 5)]


def test_attention_is_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = 5
    by_hand = tokens * (4 * 8 * 8 + 2 * 8 * 16) + 2 * tokens * tokens * 8
    assert count_macs(layer, torch.zeros(1, tokens, 8)) == by_hand


class _Odd(nn.Module):
    """Products in functions that few layers call."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.gru, self.bilinear = nn.GRU(6, 6), nn.Bilinear(6, 6, 6)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scripting is deprecated, and still met
            self.script = torch.jit.script(nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bsi,ij->bsj", x, self.weight) @ self.weight + torch.addmm(x[0], x[0], self.weight)
        x = torch.ops.aten.bmm(x, x.transpose(1, 2)) @ self.gru(x)[0] + torch.baddbmm(x, x @ x.mT, x)
        return self.script(self.bilinear(x, torch.tensordot(x, self.weight, 1)))


@pytest.mark.parametrize(
    ("make", "shape"),
    [(_Odd, (2, 5, 6)), *((getattr(torchvision.models, n), (2, 3, 64, 64)) for n in ("mobilenet_v3_small", "swin_t"))],
)
def test_torchs_own_counter_which_looks_at_every_operation_says_the_same(make, shape):
    model, x = make().eval(), torch.randn(shape)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    assert count_macs(model, x) == counter.get_total_flops() // 2 // len(x) > 0


def test_modules_add_up():
    macs = macs_by_module(resnet20(), torch.zeros(1, 3, 32, 32))
    assert macs[""] == sum(macs[name] for name in ("conv1", "layer1", "layer2", "layer3", "linear"))


def test_counting_leaves_the_model_as_found():
    model = torchvision.models.resnet18().train()
    model.bn1.weight.requires_grad_(False)
    keys, state = set(model.state_dict()), model.bn1.running_mean.clone()
    macs_by_counter(model, torch.randn(1, 3, 64, 64))
    assert set(model.state_dict()) == keys
    assert model.training
    assert not model.bn1.weight.requires_grad
    assert torch.equal(model.bn1.running_mean, state)
    assert not any(m._forward_hooks for m in model.modules())


class Slow(nn.Linear):
    """Takes one second of a clock of its own."""

    now = 0.0

    def forward(self, x):
        Slow.now += 1
        return super().forward(x)


def test_time_is_told_apart_by_module_and_leaves_no_hook(monkeypatch):
    monkeypatch.setattr("modprune.cost._clock", lambda device: Slow.now)
    model = nn.Sequential(nn.Linear(2, 2), Slow(2, 2), nn.Sequential(Slow(2, 2), Slow(2, 2)))
    times = latency_by_module(model, ["0", "1", "2"], torch.zeros(1, 2), seconds=0)
    assert times == {"": 3, "0": 0, "1": 1, "2": 2}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_machine_that_disturbs_every_pass_somewhere_makes_no_part_seem_small(monkeypatch):
    class Late(Slow):
        calls = 0

        def forward(self, x):
            Late.calls += 1
            Slow.now += 10 * (Late.calls % 4 == 0)  # in every pass that counts, another part
            return super().forward(x)

    monkeypatch.setattr("modprune.cost._clock", lambda device: Slow.now)
    model = nn.Sequential(*(Late(2, 2) for _ in range(3)))
    times = latency_by_module(model, ["0", "1"], torch.zeros(1, 2), seconds=0)
    assert times == {"": 3, "0": 1, "1": 1}


def test_a_larger_network_takes_longer():
    times = latency({"small": resnet20(), "large": resnet56()}, torch.zeros(1, 3, 32, 32), seconds=0.5)
    assert times["large"] > times["small"] > 0


def test_a_model_that_cannot_be_copied_is_counted_all_the_same():
    model = nn.Sequential(nn.Linear(3, 2))
    model.lock = threading.Lock()
    assert macs_by_counter(model, torch.zeros(1, 3)) == {"modprune": {"": 6, "0": 6}}


class Grouped(nn.Module):
    """Experts, each for some of the rows, in one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 8, 16))

    def forward(self, x):
        return F.grouped_mm(x, self.weight, offs=torch.tensor([4, len(x)], dtype=torch.int32))


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_products_in_groups_count():
    assert count_macs(Grouped().bfloat16(), torch.randn(8, 8).bfloat16()) == 8 * 16


def test_what_runs_in_inference_mode_counts():
    class Frozen(nn.Sequential):
        @torch.inference_mode()
        def forward(self, x):
            return super().forward(x)

    layers = nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)
    assert count_macs(Frozen(*layers), torch.zeros(2, 3, 8, 8)) == 36 * 27 * 8 + 8 * 36 * 4
