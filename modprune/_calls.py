"""What goes in and out of every sub-module in a forward pass, and where it stands in autograd's graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modprune._autograd import Edge, differentiable_tensors, edge, leads
from modprune._inputs import arguments, call, first_line, first_tensor, has_gradients, map_tensors, opened


@dataclass
class Call:
    """What hooks saw of one sub-module: arguments, the ends of its autograd graph, the form of what it gave back.

    Attributes:
        x, start: the first tensor that went in, and where it stands in autograd's graph.
        given: where all the tensors that went in stand there, before the module may have written into them.
        end, shape: the same of the first tensor that came out; `end` is None if it depends on nothing.
        form: "" if a tensor or a tuple came out, or a named one such as the first that went in; else the type's name.
        outputs: for each item of the tuple that came out, the argument that it is like by position; -1 for none.
        others: the ends of further items that came out and are like none.
        unclear: whether a number, text or list that came out may be one or another of the arguments.
        times: how often the module was called.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    x: Tensor
    start: Edge
    given: tuple[Edge, ...] = ()
    end: Edge | None = None
    shape: torch.Size | None = None
    form: str = ""
    outputs: tuple[int, ...] = ()
    others: tuple[Edge, ...] = ()
    unclear: bool = False
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
            given = tuple(made for tensor in differentiable_tensors([args, kwargs]) if (made := edge(tensor)))
            calls[name] = Call(name, module, args, kwargs, seen, start, given, times=times[name])

    @_unseen
    def after(name: str, module: nn.Module, args: Any, out: Any) -> None:
        y = first_tensor(opened(out))
        if name in calls and y is not None and calls[name].end is None:
            seen = calls[name]
            given = arguments(seen.args, seen.kwargs)
            seen.end, seen.outputs, seen.unclear = edge(y), _sources(out, y, given), _is_unclear(out, given)
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

    Of a tensor that comes more than once, the same.

    One like it: for `first`, by which the block is known, and what was not computed; else one that lies behind it. What
    was not computed may be an argument's values once more.
    """
    sources: list[int] = []
    for item in out if isinstance(out, tuple) else ():
        twice = [i for i, other in zip(sources, out, strict=False) if other is item and isinstance(item, Tensor)]
        free = [i for i in range(len(given)) if i not in sources and _is_like(item, given[i])]
        if isinstance(item, Tensor) and edge(item) is None:
            same = [i for i, value in enumerate(given) if _is_like(item, value) and torch.equal(item, value)]
            free = [i for i in same if given[i] is item] or same or free
        if item is not first and isinstance(item, Tensor) and (end := edge(item)):
            free = [i for i in free if (start := edge(given[i])) and leads(start, end)]
        sources.append(next(iter(twice or free), -1))
    return tuple(sources)


def _is_unclear(out: Any, given: list[Any]) -> bool:
    """Whether a number, text or list among the items of a tuple may be one or another of the arguments."""
    items = [item for item in out if not isinstance(item, Tensor)] if isinstance(out, tuple) else []
    return any(sum(_is_like(item, value) for value in given) > sum(_is_like(item, i) for i in items) for item in items)


def _is_like(item: Any, argument: Any) -> bool:
    """Whether both are tensors of one shape and type, or equal numbers, texts or lists of these."""
    if isinstance(item, Tensor) or isinstance(argument, Tensor):
        return isinstance(argument, type(item)) and item.shape == argument.shape and item.dtype == argument.dtype
    if isinstance(item, (list, tuple)) and isinstance(argument, (list, tuple)):  # sizes come as both
        return first_tensor((item, argument)) is None and list(item) == list(argument)
    return isinstance(item, (int, float, str)) and type(argument) is type(item) and item == argument


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
    """A tensor with gradients, so that blocks right at the input are seen too; one of integers as it is."""
    return tensor.detach().clone().requires_grad_().clone() if has_gradients(tensor) else tensor
