"""What stands in a block's place: a pass-through, or the block's own shortcut alone; for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod

from modprune._hooks import copying
from modprune._inputs import arguments, first_tensor, like
from modprune._trace import MARK, notes, set_lasting, shortcut_only

WHOLE = "modprune_nested_when_whole"
LISTENERS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
)


class PassThrough(nn.Module):
    """Gives its first argument back, the first that is a tensor or holds one, and ignores the others.

    Args:
        outputs: for each item of the tuple that the block gave, which argument stands in, by position (of a tuple that
            comes first, its items count); -1 for None. Empty if the block gave no tuple.
        kind: of the block that stood here, "identity", "plain" or "branch".
        block: the block itself, whose plain attributes stay readable.

    >>> PassThrough()("x", "mask"), PassThrough(outputs=(0, -1))(hidden="x")
    ('x', ('x', None))
    """

    def __init__(self, outputs: Sequence[int] = (), kind: str = "identity", block: nn.Module | None = None) -> None:
        super().__init__()
        self.modprune_outputs = tuple(outputs)
        setattr(self, MARK, kind)
        for name, value in ({} if block is None else notes(block)).items():
            if not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument itself, not a copy, in the form that the block gave."""
        if not self.modprune_outputs and args and isinstance(args[0], Tensor):
            return args[0]  # what follows says the same, in microseconds that a small network feels
        given = arguments(args, kwargs)
        if not self.modprune_outputs:
            x = first_tensor(given)
            return given[0] if x is None else x
        items = [given[i] if 0 <= i < len(given) else None for i in self.modprune_outputs]
        values = (*args, *kwargs.values())  # next(..., None) is not for torch.export of torch 2.6
        whole = values[0] if values else None
        return like(whole, items) if isinstance(whole, tuple) and len(whole) == len(items) else tuple(items)


class Zero(PassThrough):
    """Gives zeros such as its first argument: what code adds to that then changes nothing.

    >>> Zero()(Tensor([1.0])).tolist()
    [0.0]
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros of the shape, type and device of the first tensor given."""
        return torch.zeros_like(super().forward(*args, **kwargs))


class Copy(nn.Module):
    """Gives a copy back: an activation in place that comes next must not write into what gradients need.

    >>> Copy()(nn.Parameter(Tensor([1.0]))).tolist()
    [1.0]
    """

    def forward(self, x: Tensor) -> Tensor:
        """A copy of `x`."""
        return x.clone()


def stand_ins(model: nn.Module, name: str, kind: str, outputs: Sequence[int]) -> dict[str, nn.Module]:
    """What takes the place of a block and, of a plain unit, of the norm and activation after it; by name.

    Forward hooks hear from it as they did from the block: a network may read or change its features through them. Those
    by which `torch.nn.utils` computes weights go with the weights.
    """
    new = _stand_ins(model, name, kind, outputs)
    for part, module in new.items():
        original = model.get_submodule(part)
        module.training = original.training
        set_lasting(module, {listeners: _listening(getattr(original, listeners)) for listeners in LISTENERS})
    return new


def _listening(hooks: dict[int, Any]) -> dict[int, Any]:
    """The very same hooks, so that their handles remove them here too; without those that compute a weight."""
    staying = {key: hook for key, hook in hooks.items() if not _computes_weights(hook)}
    return hooks if len(staying) == len(hooks) else type(hooks)(staying)


def _computes_weights(hook: Any) -> bool:
    return isinstance(hook, BasePruningMethod) or type(hook).__module__.startswith("torch.nn.utils.")


def _stand_ins(model: nn.Module, name: str, kind: str, outputs: Sequence[int]) -> dict[str, nn.Module]:
    block = model.get_submodule(name)
    if kind == "identity":
        return {name: PassThrough(outputs, block=block)}
    if kind == "branch":
        return {name: Zero(kind=kind, block=block)}
    if kind == "transition":
        try:
            return {name: shortcut_only(block)}
        except ValueError as error:
            raise ValueError(f"{name}: cannot be removed: {error}") from None
    norm = norm_after(model, name)
    if kind != "plain" or norm is None:
        raise ValueError(f"{name}: cannot be removed as a block of kind {kind!r}; find_blocks lists what can")
    activation = activation_after(model, norm)
    new: dict[str, nn.Module] = {name: PassThrough(kind="plain", block=block)}
    new[norm] = nn.Identity() if activation else Copy()
    if activation:
        new[activation] = nn.Identity()
    return new


