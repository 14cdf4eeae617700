"""Accuracy by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from modprune import compare
from modprune.cost import latency, latency_by_module
from modprune.evaluate import evaluate


class Given(nn.Module):
    """Gives its inputs back as logits."""

    def forward(self, x):
        return {"logits": x}


def test_by_hand():
    logits = torch.tensor([[9.0, 1, 2, 3, 4, 5], [9, 8, 7, 6, 5, 4], [0, 1, 2, 3, 4, 5.0]])
    labels = torch.tensor([0, 5, 4])
    result = evaluate(Given().train(), [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    assert (result.top1, result.correct, result.samples) == (pytest.approx(100 / 3), 1, 3)
    assert result.top5 == pytest.approx(200 / 3)
    assert result.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32, torch.int64])
def test_labels_are_integers_of_any_width_and_empty_batches_count_nothing(dtype):
    batches = [(torch.eye(3), torch.arange(3).to(dtype)), (torch.zeros(0, 3), torch.zeros(0, dtype=dtype))]
    result = evaluate(Given(), batches)
    assert (result.top1, result.samples) == (100, 3)


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([(torch.zeros(2, 3), torch.tensor([0, 3]))], ValueError, r"labels from 0 to 3 with 3 classes"),
        ([(torch.full((2, 3), torch.nan), torch.tensor([0, 1]))], RuntimeError, "gives NaN"),
        ([(torch.full((2, 3), torch.inf), torch.tensor([0, 1]))], RuntimeError, "gives NaN or inf"),
        ([(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]))], RuntimeError, "gives NaN or inf"),
        ([(torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.long))], ValueError, r"2 integers.* of shape \(2, 1\)"),
        ([(torch.zeros(2, 3), torch.zeros(2))], ValueError, r"2 integers.* given torch.float32"),
        (
            [(torch.zeros(2, 3), torch.zeros(2, dtype=torch.complex64))],
            ValueError,
            r"2 integers.* given torch.complex64",
        ),
        ([], ValueError, "no batch"),
        ([torch.zeros(2, 3)], ValueError, "need logits"),
        (5, ValueError, "a loader of type int: give batches, as a list or a DataLoader"),
    ],
)
def test_errors(batches, error, message):
    with pytest.raises(error, match=message):
        evaluate(Given(), batches)


def test_classes_may_be_masked():
    assert evaluate(Given(), [(torch.tensor([[0.0, -torch.inf]]), torch.tensor([0]))]).loss == 0


class Seen(nn.Module):
    """A linear classifier after a convolution, by `flatten`, or by `view`, which takes images channels first alone."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.conv, self.fc, self.view = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 36, 5), view
        self.channels_last: list[bool] = []

    def forward(self, x):
        features = self.conv(x)
        logits = self.fc(features.view(len(x), -1) if self.view else features.flatten(1))
        self.channels_last.append(x.is_contiguous(memory_format=torch.channels_last))
        return logits


def test_images_go_channels_last_where_the_model_takes_them_so():
    torch.manual_seed(0)
    models = flatten, view = Seen(False), Seen(True)
    view.load_state_dict(flatten.state_dict())
    batches = [(torch.randn(4, 3, 6, 6), torch.arange(4)) for _ in range(3)]
    first, second = (evaluate(model, batches) for model in models)
    assert (flatten.channels_last, view.channels_last) == ([True] * 3, [False] * 3)
    assert (first.loss, first.correct) == (pytest.approx(second.loss, rel=1e-6), second.correct)
    assert not batches[0][0].is_contiguous(memory_format=torch.channels_last)


def test_what_a_model_says_of_its_inputs_comes_out():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        evaluate(nn.Linear(3, 2), [(torch.zeros(2, 4), torch.zeros(2, dtype=torch.long))])


def test_what_a_model_counts_while_it_is_compared_is_put_back():
    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(4, 3)
            self.register_buffer("seen", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.seen += len(x)
            self.last = super().forward(x)
            return self.last

    model, x = Counting(), torch.randn(6, 4)
    latency({"it": model}, x, seconds=0.01)
    latency_by_module(nn.Sequential(model), ["0"], x, seconds=0.01)
    compare(model, copy.deepcopy(model), x, [(x, torch.arange(6) % 3)])
    assert model.seen == 0
    assert model.last is None


def test_of_equal_logits_the_first_is_the_answer():
    logits = torch.randint(3, (500, 10), generator=torch.Generator().manual_seed(0)).float()
    result = evaluate(nn.Identity(), [(logits, logits.argmax(1))])
    assert (result.top1, result.top5, result.correct) == (100, 100, 500)
