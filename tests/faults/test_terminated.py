"""SIGTERM: the step that is being taken is saved, the process ends as it was told, and goes on from there later."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from modprune import finetune, signals
from modprune.checkpoints import states
from modprune.data import ImageLoader, digits
from modprune.finetune import Epoch
from modprune.models import CifarResNet, resnet20
from modprune.signals import put_off

IMAGES = digits(True).subset(torch.arange(160))
STEPS, EPOCHS = 5, 3


def network() -> nn.Module:
    """Which draws random numbers in every step."""
    torch.manual_seed(0)
    return nn.Sequential(CifarResNet((1, 1, 1)), nn.Dropout(0.1))


class Noisy(Dataset):
    """The images, each shaken by all generators."""

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, i: int):
        noise = random.random() + np.random.rand() + torch.rand(())
        return IMAGES.images[i] / 255 + noise, IMAGES.labels[i]


class Terminating:
    """A teacher that ends the process when it is asked for the `at`-th time."""

    def __init__(self, at: int | None) -> None:
        torch.manual_seed(1)
        self.asked, self.at, self.says = 0, at, CifarResNet((1, 1, 1)).eval()

    @torch.no_grad()
    def __call__(self, batch) -> torch.Tensor:
        self.asked += 1
        if self.asked == self.at:
            signal.raise_signal(signal.SIGTERM)
        return self.says(batch[0])


class Lazy:
    """A loader that draws each batch when it is asked for, between two steps that draw too."""

    def __len__(self) -> int:
        return STEPS

    def __iter__(self):
        for index in torch.randperm(len(IMAGES)).split(32):
            yield torch.stack([Noisy()[int(i)][0] for i in index]), IMAGES.labels[index]


LOADERS = {
    "ImageLoader": lambda: ImageLoader(IMAGES, 32, pad=1, shuffle=True),
    "lazy": Lazy,
    "prefetched": lambda: DataLoader(TensorDataset(IMAGES.images / 255, IMAGES.labels), 32, shuffle=True),
    "generator of its own": lambda: DataLoader(
        TensorDataset(IMAGES.images / 255, IMAGES.labels), 32, shuffle=True, generator=torch.Generator().manual_seed(1)
    ),
    "drawn in this process": lambda: DataLoader(Noisy(), 32, shuffle=True),
    "two workers": lambda: DataLoader(Noisy(), 32, shuffle=True, num_workers=2),
}


def run(kind: str, folder: Path | None = None, at: int | None = None) -> tuple[nn.Module, list[Epoch]]:
    """The run, from the newest state in `folder` on, ended when its teacher is asked for the `at`-th time."""
    random.seed(0)
    np.random.seed(0)
    model, loader, teacher = network(), LOADERS[kind](), Terminating(at)
    options = {"checkpoints": folder, "resume": folder is not None, "epochs": EPOCHS, "lr": 0.05, "progress": False}
    return model, finetune(model, loader, teacher=teacher, **options)


@pytest.mark.parametrize("kind", LOADERS)
def test_it_goes_on_from_the_very_step_to_the_same_weights(tmp_path, kind):
    expected, history = run(kind)
    for at, state in (
        (2, "0000-step-0000002"),
        (3, "0000-step-0000005"),
        (4, "0001-step-0000004"),
        (4, "0002-step-0000003"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(kind, tmp_path, at)
        assert ended.value.code == 143
        assert [folder.name for folder in states(tmp_path)] == [f"epoch-{state}"]
    found, again = run(kind, tmp_path)
    for name, value in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    assert [(e.loss, e.lr, e.train_top1) for e in again] == [(e.loss, e.lr, e.train_top1) for e in history]


def test_a_handler_of_ones_own_is_called_after_the_step_and_if_it_returns_the_run_goes_on(tmp_path):
    called = []
    handler = lambda *_: called.append(states(tmp_path))  # noqa: E731
    before = signal.signal(signal.SIGTERM, handler)
    try:
        _, history = run("lazy", tmp_path, at=7)
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
    assert [state.name for state in called[0]] == ["epoch-0001-step-0000002"]
    assert len(history) == EPOCHS
    assert [epoch.loss for epoch in history] == [epoch.loss for epoch in run("lazy")[1]]


def test_where_it_is_ignored_the_run_goes_on(tmp_path):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        _, history = run("lazy", tmp_path, at=7)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(history) == EPOCHS


def test_an_error_is_not_hidden_by_the_signal(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(OSError, match=r"the state after epoch 0 cannot be written \(no space left\)"):
        run("lazy", tmp_path, at=2)


def test_a_state_of_weights_that_the_step_broke_is_not_written(tmp_path):
    loader = [(torch.full((4, 1, 8, 8), 1e30), torch.zeros(4, dtype=torch.int64))] * 3

    def teach(batch) -> torch.Tensor:
        signal.raise_signal(signal.SIGTERM)
        return torch.zeros(4, 10)

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    nn.init.zeros_(model[1].weight)
    with pytest.raises(RuntimeError, match="the weights are not finite after the last step"):
        finetune(model, loader, teacher=teach, epochs=1, lr=1e30, checkpoints=tmp_path, progress=False)
    assert states(tmp_path) == []


def test_a_signal_that_comes_while_the_others_are_asked_is_not_lost(monkeypatch):
    def told_meanwhile(value):
        signal.raise_signal(signal.SIGTERM)
        return [value]

    monkeypatch.setattr(signals, "everyones", told_meanwhile)
    asked = []
    with pytest.raises(SystemExit), put_off(signal.SIGTERM) as told:
        asked.append(told.anywhere())
    assert asked == [False]


def test_a_run_that_an_epoch_is_begun_of_does_not_end_before_it(tmp_path):
    with pytest.raises(SystemExit):
        run("lazy", tmp_path, at=2 * STEPS + 1)
    options = {"checkpoints": tmp_path, "resume": True, "epochs": 2, "lr": 0.05, "progress": False}
    with pytest.raises(ValueError, match="has done or begun 3 already"):
        finetune(network(), Lazy(), teacher=Terminating(None), **options)


def test_outside_the_main_thread_nothing_is_put_off(tmp_path):
    before, histories = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: histories.append(run("lazy", tmp_path)[1]))
    thread.start()
    thread.join()
    assert len(histories[0]) == EPOCHS
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_saves_the_step_that_it_is_at(tmp_path):
    torch.manual_seed(0)
    torch.save(resnet20().state_dict(), tmp_path / "w.pt")
    out = tmp_path / "out"
    shared = ["--model", "resnet20", "--weights", tmp_path / "w.pt", "--data", "digits", "--criterion", "l1_norm"]
    command = [sys.executable, "-m", "modprune", "prune", *shared, "--blocks", 2, "--epochs", 9, "--out", out]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    shown = ""
    while "epoch 1/9:  " not in shown and (more := process.stderr.read(1)):
        shown += more
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "modprune: terminated; prune and study go on with --resume" in errors
    assert "Traceback" not in errors
    (state,) = states(out / "checkpoints")
    assert state.name.startswith("epoch-0000-step-")
    assert not list(tmp_path.rglob(".*"))
    assert not (out / "model.safetensors").exists()
