"""Every study on scikit-learn's digits: what it measures, what it writes, and that an interrupted one goes on."""

from __future__ import annotations

import copy
import itertools
import json
import sys
import xml.etree.ElementTree as ET
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import scipy
import torch
import torchvision
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from modprune import finetune, modularity_curve, studies
from modprune._studies_cli import _titles
from modprune.curve import ModularityCurve
from modprune.data import ImageLoader, digits
from modprune.graph import feature_graph
from modprune.models import resnet20
from modprune.studies import CurveRecorder, Parts
from modprune.studies.ablation import draw as draw_ablation
from modprune.studies.ablation import tell as tell_ablation
from modprune.studies.adversarial import ATTACKS
from modprune.studies.curves import draw as draw_curves
from modprune.studies.curves import tell as tell_curves
from modprune.studies.layers import layers_of
from modprune.studies.plateaus import draw as draw_plateaus
from modprune.studies.recovery import recover
from modprune.studies.separation import _embedded, _silhouette
from modprune.studies.separation import draw as draw_separation
from modprune.studies.study import rank_correlation
from tests.oracles import networkx_q

SMALL = {"samples": 100, "repeats": 2}


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    model = resnet20()
    finetune(model, train(), epochs=2, lr=0.1, progress=False)
    return model


def train() -> ImageLoader:
    return ImageLoader(digits(train=True), 64, pad=1, shuffle=True)


def some() -> ImageLoader:
    """A third of them, where it matters little what is learnt."""
    return ImageLoader(digits(train=True).subset(torch.arange(480)), 64, pad=1, shuffle=True)


def calibration() -> ImageLoader:
    return ImageLoader(digits(train=True), 100, shuffle=True)


def held_out() -> ImageLoader:
    return ImageLoader(digits(train=False), 100)


def features(network: nn.Module, layer: str) -> torch.Tensor:
    """(100, columns): what a layer gives for the first calibration images."""
    seen: list[torch.Tensor] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda _, __, out: seen.append(out.flatten(1)))
    with torch.no_grad():
        network.eval()(next(iter(calibration()))[0])
    hook.remove()
    return seen[0]


def written(study: studies.Study, out) -> dict:
    """The four files are there and whole; the numbers come back."""
    study.write(out)
    assert sorted(p.name for p in out.iterdir()) == ["study.json", "study.md", "study.png", "study.svg"]
    assert (out / "study.png").read_bytes()[:4] == b"\x89PNG"
    ET.parse(out / "study.svg")
    assert study.text in (out / "study.md").read_text()
    return json.loads((out / "study.json").read_text())


def test_curves_are_those_of_modularity_curve(network, tmp_path):
    study = studies.curves({"a": (network, calibration()), "b": (resnet20(), calibration())}, **SMALL)
    numbers = written(study, tmp_path)
    expected = modularity_curve(network, calibration(), **SMALL)
    assert numbers["networks"][0]["layers"] == list(expected.layers)
    assert np.array_equal(numbers["networks"][0]["q"], expected.q)
    assert [row["network"] for row in numbers["networks"]] == ["a", "b"]
    assert len(study.figure.axes) == 2


def test_the_weight_layers_of_a_chain_are_its_points():
    chain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    assert layers_of(chain, torch.zeros(1, 3, 8, 8)) == ("0", "2")
    with pytest.raises(ValueError, match="a curve needs two"):
        layers_of(chain[3:], torch.zeros(1, 128))


def test_ablation_cuts_its_cells_from_one_draw(network, tmp_path):
    study = studies.ablation(network, calibration(), ks=(3, 5), sizes=(50, 100, 200))
    numbers = written(study, tmp_path)
    cells = {(cell["k"], cell["samples"]): np.array(cell["q"]) for cell in numbers["cells"]}
    assert {key: len(q) for key, q in cells.items()} == {
        (k, n): draws for k in (3, 5) for n, draws in ((50, 4), (100, 2), (200, 1))
    }
    assert np.allclose(cells[3, 200], modularity_curve(network, calibration(), 3, 200, 1).q, atol=1e-6)
    assert np.allclose(cells[5, 100], modularity_curve(network, calibration(), 5, 100, 2).q, atol=1e-6)
    assert np.allclose(np.diagonal(numbers["rank_correlation"]), 1)


