"""Networks and data sets by a short text, as command lines and benchmarks name them."""

from __future__ import annotations

import importlib
import inspect
import runpy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from modprune._inputs import first_line
from modprune.data import ImageData, cifar10, cifar100, digits
from modprune.models import MODELS

T = TypeVar("T")

FORMS = "torchvision:NAME, timm:NAME, transformers:NAME or path/to/file.py:function"
DATA: dict[str, Callable[[Path, bool], ImageData]] = {
    "cifar10": cifar10,
    "cifar100": cifar100,
    "digits": lambda _, train: digits(train),
}


def build_model(spec: str, num_classes: int = 10) -> nn.Module:
    """The network that `spec` names, with fresh random weights.

    Args:
        spec: a built-in name (`resnet56`), `torchvision:NAME`, `timm:NAME`, `transformers:NAME` (a model type such as
            `vit`, a folder or a hub name: its config, for image classification where the type can) or
            `path/to/file.py:function`, which is run: give only files that you trust.
        num_classes: of a built-in network; the others have their own.

    Raises:
        ValueError: if the spec names nothing or the library for it is missing; RuntimeError: if building fails. One
            line each.

    >>> sum(p.numel() for p in build_model("resnet56").parameters())
    853018
    """
    source, name = model_parts(spec)
    if not source:
        return MODELS[name](num_classes=num_classes)
    return _made(f"model {spec!r}", nn.Module, _LIBRARIES.get(source) or _from_file(Path(source)), name)


def model_parts(spec: str) -> tuple[str, str]:
    """Where the network that `spec` names comes from, "" for a built-in one, and its name there.

    Raises:
        ValueError: if the spec can name nothing.
    """
    if spec in MODELS:
        return "", spec
    source, _, name = spec.partition(":")
    if source not in _LIBRARIES:
        source, _, name = spec.rpartition(":")  # a path may have a colon itself
    if name and (source in _LIBRARIES or source.endswith(".py")):
        return source, name
    raise ValueError(f"model {spec!r} is unknown: give one of {', '.join(MODELS)}, or {FORMS}")


def load_data(spec: str, folder: str | Path, train: bool) -> ImageData:
    """The images of the data set that `spec` names.

    Args:
        spec: `cifar10`, `cifar100`, `digits`, or `path/to/file.py:function`, which is run and its function called with
            `train`, for an `ImageData`: give only files that you trust.
        folder: where CIFAR lies.
        train: the training images, or those for testing.

    Raises:
        ValueError: if the spec names nothing; RuntimeError: if the function fails; OSError: for CIFAR that is not
            there. One line each.

    >>> load_data("digits", "", train=False).images.shape
    torch.Size([360, 3, 8, 8])
    """
    path, name = data_parts(spec)
    if not path:
        return DATA[name](Path(folder), train)
    return _made(f"data {spec!r}", ImageData, _from_file(Path(path)), name, train)


def data_parts(spec: str) -> tuple[str, str]:
    """The file that makes the data set that `spec` names, "" for a built-in one, and the name of the function there.

    Raises:
        ValueError: if the spec can name nothing.
    """
    if spec in DATA:
        return "", spec
    path, _, name = spec.rpartition(":")
    if name and path.endswith(".py"):
        return path, name
    raise ValueError(f"data {spec!r} is unknown: give one of {', '.join(DATA)}, or path/to/file.py:function")


def data_shape(spec: str) -> tuple[int, tuple[int, ...]]:
    """How many classes a data set has, and the shape (C, H, W) of its images; CIFAR need not be there for that.

    Raises:
        ValueError, RuntimeError: as `load_data`.
    """
    if spec in ("cifar10", "cifar100"):
        return int(spec.removeprefix("cifar")), (3, 32, 32)
    data = load_data(spec, "", train=True)
    return data.num_classes, tuple(data.images.shape[1:])


def _made(what: str, kind: type[T], make: Callable[..., Any], *arguments: Any) -> T:
    """What somebody else's code gives, with its errors on one line."""
    try:
        made = make(*arguments)
    except (ValueError, ImportError) as error:
        raise ValueError(f"{what}: {first_line(error)}") from None
    except SystemExit as error:
        raise RuntimeError(f"{what} cannot be built: it calls sys.exit; let it do so as a script alone") from error
    except Exception as error:
        raise RuntimeError(f"{what} cannot be built: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, kind):
        raise ValueError(f"{what} gives {type(made).__name__}, not {kind.__name__}")
    return made


def _from_torchvision(name: str) -> Any:
    from torchvision.models import get_model_builder, list_models

    if name not in list_models():
        raise ValueError("torchvision has no such model; see torchvision.models.list_models()")
    builder = get_model_builder(name)
    arguments = [a for a in ("weights", "weights_backbone") if a in inspect.signature(builder).parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of two old networks, about how they draw their weights
        return builder(**dict.fromkeys(arguments))


def _from_timm(name: str) -> Any:
    timm = _import("timm")
    if not timm.is_model(name):
        raise ValueError("timm has no such model; see timm.list_models()")
    return timm.create_model(name, pretrained=False)


def _from_transformers(name: str) -> Any:
    transformers = _import("transformers")
    if name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    elif "/" not in name and not Path(name).is_dir():
        raise ValueError("transformers has no such model type; see transformers.CONFIG_MAPPING")
    else:
        try:
            config = transformers.AutoConfig.from_pretrained(name)
        except OSError:
            raise ValueError("no folder with a config.json and no reachable name on the hub") from None
    for images in (transformers.AutoModelForImageClassification, transformers.AutoModel):
        if type(config) in images._model_mapping:
            return images.from_config(config)
    raise ValueError(f"{type(config).__name__} has no model that stands alone")


def _from_file(path: Path) -> Callable[..., Any]:
    def build(name: str, *arguments: Any) -> Any:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        folder = str(path.parent.resolve())
        sys.path.insert(0, folder)  # as `python path` has it: the file may import its neighbours
        try:
            function = runpy.run_path(str(path)).get(name)
            if not callable(function):
                raise ValueError(f"{path} has no function {name!r}")
            return function(*arguments)
        finally:
            if folder in sys.path:
                sys.path.remove(folder)

    return build


def _import(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError:
        raise ValueError(f"{library} is not installed: pip install {library}") from None


_LIBRARIES: dict[str, Callable[[str], Any]] = {
    "torchvision": _from_torchvision,
    "timm": _from_timm,
    "transformers": _from_transformers,
}
