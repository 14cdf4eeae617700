"""Taking blocks out of a model, and proving that it still runs.

torch-pruning's dependency graph couples channels and refuses groups that would empty a layer, so the removal itself
is done here: a pass-through under the block's name keeps every other name, and every checkpoint keyed by names, valid.
"""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from modprune._autograd import traceable
from modprune._depgraph import dependency_graph
from modprune._hooks import comparing
from modprune._inputs import batch_size, call, device_of, first_line, first_tensor, opened, tensors_in, to_device
from modprune._probe import differ, filled
from modprune._random import is_untouched, random_state
from modprune._state import evaluating, state_kept
from modprune._trace import MARK, traced_kind, traced_outputs
from modprune.blocks import Block, check_bare, find_blocks
from modprune.bypass import PassThrough, norm_after, stand_ins, swap
from modprune.cost import count_params
from modprune.plan import PruningPlan
from modprune.width import narrow


@torch.inference_mode(False)  # of such tensors, none could be trained
def apply_plan(model: nn.Module, plan: PruningPlan, example_inputs: Any = None) -> nn.Module:
    """Remove the blocks of a plan in place, cut its channels from what stays, and return the model.

    Args:
        model: as for `remove_blocks`, which has the details.
        plan: what goes.
        example_inputs: needed where the plan cuts channels.

    Raises:
        ValueError: for a plan that does not fit the model; RuntimeError: if the pruned model fails its proof. The model
            is as it was.
    """
    blocks = {"kinds": plan.kinds, "outputs": plan.outputs, "example_inputs": example_inputs}
    if not plan.width:
        return remove_blocks(model, plan.remove, **blocks)
    if example_inputs is None:
        raise ValueError("the plan cuts channels too: give example_inputs, which torch-pruning traces the model with")
    before = _shapes(_outputs(model, example_inputs))
    trial = remove_blocks(copy.deepcopy(model), plan.remove, **blocks)
    count = count_params(trial)
    narrow(trial, plan.width, example_inputs)  # what can fail fails on the trial
    problem = _problem(trial, {}, example_inputs, before, count - 1)
    if problem:
        raise RuntimeError(f"cutting channels failed: {problem}; the model is as it was")
    done = removed_blocks(trial)  # proven there: nothing has to be found or proven again
    known = dict(zip(done.remove, zip(done.kinds, done.outputs, strict=True), strict=True))
    kinds, outputs = [known[n][0] for n in plan.remove], [known[n][1] for n in plan.remove]
    remove_blocks(model, plan.remove, kinds=kinds, outputs=outputs)
    narrow(model, plan.width, example_inputs)
    return model


@torch.inference_mode(False)
def remove_blocks(
    model: nn.Module,
    names: Sequence[str],
    *,
    kinds: Sequence[str] = (),
    outputs: Sequence[Sequence[int]] = (),
    example_inputs: Any = None,
) -> nn.Module:
    """Remove blocks in place: identity blocks become pass-throughs, of transition blocks the shortcut stays.

    Of a plain unit, convolution, norm and activation become pass-throughs; an activation that is no module stays.

    Args:
        model: a bare module: not wrapped in DistributedDataParallel, not the result of `torch.compile`.
        names: of the blocks.
        kinds: "identity", "transition" or "plain" for each; without `example_inputs` they are found out by tracing
            each block alone if empty.
        outputs: the form of what each gives back, see `Block.outputs`; found out in the same way if empty.
        example_inputs: if given, `find_blocks` has the word on what can go and how, and the surgery is proven: outputs
            have the shapes they had, and the values they have with the blocks' parameters zero where each gives its
            input back then; and the parameters fell by what the blocks hold. What it does in training mode alone is not
            looked at. A dependency graph is built; where torch-pruning cannot build one, a warning says so.

    Raises:
        ValueError: for unknown or unsuitable names, and wrapped models; the model is as it was.
        RuntimeError: if the pruned model fails the proof; the model is as it was.
    """
    _check(model, names)
    for what, values in (("kinds", kinds), ("outputs", outputs)):
        if values and len(values) != len(names):
            raise ValueError(f"{len(values)} {what} for {len(names)} blocks: give one each, or none")
    if example_inputs is None:
        kinds = kinds or [_kind_by_trace(model, name) for name in names]
        forms = outputs or [_form_by_trace(model, name) for name in names]
        swap(model, _merged([stand_ins(model, *block) for block in zip(names, kinds, forms, strict=True)]))
        return model
    blocks = _choose(model, names, kinds, example_inputs)
    new = [stand_ins(model, block.name, block.kind, block.outputs) for block in blocks]
    before, skipped = _shapes(_outputs(model, example_inputs)), _skipped(model, blocks, new, example_inputs)
    most = count_params(model) - sum(block.params for block in blocks)  # fewer if they share some among themselves
    originals = swap(model, _merged(new))
    if problem := _problem(model, _merged(new), example_inputs, before, most, skipped):
        swap(model, originals)
        culprit = _culprit(model, blocks, new, example_inputs, before) or f"{names[0]} and the others together"
        raise RuntimeError(f"removing {culprit} failed: {problem}; the model is as it was")
    _rebuild_graph(model, example_inputs)
    return model


