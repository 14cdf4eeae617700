"""What a published number carries: hardware, versions, commit; and how it is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modprune import _environment
from modprune._files import write_text

RESULTS = Path(__file__).parent / "results"
CHANGED = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)benchmarks/paper")


def environment() -> dict[str, Any]:
    """Processor, threads, library versions and the commit, with "+" if the tree, but for results, had changes."""
    return {**_environment.environment(), "commit": _environment.commit(Path(__file__).parent, *CHANGED)}


def write_result(name: str, data: dict[str, Any]) -> Path:
    """`benchmarks/results/NAME.json`, with the environment beside the data."""
    path = RESULTS / f"{name}.json"
    write_text(path, json.dumps({**data, "environment": environment()}, indent=2) + "\n")
    return path


def peak_rss() -> Callable[[], float]:
    """Start measuring; the callable says by how many MiB resident memory has risen above now at the most. Linux."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to what is resident now
    before = _high_water()
    return lambda: (_high_water() - before) / 1024


def _high_water() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
