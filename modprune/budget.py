"""The exact choice: which blocks to remove so that the least score is lost and every budget is met."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Candidate:
    """A block that may go: what is lost if it goes (`score`, any unit) and what it frees."""

    name: str
    score: float
    macs: int
    params: int


@dataclass(frozen=True)
class Budget:
    """What must go, at least: fractions of the whole model's MACs (`flops`) and parameters (`params`), both between 0
    and 1, and exactly how many `blocks`. At least one of the three is given.

    >>> Budget(flops=1.2)
    Traceback (most recent call last):
    ValueError: flops=1.2: a fraction between 0 and 1 is needed, such as 0.6 for 60 %
    """

    flops: float | None = None
    params: float | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        for name in ("flops", "params"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name}={value}: a fraction between 0 and 1 is needed, such as 0.6 for 60 %")
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks={self.blocks}: at least 1 is needed")
        if self.flops is None and self.params is None and self.blocks is None:
            raise ValueError("no budget: give flops=, params= or blocks=, how much must go")


@dataclass(frozen=True)
class _State:
    """A choice among the groups looked at so far; `key` orders choices from best to worst."""

    key: tuple[Fraction, int, int, tuple[int, ...]]
    chosen: tuple[int, ...]

    @property
    def freed(self) -> tuple[int, int]:
        return self.key[1], self.key[2]


def choose(candidates: Sequence[Candidate], budget: Budget, total_macs: int, total_params: int) -> tuple[str, ...]:
    """Names, in the given order, of the set with the smallest summed score that meets the budget.

    Exact, by dynamic programming over groups of equal cost with dominated choices dropped; sums are rational, so no
    rounding decides. Equal scores are broken by the least cost freed beyond need (MACs, then parameters), then the
    deeper blocks go. A block with a negative score improves the sum: it goes even where the budget is met without it.

    Args:
        candidates: in forward order.
        budget: what must go.
        total_macs, total_params: of the whole model, what the fractions refer to.

    Raises:
        ValueError: if a score is not finite, or no set can meet the budget; says the most that can be had.
    """
    bad = [c.name for c in candidates if not math.isfinite(c.score)]
    if bad:
        raise ValueError(f"the score of {bad[0]} is not a finite number: check the criterion")
    need = math.ceil(Fraction(budget.flops or 0) * total_macs), math.ceil(Fraction(budget.params or 0) * total_params)
    _check_reachable(candidates, budget, need, total_macs, total_params)
    states = [_State((Fraction(0), 0, 0, ()), ())]
    for group in _groups(candidates):
        prefixes = [group[:n] for n in range(len(group) + 1)]
        states = [_with(state, prefix, candidates) for state in states for prefix in prefixes]
        states = _undominated(states, need, budget)
    met = [s for s in states if s.freed[0] >= need[0] and s.freed[1] >= need[1] and _count_fits(s, budget)]
    if not met:
        raise ValueError(f"no {budget.blocks} blocks free {_wanted(budget)}: ask for more blocks or smaller fractions")
    best = min(met, key=lambda state: state.key)
    return tuple(candidates[i].name for i in sorted(best.chosen))


def _groups(candidates: Sequence[Candidate]) -> list[list[int]]:
    """Positions by equal cost, within a group in the order in which they go: inside it only a prefix can be best."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, c in enumerate(candidates):
        groups.setdefault((c.macs, c.params), []).append(i)
    return [sorted(group, key=lambda i: (candidates[i].score, -i)) for group in groups.values()]


def _with(state: _State, added: list[int], candidates: Sequence[Candidate]) -> _State:
    score, macs, params, _ = state.key
    chosen = (*state.chosen, *added)
    return _State(
        (
            score + sum(Fraction(candidates[i].score) for i in added),
            macs + sum(candidates[i].macs for i in added),
            params + sum(candidates[i].params for i in added),
            tuple(sorted(-i for i in chosen)),
        ),
        chosen,
    )


def _undominated(states: list[_State], need: tuple[int, int], budget: Budget) -> list[_State]:
    """Without choices that another one beats in key and in what it frees, as far as that is still needed."""
    kept: list[_State] = []
    fronts: dict[int, list[tuple[int, int]]] = {}
    for state in sorted(states, key=lambda state: state.key):
        count = len(state.chosen) if budget.blocks is not None else 0
        if budget.blocks is not None and count > budget.blocks:
            continue
        macs, params = min(state.freed[0], need[0]), min(state.freed[1], need[1])
        front = fronts.setdefault(count, [])
        if any(m >= macs and p >= params for m, p in front):
            continue
        front[:] = [(m, p) for m, p in front if m > macs or p > params] + [(macs, params)]
        kept.append(state)
    return kept


def _count_fits(state: _State, budget: Budget) -> bool:
    return len(state.chosen) == budget.blocks if budget.blocks is not None else bool(state.chosen)


def _check_reachable(
    candidates: Sequence[Candidate], budget: Budget, need: tuple[int, int], total_macs: int, total_params: int
) -> None:
    if budget.blocks is not None and budget.blocks > len(candidates):
        raise ValueError(f"blocks={budget.blocks}: only {len(candidates)} blocks can go")
    macs, params = sum(c.macs for c in candidates), sum(c.params for c in candidates)
    if macs < need[0] or params < need[1]:
        raise ValueError(
            f"{_wanted(budget)} cannot be met: all {len(candidates)} blocks that can go free "
            f"{macs / total_macs:.1%} of the MACs and {params / total_params:.1%} of the parameters"
        )


def _wanted(budget: Budget) -> str:
    given = {"flops": budget.flops, "params": budget.params}
    return " and ".join(f"{name}={value}" for name, value in given.items() if value is not None)
