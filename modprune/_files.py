"""Files that are whole or not there: written beside, then renamed; and what is written to them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from operator import methodcaller
from pathlib import Path
from typing import Any

STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}
LOCKS: set[int] = set()  # of the folders that this process is `alone` in


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file in one step as seen from outside; a kill at any moment leaves the old one or the new one.

    Raises:
        OSError: if the folder cannot be made or written; one line that names it.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        if str(path) in STREAMS:  # it may lead to a file that holds something already
            sys.stdout.flush()
            with os.fdopen(os.dup(STREAMS[str(path)]), "wb") as stream:
                stream.write(data)
            return
        if path.exists() and not path.is_file():  # a device or a pipe: nothing takes its place
            path.write_bytes(data)
            return
        target = Path(os.path.realpath(path))  # a link goes on to lead there
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name[:50]}.{secrets.token_hex(4)}")
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():
            shutil.copymode(target, partial)
        os.replace(partial, target)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        if partial:
            partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OSError(f"{path}: cannot be written ({error.strerror}); give a folder that can") from error


def check_path(path: str | Path) -> None:
    """Raises OSError, in one line, if `write_bytes` could not write there; nothing is made."""
    target = Path(os.path.realpath(path))
    try:
        if target.is_dir():
            problem = "it is a folder"
        elif target.exists() and not target.is_file():  # a device or a pipe
            problem = "" if os.access(target, os.W_OK) else "Permission denied"
        else:
            folder = next(place for place in target.parents if place.exists())
            denied = "" if os.access(folder, os.W_OK | os.X_OK) else f"{folder}: Permission denied"
            problem = denied if folder.is_dir() else f"{folder} is no folder"
    except OSError as error:  # a folder that may not be looked into, a name that is too long
        problem = str(error.strerror)
    if problem:
        raise OSError(f"{path}: cannot be written ({problem}); give a file in a folder that can")


def _let_go() -> None:
    """In a worker that was forked: with the locks open it would hold them after the end of the process they are of."""
    while LOCKS:
        os.close(LOCKS.pop())


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """No other process that asks for it works in this folder meanwhile; a kill lets go of it, and no file is left.

    Raises:
        ValueError: if one does.
    """
    try:
        import fcntl
    except ImportError:  # on Windows nobody is kept out
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    LOCKS.add(handle)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another run is at work there: wait for it, or give another folder") from None
        except OSError:
            pass  # a file system without locks: nobody is kept out, as on Windows
        yield
    finally:
        if handle in LOCKS:  # else in a fork, which has let go of it
            LOCKS.remove(handle)
            os.close(handle)


def to_json(data: Any, path: str | Path | None = None, indent: int | None = 2) -> str:
    """JSON text, written to `path` as well if given; numbers of numpy, which arguments may be, become Python's own."""
    text = json.dumps(data, indent=indent, default=methodcaller("item")) + "\n"
    if path is not None:
        write_text(path, text)
    return text


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` for text, in UTF-8."""
    write_bytes(path, text.encode())
