"""The door to torch-pruning leaves the model as found, and autograd's graph is read right."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modprune._depgraph import dependency_graph, edge, identity_path, last_sum, record_calls, traceable
from modprune.models import resnet20

X = torch.zeros(1, 3, 32, 32)


def snapshot(model: nn.Module) -> list[object]:
    """All that a visit could change, comparable by `==`."""
    modules = [(m.training, list(m._forward_hooks), list(m._forward_pre_hooks)) for m in model.modules()]
    tensors = [(k, t.clone().view(-1).tolist()) for k, t in model.state_dict(keep_vars=False).items()]
    return [modules, tensors, [p.requires_grad for p in model.parameters()], torch.get_rng_state().tolist()]


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


class Noisy(nn.Module):
    """Counts its calls in a buffer and draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.layer(x + torch.rand(()))


def test_buffers_and_random_numbers_come_back():
    model = Noisy()
    before = snapshot(model)
    with traceable(model):
        model(torch.zeros(1, 2))
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


@pytest.mark.parametrize(
    ("function", "path", "sums"),
    [
        (lambda x, w: x + w * x, "branch", 2),
        (lambda x, w: (w * x + x.t().t()).relu(), "branch", 2),
        (lambda x, w: x - w * x, "branch", 0),
        (lambda x, w: w * x - x, "", 0),
        (lambda x, w: x + w, "other", 2),
        (lambda x, w: x + x.sin(), "", 2),
        (lambda x, w: w * x, "", 0),
        (lambda x, w: torch.add(w * x, x, alpha=3), "", 0),
        (lambda x, w: x + w * x + w * x, "branch", 2),
    ],
)
def test_paths_and_sums(function, path, sums):
    x, w = torch.randn(2, 2, requires_grad=True).clone(), nn.Parameter(torch.randn(2, 2))
    y = function(x, w)
    assert identity_path(edge(y), edge(x)) == path
    assert len(last_sum(y.grad_fn)) == sums


def test_the_other_half_of_a_split_is_another_value():
    x, other = torch.randn(2, 4, requires_grad=True).clone().chunk(2, dim=1)
    w = nn.Parameter(torch.randn(2, 2))
    assert identity_path(edge(other + w * x), edge(x)) == ""
    assert identity_path(edge(x + w * x), edge(x)) == "branch"


def test_calls_are_counted_and_keep_what_went_in():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True)))
    with traceable(model):
        calls, output = record_calls(model, torch.tensor([[1.0, 2.0]]))
    assert list(calls) == ["0", "1", "1.0"]
    assert calls["0"].x.tolist() == [[1.0, 2.0]]
    assert calls["1"].end == edge(output)
    assert [seen.times for seen in calls.values()] == [1, 1, 1]
