"""Pruning inside the Trainer of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modprune._files import write_text
from modprune.gradual import GradualPruning, cut_again


class PruningCallback(TrainerCallback):
    """Removes blocks while transformers' Trainer trains; momentum and schedule go on with what stays.

    Save what came of it by `modprune.save(trainer.model, path)`. Checkpoints of the Trainer hold the weights that are
    left; what has gone is beside them, in `modprune.json`. The Trainer says nothing to its callbacks before the weights
    come back, so to go on from one takes `resume` first:

        callback.resume(trainer.model, "out/checkpoint-500")
        trainer.train(resume_from_checkpoint="out/checkpoint-500")

    With `load_best_model_at_end` the best may be of before the last stage, and what is left of it comes back.

    Args:
        loader: calibration batches, dicts with `labels`; those of the training if None.
        every: "epoch" or "step": what `at` counts.
        options: `at`, the budget and more, see `GradualPruning`.

    Raises:
        RuntimeError: when the training starts in several processes: the wrapper around the model would wait for the
            gradients of removed parameters.

    >>> callback = PruningCallback(at=(100,), every="step", blocks=2, criterion="block_influence")
    """

    def __init__(self, loader: Iterable[Any] | None = None, *, every: str = "epoch", **options: Any) -> None:
        if every not in ("epoch", "step"):
            raise ValueError(f"every={every!r}: 'epoch' or 'step' is needed")
        self.loader, self.every, self.options = loader, every, options
        self.pruning: GradualPruning | None = None
        self.found: dict[str, Any] | None = None

    def resume(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Remove from a whole model what was gone at a checkpoint, and go on from there when the training begins.

        Args:
            model: the Trainer's.
            checkpoint: the folder that `resume_from_checkpoint` gets.

        Raises:
            OSError: where it has no `modprune.json`; ValueError: for one of another model.
        """
        record = _record(checkpoint)
        if not record.exists():
            raise FileNotFoundError(f"{record}: not there: the training was without this callback, or cut short there")
        self.found = json.loads(record.read_text())
        cut_again(model, self.found)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The Trainer's hook: look at the network."""
        if args.world_size > 1:
            raise RuntimeError(
                f"{args.world_size} processes: the Trainer has wrapped the model already; prune it before trainer.train"
            )
        if self.found or self.pruning is None or self.pruning.model is not given["model"]:
            loader = given["train_dataloader"] if self.loader is None else self.loader
            self.pruning = GradualPruning(given["model"], loader, **self.options, state=self.found)
        self.found = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: prune if it is due by the step."""
        if self.every == "step" and self.pruning is not None:
            self.pruning(state.global_step, given["optimizer"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: prune if it is due by the epoch."""
        if self.every == "epoch" and self.pruning is not None:
            # A whole one may lack a rounding error; the last one may be a part, which is none.
            self.pruning(math.floor((state.epoch or 0) + 1e-6), given["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: what has gone, for `resume`."""
        record = _record(Path(str(args.output_dir), f"checkpoint-{state.global_step}"))
        if self.pruning is not None and state.is_world_process_zero and record.parent.exists():
            write_text(record, json.dumps(self.pruning.state_dict()))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: warn if stages never came due."""
        if self.pruning is not None:
            self.pruning.warn_if_unfinished()


def _record(checkpoint: str | Path) -> Path:
    return Path(checkpoint, "modprune.json")
