"""Which blocks of a network can go, and why the rest cannot.

One forward pass notes what goes in and out of every composite sub-module; the autograd graph between the two tells
whether the output is `shortcut(x) + branch(x)`. No class name is ever asked for. Lu et al. (ECCV 2022) prune the
same blocks, by a list for each network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modprune._inputs import call, device_of, evaluating, first_tensor, to_device
from modprune.cost import macs_by_module

# Autograd's names of operations that a shortcut may pass through: sums, element-wise activations, changes of layout.
ADDS = ("AddBackward",)
ACTIVATIONS = ("Relu", "Hardtanh", "Gelu", "Silu", "Hardswish", "LeakyRelu", "Elu", "Mish", "Clamp")
LAYOUT = ("View", "UnsafeView", "Reshape", "Alias", "Permute", "Transpose", "Roll", "Clone", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Block:
    """A sub-module whose output is `shortcut(x) + branch(x)`, as a value.

    Attributes:
        name: qualified name, as in `model.get_submodule(name)`.
        kind: "identity" (the shortcut is x: the whole block can go) or "transition" (the shortcut changes the shape:
            the branch can go).
        params: parameters that go with it.
        macs: MACs per sample that go with it, by the primary counter.
        layers: qualified names of the layers that go with it, in the order of `model.named_modules()`.
        exact: whether the block with all parameters zero gave its input back bit for bit, the proof that the
            shortcut is the identity; False for transitions and where an activation follows that alters its input.
    """

    name: str
    kind: str
    params: int
    macs: int
    layers: tuple[str, ...]
    exact: bool = True


class Blocks(tuple[Block, ...]):
    """Blocks in forward order; `refused` maps the names of candidates that cannot go to the reason."""

    refused: dict[str, str]

    def __new__(cls, blocks: Iterable[Block] = (), refused: dict[str, str] | None = None) -> Blocks:
        self = super().__new__(cls, blocks)
        self.refused = refused or {}
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(block.name for block in self)


def find_blocks(model: nn.Module, example_inputs: Any) -> Blocks:
    """The residual blocks of a model in forward order, with what each costs; empty if it has none.

    Two forward passes (one traced, one counted) and one more of every identity block, for the proof that the shortcut
    is the identity. The model is left as found.

    Args:
        model: any module; on any device.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, with batch dimension.

    Raises:
        RuntimeError: if the model cannot run on `example_inputs`; one line.

    >>> from modprune.models import resnet20
    >>> blocks = find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
    >>> len(blocks), blocks[0].name, blocks[0].kind, blocks[0].params, blocks[3].kind
    (9, 'layer1.0', 'identity', 4672, 'transition')
    """
    inputs = to_device(example_inputs, device_of(model))
    modes = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with evaluating(model), torch.enable_grad():
            for parameter, _ in modes:
                parameter.requires_grad_(True)
            calls, output = _record(model, _tracked(inputs))
            found, refused = _judge(calls, output)
            macs = macs_by_module(model, inputs)
            blocks = [_describe(calls[name], kind, kept, macs) for name, (kind, kept) in found.items()]
    finally:
        for parameter, requires_grad in modes:
            parameter.requires_grad_(requires_grad)
    return Blocks(blocks, refused)


# The kind of a block and, of a transition, the autograd nodes of the shortcut that stays.
_Shape = tuple[str, set[Any]]


@dataclass
class _Call:
    """What a hook saw of one sub-module: its arguments, the ends of its autograd graph, and when it finished."""

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    start: Any
    end: Any = None
    shape: torch.Size | None = None
    times: int = 1


def _tracked(value: Any) -> Any:
    """`value` with its floating point tensors as results of an operation, so that a block on the input is seen too."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_() * 1 if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _tracked(item) for key, item in value.items()}
    return type(value)(_tracked(item) for item in value) if isinstance(value, (tuple, list)) else value


