"""A criterion gives a score to each block, whatever form the network's values have."""

from __future__ import annotations

import copy
import dataclasses
import random

import numpy as np
import pytest
import torch
import torchvision
from accelerate import Accelerator, DataLoaderConfiguration
from timm.models.mlp_mixer import MlpMixer
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models.feature_extraction import create_feature_extractor

from benchmarks.zoo_networks import NETWORKS
from modprune import ModularityPruner, evaluate, find_blocks, modularity, modularity_curve
from modprune.criteria import (
    CRITERIA,
    Ablation,
    BlockInfluence,
    BlockScores,
    BnScale,
    Cka,
    Consensus,
    Dbp,
    L1Norm,
    LinearProbe,
    Modularity,
    ModularityDrop,
    ModularityPooled,
    Random,
    Taylor,
    _turned,
    fitted,
    name_of,
)
from modprune.data import ImageLoader, digits
from modprune.models import resnet20
from modprune.similarity import linear_cka
from modprune.surgery import remove_blocks
from modprune.visits import pooled

X = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELLED = [
    (torch.randn(100, 3, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(100) % 10) for i in range(10)
]


class Turn(nn.Module):
    """`x + f(x)`: turns x by an angle that is known beforehand."""

    def __init__(self, matrix) -> None:
        super().__init__()
        self.f = nn.Linear(2, 2, bias=False)
        self.f.weight.data = torch.tensor(matrix) - torch.eye(2)

    def forward(self, x):
        return x + self.f(x)


SAME, QUARTER, BACK = [[3.0, 0.0], [0.0, 3.0]], [[0.0, -1.0], [1.0, 0.0]], [[-1.0, 0.0], [0.0, -1.0]]


def state(model):
    """All that a criterion must leave alone."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modules = [(name, type(m), m.training, len(m._forward_hooks)) for name, m in model.named_modules()]
    return values, flags, modules, torch.get_rng_state()


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_plans_and_leaves_the_model_as_found(name):
    torch.manual_seed(0)  # of some weights a linear classifier gains nothing across any block
    model = resnet20().train()
    model.layer1[0].eval()
    model.conv1.weight.requires_grad_(False)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight)
    values, flags, modules, rng = state(model)
    blocks = find_blocks(model, X)
    pruner = ModularityPruner(model, X[:1], LABELLED, name, blocks=2)
    plan = pruner.plan()
    assert plan.criterion == name
    assert set(plan.remove) == set(sorted(blocks.names, key=lambda block: plan.scores[block])[:2])
    assert pruner.scores.values.shape[1] == len(blocks)
    assert np.isfinite(pruner.scores.values).all()
    assert len(set(plan.scores.values())) > 1
    after = state(model)
    assert all(torch.equal(value, after[0][key]) for key, value in values.items())
    assert (flags, modules) == (after[1], after[2])
    assert torch.equal(rng, after[3])


class Drawn(Dataset):
    """Images that Python's, NumPy's and torch's generators have a part in, and some of its own."""

    def __init__(self):
        self.own, self.old, self.new = random.Random(0), np.random.RandomState(0), np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)

    def __len__(self):
        return 80

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        noise += self.own.random() + self.old.rand() + self.new.random() + torch.rand((), generator=self.generator)
        return LABELLED[0][0][index] + noise, index % 4


