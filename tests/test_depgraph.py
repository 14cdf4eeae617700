"""The door to torch-pruning leaves the model as found."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from modprune._depgraph import dependency_graph
from modprune.models import resnet20
from tests.oracles import snapshot

X = torch.zeros(1, 3, 32, 32)


@pytest.mark.parametrize("inputs", [X, X[:, :1]], ids=["runs", "fails"])
@pytest.mark.parametrize("frozen", [0, 1, 10**6])
def test_the_model_is_left_as_found(inputs, frozen):
    model = resnet20().train()
    model.layer1.eval()
    model.bn1.register_forward_hook(lambda *_: None)
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad_(False)
    before = snapshot(model)
    with torch.no_grad():
        try:
            dependency_graph(model, inputs)
        except RuntimeError:
            assert inputs is not X
    assert snapshot(model) == before


def test_all_layers_of_a_frozen_model_are_in_the_graph_even_under_no_grad():
    model = resnet20().requires_grad_(False)
    with torch.no_grad():
        graph = dependency_graph(model, X)
    layers = {m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))}
    assert layers <= set(graph.module2node)


def test_the_first_error_is_shown_on_one_line():
    with pytest.raises(RuntimeError, match=r"no dependency graph of CifarResNet: .*channels") as caught:
        dependency_graph(resnet20(), torch.zeros(1, 1, 32, 32))
    assert "\n" not in str(caught.value)


def test_an_interrupt_is_not_lost_while_timm_is_imported(monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt(name)  # which torch-pruning, that imports it too, would swallow

    monkeypatch.setattr(importlib, "import_module", interrupted)
    with pytest.raises(KeyboardInterrupt, match="timm"):
        dependency_graph(resnet20(), X)
