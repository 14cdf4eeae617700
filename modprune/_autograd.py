"""What autograd knows of a forward pass: which value was made from which, and by what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modprune._inputs import arguments, call, first_line, first_tensor, map_tensors, opened, tensors_in
from modprune._state import evaluating, state_kept

# Autograd's names of operations that a shortcut may pass through: sums, element-wise activations, changes of layout.
SUMS = ("AddBackward", "SubBackward", "AddcmulBackward")
FACTORS = ("MulBackward", "DivBackward")
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


@contextmanager
def traceable(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode with gradients for all it holds.

    Modes, RNG state, `requires_grad`, buffers and attributes are restored: a module that has cached a tensor with a
    graph could not be copied.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model), state_kept(model):
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def edge(tensor: Tensor) -> Edge | None:
    """Where a tensor stands in autograd's graph; None if it needs no gradient or is a leaf."""
    return None if tensor.grad_fn is None else (tensor.grad_fn, tensor.output_nr)


@dataclass
class Call:
    """What hooks saw of one sub-module: arguments, the ends of its autograd graph, the form of what it gave back.

    Attributes:
        x, start: the first tensor that went in, and where it stands in autograd's graph.
        end, shape: the same of the first tensor that came out; `end` is None if it depends on nothing.
        form: "" if a tensor or a tuple came out, or a named one such as the first that went in; else the type's name.
        outputs: for each item of the tuple that came out, the argument that it is like by position; -1 for none.
        others: the ends of further items that came out and are like none.
        times: how often the module was called.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    start: Edge
    end: Edge | None = None
    shape: torch.Size | None = None
    form: str = ""
    outputs: tuple[int, ...] = ()
    others: tuple[Edge, ...] = ()
    times: int = 1

    @cached_property
    def own(self) -> dict[int, int]:
        """The sizes of the module's parameters by their `id`."""
        return {id(parameter): parameter.numel() for parameter in self.module.parameters()}


