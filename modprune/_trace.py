"""A block traced alone by torch.fx: whether it is residual, and its shortcut without the branch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from modprune._inputs import first_line, map_tensors
from modprune._state import evaluating, state_kept
from modprune.cost import counted_flops

MARK = "modprune_kind"
# What a shortcut may pass through in a traced block; the autograd names in `_autograd` say the same of a run one.
_SUMS = ("add", "iadd", "add_")
_FIRST = ("sub", "isub", "sub_", "addcmul", "addcmul_")  # of which the first operand alone goes in as it is
_FACTORS = ("mul", "imul", "mul_", "truediv", "itruediv", "div", "div_")
_SILENT = (
    *("relu", "relu_", "relu6", "gelu", "silu", "hardswish", "hardtanh", "leaky_relu", "elu", "mish", "softplus"),
    *("view", "reshape", "flatten", "permute", "transpose", "swapaxes", "contiguous", "roll"),
    *("squeeze", "unsqueeze", "to", "dropout", "stochastic_depth", "tanh", "celu"),
    *("clamp", "clamp_", "threshold", "prelu", "clone", "float", "double", "half", "bfloat16", "type", "type_as"),
)
_SILENT_LAYERS = (
    *(nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.ELU, nn.Mish, nn.Softplus),
    *(nn.PReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten),
    *(nn.Tanh, nn.CELU),
)
_NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm")
_NORM_LAYERS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _BatchNorm)
# What is asked of a value other than its values.
_QUESTIONS = ("size", "shape", "dim", "ndim", "ndimension", "dtype", "device", "numel", "element_size", "stride")


def shortcut_only(block: nn.Module) -> fx.GraphModule:
    """The block with its sum replaced by the cheaper operand and all that no longer counts left out.

    Raises:
        ValueError: if torch.fx cannot trace the block or it does not end in a sum of two values made from its input.
    """
    with state_kept(block):
        graph, total, side = _shortcut(block)
        total.replace_all_uses_with(_handed_on(total, side, block))
        kept = _lean(block, graph)
    for inner, module in kept.named_modules():
        module.training = block.get_submodule(inner).training
    lasting = {name: value for name, value in notes(block).items() if not hasattr(kept, name)} | {MARK: "transition"}
    set_lasting(kept, lasting)
    return kept


def traced_and_run(block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any, Any, int]:
    """What a traced block gives for arguments, its shortcut within it, and its shortcut when nothing else is run.

    And the floating-point operations of the latter.

    Raises:
        ValueError: as `shortcut_only`.
    """
    again, kwagain = map_tensors(Tensor.clone, (args, kwargs))
    with state_kept(block):
        graph, total, side = _shortcut(block)
        with graph.inserting_after(side):
            noted = graph.call_method("clone", (side,))
        output = graph.output_node()
        whole = output.args[0]
        output.args = ((whole, noted),)
        made, within = fx.GraphModule(block, graph).forward(*args, **kwargs)  # called, it would print errors
        output.args = ((noted, whole),)  # as it was: what comes after the sum may write into it
        total.replace_all_uses_with(side)
        lean = _lean(block, graph)
        with counted_flops() as counter:
            alone, _ = lean.forward(*again, **kwagain)
        return made, within, alone, counter.total


def _handed_on(total: fx.Node, side: fx.Node, block: nn.Module) -> fx.Node:
    """The shortcut; a copy of it where what comes after the sum writes into it, and its own gradient may need it.

    That of a sum needs no result, nor does that of a norm or a convolution; that of an activation does.
    """
    last = block.get_submodule(str(side.target)) if side.op == "call_module" else None
    while isinstance(last, nn.Sequential) and len(last):
        last = last[-1]
    if isinstance(last, (*_NORM_LAYERS, _ConvNd)) or not any(_writes(node, block) for node in total.users):
        return side
    with total.graph.inserting_after(side):
        return total.graph.call_method("clone", (side,))


def _lean(block: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A traced block without what does not count for its output."""
    whole = fx.GraphModule(block, graph)
    whole.graph.eliminate_dead_code(lambda node: node.is_impure() and node.target is not torch._assert)
    return fx.GraphModule(whole, whole.graph, class_name=type(block).__name__)  # copies what the graph names


def set_lasting(module: nn.Module, values: dict[str, Any]) -> None:
    """Attributes of a module that copies of it keep."""
    for name, value in values.items():
        setattr(module, name, value)
    if isinstance(module, fx.GraphModule):  # whose copies keep what stands there, while pickle keeps attributes
        module.meta.setdefault(_USER_PRESERVED_ATTRIBUTES_KEY, {}).update(values)


