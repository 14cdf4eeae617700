"""The main job, called as a function."""

from __future__ import annotations

import torch

from modprune.data import digits
from modprune.job import prune_job
from modprune.models import resnet20
from modprune.recipe import Recipe
from tests.oracles import snapshot


def test_the_original_stays_and_test_images_choose_nothing(tmp_path):
    torch.manual_seed(0)
    model, train, test = resnet20(), digits(True), digits(False)
    found = snapshot(model)
    for name, part in (("a", torch.arange(100)), ("b", torch.arange(100, 360))):
        report = prune_job(
            model, train, test.subset(part), tmp_path / name, blocks=2, recipe=Recipe(epochs=1, lr=0.05), pad=1
        )
        assert report.original.accuracy.samples == len(part)
        assert snapshot(model) == found
    for file in ("plan.json", "curve.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
