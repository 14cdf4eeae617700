"""Weights in files from elsewhere: read whole or refused in one line, and filled into a network that they fit."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from modprune._bare import check_filled

_PREFIX = re.compile(r"^(module|_orig_mod)\.")


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a model in place with plain weights: a `.safetensors` file, or a PyTorch file read with `weights_only`.

    A state dict nested under "state_dict", "model_state_dict" or "model" and names that begin with "module." (of
    DataParallel, or an average) or "_orig_mod." (of torch.compile) are understood.

    Raises:
        OSError: if the file is not there; ValueError: if it is truncated, would run code, is no state dict, holds
            NaN or is of another network or number of classes; one line, and the model stays as it was.
    """
    check_filled(model)
    path = Path(path)
    state: Any
    metadata: Mapping[str, str] = {}
    if path.suffix == ".safetensors":
        state, metadata = read_safetensors(path)
    else:
        state = _read_torch(path)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not state or not all(isinstance(t, Tensor) for t in state.values()):
        held = f" but {', '.join(map(repr, list(state)[:5]))}" if isinstance(state, Mapping) and state else ""
        raise ValueError(f"{path}: holds no state dict (names with tensors){held}; save model.state_dict() to it")
    tensors = {str(name): tensor for name, tensor in state.items() if name != "n_averaged"}
    while not tensors.keys() <= model.state_dict().keys() and any(map(_PREFIX.match, tensors)):
        tensors = {_PREFIX.sub("", name): tensor for name, tensor in tensors.items()}
    counters = {k: v for k, v in model.state_dict().items() if k.endswith("num_batches_tracked") and k not in tensors}
    tensors |= counters  # older checkpoints have none
    try:
        check_fit(path, model, tensors)
    except ValueError as error:
        if "modprune" not in metadata:
            raise
        raise ValueError(f"{error}; a pruned network in a file of modprune.save is what modprune.load reads") from None
    if broken := [name for name, tensor in tensors.items() if tensor.isnan().any()]:
        raise ValueError(f"{path}: {broken[0]} holds NaN, as after a training that diverged; give earlier weights")
    fill(model, tensors)
    return model


def is_plain(path: str | Path) -> bool:
    """Whether a file holds weights that are not by `save`; False where it cannot be read, for `load` to say why."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return "modprune" not in (file.metadata() or {})
    except Exception:  # safetensors raises a class of its own
        return Path(path).suffix != ".safetensors" and Path(path).is_file()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        if path.is_dir():
            raise IsADirectoryError(f"{path}: a folder; give the .safetensors file in it") from None
        raise OSError(f"{path}: cannot be read ({error})") from None
    except Exception as error:  # safetensors raises a class of its own
        raise ValueError(f"{path}: not a whole safetensors file ({str(error)[:80]}); give a whole one") from None


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old pickle protocols: what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; give the checkpoint of the network") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path}: a folder; give the file of weights in it") from None
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error) and ("Unsupported" in str(error) or "GLOBAL" in str(error)):
            raise ValueError(
                f"{path}: loading it would run code from the file; refused. Save only model.state_dict() to it"
            ) from None
        raise ValueError(f"{path}: not a PyTorch file of weights, or a truncated one; get it anew") from None
    except PermissionError as error:
        raise PermissionError(f"{path}: cannot be read ({error.strerror})") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError, OSError):
        raise ValueError(f"{path}: not a PyTorch file of weights, or a truncated one; get it anew") from None


def check_fit(path: str | Path, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError unless these are tensors of the model's names, shapes and kinds of number."""
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    mine = {name: tuple(t.shape) for name, t in own.items()}
    other = {name: tuple(t.shape) for name, t in tensors.items()}
    if mine == other:
        for name, tensor in tensors.items():
            if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
                raise ValueError(f"{path}: {name} is sparse, quantized or without values: save a plain state dict")
            if _kind(tensor) != _kind(own[name]):
                raise ValueError(f"{path}: {name} is of {tensor.dtype} there and of {own[name].dtype} here")
        return
    differing = [n for n in mine if n in other and mine[n] != other[n]]
    missing, extra = [n for n in mine if n not in other], [n for n in other if n not in mine]
    detail = (
        f"{differing[0]} has shape {other[differing[0]]} there and {mine[differing[0]]} here" if differing
        else f"{missing[0]} is missing there" if missing else f"{extra[0]} is unknown here"
    )  # fmt: skip
    count = len(differing) + len(missing) + len(extra)
    raise ValueError(f"{path}: weights of another network or number of classes: {detail} ({count} names differ)")


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    state = model.state_dict()  # with the versions of the modules' formats, which some insist on
    state.update(tensors)
    model.load_state_dict(state)
