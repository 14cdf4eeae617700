"""Branches: modules whose output the code around them adds to their input, as the loops of transformers do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from modprune._autograd import between, is_sum_of
from modprune._calls import Call, may_be_block
from modprune._residual import Found, Shortcut, obstacle, residual_blocks
from modprune._trace import MARK


def with_branches(
    model: nn.Module, calls: dict[str, Call], uses: dict[Any, set[Any]], held: dict[nn.Module, str]
) -> tuple[Found, dict[str, str]]:
    """`residual_blocks`, and branches whose sums lie in the code around them, where two are alike.

    A module whose code that is looks residual as a whole, but is a stage.
    """
    found, refused = residual_blocks(calls, uses, held)
    blocks = {*found, *refused}
    sums = {(seen.start, seen.end): name for name, seen in reversed(calls.items()) if _is_branch(seen, uses)}
    groups: dict[str, dict[str, str]] = {}
    for name in sums.values():  # of modules with one and the same sum the outermost
        if not any(other.startswith(f"{name}.") for other in (*blocks, *sums.values())):
            stage = max((outer for outer in blocks if f"{name}.".startswith(f"{outer}.")), key=len, default="")
            groups.setdefault(stage, {})[name] = obstacle(calls[name], uses, held)
    groups = {stage: group for stage, group in groups.items() if _are_alike(model, calls, stage, group)}
    if groups.keys() & blocks:
        rest = {name: seen for name, seen in calls.items() if name not in groups}
        return with_branches(model, rest, uses, held)
    for group in groups.values():
        found |= {name: ("branch", Shortcut()) for name, reason in group.items() if not reason}
        refused |= {name: reason for name, reason in group.items() if reason}
    return {name: found[name] for name in calls if name in found}, refused


def _are_alike(model: nn.Module, calls: dict[str, Call], stage: str, group: Mapping[str, str]) -> bool:
    """Whether two of these branches that can go are alike, or one can go where another is gone."""
    free = [calls[name].module for name, reason in group.items() if not reason]
    shapes = Counter(tuple(p.shape for p in module.parameters()) for module in free)
    gone = any(getattr(module, MARK, "") == "branch" for module in model.get_submodule(stage).modules())
    return max(shapes.values(), default=0) > 1 - gone


def _is_branch(seen: Call, uses: dict[Any, set[Any]]) -> bool:
    """Whether what a module gives is made from its input and goes into a sum with that, as it is, and nowhere else."""
    if seen.end is None or seen.shape != seen.x.shape or seen.outputs or not may_be_block(seen.module):
        return False
    after = uses.get(seen.end[0], set())
    if len(after) != 1 or not is_sum_of(next(iter(after)), seen.end, seen.start):
        return False
    return seen.end[0] is not seen.start[0] and seen.start[0] in between(seen.end[0], seen.start)
