"""Which blocks of a network can go, and why the rest cannot.

One forward pass notes what goes in and out of every sub-module; the autograd graph between the two tells whether the
output is `shortcut(x) + branch(x)`. No class name is ever asked for. Lu et al. (ECCV 2022) prune the same blocks, by
a list for each network.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex, overload

from torch import nn

from modprune._autograd import users
from modprune._bare import check_bare, check_filled
from modprune._branches import with_branches
from modprune._calls import Call, record_calls
from modprune._hooks import ADDED
from modprune._inputs import batch_size, device_of, to_device
from modprune._plain import plain_units
from modprune._probe import without_parameters
from modprune._residual import Shortcut, checkpointed, held_elsewhere
from modprune._state import traceable
from modprune.bypass import activation_after, norm_after
from modprune.cost import counted_macs


@dataclass(frozen=True)
class Block:
    """A sub-module whose output is `shortcut(x) + branch(x)`, a branch alone, or a plain unit, as a value.

    Attributes:
        name: qualified name, as in `model.get_submodule(name)`; of a plain unit, that of its convolution.
        kind: "identity" (the shortcut is x: the whole block can go), "transition" (the shortcut changes the shape: the
            branch can go), "branch" (what it gives is added to its input by the code around it, and nothing else) or
            "plain" (convolution, norm and activation that keep the shape).
        params: parameters that go with it; those shared with other layers do not.
        macs: MACs per sample that go with it, see `count_macs`.
        layers: qualified names of the layers that go with it, in the order of `model.named_modules()`.
        end: the layer whose output is the block's: itself; of a plain unit its activation, or norm if that is no layer;
            of a branch, itself after a "+": its output and its input together.
        exact: whether the block with all parameters zero gave its input back bit for bit, the proof that the
            shortcut is the identity; False for other kinds and where an activation follows that alters its input.
        outputs: for each item of the tuple that it gives back, which of its arguments stands in once it is gone, by
            position (of a tuple that comes first, its items count); -1 for None. Empty for a tensor alone.
    """

    name: str
    kind: str
    params: int
    macs: int
    layers: tuple[str, ...]
    end: str
    exact: bool = True
    outputs: tuple[int, ...] = ()


class Blocks(tuple[Block, ...]):
    """Blocks in forward order; `refused` maps the names of candidates that cannot go to the reason."""

    refused: dict[str, str]

    def __new__(cls, blocks: Iterable[Block] = (), refused: dict[str, str] | None = None) -> Blocks:
        self = super().__new__(cls, blocks)
        self.refused = getattr(blocks, "refused", {}) if refused is None else refused
        return self

    @overload
    def __getitem__(self, index: SupportsIndex) -> Block: ...

    @overload
    def __getitem__(self, index: slice) -> Blocks: ...

    def __getitem__(self, index: Any) -> Any:
        """A block, or those of a slice, with the same `refused`."""
        found = super().__getitem__(index)
        return Blocks(found, self.refused) if isinstance(index, slice) else found

    @property
    def names(self) -> tuple[str, ...]:
        """The names, in order."""
        return tuple(block.name for block in self)

    @property
    def why_no_more(self) -> str:
        """The reason for every candidate that stays, or, without any, that nothing else is one."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.refused.items())
        return reasons or (
            "no other module adds to its input (the first tensor it takes) as it is, and no other convolution "
            "above 1x1 with a norm keeps the shape"
        )


