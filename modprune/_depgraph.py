"""The one door to torch-pruning: its dependency graph, and its pruner of channels; the model else stays as it was."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from modprune._autograd import differentiable_tensors
from modprune._inputs import call, device_of, first_line, opened, to_device
from modprune._state import traceable

Cut = tuple[str, tuple[int, ...]]
"""A layer by its name and those of its output channels that go."""


def dependency_graph(model: nn.Module, example_inputs: Any) -> Any:
    """`torch_pruning.DependencyGraph` of the model (Fang et al., "DepGraph", CVPR 2023).

    torch-pruning needs gradients for every parameter, leaves the model in eval mode and, after an error, its hooks in
    place; it hides the first error behind a bare except. None of this is seen from outside.

    Raises:
        RuntimeError: if the model cannot run on `example_inputs` or torch-pruning cannot trace it; one line.
    """
    torch_pruning = _imported()
    inputs = to_device(example_inputs, device_of(model))
    with _visited(model), traceable(model), _odd_reshapes_unmapped():
        return torch_pruning.DependencyGraph().build_dependency(
            model, inputs, forward_fn=call, output_transform=_differentiable
        )


def prune_channels(model: nn.Module, example_inputs: Any, ratio: float, layers: set[nn.Module]) -> list[Cut]:
    """Prune `ratio` of the output channels of `layers` and what is coupled to them, in place; what went, by root layer.

    By `torch_pruning.pruner.BasePruner`, layer by layer, the least group magnitude (L2) first (Fang et al. 2023).

    Raises:
        RuntimeError: if torch-pruning fails; one line.
    """
    torch_pruning = _imported()
    inputs = to_device(example_inputs, device_of(model))
    ignored = [m for m in model.modules() if layers.isdisjoint(m.modules())]
    with _forms_kept(model), _visited(model):
        with traceable(model), _odd_reshapes_unmapped():
            pruner = torch_pruning.pruner.BasePruner(
                model, inputs, torch_pruning.importance.GroupMagnitudeImportance(p=2), pruning_ratio=ratio,
                ignored_layers=ignored, forward_fn=call, output_transform=_differentiable,
                # its defaults are dicts that every pruner shares
                in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
            )  # fmt: skip
        pruner.step()
    return [(name, tuple(sorted(int(i) for i in channels))) for name, _, channels in pruner.pruning_history()]


def cut_channels(model: nn.Module, example_inputs: Any, cuts: Iterable[Cut]) -> None:
    """Cut output channels of layers, and what is coupled to them, in place.

    Raises:
        RuntimeError: if torch-pruning fails; one line.
    """
    graph = dependency_graph(model, example_inputs)
    with _forms_kept(model), _visited(model):
        graph.load_pruning_history([[name, True, list(channels)] for name, channels in cuts])


def _imported() -> Any:
    """torch-pruning. It imports timm in a bare except, which swallows Ctrl-C for seconds: here that goes first."""
    with suppress(Exception):
        importlib.import_module("timm")
    import torch_pruning

    return torch_pruning


def _differentiable(output: Any) -> list[Any]:
    return differentiable_tensors(opened(output))


@contextmanager
def _visited(model: nn.Module) -> Iterator[None]:
    """What torch-pruning does to a model beyond its task is undone, its warnings are not heard, its errors one line."""
    hooks = {module: set(module._forward_hooks) for module in model.modules()}
    with torch.inference_mode(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch-pruning's own, about parameters it does not know
        try:
            yield
        except Exception as error:
            raise RuntimeError(f"no dependency graph of {type(model).__name__}: {first_line(error)}") from error
        finally:
            for module, before in hooks.items():
                for key in set(module._forward_hooks) - before:
                    del module._forward_hooks[key]


@contextmanager
def _odd_reshapes_unmapped() -> Iterator[None]:
    """A reshape before which torch-pruning finds no channels is left alone, as it leaves those of unknown channels.

    It divides by their number: by zero in a vision transformer of which all layers are gone, and in ShuffleNet.
    """
    from torch_pruning.dependency import index_mapping

    original = index_mapping.update_reshape_index_mapping

    def guarded(graph: Any, node: Any) -> None:
        with suppress(ZeroDivisionError):
            original(graph, node)

    index_mapping.update_reshape_index_mapping = guarded
    try:
        yield
    finally:
        index_mapping.update_reshape_index_mapping = original


@contextmanager
def _forms_kept(model: nn.Module) -> Iterator[None]:
    """Parameters that torch-pruning replaces keep `requires_grad` and channels_last, which it forgets."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    last = {n for n, p in model.named_parameters() if p.ndim == 4 and not p.is_contiguous()}
    yield
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
        if name in last:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
