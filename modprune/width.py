"""Width after depth: channels inside the blocks that stay, chosen and cut by torch-pruning.

Only inner channels go: those that no shortcut and no model output carries. The rest is coupled across the network,
and torch-pruning's index mapping of it is not always right (the padded shortcut of CIFAR ResNets is one such case).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from modprune._autograd import ACTIVATIONS, LAYOUT, SUMS, is_any
from modprune._depgraph import Cut, cut_channels, dependency_graph, prune_channels
from modprune._state import copied
from modprune.blocks import Blocks

# Autograd's names of operations that keep channels apart.
APART = (
    *("Mul", "Sigmoid", "Hardsigmoid", "Mean", "AdaptiveAvgPool", "AvgPool", "MaxPool", "UpsampleNearest"),
    *("NativeBatchNorm", "CudnnBatchNorm"),
)
NARROWED = "modprune_narrowed"


def choose_cuts(
    model: nn.Module, blocks: Blocks, example_inputs: Any, ratio: float, ignored: Collection[str] = ()
) -> tuple[Cut, ...]:
    """Which output channels of layers inside the blocks go: `ratio` of each layer's, the least magnitude first.

    Args:
        model: left as found.
        blocks: those of `find_blocks`; a model of plain units is taken as one.
        example_inputs: a tensor, a tuple or a dict.
        ratio: fraction of the channels, between 0 and 1.
        ignored: names of modules of which no channel may go.

    Raises:
        ValueError: if no layer has channels that can go; RuntimeError: if torch-pruning fails.
    """
    trial = copied(model)
    keep = {m for name in ignored for m in trial.get_submodule(name).modules()}
    layers = {layer for layer in inner_layers(trial, blocks, example_inputs) if layer not in keep}
    cuts = prune_channels(trial, example_inputs, ratio, layers) if layers else []
    if layers and not cuts:
        raise ValueError(f"width={ratio}: torch-pruning cuts none of {len(layers)} layers so: give another fraction")
    if not cuts:
        raise ValueError(
            f"width={ratio}: {type(model).__name__} has no channels inside its blocks that can go alone: "
            "shortcuts carry them, or they are split, joined or normalised with others, or no block is left"
        )
    return tuple(cuts)


def narrow(model: nn.Module, cuts: Iterable[Cut], example_inputs: Any) -> None:
    """Cut channels in place and mark the layers that are narrower now, for `narrowed_layers`.

    Raises:
        ValueError: for a layer that is not there or has no such channels; RuntimeError: if torch-pruning fails.
    """
    cuts, layers = tuple(cuts), dict(model.named_modules())
    for name, channels in cuts:
        layer = layers.get(name)
        if not isinstance(layer, (_ConvNd, nn.Linear)):
            raise ValueError(f"{name}: {type(model).__name__} has no such layer to cut channels of")
        count = _outputs(layer)
        if not channels or min(channels) < 0 or max(channels) >= count or len(set(channels)) >= count:
            raise ValueError(f"{name}: the {len(channels)} channels to cut are not some of its {count}")
    before = _shapes(model)
    cut_channels(model, example_inputs, cuts)
    for name, shape in _shapes(model).items():
        if shape != before[name]:
            setattr(model.get_submodule(name.rpartition(".")[0]), NARROWED, True)


def narrowed_layers(model: nn.Module) -> list[str]:
    """Names of the layers that `narrow` made narrower, read off the model itself."""
    return [name for name, module in model.named_modules() if getattr(module, NARROWED, False)]


def resize(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Give layers the smaller shapes that their tensors in `tensors` have; the values are left to be filled in.

    Raises:
        ValueError: for a layer that is not there, cannot be narrower, or has other dimensions.
    """
    known = dict(model.named_modules())
    for name in names:
        layer: Any = known.get(name)
        if not (isinstance(layer, _BatchNorm) or _mixes(layer) or _is_depthwise(layer)):
            raise ValueError(f"{name}: no layer of this network that can be narrower")
        for key, old in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            shape = tensors[f"{name}.{key}"].shape if f"{name}.{key}" in tensors else None
            if shape is None or len(shape) != old.ndim or any(a > b for a, b in zip(shape, old.shape, strict=True)):
                raise ValueError(f"{name}.{key}: is of shape {tuple(old.shape)} here and does not narrow to {shape}")
            last = old.ndim == 4 and not old.is_contiguous()
            layout = torch.channels_last if last else torch.contiguous_format
            new = torch.empty(shape, dtype=old.dtype, device=old.device, memory_format=layout)
            setattr(layer, key, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        _tell_sizes(layer)
        setattr(layer, NARROWED, True)


def _tell_sizes(layer: Any) -> None:
    """The layer's own notes of its sizes, after its tensors."""
    if isinstance(layer, _ConvNd):
        layer.groups = len(layer.weight) if layer.groups == layer.out_channels else layer.groups
        sizes = len(layer.weight), layer.weight.shape[1] * layer.groups
        layer.out_channels, layer.in_channels = reversed(sizes) if layer.transposed else sizes
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    else:
        layer.num_features = len(layer.running_mean if layer.weight is None else layer.weight)


def inner_layers(model: nn.Module, blocks: Blocks, example_inputs: Any) -> set[nn.Module]:
    """Layers whose output channels can go without any layer outside of their block noticing."""
    graph = dependency_graph(model, example_inputs)
    regions = [set(model.get_submodule(block.name).modules()) for block in blocks]
    if blocks and all(block.kind == "plain" for block in blocks) and not blocks.refused:
        regions = [set(model.modules())]
    held = [p for module in model.modules() for p in module._parameters.values() if p is not None]
    holders = Counter(map(id, held))
    tied = {m for m in model.modules() if any(holders[id(p)] > 1 for p in m._parameters.values())}
    found: set[nn.Module] = set()
    for region in (region - tied for region in regions):  # cut apart, layers that share weights would no longer
        for root in region & set(graph.module2node):
            if _mixes(root) and root not in found:
                found |= _coupled(graph, root, region)
    return found


def _coupled(graph: Any, root: nn.Module, region: set[nn.Module]) -> set[nn.Module]:
    """The layers that lose a channel of output where `root` does; empty if that shows outside of the region."""
    seen, takers, stack = set(), set(), [graph.module2node[root]]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        layers = [_layer(following) for following in node.outputs]
        takers |= {layer.module for layer in layers if layer}
        onward = [following for following, layer in zip(node.outputs, layers, strict=True) if not layer]
        onward += [] if _mixes(node.module) else node.inputs
        if not all(_mixes(other.module) or _keeps_apart(other, root) for other in onward):
            return set()
        stack += onward
    losing = {node.module for node in seen if any(True for _ in node.module.parameters())}
    widths = [_outputs(module) for module in losing if _mixes(module)] + [_inputs(module) for module in takers]
    return losing if takers and losing | takers <= region and set(widths) == {_outputs(root)} else set()


def _layer(node: Any) -> Any:
    """The node of the convolution or linear layer that begins here; None if there is none."""
    if _mixes(node.module):
        return node
    # Of more than two dimensions, a linear layer is a product of its own before the layer's node.
    product = node.grad_fn is not None and is_any(node.grad_fn, ("Addmm", "Mm")) and len(node.outputs) == 1
    return node.outputs[0] if product and isinstance(node.outputs[0].module, nn.Linear) else None


def _keeps_apart(node: Any, root: nn.Module) -> bool:
    """Whether a node computes each channel of its output from the same channel of its inputs, which `root` gave."""
    if isinstance(node.module, _BatchNorm) or _is_depthwise(node.module):
        return True
    layer = isinstance(node.module, nn.Parameter) or any(True for _ in node.module.parameters())
    if layer or node.grad_fn is None or not is_any(node.grad_fn, SUMS + ACTIVATIONS + LAYOUT + APART):
        return False
    if is_any(node.grad_fn, ("Mean", "Roll")):
        return not _goes_along_channels(node.grad_fn, root)
    if is_any(node.grad_fn, ("View", "UnsafeView", "Reshape")):
        return _keeps_channels_whole(node.grad_fn, _outputs(root))
    # Pools go along the last dimensions, where linear layers have their channels.
    return isinstance(root, _ConvNd) or not is_any(node.grad_fn, ("AvgPool", "MaxPool", "AdaptiveAvgPool", "Upsample"))


def _keeps_channels_whole(step: Any, channels: int) -> bool:
    """Whether a view has a dimension of so many before and after, that it neither divides nor joins with others."""
    before, output = step.next_functions[0]
    shapes = [tuple(before._input_metadata[output].shape), tuple(step._input_metadata[0].shape)]
    places = [{math.prod(shape[:i]) for i, size in enumerate(shape) if size == channels} for shape in shapes]
    return bool(places[0] & places[1])


def _goes_along_channels(step: Any, root: nn.Module) -> bool:
    """Whether a mean or a roll is over the dimension in which `root` has its channels, or over all."""
    before, output = step.next_functions[0]
    dimensions = len(before._input_metadata[output].shape)
    over = getattr(step, "_saved_dim", None) or getattr(step, "_saved_dims", None) or range(dimensions)
    signed = (d - 2**64 if d >= 2**63 else d for d in over)  # negative ones come as unsigned
    return (1 if isinstance(root, _ConvNd) else dimensions - 1) in {d % dimensions for d in signed}


def _mixes(module: Any) -> bool:
    """Whether a module computes its channels from all those of its input: a convolution or a linear layer."""
    plain = isinstance(module, (_ConvNd, nn.Linear)) and {n for n, _ in module.named_parameters()} <= {"weight", "bias"}
    return plain and not _is_depthwise(module)


def _is_depthwise(module: Any) -> bool:
    return isinstance(module, _ConvNd) and module.groups == module.out_channels == module.in_channels > 1


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}


def _outputs(module: Any) -> int:
    return module.out_channels if isinstance(module, _ConvNd) else module.out_features


def _inputs(module: Any) -> int:
    return module.in_channels if isinstance(module, _ConvNd) else module.in_features