def epochs(workers, measure=None, amid=True):
    """All that a loop is given in two epochs if it calls `measure(loader)` amid the first, or before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    own = torch.Generator().manual_seed(0)
    loader = DataLoader(Drawn(), 16, True, num_workers=workers, persistent_workers=workers > 0, generator=own)
    if measure and not amid:
        measure(loader)
    for number in range(2):
        for step, (images, labels) in enumerate(loader):
            yield from (images, labels)
            if measure and amid and (number, step) == (0, 1):
                measure(loader)


@pytest.mark.parametrize("amid", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("criterion", [Modularity(samples=32, repeats=1), BlockInfluence(32), Taylor(32)], ids=name_of)
def test_a_loop_goes_on_as_if_nothing_had_been_measured(criterion, workers, amid):
    model = resnet20()
    blocks = find_blocks(model, X)
    given, alone = list(epochs(workers, lambda loader: criterion(model, blocks, loader), amid)), list(epochs(workers))
    assert all(torch.equal(a, b) for a, b in zip(given, alone, strict=True))


@pytest.mark.parametrize("amid", [True, False])
def test_a_loop_of_accelerate_goes_on_as_if_nothing_had_been_measured(amid):
    model, rows = resnet20(), TensorDataset(*LABELLED[0], torch.arange(100))
    blocks = find_blocks(model, X)

    def steps(measured):
        """The order of two epochs, and after which batches the gradients are due."""
        order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=0)
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, dataloader_config=order)
        loader = accelerator.prepare(DataLoader(rows, 20, shuffle=True))
        for epoch in range(2):
            for step, (_, _, index) in enumerate(loader):
                if measured and amid and (epoch, step) == (0, 1):
                    Modularity(samples=100, repeats=2)(model, blocks, loader)
                with accelerator.accumulate():
                    yield index.tolist(), accelerator.sync_gradients
            if measured and not amid and epoch == 0:
                Modularity(samples=100, repeats=2)(model, blocks, loader)

    assert list(steps(True)) == list(steps(False))


def test_an_image_loader_goes_on_as_if_nothing_had_been_measured():
    model, loader = resnet20(), ImageLoader(digits(train=True), 400, pad=1, shuffle=True)
    criterion = Modularity(samples=400, repeats=4)  # more than an epoch has
    blocks = find_blocks(model, torch.zeros(1, 3, 8, 8))
    scores = [criterion(model, blocks, loader).values for _ in range(2)]
    assert np.array_equal(*scores)
    for number in range(2):
        loader.set_epoch(number)
        alone = torch.cat([index for *_, index in loader])
        loader.set_epoch(number)
        amid = []
        for *_, index in loader:
            amid.append(index)
            criterion(model, blocks, loader)
        assert torch.equal(torch.cat(amid), alone)
        assert loader.epoch == number + 1


def test_a_block_that_does_nothing_turns_nothing_where_channels_are_dead():
    x = torch.randn(4, 6, 8).relu()
    x[:, :3] = 0
    assert _turned(x, x.clone(), 4) == 0
    assert _turned(x, -x, 4) == pytest.approx(1)  # half of it turned back, half unchanged


def test_modularity_is_the_gain_of_the_curve():
    model = resnet20()
    blocks = find_blocks(model, X)
    scores = Modularity(k=5, samples=200, repeats=2)(model, blocks, LABELLED)
    curve = modularity_curve(model, LABELLED, k=5, samples=200, repeats=2)
    assert list(scores.mean.values()) == pytest.approx(list(curve.gain), abs=1e-12)


class Folds(nn.Module):
    """`x + f(x)`: writes into the second column how far the first one lies beyond -1 and 1."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
        self.f[0].weight.data, self.f[0].bias.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), -torch.ones(2)
        self.f[2].weight.data = by * torch.tensor([[0.0, 0.0], [1.0, 1.0]])

    def forward(self, x):
        return x + self.f(x)


@pytest.mark.parametrize("probe", [LinearProbe, Dbp])
def test_a_probe_sees_which_block_makes_the_classes_linear(probe):
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 0.01])
    labels = (x[:, 0].abs() > 1).long()
    stem = nn.Linear(2, 2, bias=False)
    stem.weight.data = torch.eye(2)
    model = nn.Sequential(stem, Folds(0.0), Folds(100.0), Folds(0.0))
    scores = probe(repeats=1)(model, find_blocks(model, x[:2]), list(zip(x.split(100), labels.split(100), strict=True)))
    nothing, much, again = scores.values[0]
    assert nothing == again == 0
    assert much > 0.2
    with pytest.raises(ValueError, match="all of one class"):
        probe(repeats=1)(model, find_blocks(model, x[:2]), [(x[labels.argsort()], labels.sort().values * 0)])


def test_influence_is_one_minus_the_cosine():
    model = nn.Sequential(Turn(SAME), Turn(QUARTER), Turn(BACK))
    x = torch.randn(5, 2)
    scores = BlockInfluence()(model, find_blocks(model, x), [x, x])
    assert scores.values.shape == (2, 3)
    assert list(scores.mean.values()) == pytest.approx([0, 1, 2], abs=1e-6)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())

    def forward(self, x):
        x += self.f(x)
        return x


def test_an_empty_last_batch_does_not_count():
    model = resnet20()
    blocks = find_blocks(model, X[:1])
    both = [BlockInfluence()(model, blocks, batches) for batches in ([X], [X, X[:0]])]
    assert np.array_equal(both[0].values, both[1].values)


def test_a_block_that_writes_into_its_input_has_influence():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), InPlace())
    assert BlockInfluence()(model, find_blocks(model, X), [X]).values[0, 0] > 1e-3


