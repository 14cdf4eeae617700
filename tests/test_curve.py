"""The curve against Q of plainly hooked features, at any memory budget."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, TensorDataset

from modprune.blocks import find_blocks
from modprune.cost import count_macs
from modprune.curve import ModularityCurve, modularity_curve
from modprune.data import ImageLoader, cifar10
from modprune.features import LayerGrams
from modprune.graph import modularity
from modprune.models import CifarResNet, resnet20
from modprune.samples import draw_samples
from modprune.weights import load_weights


def loader(samples: int, batch: int = 17, classes: int = 4, form: str = "tuple"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 3, 8, 8, generator=generator)
    batches = list(DataLoader(TensorDataset(x, torch.arange(samples) % classes), batch))
    return [{"x": a, "labels": b} for a, b in batches] if form == "dict" else batches


def network() -> nn.Module:
    torch.manual_seed(0)
    return resnet20()


def hooked(model: nn.Module, x: torch.Tensor, layers: tuple[str, ...]) -> dict[str, torch.Tensor]:
    features: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(n).register_forward_hook(lambda _, __, o, n=n: features.__setitem__(n, o.clone()))
        for n in layers
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    return features


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_every_point_equals_q_of_the_hooked_feature(form):
    model, batches = network(), loader(120)
    curve = modularity_curve(model, loader(120, form=form), samples=60, repeats=2)
    assert curve.layers == ("conv1", *(f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)))
    x, y = torch.cat([a for a, _ in batches]), torch.cat([b for _, b in batches])
    for repeat in range(2):
        part = slice(60 * repeat, 60 * (repeat + 1))
        for i, (_, feature) in enumerate(hooked(model, x[part], curve.layers).items()):
            assert curve.q[repeat, i] == pytest.approx(modularity(feature, y[part]), abs=1e-6)


class Viewing(nn.Module):
    """`view` here asks for channels first: of every batch, or of those with more than one image."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.body, self.whole = network(), whole

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.relu()
        return self.body(x.view(len(x), -1).view_as(x) if self.whole else x.view(-1, *x.shape[2:]).view_as(x))


@pytest.mark.parametrize("whole", [True, False])
def test_a_network_that_needs_channels_first_gets_them(whole):
    model = Viewing(whole).eval()
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last))
    batches = [(a.relu(), b) for a, b in loader(64)]
    of_body = modularity_curve(model.body, batches, samples=64, repeats=1)
    assert np.abs(modularity_curve(model, loader(64), samples=64, repeats=1).q - of_body.q).max() < 1e-6


def test_a_stem_whose_weight_is_parametrized_is_a_layer():
    model = network()
    weight_norm(model.conv1)
    assert modularity_curve(model, loader(64), samples=64, repeats=1).layers[:2] == ("conv1", "layer1.0")


@pytest.mark.filterwarnings("ignore")  # torch.jit is on its way out
def test_a_stem_is_no_layer_that_is_scripted():
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 3, 1)), nn.Conv2d(3, 16, 1), network().layer1, nn.Flatten())
    assert modularity_curve(model, loader(64), samples=64, repeats=1).layers[:2] == ("1", "2.0")


def test_blocks_may_be_a_list_of_some():
    model = network()
    some = [block for block in find_blocks(model, torch.zeros(1, 3, 8, 8)) if block.kind == "identity"]
    curve = modularity_curve(model, loader(64), samples=64, repeats=1, blocks=some)
    assert curve.layers == ("conv1", *(block.name for block in some))


def test_less_memory_takes_more_passes_that_end_sooner_and_gives_the_same_numbers():
    model, ran = network(), Counter()
    hooks = [m.register_forward_hook(lambda m, *_: ran.update([m])) for m in (model.conv1, model.linear)]
    ample = modularity_curve(model, loader(64), samples=64, repeats=1)
    few = ran[model.conv1]
    ran.clear()
    tight = modularity_curve(model, loader(64), samples=64, repeats=1, budget=4 * 64 * (1024 + 2 * 64))
    assert ran[model.conv1] > 2 * few
    assert ran[model.linear] < few
    assert np.array_equal(ample.q, tight.q)
    tighter = modularity_curve(model, loader(64), samples=64, repeats=1, budget=4 * 64 * (100 + 2 * 64))
    assert np.abs(tighter.q - ample.q).max() < 1e-6
    for hook in hooks:
        hook.remove()


def test_a_budget_for_the_products_alone_is_refused():
    with pytest.raises(ValueError, match=rf"budget={8 * 64 * 64} for 64 samples: at least {4 * 64 * 192} bytes"):
        modularity_curve(network(), loader(64), samples=64, repeats=1, budget=8 * 64 * 64)
    modularity_curve(network(), loader(64), samples=64, repeats=1, budget=4 * 64 * 192, layers=["layer3.2"])


