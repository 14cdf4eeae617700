"""Residual blocks, as the autograd graph of one forward pass shows them: their kind, what stays, why some cannot go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn
from torch.utils._pytree import tree_leaves

from modprune._autograd import (
    FACTORS,
    LAYOUT,
    LINEAR,
    SUMS,
    Edge,
    between,
    identity_path,
    is_any,
    is_parameter,
    last_sum,
    operands,
    parameters,
)
from modprune._calls import Call, may_be_block
from modprune._probe import is_own_norm, shortcut_flops
from modprune._trace import MARK, shortcut_parameters


class Shortcut(NamedTuple):
    """What stays of a transition: its parameters, by id, and its floating-point operations; of other kinds nothing."""

    parameters: frozenset[int] = frozenset()
    flops: int = 0


# The kind of a block, and what of it stays.
Found = dict[str, tuple[str, Shortcut]]


def residual_blocks(
    calls: dict[str, Call], uses: dict[Any, set[Any]], held: dict[nn.Module, str]
) -> tuple[Found, dict[str, str]]:
    """Residual blocks in forward order, and names of candidates refused with the reason."""
    found: Found = {}
    refused: dict[str, str] = {}
    kinds: dict[str, str] = {}
    norms = {seen.end: seen.start for seen in calls.values() if seen.end and is_own_norm(seen)}
    for name in sorted(calls, key=lambda name: name.count("."), reverse=True):
        seen, kind = calls[name], _kind(calls[name], norms)
        if not kind:
            continue
        kinds[name] = kind
        inside = set(seen.module.modules())
        inner = [other for other in (*found, *refused) if calls[other].module in inside]
        # On the path of an identity there are no transitions: those inside it are parts of its branch.
        rivals = [calls[other] for other in inner if kind != "identity" or kinds[other] == "identity"]
        if not _is_more_than(seen, kind, [call for call in rivals if not _is_sum_of(call, seen)], norms):
            continue
        try:
            if reason := obstacle(seen, uses, held):
                raise ValueError(reason)
            kept = _stays(seen) if kind == "transition" else Shortcut()
        except ValueError as error:
            if not inner:
                refused[name] = str(error)
            continue
        found = {n: found[n] for n in found if n not in inner}
        refused = {n: refused[n] for n in refused if n not in inner}
        found[name] = kind, kept
    return {name: found[name] for name in calls if name in found}, refused


def _stays(seen: Call) -> Shortcut:
    """What stays of a transition; ValueError if its shortcut cannot be parted from the branch."""
    kept = shortcut_parameters(seen.module)
    if kept >= seen.own.keys():
        raise ValueError("its branch has no parameters of its own")
    return Shortcut(frozenset(kept), shortcut_flops(seen))


def _kind(seen: Call, norms: Mapping[Edge, Edge]) -> str:
    """What kind of block a call looks like by its autograd graph; empty if it is no residual block."""
    if seen.end is None or seen.end[0] is seen.start[0] or not may_be_block(seen.module):
        return ""
    path = identity_path(seen.end, seen.start, norms) if seen.shape == seen.x.shape else ""
    if path == "branch" or (path == "other" and _is_fed(seen)):
        return "identity"
    whole = last_sum(seen.end)
    total = last_sum(seen.end, FACTORS) if whole is None else whole
    sides = [] if total is None else [between(operand, seen.start) for operand in operands(total)]
    if not sides or any(seen.start[0] not in side for side in sides):
        return ""
    one, other = ({id(parameter) for parameter in parameters(side)} for side in sides)
    # What is scaled may be a mean of two heads, unless one side of it has nothing that is learned.
    return "transition" if one != other and (whole is not None or not one or not other) else ""


def _is_more_than(outer: Call, kind: str, inner: Sequence[Call], norms: Mapping[Edge, Edge]) -> bool:
    """Whether a block with blocks in it is one of its own: it adds something itself, and a quarter of its parameters.

    A stage adds nothing to its blocks. A layer of BERT adds an MLP to its attention, the one block in it. A linear sum
    inside a transition is a layer with an adapter beside it, and counts as what the transition adds itself.
    """
    if not inner:
        return True
    assert outer.end is not None
    inside: set[Any] = set()
    size = 0
    for call in inner:
        assert call.end is not None
        own = between(call.end[0], call.start) - {call.start[0]}
        inside |= own
        if kind != "transition" or not all(is_any(node, LINEAR + SUMS + LAYOUT) or is_parameter(node) for node in own):
            size += sum(call.own.values())
    if kind == "transition":
        adds = last_sum(outer.end, FACTORS) not in inside
    else:
        adds = identity_path(outer.end, outer.start, norms, without=inside) == "branch"
    return adds and 3 * sum(outer.own.values()) >= 4 * size


def _is_sum_of(inner: Call, outer: Call) -> bool:
    """Whether the inner one is what the outer ends with: it is given the outer's input, and its branch beside it."""
    return inner.start == outer.start and inner.end == outer.end and _is_fed(inner)


def obstacle(seen: Call, uses: dict[Any, set[Any]], held: dict[nn.Module, str]) -> str:
    """Why the block cannot go though it has the right shape; empty if it can."""
    if seen.times > 1:
        return f"called {seen.times} times in one forward pass"
    if seen.form:
        return f"it gives back a {seen.form}, neither a tensor nor a tuple"
    if seen.unclear:
        return "a number that it gives back is equal to more than one argument: give example inputs that differ in them"
    if _is_fed(seen):
        return "another layer feeds into it"
    if any(getattr(inner, MARK, "") for inner in seen.module.modules()):
        return "blocks inside it have been removed"
    if seen.module in held:
        return f"the list {held[seen.module]} holds it too, where nothing can take its place: use nn.ModuleList"
    assert seen.end is not None
    inside = between(seen.end[0], seen.start)
    if any(uses.get(node, set()) - inside for node, _ in seen.others):
        return "a second value that it gives back is used"
    given = [node for node, output in seen.given if (node, output) != seen.start]
    hidden = inside.difference({seen.start[0], seen.end[0]}, *(between(node, seen.start) for node in given))
    if any(uses.get(node, set()) - inside for node in hidden if not hasattr(node, "variable")):
        return "a value from inside it is used outside"
    return ""


def _is_fed(seen: Call) -> bool:
    """Whether parameters from outside the block reach its output other than through its input."""
    assert seen.end is not None
    return any(id(parameter) not in seen.own for parameter in parameters(between(seen.end[0], seen.start)))


def held_elsewhere(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that some module also keeps in a list or dict of Python's, where nothing can take their place."""
    held: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute != "_modules" and not isinstance(value, nn.Module):
                inside = [item for item in tree_leaves(value) if isinstance(item, nn.Module)]
                held |= dict.fromkeys(inside, f"{name}.{attribute}".lstrip("."))
    return held


def checkpointed(calls: dict[str, Call], uses: dict[Any, set[Any]]) -> dict[str, str]:
    """Modules that reentrant checkpointing runs without a graph, with the reason why nothing is seen of them."""
    reason = "torch.utils.checkpoint hides what it computes: use_reentrant=False shows it"
    return {
        name: reason
        for name, seen in calls.items()
        if seen.end is None and any(is_any(node, ("CheckpointFunction",)) for node in uses.get(seen.start[0], ()))
    }
