"""An optimizer that goes on after surgery: momentum stays with the parameters that stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves


@contextmanager
def carry_over(model: nn.Module, *optimizers: Optimizer) -> Iterator[None]:
    """Surgery inside the context leaves the optimizers fit for what is left of the model.

    Each parameter that stays keeps its group and its state (momentum and the like), so the optimizers and their
    schedulers can be used on. Parameters that went are dropped. Those of layers that `width` made narrower are new
    tensors: they take their old one's group and begin with fresh state. Parameters that are not the model's stay.

    An average of the weights (EMA), DistributedDataParallel and FSDP hold on to the old parameters: wrap and average
    anew after the surgery.

    Args:
        model: the bare module, the one that surgery changes in place.
        optimizers: over parameters of the model; changed in place, and so are those that they wrap. Not LBFGS, which
            keeps a list of its own, nor ZeroRedundancyOptimizer, of which each process has a part.

    Raises:
        ValueError: before the surgery for one of these two or what is no optimizer, after it if an optimizer is left
            without any parameter.

    >>> import torch
    >>> from modprune import PruningPlan
    >>> from modprune.models import resnet20
    >>> model = resnet20()
    >>> optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    >>> with carry_over(model, optimizer):
    ...     _ = PruningPlan(("layer1.0",)).apply(model)
    >>> len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    True
    """
    for one in optimizers:
        if not (hasattr(one, "param_groups") and hasattr(one, "state")):
            raise ValueError(f"{type(one).__name__} is no optimizer: give that; its schedule goes on by itself")
    everyone = _with_inner(optimizers)
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in everyone):
        raise ValueError("LBFGS cannot be carried over, its history is of all parameters together: make a new one")
    # By its name: to import it takes a while, and is not possible everywhere.
    if any(base.__name__ == "ZeroRedundancyOptimizer" for optimizer in everyone for base in type(optimizer).__mro__):
        raise ValueError(
            "ZeroRedundancyOptimizer cannot be carried over, it has dealt the parameters out to the processes: make a "
            "new one"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    try:
        yield
    finally:  # of two surgeries the first may have been done when the second fails
        _rebind(model, everyone, names)
    for optimizer in optimizers:
        if not any(group["params"] for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no parameter left: all of its layers were removed")


def _with_inner(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """Those that others hold too: one that wraps others shares their groups, and leaves them the states."""
    found: list[Optimizer] = []
    stack = list(optimizers)
    while stack:
        here = stack.pop(0)
        if all(here is not other for other in found):
            found.append(here)
            stack += [held for held in tree_leaves(list(vars(here).values())) if isinstance(held, Optimizer)]
    return found


def _rebind(model: nn.Module, optimizers: Sequence[Optimizer], names: Mapping[nn.Parameter, str]) -> None:
    now, stay = dict(model.named_parameters()), set(model.parameters())
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            # By itself before by its name: of weights that layers share, the layer that gave the name may be gone.
            heirs = [p if p in stay or p not in names else now.get(names[p]) for p in group["params"]]
            if "param_names" in group:  # one made with `model.named_parameters()`
                group["param_names"] = [n for n, p in zip(group["param_names"], heirs, strict=True) if p is not None]
            group["params"] = [p for p in heirs if p is not None]
            _complete(optimizer, group)
        left = {p for group in optimizer.param_groups for p in group["params"]}
        for gone in [p for p in optimizer.state if isinstance(p, torch.Tensor) and p not in left]:
            del optimizer.state[gone]


def _complete(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Momentum of nothing so far for new tensors, where fused SGD wants that of all or of none."""
    states = {parameter: optimizer.state.get(parameter, {}) for parameter in group["params"]}
    if group.get("fused") and any(state.get("momentum_buffer") is not None for state in states.values()):
        for parameter, state in states.items():
            if state.get("momentum_buffer") is None:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
