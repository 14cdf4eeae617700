"""Q against networkx, and the laws it obeys."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import modprune.graph
from modprune.graph import _whole_float32, feature_graph, feature_graph_from_gram, graph_modularity, modularity
from tests.oracles import loop_knn, networkx_q


def data(seed: int, samples: int, columns: int, kind: str = "signed") -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, columns, generator=generator)
    if kind == "relu":
        return features.relu()
    if kind == "ties":
        return features.sign()
    if kind == "zeros":
        features[::3] = 0
    return features


def some_labels(seed: int, samples: int, classes: int) -> torch.Tensor:
    return torch.randint(classes, (samples,), generator=torch.Generator().manual_seed(seed + 1))


sizes = st.tuples(st.integers(0, 10**6), st.integers(4, 40), st.integers(1, 12), st.integers(1, 7))
kinds = st.sampled_from(["signed", "relu", "ties", "zeros"])


@settings(max_examples=80, deadline=None)
@given(sizes, kinds, st.integers(1, 3))
def test_q_equals_networkx(size, kind, k):
    seed, samples, columns, classes = size
    features, labels = data(seed, samples, columns, kind), some_labels(seed, samples, classes)
    graph = feature_graph(features, k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = modularity(features, labels, k)
    expected = networkx_q(graph, labels) if graph.weights.sum() > 0 else 0.0
    assert q == pytest.approx(expected, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(1, 4), st.sampled_from([1, 2, 5]), st.booleans())
def test_the_largest_by_runs_are_those_of_topk(seed, columns, k, run, ties):
    k = min(k, columns)
    rows = data(seed, 6, columns, "ties" if ties else "signed")
    rows.diagonal().fill_(-torch.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modprune.graph, "RUN", run)
        values, where = modprune.graph._largest(rows, k)
    expected = rows.topk(k, dim=1)
    assert torch.equal(values, expected.values)
    assert torch.equal(rows.gather(1, where), values)
    assert all(len(set(row)) == k for row in where.tolist())
    assert ties or torch.equal(where, expected.indices)


@settings(max_examples=40, deadline=None)
@given(sizes, st.integers(1, 3))
def test_the_graph_holds_the_largest_cosines(size, k):
    seed, samples, columns, _ = size
    features = data(seed, samples, columns)
    graph = feature_graph(features, k)
    for i, expected in enumerate(loop_knn(features, k)):
        weights = sorted(w for w in graph.weights[i].tolist() if w > 0)
        # Sets of weights: which of two equal neighbours is taken is free, and so is a cosine of 0 within rounding.
        assert weights[-len(expected) :] == pytest.approx(sorted(expected.values()), abs=1e-5)
        assert i not in graph.neighbours[i].tolist()


@pytest.mark.filterwarnings("ignore:the feature graph has no edge")  # four samples may all be unlike
@settings(max_examples=40, deadline=None)
@given(sizes)
def test_q_ignores_order_names_and_scale(size):
    seed, samples, columns, classes = size
    features, labels = data(seed, samples, columns + 4), some_labels(seed, samples, classes)
    generator = torch.Generator().manual_seed(seed)
    q = modularity(features, labels)
    order = torch.randperm(samples, generator=generator)
    assert modularity(features[order], labels[order]) == pytest.approx(q, abs=1e-5)
    assert modularity(features, 100 - 7 * labels) == pytest.approx(q, abs=1e-12)
    powers = 2.0 ** torch.randint(-20, 20, (samples, 1), generator=generator)
    assert modularity(features * powers, labels) == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_scales_that_overflow_float32_squares_do_not_matter(scale):
    features, labels = data(3, 30, 8), some_labels(3, 30, 3)
    assert modularity(features * scale, labels) == pytest.approx(modularity(features, labels), abs=1e-6)


def test_one_class_is_zero_and_two_cliques_are_a_half():
    features = data(0, 20, 5)
    assert modularity(features, torch.zeros(20, dtype=torch.long)) == pytest.approx(0, abs=1e-12)
    cliques = torch.eye(2).repeat_interleave(5, 0)
    assert modularity(cliques, torch.arange(2).repeat_interleave(5), k=3) == pytest.approx(0.5, abs=1e-6)


def test_no_edge_warns_and_is_zero():
    with pytest.warns(RuntimeWarning, match="no edge"):
        assert modularity(torch.eye(4), torch.tensor([0, 0, 1, 1]), k=1) == 0


def test_row_blocks_gram_layouts_and_types_agree(monkeypatch):
    features, labels = data(1, 300, 24, "relu").view(300, 6, 2, 2), some_labels(1, 300, 4)
    q = modularity(features, labels)
    rows = features.flatten(1)
    assert graph_modularity(feature_graph_from_gram(rows @ rows.T), labels) == pytest.approx(q, abs=1e-6)
    channels_last = features.contiguous(memory_format=torch.channels_last)
    assert modularity(channels_last, labels) == pytest.approx(q, abs=1e-6)
    assert modularity(rows.T.contiguous().T, labels) == pytest.approx(q, abs=1e-6)
    assert modularity(features.double(), labels) == pytest.approx(q, abs=1e-6)
    assert modularity(features.half(), labels) == pytest.approx(modularity(features.half().float(), labels), abs=1e-6)
    assert modularity(features, labels, 3.0) == modularity(features, labels, np.int64(3)) == q
    monkeypatch.setattr(modprune.graph, "BLOCK", 300 * 7)
    assert modularity(features, labels) == pytest.approx(q, abs=1e-6)
    monkeypatch.setattr(modprune.graph, "A_COLUMN", 300)
    assert modularity(features, labels) == pytest.approx(q, abs=1e-6)


@pytest.mark.parametrize(
    ("features", "labels", "k", "message"),
    [
        (torch.ones(4, 2), torch.zeros(4).long(), 4, "k=4 with 4 samples"),
        (torch.ones(4, 2), torch.zeros(4).long(), 0, "k=0"),
        (torch.ones(4, 2), torch.zeros(4).long(), 2.5, "k=2.5 with 4 samples: k is an integer"),
        (torch.ones(4, 2), torch.zeros(4).long(), "3", "k='3' with 4 samples: k is an integer"),
        (torch.ones(4, 2), torch.zeros(4).long(), None, "k=None with 4 samples: k is an integer"),
        (np.ones((4, 2)), torch.zeros(4).long(), 1, "features in a ndarray: a tensor is needed"),
        (None, torch.zeros(4).long(), 1, "features in a NoneType: a tensor is needed"),
        (torch.ones(()), torch.zeros(4).long(), 1, r"features of shape \(\) and type"),
        (torch.ones(4, 2), torch.zeros(3).long(), 1, "one label each"),
        (torch.ones(4, 2), torch.zeros(4), 1, "integers"),
        (torch.ones(4, 2), [0, 0, 1, 1], 1, "labels in a list: a tensor is needed"),
        (torch.ones(4, 2).long(), torch.zeros(4).long(), 1, "floating point"),
        (torch.ones(4, 0), torch.zeros(4).long(), 1, "at least one value"),
        (torch.tensor([[1.0], [torch.nan], [1.0]]), torch.zeros(3).long(), 1, "sample 1 hold NaN"),
        (torch.tensor([[1.0], [1.0], [torch.inf]]), torch.zeros(3).long(), 1, "sample 2 hold NaN or inf"),
    ],
)
def test_errors_name_what_is_wrong(features, labels, k, message):
    with pytest.raises(ValueError, match=message):
        modularity(features, labels, k)


def test_k_is_a_whole_number_of_any_kind():
    features, labels = torch.randn(20, 4), torch.arange(20) % 2
    expected = modularity(features, labels, 3)
    assert all(modularity(features, labels, k) == expected for k in (3.0, np.int64(3), np.array(3), torch.tensor(3)))


def test_autocast_does_not_coarsen_the_cosines():
    features, labels = data(0, 300, 64, "relu").T.contiguous().T, some_labels(0, 300, 4)
    assert not features.is_contiguous()  # others go by kernels that autocast does not know
    plain = modularity(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert (features @ features.T).dtype == torch.bfloat16
        assert modularity(features, labels) == plain


def test_nor_does_tf32_and_it_stays_chosen():
    matmul = torch.backends.cuda.matmul
    name = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    before = getattr(matmul, name)
    torch.set_float32_matmul_precision("high")
    try:
        chosen = getattr(matmul, name)
        with _whole_float32("cuda"):
            assert getattr(matmul, name) in ("ieee", False)
        assert getattr(matmul, name) == chosen != before
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_another_default_type_changes_nothing():
    features, labels = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)), torch.arange(80) % 4
    expected = modularity(features, labels)
    torch.set_default_dtype(torch.float16)
    try:
        assert modularity(features, labels) == expected
    finally:
        torch.set_default_dtype(torch.float32)