def removed_blocks(model: nn.Module) -> PruningPlan:
    """The plan that surgery has carried out on this model, read off the model itself."""
    removed = {}
    for name, module in model.named_modules():
        if isinstance(module, PassThrough):
            removed[name] = getattr(module, MARK), module.modprune_outputs
        elif getattr(module, MARK, "") == "transition":
            removed[name] = "transition", ()
    kinds, outputs = zip(*removed.values(), strict=True) if removed else ((), ())
    return PruningPlan(tuple(removed), kinds, outputs)


def _check(model: nn.Module, names: Sequence[str]) -> None:
    check_bare(model)
    if isinstance(names, str):
        raise ValueError(f"names={names!r}: a list of names is needed, as [{names!r}]")
    known = dict(model.named_modules())
    gone = removed_blocks(model).remove
    for name in names:
        if name in gone:
            raise ValueError(f"{name}: already removed from this model")
        if name not in known or not name:
            near = ", ".join(difflib.get_close_matches(str(name), known, 3)) or "see model.named_modules()"
            raise ValueError(f"{name!r}: {type(model).__name__} has no such block; near: {near}")
    nested = [(inner, outer) for inner in names for outer in names if inner.startswith(outer + ".")]
    if nested or len(set(names)) < len(names):
        twice = nested[0][0] if nested else next(name for name in names if list(names).count(name) > 1)
        raise ValueError(f"{twice}: named more than once, or inside another block that goes")


def _choose(model: nn.Module, names: Sequence[str], kinds: Sequence[str], example_inputs: Any) -> list[Block]:
    blocks = find_blocks(model, example_inputs)
    found = {block.name: block for block in blocks}
    for name, kind in zip(names, kinds or [""] * len(names), strict=True):
        if name not in found:
            reason = blocks.refused.get(name, "its output is not shortcut(x) + branch(x)")
            raise ValueError(f"{name}: cannot be removed: {reason}; find_blocks lists what can")
        if kind and kind != found[name].kind:
            raise ValueError(f"{name}: the plan says {kind}, but here it is of kind {found[name].kind}")
    return [found[name] for name in names]


def _merged(parts: Sequence[dict[str, nn.Module]]) -> dict[str, nn.Module]:
    return {name: module for part in parts for name, module in part.items()}


