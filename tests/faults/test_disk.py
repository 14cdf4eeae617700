"""Real processes whose disk is full: a clear end, and nothing half-written."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import torch

from modprune.checkpoints import states
from modprune.models import resnet20


def command(folder: Path, *more: object) -> list[str]:
    torch.manual_seed(0)
    torch.save(resnet20().state_dict(), folder / "w.pt")
    shared = ["--model", "resnet20", "--weights", folder / "w.pt", "--data", "digits", "--criterion", "l1_norm"]
    arguments = ["prune", *shared, "--blocks", 2, "--epochs", 9, "--out", folder / "out", *more]
    return [sys.executable, "-m", "modprune", *map(str, arguments)]


def strays(folder: Path) -> list[Path]:
    """Files that something half-written would leave."""
    return list(folder.rglob(".*"))


def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_file(tmp_path):
    # A limit on the size of files fails writes as a full disk does, with another number.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    done = subprocess.run(command(tmp_path), capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert "the state after epoch 1 cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert strays(tmp_path) == []
    assert states(tmp_path / "out" / "checkpoints") == []
