"""What the commands share: the options, spelt alike, and what they load."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modprune._files import check_path

if TYPE_CHECKING:
    from torch import nn


MODEL_NAMES = (
    *("resnet20", "resnet32", "resnet44", "resnet56", "resnet110", "resnet18"),
    *("vgg11_bn", "vgg13_bn", "vgg16_bn", "vgg19_bn"),
)
DATA_NAMES = ("cifar10", "cifar100", "digits")
CRITERION_NAMES = (
    *("modularity", "modularity_drop", "modularity_pooled", "linear_probe", "dbp", "cka", "block_influence"),
    *("ablation", "taylor", "l1_norm", "bn_scale", "consensus", "random"),
)


def _one_of(choices: tuple[str, ...]) -> Any:
    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is unknown: give one of {', '.join(choices)}")
        return value

    return check


def check_model(value: str) -> str:
    """A spec as given; raises typer.BadParameter for one that can name nothing."""
    if value not in MODEL_NAMES and ":" not in value:
        raise typer.BadParameter(
            f"{value!r} is unknown: give one of {', '.join(MODEL_NAMES)}, torchvision:NAME, timm:NAME, "
            "transformers:NAME or path/to/file.py:function"
        )
    return value


def check_data(value: str) -> str:
    """A spec as given; raises typer.BadParameter for one that can name nothing."""
    if value not in DATA_NAMES and ".py:" not in value:
        raise typer.BadParameter(
            f"{value!r} is unknown: give one of {', '.join(DATA_NAMES)} or path/to/file.py:function"
        )
    return value


def _fraction(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is no fraction between 0 and 1, such as 0.6 for 60 %")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number, such as 0.1")
    return value


def to_write(value: Path | None) -> Path | None:
    """The file of a result, as given; told before the work if it cannot be written."""
    if value is not None:
        check_path(value)
    return value


_NETWORKS = (
    f"{', '.join(MODEL_NAMES)}; or torchvision:NAME, timm:NAME, transformers:NAME, path/to/file.py:function "
    "(a file of yours: it is run)."
)
Model = Annotated[str, typer.Option(help=f"Network: {_NETWORKS}", callback=check_model)]
Weights = Annotated[Path, typer.Option(help="Its trained weights: a .th, .pt or .safetensors file.")]
_DATA_SETS = f"{', '.join(DATA_NAMES)}; or path/to/file.py:function (a file of yours: it is run)."
Data = Annotated[str, typer.Option(help=f"Data set: {_DATA_SETS}", callback=check_data)]
DataDir = Annotated[Path, typer.Option(help="Folder that holds cifar-10-batches-py or cifar-100-python.")]
Flops = Annotated[float | None, typer.Option(help="Fraction of MACs to remove, at least.", callback=_fraction)]
Params = Annotated[float | None, typer.Option(help="Fraction of parameters to remove, at least.", callback=_fraction)]
Latency = Annotated[
    float | None,
    typer.Option(
        help="Fraction of the time to remove, at least, as measured here; not with --flops.", callback=_fraction
    ),
]
Count = Annotated[int | None, typer.Option("--blocks", min=1, help="How many blocks to remove, exactly.")]
Width = Annotated[
    float | None,
    typer.Option(help="Fraction of channels to cut inside the blocks that stay, by torch-pruning.", callback=_fraction),
]
Criterion = Annotated[
    str,
    typer.Option(help=f"What scores the blocks: {', '.join(CRITERION_NAMES)}.", callback=_one_of(CRITERION_NAMES)),
]
Rate = Annotated[float, typer.Option(min=0.0, help="Peak learning rate.", callback=_finite)]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of calibration images, their order and augmentation.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON to this file as well.", callback=to_write)
]
K = Annotated[int, typer.Option(min=1, help="Neighbours of each sample in the feature graph.")]
Samples = Annotated[int, typer.Option(min=2, help="Images in each measurement.")]
Repeats = Annotated[int, typer.Option(min=1, help="How many times to measure, on other images each time.")]


def load_network(name: str, weights: Path | None, device: str, data: str) -> nn.Module:
    """The network of a spec on a device, with weights or fresh ones; a built-in one has the classes of `data`."""
    from modprune import load_weights
    from modprune.specs import build_model, data_shape

    network = build_model(name, data_shape(data)[0]) if name in MODEL_NAMES else build_model(name)
    return (load_weights(network, weights) if weights is not None else network).to(pick_device(device))


def pick_device(name: str) -> str:
    """The device of `--device`; raises typer.BadParameter where there is none of the name."""
    import torch

    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # "meta", say, is a device and holds nothing
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(f"--device {name}: {str(error).splitlines()[0]}") from None
    return name