def test_what_is_given_twice_is_measured_once(network, monkeypatch):
    once = studies.ablation(network, calibration(), ks=(3,), sizes=(50,)).numbers
    assert studies.ablation(network, calibration(), ks=(3, 3), sizes=(50, 50)).numbers == once
    twice = studies.plateaus(network, calibration(), train(), cuts=(1, 1), samples=60, repeats=1)
    assert [row["cut"] for row in twice.numbers["cuts"]] == [1]
    monkeypatch.setitem(ATTACKS, "fgsm", lambda model, images, labels: images)
    normal = {"mean": held_out().data.mean, "std": held_out().data.std}
    attacked = studies.attacks(network, held_out(), **normal, names=("fgsm", "fgsm"), samples=50)
    assert len(attacked.numbers["attacks"]) == 1


def test_difference_and_cka(network, tmp_path):
    numbers = written(studies.difference(network, calibration(), samples=100), tmp_path)
    q, d, cka = (np.array(numbers[name]) for name in ("q", "difference", "cka"))
    assert numbers["place"].count("after") == 10
    assert numbers["place"].count("inside") == 18
    assert numbers["layers"][:4] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0"]
    assert np.allclose(d, abs(q[:, None] - q))
    assert np.allclose(cka, cka.T, atol=1e-6)
    # CKA after its definition, from the features themselves.
    x, y = (f - f.mean(0) for f in (features(network, name).double() for name in ("conv1", "layer1.0")))
    expected = (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())
    assert cka[0, 3] == pytest.approx(float(expected), abs=1e-4)


