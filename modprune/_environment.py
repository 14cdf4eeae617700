"""What a number was measured with: processor, threads, library versions, commit, host."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("modprune", "torch", "torchvision", "torch-pruning", "fvcore", "thop", "numpy", "accelerate")


def environment() -> dict[str, Any]:
    """Processor, threads, accelerator and library versions."""
    return {
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def commit(folder: Path, *paths: str) -> str | None:
    """The commit of the repository that `folder` is in, with "+" if `paths` of its tree have changes; None without."""
    head = _git(folder, "rev-parse", "--short", "HEAD")
    return head and head + ("+" if _git(folder, "status", "--porcelain", "--", *paths) else "")


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder, check=False)
    except OSError:  # no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    said = info.read_text() if info.exists() else ""
    units = torch.backends.cpu.get_cpu_capability() + (", AMX" if " amx_tile" in said else "")
    name = re.search(r"^model name\s*: (.*)", said, re.MULTILINE)
    return f"{name[1].strip()} ({units})" if name else platform.processor() or platform.machine()
