"""Plain units of networks without shortcuts: a convolution that keeps the shape, its norm and its activation."""

from __future__ import annotations

from typing import Any

from torch import nn

from modprune._autograd import ACTIVATIONS, JOINS, between, is_any, is_parameter, operands
from modprune._calls import Call
from modprune._residual import Found, Shortcut
from modprune.bypass import norm_after


def plain_units(model: nn.Module, calls: dict[str, Call], uses: dict[Any, set[Any]]) -> tuple[Found, dict[str, str]]:
    """Plain units: the convolution's output goes to the norm alone, the norm's to an activation alone.

    Those that a shortcut leads around, written in the code of the network itself, are refused with that reason.
    """
    found: Found = {}
    refused: dict[str, str] = {}
    around = _passed_by(uses)
    for name, conv in calls.items():
        norm = calls.get(norm_after(model, name) or "")
        if norm is None or conv.end is None or norm.end is None or norm.start != conv.end:
            continue
        once = conv.times == norm.times == 1 and conv.x.shape == conv.shape == norm.shape
        if once and uses.get(conv.end[0], set()) <= between(norm.end[0], conv.end):
            after = uses.get(norm.end[0], set())
            if len(after) == 1 and all(is_any(node, ACTIVATIONS) for node in after):
                if conv.end[0] in around:
                    refused[name] = "a shortcut leads around it, in no module that gives back shortcut(x) + branch(x)"
                else:
                    found[name] = "plain", Shortcut()
    return found, refused


def _passed_by(uses: dict[Any, set[Any]]) -> set[Any]:
    """The autograd nodes on one side alone of a sum, or the like, of two values made from one that is no parameter.

    Products do not count, which are gates and scales.
    """
    around: set[Any] = set()
    for node in {node for following in uses.values() for node in following if is_any(node, JOINS)}:
        sides = [between(side, (None, 0)) for side in operands(node)]
        if len(sides) == 2 and any(not is_parameter(node) for node in sides[0] & sides[1]):
            around |= sides[0] ^ sides[1]
    return around
