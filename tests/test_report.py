"""The report says what is so."""

from __future__ import annotations

import json

import pytest
import torch

from modprune.data import ImageLoader, digits
from modprune.evaluate import evaluate
from modprune.models import resnet20, resnet56
from modprune.plan import PruningPlan
from modprune.report import compare
from tests.oracles import snapshot


def test_numbers_reach_text_markdown_and_json(tmp_path):
    model = resnet56()
    pruned = PruningPlan(("layer1.0", "layer3.8")).apply(resnet56())
    report = compare(model, pruned, torch.zeros(1, 3, 32, 32))
    text = str(report)
    assert report.params_removed == pytest.approx((4672 + 73984) / 853018)
    row = next(line for line in text.splitlines() if line.startswith("Parameters"))
    assert row.split() == ["Parameters", "853,018", "774,362", "-9.22", "%"]
    assert "125.486 M" in text
    assert "126.555 M" in report.to_markdown()
    data = json.loads(report.to_json(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == data
    assert data["flops_removed"]["modprune"] == pytest.approx(2 * 4718592 / 125485696)


def test_a_large_difference_names_what_explains_it():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    text = str(compare(layer, layer, torch.zeros(1, 5, 8)))
    assert "MACs in the original: MultiheadAttention -0." in text
    assert "thop counts" in text
    assert "BatchNorm" not in text  # it has none


class Functional(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 3))

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight)


def test_a_counter_that_finds_nothing_is_left_out_and_named():
    report = compare(Functional(), Functional(), torch.zeros(1, 3))
    assert "thop" not in report.flops_removed
    assert "Left out, since it cannot count this network or its inputs: thop." in str(report)
    assert json.loads(report.to_json())["flops_removed"] == report.flops_removed


def test_a_network_without_counted_macs_is_compared_all_the_same():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Flatten())  # fvcore counts norms
    assert "MACs (fvcore)" in str(compare(model, model, torch.zeros(2, 3, 8, 8)))


def test_accuracy_and_time_are_of_the_right_network():
    small, large, test = resnet20(), resnet56(), ImageLoader(digits(False), 120)
    found = [snapshot(model) for model in (small, large)]
    report = compare(small, large, torch.zeros(1, 3, 8, 8), test)
    assert [snapshot(model) for model in (small, large)] == found
    assert report.original.accuracy == evaluate(small, test)
    assert report.pruned.accuracy == evaluate(large, test) != evaluate(small, test)
    assert report.pruned.params > report.original.params
    assert report.pruned.seconds[1] > report.original.seconds[1]
    assert [row[0] for row in report.rows()][:4] == ["Top-1 (%)", "Top-5 (%)", "Loss", "Parameters"]


def test_what_is_equal_has_not_changed():
    assert "-0.00 %" not in str(compare(resnet20(), resnet20(), torch.zeros(1, 3, 8, 8)))


def test_a_compiled_network_is_counted_as_what_it_wraps():
    model = resnet20()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    report = compare(model, whole, torch.zeros(1, 3, 8, 8))
    assert report.original.macs == report.pruned.macs
