"""Epochs reach the CSV file and the trackers, once."""

from __future__ import annotations

import sys

import pytest

from modprune.finetune import Epoch
from modprune.tracking import read_metrics, trackers

EPOCHS = [Epoch(1, 2.5, 0.1, 100.0), Epoch(2, 1.5, 0.05, 110.0, 61.25, 70.5)]


def test_metrics_come_back_and_rows_made_anew_replace_the_old(tmp_path):
    for first in (EPOCHS[0], Epoch(1, 2.25, 0.1, 90.0)):
        with trackers((), tmp_path, {}) as tell:
            tell(first)
            tell(EPOCHS[1])
    assert read_metrics(tmp_path / "metrics.csv") == [Epoch(1, 2.25, 0.1, 90.0), EPOCHS[1]]
    assert (tmp_path / "metrics.csv").read_text().splitlines()[0] == "epoch,loss,lr,images_per_second,top1,train_top1"


@pytest.mark.filterwarnings("ignore")  # of tensorboard's dependencies
def test_tensorboard_gets_every_number(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    with trackers(("tensorboard",), out, {"lr": 0.1, "recipe": {"no": "plain value"}}) as tell:
        for epoch in EPOCHS:
            tell(epoch)
    events = EventAccumulator(str(out)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 1.5)]
    assert [(e.step, e.value) for e in events.Scalars("top1")] == [(2, 61.25)]
    assert [(e.step, e.value) for e in events.Scalars("train_top1")] == [(2, 70.5)]


def test_unknown_and_missing_trackers_are_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"log_with='chalk': accelerate has no such tracker: give some of .*tensorb"):
        trackers(("chalk",), tmp_path, {}).__enter__()
    monkeypatch.setitem(sys.modules, "aim", None)
    with pytest.raises(ValueError, match="log_with='aim' is not installed: pip install aim"):
        trackers(("aim",), tmp_path, {}).__enter__()
