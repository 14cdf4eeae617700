"""Listening to modules while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from modprune._inputs import first_tensor, map_tensors

ADDED = "+"
"""Before the name of a module: what it gives and what it was given, added up."""


def heard(model: nn.Module, name: str) -> nn.Module:
    """The module of a name, with `ADDED` before it or without."""
    return model.get_submodule(name.removeprefix(ADDED))


@contextmanager
def listening(modules: Mapping[str, nn.Module], after: Callable[[str, Any], None]) -> Iterator[None]:
    """`after(name, output)` whenever one of these modules has run; with `ADDED` before the name, output and input."""

    def hook(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if name.startswith(ADDED):
            x, y = first_tensor((args, kwargs)), first_tensor(output)
            output = None if x is None or y is None else x + y
        after(name, output)

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(hook, name), with_kwargs=True))
        yield


@contextmanager
def comparing(
    spans: Mapping[str, tuple[nn.Module, nn.Module]], look: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """`look(name, x, y)` whenever a span has run, given by its first and its last module, which may be the same.

    `x` is the first tensor that went into the one, `y` the first that came out of the other; no `look` without both.
    """
    given: dict[str, Tensor] = {}

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if (x := first_tensor((args, kwargs))) is not None:
            given[name] = x.clone()  # the module may write into it

    def after(name: str, output: Any) -> None:
        if name in given and (y := first_tensor(output)) is not None:
            look(name, given.pop(name), y)

    with ExitStack() as hooks, listening({name: last for name, (_, last) in spans.items()}, after):
        for name, (first, _) in spans.items():
            hooks.enter_context(first.register_forward_pre_hook(partial(before, name), with_kwargs=True))
        yield


@contextmanager
def copying(modules: Iterable[nn.Module]) -> Iterator[None]:
    """These modules are given copies: what others write into what they hand on does not reach its owner."""

    def copies(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return map_tensors(Tensor.clone, (args, kwargs))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(copies, with_kwargs=True))
        yield
