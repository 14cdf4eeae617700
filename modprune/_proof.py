"""The proof of a surgery: what the network gave with its blocks skipped, and what is wrong now that they are gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from modprune._hooks import comparing, copying
from modprune._inputs import (
    batch_size,
    call,
    device_of,
    first_line,
    first_tensor,
    has_gradients,
    opened,
    tensors_in,
    to_device,
)
from modprune._probe import differ, filled
from modprune._random import is_untouched, random_state
from modprune._state import evaluating, state_kept, traceable
from modprune.blocks import Block
from modprune.bypass import merged, swapped
from modprune.cost import count_params


class Seen(NamedTuple):
    """What a proof has seen of the whole model: the shapes of its outputs, and whether it writes into its inputs."""

    shapes: list[tuple[int, ...]]
    writes: bool


def seen_of(model: nn.Module, example_inputs: Any) -> Seen:
    """What the proof has to know of a model before its surgery."""
    given: list[tuple[Tensor, int]] = []

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        given.extend((tensor, _writes(tensor)) for tensor in tensors_in((args, kwargs)))

    with model.register_forward_pre_hook(start, with_kwargs=True):
        shapes = shapes_of(outputs_of(model, example_inputs))
    return Seen(shapes, any(_writes(tensor) != version for tensor, version in given))


def skipped_outputs(
    model: nn.Module, blocks: Sequence[Block], new: Sequence[dict[str, nn.Module]], example_inputs: Any
) -> list[Tensor]:
    """What the model gives with the parameters of these blocks zero, where that is to skip them, else with `new`.

    A block that ends with an activation is skipped so only as long as what goes into it has been through one, which
    may be at the end of a block that goes too. Nothing where it cannot be compared: layers are shared with blocks that
    stay, or the model rolls dice.
    """
    going = {block.name: set(model.get_submodule(block.name).modules()) for block in blocks if block.exact}
    inside = set[nn.Module]().union(*going.values())
    shared = any(
        module in inside and not any(f"{name}.".startswith(f"{block}.") for block in going)
        for name, module in model.named_modules(remove_duplicate=False)
    )
    if shared or not going:
        return []
    others = merged([parts for block, parts in zip(blocks, new, strict=True) if not block.exact])
    changed: set[str] = set()

    def look(name: str, x: Tensor, y: Tensor) -> None:
        if not torch.equal(x, y):
            changed.add(name)

    with ExitStack() as stack:
        stack.enter_context(swapped(model, others))
        modules = {name: model.get_submodule(name) for name in going}
        for module in modules.values():
            stack.enter_context(filled(module, 0))
        stack.enter_context(comparing({name: (module, module) for name, module in modules.items()}, look))
        with torch.no_grad(), evaluating(model), state_kept(model):
            dice = random_state(model)
            try:
                made = _run(model, example_inputs)
            except Exception:  # of the others, and said when all have gone
                return []
            comparable = is_untouched(dice, model)  # before they are put back
    if changed:
        inexact = [replace(block, exact=block.exact and block.name not in changed) for block in blocks]
        return skipped_outputs(model, inexact, new, example_inputs)
    return made if comparable else []


def problem_with(
    model: nn.Module,
    new: Mapping[str, nn.Module],
    example_inputs: Any,
    before: Seen,
    most: int,
    skipped: Sequence[Tensor] = (),
) -> str:
    """What is wrong with a pruned model that has `new` in the blocks' places; empty if nothing is."""
    with _watching(model, new) as (passed, inputs), _dropping(model, 1):
        try:
            outputs = outputs_of(model, example_inputs)
        except Exception as error:
            return first_line(error)
    after, count = shapes_of(outputs), count_params(model)
    if not _alike(before.shapes, after, batch_size(example_inputs)):
        return f"the output had shape {before.shapes}, now {after}"
    if count > most:
        return f"{count:,} parameters are left where {most:,} at most were expected"
    if past := [name for name in new if name not in passed]:
        return f"{past[0]} is not called by that name: hold it in a ModuleList or as an attribute alone"
    written = {name: x for name, (x, version) in passed.items() if x is not None and _writes(x) != version}
    is_input = not before.writes and any(_memory(x) in inputs for x in written.values())
    if is_input or (written and not _is_harmless(model, [new[name] for name in written], example_inputs)):
        return f"a layer writes in place into what now goes through {next(iter(written))}: make it one that does not"
    if skipped and not _same(outputs, skipped):
        return "the output is not that of skipped blocks: some part of the network looks at them or at what they hold"
    return ""