def test_influence_on_tokens_is_the_mean_over_tokens():
    model = nn.Sequential(Turn([[1.0, 0.0], [0.0, 0.0]]))
    x = torch.tensor([[[1.0, 0.0], [0.0, 100.0], [3.0, 3.0]]])
    blocks = find_blocks(model, x)
    assert BlockInfluence()(model, blocks, [x]).values[0, 0] == pytest.approx(1 - (1 + 0 + 0.5**0.5) / 3)


def test_cka_is_blind_to_turns_and_scale_alone():
    x = torch.randn(64, 20, generator=torch.Generator().manual_seed(0))
    turn, other = torch.linalg.qr(torch.randn(20, 20))[0], torch.randn(64, 20)
    assert linear_cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-6)
    assert abs(linear_cka(x, other)) < 0.1
    assert linear_cka(x, x * torch.linspace(0, 2, 20)) < 0.95
    assert linear_cka(x, torch.ones(64, 3)) == 0
    model = nn.Sequential(Turn(SAME), Turn(QUARTER), Turn([[1.0, 0.0], [0.0, 4.0]]))
    same, quarter, stretched = Cka()(model, find_blocks(model, x[:, :2]), [x[:, :2]]).values[0]
    blocks = find_blocks(model, x[:, :2])
    assert Cka()(model, blocks, [x[:, :2], x[:3, :2]]).values.shape == (1, 3)
    with pytest.raises(ValueError, match="batches of at least 4"):
        Cka()(model, blocks, [x[:3, :2]])
    assert same == pytest.approx(0, abs=1e-6)
    assert quarter == pytest.approx(0, abs=1e-6)
    assert stretched > 0.05


def test_cka_over_batches_estimates_that_of_all():
    """The unbiased estimate does not grow as batches shrink; the plain one does."""
    x = torch.randn(512, 40, generator=torch.Generator().manual_seed(0))
    y = x + torch.randn(512, 40, generator=torch.Generator().manual_seed(1))
    parts = [linear_cka(a, b) for a, b in zip(x.split(32), y.split(32), strict=True)]
    assert np.mean(parts) == pytest.approx(linear_cka(x, y), abs=0.03)


