"""The budget's choice equals brute force."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modprune.budget import Budget, Candidate, choose
from tests.oracles import best_set

scores = st.one_of(st.floats(-1, 1, allow_nan=False), st.integers(-2, 2).map(lambda n: n / 4))
costs = st.lists(st.tuples(scores, st.integers(0, 6), st.sampled_from([1, 5, 9])), min_size=1, max_size=9)
fractions = st.one_of(st.none(), st.floats(0.05, 0.9))


@settings(max_examples=150, deadline=None)
@given(costs, fractions, fractions, st.one_of(st.none(), st.integers(1, 5)))
def test_choice_equals_brute_force(rows, flops, params, blocks):
    if flops is None and params is None and blocks is None:
        flops = 0.5
    candidates = [Candidate(str(i), *row) for i, row in enumerate(rows)]
    macs, count = sum(c.macs for c in candidates) + 3, sum(c.params for c in candidates) + 3
    budget = Budget(flops, params, blocks)
    expected = best_set(candidates, budget, macs, count)
    if expected is None:
        with pytest.raises(ValueError, match=r"cannot be met|only \d+ blocks|no \d+ blocks free"):
            choose(candidates, budget, macs, count)
    else:
        assert choose(candidates, budget, macs, count) == expected


def test_the_order_in_which_candidates_come_does_not_choose():
    forward = [Candidate(str(i), 0.1 * (i % 3), 10, 10 + i % 2) for i in range(10)]
    chosen = set(choose(forward, Budget(flops=0.4), 120, 200))
    scores = sorted(c.score for c in forward if c.name in chosen)
    assert scores == sorted(c.score for c in forward)[: len(chosen)]


def test_many_blocks_take_no_time():
    candidates = [Candidate(str(i), (i * 37 % 101) / 100, 10**6 + i * 7919, 10**5 + i * 104729) for i in range(40)]
    started = time.perf_counter()
    choose(candidates, Budget(0.5, 0.4), sum(c.macs for c in candidates), sum(c.params for c in candidates))
    assert time.perf_counter() - started < 5


def test_the_error_says_the_most_that_can_be_had():
    with pytest.raises(ValueError, match=r"flops=0.9 cannot be met: all 2 blocks that can go free 40.0% of the MACs"):
        choose([Candidate("a", 0, 20, 1), Candidate("b", 0, 20, 1)], Budget(flops=0.9), 100, 10)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan")])
def test_fractions_lie_between_0_and_1(value):
    with pytest.raises(ValueError, match="a fraction between 0 and 1"):
        Budget(flops=value)


def test_a_score_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="score of b"):
        choose([Candidate("a", 0, 1, 1), Candidate("b", float("nan"), 1, 1)], Budget(blocks=1), 10, 10)
