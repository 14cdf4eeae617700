"""Fine-tuning killed twenty times, amid its checkpoints too, ends with the weights of the run left alone."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from modprune import finetune
from modprune.checkpoints import states
from modprune.data import ImageLoader, digits
from modprune.models import resnet20

KILLS, AMID_A_CHECKPOINT = 20, 6
EPOCHS = KILLS + 2  # no kill lets more than one epoch pass: however fast the machine becomes, the run is not over
IMAGES = digits(True).subset(torch.arange(128))


def run(folder: Path, loader=None, epochs=EPOCHS, **options) -> nn.Module:
    torch.manual_seed(0)
    model = resnet20()
    loader = loader or ImageLoader(IMAGES, 64, pad=1, shuffle=True)
    finetune(model, loader, teacher=resnet20().eval(), epochs=epochs, checkpoints=folder, progress=False, **options)
    return model


def child(folder: Path, result: Path) -> None:
    # Forks share the usual lock: whoever is killed while holding it would stop all that come after.
    tqdm.set_lock(threading.RLock())
    torch.save(run(folder, resume=True).state_dict(), result)


def is_writing(folder: Path) -> bool:
    return any(folder.glob(".*.partial/*"))


def wait(folder: Path, seconds: float) -> None:
    """So long, or until one more state is there, and alone."""
    before, deadline = states(folder)[-1:], time.monotonic() + seconds
    while time.monotonic() < deadline and ((now := states(folder))[-1:] == before or len(now) > 1):
        time.sleep(0.0005)


def test_killed_twenty_times_it_ends_like_the_run_left_alone(tmp_path):
    started = time.monotonic()
    expected = run(tmp_path / "whole").state_dict()
    epoch = (time.monotonic() - started) / EPOCHS
    folder, result, chance = tmp_path / "killed", tmp_path / "result.pt", random.Random(0)
    fork, reached, hit = multiprocessing.get_context("fork"), [], 0
    for kill in range(KILLS):
        process = fork.Process(target=child, args=(folder, result))
        process.start()
        if kill < AMID_A_CHECKPOINT:
            while not is_writing(folder) and process.is_alive():
                time.sleep(0.0005)
        else:
            wait(folder, chance.uniform(0, 3 * epoch))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        hit += is_writing(folder)
        assert not result.exists()
        reached.append([state.name for state in states(folder)])
    assert hit > 0  # at least one state was cut while it was written
    assert all(len(names) <= 2 for names in reached)
    process = fork.Process(target=child, args=(folder, result))
    process.start()
    process.join()
    found = torch.load(result, weights_only=True)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert len(states(folder)) == 1
    assert not is_writing(folder)


class Rows(Dataset):
    """The images; the worker that is asked for the first one dies, as long as `deadly` is there.

    With a batch under way to its reader as it dies, that one may get the error of a broken pipe.
    """

    def __init__(self, deadly: Path) -> None:
        self.deadly = deadly

    def __len__(self) -> int:
        return len(IMAGES)

    def __getitem__(self, i: int):
        if i == 0 and self.deadly.exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return IMAGES.images[i] / 255, IMAGES.labels[i]


def test_a_worker_that_dies_is_told_and_the_run_goes_on_later(tmp_path):
    deadly, folder = tmp_path / "deadly", tmp_path / "states"
    loader = DataLoader(Rows(deadly), 64, num_workers=1)
    expected = run(tmp_path / "whole", loader, epochs=3).state_dict()
    history = []

    def after(epoch) -> None:
        history.append(epoch.epoch)
        if epoch.epoch == 2:
            deadly.touch()

    with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid.*\) (is killed|exited unexpectedly)"):
        run(folder, loader, epochs=3, after_epoch=after)
    assert [state.name for state in states(folder)] == ["epoch-0002"]
    deadly.unlink()
    found = run(folder, loader, epochs=3, resume=True, after_epoch=after).state_dict()
    assert history == [1, 2, 3]
    assert all(torch.equal(found[name], value) for name, value in expected.items())
