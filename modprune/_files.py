"""Files that are whole or not there: written beside, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file in one step as seen from outside; a kill at any moment leaves the old one or the new one.

    Raises:
        OSError: if the folder cannot be made or written; one line that names it.
    """
    path = Path(path)
    handle, partial = -1, ""
    try:
        if path.exists() and not path.is_file():  # a device or a pipe, as /dev/stdout: nothing takes its place
            path.write_bytes(data)
            return
        path = Path(os.path.realpath(path))  # a link goes on to lead there
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        if partial:
            Path(partial).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(f"{path}: cannot be written ({error.strerror}); give a folder that can") from error


def check_path(path: str | Path) -> None:
    """Raises OSError, in one line, if no file can be written there; nothing is made."""
    path = Path(path)
    found = next(place for place in (path, *path.absolute().parents) if place.exists())
    if found.is_dir() == (found == path) or not os.access(found, os.W_OK):
        raise OSError(f"{path}: cannot be written ({found} is in the way); give a file in a folder that can")


def write_text(path: str | Path, text: str) -> None:
    """The same for text, in UTF-8."""
    write_bytes(path, text.encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
