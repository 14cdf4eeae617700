"""Six attacks against foolbox, loops after the papers, and the laws that they obey."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modprune.studies.adversarial as adversarial
from modprune.data import digits
from modprune.studies.adversarial import ATTACKS, cw, fgsm, jsma, local_search, one_pixel, pgd

# Settings fit for eight by eight digits, whose many values at 0 and 1 the defaults for photographs hardly move.
SETTINGS = {
    "fgsm": {"epsilon": 0.2},
    "pgd": {"epsilon": 0.2, "step": 0.05},
    "cw": {"constant": 5.0, "lr": 0.1},
    "jsma": {},
    "one_pixel": {"generations": 10},
    "local_search": {"rounds": 8, "pixels": 1, "candidates": 32},
}
# At least so many of the images are fooled with these settings; seen were 0.9, 1, 1, 0.5, 0.18 and 1.
SHARES = {"fgsm": 0.8, "pgd": 0.9, "cw": 0.9, "jsma": 0.4, "one_pixel": 0.1, "local_search": 0.9}

every_attack = pytest.mark.parametrize("name", list(ATTACKS))
random_attacks = pytest.mark.parametrize("name", ["pgd", "one_pixel", "local_search"])


def attack(name, model, images, labels, **settings):
    return ATTACKS[name](model, images, labels, **(SETTINGS[name] | settings))


@pytest.fixture(scope="module")
def trained():
    """A small network with batch norm and dropout, trained for less than a second, in eval mode."""
    data = digits(True)
    images, labels = data.images.float() / 255, data.labels
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(512, 10),
        )  # fmt: skip
        optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
        for _ in range(3):
            for index in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(net(images[index]), labels[index]).backward()
                optimizer.step()
    return net.eval()


@pytest.fixture
def net(trained):
    return copy.deepcopy(trained).requires_grad_(True)


@pytest.fixture(scope="module")
def right(trained):
    """Forty images of the test set that the network gets right, and their labels."""
    data = digits(False)
    images, labels = data.images.float() / 255, data.labels
    index = torch.nonzero(logits(trained, images).argmax(1) == labels).flatten()[:40]
    return images[index], labels[index]


@pytest.fixture(scope="module")
def foolbox():
    with warnings.catch_warnings():
        # foolbox 3.3.4 imports gaussian_filter from a module of scipy that is deprecated.
        warnings.filterwarnings("ignore", "Please import `gaussian_filter`", DeprecationWarning)
        return pytest.importorskip("foolbox")


@torch.no_grad()
def logits(net, images):
    return net(images)


def margins(net, images, labels):
    """The label's logit less the greatest other, image by image."""
    rows = logits(net, images)
    others = [torch.cat([row[:y], row[y + 1 :]]).max() for row, y in zip(rows, labels.tolist(), strict=True)]
    return rows[torch.arange(len(rows)), labels] - torch.stack(others)


def changed_pixels(result, images):
    return (result != images).any(1).flatten(1).sum(1)


def norms(result, images):
    return (result - images).flatten(1).norm(dim=1)


@every_attack
def test_images_become_misclassified_and_every_margin_falls(name, net, right):
    images, labels = right
    result = attack(name, net, images, labels)
    fooled = logits(net, result).argmax(1) != labels
    assert fooled.float().mean() >= SHARES[name]
    assert (margins(net, result, labels) < margins(net, images, labels)).all()


@every_attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_images_of_the_same_kind(name, dtype, net, right):
    images, labels = right[0][:8].to(dtype), right[1][:8]
    given = images.clone()
    result = attack(name, net.to(dtype), images, labels)
    assert (result.shape, result.dtype, result.requires_grad) == (images.shape, dtype, False)
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(images, given)


@every_attack
def test_images_that_the_model_misses_come_back_as_they_are(name, net, right):
    images, labels = right[0][:12], right[1][:12].clone()
    labels[::2] = (labels[::2] + 1) % 10
    result = attack(name, net, images, labels)
    assert torch.equal(result[::2], images[::2])
    assert (changed_pixels(result, images)[1::2] > 0).all()
    assert torch.equal(attack(name, net, images[::2], labels[::2]), images[::2])
    assert attack(name, net, images[:0], labels[:0]).shape == (0, 3, 8, 8)


@every_attack
def test_the_model_is_left_as_found(name, net, right):
    images, labels = right[0][:8], right[1][:8]
    expected = attack(name, copy.deepcopy(net), images, labels)
    net.train()
    net[1].eval()
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    modes, flags = [m.training for m in net.modules()], [p.requires_grad for p in net.parameters()]
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert torch.equal(attack(name, net, images, labels), expected)
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [p.grad is None for p in net.parameters()].count(False) == 1
    assert (net[3].weight.grad == 1).all()
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)


