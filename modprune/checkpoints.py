"""States of a training run on disk: written beside, then renamed, so that a kill at any moment leaves a whole one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from safetensors import safe_open
from torch import Tensor

from modprune._files import to_json
from modprune._inputs import first_line
from modprune._processes import everyones

PREFIX, SEAL = "epoch-", "sha256.json"


def save_state(accelerator: Any, folder: Path, epoch: int, step: int = 0) -> None:
    """Write the state after `epoch`, and `step` steps of the next one, and delete older ones once it is there.

    It is named `folder/epoch-NNNN`, or `folder/epoch-NNNN-step-NNNNNNN` amid an epoch.

    Raises:
        OSError: if it cannot be written; older states stay.
    """
    name = f"{PREFIX}{epoch:04d}" + (f"-step-{step:07d}" if step else "")
    final, partial = folder / name, folder / f".{name}.partial"
    for cut in folder.glob(f".{PREFIX}*.partial") if accelerator.is_main_process else ():
        shutil.rmtree(cut)
    accelerator.wait_for_everyone()
    if problems := _problems(lambda: accelerator.save_state(str(partial))) or _problems(
        lambda: accelerator.is_main_process and to_json(_checksums(partial), partial / SEAL)
    ):
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{folder}: the state after epoch {epoch} cannot be written ({problems[0]}); is the disk full?")
    if accelerator.is_main_process:
        older = states(folder)
        partial.rename(final)
        for state in older:
            shutil.rmtree(state)
    accelerator.wait_for_everyone()


def load_newest(accelerator: Any, folder: Path) -> tuple[int, int]:
    """Bring the newest state in `folder` back and return its epoch and step; zeros where there is none yet.

    Raises:
        ValueError: if it is damaged, with the model as it was, or of another network.
    """
    found = states(folder)
    if not found:
        return 0, 0
    try:
        # First: accelerate loads the weights before it comes to other files, and passes over damaged random states.
        sealed = json.loads((found[-1] / SEAL).read_text())
        if sealed != {name: checksum for name, checksum in _checksums(found[-1]).items() if name in sealed}:
            raise ValueError("its files do not match their checksums")
        accelerator.load_state(str(found[-1]))
    except Exception as error:  # as in `_problems`
        raise ValueError(f"{found[-1]}: cannot be loaded ({first_line(error)}): start in a new folder") from error
    epoch, _, step = found[-1].name.removeprefix(PREFIX).partition("-step-")
    return int(epoch), int(step or 0)


def _problems(act: Callable[[], Any]) -> list[str]:
    """What goes wrong as the processes act: all learn of it, so that none waits for one that has left."""
    problem = ""
    try:
        act()
    except Exception as error:  # of torch, safetensors and pickle, each of a class of its own
        problem = first_line(error)
    return list(filter(None, everyones(problem)))


def _checksums(state: Path) -> dict[str, str]:
    """SHA-256 of every file of a state, by name."""
    checksums = {}
    for path in sorted(state.iterdir()):
        if path.name != SEAL and path.is_file():
            with path.open("rb") as file:
                checksums[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return checksums


def states(folder: Path) -> list[Path]:
    """The whole states in `folder`, oldest first."""
    return sorted(folder.glob(f"{PREFIX}[0-9]*"))


def difference(state: Path, tensors: Mapping[str, Tensor]) -> str:
    """The first tensor that is not of the same shape in a state and in `tensors`, in words; empty if they fit.

    Raises:
        ValueError: if the state cannot be read.
    """
    try:
        with safe_open(state / "model.safetensors", framework="pt") as file:
            theirs = {name: f"of shape {tuple(file.get_slice(name).get_shape())}" for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises a class of its own
        raise ValueError(f"{state}: cannot be read ({first_line(error)}): start in a new folder") from None
    kept = {tensors[name].data_ptr() for name in theirs if name in tensors}  # what has two names is there under one
    mine = {n: f"of shape {tuple(t.shape)}" for n, t in tensors.items() if n in theirs or t.data_ptr() not in kept}
    for name in (*theirs, *mine):
        there, here = theirs.get(name, "missing"), mine.get(name, "missing")
        if there != here:
            return f"{name} is {there} there and {here} here"
    return ""


def check_writable(folder: Path) -> None:
    """Make `folder`; raises OSError, in one line, if it cannot be made or written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        problem = "it is a file" if folder.is_file() else error.strerror
        raise OSError(f"{folder}: cannot be written ({problem}); give a folder that can") from None


def check_empty(folder: Path) -> None:
    """Raises ValueError if `folder` holds states: a later resume could not tell two runs apart."""
    if states(folder):
        raise ValueError(f"{folder}: holds the state of a run: resume it, or give another folder")
