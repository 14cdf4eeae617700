"""Weights from elsewhere are filled in, or are one line and leave the model alone."""

from __future__ import annotations

import math
import pickle
import re

import pytest
import safetensors.torch
import torch

from modprune.models import resnet20, resnet56
from modprune.weights import load_weights

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.fill_(math.nan), "linear.weight holds NaN"),
        (torch.Tensor.to_sparse, "linear.weight is sparse"),
        (lambda t: t.to("meta"), "linear.weight is sparse, quantized or without values"),
        (torch.Tensor.char, r"linear.weight is of torch.int8 there and of torch.float32 here"),
        (lambda t: t.to(torch.complex64), "linear.weight is of torch.complex64 there"),
    ],
)
def test_weights_that_are_no_numbers_for_the_network(change, message, tmp_path):
    state = resnet20().state_dict()
    state["linear.weight"] = change(state["linear.weight"].clone())
    torch.save(state, tmp_path / "odd.pt")
    model = resnet20()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, tmp_path / "odd.pt")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return print, ("this code came out of a weights file",)


def test_plain_weights_of_every_common_layout(tmp_path):
    model = resnet20()
    state = model.state_dict()
    nested = {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}, "best": 1.0}
    torch.save(state, tmp_path / "a.pt")
    torch.save(nested, tmp_path / "b.th")
    safetensors.torch.save_file(state, tmp_path / "c.safetensors")
    torch.save({"model_state_dict": state, "epoch": 3}, tmp_path / "d.pt")
    torch.save(torch.optim.swa_utils.AveragedModel(model).state_dict(), tmp_path / "average.pt")
    torch.save({f"module._orig_mod.{name}": tensor for name, tensor in state.items()}, tmp_path / "compiled.pt")
    for name in ("a.pt", "b.th", "c.safetensors", "d.pt", "average.pt", "compiled.pt"):
        assert torch.equal(load_weights(resnet20(), tmp_path / name).eval()(X), model.eval()(X))


def test_bad_weights_are_one_line_and_change_nothing(tmp_path, capsys):
    torch.save({"w": Evil()}, tmp_path / "evil.th")
    (tmp_path / "pickle.th").write_bytes(pickle.dumps(Evil()))
    torch.save(resnet20().state_dict(), tmp_path / "whole.th")
    (tmp_path / "truncated.th").write_bytes((tmp_path / "whole.th").read_bytes()[:50_000])
    torch.save([1, 2], tmp_path / "list.th")
    torch.save({"net": resnet20().state_dict(), "epoch": 3}, tmp_path / "nested.th")
    (tmp_path / "text.th").write_text('{"a": 1}')
    model = resnet56()
    before = model.eval()(X)
    for name, message in (
        ("evil.th", "would run code"),
        ("pickle.th", "would run code|not a PyTorch file"),
        ("truncated.th", "truncated"),
        ("text.th", "not a PyTorch file"),
        ("list.th", r"no state dict \(names with tensors\); save"),
        ("nested.th", "no state dict .* but 'net', 'epoch'; save"),
        ("whole.th", "another network"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            load_weights(model, tmp_path / name)
        assert re.search(name, str(caught.value))
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_weights(model, tmp_path / "missing.th")
    assert torch.equal(model(X), before)
    assert "this code came out" not in capsys.readouterr().out


def test_names_are_taken_as_they_are_where_they_fit(tmp_path):
    class Holder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = torch.nn.Linear(2, 2)

    first, second = Holder(), Holder()
    for state in (first.state_dict(), torch.nn.DataParallel(first).state_dict()):
        torch.save(state, tmp_path / "w.pt")
        assert torch.equal(load_weights(second, tmp_path / "w.pt").module.weight, first.module.weight)
        torch.nn.init.zeros_(second.module.weight)


def test_a_network_with_extra_state_takes_plain_weights(tmp_path):
    class Noted(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"seen": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"seen": 3}

    plain = torch.nn.Linear(2, 2)
    torch.save(plain.state_dict(), tmp_path / "w.pt")
    assert torch.equal(load_weights(Noted(2, 2), tmp_path / "w.pt").weight, plain.weight)