@every_attack
def test_a_callable_will_do_also_without_gradients_around(name, net, right):
    images, labels = right[0][:8], right[1][:8]
    expected, random = attack(name, net, images, labels), torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(attack(name, lambda x: net(x), images, labels), expected)
    with torch.inference_mode():
        assert torch.equal(attack(name, net, images.clone(), labels.clone()), expected)
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("name", ["fgsm", "cw", "jsma"])
def test_images_do_not_know_of_each_other(name, net, right):
    images, labels = right[0][:6], right[1][:6]
    alone = [attack(name, net, x[None], y[None]) for x, y in zip(images, labels, strict=True)]
    assert torch.allclose(attack(name, net, images, labels), torch.cat(alone), atol=1e-4)


@random_attacks
def test_randomness_is_the_generators(name, net, right):
    images, labels = right[0][:8], right[1][:8]
    first = attack(name, net, images, labels)
    assert torch.equal(attack(name, net, images, labels), first)
    assert torch.equal(attack(name, net, images, labels, generator=torch.Generator().manual_seed(0)), first)
    assert not torch.equal(attack(name, net, images, labels, generator=torch.Generator().manual_seed(1)), first)


@pytest.mark.parametrize("epsilon", [0.01, 8 / 255, 0.4])
def test_fgsm_and_pgd_stay_in_the_ball(epsilon, net, right):
    images, labels = right
    for result in (fgsm(net, images, labels, epsilon=epsilon), pgd(net, images, labels, epsilon=epsilon, step=0.3)):
        assert (result - images).abs().max() == pytest.approx(epsilon, abs=1e-6)


def test_fgsm_is_foolbox(foolbox, net, right):
    images, labels = right
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    for epsilon in (8 / 255, 0.15):
        expected, _, _ = foolbox.attacks.LinfFastGradientAttack()(model, images, labels, epsilons=epsilon)
        assert torch.equal(fgsm(net, images, labels, epsilon=epsilon), expected)


def test_pgd_is_foolbox_from_the_same_start(foolbox, net, right):
    images, labels = right
    seen = []

    def recorded(x):
        seen.append(x.detach().clone())
        return net(x)

    result = pgd(recorded, images, labels, epsilon=0.15, step=0.04, steps=7)
    start = seen[1]  # before it, the clean images are looked at
    inside = (start > 0) & (start < 1)
    assert torch.equal(seen[0], images)
    assert len(seen) == 1 + 7
    assert (start - images)[inside].abs().max() == pytest.approx(0.15, rel=0.01)
    assert (start - images)[(images > 0.15) & (images < 0.85)].std() == pytest.approx(0.15 / math.sqrt(3), rel=0.1)

    class FromStart(foolbox.attacks.LinfProjectedGradientDescentAttack):
        def get_random_start(self, x0, epsilon):
            return type(x0)(start)

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    expected, _, _ = FromStart(abs_stepsize=0.04, steps=7)(model, images, labels, epsilons=0.15)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(("constant", "confidence"), [(0.3, 0.0), (5.0, 0.0), (5.0, 1.0)])
def test_cw_succeeds_where_foolbox_does_as_near(constant, confidence, foolbox, net, right):
    images, labels = right
    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    theirs = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=1, steps=60, stepsize=0.1, initial_const=constant, confidence=confidence, abort_early=False
    )
    expected, _, _ = theirs(model, images, labels, epsilons=None)
    found = (margins(net, expected, labels) < -confidence) & expected.flatten(1).any(1)  # black where it failed
    result = cw(net, images, labels, constant=constant, confidence=confidence, steps=60, lr=0.1)
    ours = margins(net, result, labels) < -confidence
    assert found.float().mean() > 0.2
    assert (ours == found).float().mean() >= 0.95
    assert norms(result, images)[ours & found].mean() <= 1.05 * norms(expected, images)[ours & found].mean()
    # Where an image lies on the boundary after a step, rounding decides whether that step or a later one is kept.
    assert ((result - expected)[ours & found].abs().flatten(1).amax(1) < 0.01).float().mean() >= 0.9


def test_cw_keeps_the_nearest(net, right):
    images, labels = right
    early, late = (cw(net, images, labels, constant=5.0, lr=0.1, steps=steps) for steps in (30, 90))
    found = margins(net, early, labels) < 0
    assert found.float().mean() > 0.5
    assert (margins(net, late, labels) < 0)[found].all()
    assert (norms(late, images) <= norms(early, images))[found].all()
    assert norms(late, images)[found].mean() < 0.95 * norms(early, images)[found].mean()