def notes(block: nn.Module) -> dict[str, Any]:
    """Plain attributes (numbers, texts) of a block, of its classes and of its sub-modules: some networks steer by them.

    As in `layers[0].self_attn.batch_first`.
    """
    classes = type(block).__mro__[: type(block).__mro__.index(nn.Module)]
    values = {name: value for one in reversed(classes) for name, value in vars(one).items()} | vars(block)
    plain = {name: value for name, value in values.items() if _is_plain(value)}
    inside = {name: SimpleNamespace(**notes(child)) for name, child in block.named_children()}
    return {name: value for name, value in (plain | inside).items() if not name.startswith("_")}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (int, float, str, type(None)))


def shortcut_parameters(block: nn.Module) -> set[int]:
    """The parameters, by `id`, that `shortcut_only` would keep; its errors."""
    with state_kept(block):
        graph, total, side = _shortcut(block)
        return set(_params_of(_staying(graph, total, side), block))


def traced_kind(block: nn.Module) -> str:
    """What kind a block is, by torch.fx from it alone: "identity", "transition", or "" if neither.

    Raises:
        ValueError: if torch.fx cannot trace the block.
    """
    with state_kept(block):
        kinds = [
            "identity" if _has_identity_path(graph, block) else "transition" if _last_sum(graph, block)[0] else ""
            for graph in _graphs(block)
        ]
    return "identity" if "identity" in kinds else next(filter(None, kinds), "")  # seen in the deeper trace alone


def traced_outputs(block: nn.Module) -> tuple[int, ...]:
    """The form of what a block gives back, as `PassThrough` takes it, by torch.fx; empty if it cannot trace the block.

    Raises:
        ValueError: if the block gives back something besides that is made in it, which others may use.
    """
    try:
        with state_kept(block):
            graph = next(_graphs(block))
    except ValueError:
        return ()  # most blocks that torch.fx cannot trace give a tensor; with example inputs there is no guess
    value, arguments = graph.output_node().args[0], list(graph.find_nodes(op="placeholder"))
    if not isinstance(value, tuple):
        return ()
    if any(isinstance(item, fx.Node) and item not in arguments for item in value[1:]):
        raise ValueError("it gives back a second value that is made in it")
    return 0, *(arguments.index(item) if item in arguments else -1 for item in value[1:])


def _shortcut(block: nn.Module) -> tuple[fx.Graph, fx.Node, fx.Node]:
    """The graph of a block, the sum that ends it, and that operand of it which has fewer parameters behind it."""
    for graph in _graphs(block):
        total, sides = _last_sum(graph, block)
        if total is not None:
            held = [_params_of(_behind(side, values=True), block) for side in sides]
            costs = [sum(sizes.values()) for sizes in held]
            if costs[0] == costs[1] and held[0] != held[1]:
                raise ValueError("both sides of its sum hold as many parameters, so none is the shortcut")
            side = sides[costs.index(min(costs))]
            kept = _staying(graph, total, side)
            if _params_of(_behind(side), block).keys() != _params_of(_behind(side, values=True), block).keys():
                raise ValueError("its shortcut asks its branch for a shape")
            if any(_asks_for_mode(node) for node in kept):
                raise ValueError(
                    "its shortcut calls a function such as dropout with the mode of the moment, which a trace fixes: "
                    "use a module for it"
                )
            return graph, total, side
    raise ValueError("its output is not shortcut(x) + branch(x)")


def _staying(graph: fx.Graph, total: fx.Node, side: fx.Node) -> set[fx.Node]:
    """What a block, and all else that it gives back, is made from once one side of its sum stands for the sum."""
    return _behind(graph.output_node(), stop=total) | _behind(side)


class _Deep(fx.Tracer):
    """Looks down to torch's own layers, and into a decorated forward, whose arguments fx cannot tell."""

    def create_args_for_root(self, root_fn: Any, *args: Any, **kwargs: Any) -> Any:
        return super().create_args_for_root(inspect.unwrap(root_fn), *args, **kwargs)


class _Shallow(_Deep):
    """Looks into the block alone: what its sub-modules do inside is theirs, and often cannot be traced."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _graphs(block: nn.Module) -> Iterator[fx.Graph]:
    """The block traced with its sub-modules as they are, then, where it can be, down to torch's own layers."""
    if "forward" in vars(block):
        raise ValueError("torch.fx cannot trace it (its forward is set on the module itself)")
    problems = []
    for tracer in (_Shallow(autowrap_modules=()), _Deep()):  # to wrap `math` takes as long as the trace
        try:
            with evaluating(block):  # in training a block may go other ways
                graph = tracer.trace(block)
        except Exception as error:
            problems.append(first_line(error))
        else:
            yield graph
    if len(problems) == 2:
        raise ValueError(f"torch.fx cannot trace it ({problems[0]:.80})")


