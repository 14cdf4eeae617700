"""bfloat16 is for where it is faster, which the name of an instruction does not tell."""

from __future__ import annotations

import platform

import pytest
import torch

from modprune.precision import autocast_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("amx", "avx512", "maker", "chosen"),
    [
        (True, True, "GenuineIntel", torch.bfloat16),
        (False, True, "GenuineIntel", None),
        (False, True, "AuthenticAMD", torch.bfloat16),
        (False, False, "AuthenticAMD", None),
    ],
)
def test_a_cpu_by_its_units_and_its_maker(monkeypatch, amx, avx512, maker, chosen):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512, raising=False)
    monkeypatch.setattr(platform, "processor", lambda: f"Family 6 Model 1, {maker}")  # as Windows has it
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_: f"vendor_id\t: {maker}")  # and Linux
    assert autocast_dtype(CPU) is chosen


def test_other_devices_have_none():
    assert autocast_dtype(torch.device("meta")) is None


def test_old_versions_of_torch_and_systems_without_the_file(monkeypatch):
    def missing(*_):
        raise FileNotFoundError

    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr("pathlib.Path.read_text", missing)
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert autocast_dtype(CPU) is torch.bfloat16