def test_cw_where_it_fails_gives_its_last_step(net, right):
    images, labels = right
    seen = []

    def recorded(x):
        seen.append(x.detach().clone())
        return net(x)

    result = cw(recorded, images, labels, constant=1e-3, steps=5)
    assert (logits(net, result).argmax(1) == labels).all()
    assert torch.equal(result, seen[-1])


def loop_jsma(net, image, label, theta, gamma):
    """Algorithm 3 of Papernot et al. for one image (C, H, W): every pair is looked at."""
    x = image.clone()
    target = logits(net, x[None])[0].index_fill(0, label, -math.inf).argmax()
    for _ in range(math.floor(gamma * x.numel() / 2)):
        if logits(net, x[None]).argmax() != label:
            break
        slopes = torch.autograd.functional.jacobian(lambda v: net(v[None])[0], x).flatten(1)
        alpha, beta = slopes[target], slopes.sum(0) - slopes[target]
        free = (x < 1 if theta > 0 else x > 0).flatten().nonzero().flatten()
        pairs = torch.combinations(free)
        a, b = (math.copysign(1, theta) * v[pairs].sum(1) for v in (alpha, beta))
        worth = torch.where((a > 0) & (b < 0), -a * b, 0)
        if len(pairs) == 0 or worth.max() <= 0:
            break
        pair = pairs[worth.argmax()]
        x.view(-1)[pair] = (x.view(-1)[pair] + theta).clamp(0, 1)
    return x


@pytest.mark.parametrize(("theta", "gamma"), [(1.0, 0.1), (-1.0, 0.06), (0.4, 0.08)])
def test_jsma_is_a_loop_after_the_paper(theta, gamma, net, right, monkeypatch):
    images, labels = right[0][:10], right[1][:10]
    monkeypatch.setattr(adversarial, "SHORTLIST", 10**6)
    expected = torch.stack([loop_jsma(net, x, y, theta, gamma) for x, y in zip(images, labels, strict=True)])
    result = jsma(net, images, labels, theta=theta, gamma=gamma)
    assert torch.allclose(result, expected, atol=1e-6)
    assert 0 < (result != images).flatten(1).sum(1).max() <= gamma * images[0].numel()


def test_jsma_pairs_from_the_shortlist_are_nearly_the_best():
    generator = torch.Generator().manual_seed(0)
    rise, fall = torch.randn(2, 20, 1000, generator=generator)
    free = torch.rand(20, 1000, generator=generator) < 0.7
    pairs, salience = adversarial._most_salient(rise, fall, free)
    assert free.gather(1, pairs).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    for row in range(20):
        assert salience[row] == rise[row, pairs[row]].sum() * fall[row, pairs[row]].sum()
        index = torch.combinations(free[row].nonzero().flatten())
        a, b = rise[row, index].sum(1), fall[row, index].sum(1)
        assert salience[row] >= 0.95 * torch.where((a > 0) & (b > 0), a * b, 0).max()
    assert adversarial._most_salient(rise, -rise.abs() - 1, free)[1].max() == 0
    assert adversarial._most_salient(rise, fall, torch.zeros_like(free))[1].max() == 0


def test_jsma_changes_nothing_where_no_pair_would_help(right):
    def rising(x):  # every value raises the label's logit, none the other's
        return torch.stack([1 + x.sum((1, 2, 3)), 0 * x.sum((1, 2, 3))], 1)

    images, labels = right[0], torch.zeros_like(right[1])
    assert torch.equal(jsma(rising, images, labels), images)


def test_one_pixel_changes_one_pixel_nearly_as_well_as_can_be():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, generator=generator, dtype=torch.float64)
    images = 0.3 + 0.4 * torch.rand(30, 3, 4, 4, generator=generator, dtype=torch.float64)
    labels = torch.zeros(30, dtype=torch.int64)

    def linear(x):  # the margin falls by the weights, and stays above 0
        score = 100 + x.flatten(1) @ weight
        return torch.stack([score, torch.zeros_like(score)], 1)

    result = one_pixel(linear, images, labels, population=60, generations=40)
    assert (changed_pixels(result, images) == 1).all()
    slopes = weight.view(3, 4, 4)
    best = (slopes * ((slopes < 0).double() - images)).sum(1).flatten(1).amin(1)
    reached = margins(linear, result, labels) - margins(linear, images, labels)
    assert (reached >= best - 1e-9).all()
    assert (reached / best).mean() > 0.9


