"""Signals that come at a bad moment: put off until what is being done is done."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from modprune._processes import everyones


@dataclass
class Notice:
    """That a signal has come, which would have gone to the handler `before`."""

    number: int
    before: Callable[[int, FrameType | None], Any] | int | None
    came: bool = False

    def anywhere(self) -> bool:
        """Whether it has, here or in another process, which all ask together; then it has come to all of them."""
        told = any(everyones(self.came))
        self.came = self.came or told  # it may have come here meanwhile
        return told

    def obey(self) -> None:
        """Do now what the signal would have done; the default ending is an orderly exit with the code 128 + number."""
        self.came = False
        if self.before is signal.SIG_DFL:
            sys.exit(128 + self.number)
        if callable(self.before):
            self.before(self.number, None)


@contextmanager
def put_off(number: int) -> Iterator[Notice]:
    """Only note a signal that would end the process, to be obeyed when it suits, at the end at the latest.

    One that is ignored stays so. Outside the main thread, which alone can, nothing is put off. An error goes first.
    """
    notice = Notice(number, signal.getsignal(number))
    if notice.before in (signal.SIG_IGN, None) or threading.current_thread() is not threading.main_thread():
        yield Notice(number, signal.SIG_IGN)
        return

    def note(*_: object) -> None:
        notice.came = True

    signal.signal(number, note)
    try:
        yield notice
    finally:
        signal.signal(number, notice.before)
    if notice.came:
        notice.obey()
