"""What a module does by itself: run once more, with values that tell, in the place of its input and its parameters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from modprune._autograd import NORMS, between, is_any
from modprune._calls import Call, is_composite
from modprune._inputs import first_line, first_tensor
from modprune._trace import traced_and_run


def without_parameters(seen: Call) -> str:
    """What a block makes of its input with all its parameters zero: "same", bit for bit, "reordered" or "other"."""
    x = _few_values(seen.x)
    y = _output(seen, x, 0)
    return "other" if y is None else "same" if torch.equal(y, x) else "reordered" if _is_reordered(y, x) else "other"


def shortcut_flops(seen: Call) -> int:
    """The floating-point operations of what would stay of a transition.

    Raises:
        ValueError: unless that is what its shortcut is while the whole block runs.
    """
    args, kwargs = _replace_first(seen.args, seen.kwargs, seen.x.clone())
    again = _replace_first(seen.args, seen.kwargs, seen.x.clone())
    try:
        with torch.no_grad():
            out = first_tensor(seen.module(*args, **kwargs))
            made, within, alone, flops = traced_and_run(seen.module, *again)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"what torch.fx traces of it does not run ({first_line(error):.80})") from None
    pairs = (first_tensor(made), out), (alone, within)
    if any(y is None or x is None or y.shape != x.shape or differ(y, x) for y, x in pairs):
        raise ValueError("what torch.fx traces of it, or its shortcut by itself, gives other values")
    return flops


def is_own_norm(seen: Call) -> bool:
    """Whether a layer is a norm that autograd does not know: it has scales alone, and gives the same for `2 * x`."""
    if seen.end is None or is_composite(seen.module) or seen.shape != seen.x.shape:
        return False
    scales = all(parameter.squeeze().ndim < 2 for parameter in seen.module.parameters())
    if not scales or any(is_any(node, NORMS) for node in between(seen.end[0], seen.start)):
        return False
    x = _few_values(seen.x)
    once, twice = (_output(seen, size * x, 1) for size in (1, 2))
    return once is not None and twice is not None and torch.allclose(once, twice, rtol=0.01, atol=0.01)


def differ(y: Tensor, x: Tensor) -> bool:
    """Whether tensors of one shape hold other values; those that overflow say nothing.

    Sums in another memory layout may be taken in another order.
    """
    return bool(x.numel() and (y - x).abs().amax() > 1e-2 * x.abs().amax())


@contextmanager
def filled(module: nn.Module, value: float) -> Iterator[None]:
    """One value in all parameters of a module; quicker than `torch.func.functional_call`, which looks for ties."""
    places = [(inner, name) for inner in module.modules() for name, p in inner._parameters.items() if p is not None]
    originals = [inner._parameters[name] for inner, name in places]
    try:
        for (inner, name), parameter in zip(places, originals, strict=True):
            inner._parameters[name] = torch.full_like(parameter, value)  # type: ignore[assignment, arg-type]
        yield
    finally:
        for (inner, name), parameter in zip(places, originals, strict=True):
            inner._parameters[name] = parameter


def _few_values(x: Tensor) -> Tensor:
    """A tensor such as `x`, with its signs, of the magnitudes 1 and 2 in an order that no change of order keeps."""
    if x.is_complex():
        return torch.view_as_complex(_few_values(torch.view_as_real(x.resolve_conj())))
    size = 1 + torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    return torch.where(x < 0, -size, size)


def _output(seen: Call, x: Tensor, value: float) -> Tensor | None:
    """What a module makes of `x` with one value in all its parameters; None where it does not run so."""
    try:
        args, kwargs = _replace_first(seen.args, seen.kwargs, x.clone())
        with torch.no_grad(), filled(seen.module, value):
            return first_tensor(seen.module(*args, **kwargs))
    except Exception:  # a cache among the arguments has grown since, and does not fit a second time
        return None


def _replace_first(args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> Any:
    """The arguments with the tensor that comes first, in whatever container, replaced by `x`."""
    leaves, form = tree_flatten((args, kwargs))
    first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
    if first is None:  # pytree does not open subclasses of dict
        raise ValueError("its input lies in a container that torch's pytree does not know")
    return tree_unflatten([*leaves[:first], x, *leaves[first + 1 :]], form)


def _is_reordered(y: Tensor, x: Tensor) -> bool:
    """Whether one holds the values of the other, or one value for each of them as activations give, in another order.

    A norm gives more values than there were, since what it does to one depends on others.
    """
    if y.shape != x.shape:
        return False
    x, y = (torch.view_as_real(z.resolve_conj()) if z.is_complex() else z for z in (x, y))
    places = [at for value in (-2, -1, 1, 2) if (at := x == value).any()]
    return len(y.unique()) <= len(places) and any(len(y[at].unique()) > 1 for at in places)
