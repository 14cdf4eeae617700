"""The one door to torch-pruning: a dependency graph, and the model as it was."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from modprune._inputs import call, device_of, evaluating, to_device


def dependency_graph(model: nn.Module, example_inputs: Any) -> Any:
    """`torch_pruning.DependencyGraph` of the model (Fang et al., "DepGraph", CVPR 2023).

    torch-pruning needs gradients for every parameter, leaves the model in eval mode and hides the first error of the
    forward behind a bare except; none of this is seen from outside.

    Raises:
        RuntimeError: if the model cannot run on `example_inputs` or torch-pruning cannot trace it; one line.
    """
    import torch_pruning

    inputs = to_device(example_inputs, device_of(model))
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    try:
        with torch.enable_grad(), evaluating(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch-pruning's own, about parameters it does not know
            for parameter in frozen:
                parameter.requires_grad_(True)
            try:
                call(model, inputs)
                return torch_pruning.DependencyGraph().build_dependency(model, inputs)
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                raise RuntimeError(f"no dependency graph of {type(model).__name__}: {reason[0]}") from error
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