def vgg11_bn(num_classes: int) -> nn.Module:
    """torchvision's, but for the classifier of a hundred million weights."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, num_classes))


@pytest.mark.parametrize("make", [torchvision.models.resnet18, vgg11_bn])
def test_ablation_is_the_loss_after_surgery(make):
    torch.manual_seed(0)
    model, images = make(num_classes=10), torch.randn(20, 3, 32, 32)
    loader = [(images, torch.arange(20) % 10)]
    blocks = find_blocks(model, images[:1])
    assert blocks
    scores = Ablation(samples=20)(model, blocks, loader).mean
    for block in blocks:
        cut = remove_blocks(copy.deepcopy(model), [block.name], kinds=[block.kind])
        assert scores[block.name] == pytest.approx(evaluate(cut, loader).loss - evaluate(model, loader).loss, abs=1e-9)


def test_the_drop_of_modularity_is_that_at_the_end_after_surgery():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    loader = [(torch.randn(60, 3, 32, 32), torch.arange(60) % 3)]
    blocks = find_blocks(model, loader[0][0][:1])
    scores = ModularityDrop(samples=60)(model, blocks, loader).mean

    def q_at_the_end(network):
        return modularity_curve(network, loader, samples=60, repeats=1, layers=["layer4.1"]).q.item()

    for block in blocks:
        cut = remove_blocks(copy.deepcopy(model), [block.name], kinds=[block.kind])
        assert scores[block.name] == pytest.approx(q_at_the_end(model) - q_at_the_end(cut), abs=1e-12)


def test_pooled_modularity_is_that_of_the_means_over_all_positions():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    images, labels = torch.randn(60, 3, 64, 64), torch.arange(60) % 3
    blocks = find_blocks(model, images[:1])
    nodes = dict.fromkeys(["conv1", *blocks.names])
    with torch.no_grad():
        features = create_feature_extractor(model, list(nodes))(images)
    q = [modularity(features[node].mean((2, 3)), labels, k=5) for node in nodes]
    scores = ModularityPooled(k=5, samples=60, repeats=1)(model, blocks, [(images, labels)])
    np.testing.assert_allclose(scores.values, [np.diff(np.log(np.maximum(q, 0.01)))], rtol=0, atol=1e-4)
    assert scores.curve.layers == tuple(nodes)
    np.testing.assert_allclose(scores.curve.q, [q], rtol=0, atol=1e-6)


@pytest.mark.parametrize("criterion", [ModularityPooled(samples=100), LinearProbe(samples=100)], ids=name_of)
def test_criteria_of_pooled_features_name_the_layer_that_is_not_finite(criterion):
    model = resnet20()
    model.layer2[1].conv2.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"^layer layer2\.1: the features of sample 0 hold NaN"):
        criterion(model, find_blocks(resnet20(), X), LABELLED)


def test_taylor_is_the_slope_of_the_loss_as_the_block_shrinks():
    model = resnet20().double()
    loader = [(LABELLED[0][0].double(), LABELLED[0][1])]
    blocks = find_blocks(model, loader[0][0][:1])
    scores = Taylor(samples=100)(model, blocks, loader).mean
    for block in (blocks[0], blocks[3]):
        losses = []
        for factor in (1 - 1e-5, 1 + 1e-5):
            scaled = copy.deepcopy(model)
            for layer in block.layers:
                for parameter in scaled.get_submodule(layer).parameters(recurse=False):
                    parameter.data *= factor
            # In double precision, which `evaluate` does not keep.
            losses.append(nn.functional.cross_entropy(scaled.eval()(loader[0][0]), loader[0][1]).item())
        slope = (losses[1] - losses[0]) / 2e-5
        assert scores[block.name] == pytest.approx(slope**2, rel=1e-2)


def test_norms_of_weights_and_scales_are_means_by_hand():
    model = resnet20()
    blocks = find_blocks(model, X)
    nn.init.constant_(model.layer1[0].conv1.weight, -0.5)
    nn.init.constant_(model.layer1[0].conv2.weight, 0.25)
    nn.init.constant_(model.layer1[0].bn1.weight, 3)
    nn.init.constant_(model.layer1[0].bn2.weight, -1)
    assert L1Norm()(model, blocks).mean["layer1.0"] == pytest.approx((0.5 + 0.25) / 2 * 16 * 9)
    assert BnScale()(model, blocks).mean["layer1.0"] == 2
    turn = nn.Sequential(Turn(BACK))
    with pytest.raises(ValueError, match="block 0 has no norm with a scale"):
        BnScale()(turn, find_blocks(turn, torch.ones(1, 2)))


@pytest.mark.parametrize(
    ("make", "beside"),
    [(torchvision.models.convnext_tiny, "layer_scale"), (torchvision.models.swin_t, "relative_position_bias_table")],
)
def test_scales_of_channels_and_tables_of_biases_are_no_filters(make, beside):
    torch.manual_seed(0)
    model, images = make(), torch.zeros(1, 3, 64, 64)
    blocks = find_blocks(model, images)
    before = L1Norm()(model, blocks).mean
    for name, parameter in model.named_parameters():
        if name.endswith(beside):
            nn.init.constant_(parameter, 1e3)
    assert L1Norm()(model, blocks).mean == before


def test_weights_that_are_computed_or_have_other_names_are_filters():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(2, 4)), weight_norm(nn.Linear(4, 2, bias=False))

        def forward(self, x):
            return x + self.down((x @ self.up).relu())

    model, x = nn.Sequential(Named()), torch.ones(1, 2)
    norms = model[0].down.parametrizations.weight
    expected = [4.0, *(p.detach().abs().sum(1).mean().item() for p in (norms.original0, norms.original1))]
    assert L1Norm()(model, find_blocks(model, x)).mean["0"] == pytest.approx(np.mean(expected))


def test_what_is_a_filter_is_told_by_the_parameters_own_name():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.full((2, 1, 1), 1e3)[None])  # (1, 2, 1, 1), as in ResMLP

        def forward(self, x):
            return x * self.gamma

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unbiased, self.weighting = nn.Module(), Scaled()
            self.unbiased.up = nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return x + self.weighting((x.movedim(1, -1) @ self.unbiased.up).movedim(-1, 1)).relu()

    model = nn.Sequential(Named())
    assert L1Norm()(model, find_blocks(model, torch.ones(1, 2, 3, 3))).mean["0"] == 2


def test_fitted_stays_a_value():
    made = fitted("consensus", 60)
    assert made == fitted("consensus", 60)
    assert hash(made) == hash(fitted("consensus", 60))


def test_random_is_the_same_for_a_seed():
    model = resnet20()
    blocks = find_blocks(model, X)
    assert Random(3)(model, blocks).mean == Random(3)(model, blocks).mean != Random(4)(model, blocks).mean


def test_a_consensus_is_the_mean_rank():
    def fixed(*values):
        return lambda model, blocks, loader: BlockScores(blocks.names, np.array([values]))

    model = nn.Sequential(Turn(SAME), Turn(QUARTER), Turn(BACK))
    blocks = find_blocks(model, torch.ones(1, 2))
    both = Consensus((fixed(1.0, 2.0, 3.0), fixed(900.0, 5.0, 5.0)))(model, blocks, [])
    assert both.values.tolist() == [[0, 0.5, 1], [1, 0, 0]]
    assert list(both.mean.values()) == [0.5, 0.25, 0.5]


def test_a_name_measures_what_there_is_and_an_instance_what_it_says():
    assert fitted("modularity", 300) == Modularity(samples=300)
    assert fitted("linear_probe", 10**6) == LinearProbe()
    assert fitted(Modularity(samples=900), 300) == Modularity(samples=900)
    joined = fitted("consensus", 300)
    assert isinstance(joined, Consensus)
    assert joined.criteria == tuple(fitted(name, 300) for name in Consensus().criteria)
    assert fitted("l1_norm", 300) == L1Norm()


def test_names():
    assert [name_of(made()) for made in CRITERIA.values()] == list(CRITERIA)
    assert name_of(test_names) == "test_names"
    with pytest.raises(ValueError, match=r"'magic' is unknown: give one of modularity, .*random, or a callable"):
        ModularityPruner(resnet20(), X, [], "magic", blocks=1)


def test_blocks_that_change_the_shape_score_one_and_loaders_need_no_labels():
    model = resnet20()
    blocks = find_blocks(model, X)
    scores = BlockInfluence()(model, blocks, [X, X[:3]])
    assert [scores.mean[b.name] for b in blocks if b.kind == "transition"] == [1.0, 1.0]
    assert (scores.values >= 0).all()
    assert Cka()(model, blocks, [X]).values.shape == (1, 9)


def test_five_hundred_samples_are_enough():
    model = nn.Sequential(Turn([[1.0, 0.0], [0.0, 2.0]]))
    batches = [torch.ones(300, 2)] * 5
    assert BlockInfluence()(model, find_blocks(model, batches[0]), batches).values.shape == (2, 1)
    with pytest.raises(ValueError, match="gives no batch"):
        BlockInfluence()(model, find_blocks(model, batches[0]), [])


@pytest.mark.parametrize("name", ["swin", "bert", "llama", "whisper_encoder", "poolformer"])
@pytest.mark.parametrize(
    "criterion",
    [Modularity(samples=10, repeats=2), LinearProbe(samples=10, repeats=2), BlockInfluence(), L1Norm()],
    ids=name_of,
)
def test_tokens_tuples_and_dicts(name, criterion):
    """The pruner runs on networks whose blocks and outputs are tuples, dicts or token sequences, with dict loaders."""
    torch.manual_seed(0)
    make, inputs = NETWORKS[name]
    model = make()
    labels = {"labels": torch.tensor([0, 1])} if isinstance(criterion, (Modularity, LinearProbe)) else {}
    batches = [{key: value.roll(i, -1) for key, value in inputs.items()} | labels for i in range(5)]
    pruner = ModularityPruner(model, inputs, batches, criterion, blocks=1)
    assert len(pruner.plan().remove) == 1
    assert find_blocks(pruner.step(), inputs).names != ()


def test_classifiers_with_dicts_can_be_ablated():
    make, inputs = NETWORKS["vit"]
    model = make()
    blocks = find_blocks(model, inputs)
    batch = inputs | {"labels": torch.tensor([0, 1])}
    for criterion in (Ablation(samples=2), Taylor(samples=2)):
        assert criterion(model, blocks, [batch]).values.shape == (1, len(blocks))


def test_a_criterion_that_leaves_a_block_out_or_gives_something_else_is_named():
    def half(model, blocks, loader):
        return BlockScores(blocks.names[1:], np.ones((1, len(blocks) - 1)))

    def forgetful(model, blocks, loader):
        half(model, blocks, loader)

    model = resnet20()
    blocks = find_blocks(model, torch.zeros(1, 3, 8, 8))
    for wrong, problem in ((half, r"gave no score for block layer1\.0"), (forgetful, "gave a NoneType: a criter")):
        with pytest.raises(ValueError, match=f"{wrong.__name__} {problem}"):
            Consensus(("random", wrong))(model, blocks, LABELLED)
        with pytest.raises(ValueError, match=f"{wrong.__name__} {problem}"):
            ModularityPruner(model, torch.zeros(1, 3, 8, 8), LABELLED, wrong, blocks=1).plan()
    with pytest.raises(ValueError, match="repeats=0: a whole number of at least 1 is needed"):
        Ablation(repeats=0)(model, blocks, LABELLED)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_score_that_is_no_number_is_given_no_rank(value):
    def broken(model, blocks, loader):
        return BlockScores(blocks.names, np.array([[value, *range(len(blocks) - 1)]]))

    model = resnet20()
    with pytest.raises(ValueError, match=r"score of layer1\.0 by broken is not a finite number: check the criterion"):
        Consensus(("random", broken))(model, find_blocks(model, X), LABELLED)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 1), (1, 3), (0, 2)])
def test_scores_of_another_shape_than_repeats_by_blocks_are_refused(shape):
    with pytest.raises(ValueError, match=r"2 blocks have shape .*: give \(repeats, 2\)"):
        BlockScores(("a", "b"), np.zeros(shape))


@pytest.mark.parametrize(
    ("names", "values", "message"),
    [
        ("ab", [["1", "x"]], "no array of numbers: could not convert"),
        ("ab", [[1, 2], [3]], "no array of numbers"),
        ("ab", torch.zeros(1, 2, requires_grad=True), "no array of numbers: Can't call numpy"),
        ("aa", [[1, 2]], "names of blocks come more than once: a, a"),
    ],
)
def test_scores_that_are_none_are_refused(names, values, message):
    with pytest.raises(ValueError, match=message):
        BlockScores(tuple(names), values)


@pytest.mark.parametrize("values", [[[1, 2.5]], torch.tensor([[1, 2.5]], dtype=torch.float16)])
def test_scores_are_float64_whatever_they_were_given_as(values):
    scores = BlockScores(("a", "b"), values)
    assert scores.values.dtype == np.float64
    assert scores.mean == {"a": 1.0, "b": 2.5}


@pytest.mark.parametrize("criterion", ["dbp", "linear_probe"])
def test_classifiers_want_labels_that_are_integers(criterion):
    probed, model = dataclasses.replace(CRITERIA[criterion](), samples=20), resnet20()
    blocks, batch = find_blocks(model, X[:1]), (torch.randn(20, 3, 8, 8), torch.arange(20) % 2 / 1)
    with pytest.raises(ValueError, match=r"labels of type torch\.float32: integers"):
        probed(model, blocks, [batch])


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "x", "layer", "tokens"),
    [
        (MlpMixer(img_size=16, patch_size=4, num_blocks=1, embed_dim=24), IMAGES, "blocks.0", True),
        (
            VisionTransformer(16, 4, embed_dim=16, depth=1, num_heads=2, class_token=False, global_pool="avg"),
            IMAGES,
            "blocks.0",
            True,
        ),
        (nn.Sequential(nn.Conv1d(3, 16, 1)), IMAGES[..., 0], "0", False),
        (nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)), IMAGES, "0", False),
        (nn.Sequential(nn.ConvTranspose2d(3, 5, 2)), IMAGES, "0", False),
    ],
)
def test_the_mean_is_over_positions_and_not_over_channels(model, x, layer, tokens):
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(lambda _, __, out: seen.append(out.detach()))
    model.eval()(x)
    hook.remove()
    expected = seen[0].flatten(1, -2).mean(1) if tokens else seen[0].flatten(2).mean(2)
    torch.testing.assert_close(pooled(model, [layer], [(x, torch.zeros(3).long())])[layer], expected)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.head(self.layers(self.embed(x).transpose(0, 1)).mean(0))


@pytest.mark.parametrize("criterion", [Cka(), LinearProbe(8, 1), ModularityPooled(samples=8)], ids=name_of)
def test_steps_of_time_are_not_taken_for_samples(criterion):
    model, batch = SequenceFirst(), (torch.randn(8, 6 if isinstance(criterion, Cka) else 8, 8), torch.arange(8) % 2)
    blocks = find_blocks(model, batch[0])
    with pytest.raises(ValueError, match=r"rows? of features .*'block_influence' needs none"):
        criterion(model, blocks, [batch])
    assert np.isfinite(BlockInfluence()(model, blocks, [batch]).values).all()
