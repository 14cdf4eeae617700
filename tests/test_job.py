"""The main job, called as a function."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch

from modprune import PruningPlan, count_params, evaluate, finetune, load
from modprune import job as jobs
from modprune._files import alone
from modprune.criteria import BlockScores, Modularity, Random
from modprune.data import ImageLoader, digits
from modprune.job import prune_job
from modprune.models import CifarResNet, resnet20
from modprune.recipe import Recipe
from tests.oracles import snapshot


def test_the_original_stays_and_test_images_choose_nothing(tmp_path):
    torch.manual_seed(0)
    model, train, test = resnet20(), digits(True).subset(torch.arange(300)), digits(False)
    found = snapshot(model)
    for name, part in (("a", torch.arange(100)), ("b", torch.arange(100, 360))):
        report = prune_job(
            model,
            train,
            test.subset(part),
            tmp_path / name,
            blocks=2,
            width=0.3,
            recipe=Recipe(epochs=1, lr=0.05),
            pad=1,
        )
        assert report.original.accuracy.samples == len(part)
        assert snapshot(model) == found
    for file in ("plan.json", "curve.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    cut = sum(len(channels) for _, channels in PruningPlan.from_json(tmp_path / "a" / "plan.json").width)
    text = (tmp_path / "a" / "report.md").read_text()
    assert f"Channels cut by torch-pruning: {cut} of " in text
    assert "Network: CifarResNet, training images: 300, test images: 100, epochs of fine-tuning: 1.\n" in text


def test_a_compiled_run_is_resumed_to_the_same_bits_and_leaves_nothing_compiled(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, few, trained = CifarResNet((2, 1, 1)), digits(True).subset(torch.arange(256)), []
    job = {"model": model, "train": few, "test": few, "blocks": 1, "criterion": "l1_norm", "pad": 1, "compiled": True}
    job["recipe"] = Recipe(epochs=2, lr=0.05)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # of C++ it takes half a minute

    def watched(net, *rest, after_epoch, **options):
        def once(epoch):
            after_epoch(epoch)
            if not trained:
                trained.append(net)
                signal.raise_signal(signal.SIGTERM)

        return finetune(net, *rest, after_epoch=once, **options)

    prune_job(**job, out=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "finetune", watched)
        with pytest.raises(SystemExit):
            prune_job(**job, out=tmp_path / "cut")
    assert type(trained[0]).__name__ == "OptimizedModule"
    with pytest.raises(ValueError, match=r"'compiled': True.*resume it as it was"):
        prune_job(**(job | {"compiled": False}), out=tmp_path / "cut", resume=True)
    report = prune_job(**job, out=tmp_path / "cut", resume=True)
    whole, cut = (load(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert snapshot(whole) == snapshot(cut)
    assert evaluate(cut, ImageLoader(few, 100)) == report.pruned.accuracy


def test_what_cannot_be_compiled_here_is_said_before_anything_is_done(tmp_path):
    few = digits(True).subset(torch.arange(256))
    nowhere = torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler"), "force_disable_caches": True})
    with nowhere, pytest.raises(ValueError, match=r"torch\.compile does not work here, .*/no/such") as told:
        prune_job(CifarResNet((2, 1, 1)), few, few, tmp_path / "out", blocks=1, compiled=True)
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()


def test_a_run_into_the_folder_of_another_never_ends_with_its_results(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model, train, test = resnet20(), digits(True), digits(False)
    rest = {"criterion": "l1_norm", "recipe": Recipe(epochs=1, lr=0.05), "pad": 1}
    prune_job(model, train, test, tmp_path, blocks=2, **rest)
    of_a_finished_run = (({"recipe": Recipe(epochs=3, lr=0.05)}, "'epochs': 1"), ({"seed": 1}, "'seed': 0"))
    for other, had in (*of_a_finished_run, ({"recipe": None}, "'epochs': 1")):  # not even more epochs
        with pytest.raises(ValueError, match=f"has {{{had}.* resume it as it was, or give another folder"):
            prune_job(model, train, test, tmp_path, blocks=2, **(rest | other), resume=True)
    with pytest.raises(ValueError, match=r"the run there has \{'criterion': 'L1Norm\(\)'\}, this one"):
        prune_job(model, train, test, tmp_path, blocks=2, **(rest | {"criterion": Random(seed=1)}), resume=True)
    with pytest.raises(ValueError, match=r"the run there has \{'weights': "):
        prune_job(resnet20(), train, test, tmp_path, blocks=2, **rest, resume=True)
    with pytest.raises(ValueError, match=r"the run there has \{'images': "):
        prune_job(model, test, test, tmp_path, blocks=2, **rest, resume=True)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "finetune", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune_job(model, train, test, tmp_path, blocks=4, **rest)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["plan.json", "run.json"]
    report = prune_job(model, train, test, tmp_path, blocks=4, **rest, resume=True)
    assert len(json.loads((tmp_path / "plan.json").read_text())["remove"]) == 4
    assert report.pruned.params == count_params(load(tmp_path / "model.safetensors"))
    assert report.params_removed > 0.05


@pytest.mark.parametrize("odd", ["empty", "classes", "shape"])
def test_test_images_of_another_kind_are_told_before_the_work(odd, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "ModularityPruner", lambda *_, **__: pytest.fail("measured before it looked"))
    train, test = digits(True), digits(False)
    of_kind = {
        "empty": test.subset(torch.arange(0)),
        "classes": replace(test, num_classes=11),
        "shape": replace(test, images=test.images[:, :, :7]),
    }
    with pytest.raises(
        ValueError, match=r"test: \d+ images, 1\d classes of .* where the training images are 10 classes"
    ):
        prune_job(resnet20(), train, of_kind[odd], tmp_path, blocks=1)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["plan.json", "model.safetensors", "report.md"])
def test_a_file_that_no_run_has_made_is_neither_used_nor_replaced(name, resume, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=rf"its {name} is of no run of modprune prune and would be replaced"):
        prune_job(resnet20(), digits(True), digits(False), tmp_path, blocks=3, criterion="l1_norm", resume=resume)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


def test_a_network_of_fewer_classes_is_told_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "ModularityPruner", lambda *_, **__: pytest.fail("measured before it looked"))
    with pytest.raises(ValueError, match="labels from 9 to 9 with 3 classes"):
        prune_job(resnet20(3), digits(True), digits(False), tmp_path, blocks=1)


def test_what_differs_from_an_unfinished_run_is_told_as_it_was_given(tmp_path, monkeypatch):
    job = {"model": resnet20(), "train": digits(True), "test": digits(False), "out": tmp_path, "criterion": "l1_norm"}
    monkeypatch.setattr(jobs, "finetune", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_job(**job, blocks=2, recipe=Recipe(epochs=2))
    with pytest.raises(ValueError, match=r"has \{'epochs': 2\}, this one \{'epochs': 0\}:"):
        prune_job(**job, blocks=2, resume=True)


def test_states_that_a_kill_leaves_in_a_finished_run_go_when_it_is_resumed(tmp_path):
    torch.manual_seed(0)
    job = {"model": resnet20(), "train": digits(True), "test": digits(False), "out": tmp_path, "criterion": "l1_norm"}
    prune_job(**job, blocks=2)
    (tmp_path / "checkpoints" / "epoch-0001").mkdir(parents=True)
    with pytest.raises(ValueError, match="resume it"):
        prune_job(**job, blocks=3)
    prune_job(**job, blocks=2, resume=True)
    prune_job(**job, blocks=3)
    assert len(PruningPlan.from_json(tmp_path / "plan.json").remove) == 3


def test_two_runs_do_not_share_a_folder(tmp_path):
    with alone(tmp_path), pytest.raises(ValueError, match="another run is at work there"):
        prune_job(resnet20(), digits(True), digits(False), tmp_path, criterion="l1_norm", blocks=1)
    assert list(tmp_path.iterdir()) == []
    with alone(tmp_path):
        pass


def size_of(model, blocks):
    return BlockScores(blocks.names, np.array([[float(b.params) for b in blocks]]))


@dataclass(frozen=True)
class Mine:
    measure: Callable = size_of

    def __call__(self, model, blocks, loader):
        return self.measure(model, blocks)


def test_a_criterion_is_the_same_wherever_it_lies_in_memory(tmp_path):
    few = digits(True).subset(torch.arange(128))
    prune_job(resnet20(), few, few, tmp_path, blocks=1, criterion=Mine())
    recorded = json.loads((tmp_path / "run.json").read_text())["arguments"]["criterion"]
    assert recorded == "Mine(measure=<function size_of>)"
    assert "budget" not in repr(Modularity())


def test_few_images_and_numbers_of_numpy_are_enough(tmp_path):
    few, model = digits(True).subset(torch.arange(150)), resnet20()
    recipe = Recipe(epochs=np.int64(1), lr=np.float32(0.01))
    for resume in (False, True):
        prune_job(model, few, few, tmp_path, blocks=np.int64(2), recipe=recipe, seed=np.int64(3), resume=resume)
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert len(curve["layers"]) == 10
