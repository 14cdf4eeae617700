"""Pruning inside Lightning's Trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from modprune._bare import bare
from modprune.gradual import GradualPruning, cut_again


class PruningCallback(Callback):
    """Removes blocks while Lightning trains; momentum and schedules go on with what stays.

    Save what came of it by `modprune.save(module.network, path)`. Lightning's own checkpoints hold the weights that are
    left, and what has gone: `ckpt_path=` takes up a module that is whole, with this callback, pruned as it was then.
    Those that a `ModelCheckpoint(save_weights_only=True)` writes do not say what has gone. The averages of Lightning's
    own callbacks (SWA, EMA) lose the same blocks. A network takes one such callback.

    Args:
        loader: calibration batches as the network takes them; those of the training, as the step gets them, if None.
        network: qualified name of the network in the LightningModule; "" is the module itself, by its `forward`.
        every: "epoch" or "step": what `at` counts.
        options: `at`, the budget and more, see `GradualPruning`.

    Raises:
        RuntimeError: when the training starts in several processes: the wrapper that Lightning has put around the
            module would wait for the gradients of removed parameters.

    >>> from lightning.pytorch import Trainer
    >>> trainer = Trainer(callbacks=[PruningCallback(at=(2, 4), flops=0.5)], logger=False, accelerator="cpu")
    """

    def __init__(
        self, loader: Iterable[Any] | None = None, *, network: str = "", every: str = "epoch", **options: Any
    ) -> None:
        if every not in ("epoch", "step"):
            raise ValueError(f"every={every!r}: 'epoch' or 'step' is needed")
        self.loader, self.network, self.every, self.options = loader, network, every, options
        self.pruning: GradualPruning | None = None
        self.found: tuple[nn.Module, dict[str, Any]] | None = None
        self.step = 0

    @property
    def state_key(self) -> str:
        """Lightning's name for the state in checkpoints: another for each network."""
        return self._generate_state_key(network=self.network)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's hook: for the checkpoint."""
        if self.pruning is not None:
            return self.pruning.state_dict()
        return self.found[1] if self.found else {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's hook: see to it that blocks go before the weights of a checkpoint come back.

        Callbacks get their state after the weights: only around the loading itself is it early enough.
        """
        load = trainer.strategy.load_model_state_dict

        def cut_first(checkpoint: dict[str, Any], *options: Any, **others: Any) -> None:
            if state := checkpoint.get("callbacks", {}).get(self.state_key):
                network = pl_module.get_submodule(self.network)
                cut_again(network, state)
                self._cut_averages(trainer, state)
                self.found, self.pruning = (network, state), None
            load(checkpoint, *options, **others)

        trainer.strategy.load_model_state_dict = cut_first  # type: ignore[method-assign, assignment]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Lightning's hook: loading is as it was."""
        vars(trainer.strategy).pop("load_model_state_dict", None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Lightning's hook: likewise, of a training cut short."""
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: look at the network."""
        if trainer.world_size > 1:
            raise RuntimeError(
                f"{trainer.world_size} processes: Lightning has wrapped the module already; prune it before trainer.fit"
            )
        network, self.step = pl_module.get_submodule(self.network), trainer.global_step
        state = self.found[1] if self.found and self.found[0] is network else None
        self.found = None
        if state or self.pruning is None or self.pruning.model is not network:
            loader = _AsTrained(trainer) if self.loader is None else self.loader
            self.pruning = GradualPruning(network, loader, **self.options, state=state)
        if state and self.every == "epoch" and self.pruning.count < trainer.current_epoch:
            # A checkpoint of an epoch's last step is of before the stage at its end, which Lightning does not repeat.
            self._prune(trainer, trainer.current_epoch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Lightning's hook: prune if it is due by the step."""
        if self.every == "step" and self.pruning is not None and trainer.global_step > self.step:
            self.step = trainer.global_step  # several batches may make one
            self._prune(trainer, self.step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: prune if it is due by the epoch."""
        if self.every == "epoch" and self.pruning is not None:
            self._prune(trainer, trainer.current_epoch + 1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook: warn if stages never came due."""
        if self.pruning is not None:
            self.pruning.warn_if_unfinished()

    def _prune(self, trainer: Trainer, count: int) -> None:
        assert self.pruning is not None
        if self.pruning(count, *trainer.optimizers):
            self._cut_averages(trainer, self.pruning.state_dict())

    def _cut_averages(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Out of the copies of the module that Lightning's averaging callbacks have made when the fit began."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module) and isinstance(inner := bare(average), LightningModule):
                cut_again(inner.get_submodule(self.network), state)


class _AsTrained:
    """The batches of a training as its step gets them: in the trainer's precision, through the transfer's hooks."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.base_dataloader: Any = trainer.train_dataloader  # as accelerate calls what is read within

    def __iter__(self) -> Iterator[Any]:
        trainer = self.trainer
        for batch in self.base_dataloader:
            batch = trainer.lightning_module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch))
            yield trainer.strategy.batch_to_device(batch)
