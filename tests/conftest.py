"""Where the real data and checkpoints are, if they are here; tests that need them skip by name where they are not."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from modprune import report
from modprune.cost import latency

SHARED = Path(os.environ.get("MODPRUNE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def pytest_collection_finish() -> None:
    """What the libraries have made by now stays for good: to look through it at every collection takes a while."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Some count at the end what is left of them."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def precision_left_open() -> Iterator[None]:
    """A Trainer's Accelerator settles the precision of all later ones in its process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def short_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report looks at the clock for a tenth of a second: no test asks for more decimals."""
    monkeypatch.setattr(report, "latency", partial(latency, seconds=0.1))


@pytest.fixture(scope="session")
def cifar10_dir() -> Path:
    """The folder that holds `cifar-10-batches-py`."""
    root = SHARED / "data"
    if not (root / "cifar-10-batches-py").is_dir():
        pytest.skip(f"CIFAR-10 is not at {root}: set MODPRUNE_SHARED to the folder that holds data/ and weights/")
    return root


@pytest.fixture(scope="session")
def checkpoint() -> Callable[[str], Path]:
    """The public CIFAR-10 checkpoint of a network: `checkpoint("resnet56")` is its path."""

    def find(name: str) -> Path:
        found = sorted((SHARED / "weights").glob(f"{name}-*.th"))
        if not found:
            pytest.skip(f"no checkpoint {name}-*.th in {SHARED / 'weights'}")
        return found[0]

    return find
