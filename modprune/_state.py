"""A model left as found: its modes, and what a forward pass leaves in it."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from modprune._inputs import first_line, has_gradients
from modprune._random import TORCHS_OWN, own_state, set_own_state, undisturbed

CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Every module's own mode, training or not, is put back after the block.

    By `train`, which may do more than note it: layers of low rank take their product out of the weights again.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            if module.training != mode:
                module.train(mode)  # from the outside in: what it does to those inside is put right after it
                module.training = mode


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention layers without the fast path of inference inside the block."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode inside the block; every module's own mode and the random numbers are put back after it.

    Attention goes without torch's fast path, which hands nested tensors from layer to layer: hooks cannot read them.
    """
    with modes_kept(model), plain_attention(), undisturbed(None):
        if any(module.training for module in model.modules()):
            model.eval()
        yield model


def copied(model: nn.Module) -> nn.Module:
    """A copy to try things on: modules and buffers of its own, parameters of its own that hold the model's values.

    A large model need not fit twice. What cuts layers or zeroes them puts other values in the place of these.
    """
    plain = [p for p in model.parameters() if type(p) is nn.Parameter and type(p.data) is torch.Tensor]
    shared = {id(p): nn.Parameter(p.data, p.requires_grad) for p in plain if not p.is_inference()}
    return deep_copied(model, shared)


def deep_copied(model: nn.Module, shared: dict[int, Any] | None = None) -> nn.Module:
    """A copy, but for what is shared, by `id`; ValueError, which says what to do, if there can be none."""
    try:
        return copy.deepcopy(model, shared)
    except RuntimeError as error:
        raise ValueError(
            f"the {type(model).__name__} given cannot be copied ({first_line(error):.80}): it can with "
            "torch.nn.utils.parametrizations in the place of hooks such as weight_norm, and without masks of "
            "torch.nn.utils.prune (prune.remove makes them last)"
        ) from None


@contextmanager
def state_kept(model: nn.Module) -> Iterator[None]:
    """Buffers, attributes, what containers among them hold and generators are put back after the block.

    Not where the model has changed its weights, or made new ones or hooks, in a pass: its state may say so.
    """
    own = [(m, {name: vars(m)[name] for name in vars(m).keys() - TORCHS_OWN}) for m in model.modules()]
    held = _containers([value for _, attributes in own for value in attributes.values()])
    held += [m._buffers for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    contents, made = [copy.copy(container) for container in held], _made(model)
    drawn = own_state(model)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if not is_lazy(buffer)]
    try:
        yield
    finally:
        if _made(model) == made:
            for module, attributes in own:
                for name in vars(module).keys() - TORCHS_OWN - attributes.keys():
                    del vars(module)[name]
                vars(module).update(attributes)
            for container, before in zip(held, contents, strict=True):
                container.clear()
                container.extend(before) if isinstance(container, (list, deque)) else container.update(before)
            if drawn:
                set_own_state(drawn, model)
            for buffer, value in buffers:
                with torch.no_grad(), suppress(NotImplementedError):  # sparse ones: none are compared, or written to
                    if not torch.equal(buffer, value):  # a write of the same values would spoil graphs it is in
                        buffer.copy_(value)


@contextmanager
def traceable(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode with gradients for all it holds.

    Modes, RNG state, `requires_grad`, buffers and attributes are restored: a module that has cached a tensor with a
    graph could not be copied.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and has_gradients(p)]
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model), state_kept(model):
            for parameter in frozen:
                parameter.requires_grad_(True)
            yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _containers(values: list[Any]) -> list[Any]:
    """All containers among values and in one another; of plain objects, the dict of their attributes."""
    found: list[Any] = []
    seen: set[int] = set()
    stack = list(values)
    while stack:
        here = stack.pop()
        if isinstance(here, SimpleNamespace) or (is_dataclass(here) and not isinstance(here, type)):
            here = getattr(here, "__dict__", ())
        if id(here) in seen or not (type(here) in CONTAINERS or isinstance(here, tuple)):
            continue
        seen.add(id(here))
        stack += here.values() if isinstance(here, dict) else here
        if not isinstance(here, tuple):
            found.append(here)
    return found


def _made(model: nn.Module) -> list[tuple[int, int]]:
    """Which parameters and hooks there are, and how often each parameter has been written to."""
    hooks = [(id(m), len(m._forward_hooks) + len(m._forward_pre_hooks)) for m in model.modules()]
    written = [(id(p), -1 if is_lazy(p) else 0 if p.is_inference() else p._version) for p in model.parameters()]
    return [hooked for hooked in hooks if hooked[1]] + written
