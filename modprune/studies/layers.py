"""Which layers a study looks at."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from modprune._hooks import listening
from modprune._inputs import call, device_of, to_device
from modprune._state import evaluating
from modprune.blocks import find_blocks
from modprune.curve import points


def layers_of(model: nn.Module, example_inputs: Any) -> tuple[str, ...]:
    """The stem and every residual block; of a network without any, as VGG, every weight layer but the last.

    Args:
        model: left as found.
        example_inputs: a tensor, a tuple or a dict.

    Raises:
        ValueError: if there are fewer than two such layers.
    """
    blocks = find_blocks(model, example_inputs)
    if any(block.kind != "plain" for block in blocks):
        return points(model, blocks, example_inputs)
    chain = in_order(model, weight_layers(model), example_inputs)[:-1]
    if len(chain) < 2:
        raise ValueError(f"{type(model).__name__} has {len(chain)} layers before its last one: a curve needs two")
    return chain


def weight_layers(model: nn.Module) -> tuple[str, ...]:
    """Names of the layers with a matrix or kernel of their own: convolutions, linear layers."""
    return tuple(
        name
        for name, module in model.named_modules()
        if name and any(p.ndim > 1 for p in module.parameters(recurse=False)) and not isinstance(module, nn.Embedding)
    )


def in_order(model: nn.Module, names: tuple[str, ...], example_inputs: Any) -> tuple[str, ...]:
    """Those of `names` that run exactly once, in the order in which they end."""
    ran: list[str] = []
    modules = {name: model.get_submodule(name) for name in names}
    with listening(modules, lambda name, _: ran.append(name)), evaluating(model), torch.no_grad():
        call(model, to_device(example_inputs, device_of(model)))
    return tuple(name for name in ran if ran.count(name) == 1)
