"""bfloat16 is for where it is faster, which the name of an instruction does not tell."""

from __future__ import annotations

import pytest
import torch

from modprune import precision
from modprune.precision import autocast_dtype

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured_anew():
    precision._cpu_gains.cache_clear()
    yield
    precision._cpu_gains.cache_clear()


def units(monkeypatch: pytest.MonkeyPatch, *, amx: bool, avx512: bool) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize(("bf16", "chosen"), [(0.5, torch.bfloat16), (1.5, None)])
def test_a_cpu_with_the_instruction_is_measured(monkeypatch, amx, bf16, chosen):
    units(monkeypatch, amx=amx, avx512=True)
    monkeypatch.setattr(precision, "_seconds", lambda dtype: bf16 if dtype is torch.bfloat16 else 1.0)
    assert autocast_dtype(CPU) is chosen


def test_one_disturbed_measurement_does_not_decide(monkeypatch):
    units(monkeypatch, amx=False, avx512=True)
    times = {torch.float32: iter([9.0, 1, 1, 1, 1]), torch.bfloat16: iter([0.5, 9, 9, 9, 9])}
    monkeypatch.setattr(precision, "_seconds", lambda dtype: next(times[dtype]))
    assert autocast_dtype(CPU) is torch.bfloat16
    assert autocast_dtype(CPU) is torch.bfloat16  # from then on without another measurement


def test_without_the_instruction_nothing_is_measured(monkeypatch):
    units(monkeypatch, amx=False, avx512=False)
    monkeypatch.delattr(precision, "_seconds")
    assert autocast_dtype(CPU) is None
    assert autocast_dtype(torch.device("meta")) is None


def test_a_measurement_takes_time_and_no_random_number():
    before = torch.get_rng_state()
    assert all(0 < precision._seconds(dtype) < 60 for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), before)
