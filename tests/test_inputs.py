"""Inputs of every form are counted, taken apart and put together again."""

from __future__ import annotations

from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch.utils._pytree import tree_all, tree_map

from modprune._inputs import batch_size, call, first_sample, join, split_batch, take, to_device

X, MASK = torch.arange(12.0).view(4, 3), torch.arange(4)


@pytest.mark.parametrize(
    "inputs",
    [
        X,
        (X,),
        [X, MASK],
        (X, {"mask": MASK, "scale": torch.tensor(2.0)}, "text", None),
        {"x": X, "pair": (MASK, X)},
        ([torch.ones(3, size, size) for size in (2, 5, 3, 4)],),
    ],
    ids=["tensor", "tuple", "list", "nested", "dict", "detector"],
)
def test_what_is_taken_apart_joins_to_the_same(inputs):
    assert batch_size(inputs) == 4
    joined = join([take(inputs, 0, 1), take(inputs, 1, 3), take(inputs, 3, 4)])
    same = tree_map(lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, inputs, joined)
    assert tree_all(bool, same)


def test_several_sizes_do_not_join():
    with pytest.raises(RuntimeError):
        join([torch.ones(1, 3), torch.ones(1, 4)])


def test_a_batch_is_split_from_its_labels():
    for batch in ((X, [0, 1, 2, 3], "index"), {"x": X, "labels": torch.arange(4)}):
        inputs, labels = split_batch(batch)
        assert torch.equal(labels, torch.arange(4))
        assert torch.equal(inputs["x"] if isinstance(inputs, dict) else inputs, X)
    for batch in (X, [X], {"x": X}):  # a list of one is what a TensorDataset without labels gives
        inputs, labels = split_batch(batch)
        assert labels is None
        assert (inputs["x"] if isinstance(inputs, dict) else inputs) is X
    for batch in ("x", []):
        with pytest.raises(ValueError, match=f"a batch of type {type(batch).__name__} is not understood"):
            split_batch(batch)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_a_loader_without_batches_is_named():
    with pytest.raises(ValueError, match="the loader gives no batch; one that can be read only once"):
        first_sample(iter([]))


def test_inputs_that_are_none_are_named():
    for inputs, kind in ((X.numpy(), "ndarray"), (None, "NoneType"), (torch.tensor(1.0), "Tensor")):
        with pytest.raises(
            ValueError, match=f"inputs of type {kind} hold no tensor with a batch dimension: give a torch"
        ):
            batch_size(inputs)
    with pytest.raises(
        RuntimeError, match=r"fails on .* of a list each item is an arg.*: .* goes as \(\[image, ...\],\)"
    ):
        call(lambda images: images, [X, X])


def test_masks_are_no_samples():
    mask = torch.ones(5, 5)
    part = take((X, mask), 2, 4)
    assert torch.equal(part[0], X[2:4])
    assert torch.equal(join([part, part])[1], mask)


def test_containers_of_every_kind():
    batch = UserDict(x=X, labels=[0, 1, 2, 3])  # as tokenizers give them
    inputs, labels = split_batch(batch)
    assert torch.equal(labels, torch.arange(4))
    assert torch.equal(call(lambda x: x, take(inputs, 1, 2)), X[1:2])
    assert torch.equal(to_device(Pair(X, MASK), torch.device("cpu")).y, MASK)
    assert torch.equal(take(Pair(X, MASK), 1, 2).y, MASK[1:2])
    for targets in (["cat", "dog"], [{"boxes": X}]):
        assert split_batch((X, targets))[1] is None


def test_an_empty_batch_is_no_sample():
    assert first_sample([(X[:0], MASK[:0]), (X, MASK)]).shape == (1, 3)