def test_separation_places_every_image_and_sees_clusters(network, tmp_path):
    numbers = written(studies.separation(network, calibration(), samples=100), tmp_path)
    assert [row["layer"] for row in numbers["layers"]] == list(layers_of(network, torch.zeros(1, 3, 8, 8)))
    assert all(np.array(row["at"]).shape == (100, 2) for row in numbers["layers"])
    expected = modularity_curve(network, calibration(), samples=100, repeats=1).mean
    assert np.allclose([row["q"] for row in numbers["layers"]], expected, atol=1e-6)
    first = numbers["layers"][0]
    linked = feature_graph(features(network, "conv1"), 3).neighbours
    pairs = {frozenset((i, j)) for i, row in enumerate(linked.tolist()) for j in row}
    assert sorted(map(sorted, pairs)) == first["edges"]
    noise = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    clusters = torch.eye(3).repeat_interleave(20, 0) + 0.1 * noise
    at = _embedded(clusters @ clusters.T, seed=0)
    assert _silhouette(at, torch.arange(60) // 20) > 0.7
    assert at == _embedded(4 * clusters @ clusters.T, seed=0)


def test_a_missing_extra_is_named_before_the_work(network, monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs networkx: pip install 'modprune\[studies\]'"):
        studies.separation(network, None)


def test_training_records_every_epoch_and_goes_on(tmp_path):
    def run(parts, epochs, checkpoints):
        torch.manual_seed(0)
        model = resnet20()
        study = studies.training(
            model, calibration(), some(), held_out(), epochs=epochs, samples=100, checkpoints=checkpoints, parts=parts
        )
        return model, study

    model, study = run(None, 2, None)
    numbers = written(study, tmp_path / "out")
    assert [row["epoch"] for row in numbers["epochs"]] == [0, 1, 2]
    expected = modularity_curve(model, calibration(), samples=100, repeats=1).mean
    assert np.allclose(numbers["epochs"][2]["q"], expected)

    class Killed(Exception):
        pass

    class Dies(Parts):
        def keep(self, name, value):
            super().keep(name, value)
            if value[-1]["epoch"] == 2:  # after the curve of the second epoch, before its state is written
                raise Killed

    with pytest.raises(Killed):
        run(Dies(tmp_path / "parts.json", 2), 2, tmp_path / "checkpoints")
    again, resumed = run(Parts(tmp_path / "parts.json", 2, resume=True), 2, tmp_path / "checkpoints")
    without = [{n: v for n, v in row.items() if n != "loss"} for row in resumed.numbers["epochs"]]
    assert without == [{n: v for n, v in row.items() if n != "loss"} for row in numbers["epochs"]]
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_a_recorder_leaves_the_training_alone():
    data = digits(train=True)
    rows = TensorDataset(data.images / 255, data.labels)

    def weights(record):
        torch.manual_seed(0)
        model, shuffled = resnet20(), DataLoader(rows, 64, shuffle=True)
        recorder = CurveRecorder(model, shuffled, samples=50) if record else None
        finetune(model, shuffled, epochs=1, progress=False, after_epoch=lambda e: recorder and recorder(e.epoch))
        return torch.cat([p.flatten() for p in model.parameters()])

    assert torch.equal(weights(True), weights(False))


def test_plateaus_follow_the_gain_and_keep_the_rest(network, tmp_path):
    study = studies.plateaus(network, calibration(), train(), cuts=(1, 3), **SMALL)
    numbers = written(study, tmp_path)
    curve = modularity_curve(network, calibration(), **SMALL)
    least = [curve.layers[1:][i] for i in np.argsort(curve.gain)][:3]
    assert numbers["cuts"][1]["removed"] == least
    assert numbers["cuts"][1]["layers"] == [name for name in curve.layers if name not in least]
    assert np.array(numbers["cuts"][1]["q"]).shape == (2, 7)
    with pytest.raises(ValueError, match="from 1 to 8 blocks can be cut"):
        studies.plateaus(network, calibration(), train(), cuts=(9,), **SMALL)


def test_too_large_cuts_are_told_before_the_work(network):
    kept = Parts()
    with pytest.raises(ValueError, match=r"cuts=\(9,\): from 1 to 8 blocks can be cut"):
        studies.plateaus(network, calibration(), train(), cuts=(9,), samples=60, repeats=1, parts=kept)
    assert kept.known == {}


def test_redundancy_cuts_both_ends(network, tmp_path):
    study = studies.redundancy(network, calibration(), some(), held_out(), cuts=2, epochs=1, **SMALL)
    numbers = written(study, tmp_path)
    curve = modularity_curve(network, calibration(), **SMALL)
    order = [curve.layers[1:][i] for i in np.argsort(curve.gain)]
    assert [row["removed"] for row in numbers["cuts"]] == [order[:1], order[:2], order[:-2:-1], order[:-3:-1]]
    assert all(list(row["states"]) == ["at once", "batch norm", "fine-tuned"] for row in numbers["cuts"])
    assert numbers["cuts"][0]["gain"] == pytest.approx(curve.gain.min())


def test_of_batch_norm_nothing_is_told_where_there_is_none():
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=10, norm_layer=partial(nn.GroupNorm, 8))
    laid = studies.plateaus(network, calibration(), train(), cuts=(1,), **SMALL)
    assert "removed, and the curve measured again at once." in laid.text
    both = studies.redundancy(network, calibration(), some(), held_out(), cuts=1, **SMALL)
    assert [list(row["states"]) for row in both.numbers["cuts"]] == [["at once"]] * 2
    assert "batch norm" not in both.text


def test_attacks_hold_the_images_they_turn_against_the_same_clean(network, tmp_path):
    normal = {"mean": held_out().data.mean, "std": held_out().data.std}
    study = studies.attacks(network, held_out(), **normal, names=("fgsm", "pgd"), samples=150)
    numbers = written(study, tmp_path)
    for row in numbers["attacks"]:
        assert 0 < row["fooled"] <= 150
        assert row["distance"] > 0
        assert len(row["q"]) == len(row["clean"]) == len(numbers["layers"])
    x, y = (torch.cat(parts) for parts in list(zip(*held_out(), strict=True))[:2])
    shift, scale = (torch.tensor(normal[name]).view(1, -1, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        right = (network.eval()(x).argmax(1) == y).nonzero().flatten()[:150]
    images, y = (x[right] * scale + shift).clamp(0, 1), y[right]
    hit = ATTACKS["fgsm"](lambda images: network((images - shift) / scale), images, y)
    with torch.no_grad():
        wrong = network((hit - shift) / scale).argmax(1) != y
    for kind, pixels in (("q", hit), ("clean", images)):
        turned = [((pixels[wrong] - shift) / scale, y[wrong])]
        expected = modularity_curve(network, turned, samples=int(wrong.sum()), repeats=1).q[0]
        assert np.allclose(numbers["attacks"][0][kind], expected, atol=2e-3)  # an edge may turn by rounding
    assert not np.allclose(numbers["attacks"][0]["q"], numbers["attacks"][0]["clean"], atol=2e-3)
    with pytest.raises(ValueError, match="attack 'x' is unknown: give some of fgsm"):
        studies.attacks(network, held_out(), **normal, names=("x",))
    with pytest.raises(ValueError, match=r"gets \d+ images right, 1000 are asked for"):
        studies.attacks(network, held_out(), **normal, samples=1000)


def test_an_attack_that_changes_nothing_says_so(network, monkeypatch):
    monkeypatch.setitem(ATTACKS, "fgsm", lambda model, images, labels: images)
    study = studies.attacks(
        network, held_out(), mean=held_out().data.mean, std=held_out().data.std, names=("fgsm",), samples=50
    )
    assert "changes the answer to no image" in study.text


def test_ranks_of_equal_numbers_are_equal():
    rows = [[0, 0, 0, 1], [3, 2, 1, 4], [1, 2, 2, 3]]
    assert np.allclose(rank_correlation(rows), scipy.stats.spearmanr(rows, axis=1).statistic)


def test_parts_are_kept_and_guarded(tmp_path):
    path, calls = tmp_path / "parts.json", []
    make = lambda: calls.append(1) or [1.5]  # noqa: E731
    assert Parts(path, {"k": 3})("a", make) == [1.5]
    assert Parts(path, {"k": 3}, resume=True)("a", make) == [1.5]
    assert len(calls) == 1
    with pytest.raises(ValueError, match="holds an unfinished study: resume it"):
        Parts(path, {"k": 3})
    with pytest.raises(ValueError, match="other arguments or weights: delete it, or give another folder"):
        Parts(path, {"k": 5}, resume=True)
    for text in ("{}", "[1]", '{"arguments": {"k": 3}, "par'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"parts.json: holds no parts of a study: delete it"):
            Parts(path, {"k": 3}, resume=True)


def test_statistics_are_measured_anew_on_inputs_of_any_form_and_only_if_there_are_some(network):
    images = torch.cat([images for images, *_ in list(held_out())[:1]])
    expected, spread = copy.deepcopy(network), copy.deepcopy(network)
    recover(expected, [(images, None)], network, 0, 0.1)
    recover(spread, [{"x": images}], network, 0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), spread.buffers(), strict=True))
    assert not torch.equal(expected.bn1.running_mean, network.bn1.running_mean)
    with pytest.raises(ValueError, match="the training loader gives no batch; one that can be read only once"):
        recover(spread, iter([]), network, 0, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(expected.buffers(), spread.buffers(), strict=True))


def test_a_study_without_labels_says_so(network):
    unlabelled = [torch.randn(50, 3, 8, 8)] * 3
    for study in (studies.ablation, studies.difference, studies.separation):
        with pytest.raises(ValueError, match="labels"):
            study(network, unlabelled)


@pytest.mark.parametrize("study", [studies.ablation, studies.difference, studies.separation, studies.curves])
def test_features_that_are_no_numbers_name_the_layer(network, study):
    broken = copy.deepcopy(network)
    broken.layer2[1].bn2.bias.data[0] = torch.nan
    given = ({"a": (broken, calibration())},) if study is studies.curves else (broken, calibration())
    size = {"sizes": (50,)} if study is studies.ablation else {"samples": 50}
    with pytest.raises(ValueError, match=r"^layer layer2\.1(\.bn2)?: the features of sample 0 hold NaN"):
        study(*given, **size)


def test_q_of_a_study_is_that_of_networkx(network):
    labels = next(iter(calibration()))[1]
    expected = networkx_q(feature_graph(features(network, "layer3"), 3), labels)
    numbers = studies.difference(network, calibration(), samples=100).numbers
    assert numbers["q"][-1] == pytest.approx(expected, abs=1e-5)


def test_resumed_cuts_are_measured_on_the_same_images(network):
    """Where there are fewer than samples x repeats, a loader that shuffles gives others each time."""

    def cuts(parts: Parts) -> list:
        few = ImageLoader(digits(train=True).subset(torch.arange(150)), 50, shuffle=True)
        return studies.plateaus(network, few, train(), cuts=(1, 2), parts=parts, **SMALL).numbers["cuts"]

    whole, resumed = Parts(), Parts()
    expected = cuts(whole)
    resumed.known = {name: value for name, value in whole.known.items() if name != "cut 2"}
    assert cuts(resumed) == expected


def test_one_of_a_thing_is_told_as_one():
    row = {"network": "a", "layers": ["x", "y"], "q": [[0.1, 0.2]], "plateaus": [], "degradations": ["y"]}
    text = tell_curves({"k": 3, "samples": 50, "networks": [row]})
    assert "mean and spread over 1 draw." in text
    assert text.endswith("0 plateaus and 1 degradation in 1 step.")


def test_what_a_paragraph_says_was_measured(network):
    cell = studies.ablation(network, calibration(), ks=(3,), sizes=(50,)).text
    assert "nan" not in cell
    assert "Spearman" not in cell
    recorder = CurveRecorder(network, calibration(), samples=50)
    recorder(1)
    with pytest.raises(ValueError, match="1 epoch recorded: a study of their course needs at least 2"):
        recorder.study()
    recorder(2)
    study = recorder.study()
    assert "after epochs 1 to 2" in study.text
    assert all(float(tick).is_integer() for ax in study.figure.axes for tick in ax.get_xticks())


def test_a_layer_without_edges_is_drawn(network):
    dead = copy.deepcopy(network)
    nn.init.zeros_(dead.layer1[0].bn2.weight)
    nn.init.zeros_(dead.layer1[0].bn2.bias)
    nn.init.zeros_(dead.conv1.weight)
    nn.init.constant_(dead.bn1.bias, -1.0)
    with pytest.warns(RuntimeWarning, match="no edge"):
        rows = studies.separation(dead, calibration(), samples=50).numbers["layers"]
    assert rows[1]["edges"] == []


def test_as_many_classes_as_fooled_images_are_too_few_for_a_graph(network, monkeypatch):
    def turns_one_of_each_class(classify, images, labels):
        first = torch.tensor([int((labels == label).nonzero()[0]) for label in labels.unique()])
        hit = images.clone()
        hit[first] = torch.rand(images[first].shape, generator=torch.Generator().manual_seed(0))
        return hit

    monkeypatch.setitem(ATTACKS, "one", turns_one_of_each_class)
    data = digits(train=False)
    study = studies.attacks(network, held_out(), mean=data.mean, std=data.std, names=("one",), k=1, samples=100)
    (row,) = study.numbers["attacks"]
    assert row["fooled"] > 1
    assert "too few for a graph" in study.text


def test_every_curve_is_drawn_and_told_apart():
    cells = [{"k": k, "samples": 50, "q": [[0.0, 0.1 * k]]} for k in range(1, 13)]
    cuts = [{"cut": cut, "layers": ["a", "c"], "q": [[0.1, 0.2]]} for cut in range(1, 12)]
    left = draw_ablation({"cells": cells}).axes[0]
    (ax,) = draw_plateaus({"layers": ["a", "b", "c"], "q": [[0.1, 0.2, 0.3]], "cuts": cuts}).axes
    for lines in (left.get_lines(), ax.get_lines()):
        assert len({(line.get_color(), line.get_marker()) for line in lines}) == 12
    assert [text.get_text() for text in left.get_legend().get_texts()] == [f"k = {k}" for k in range(1, 13)]


def test_the_spread_between_draws_is_that_of_a_curve():
    q = [[0.1, 0.2], [0.3, 0.7], [0.2, 0.3]]
    numbers = {"layers": ["a", "b"], "cells": [{"k": 3, "samples": 50, "q": q}], "rank_correlation": [[1.0]]}
    largest = ModularityCurve(("a", "b"), np.array(q)).std.max()
    assert f"largest spread between draws is {largest:.4f} at N = 50" in tell_ablation(numbers)
    band = draw_ablation(numbers).axes[0].collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx(0.4 + largest)


def test_more_than_ten_classes_are_told_apart_in_the_picture():
    row = {"layer": "a", "q": 0.5, "at": [[n, n] for n in range(30)], "edges": []}
    ax = draw_separation({"layers": [row], "labels": list(range(30))}).axes[0]
    seen = [(tuple(c.get_facecolor()[0]), c.get_paths()[0].vertices.tobytes()) for c in ax.collections]
    assert len(set(seen)) == 30


@pytest.mark.parametrize(
    ("weights", "titles"),
    [
        (("runs/a/model.safetensors", "runs/b/model.safetensors"), ["1: resnet20", "2: resnet20"]),
        (("a.th", "b.th"), ["resnet20, a.th", "resnet20, b.th"]),
    ],
)
def test_networks_of_the_same_name_are_told_apart_by_what_differs(weights, titles):
    assert _titles([SimpleNamespace(model="resnet20", data="digits", weights=path) for path in weights]) == titles


def test_long_titles_of_panels_side_by_side_do_not_meet():
    rows = [
        {"network": f"resnet20, resnet20-{name}-of-seven.safetensors", "layers": ["a", "b"], "q": [[0.1, 0.2]]}
        for name in ("first", "second", "third")
    ]
    figure = draw_curves({"networks": rows})
    FigureCanvasAgg(figure).draw()
    boxes = [ax.title.get_window_extent() for ax in figure.axes]
    assert all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