def _record(model: nn.Module, inputs: Any) -> tuple[dict[str, _Call], Any]:
    """Calls of all composite sub-modules with parameters, in the order in which they began, and the model's output."""
    calls: dict[str, _Call] = {}
    hooks = []
    for name, module in model.named_modules():
        if not name or not any(True for _ in module.children()) or not any(True for _ in module.parameters()):
            continue

        def before(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            x = first_tensor((args, kwargs))
            if name in calls:
                calls[name].times += 1
            elif x is not None and x.grad_fn is not None:
                # Later layers may write into x in place: the proof needs it as it is now.
                calls[name] = _Call(name, module, args, kwargs, x.detach().clone(), x.grad_fn)

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            y = first_tensor(out)
            if name in calls and y is not None and calls[name].end is None:
                calls[name].end, calls[name].shape = y.grad_fn, y.shape

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        output = call(model, inputs)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"{type(model).__name__} does not run on the example inputs: {reason[0]}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls, output


def _judge(calls: dict[str, _Call], output: Any) -> tuple[dict[str, _Shape], dict[str, str]]:
    """Accepted names with what they are, innermost only, and refused names with the reason."""
    users = _users(output)
    found: dict[str, _Shape] = {}
    refused: dict[str, str] = {}
    for name in sorted(calls, key=lambda name: name.count("."), reverse=True):
        if any(inner.startswith(name + ".") for inner in (*found, *refused)):
            continue
        seen = calls[name]
        shape = _shape(seen)
        if shape is None:
            continue
        reason = _obstacle(seen, users)
        if reason:
            refused[name] = reason
        else:
            found[name] = shape
    return {name: found[name] for name in calls if name in found}, refused


def _shape(seen: _Call) -> _Shape | None:
    """What a call looks like by its autograd graph; None if it is no block."""
    if seen.end is None or seen.end is seen.start:
        return None
    inside = _between(seen.end, seen.start)
    if seen.start not in inside:
        return None
    if seen.shape == seen.x.shape and _has_identity_path(seen.end, seen.start):
        return "identity", set()
    add = seen.end
    while _is(add, ACTIVATIONS + LAYOUT) and add.next_functions:
        add = add.next_functions[0][0]
    if not _is(add, ADDS) or len(add.next_functions) != 2:
        return None
    sides = [_between(operand, seen.start) for operand, _ in add.next_functions]
    if any(seen.start not in side for side in sides):
        return None
    shortcut, branch = sorted(sides, key=lambda side: sum(p.numel() for p in _parameters(side)))
    if not _parameters(branch) or len(_parameters(branch)) == len(_parameters(shortcut)):
        return None
    return "transition", shortcut


def _obstacle(seen: _Call, users: dict[Any, set[Any]]) -> str:
    """Why the block cannot go though it has the right shape; empty if it can."""
    if seen.times > 1:
        return f"called {seen.times} times in one forward pass"
    inside = _between(seen.end, seen.start)
    own = {id(parameter) for parameter in seen.module.parameters()}
    if any(id(parameter) not in own for parameter in _parameters(inside)):
        return "another layer feeds into it"
    hidden = inside - {seen.start, seen.end}
    if any(users.get(node, set()) - inside for node in hidden if not hasattr(node, "variable")):
        return "a value from inside it is used outside"
    return ""


def _describe(seen: _Call, kind: str, kept: set[Any], macs: dict[str, int]) -> Block:
    staying = {id(parameter) for parameter in _parameters(kept)}
    layers = tuple(
        f"{seen.name}.{name}" if name else seen.name
        for name, module in seen.module.named_modules()
        if (own := list(module.parameters(recurse=False))) and not any(id(p) in staying for p in own)
    )
    params = sum(p.numel() for p in seen.module.parameters() if id(p) not in staying)
    freed = macs[seen.name] if kind == "identity" else sum(macs[layer] for layer in layers)
    return Block(seen.name, kind, params, freed, layers, kind == "identity" and _gives_input_back(seen))


def _gives_input_back(seen: _Call) -> bool:
    """Whether the block with all its parameters zero returns its input bit for bit."""
    saved = [(parameter, parameter.detach().clone()) for parameter in seen.module.parameters()]
    args, kwargs = _replace_first((seen.args, seen.kwargs), seen.x.clone())
    try:
        with torch.no_grad():
            for parameter, _ in saved:
                parameter.zero_()
            return torch.equal(first_tensor(seen.module(*args, **kwargs)), seen.x)  # type: ignore[arg-type]
    finally:
        with torch.no_grad():
            for parameter, value in saved:
                parameter.copy_(value)


def _replace_first(value: tuple[Any, ...], tensor: Tensor) -> Any:
    """`value` with the first tensor inside it replaced."""
    args, kwargs = value
    if first_tensor(args) is not None:
        if isinstance(args[0], Tensor):
            return (tensor, *args[1:]), kwargs
        return args, kwargs
    key = next(key for key, item in kwargs.items() if isinstance(item, Tensor))
    return args, {**kwargs, key: tensor}


def _is(node: Any, kinds: tuple[str, ...]) -> bool:
    return node.name().startswith(kinds)


def _between(end: Any, start: Any) -> set[Any]:
    """Autograd nodes from `end` back to `start`, both included; the walk does not go past `start`."""
    seen, stack = {end}, [end]
    while stack:
        node = stack.pop()
        if node is start:
            continue
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    return seen


def _has_identity_path(end: Any, start: Any) -> bool:
    """Whether `start` is reached from `end` by sums, activations and changes of layout alone, with at least one sum."""
    seen, stack = set(), [(end, False)]
    while stack:
        node, added = stack.pop()
        if node is start:
            if added:
                return True
            continue
        if (node, added) in seen or not _is(node, ADDS + ACTIVATIONS + LAYOUT):
            continue
        seen.add((node, added))
        stack += [(n, added or _is(node, ADDS)) for n, _ in node.next_functions if n is not None]
    return False


def _parameters(nodes: set[Any]) -> list[Tensor]:
    return [node.variable for node in nodes if hasattr(node, "variable")]


def _users(output: Any) -> dict[Any, set[Any]]:
    """For every autograd node behind the output, the nodes that use its value."""
    users: dict[Any, set[Any]] = {}
    stack = [tensor.grad_fn for tensor in _tensors(output) if tensor.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            users.setdefault(following, set()).add(node)
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return users


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = tuple(value.values())
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (tuple, list)) else []
