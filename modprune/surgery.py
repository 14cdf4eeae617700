"""Taking blocks out of a model, and proving that it still runs.

torch-pruning's dependency graph couples channels and refuses groups that would empty a layer, so the removal itself
is done here: a pass-through under the block's name keeps every other name, and every checkpoint keyed by names, valid.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from modprune._bare import check_bare, check_shaped
from modprune._depgraph import dependency_graph
from modprune._proof import Seen, problem_with, seen_of, skipped_outputs
from modprune._state import copied
from modprune._trace import MARK, traced_kind, traced_outputs
from modprune.blocks import Block, find_blocks
from modprune.bypass import PassThrough, merged, norm_after, stand_ins, swap, swapped
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
    before = seen_of(model, example_inputs)
    trial = remove_blocks(copied(model), plan.remove, **blocks)
    count = count_params(trial)
    narrow(trial, plan.width, example_inputs)  # what can fail fails on the trial
    problem = problem_with(trial, {}, example_inputs, before, count - 1)
    if problem:
        layers = ", ".join(name for name, _ in plan.width)
        advice = "cut only channels that no shortcut and no output carries"
        raise RuntimeError(f"cutting channels of {layers:.60} failed: {problem}; the model is as it was; {advice}")
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

    Of a plain unit, convolution, norm and activation become pass-throughs; an activation that is no module stays. A
    branch gives zeros, and the code that adds them stays.

    Args:
        model: a bare module: not wrapped in DistributedDataParallel, not the result of `torch.compile`.
        names: of the blocks.
        kinds: of each, see `Block.kind`; without `example_inputs` they are found out by tracing each block alone if
            empty, which tells nothing of a branch.
        outputs: the form of what each gives back, see `Block.outputs`; found out in the same way if empty.
        example_inputs: if given, `find_blocks` has the word on what can go and how, and the surgery is proven: outputs
            have the shapes they had, and the values they have with the blocks' parameters zero where each gives its
            input back then; the parameters fell by what the blocks hold; and nothing writes in place, in training
            neither, into what a pass-through hands on and others read. What else it does in training mode alone is not
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
        for name in names:
            check_shaped(model.get_submodule(name), name)
        kinds = kinds or [_kind_by_trace(model, name) for name in names]
        forms = outputs or [_form_by_trace(model, name) for name in names]
        swap(model, merged([stand_ins(model, *block) for block in zip(names, kinds, forms, strict=True)]))
        return model
    blocks = _choose(model, names, kinds, example_inputs)
    new = [stand_ins(model, block.name, block.kind, block.outputs) for block in blocks]
    before = seen_of(model, example_inputs)
    skipped = skipped_outputs(model, blocks, new, example_inputs)
    most = count_params(model) - sum(block.params for block in blocks)  # fewer if they share some among themselves
    whole = merged(new)
    with swapped(model, whole):
        problem = problem_with(model, whole, example_inputs, before, most, skipped)
    if problem:
        culprit = _culprit(model, blocks, new, example_inputs, before) or f"{names[0]} and the others together"
        raise RuntimeError(f"removing {culprit} failed: {problem}; the model is as it was; leave it out")
    swap(model, whole)
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
            near = ", ".join(difflib.get_close_matches(str(name), known, 3))
            see = f"near: {near}" if near else "see model.named_modules()"
            raise ValueError(f"{name!r}: {type(model).__name__} has no such block; {see}")
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


def _culprit(
    model: nn.Module,
    blocks: Sequence[Block],
    new: Sequence[dict[str, nn.Module]],
    example_inputs: Any,
    before: Seen,
) -> str:
    """The name of the first block that cannot go even alone; empty if each can."""
    whole = count_params(model)
    for block, parts in zip(blocks, new, strict=True):
        skipped = skipped_outputs(model, [block], [parts], example_inputs)
        with swapped(model, parts):
            if problem_with(model, parts, example_inputs, before, whole - block.params, skipped):
                return block.name
    return ""


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
