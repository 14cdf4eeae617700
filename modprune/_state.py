"""What a forward pass leaves in a model, taken out again: attributes and buffers as they were."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

TORCHS_OWN = frozenset(vars(nn.Module()))
CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Attributes and buffers are put back after the block.

    Not where the model has changed its weights or made new parts in a pass: its state may say so.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    buffers = [buffer for module in modules for buffer in module._buffers.values() if buffer is not None]
    values, weights = [buffer.clone() for buffer in buffers], _weights(model)
    registered = [(module._buffers, dict(module._buffers)) for module in modules]
    with attributes_kept(model):
        try:
            yield
        finally:
            if _weights(model) == weights:
                for held, before in registered:
                    held.update(before)
                for buffer, value in zip(buffers, values, strict=True):
                    with (
                        torch.no_grad(),
                        suppress(NotImplementedError),
                    ):  # sparse ones: none are compared, or written to
                        if not torch.equal(buffer, value):  # a write of the same values would spoil graphs it is in
                            buffer.copy_(value)


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """What a module and those inside it hold beside torch's own state is put back after the block.

    The contents of containers and of other objects among the attributes, too. Not where weights have changed.
    """
    own = [(m, {name: vars(m)[name] for name in vars(m).keys() - TORCHS_OWN}) for m in module.modules()]
    held = _containers([value for _, attributes in own for value in attributes.values()])
    contents, weights = [copy.copy(container) for container in held], _weights(module)
    try:
        yield
    finally:
        if _weights(module) == weights:
            for inner, attributes in own:
                for name in vars(inner).keys() - TORCHS_OWN - attributes.keys():
                    delattr(inner, name)
                vars(inner).update(attributes)
            for container, before in zip(held, contents, strict=True):
                container.clear()
                container.extend(before) if isinstance(container, (list, deque)) else container.update(before)


def _containers(values: list[Any]) -> list[Any]:
    """All containers among values, those in one another too, and the `vars` of what is an object with attributes."""
    objects = [v for v in values if hasattr(v, "__dict__") and not isinstance(v, (nn.Module, Tensor, type, ModuleType))]
    found: dict[int, Any] = {}
    stack = [*values, *(vars(value) for value in objects if not callable(value))]
    while stack:
        here = stack.pop()
        if type(here) in CONTAINERS and id(here) not in found:
            found[id(here)] = here
            stack += here.values() if isinstance(here, dict) else here
        elif isinstance(here, tuple):
            stack += here
    return list(found.values())


def _weights(module: nn.Module) -> list[tuple[int, int]]:
    """Which modules and parameters there are, and how often each parameter has been written to."""
    modules = [(id(inner), 0) for inner in module.modules()]
    return modules + [(id(p), 0 if p.is_inference() else p._version) for p in module.parameters()]
