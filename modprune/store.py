"""Pruned models as one safetensors file: weights, plan and checksum, no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from modprune._bare import bare, check_filled, check_shaped
from modprune._files import write_bytes
from modprune._state import deep_copied
from modprune.models import CifarResNet, CifarResNet18, CifarVGG
from modprune.plan import PruningPlan
from modprune.surgery import removed_blocks
from modprune.weights import check_fit, fill, read_safetensors
from modprune.width import narrowed_layers, resize

FORMAT = 3
FLOATS = {str(dtype): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}
BUILT_IN = {made.__name__: made for made in (CifarResNet, CifarResNet18, CifarVGG)}


def save(model: nn.Module, path: str | Path) -> None:
    """Save a model, pruned or not, to one safetensors file, written in one step.

    The header says which blocks are gone and which layers are narrower (read off the model) and holds a checksum, so
    that `load` can rebuild the model from the unpruned one without example inputs.

    Raises:
        OSError: if the file cannot be written; ValueError: for a state that is no tensor, or none for safetensors.
    """
    model = bare(model)
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name}: a {type(value).__name__} in the state dict, and the file holds tensors alone")
        if hasattr(value, "device_mesh"):
            raise ValueError(f"{name}: sharded over devices (FSDP): save a model that holds the whole state dict")
        if value.layout != torch.strided or value.is_quantized or value.dtype in (torch.complex128, torch.complex32):
            raise ValueError(f"{name}: {value.layout} of {value.dtype}, which safetensors cannot hold")
    tensors = _apart({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    plan, narrowed = removed_blocks(model), narrowed_layers(model)
    structure = {
        "plan": json.loads(plan.to_json()),
        "narrowed": narrowed,
        "built_in": _maker_of(model, plan, narrowed, tensors),
        "unsaved": {name: str(buffer.dtype) for name, buffer in _unsaved(model).items()},
    }
    header = {"format": FORMAT, **structure, "sha256": checksum(structure, tensors)}
    write_bytes(path, safetensors.torch.save(tensors, metadata={"modprune": json.dumps(header)}))


@torch.inference_mode(False)  # of such tensors, none could be trained
def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """A saved model.

    Args:
        path: a file that `save` wrote.
        model: a fresh unpruned model of the same architecture, pruned and filled in place; not needed for the networks
            of `modprune.models`, which come in training mode, on the CPU.

    Raises:
        OSError: if the file is not there; ValueError: if it is truncated, altered, of a newer format, not written by
            `save` or of another network; one line, and the given model stays as it was.
    """
    tensors, metadata = read_safetensors(Path(path))
    if "modprune" not in metadata:
        raise ValueError(f"{path}: not a file of modprune.save; for plain weights use modprune.load_weights")
    header = _header(path, metadata["modprune"], tensors)
    plan = _plan(path, header["plan"])
    narrowed = header["narrowed"]
    if not isinstance(narrowed, list) or not all(isinstance(name, str) for name in narrowed):
        raise _damaged(path)
    if model is None:
        model = _built(path, header["built_in"], plan, narrowed, tensors)
        model.to_empty(device="cpu")
        fill(model, tensors)
        return model
    if bare(model) is not model:
        raise ValueError(f"the model is wrapped in {type(model).__name__}: give what it wraps, then wrap it anew")
    check_filled(model)
    check_shaped(model)
    if gone := removed_blocks(model).remove:
        raise ValueError(f"{path}: the model given has lost {gone[0]} before: give a whole one")
    for candidate in (deep_copied(model), model):  # all that can fail fails on a copy, before the caller's is touched
        _take_shape(candidate, path, plan, narrowed, tensors)
        fill(candidate, tensors)
        for name, buffer in _unsaved(candidate).items():
            buffer.data = buffer.data.to(FLOATS.get(header["unsaved"].get(name), buffer.dtype))
    return model


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """No two in one piece of memory, which safetensors refuses."""
    places, apart = set[int](), dict[str, Tensor]()
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[name] = tensor.clone() if place in places else tensor
        places.add(place)
    return apart


def _take_shape(
    model: nn.Module, path: str | Path, plan: PruningPlan, narrowed: Sequence[str], tensors: Mapping[str, Tensor]
) -> None:
    """Make the model one that the tensors fit, in shape and type: float32 would round float64."""
    try:
        plan.apply(model)
        resize(model, narrowed, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: a file of another network: {error}") from error
    check_fit(path, model, tensors)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in tensors:
            tensor.data = tensor.data.to(tensors[name].dtype)


def _unsaved(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point buffers that the state dict lacks: their precision, once chosen, matters all the same."""
    saved = model.state_dict().keys()
    return {name: b for name, b in model.named_buffers() if name not in saved and b.is_floating_point()}


