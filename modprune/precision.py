"""Which precision a device multiplies fastest in."""

from __future__ import annotations

from functools import cache
from time import perf_counter

import torch
import torch.nn.functional as F


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the hardware multiplies it faster than float32 (CUDA from Ampere on; of CPUs with AMX or
    AVX512-BF16 those on which convolutions, measured once per process, run faster), else None.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if device.type == "cpu" and _cpu_gains() else None


@cache
def _cpu_gains() -> bool:
    """AVX512-BF16 says that there is such an instruction, not that it is fast.

    Intel's cores take longer by it than by float32 where AMX is hidden, as in virtual machines; AMD's take less.
    """
    units = (getattr(torch.cpu, f"_is_{unit}_supported", lambda: False) for unit in ("amx_tile", "avx512_bf16"))
    if not any(supported() for supported in units):
        return False  # emulated
    times = [(_seconds(torch.float32), _seconds(torch.bfloat16)) for _ in range(5)]  # in turns: others run here too
    return min(bf16 for _, bf16 in times) < min(float32 for float32, _ in times)


@torch.no_grad()
def _seconds(dtype: torch.dtype) -> float:
    """Of four 3 x 3 convolutions of 64 channels, some milliseconds."""
    sizes = (16, 64, 16, 16), (64, 64, 3, 3)
    images, weight = (
        torch.ones(size, dtype=dtype, device="cpu").to(memory_format=torch.channels_last) for size in sizes
    )
    started = perf_counter()
    for _ in range(4):
        images = F.conv2d(images, weight, padding=1)
    return perf_counter() - started