def _skipped(
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
    others = _merged([parts for block, parts in zip(blocks, new, strict=True) if not block.exact])
    changed: set[str] = set()

    def look(name: str, x: Tensor, y: Tensor) -> None:
        if not torch.equal(x, y):
            changed.add(name)

    with ExitStack() as stack:
        stack.callback(swap, model, swap(model, others))
        modules = {name: model.get_submodule(name) for name in going}
        for module in modules.values():
            stack.enter_context(filled(module, 0))
        stack.enter_context(comparing({name: (module, module) for name, module in modules.items()}, look))
        with torch.no_grad(), evaluating(model), state_kept(model):
            dice = random_state(None)
            try:
                made = _run(model, example_inputs)
            except Exception:  # of the others, and said when all have gone
                return []
    if changed:
        inexact = [replace(block, exact=block.exact and block.name not in changed) for block in blocks]
        return _skipped(model, inexact, new, example_inputs)
    return made if is_untouched(dice) else []


def _problem(
    model: nn.Module,
    new: Mapping[str, nn.Module],
    example_inputs: Any,
    before: list[tuple[int, ...]],
    most: int,
    skipped: Sequence[Tensor] = (),
) -> str:
    """What is wrong with a pruned model that has `new` in the blocks' places; empty if nothing is."""
    passed: dict[str, tuple[Tensor | None, int]] = {}

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if module is not new[name]:
            return  # the block itself, whose hooks it has
        x = first_tensor((args, kwargs))
        passed[name] = (x, x._version) if x is not None and x is first_tensor(out) else (None, 0)

    with ExitStack() as hooks:
        for name, module in new.items():
            hooks.enter_context(module.register_forward_hook(partial(look, name), with_kwargs=True))
        try:
            outputs = _outputs(model, example_inputs)
        except Exception as error:
            return first_line(error)
    after, count = _shapes(outputs), count_params(model)
    if not _alike(before, after, batch_size(example_inputs)):
        return f"the output had shape {before}, now {after}"
    if count > most:
        return f"{count:,} parameters are left where {most:,} at most were expected"
    if past := [name for name in new if name not in passed]:
        return f"{past[0]} is not called by that name: hold it in a ModuleList or as an attribute alone"
    written = [name for name, (x, version) in passed.items() if x is not None and x._version != version]
    if written and not _is_harmless(model, [new[name] for name in written], example_inputs, outputs):
        return f"a layer writes in place into what now goes through {written[0]}: make it one that does not"
    if skipped and not _same(outputs, skipped):
        return "the output is not that of skipped blocks: some part of the network looks at them or at what they hold"
    return ""


def _is_harmless(model: nn.Module, passing: Sequence[nn.Module], example_inputs: Any, outputs: list[Tensor]) -> bool:
    """Whether the outputs are those with copies passed on, and gradients can be had."""

    def copied(module: nn.Module, args: Any, out: Any) -> Any:
        return torch.utils._pytree.tree_map_only(Tensor, Tensor.clone, out)

    with ExitStack() as hooks:
        for module in passing:
            hooks.enter_context(module.register_forward_hook(copied))
        same = all(map(torch.equal, outputs, _outputs(model, example_inputs)))
    try:
        with traceable(model):
            made = _run(model, example_inputs)
            sums = [tensor.sum() for tensor in made if tensor.requires_grad]
            torch.autograd.grad(sums, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    except RuntimeError:
        return False
    return same


def _same(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether outputs have those values; of what is found or counted, which ties may turn, nothing is said."""
    if not all(tensor.is_floating_point() for tensor in outputs) or _shapes(outputs) != _shapes(expected):
        return True
    return not any(map(differ, outputs, expected))


def _alike(before: list[tuple[int, ...]], after: list[tuple[int, ...]], batch: int) -> bool:
    """Whether shapes are the same, but for how many things were found: a detector finds as many as it finds."""
    pairs = list(zip(before, after, strict=False))
    same = len(before) == len(after) and all(len(a) == len(b) and a[1:] == b[1:] for a, b in pairs)
    return same and all(a[:1] == b[:1] or a[0] != batch for a, b in pairs)


def _culprit(
    model: nn.Module,
    blocks: Sequence[Block],
    new: Sequence[dict[str, nn.Module]],
    example_inputs: Any,
    before: list[tuple[int, ...]],
) -> str:
    """The name of the first block that cannot go even alone; empty if each can."""
    for block, parts in zip(blocks, new, strict=True):
        skipped = _skipped(model, [block], [parts], example_inputs)
        originals = swap(model, parts)
        broken = _problem(model, parts, example_inputs, before, count_params(model), skipped)
        swap(model, originals)
        if broken:
            return block.name
    return ""


def _shapes(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors]


def _outputs(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    with torch.no_grad(), evaluating(model), state_kept(model):
        return _run(model, example_inputs)


def _run(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    return list(tensors_in(opened(call(model, to_device(example_inputs, device_of(model))))))


def _rebuild_graph(model: nn.Module, example_inputs: Any) -> None:
    """Warn where torch-pruning cannot follow the pruned model: depth pruning stands all the same."""
    try:
        dependency_graph(model, example_inputs)
    except RuntimeError as error:
        warnings.warn(f"width pruning of the pruned model is not to be trusted: {error}", RuntimeWarning, stacklevel=3)


def _kind_by_trace(model: nn.Module, name: str) -> str:
    try:
        kind = "plain" if norm_after(model, name) else traced_kind(model.get_submodule(name))
    except ValueError as error:
        raise ValueError(f"{name}: {error}; give example_inputs, or kinds") from None
    if not kind:
        what = "its output is not shortcut(x) + branch(x), as far as torch.fx can tell; give example_inputs, or kinds"
        raise ValueError(f"{name}: cannot be removed: {what}")
    if kind == "plain" and _has_shortcut(model, name):
        raise ValueError(f"{name}: cannot be removed: it is a part of a block with a shortcut; give that one's name")
    return kind


def _form_by_trace(model: nn.Module, name: str) -> tuple[int, ...]:
    try:
        return traced_outputs(model.get_submodule(name))
    except ValueError as error:
        raise ValueError(
            f"{name}: cannot be removed: {error}; give example_inputs, which tell what it is for"
        ) from None


def _has_shortcut(model: nn.Module, name: str) -> bool:
    """Whether a module around this one is residual, as far as torch.fx can tell."""
    while "." in name:
        name = name.rpartition(".")[0]
        with suppress(ValueError):
            if traced_kind(model.get_submodule(name)):
                return True
    return False
