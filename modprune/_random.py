"""What a loader draws its data from: random generators, as one state of plain values, and a pass under way."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate.state import GradientState
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader

T = TypeVar("T")
KINDS = torch.Generator, np.random.Generator, np.random.RandomState, random.Random
TORCHS_OWN = frozenset(vars(nn.Module()))
COUNTS = ("epoch", "iteration", "end_of_dataloader", "remainder")


@contextmanager
def undisturbed(loader: object) -> Iterator[None]:
    """A loader may be read inside the block; its owner then goes on as if it had not been, amid an epoch too.

    Put back are all random generators, what an `ImageLoader`, or accelerate's loaders and samplers, count passes by and
    whether accelerate is in one, and the pass under way of a DataLoader whose workers persist, if any: another would
    take its workers away, or leave later ones its own.
    """
    counts = [(part, {n: v for n, v in vars(part).items() if n in COUNTS}) for part in _parts(loader)]
    under_way = [(part, part._iterator) for part in _parts(loader) if isinstance(part, DataLoader)]
    passes = GradientState().dataloader_references
    state = random_state(None)
    own = [(generator, _state(generator)) for generator in _generators(loader).values()]  # accelerate's gets one then
    for part, _ in under_way:
        part._iterator = None
    try:
        yield
    finally:
        set_random_state(state, None)
        for generator, found in own:
            _set_state(generator, found)
        for part, found_counts in counts:
            vars(part).update(found_counts)
        GradientState().dataloader_references = passes
        for part, one in under_way:
            part._iterator = one


def random_state(loader: object) -> dict[str, Any]:
    """Of Python, NumPy, torch on the CPU and CUDA, and the generators that a loader, or a model, has of its own."""
    kind, keys, *rest = cast("tuple[Any, ...]", np.random.get_state())
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "own": own_state(loader),
    }


def is_untouched(state: dict[str, Any], loader: object) -> bool:
    """Whether no generator has been drawn from since `state = random_state(loader)`."""
    before, now = tree_leaves(state), tree_leaves(random_state(loader))
    same = (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, now, strict=False))
    return len(before) == len(now) and all(same)


def own_state(loader: object) -> dict[str, Any]:
    """Of the generators that a loader and its data, or a model, have of their own: accelerate may give a loader one."""
    return {place: _state(generator) for place, generator in _generators(loader).items()}


def set_own_state(state: dict[str, Any], loader: object) -> None:
    """Put back what `own_state` gave, with a warning if a generator is not there, as those made in the first pass."""
    generators = _generators(loader)
    for place in state.keys() & generators.keys():
        _set_state(generators[place], state[place])
    if missing := sorted(state.keys() - generators.keys()):
        warnings.warn(f"the loader has no generator {missing[0]} yet: its random numbers begin anew", stacklevel=2)


def set_random_state(state: dict[str, Any], loader: object) -> None:
    """Put back what `random_state` gave."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    set_own_state(state["own"], loader)


def _generators(loader: object) -> dict[str, Any]:
    """Those that a loader, its samplers and its data have as attributes, under whatever names, each once, by place.

    Or those that the modules of a model have.
    """
    if isinstance(loader, nn.Module):
        return {
            f"{name} (module {number})": value
            for number, module in enumerate(loader.modules())
            for name, value in vars(module).items()
            if name not in TORCHS_OWN and isinstance(value, KINDS)
        }
    found: dict[int, tuple[str, Any]] = {}
    for number, part in enumerate(_parts(loader)):
        named = {name: getattr(part, name, None) for name in ("generator", "synchronized_generator")}
        for name, value in {**named, **vars(part)}.items():
            if isinstance(value, KINDS) and not isinstance(value, random.SystemRandom):
                found.setdefault(id(value), (f"{type(part).__name__}.{name} (part {number})", value))
    return dict(found.values())


def _state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    state = generator.bit_generator.state if isinstance(generator, np.random.Generator) else generator.get_state(False)
    return tree_map_only(np.ndarray, np.ndarray.tolist, state)


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    else:
        generator.set_state(state)


def _parts(loader: object) -> list[Any]:
    """A loader, the one that it wraps as accelerate does, its samplers, data and transforms, those with attributes."""
    parts = [loader]
    for part in parts:
        inner = [getattr(part, name, None) for name in ("base_dataloader", "sampler", "batch_sampler")]
        parts += [one for one in inner if one is not None and all(one is not other for other in parts)]
    for part in parts:  # of data, which is anybody's, only what it holds
        own = getattr(part, "__dict__", {})
        held = [own.get(name) for name in ("dataset", "transform", "target_transform")]  # a list here is of samples
        for several in (own.get(name) for name in ("datasets", "transforms")):
            held += several if isinstance(several, (list, tuple)) else [several]
        parts += [one for one in held if one is not None and all(one is not other for other in parts)]
    return [part for part in parts if hasattr(part, "__dict__")]


def from_batch(loader: Iterable[T], batches: Iterable[T], first: int, start: dict[str, Any]) -> Iterator[T]:
    """The `batches` of a loader from number `first` on, counted from 0, as if those before had just been used.

    They are drawn again, from `start`, the state in which the epoch began; what is random afterwards goes on from the
    state that is found.
    """
    found = random_state(loader)
    set_random_state(start, loader)
    for number, batch in enumerate(batches):
        if number >= first:
            yield batch
        elif number == first - 1:
            set_random_state(found, loader)