@pytest.mark.parametrize(("row", "column"), [(0, 0), (5, 4), (0, 4), (3, 2)])
def test_one_pixel_finds_the_only_pixel_that_matters(row, column):
    images, labels = torch.full((4, 2, 6, 5), 0.2), torch.zeros(4, dtype=torch.int64)

    def model(x):
        value = x[:, 1, row, column]
        return torch.stack([0.5 - value, value - 0.5], 1)

    result = one_pixel(model, images, labels, population=200)
    assert (result[:, 1, row, column] > 0.5).all()
    assert (changed_pixels(result, images) == 1).all()


def loop_local_search(net, image, label, rounds):
    """One image (C, H, W), one pixel a round, the whole image around it."""
    x, changed = image.clone(), set()
    for _ in range(rounds):
        tries = {}
        for place in [(i, j) for i in range(x.shape[1]) for j in range(x.shape[2]) if (i, j) not in changed]:
            tries[place] = x.clone()
            tries[place][:, *place] = (x[:, *place] < 0.5).float()
        place = min(tries, key=lambda p: margins(net, tries[p][None], label[None]).item())
        x = tries[place]
        changed.add(place)
        if logits(net, x[None]).argmax() != label:
            break
    return x


def test_local_search_is_a_greedy_loop(net, right):
    images, labels = right[0][:6], right[1][:6]
    expected = torch.stack([loop_local_search(net, x, y, 4) for x, y in zip(images, labels, strict=True)])
    assert torch.equal(local_search(net, images, labels, rounds=4, candidates=64, pixels=1, radius=8), expected)


@pytest.mark.parametrize(("rounds", "pixels", "radius"), [(3, 2, 5), (6, 1, 1), (5, 3, 2), (40, 3, 7)])
def test_local_search_changes_few_pixels_near_each_other(rounds, pixels, radius, right):
    images, labels = right[0][:10], right[1][:10]

    def sure(x):  # never errs
        score = (x.sum(1) * torch.linspace(1, 2, 64).view(8, 8)).sum((1, 2))
        return torch.stack([1e4 + score, torch.zeros_like(score)], 1)

    result = local_search(sure, images, torch.zeros_like(labels), rounds=rounds, pixels=pixels, radius=radius)
    changed = (result != images).any(1)
    assert (changed.flatten(1).sum(1) == min(rounds * pixels, 64)).all()
    assert torch.equal(result, torch.where(changed[:, None], (images < 0.5).float(), images))
    for mask in changed:
        places = mask.nonzero().double()
        near = torch.cdist(places, places, p=math.inf) <= radius
        groups = (torch.linalg.matrix_power(near.double(), 64) > 0).unique(dim=0)
        assert len(groups) <= pixels


BAD = [
    ("fgsm", {"epsilon": 0.0}, "epsilon=0.0: a number above 0 is needed"),
    ("pgd", {"epsilon": -1.0}, "epsilon=-1.0: a number above 0"),
    ("pgd", {"step": 0.0}, "step=0.0: a number above 0"),
    ("cw", {"constant": math.nan}, "constant=nan: a number above 0"),
    ("cw", {"confidence": -1.0}, "confidence=-1.0: a number of at least 0"),
    ("jsma", {"theta": 0.0}, r"theta=0.0: a number in \[-1, 1\] other than 0"),
    ("jsma", {"gamma": 1.5}, "gamma=1.5: a share of the values"),
    ("one_pixel", {"population": 2}, "population=2: at least 3"),
    ("one_pixel", {"generations": 0}, "generations=0: a number above 0"),
    ("local_search", {"candidates": 0}, "candidates=0: a number above 0"),
]


@pytest.mark.parametrize(("name", "settings", "message"), BAD)
def test_settings_that_do_not_fit_are_named(name, settings, message, net, right):
    with pytest.raises(ValueError, match=message):
        attack(name, net, *right, **settings)


@every_attack
def test_images_and_labels_that_do_not_fit_are_named(name, net, right):
    images, labels = right
    unfit = [
        (images * 255, labels, r"images from 0 to 255: values in \[0, 1\]"),
        (images - 0.1, labels, r"images from -0.1 to 0.9: values in \[0, 1\]"),
        (images * math.nan, labels, r"images from nan to nan: values in \[0, 1\]"),
        (images[0], labels, r"images of shape \(3, 8, 8\) and type torch.float32: \(B, C, H, W\)"),
        (images.half(), labels, "type torch.float16: .* of float32 or float64"),
        (images, labels[:-1], r"labels of shape \(39,\) for 40 samples"),
        (images, labels.float(), "labels of type torch.float32: integers"),
        (images, labels + 10, r"labels from 1\d to 19 with 10 classes: labels lie in 0..9"),
    ]
    for x, y, message in unfit:
        with pytest.raises(ValueError, match=message):
            attack(name, net, x, y)