@contextmanager
def _watching(
    model: nn.Module, new: Mapping[str, nn.Module]
) -> Iterator[tuple[dict[str, tuple[Tensor | None, int]], set[int]]]:
    """What goes through the modules that are new, by name, with how often it, or a view of it, was written to before.

    What comes out of them where that is in another memory. And the memory of what the model is given.
    """
    passed: dict[str, tuple[Tensor | None, int]] = {}
    inputs: set[int] = set()

    def look(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is new[name]:  # not the block itself, whose hooks it has
            x = first_tensor((args, kwargs))
            passed[name] = (x, 0 if x is None else _writes(x))

    def after(name: str, module: nn.Module, args: Any, out: Any) -> None:
        x, version = passed[name] if module is new[name] else (None, 0)
        if x is not None and _writes(x) == version and _memory(x) not in map(_memory, tensors_in(out)):
            y = first_tensor(out)
            passed[name] = (y, 0 if y is None else _writes(y))

    def start(module: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.update(map(_memory, tensors_in((args, kwargs))))

    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(start, with_kwargs=True))
        for name, module in new.items():
            hooks.enter_context(module.register_forward_pre_hook(partial(look, name), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(after, name)))
        yield passed, inputs


@contextmanager
def _dropping(model: nn.Module, factor: float) -> Iterator[None]:
    """Dropout in place writes in eval mode too, as it does in training: `factor` times what there is."""

    def write(module: nn.Module, args: Any, kwargs: Any) -> None:
        if (x := first_tensor((args, kwargs))) is not None:
            x.mul_(factor)

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, _DropoutNd) and module.inplace and module.p:
                hooks.enter_context(module.register_forward_pre_hook(write, with_kwargs=True))
        yield


def _writes(tensor: Tensor) -> int:
    """How often a tensor, or a view of it, has been written to; those of inference mode do not count it."""
    return 0 if tensor.is_inference() else tensor._version


def _memory(tensor: Tensor) -> int:
    """The same number for views of one tensor."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _is_harmless(model: nn.Module, passing: Sequence[nn.Module], example_inputs: Any) -> bool:
    """Whether the outputs are those with copies passed on, and gradients can be had."""
    with _dropping(model, 0.5):
        try:
            with _noise_in(passing):
                outputs = outputs_of(model, example_inputs)
                with copying(passing):
                    expected = outputs_of(model, example_inputs)
            with traceable(model):
                made = _run(model, example_inputs)
                sums = [tensor.sum() for tensor in made if tensor.requires_grad]
                torch.autograd.grad(sums, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
        except Exception:
            return False
    return all(torch.equal(y.nan_to_num(), x.nan_to_num()) for y, x in zip(outputs, expected, strict=True))


@contextmanager
def _noise_in(modules: Sequence[nn.Module]) -> Iterator[None]:
    """What goes into these modules is noise, for everybody: what a layer writes into zeros is often zero again."""

    def write(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = first_tensor((args, kwargs))
        if x is not None and x.is_floating_point():
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0), device="cpu"))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(write, with_kwargs=True))
        yield


def _same(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether outputs have those values; of what is found or counted, which ties may turn, nothing is said."""
    if not all(map(has_gradients, outputs)) or shapes_of(outputs) != shapes_of(expected):
        return True
    return not any(map(differ, outputs, expected))


def _alike(before: list[tuple[int, ...]], after: list[tuple[int, ...]], batch: int) -> bool:
    """Whether shapes are the same, but for how many things were found: a detector finds as many as it finds."""
    pairs = list(zip(before, after, strict=False))
    same = len(before) == len(after) and all(len(a) == len(b) and a[1:] == b[1:] for a, b in pairs)
    return same and all(a[:1] == b[:1] or a[0] != batch for a, b in pairs)


def shapes_of(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def outputs_of(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with torch.no_grad(), evaluating(model), state_kept(model):
        return _run(model, example_inputs)


def _run(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    output = opened(call(model, to_device(example_inputs, device_of(model))))
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
