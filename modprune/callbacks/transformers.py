"""Pruning inside the Trainer of transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safetensors import safe_open
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

    With `load_best_model_at_end` the best may be of before the last stage, and what is left of it comes back. A search
    for hyper-parameters keeps no `modprune.json`.

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
        self.found: tuple[nn.Module, dict[str, Any] | None] | None = None

    def resume(self, model: nn.Module, checkpoint: str | Path) -> None:
        """Remove from a whole model what was gone at a checkpoint, and go on from there when the training begins.

        A checkpoint of a training without this callback has lost nothing: the pruning begins there.

        Args:
            model: the Trainer's.
            checkpoint: the folder that `resume_from_checkpoint` gets.

        Raises:
            OSError: where it lacks weights of the model and has no `modprune.json`; ValueError: for one of another
                model, one that has lost more since, and weights under other names than the model's, which the Trainer
                would pass over in silence.
        """
        record, saved, known = _record(checkpoint), _saved_names(Path(checkpoint)), model.state_dict().keys()
        state = None
        if record.exists():
            try:
                state = json.loads(record.read_text())
            except ValueError:
                raise ValueError(f"{record}: not JSON: take an earlier checkpoint") from None
        elif saved is not None and known - saved:
            raise FileNotFoundError(f"{record}: not there, nor all weights: the training was cut short there")
        for name in sorted((saved or set()) - known):
            raise ValueError(
                f"{record.parent}: its {name} is unknown to the {type(model).__name__}: the Trainer would leave such "
                "weights as they are; load them yourself, as from_pretrained does, which knows the names of files"
            )
        if state is not None:
            cut_again(model, state)
        self.found = model, state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """The Trainer's hook: look at the network."""
        if args.world_size > 1:
            raise RuntimeError(
                f"{args.world_size} processes: the Trainer has wrapped the model already; prune it before trainer.train"
            )
        model, found, self.found = given["model"], self.found, None
        if found and found[0] is not model:
            raise RuntimeError("resume was given another model than is trained: give the Trainer that one as model=")
        if state.global_step and not found and self.pruning is None:
            raise RuntimeError(
                f"trainer.train goes on from step {state.global_step}: call callback.resume(trainer.model, checkpoint) "
                "before it, which removes what had gone"
            )
        resumed = found[1] if found else None
        if resumed or self.pruning is None or self.pruning.model is not model:
            loader = given["train_dataloader"] if self.loader is None else self.loader
            self.pruning = GradualPruning(model, loader, **self.options, state=resumed)
        if resumed and self.pruning.count < _epochs(state):
            # A checkpoint of an epoch's last step is of before the stage at its end, which the Trainer does not repeat.
            self.on_epoch_end(args, state, control, **given)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: prune if it is due by the step."""
        if self.every == "step" and self.pruning is not None:
            self.pruning(state.global_step, given["optimizer"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: prune if it is due by the epoch."""
        if self.every == "epoch" and self.pruning is not None and _epochs(state):
            self.pruning(_epochs(state), given["optimizer"])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: what has gone, for `resume`."""
        record = _record(Path(str(args.output_dir), f"checkpoint-{state.global_step}"))
        if self.pruning is not None and state.is_world_process_zero and record.parent.exists():
            write_text(record, json.dumps(self.pruning.state_dict()))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """The Trainer's hook: warn if stages never came due."""
        if self.pruning is not None:
            self.pruning.warn_if_unfinished()


def _epochs(state: TrainerState) -> int:
    """Whole ones so far: one may lack a rounding error; the last one may be a part, which is none."""
    return math.floor((state.epoch or 0) + 1e-6)


def _saved_names(checkpoint: Path) -> set[str] | None:
    """Of the weights in a checkpoint; None for one of PEFT's adapters alone, which have other names in the model."""
    if any(checkpoint.rglob("adapter_model.*")):  # several adapters have folders of their own
        return None
    names: set[str] = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


def _record(checkpoint: str | Path) -> Path:
    return Path(checkpoint, "modprune.json")
