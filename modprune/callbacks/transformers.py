"""Pruning inside the Trainer of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from modprune.gradual import GradualPruning


class PruningCallback(TrainerCallback):
    """Removes blocks while transformers' Trainer trains; momentum and schedule go on with what stays.

    Save what came of it by `modprune.save(trainer.model, path)`: checkpoints of the Trainer hold the weights that are
    left, and go into a model that was pruned alike. A training resumed from one takes its budget anew, of what is left:
    ask for what is still to go.

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

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The Trainer's hook: look at the network."""
        if args.world_size > 1:
            raise RuntimeError(
                f"{args.world_size} processes: the Trainer has wrapped the model already; prune it before trainer.train"
            )
        loader = given["train_dataloader"] if self.loader is None else self.loader
        self.pruning = GradualPruning(given["model"], loader, **self.options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: prune if it is due by the step."""
        if self.every == "step" and self.pruning is not None:
            self.pruning(state.global_step, given["optimizer"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: prune if it is due by the epoch."""
        if self.every == "epoch" and self.pruning is not None:
            # A whole one may lack a rounding error; the last one may be a part, which is none.
            self.pruning(math.floor((state.epoch or 0) + 1e-6), given["optimizer"])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: warn if stages never came due."""
        if self.pruning is not None:
            self.pruning.warn_if_unfinished()
