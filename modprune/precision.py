"""Which precision a device multiplies fastest in."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it faster than float32, else None: CUDA from Ampere on, CPUs with AMX,
    those with AVX512-BF16 that are not Intel's.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    # Intel's have the instruction too, but convolutions by it take longer than in float32: they are made for AMX, which
    # virtual machines hide. A rule and no measurement: a run that is resumed has to find the same.
    gains = _has("amx_tile") or (_has("avx512_bf16") and not _is_intels())
    return torch.bfloat16 if device.type == "cpu" and gains else None


def _has(unit: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{unit}_supported", lambda: False)())


def _is_intels() -> bool:
    """By what the system says of the processor: Windows there, Linux in a file."""
    said = platform.processor()
    with suppress(OSError):
        said += Path("/proc/cpuinfo").read_text()
    return "GenuineIntel" in said
