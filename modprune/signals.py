"""Signals that come at a bad moment: put off until what is being done is done."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from modprune._processes import everyones


@dataclass
class Notice:
    """That a signal has come."""

    came: bool = False

    def anywhere(self) -> bool:
        """Whether it has, here or in another process, which all ask together; then it has come to all of them."""
        self.came = any(everyones(self.came))
        return self.came


@contextmanager
def put_off(number: int) -> Iterator[Notice]:
    """Only note a signal that would end the process, and obey it at the end.

    Whatever the signal did before it does then, but that the default ending becomes an orderly exit with the code
    128 + number. One that is ignored stays so. Outside the main thread, which alone can, nothing is put off.
    """
    notice, before = Notice(), signal.getsignal(number)
    if before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield notice
        return

    def note(*_: object) -> None:
        notice.came = True

    signal.signal(number, note)
    try:
        yield notice
    finally:
        signal.signal(number, before)
        if notice.came and before is signal.SIG_DFL:
            sys.exit(128 + number)
        if notice.came:
            signal.raise_signal(number)
