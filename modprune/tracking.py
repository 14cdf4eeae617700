"""The numbers people watch, epoch by epoch: a CSV file, and the trackers that accelerate knows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import accelerate.utils
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from modprune._files import write_text
from modprune.finetune import Epoch

KNOWN: dict[str, Any] = {str(kind): tracker for kind, tracker in LOGGER_TYPE_TO_CLASS.items()}


@contextmanager
def trackers(names: Sequence[str], folder: Path, arguments: Mapping[str, Any]) -> Iterator[Callable[[Epoch], None]]:
    """A callable for `finetune(after_epoch=...)` that writes `folder/metrics.csv` and tells the trackers named.

    Args:
        names: as accelerate has them: "tensorboard" (the extra `modprune[tensorboard]`), "wandb", "mlflow", ...
        folder: of the run; trackers that take a folder for their files (tensorboard) write below it.
        arguments: of the run, kept with it by trackers that can.

    Raises:
        ValueError: for a name that accelerate does not know, or a tracker that is not installed.
    """
    check_names(names)
    running = [_started(name, folder, arguments) for name in names]

    def tell(epoch: Epoch) -> None:
        add_row(folder / "metrics.csv", epoch)
        for tracker in running:
            tracker.log(
                {name: v for name, v in asdict(epoch).items() if name != "epoch" and v is not None}, epoch.epoch
            )

    try:
        yield tell
    finally:
        for tracker in running:
            tracker.finish()


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError for a name that accelerate does not know, or of what is not installed."""
    for name in names:
        if name not in KNOWN:
            raise ValueError(f"log_with={name!r}: accelerate has no such tracker: give some of {', '.join(KNOWN)}")
        if not getattr(accelerate.utils, f"is_{name}_available")():
            raise ValueError(f"log_with={name!r} is not installed: pip install {name}")


def _started(name: str, folder: Path, arguments: Mapping[str, Any]) -> Any:
    place = {"logging_dir": str(folder.parent)} if KNOWN[name].requires_logging_directory else {}
    tracker = KNOWN[name](folder.name, **place)
    tracker.start()
    plain = {key: value for key, value in arguments.items() if isinstance(value, (int, float, str))}
    tracker.store_init_configuration(plain)
    return tracker


def read_metrics(path: Path) -> list[Epoch]:
    """The epochs of a `metrics.csv`."""
    with path.open(newline="") as file:
        return [
            Epoch(int(row.pop("epoch")), **{name: float(v) if v else None for name, v in row.items()})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]


def add_row(path: Path, epoch: Epoch) -> None:
    """Add an epoch to a `metrics.csv`; rows of an interrupted run that are made anew are replaced."""
    rows = path.read_text().splitlines()[1:] if path.exists() else []
    rows = [row for row in rows if int(row.split(",")[0]) < epoch.epoch]
    new = asdict(epoch)
    row = ",".join("" if value is None else str(value) for value in new.values())
    write_text(path, "\n".join([",".join(new), *rows, row]) + "\n")
