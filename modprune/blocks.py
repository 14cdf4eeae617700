"""Which blocks of a network can go, and why the rest cannot.

One forward pass notes what goes in and out of every sub-module; the autograd graph between the two tells whether the
output is `shortcut(x) + branch(x)`. No class name is ever asked for. Lu et al. (ECCV 2022) prune the same blocks, by
a list for each network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex, overload

from torch import nn
from torch.utils._pytree import tree_leaves

from modprune._autograd import (
    ACTIVATIONS,
    FACTORS,
    JOINS,
    LAYOUT,
    LINEAR,
    SUMS,
    Edge,
    between,
    identity_path,
    is_any,
    is_parameter,
    is_sum_of,
    last_sum,
    operands,
    parameters,
    users,
)
from modprune._bare import check_bare, check_filled
from modprune._calls import Call, may_be_block, record_calls
from modprune._hooks import ADDED
from modprune._inputs import batch_size, device_of, to_device
from modprune._probe import is_own_norm, shortcut_flops, without_parameters
from modprune._state import traceable
from modprune._trace import MARK, shortcut_parameters
from modprune.bypass import activation_after, norm_after
from modprune.cost import counted_macs


@dataclass(frozen=True)
class Block:
    """A sub-module whose output is `shortcut(x) + branch(x)`, a branch alone, or a plain unit, as a value.

    Attributes:
        name: qualified name, as in `model.get_submodule(name)`; of a plain unit, that of its convolution.
        kind: "identity" (the shortcut is x: the whole block can go), "transition" (the shortcut changes the shape: the
            branch can go), "branch" (what it gives is added to its input by the code around it, and nothing else) or
            "plain" (convolution, norm and activation that keep the shape).
        params: parameters that go with it; those shared with other layers do not.
        macs: MACs per sample that go with it, see `count_macs`.
        layers: qualified names of the layers that go with it, in the order of `model.named_modules()`.
        end: the layer whose output is the block's: itself; of a plain unit its activation, or norm if that is no layer;
            of a branch, itself after a "+": its output and its input together.
        exact: whether the block with all parameters zero gave its input back bit for bit, the proof that the
            shortcut is the identity; False for other kinds and where an activation follows that alters its input.
        outputs: for each item of the tuple that it gives back, which of its arguments stands in once it is gone, by
            position (of a tuple that comes first, its items count); -1 for None. Empty for a tensor alone.
    """

    name: str
    kind: str
    params: int
    macs: int
    layers: tuple[str, ...]
    end: str
    exact: bool = True
    outputs: tuple[int, ...] = ()


class Blocks(tuple[Block, ...]):
    """Blocks in forward order; `refused` maps the names of candidates that cannot go to the reason."""

    refused: dict[str, str]

    def __new__(cls, blocks: Iterable[Block] = (), refused: dict[str, str] | None = None) -> Blocks:
        self = super().__new__(cls, blocks)
        self.refused = getattr(blocks, "refused", {}) if refused is None else refused
        return self

    @overload
    def __getitem__(self, index: SupportsIndex) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> Blocks: ...

    def __getitem__(self, index: Any) -> Any:
        """A block, or those of a slice, with the same `refused`."""
        found = super().__getitem__(index)
        return Blocks(found, self.refused) if isinstance(index, slice) else found

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(block.name for block in self)

    @property
    def why_no_more(self) -> str:
        """The reason for every candidate that stays, or, without any, that nothing else is one."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        return reasons or (
            "no other module adds to its input (the first tensor it takes) as it is, and no other convolution "
            "above 1x1 with a norm keeps the shape"
        )


