"""What autograd knows of a forward pass: which value was made from which, and by what."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from modprune._inputs import opened, tensors_in

# Autograd's names of operations that a shortcut may pass through: sums, element-wise activations, changes of layout.
SUMS = ("AddBackward", "SubBackward", "AddcmulBackward")
FACTORS = ("MulBackward", "DivBackward")
JOINS = (*SUMS, "Lerp", "Maximum", "Minimum", "Where", "IndexAdd")
LINEAR = ("Convolution", "Addmm", "Mm", "Bmm", "UnsafeView", *FACTORS)
ACTIVATIONS = (
    *("Relu", "Hardtanh", "Gelu", "Silu", "Hardswish", "LeakyRelu", "Elu", "Mish", "Clamp", "Threshold", "Softplus"),
    *("PreluKernel", "RreluWithNoise", "Tanh", "Celu"),
)
LAYOUT = (
    *("View", "UnsafeView", "Reshape", "Alias", "Permute", "Transpose", "TBackward", "Roll", "Clone"),
    *("Squeeze", "Unsqueeze", "ToCopy", "BackwardHookFunction"),
)
NORMS = (
    *("NativeLayerNorm", "RmsNorm", "FusedRmsNorm", "NativeGroupNorm"),
    *("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm"),
)

# What a value is made from, as bits: parameters, the value that a walk starts from.
_LEARNED, _FROM_START = 1, 2

Edge = tuple[Any, int]
"""A value in autograd's graph: the node that made it, and which of that node's outputs it is."""


def edge(tensor: Tensor) -> Edge | None:
    """Where a tensor stands in autograd's graph; None if it needs no gradient or is a leaf."""
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


def leads(start: Edge, end: Edge) -> bool:
    """Whether a value is another one but for sums, activations and changes of layout."""
    seen, stack = set(), [end]
    while stack:
        here = stack.pop()
        if here == start:
            return True
        if here not in seen and here[0] is not None and is_any(here[0], SUMS + ACTIVATIONS + LAYOUT):
            stack += here[0].next_functions if is_any(here[0], SUMS) else [_changed(here)]
        seen.add(here)
    return False


def _changed(made: Edge) -> Edge:
    """The value that an activation or a change of layout has changed: hooks on gradients hand on several at a time."""
    node, output = made
    return node.next_functions[output if is_any(node, ("BackwardHookFunction",)) else 0]


def is_any(node: Any, kinds: tuple[str, ...]) -> bool:
    """Whether the name of an autograd node begins with one of `kinds`."""
    return bool(node.name().startswith(kinds))


def between(end: Any, start: Edge) -> set[Any]:
    """Autograd nodes from `end` back to `start`, both included; the walk does not go past `start`."""
    seen, stack = {end}, [] if end is start[0] else [end]
    while stack:
        for following, output in stack.pop().next_functions:
            if following is None:
                continue
            if (following, output) != start and following not in seen:
                stack.append(following)
            seen.add(following)
    return seen


def parameters(nodes: set[Any]) -> list[Tensor]:
    """The parameters among autograd nodes; other leaves are inputs."""
    return [node.variable for node in nodes if is_parameter(node)]


def is_parameter(node: Any) -> bool:
    """Whether an autograd node is that of a parameter."""
    return isinstance(getattr(node, "variable", None), nn.Parameter)


def identity_path(end: Edge, start: Edge, norms: Mapping[Edge, Edge], without: Collection[Any] = ()) -> str:
    """What is added to `start` on a path to `end` of sums, activations and changes of layout alone.

    A norm may follow a sum (post-norm, as in BERT), but not stand before the first one: that would be `norm(x) + f`.

    Args:
        end: the value to start from.
        start: the value to arrive at.
        norms: from what comes out of norms that autograd does not know as such to what goes in.
        without: autograd nodes of sums that do not count.

    Returns:
        "branch" if it is learned and made from `start`, "other" if it is learned but not from `start`, "" if neither.
    """
    seen, stack, best = set(), [(end, 0, False)], 0
    known: dict[Any, int] = {}
    while stack:
        step = here, added, normed = stack.pop()
        if here == start and not normed:
            best = max(best, added)
        silent = SUMS + ACTIVATIONS + LAYOUT + NORMS
        if step not in seen and here in norms:
            stack.append((norms[here], added, True))
        if step in seen or here[0] in (None, start[0]) or not is_any(here[0], silent):
            continue
        seen.add(step)
        inputs = here[0].next_functions
        if not is_any(here[0], SUMS):
            stack.append((_changed(here), added, normed or is_any(here[0], NORMS)))
            continue
        for i in _unscaled(here[0]):
            others = [node for j, (node, _) in enumerate(inputs) if j != i and node not in (None, start[0])]
            made = [_making(node, start, known) for node in others if here[0] not in without]
            gains = [1 + bool(bits & _FROM_START) for bits in made if bits & _LEARNED]
            stack.append((inputs[i], max([added, *gains]), False))
    return ("", "other", "branch")[best]


