"""A pass-through in a block's place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


class PassThrough(nn.Module):
    """Gives its first argument back and ignores the others.

    Args:
        as_tuple: give it back as a one-tuple, where the block in whose place this stands gave a tuple.
    """

    def __init__(self, as_tuple: bool = False) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, x: Any, *_: Any, **__: Any) -> Any:
        """`x`, or `(x,)`."""
        return (x,) if self.as_tuple else x

    def extra_repr(self) -> str:
        """Shown in `print(model)`."""
        return "as_tuple=True" if self.as_tuple else ""


@contextmanager
def bypassed(model: nn.Module, name: str, as_tuple: bool = False) -> Iterator[nn.Module]:
    """The model with the identity block `name` skipped inside the block, and whole again after it.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> with bypassed(model, "1"):
    ...     print(model[1])
    PassThrough()
    >>> print(model[1])
    Linear(in_features=2, out_features=2, bias=True)
    """
    block = model.get_submodule(name)
    model.set_submodule(name, PassThrough(as_tuple).train(block.training))
    try:
        yield model
    finally:
        model.set_submodule(name, block)
