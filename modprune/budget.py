"""The exact choice: which blocks to remove so that the least score is lost and every budget is met."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from numbers import Integral, Real

# A float stands for the fraction it was meant as: 0.1 lies a little above 1/10, which would cost a whole block more.
_ROUNDING = Fraction(1, 10**12)


@dataclass(frozen=True)
class Candidate:
    """A block that may go: what is lost if it goes (`score`, any unit) and what it frees."""

    name: str
    score: float
    macs: int
    params: int
    nanoseconds: int = 0


def check_fraction(name: str, value: object) -> None:
    """Raises ValueError unless the argument of that name is None or a fraction between 0 and 1."""
    if value is not None and not (isinstance(value, Real) and 0 < float(value) < 1):
        raise ValueError(f"{name}={value!r}: a fraction between 0 and 1 is needed, such as 0.6 for 60 %")


@dataclass(frozen=True)
class Budget:
    """What must go, at least: fractions between 0 and 1 of the whole model's MACs (`flops`) or of its time (`latency`),
    and of its parameters (`params`), and exactly how many `blocks`. At least one of the four is given.

    >>> Budget(flops=1.2)
    Traceback (most recent call last):
    ValueError: flops=1.2: a fraction between 0 and 1 is needed, such as 0.6 for 60 %
    """

    flops: float | None = None
    params: float | None = None
    blocks: int | None = None
    latency: float | None = None

    def __post_init__(self) -> None:
        for name in ("flops", "params", "latency"):
            check_fraction(name, getattr(self, name))
        if self.blocks is not None and not (isinstance(self.blocks, Integral) and self.blocks >= 1):
            raise ValueError(f"blocks={self.blocks!r}: a whole number of at least 1 is needed")
        if self.flops is None and self.params is None and self.blocks is None and self.latency is None:
            raise ValueError("no budget: give flops=, latency=, params= or blocks=, how much must go")
        if self.flops is not None and self.latency is not None:
            raise ValueError(f"flops={self.flops} and latency={self.latency}: give one of the two")

    def left(self, share: float, freed: Mapping[str, float], gone: int) -> dict[str, float]:
        """What of `share` of the budget is still to be met after `gone` blocks that freed these fractions.

        Empty if nothing is, or if no block may go at this stage, whatever fractions are still to be met.
        """
        due = round((self.blocks or 0) * share)
        share = due / self.blocks if self.blocks else share  # of the fractions, what so many blocks stand for
        asked = {name: getattr(self, name) for name in ("flops", "params", "latency")}
        missing = {name: value * share - freed[name] for name, value in asked.items() if value is not None}
        left = {name: fraction for name, fraction in missing.items() if fraction > 1e-12}
        if self.blocks is None:
            return left
        return {**left, "blocks": due - gone} if due > gone else {}


# A choice among the groups looked at so far: summed score, MACs and parameters freed, and minus the sum of 2**position,
# so that choices sort from best to worst, the deeper blocks first where all else is equal.
_State = tuple[int, int, int, int]


def choose(
    candidates: Sequence[Candidate], budget: Budget, total_macs: int, total_params: int, total_nanoseconds: int = 0
) -> tuple[str, ...]:
    """Names, in the given order, of the set with the smallest summed score that meets the budget.

    Exact, by dynamic programming over groups of equal cost with dominated choices dropped; scores are summed as
    integers of one unit, so no rounding decides. Equal scores are broken by the least cost freed beyond need (MACs,
    or time where that is the budget, then parameters), then the deeper blocks go. A block with a negative score
    improves the sum: it goes even where the budget is met without it.

    Args:
        candidates: in forward order.
        budget: what must go.
        total_macs, total_params, total_nanoseconds: of the whole model, what the fractions refer to.

    Raises:
        ValueError: if a score is not finite, or no set can meet the budget; says the most that can be had.
    """
    bad = [c.name for c in candidates if not math.isfinite(c.score)]
    if bad:
        raise ValueError(f"the score of {bad[0]} is not a finite number: check the criterion")
    if budget.latency is not None:  # it takes the place of the MACs
        candidates, total_macs = [replace(c, macs=c.nanoseconds) for c in candidates], total_nanoseconds
    need = _needed(budget.flops or budget.latency, total_macs), _needed(budget.params, total_params)
    _check_reachable(candidates, budget, need, total_macs, total_params)
    scores = _integers([c.score for c in candidates])
    groups = [_prefixes(group, candidates, scores) for group in _groups(candidates)]
    most = [group[-1] for group in groups]
    states: list[_State] = [(0, 0, 0, 0)]
    for i, group in enumerate(groups):
        # Less than this cannot be made good by the groups still to come.
        least = need[0] - sum(m[1] for m in most[i + 1 :]), need[1] - sum(m[2] for m in most[i + 1 :])
        grown = [
            (state[0] + more[0], state[1] + more[1], state[2] + more[2], state[3] + more[3])
            for state in states
            for more in group
            if state[1] + more[1] >= least[0] and state[2] + more[2] >= least[1]
        ]
        states = _undominated(grown, need, budget.blocks)
    met = [state for state in states if budget.blocks in (None, state[3].bit_count())]
    if not met:
        raise ValueError(_too_few(candidates, budget, total_macs, total_params))
    chosen = -min(met)[3]
    return tuple(c.name for i, c in enumerate(candidates) if chosen >> i & 1)


def choose_part(
    candidates: Sequence[Candidate],
    rest: Budget,
    part: Budget,
    total_macs: int,
    total_params: int,
    total_nanoseconds: int = 0,
) -> tuple[str, ...]:
    """Names of those among what `choose` takes for the rest of a budget that meet a part of it, by the same measure.

    What is taken for a part alone may leave the rest unmet.
    """
    totals = total_macs, total_params, total_nanoseconds
    names = choose(candidates, rest, *totals)
    among = [candidate for candidate in candidates if candidate.name in names]
    try:
        return choose(among, part, *totals)
    except ValueError:  # no so many blocks of these meet their part of the fractions, which then wait
        return choose(among, Budget(blocks=part.blocks), *totals)


def _needed(fraction: float | None, total: int) -> int:
    return 0 if fraction is None else math.ceil((Fraction(float(fraction)) - _ROUNDING) * total)


def _groups(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Positions by equal cost, within a group in the order in which they go: inside it only a prefix can be best."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, c in enumerate(candidates):
        groups.setdefault((c.macs, c.params), []).append(i)
    return [sorted(group, key=lambda i: (candidates[i].score, -i)) for group in groups.values()]


def _integers(scores: Sequence[float]) -> list[int]:
    """The scores in the largest unit that all are whole multiples of."""
    exact = [Fraction(float(score)) for score in scores]
    unit = math.lcm(*(score.denominator for score in exact))
    return [int(score * unit) for score in exact]


def _prefixes(group: list[int], candidates: Sequence[Candidate], scores: Sequence[int]) -> list[_State]:
    """What removing the first 0, 1, 2, ... blocks of a group comes to."""
    sums: list[_State] = [(0, 0, 0, 0)]
    for i in group:
        score, macs, params, mask = sums[-1]
        sums.append((score + scores[i], macs + candidates[i].macs, params + candidates[i].params, mask - (1 << i)))
    return sums


def _undominated(states: list[_State], need: tuple[int, int], blocks: int | None) -> list[_State]:
    """Without choices that a better one matches in what they free, as far as that is needed.

    Of each number of blocks, if that counts, the front of what is freed is kept as two lists: MACs rise, parameters
    fall.
    """
    kept: list[_State] = []
    fronts: dict[int, tuple[list[int], list[int]]] = {}
    for state in sorted(states):
        count = 0 if blocks is None else state[3].bit_count()
        if blocks is not None and count > blocks:
            continue
        macs, params = min(state[1], need[0]), min(state[2], need[1])
        all_macs, all_params = fronts.setdefault(count, ([], []))
        end = bisect_left(all_macs, macs)
        if end < len(all_macs) and all_params[end] >= params:
            continue
        start = end
        while start > 0 and all_params[start - 1] <= params:
            start -= 1
        end += end < len(all_macs) and all_macs[end] == macs
        all_macs[start:end], all_params[start:end] = [macs], [params]
        kept.append(state)
    return kept


def _check_reachable(
    candidates: Sequence[Candidate], budget: Budget, need: tuple[int, int], total_macs: int, total_params: int
) -> None:
    if budget.blocks is not None and budget.blocks > len(candidates):
        raise ValueError(f"blocks={budget.blocks}: only {len(candidates)} blocks can go: ask for fewer")
    macs, params = sum(c.macs for c in candidates), sum(c.params for c in candidates)
    if macs < need[0] or params < need[1]:
        raise ValueError(
            f"{_wanted(budget)} cannot be met: removing all {len(candidates)} removable blocks frees only "
            f"{_most(budget, macs / max(total_macs, 1), params / max(total_params, 1))}: ask for less"
        )


def _too_few(candidates: Sequence[Candidate], budget: Budget, total_macs: int, total_params: int) -> str:
    count = budget.blocks or 0
    macs = sum(sorted(c.macs for c in candidates)[-count:])
    params = sum(sorted(c.params for c in candidates)[-count:])
    so_many = f"{count} blocks together meet" if count > 1 else "single block meets"
    return (
        f"no {so_many} {_wanted(budget)}: so many free at most "
        f"{_most(budget, macs / max(total_macs, 1), params / max(total_params, 1), 'or')}; "
        "ask for more blocks or smaller fractions"
    )


def _most(budget: Budget, first: float, params: float, both: str = "and") -> str:
    return f"{first:.1%} of the {'MACs' if budget.latency is None else 'time'} {both} {params:.1%} of the parameters"


def _wanted(budget: Budget) -> str:
    given = {"flops": budget.flops, "latency": budget.latency, "params": budget.params}
    return " and ".join(f"{name}={value}" for name, value in given.items() if value is not None)
