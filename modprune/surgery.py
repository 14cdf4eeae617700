"""Taking blocks out of a model, and proving that it still runs.

torch-pruning's dependency graph couples channels and refuses groups that would empty a layer, so the removal itself
is done here: a pass-through under the block's name keeps every other name, and every checkpoint keyed by names, valid.
"""

from __future__ import annotations

import difflib
import operator
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from modprune._depgraph import dependency_graph
from modprune._inputs import call, device_of, evaluating, first_tensor, to_device
from modprune.blocks import find_blocks
from modprune.bypass import PassThrough
from modprune.cost import count_params

_MARK = "modprune"
_ADDS = (operator.add, operator.iadd, torch.add, "add", "add_")


def remove_blocks(
    model: nn.Module, names: Sequence[str], *, kinds: Sequence[str] = (), example_inputs: Any = None
) -> nn.Module:
    """Remove blocks in place: identity blocks become pass-throughs, of transition blocks the shortcut stays.

    Args:
        model: a bare module: not wrapped in DistributedDataParallel, not the result of `torch.compile`.
        names: of the blocks.
        kinds: "identity" or "transition" for each; found out if empty, from `example_inputs` where given, else by
            tracing each block alone.
        example_inputs: if given, one forward pass is run before and after, output shapes and parameter counts are
            compared, and a fresh dependency graph is built.

    Raises:
        ValueError: for unknown or unsuitable names, and wrapped models; the model is as it was.
        RuntimeError: if the pruned model fails the proof; the model is as it was.
    """
    _check(model, names)
    if not kinds:
        kinds = _find_kinds(model, names, example_inputs)
    before = _output_shape(model, example_inputs)
    originals = {name: model.get_submodule(name) for name in names}
    count = count_params(model)
    try:
        for name, kind in zip(names, kinds, strict=True):
            model.set_submodule(name, _replacement(originals[name], kind, name))
        if count_params(model) >= count and names:
            raise RuntimeError("the parameters did not fall")
        after = _output_shape(model, example_inputs)
        if before != after:
            raise RuntimeError(f"the output had shape {before}, now {after}")
    except Exception as error:
        for name, block in originals.items():
            model.set_submodule(name, block)
        if isinstance(error, ValueError):
            raise
        raise RuntimeError(f"removing {', '.join(names)} failed: {error}; the model is as it was") from error
    if example_inputs is not None:
        _rebuild_graph(model, example_inputs)
    return model


def removed_blocks(model: nn.Module) -> dict[str, str]:
    """Names and kinds of the blocks that surgery has taken out of this model, read off the model itself."""
    removed = {}
    for name, module in model.named_modules():
        if isinstance(module, PassThrough):
            removed[name] = "identity"
        elif isinstance(module, fx.GraphModule) and module.meta.get(_MARK) == "transition":
            removed[name] = "transition"
    return removed


def _check(model: nn.Module, names: Sequence[str]) -> None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ValueError(f"the model is wrapped in {type(model).__name__}: pass model.module, then wrap it anew")
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled: pass the module that torch.compile was given, then compile it anew")
    known = dict(model.named_modules())
    gone = removed_blocks(model)
    for name in names:
        if name in gone:
            raise ValueError(f"{name}: already removed from this model")
        if name not in known or not name:
            near = ", ".join(difflib.get_close_matches(name, known, 3)) or "see model.named_modules()"
            raise ValueError(f"{name!r}: {type(model).__name__} has no such block; near: {near}")


def _find_kinds(model: nn.Module, names: Sequence[str], example_inputs: Any) -> list[str]:
    if example_inputs is None:
        return [_kind_by_trace(model.get_submodule(name), name) for name in names]
    blocks = find_blocks(model, example_inputs)
    found = {block.name: block.kind for block in blocks}
    for name in names:
        if name not in found:
            reason = blocks.refused.get(name, "its output is not shortcut(x) + branch(x)")
            raise ValueError(f"{name}: cannot be removed: {reason}")
    return [found[name] for name in names]


def _kind_by_trace(block: nn.Module, name: str) -> str:
    graph = _trace(block, name).graph
    x = next(iter(graph.find_nodes(op="placeholder")))
    return "identity" if x in _last_add(graph, name).args else "transition"


def _replacement(block: nn.Module, kind: str, name: str) -> nn.Module:
    new = PassThrough() if kind == "identity" else _shortcut_only(block, name)
    return new.train(block.training)


def _shortcut_only(block: nn.Module, name: str) -> nn.Module:
    """The block with the sum replaced by its cheaper operand and all that no longer counts erased."""
    traced = _trace(block, name)
    add = _last_add(traced.graph, name)
    sides = [side for side in add.args if isinstance(side, fx.Node)]
    cheaper = min(sides, key=lambda side: _params_behind(side, traced))
    add.replace_all_uses_with(cheaper)
    traced.graph.eliminate_dead_code()
    traced.delete_all_unused_submodules()
    traced.recompile()
    traced.meta[_MARK] = "transition"
    return traced


def _trace(block: nn.Module, name: str) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(block)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{name}: torch.fx cannot trace it ({reason[0]:.80}); give example_inputs") from error


def _last_add(graph: fx.Graph, name: str) -> fx.Node:
    adds = [node for node in graph.nodes if node.op in ("call_function", "call_method") and node.target in _ADDS]
    if not adds:
        raise ValueError(f"{name}: cannot be removed: its output is not shortcut(x) + branch(x)")
    return adds[-1]


def _params_behind(node: fx.Node, traced: fx.GraphModule) -> int:
    seen, stack = {node}, [node]
    while stack:
        for before in stack.pop().all_input_nodes:
            if before not in seen:
                seen.add(before)
                stack.append(before)
    modules = {str(n.target) for n in seen if n.op == "call_module"}
    return sum(count_params(traced.get_submodule(target)) for target in modules)


def _output_shape(model: nn.Module, example_inputs: Any) -> tuple[int, ...] | None:
    if example_inputs is None:
        return None
    with torch.no_grad(), evaluating(model):
        output = first_tensor(call(model, to_device(example_inputs, device_of(model))))
    return None if output is None else tuple(output.shape)


def _rebuild_graph(model: nn.Module, example_inputs: Any) -> None:
    try:
        dependency_graph(model, example_inputs)
    except RuntimeError as error:
        warnings.warn(f"width pruning of the pruned model is not to be trusted: {error}", RuntimeWarning, stacklevel=3)