def _has_identity_path(graph: fx.Graph, block: nn.Module) -> bool:
    """Whether the output is the input plus something learned, but for activations, changes of layout and norms after.

    As `identity_path` has it of a block that has run.
    """
    x, seen, stack = _input(graph), set(), [(_output(graph), False, False)]
    while stack:
        step = node, added, normed = stack.pop()
        if node is x and added and not normed:
            return True
        if step in seen:
            continue
        seen.add(step)
        sides = node.all_input_nodes
        for side in _operands(node) or _first(node):
            other = set().union(*(_behind(beside) for beside in sides if beside is not side))
            stack.append((side, added or (x in other and bool(_params_of(other, block))), False))
        if (norm := _is_norm(node, block)) or _is_silent(node, block):
            stack.append((node.all_input_nodes[0], added, normed or norm))
    return False


def _last_sum(graph: fx.Graph, block: nn.Module) -> tuple[fx.Node | None, list[fx.Node]]:
    """The sum that ends the block, but for what `last_sum` passes over too, and its operands, both made from x."""
    node = _output(graph)
    while inner := node.all_input_nodes[0] if _is_silent(node, block) else _scaled(node, block):
        node = inner
    sides = _operands(node)
    return (node, sides) if sides and all(_input(graph) in _behind(side) for side in sides) else (None, [])


def _input(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op == "placeholder")


def _output(graph: fx.Graph) -> fx.Node:
    return graph.output_node().all_input_nodes[0]


def _operation(node: fx.Node) -> str:
    """The name of the function or method that a node calls; empty for other nodes."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _operands(node: fx.Node) -> list[fx.Node]:
    """The two operands of a sum; none for anything else."""
    if _operation(node) not in _SUMS or "alpha" in node.kwargs:
        return []
    sides = [side for side in (*node.args, *node.kwargs.values()) if isinstance(side, fx.Node)]
    return sides if len(sides) == 2 else []


def _first(node: fx.Node) -> list[fx.Node]:
    """The operand that goes into a sum as it is where the others do not: `a - b`, `a + alpha * b`, `a + b * c`."""
    scaled = _operation(node) in _FIRST or (_operation(node) in _SUMS and "alpha" in node.kwargs)
    return [side for side in node.args[:1] if scaled and isinstance(side, fx.Node)]


def _is_norm(node: fx.Node, block: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(block.get_submodule(str(node.target)), _NORM_LAYERS)
    return _operation(node) in _NORMS


def _is_silent(node: fx.Node, block: nn.Module) -> bool:
    if node.op == "call_module":
        module = block.get_submodule(str(node.target))
        return all(isinstance(m, _SILENT_LAYERS) for m in (module if isinstance(module, nn.Sequential) else [module]))
    if _operation(node) in _SUMS:
        return sum(isinstance(side, fx.Node) for side in node.args) == 1 and not node.kwargs  # of a number
    return _operation(node) in _SILENT


def _scaled(node: fx.Node, block: nn.Module) -> fx.Node | None:
    """What a node multiplies by something fixed, or divides by it; None if it does not."""
    if _operation(node) not in _FACTORS or node.kwargs:
        return None
    behind = {side: _behind(side) for side in node.args if isinstance(side, fx.Node)}
    made = [side for side, nodes in behind.items() if _input(node.graph) in nodes or _params_of(nodes, block)]
    return made[0] if len(made) == 1 and ("mul" in _operation(node) or made[0] is node.args[0]) else None


def _writes(node: fx.Node, block: nn.Module) -> bool:
    """Whether a node writes into what it is given."""
    if node.op == "call_module":
        return any(getattr(module, "inplace", False) for module in block.get_submodule(str(node.target)).modules())
    told = bool(node.kwargs.get("inplace")) or any(value is True for value in node.args)
    return told or _operation(node).endswith("_")  # `+=` is traced as a sum of its own


def _asks_for_mode(node: fx.Node) -> bool:
    """Whether a node calls a function that does other things in training."""
    if node.op != "call_function" or not callable(node.target):
        return False
    try:
        return "training" in inspect.signature(node.target).parameters
    except ValueError:  # of torch's own in C++, none of which asks
        return False


def _behind(node: fx.Node, values: bool = False, stop: fx.Node | None = None) -> set[fx.Node]:
    """The node and all that it is made from, not past `stop`; or only that whose values it is made from, not their
    shapes alone.
    """
    seen, stack = {node}, [node]
    while stack:
        here = stack.pop()
        new = set() if values and _is_question(here) else set(here.all_input_nodes) - seen - {stop}
        seen |= new
        stack += new
    return seen


def _is_question(node: fx.Node) -> bool:
    """Whether a node asks a value for its shape or type."""
    return (node.args[1] if _operation(node) == "getattr" else _operation(node)) in _QUESTIONS


def _params_of(nodes: set[fx.Node], block: nn.Module) -> dict[int, int]:
    """Sizes of the parameters that these nodes use, by their `id`."""
    used = [str(n.target) for n in nodes if n.op in ("call_module", "get_attr")]
    named = block.named_parameters(remove_duplicate=False)
    return {id(p): p.numel() for key, p in named if any(key == u or key.startswith(u + ".") for u in used)}