def merged(parts: Sequence[dict[str, nn.Module]]) -> dict[str, nn.Module]:
    """What takes the place of several blocks, of what `stand_ins` gave for each."""
    return {name: module for part in parts for name, module in part.items()}


def swap(model: nn.Module, new: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put modules in others' places, by name and under every other name that they have; gives back those replaced."""
    originals = {name: model.get_submodule(name) for name in new}
    others: dict[nn.Module, list[str]] = {module: [] for module in originals.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in others:
            others[module].append(name)
    for name, module in new.items():
        for place in others[originals[name]]:
            model.set_submodule(place, module)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            _tell(module)
    return originals


@contextmanager
def swapped(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[None]:
    """`swap` for a while: the originals are back after the block, Ctrl-C or not."""
    originals = swap(model, new)
    try:
        yield
    finally:
        swap(model, originals)


def _tell(encoder: Any) -> None:
    """Torch's encoder looks at the weights of its first layer to make nested tensors, which only whole layers take."""
    whole = not any(isinstance(layer, PassThrough) for layer in encoder.layers)
    if whole and WHOLE in vars(encoder):
        encoder.use_nested_tensor = vars(encoder).pop(WHOLE)
    elif not whole and WHOLE not in vars(encoder):
        setattr(encoder, WHOLE, encoder.use_nested_tensor)
        encoder.use_nested_tensor = False


@contextmanager
def bypassed(model: nn.Module, name: str, kind: str = "identity", outputs: Sequence[int] = ()) -> Iterator[nn.Module]:
    """The model without a block, as surgery would leave it; the block is back in its place afterwards.

    What goes through its place is a copy: a layer after it that writes in place, for which surgery would refuse to
    remove it, does not spoil what others read.

    Args:
        model: changed in place meanwhile.
        name, kind, outputs: of a `Block`.

    Raises:
        ValueError: if the model has no such module, or it cannot go.

    >>> from modprune.models import resnet20
    >>> model = resnet20()
    >>> with bypassed(model, "layer1.0"):
    ...     print(type(model.layer1[0]).__name__)
    PassThrough
    >>> print(type(model.layer1[0]).__name__)
    BasicBlock
    """
    if not name or name not in dict(model.named_modules()):
        raise ValueError(f"{name!r}: {type(model).__name__} has no such module; see model.named_modules()")
    new = stand_ins(model, name, kind, outputs)
    with swapped(model, new), copying(new.values()):
        yield model


def norm_after(model: nn.Module, name: str) -> str | None:
    """The norm of the plain unit with convolution `name`: the next child of the same parent; None if it is no unit.

    The convolution has as many channels out as in, one group and a kernel above 1x1; the norm a scale for each.
    """
    weight = getattr(model.get_submodule(name), "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 3 or weight.shape[0] != weight.shape[1]:
        return None
    norm = _next_child(model, name)
    if weight[0, 0].numel() == 1 or norm is None:
        return None
    scales = {tuple(p.shape) for p in model.get_submodule(norm).parameters()}
    return norm if scales == {(len(weight),)} else None


def activation_after(model: nn.Module, norm: str) -> str | None:
    """The activation of torch that is next after a norm in a Sequential, if it is used there alone; else None."""
    name = _next_child(model, norm)
    if name is None or not isinstance(model.get_submodule(norm.rpartition(".")[0]), nn.Sequential):
        return None
    following = model.get_submodule(name)
    places = sum(module is following for _, module in model.named_modules(remove_duplicate=False))
    return name if places == 1 and type(following).__module__ == nn.ReLU.__module__ else None


def _next_child(model: nn.Module, name: str) -> str | None:
    parent, _, own = name.rpartition(".")
    children = [key for key, _ in model.get_submodule(parent).named_children()]
    following = children[children.index(own) + 1 :][:1]
    return f"{parent}.{following[0]}".lstrip(".") if following else None