def _making(node: Any, start: Edge, known: dict[Any, int]) -> int:
    """What a node is made from, as bits: parameters, `start`. What comes to light of others goes to `known`."""
    stack = [node]
    while stack:
        here = stack[-1]
        bits, unknown = known.get(here, _LEARNED if is_parameter(here) else 0), []
        if not bits:
            for following in here.next_functions:
                # Another output of the same node leads to that node's own inputs.
                if following == start:
                    bits |= _FROM_START
                elif following[0] in known:
                    bits |= known[following[0]]
                elif following[0] is not None:
                    unknown.append(following[0])
        if unknown and bits != _LEARNED | _FROM_START:
            stack += unknown
        else:
            known[here] = bits
            stack.pop()
    return known[node]


def _unscaled(node: Any) -> tuple[int, ...]:
    """Which operands of a sum go into it as they are: `a + alpha * b`, `a - b`, `a + b * c`."""
    return (0, 1) if is_any(node, ("AddBackward",)) and getattr(node, "_saved_alpha", 1) == 1 else (0,)


def is_sum_of(node: Any, a: Edge, b: Edge) -> bool:
    """Whether a node is the sum of just these two values, as they are."""
    return is_any(node, ("AddBackward",)) and _unscaled(node) == (0, 1) and set(node.next_functions) == {a, b}


def last_sum(end: Edge, factors: tuple[str, ...] = ()) -> Any:
    """The node of the sum that ends a computation, but for activations, changes of layout and `factors`; else None.

    Of two values as they are and of its own shape: in the place of the sum, a smaller one would not fit.
    """
    while (before := _before(end, factors)) is not None:
        end = before
    node, made = end[0], _inputs(end[0])
    if not is_any(node, SUMS) or _unscaled(node) != (0, 1) or len(made) != 2:
        return None
    return node if all(_shape(before) == _shape((node, 0)) for before in made) else None


def _before(made: Edge, factors: tuple[str, ...]) -> Edge | None:
    """The value before an activation, a change of layout, or a sum or factor with a number; None if none of these."""
    if is_any(made[0], ACTIVATIONS + LAYOUT):
        before = _changed(made)
        return before if before[0] is not None else None
    inputs = _inputs(made[0])
    with_number = is_any(made[0], SUMS + factors) and len(inputs) == 1  # as where RepVGG has no identity
    return inputs[0] if with_number else None


def _shape(made: Edge) -> tuple[int, ...]:
    return tuple(made[0]._input_metadata[made[1]].shape)


def operands(node: Any) -> list[Any]:
    """The nodes whose values go into a node."""
    return [before for before, _ in _inputs(node)]


def _inputs(node: Any) -> list[Edge]:
    """The values that go into a node, but for numbers and what needs no gradient."""
    return [before for before in node.next_functions if before[0] is not None]


class _Caller:
    """Stands among the nodes for whoever is given the model's output."""

    def name(self) -> str:
        return ""


def users(output: Any) -> dict[Any, set[Any]]:
    """For every autograd node behind a model's output, the nodes that use its value; a stand-in for the caller."""
    caller = _Caller()
    stack: list[Any] = [tensor.grad_fn for tensor in differentiable_tensors(opened(output))]
    found: dict[Any, set[Any]] = {node: {caller} for node in stack}
    seen = set(stack)
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            found.setdefault(following, set()).add(node)
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return found


def differentiable_tensors(output: Any) -> list[Tensor]:
    """The tensors in a model's output that depend on a parameter or an input."""
    return [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
