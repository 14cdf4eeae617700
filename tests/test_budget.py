"""The budget's choice equals brute force."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modprune.budget import Budget, Candidate, choose, choose_part
from tests.oracles import best_set

scores = st.one_of(st.floats(-1, 1, allow_nan=False), st.integers(-2, 2).map(lambda n: n / 4))
costs = st.lists(st.tuples(scores, st.integers(0, 6), st.sampled_from([1, 5, 9])), min_size=1, max_size=9)
fractions = st.one_of(st.none(), st.integers(3, 58).map(lambda n: n / 64))  # exact in binary, as the oracle needs


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
        with pytest.raises(ValueError, match=r"cannot be met|only \d+ blocks|no \d+ blocks together|no single"):
            choose(candidates, budget, macs, count)
    else:
        assert choose(candidates, budget, macs, count) == expected


@settings(max_examples=150, deadline=None)
@given(costs, fractions, fractions, st.one_of(st.none(), st.integers(1, 5)), st.lists(st.floats(0.1, 0.9), max_size=3))
def test_stages_by_one_measure_come_to_the_choice_at_once(rows, flops, params, blocks, shares):
    if flops is None and params is None and blocks is None:
        flops = 0.5
    candidates = [Candidate(str(i), *row) for i, row in enumerate(rows)]
    macs, count = sum(c.macs for c in candidates) + 3, sum(c.params for c in candidates) + 3
    budget = Budget(flops, params, blocks)
    if (expected := best_set(candidates, budget, macs, count)) is None:
        return
    gone: list[Candidate] = []
    for share in (*sorted(shares), 1):
        freed = {"flops": sum(c.macs for c in gone) / macs, "params": sum(c.params for c in gone) / count}
        left = [c for c in candidates if c not in gone]
        part, rest = (budget.left(by, freed, len(gone)) for by in (share, 1))
        names = choose_part(left, Budget(**rest), Budget(**part), macs, count) if part else ()
        gone += [c for c in left if c.name in names]
    assert sum(c.score for c in gone) <= sum(c.score for c in candidates if c.name in expected) + 1e-9
    assert (
        budget.left(
            1, {"flops": sum(c.macs for c in gone) / macs, "params": sum(c.params for c in gone) / count}, len(gone)
        )
        == {}
    )


def test_a_part_is_taken_from_what_goes_in_the_end():
    candidates = [Candidate("a", 0.1, 1, 1), Candidate("b", 0.5, 10, 1), Candidate("c", 0.3, 2, 10)]
    assert choose_part(candidates, Budget(flops=0.5), Budget(flops=0.05), 20, 20) == ("b",)  # a alone would do for now
    rest, part = Budget(flops=0.5, params=0.5, blocks=2), Budget(flops=0.25, params=0.25, blocks=1)
    assert choose_part(candidates, rest, part, 20, 20) == ("c",)  # neither frees a half of both


def test_time_takes_the_place_of_macs():
    candidates = [Candidate(str(i), i, 10, 10, nanoseconds=5 * (i + 1)) for i in range(4)]
    assert choose(candidates, Budget(latency=0.3), 100, 100, 100) == ("0", "1", "2")
    assert choose(candidates, Budget(latency=0.3, blocks=2), 100, 100, 100) == ("1", "3")
    with pytest.raises(ValueError, match=r"latency=0.6 cannot be met: .* 50.0% of the time and 40.0% of the param"):
        choose(candidates, Budget(latency=0.6), 100, 100, 100)
    with pytest.raises(ValueError, match=r"flops=0.5 and latency=0.5: give one of the two"):
        Budget(flops=0.5, latency=0.5)


def test_the_order_in_which_candidates_come_does_not_choose():
    forward = [Candidate(str(i), 0.1 * (i % 3), 10, 10 + i % 2) for i in range(10)]
    chosen = set(choose(forward, Budget(flops=0.4), 120, 200))
    scores = sorted(c.score for c in forward if c.name in chosen)
    assert scores == sorted(c.score for c in forward)[: len(chosen)]


@pytest.mark.parametrize("tenths", range(1, 10))
@pytest.mark.parametrize("ask", [lambda n: n / 10, lambda n: 1 - (10 - n) / 10, lambda n: sum([0.1] * n)])
def test_a_fraction_means_its_decimal(tenths, ask):
    """0.1 is a little over 1/10 as a float, and 1 - 0.3 a little under 0.7: neither changes how many blocks go."""
    candidates = [Candidate(str(i), i, 10, 10) for i in range(10)]
    assert choose(candidates, Budget(flops=ask(tenths)), 100, 100) == tuple(str(i) for i in range(tenths))


@pytest.mark.parametrize("budget", [Budget(0.6, 0.43), Budget(0.5, 0.2, blocks=132)])
def test_a_network_of_198_blocks_takes_no_time(budget):
    costs = [(4_718_592, 4_672), (4_718_592, 18_560), (4_718_592, 73_984)]
    candidates = [Candidate(str(i), (i * 37 % 199) / 7, *costs[i // 66]) for i in range(198)]
    started = time.perf_counter()
    chosen = choose(candidates, budget, 198 * 4_718_592 + 10**7, 66 * (4_672 + 18_560 + 73_984) + 10**5)
    assert time.perf_counter() - started < 2
    assert budget.blocks in (None, len(chosen))


def test_many_blocks_take_no_time():
    candidates = [Candidate(str(i), (i * 37 % 101) / 100, 10**6 + i * 7919, 10**5 + i * 104729) for i in range(40)]
    started = time.perf_counter()
    choose(candidates, Budget(0.5, 0.4), sum(c.macs for c in candidates), sum(c.params for c in candidates))
    assert time.perf_counter() - started < 5


def test_the_error_says_the_most_that_can_be_had():
    with pytest.raises(ValueError, match=r"flops=0.9 cannot be met: .* 2 removable blocks frees only 40.0% of the M"):
        choose([Candidate("a", 0, 20, 1), Candidate("b", 0, 20, 1)], Budget(flops=0.9), 100, 10)


def test_too_few_blocks_says_the_most_that_so_many_free():
    candidates = [Candidate("a", 0, 20, 1), Candidate("b", 0, 10, 2), Candidate("c", 0, 5, 3)]
    with pytest.raises(ValueError, match=r"so many free at most 30.0% of the MACs or 50.0% of the parameters"):
        choose(candidates, Budget(flops=0.34, blocks=2), 100, 10)


@pytest.mark.parametrize("blocks", [0, 2.5, "3"])
def test_blocks_are_a_whole_number(blocks):
    with pytest.raises(ValueError, match="a whole number of at least 1"):
        Budget(blocks=blocks)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, float("nan"), "0.6"])
def test_fractions_lie_between_0_and_1(value):
    with pytest.raises(ValueError, match="a fraction between 0 and 1"):
        Budget(flops=value)


def test_a_score_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="score of b"):
        choose([Candidate("a", 0, 1, 1), Candidate("b", float("nan"), 1, 1)], Budget(blocks=1), 10, 10)


@pytest.mark.parametrize("share", [0.2, 0.25, 1 / 3, 0.5, 0.6, 2 / 3])
def test_as_many_blocks_go_at_a_stage_as_its_fraction_needs(share):
    equal = [Candidate(f"b{i}", i, 10, 10) for i in range(6)]
    left = Budget(flops=0.79, blocks=5).left(share, {"flops": 0.0}, 0)
    assert len(choose(equal, Budget(**left), 60, 60)) == left["blocks"] < 5


def test_a_tiny_fraction_takes_a_block():
    left = Budget(flops=1e-9).left(1, {"flops": 0.0}, 0)
    assert choose([Candidate("a", 1.0, 1, 1)], Budget(**left), 100, 100) == ("a",)


def test_the_most_of_each_kind_is_not_said_of_one_set():
    with pytest.raises(ValueError, match=r"free at most 50.0% of the MACs or 50.0% of the parameters"):
        choose([Candidate("a", 0, 50, 10), Candidate("b", 0, 10, 50)], Budget(0.4, 0.4, 1), 100, 100)
