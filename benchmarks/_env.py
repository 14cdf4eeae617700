"""What a published number carries: hardware, versions, commit; and how it is written."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from modprune._files import write_text

RESULTS = Path(__file__).parent / "results"
CHANGED = ("status", "--porcelain", "--", ":/", ":(top,exclude)benchmarks/results")
PACKAGES = ("torch", "torchvision", "torch-pruning", "fvcore", "thop", "numpy", "accelerate")


def environment() -> dict[str, Any]:
    """Processor, threads, library versions and the commit, with "+" if the tree, but for results, had changes."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git(*CHANGED) else ""),
    }


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


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} ({torch.backends.cpu.get_cpu_capability()})"
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip()