def find_blocks(model: nn.Module, example_inputs: Any) -> Blocks:
    """The removable blocks of a model in forward order, with what each costs; empty if it has none.

    Residual blocks; where they lie in one another the inner ones, unless the outer one adds something itself that is
    a quarter of its parameters. Where code adds what modules give to what they were given, as in a loop over layers,
    these modules, if two of them are alike. Plain units where the model has no shortcut at all.

    One forward pass, traced and counted, and one more of every identity block, for the proof that the shortcut is the
    identity; two where there is no shortcut. The model is left as found.

    Args:
        model: any bare module; on any device.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, with batch dimension.

    Raises:
        ValueError: if the model is compiled, wrapped or sharded for several devices, or has no weights (meta device).
        RuntimeError: if the model cannot run on `example_inputs`; one line.

    >>> import torch
    >>> from modprune.models import resnet20
    >>> blocks = find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
    >>> len(blocks), blocks[0].name, blocks[0].kind, blocks[0].params, blocks[3].kind
    (9, 'layer1.0', 'identity', 4672, 'transition')
    """
    check_bare(model)
    check_filled(model)
    with traceable(model):
        inputs = to_device(example_inputs, device_of(model))
        with counted_macs(model, inputs) as macs:
            calls, output = record_calls(model, inputs)
        uses = users(output)
        found, refused = _with_branches(model, calls, uses, _held(model))
        refused |= _checkpointed(calls, uses)
        if not found and not refused:
            calls, output = record_calls(model, inputs, leaves=True)
            found, refused = _plain(model, calls, users(output))
        places = _places(model.modules())
        blocks = []
        for name, (kind, stays) in found.items():
            rest = without_parameters(calls[name]) if kind == "identity" else ""
            if rest == "reordered":
                refused[name] = "it gives its input back in another order"
                continue
            blocks.append(_describe(model, calls[name], kind, stays, rest == "same", places, macs, batch_size(inputs)))
    return Blocks(blocks, refused)


class _Shortcut(NamedTuple):
    """What stays of a transition: its parameters, by id, and its floating-point operations; of other kinds nothing."""

    parameters: frozenset[int] = frozenset()
    flops: int = 0


# The kind of a block, and what of it stays.
_Found = dict[str, tuple[str, _Shortcut]]


def _residual(
    calls: dict[str, Call], uses: dict[Any, set[Any]], held: dict[nn.Module, str]
) -> tuple[_Found, dict[str, str]]:
    """Residual blocks in forward order, and names of candidates refused with the reason."""
    found: _Found = {}
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
            if reason := _obstacle(seen, uses, held):
                raise ValueError(reason)
            kept = _stays(seen) if kind == "transition" else _Shortcut()
        except ValueError as error:
            if not inner:
                refused[name] = str(error)
            continue
        found = {n: found[n] for n in found if n not in inner}
        refused = {n: refused[n] for n in refused if n not in inner}
        found[name] = kind, kept
    return {name: found[name] for name in calls if name in found}, refused


def _with_branches(
    model: nn.Module, calls: dict[str, Call], uses: dict[Any, set[Any]], held: dict[nn.Module, str]
) -> tuple[_Found, dict[str, str]]:
    """`_residual`, and branches whose sums lie in the code around them, where two are alike.

    A module whose code that is looks residual as a whole, but is a stage.
    """
    found, refused = _residual(calls, uses, held)
    blocks = {*found, *refused}
    sums = {(seen.start, seen.end): name for name, seen in reversed(calls.items()) if _is_branch(seen, uses)}
    groups: dict[str, dict[str, str]] = {}
    for name in sums.values():  # of modules with one and the same sum the outermost
        if not any(other.startswith(f"{name}.") for other in (*blocks, *sums.values())):
            stage = max((outer for outer in blocks if f"{name}.".startswith(f"{outer}.")), key=len, default="")
            groups.setdefault(stage, {})[name] = _obstacle(calls[name], uses, held)
    groups = {stage: group for stage, group in groups.items() if _are_alike(model, calls, stage, group)}
    if groups.keys() & blocks:
        rest = {name: seen for name, seen in calls.items() if name not in groups}
        return _with_branches(model, rest, uses, held)
    for group in groups.values():
        found |= {name: ("branch", _Shortcut()) for name, reason in group.items() if not reason}
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


