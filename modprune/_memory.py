"""How a process of our own, not one that we are a guest in, has the C library hold its memory."""

from __future__ import annotations

import contextlib
import ctypes

# Of mallopt, in <malloc.h>: how many blocks may be mapped on their own, and how much free memory is kept.
M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1


def keep_freed_memory() -> None:
    """Have glibc keep what is freed; other C libraries do nothing.

    It gives big blocks back to the system at once, every training step asks for the same ones anew, and the system
    fills each with zeros, page by page.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
