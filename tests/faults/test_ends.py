"""Real processes that are terminated, or whose disk is full: a clear end, and nothing half-written."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from modprune.checkpoints import states
from modprune.models import resnet20

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, *more: object) -> list[str]:
    torch.manual_seed(0)
    torch.save(resnet20().state_dict(), folder / "w.pt")
    shared = ["--model", "resnet20", "--weights", folder / "w.pt", "--data", "digits", "--criterion", "l1_norm"]
    arguments = ["prune", *shared, "--blocks", 2, "--epochs", 9, "--out", folder / "out", *more]
    return [sys.executable, "-m", "modprune", *map(str, arguments)]


def strays(folder: Path) -> list[Path]:
    """Files that something half-written would leave."""
    return list(folder.rglob(".*"))


def test_terminated_it_leaves_a_state_to_go_on_with(tmp_path):
    process = subprocess.Popen(command(tmp_path), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not states(tmp_path / "out" / "checkpoints") and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "modprune: terminated; prune and study go on with --resume" in errors
    assert "Traceback" not in errors
    assert len(states(tmp_path / "out" / "checkpoints")) == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_full_disk_is_one_line_and_leaves_no_half_of_a_file(tmp_path):
    # A limit on the size of files fails writes as a full disk does, with another number.
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    done = subprocess.run(command(tmp_path), env=ENV, capture_output=True, text=True, check=False, preexec_fn=limit)
    assert done.returncode == 1
    assert "the state after epoch 1 cannot be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert strays(tmp_path) == []
    assert states(tmp_path / "out" / "checkpoints") == []