def _stays(seen: Call) -> _Shortcut:
    """What stays of a transition; ValueError if its shortcut cannot be parted from the branch."""
    kept = shortcut_parameters(seen.module)
    if kept >= seen.own.keys():
        raise ValueError("its branch has no parameters of its own")
    return _Shortcut(frozenset(kept), shortcut_flops(seen))


def _checkpointed(calls: dict[str, Call], uses: dict[Any, set[Any]]) -> dict[str, str]:
    """Modules that reentrant checkpointing runs without a graph, with the reason why nothing is seen of them."""
    reason = "torch.utils.checkpoint hides what it computes: use_reentrant=False shows it"
    return {
        name: reason
        for name, seen in calls.items()
        if seen.end is None and any(is_any(node, ("CheckpointFunction",)) for node in uses.get(seen.start[0], ()))
    }


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


def _held(model: nn.Module) -> dict[nn.Module, str]:
    """Modules that some module also keeps in a list or dict of Python's, where nothing can take their place."""
    held: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute != "_modules" and not isinstance(value, nn.Module):
                inside = [item for item in tree_leaves(value) if isinstance(item, nn.Module)]
                held |= dict.fromkeys(inside, f"{name}.{attribute}".lstrip("."))
    return held


def _obstacle(seen: Call, uses: dict[Any, set[Any]], held: dict[nn.Module, str]) -> str:
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


def _plain(model: nn.Module, calls: dict[str, Call], uses: dict[Any, set[Any]]) -> tuple[_Found, dict[str, str]]:
    """Plain units: the convolution's output goes to the norm alone, the norm's to an activation alone.

    Those that a shortcut leads around, written in the code of the network itself, are refused with that reason.
    """
    found: _Found = {}
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
                    found[name] = "plain", _Shortcut()
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


def _describe(
    model: nn.Module,
    seen: Call,
    kind: str,
    stays: _Shortcut,
    exact: bool,
    places: Counter[int],
    macs: dict[str, int],
    samples: int,
) -> Block:
    roots = [seen.name]
    if kind == "plain" and (norm := norm_after(model, seen.name)):
        roots += [name for name in (norm, activation_after(model, norm)) if name]
    inside = {name: module for root in roots for name, module in model.get_submodule(root).named_modules(prefix=root)}
    own = {name: [p for p in module._parameters.values() if p is not None] for name, module in inside.items()}
    freed = sum(p.numel() for p in _alone(inside, roots, places) if id(p) not in stays.parameters)
    layers = tuple(n for n, ps in own.items() if ps and not any(id(p) in stays.parameters for p in ps))
    macs_freed = macs[seen.name] - stays.flops // (2 * samples)
    end = f"{ADDED}{seen.name}" if kind == "branch" else roots[-1]
    return Block(seen.name, kind, freed, macs_freed, layers, end, exact, seen.outputs)


def tied_params(model: nn.Module, blocks: Iterable[Block]) -> int:
    """Parameters that go with these blocks together and with none of them alone: several of them hold them."""
    block_of = {layer: block.name for block in blocks for layer in block.layers}
    holders: dict[nn.Parameter, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(parameter, set()).add(block_of.get(name, ""))
    return sum(p.numel() for p, names in holders.items() if len(names) > 1 and "" not in names)


def _alone(inside: dict[str, nn.Module], roots: Sequence[str], places: Counter[int]) -> set[nn.Parameter]:
    """The parameters of the modules `inside` that no module outside holds, once `roots` are gone from all places."""
    here = _places(inside.values())
    shared = [module for name, module in inside.items() if name not in roots and here[id(module)] < places[id(module)]]
    staying = {inner for module in shared for inner in module.modules()}
    going = [module for module in inside.values() if module not in staying]
    here = _places(going)
    own = (p for module in going for p in module._parameters.values() if p is not None)
    return {p for p in own if here[id(p)] == places[id(p)]}


def _places(modules: Iterable[nn.Module]) -> Counter[int]:
    """In how many places these modules hold each module and parameter, by id."""
    return Counter(id(held) for module in modules for held in (*module._modules.values(), *module._parameters.values()))