def test_features_stay_below_the_budget():
    budget = 4 * 64 * (1024 + 2 * 64)
    grams = LayerGrams(network(), ("layer3.0", "conv1", "layer2.0"), budget)  # the first pass is the smallest
    for sample in draw_samples(loader(64), 64, 1):
        arenas = {grams._arena.data_ptr(): grams._arena.numel() * 4 for _ in grams(sample)}
        assert len(arenas) == 1
        assert max(arenas.values()) <= budget


def test_samples_are_disjoint_then_random_but_the_same_each_time():
    batches = loader(50)
    sets = [torch.cat([x for x, _ in sample])[:, 0, 0, 0].tolist() for sample in draw_samples(batches, 20, 4)]
    again = [torch.cat([x for x, _ in sample])[:, 0, 0, 0].tolist() for sample in draw_samples(batches, 20, 4)]
    assert sets == again
    assert all(len(set(chosen)) == 20 for chosen in sets)
    assert not set(sets[0]) & set(sets[1])
    assert sets[2] != sets[3]


def test_no_more_is_read_than_is_asked_for():
    read: list[int] = []
    lazily = (batch for batch in loader(120, batch=10) if not read.append(1))
    assert len(list(draw_samples(lazily, 30, 2))) == 2
    assert len(read) == 6


def test_random_samples_come_in_batches_where_their_sizes_allow():
    assert [len(labels) for _, labels in [*draw_samples(loader(40, batch=10), 30, 2)][1]] == [10, 10, 10]
    ragged = [(torch.ones(4, 3 + i), torch.arange(4)) for i in range(3)]
    assert {len(labels) for _, labels in [*draw_samples(ragged, 8, 2)][1]} == {1}


@pytest.mark.parametrize("sizes", [(8, 12), (12, 8)])
def test_inputs_of_several_sizes_are_named(sizes):
    batches = [(torch.randn(30, 3, size, size), torch.arange(30) % 3) for size in sizes]
    with pytest.raises(ValueError, match=r"layer conv1: \d+ values a sample, \d+ in the first one"):
        modularity_curve(network(), batches, samples=60, repeats=1)


def test_whole_numbers_may_be_floats():
    model, wanted = network(), {"samples": 30.0, "repeats": 2.0, "k": 3.0}
    assert np.array_equal(
        modularity_curve(model, loader(60), **wanted).q, modularity_curve(model, loader(60), 3, 30, 2).q
    )


def test_what_gives_no_batches_is_named():
    for example in (None, torch.zeros(1, 3, 8, 8)):
        with pytest.raises(ValueError, match="a loader of type int: give batches, as a list or a DataLoader"):
            modularity_curve(network(), 5, example_inputs=example)


def test_a_loader_that_is_spent_is_named():
    with pytest.raises(ValueError, match="read only once"):
        modularity_curve(network(), (batch for batch in loader(60)), samples=60, repeats=1)


def test_the_model_is_left_as_found():
    model = network().train()
    model.layer2.eval()
    modes = [m.training for m in model.modules()]
    mean = model.bn1.running_mean.clone()
    shuffled = DataLoader(TensorDataset(torch.randn(40, 3, 8, 8), torch.arange(40) % 2), 8, shuffle=True)
    random = torch.get_rng_state()
    modularity_curve(model, shuffled, samples=40, repeats=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(model.bn1.running_mean, mean)
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 60, "samples": 60}, "k=60 with 60 samples"),
        ({"samples": 130}, "holds 120 samples, 130 are asked for: ask for 120 at most"),
        ({"samples": 4, "k": 1}, "4 samples of as many classes"),
        ({"samples": 9000}, "at most 8192"),
        ({"repeats": 0}, "repeats=0"),
        ({"repeats": 1.5}, r"repeats=1\.5: a whole number of at least 1 is needed"),
        ({"samples": "20"}, "samples='20': a whole number of at least 1 is needed"),
        ({"samples": torch.nan}, "samples=nan: a whole number"),
        ({"layers": []}, "layers is empty: name at least one sub-module"),
    ],
)
def test_errors_name_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        modularity_curve(network(), loader(120), **arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (lambda x: x.mean((1, 2, 3)), r"layer 0 gives float32 of shape \(2,\) for 2 inputs: a floating-point row"),
        (lambda x: x[:1], r"layer 0 gives float32 of shape \(1, 3, 8, 8\) for 2"),
        (lambda x: None, "layer 0 gives no tensor for 2"),
    ],
)
def test_a_layer_without_a_row_for_each_sample_is_named(shape, message):
    class Odd(nn.Module):
        def forward(self, x):
            return shape(x)

    class Aside(nn.Sequential):
        def forward(self, x):
            self[0](x)
            return self[1](x)

    with pytest.raises(ValueError, match=message):
        modularity_curve(Aside(Odd(), nn.Flatten()), loader(60), samples=60, repeats=1, layers=("0", "1"))