def find_blocks(model: nn.Module, example_inputs: Any) -> Blocks:
    """The removable blocks of a model in forward order, with what each costs; empty if it has none.

    Residual blocks; where they lie in one another the inner ones, unless the outer one adds something itself that is
    a quarter of its parameters. Where code adds what modules give to what they were given, as in a loop over layers,
    these modules, if two of them are alike. Plain units where the model has no shortcut at all.

    One forward pass, traced and counted, and one more of every identity block, for the proof that the shortcut is the
    identity; two where there is no shortcut. The model is left as found.

    Args:
        model: any bare module; on any device.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, with batch dimension.

    Raises:
        ValueError: if the model is compiled, wrapped or sharded for several devices, or has no weights (meta device).
        RuntimeError: if the model cannot run on `example_inputs`; one line.

    >>> import torch
    >>> from modprune.models import resnet20
    >>> blocks = find_blocks(resnet20(), torch.zeros(1, 3, 32, 32))
    >>> len(blocks), blocks[0].name, blocks[0].kind, blocks[0].params, blocks[3].kind
    (9, 'layer1.0', 'identity', 4672, 'transition')
    """
    check_bare(model)
    check_filled(model)
    with traceable(model):
        inputs = to_device(example_inputs, device_of(model))
        with counted_macs(model, inputs) as macs:
            calls, output = record_calls(model, inputs)
        uses = users(output)
        found, refused = with_branches(model, calls, uses, held_elsewhere(model))
        refused |= checkpointed(calls, uses)
        if not found and not refused:
            calls, output = record_calls(model, inputs, leaves=True)
            found, refused = plain_units(model, calls, users(output))
        places = _places(model.modules())
        blocks = []
        for name, (kind, stays) in found.items():
            rest = without_parameters(calls[name]) if kind == "identity" else ""
            if rest == "reordered":
                refused[name] = "it gives its input back in another order"
                continue
            blocks.append(_describe(model, calls[name], kind, stays, rest == "same", places, macs, batch_size(inputs)))
    return Blocks(blocks, refused)


def _describe(
    model: nn.Module,
    seen: Call,
    kind: str,
    stays: Shortcut,
    exact: bool,
    places: Counter[int],
    macs: dict[str, int],
    samples: int,
) -> Block:
    roots = [seen.name]
    if kind == "plain" and (norm := norm_after(model, seen.name)):
        roots += [name for name in (norm, activation_after(model, norm)) if name]
    inside = {name: module for root in roots for name, module in model.get_submodule(root).named_modules(prefix=root)}
    own = {name: [p for p in module._parameters.values() if p is not None] for name, module in inside.items()}
    freed = sum(p.numel() for p in _alone(inside, roots, places) if id(p) not in stays.parameters)
    layers = tuple(n for n, ps in own.items() if ps and not any(id(p) in stays.parameters for p in ps))
    macs_freed = macs[seen.name] - stays.flops // (2 * samples)
    end = f"{ADDED}{seen.name}" if kind == "branch" else roots[-1]
    return Block(seen.name, kind, freed, macs_freed, layers, end, exact, seen.outputs)


def tied_params(model: nn.Module, blocks: Iterable[Block]) -> int:
    """Parameters that go with these blocks together and with none of them alone: several of them hold them."""
    block_of = {layer: block.name for block in blocks for layer in block.layers}
    holders: dict[nn.Parameter, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            if parameter is not None:
                holders.setdefault(parameter, set()).add(block_of.get(name, ""))
    return sum(p.numel() for p, names in holders.items() if len(names) > 1 and "" not in names)


def _alone(inside: dict[str, nn.Module], roots: Sequence[str], places: Counter[int]) -> set[nn.Parameter]:
    """The parameters of the modules `inside` that no module outside holds, once `roots` are gone from all places."""
    here = _places(inside.values())
    shared = [module for name, module in inside.items() if name not in roots and here[id(module)] < places[id(module)]]
    staying = {inner for module in shared for inner in module.modules()}
    going = [module for module in inside.values() if module not in staying]
    here = _places(going)
    own = (p for module in going for p in module._parameters.values() if p is not None)
    return {p for p in own if here[id(p)] == places[id(p)]}


def _places(modules: Iterable[nn.Module]) -> Counter[int]:
    """In how many places these modules hold each module and parameter, by id."""
    return Counter(id(held) for module in modules for held in (*module._modules.values(), *module._parameters.values()))
