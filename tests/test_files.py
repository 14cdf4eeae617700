"""Whether a file can be written is known before the work, and writing it comes to the same."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from modprune._files import LOCKS, alone, check_path, write_bytes

WRITABLE = ("new.txt", "file.txt", "deep/er/new.txt", "locked.txt", "dangling.txt", "n" * 255, "/dev/null")
CLOSED = (
    "closed/new.txt", "closed/file.txt", "into_closed.txt", "file.txt/new.txt", "closed", "dark/new.txt", "n" * 300,
)  # fmt: skip


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root may write anywhere."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def folder() -> Iterator[Path]:
    with as_nobody(), tempfile.TemporaryDirectory() as name:
        here = Path(name)
        for inner in ("closed", "dark"):
            (here / inner).mkdir()
        for file in ("file.txt", "locked.txt", "closed/file.txt"):
            (here / file).write_text("old")
        (here / "into_closed.txt").symlink_to(here / "closed" / "new.txt")
        (here / "dangling.txt").symlink_to(here / "not" / "yet.txt")
        (here / "locked.txt").chmod(0o444)
        (here / "closed").chmod(0o555)
        (here / "dark").chmod(0o000)
        yield here
        (here / "closed").chmod(0o755)
        (here / "dark").chmod(0o755)


@pytest.mark.parametrize("place", WRITABLE + CLOSED, ids=lambda place: place[:20])
def test_what_is_said_beforehand_is_what_happens(folder, place):
    before = sorted(folder.iterdir())
    if place in WRITABLE:
        check_path(folder / place)
        assert sorted(folder.iterdir()) == before
        write_bytes(folder / place, b"new")
        return
    for act in (check_path, lambda path: write_bytes(path, b"new")):
        with pytest.raises(
            OSError, match=rf"^{re.escape(str(folder / place))}: cannot be written \([^\n]*; give a f.*can$"
        ):
            act(folder / place)
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_a_file_keeps_its_mode_and_a_new_one_has_that_of_any_new_file(tmp_path, mode):
    old, new, plain = (tmp_path / name for name in ("old", "new", "plain"))
    old.touch()
    old.chmod(mode)
    plain.touch()
    for path in (old, new):
        write_bytes(path, b"new")
    assert old.stat().st_mode & 0o777 == mode
    assert new.stat().st_mode == plain.stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "old", "plain"]


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_workers_that_were_forked_do_not_hold_on_to_a_folder(tmp_path):
    with alone(tmp_path):
        fork = multiprocessing.get_context("fork")
        begun = fork.Event()
        worker = fork.Process(target=lambda: (begun.set(), time.sleep(60)))
        worker.start()
        begun.wait()
        with pytest.raises(ValueError, match="another run is at work there"), alone(tmp_path):
            pass
    try:
        with alone(tmp_path):
            assert worker.is_alive()
    finally:
        worker.kill()
    assert not LOCKS  # a number left there may be another file's by the next fork


def test_what_goes_to_the_output_takes_the_place_of_nothing(tmp_path):
    (tmp_path / "log").write_text("before\n")
    script = "from modprune._files import write_text; print('text'); write_text('/dev/stdout', 'json\\n'); print('end')"
    with (tmp_path / "log").open("a") as log:
        subprocess.run([sys.executable, "-c", script], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "before\ntext\njson\nend\n"
