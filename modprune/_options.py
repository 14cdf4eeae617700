"""The options that commands share, spelt alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from modprune._files import check_path
from modprune.criteria import CRITERIA
from modprune.models import MODELS
from modprune.specs import DATA, FORMS, data_parts, model_parts


def _one_of(choices: Collection[str]) -> Any:
    def check(value: str) -> str:
        if value not in choices:
            raise typer.BadParameter(f"{value!r} is unknown: give one of {', '.join(choices)}")
        return value

    return check


def _spec(parts: Callable[[str], tuple[str, str]]) -> Callable[[str], str]:
    """What lets a spec through as given; it raises typer.BadParameter for one that can name nothing."""

    def check(value: str) -> str:
        try:
            parts(value)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        return value

    return check


check_model, check_data = _spec(model_parts), _spec(data_parts)


def _fraction(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is not a fraction between 0 and 1, such as 0.6 for 60 %")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number, such as 0.1")
    return value


def to_write(value: Path | None) -> Path | None:
    """The file of a result, as given; told before the work if it cannot be written."""
    if value is not None:
        check_path(value)
    return value


_NETWORKS = f"{', '.join(MODELS)}; or {FORMS} (a file of yours: it is run)."
Model = Annotated[str, typer.Option(help=f"Network: {_NETWORKS}", callback=check_model)]
Weights = Annotated[Path, typer.Option(help="Its trained weights: a .th, .pt or .safetensors file.")]
_DATA_SETS = f"{', '.join(DATA)}; or path/to/file.py:function (a file of yours: it is run)."
Data = Annotated[str, typer.Option(help=f"Data set: {_DATA_SETS}", callback=check_data)]
DataDir = Annotated[Path, typer.Option(help="Folder that holds cifar-10-batches-py or cifar-100-python.")]
Flops = Annotated[float | None, typer.Option(help="Minimum fraction of the MACs to remove.", callback=_fraction)]
Params = Annotated[float | None, typer.Option(help="Minimum fraction of the parameters to remove.", callback=_fraction)]
Latency = Annotated[
    float | None,
    typer.Option(
        help="Minimum fraction of the time of a forward pass to remove, as measured here; not with --flops.",
        callback=_fraction,
    ),
]
Count = Annotated[int | None, typer.Option("--blocks", min=1, help="Exact number of blocks to remove.")]
Width = Annotated[
    float | None,
    typer.Option(help="Fraction of channels to cut inside the blocks that stay, by torch-pruning.", callback=_fraction),
]
Criterion = Annotated[
    str,
    typer.Option(help=f"What scores the blocks: {', '.join(CRITERIA)}.", callback=_one_of(CRITERIA)),
]
Rate = Annotated[float, typer.Option(min=0.0, help="Peak learning rate.", callback=_finite)]
Seed = Annotated[
    int, typer.Option(min=0, max=2**32 - 1, help="Random seed of calibration images, their order and augmentation.")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.")]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write the result as JSON to this file as well.", callback=to_write)
]
K = Annotated[int, typer.Option(min=1, help="Neighbours of each sample in the feature graph.")]
Samples = Annotated[int, typer.Option(min=2, help="Images in each measurement.")]
Repeats = Annotated[
    int, typer.Option(min=1, help="How many times to measure, on other images each time; 1 leaves the noise out.")
]