def record_calls(model: nn.Module, inputs: Any, leaves: bool = False) -> tuple[dict[str, Call], Any]:
    """Calls of all sub-modules but torch's own layers, in the order in which they began, and the model's output.

    Args:
        model: traceable.
        inputs: example inputs on its device.
        leaves: also calls of torch's own layers, which takes longer.

    Raises:
        RuntimeError: if the model cannot run on `inputs`; one line.
    """
    calls: dict[str, Call] = {}
    times: Counter[str] = Counter()
    # Later layers may write into what goes in: the proof needs it as it is then.
    values: dict[Edge, Tensor] = {}

    @_unseen
    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor((args, kwargs))
        start = None if x is None else edge(x)
        times[name] += 1  # those without gradients too
        if name in calls:
            calls[name].times = times[name]
        elif x is not None and start is not None:
            if may_be_block(module) and start not in values:
                with torch.no_grad():
                    values[start] = x.clone()
            seen = values[start] if start in values else x.detach()
            calls[name] = Call(name, module, args, kwargs, seen, start, times=times[name])

    @_unseen
    def after(name: str, module: nn.Module, args: Any, out: Any) -> None:
        y = first_tensor(opened(out))
        if name in calls and y is not None and calls[name].end is None:
            seen = calls[name]
            seen.end, seen.outputs = edge(y), _sources(out, y, arguments(seen.args, seen.kwargs))
            apart = [item for item, i in zip(out, seen.outputs, strict=True) if i < 0] if seen.outputs else []
            seen.others = tuple(e for item in differentiable_tensors(apart) if item is not y and (e := edge(item)))
            seen.shape, seen.form = y.shape, "" if _can_be_given(out, args) else type(out).__name__

    try:
        with ExitStack() as hooks, _SumsOutOfPlace():
            for name, module in model.named_modules():
                if name and (leaves or may_be_block(module)) and any(True for _ in module.parameters()):
                    if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                        continue
                    hooks.enter_context(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
                    hooks.enter_context(module.register_forward_hook(partial(after, name)))
            return calls, call(model, map_tensors(_differentiable, inputs))
    except Exception as error:
        raise RuntimeError(f"{type(model).__name__} does not run on the example inputs: {first_line(error)}") from error


def _can_be_given(out: Any, given: tuple[Any, ...]) -> bool:
    """Whether a pass-through can give such an output."""
    return (
        isinstance(out, Tensor) or type(out) is tuple or (isinstance(out, tuple) and type(out) in map(type, given[:1]))
    )


def is_composite(module: nn.Module) -> bool:
    """Whether a module holds others."""
    return bool(module._modules)


def may_be_block(module: nn.Module) -> bool:
    """Whether a module is more than one of torch's own layers."""
    return is_composite(module) or not type(module).__module__.startswith("torch.nn.")


def _sources(out: Any, first: Tensor, given: list[Any]) -> tuple[int, ...]:
    """For each item of a tuple the argument, not yet taken, that stands for it; -1 for none. Empty if no tuple.

    One like it: for `first`, by which the block is known, and what was not computed; else one that lies behind it. What
    was not computed may be an argument's values once more.
    """
    sources: list[int] = []
    for item in out if isinstance(out, tuple) else ():
        free = [i for i in range(len(given)) if i not in sources and _is_like(item, given[i])]
        if isinstance(item, Tensor) and edge(item) is None:
            same = [i for i, value in enumerate(given) if _is_like(item, value) and torch.equal(item, value)]
            free = [i for i in same if given[i] is item] or same or free
        if item is not first and isinstance(item, Tensor) and (end := edge(item)):
            free = [i for i in free if (start := edge(given[i])) and _leads(start, end)]
        sources.append(next(iter(free), -1))
    return tuple(sources)


def _leads(start: Edge, end: Edge) -> bool:
    """Whether a value is another one but for sums, activations and changes of layout."""
    seen, stack = set(), [end]
    while stack:
        here = stack.pop()
        if here == start:
            return True
        if here not in seen and here[0] is not None and is_any(here[0], SUMS + ACTIVATIONS + LAYOUT):
            stack += here[0].next_functions
        seen.add(here)
    return False


def _is_like(item: Any, argument: Any) -> bool:
    """Whether both are tensors of one shape and type, or equal numbers, texts or lists of these."""
    if isinstance(item, Tensor) or isinstance(argument, Tensor):
        return isinstance(argument, type(item)) and item.shape == argument.shape and item.dtype == argument.dtype
    if isinstance(item, (list, tuple)) and isinstance(argument, (list, tuple)):  # sizes come as both
        return first_tensor((item, argument)) is None and list(item) == list(argument)
    return isinstance(item, (int, float, str)) and isinstance(argument, type(item)) and item == argument


class _SumsOutOfPlace(TorchFunctionMode):
    """Sums into a view give a tensor of their own: autograd would note a copy of slices and hide what was added."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.add_, Tensor.__iadd__) and args[0]._is_view():
            function = torch.add
        return function(*args, **(kwargs or {}))


def _unseen(function: Callable[..., None]) -> Callable[..., None]:
    """`function` past the mode above, which would look at each attribute of a tensor that it reads."""

    @wraps(function)
    def unseen(*args: Any) -> None:
        with torch._C.DisableTorchFunction():
            function(*args)

    return unseen


def _differentiable(tensor: Tensor) -> Tensor:
    """A floating-point tensor with gradients, so that blocks right at the input are seen too; others as they are."""
    return tensor.detach().clone().requires_grad_().clone() if tensor.is_floating_point() else tensor


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
            stack.append((inputs[0], added, normed or is_any(here[0], NORMS)))
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


def last_sum(end: Any, factors: tuple[str, ...] = ()) -> Any:
    """The node of the sum that ends a computation, but for activations, changes of layout and `factors`; else None.

    Of two values as they are and of its own shape: in the place of the sum, a smaller one would not fit.
    """
    while (is_any(end, ACTIVATIONS + LAYOUT) and end.next_functions[0][0] is not None) or (
        is_any(end, SUMS + factors) and len(operands(end)) == 1  # with a number, as where RepVGG has no identity
    ):
        end = operands(end)[0]
    if not is_any(end, SUMS) or _unscaled(end) != (0, 1) or len(operands(end)) != 2:
        return None
    return end if all(_shape(made) == _shape((end, 0)) for made in end.next_functions if made[0]) else None


def _shape(made: Edge) -> tuple[int, ...]:
    return tuple(made[0]._input_metadata[made[1]].shape)


def operands(node: Any) -> list[Any]:
    """The nodes whose values go into a node."""
    return [before for before, _ in node.next_functions if before is not None]


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