def test_a_layer_that_is_not_called_once_is_named():
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[0](self[0](x))

    with pytest.raises(ValueError, match="layer 0: not called once in a forward pass"):
        modularity_curve(Twice(nn.Flatten()), loader(60), samples=60, repeats=1, layers=("0",))


def test_a_layer_that_is_not_there_is_named_and_leaves_no_hook():
    model = network()
    with pytest.raises(ValueError, match="layer 'nope': CifarResNet has no such module"):
        modularity_curve(model, loader(60), samples=60, repeats=1, layers=["conv1", "nope"])
    assert not any(m._forward_hooks for m in model.modules())


def test_one_class_nan_and_missing_labels_are_errors():
    model = network()
    with pytest.raises(ValueError, match="of one class"):
        modularity_curve(model, loader(60, classes=1), samples=60, repeats=1)
    with pytest.raises(ValueError, match=r"gives no labels.*block_influence.*need none"):
        modularity_curve(model, [torch.zeros(60, 3, 8, 8)], samples=60, repeats=1)
    with torch.no_grad():
        model.layer2[1].bn2.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"layer layer2\.1: the features of sample 0 hold NaN"):
        modularity_curve(model, loader(60), samples=60, repeats=1)
    with pytest.raises(ValueError, match="Sequential has no residual block"):
        modularity_curve(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), loader(60), samples=60, repeats=1)


def test_plateaus_and_degradations_are_gains_within_and_below_the_noise():
    gains = np.array([0.21, 0.019, -0.021, 0.021, -0.019])
    spread = 0.01 * np.array([1, -1, 1, -1, 1])  # the gains of two repeats differ by 0.02: a standard error of 0.01
    q = np.cumsum([[0.1, *gains + spread], [0.1, *gains - spread]], axis=1)
    curve = ModularityCurve(tuple("abcdef"), q)
    assert curve.gain == pytest.approx(gains)
    assert curve.noise == pytest.approx([0.02] * 5)
    assert curve.std == pytest.approx(q.std(0, ddof=1))
    assert curve.plateaus() == ("c", "f")
    assert curve.degradations() == ("d",)
    data = json.loads(curve.to_json())
    assert data["layers"] == list("abcdef")
    assert np.array(data["q"]) == pytest.approx(q)
    assert data["noise"] == curve.noise.tolist()


def test_q_rises_along_the_public_resnet20(cifar10_dir, checkpoint):
    model = load_weights(resnet20(), checkpoint("resnet20"))
    curve = modularity_curve(model, ImageLoader(cifar10(cifar10_dir, True), 100, shuffle=True), samples=200, repeats=2)
    assert curve.mean[-1] > 0.7
    assert curve.mean[-1] > curve.mean[3] + 0.3


def test_who_stops_reading_is_in_nobodys_context():
    model = network()
    (sample,) = draw_samples(loader(64), 64, 1)
    grams = LayerGrams(model, ("conv1", "layer1.0"))(sample)
    next(grams)
    assert torch.is_grad_enabled()
    assert model.training
    torch.manual_seed(5)
    found = torch.get_rng_state()
    grams.close()
    assert torch.equal(torch.get_rng_state(), found)


def test_labels_that_are_no_classes_are_named_before_the_pass():
    model, passes = network(), []
    model.linear.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=r"labels of type torch.float32: integers"):
        modularity_curve(model, [(x, y.float()) for x, y in loader(64)], samples=64, repeats=1, layers=("conv1",))
    assert not passes


def test_another_default_type_changes_nothing():
    model, batches, curves = network(), list(loader(120)), []
    for dtype in (torch.float32, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            curves.append(modularity_curve(model, batches, samples=120, repeats=1).q)
        finally:
            torch.set_default_dtype(torch.float32)
    assert np.array_equal(*curves)


@pytest.mark.parametrize("factor", [1e-25, 1e-12, 1e12, 1e25])
def test_q_does_not_depend_on_the_scale_of_features(factor):
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * factor

    torch.manual_seed(0)
    model, batch = nn.Sequential(Scaled(4, 8)), (torch.randn(60, 4), torch.arange(60) % 3)
    curve = modularity_curve(model, [batch], samples=60, repeats=1, layers=["0"])
    with torch.no_grad():
        assert curve.q.item() == pytest.approx(modularity(model(batch[0]), batch[1]), abs=1e-6)


class Busy(CifarResNet):
    """Says while it runs that it does, and remembers what it has seen."""

    def __init__(self) -> None:
        super().__init__((1, 1, 1))
        self.busy, self.seen = False, []

    def forward(self, x):
        self.busy = True
        self.seen.append(len(x))
        out = super().forward(x)
        self.busy = False
        return out


def test_a_pass_that_ends_amid_the_network_leaves_no_trace():
    model = Busy()
    modularity_curve(model, loader(64), samples=64, repeats=1, budget=4 * 64 * (1024 + 2 * 64))
    count_macs(model, torch.zeros(1, 3, 8, 8))
    assert (model.busy, model.seen) == (False, [])