def _header(path: str | Path, text: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    try:
        header = json.loads(text)
        version = header["format"]
        if type(version) is not int or version < 1:
            raise TypeError
        if version > FORMAT:
            raise ValueError(f"{path}: of format {version}; this modprune reads up to {FORMAT}: update modprune")
        keys = ["plan", "narrowed", "cifar_resnet" if version == 1 else "built_in", "unsaved"]
        structure = {key: header[key] for key in keys[: 3 if version < 3 else 4]}
        expected = header["sha256"]
    except (KeyError, TypeError, json.JSONDecodeError, RecursionError):
        raise _damaged(path) from None
    if expected != checksum(structure, tensors):
        raise ValueError(f"{path}: its contents do not match their checksum: the file was altered; get it anew")
    if version == 1:  # which knew one class
        arguments = structure.pop("cifar_resnet")
        structure["built_in"] = arguments and {"class": "CifarResNet", "arguments": arguments}
    structure.setdefault("unsaved", {})
    if not isinstance(structure["unsaved"], dict):
        raise _damaged(path)
    return structure


def _damaged(path: str | Path) -> ValueError:
    return ValueError(f"{path}: its header is damaged: get it anew")


def _plan(path: str | Path, data: Any) -> PruningPlan:
    if not isinstance(data, dict):
        raise _damaged(path)
    try:
        return PruningPlan.from_json(json.dumps(data))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def checksum(structure: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of values of JSON's types and of tensors on any device, with their names, types and shapes."""
    digest = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _maker_of(
    model: nn.Module, plan: PruningPlan, narrowed: Sequence[str], tensors: Mapping[str, Tensor]
) -> dict[str, Any] | None:
    """The class and arguments of a built-in network; None for others, and where they would not make this one again."""
    if type(model) not in BUILT_IN.values():  # a subclass may compute something else
        return None
    try:
        maker = {"class": type(model).__name__, "arguments": model.arguments}
        again = _built("", maker, plan, narrowed, tensors)
    except Exception:  # of what its owner has put into it
        return None
    return maker if _looks(again) == _looks(model) else None


def _looks(model: nn.Module) -> list[tuple[str, ...]]:
    """The modules by name: where their classes are from, for two may have one name, and what they print of themselves.

    Not what the whole prints: shortcuts traced by torch.fx lose the name of their class as they are copied.
    """
    return [(name, type(m).__module__, type(m).__qualname__, m.extra_repr()) for name, m in model.named_modules()]


def _built(
    path: str | Path, maker: Any, plan: PruningPlan, narrowed: Sequence[str], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """A built-in network that the tensors fit, without values; a forged header costs no more than its file."""
    if maker is None:
        raise ValueError(f"{path}: not of a network that modprune has built in: give the unpruned model to load into")
    try:
        made, arguments = BUILT_IN[maker["class"]], dict(maker["arguments"])
        sizes = [size for name, size in arguments.items() if name != "blocks"]
        most = len(tensors) + len(plan.remove)
        if not all(1 <= count <= most for count in arguments.get("blocks", ())) or not all(size > 0 for size in sizes):
            raise ValueError
        with torch.device("meta"):
            model = made(**arguments)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
        raise _damaged(path) from None
    _take_shape(model, path, plan, narrowed, tensors)
    return model
