"""Fine-tuning: SGD with a cosine schedule, distillation from a teacher, mixed precision, resume, several processes."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIG_IGN, SIGTERM
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from modprune._accelerate import accelerate_left_as_found, accelerator_for, prepared
from modprune._bare import bare
from modprune._files import alone
from modprune._inputs import call, device_of, first_line, split_batch, to_device
from modprune._means import Diverged, Means, share_right
from modprune._processes import everyones, from_first, meet, place
from modprune._random import from_batch, own_state, random_state, set_own_state
from modprune._state import modes_kept
from modprune.checkpoints import check_empty, check_writable, difference, load_newest, save_state, states
from modprune.data import set_epoch
from modprune.distill import (
    CachedTeacher,
    Teacher,
    check_logits,
    check_probabilities,
    distillation_loss,
    logits_of,
    teaching,
)
from modprune.evaluate import evaluate
from modprune.precision import autocast_dtype
from modprune.recipe import Recipe, warmup_cosine
from modprune.signals import Notice, put_off


@dataclass(frozen=True)
class Epoch:
    """What one epoch measured: mean loss over its images, rate at its end, images per second, and Top-1 in percent.

    `top1` is that of the validation images, if there are any; `train_top1` that of the training images as they came,
    augmented, if they have labels.
    """

    epoch: int
    loss: float
    lr: float
    images_per_second: float
    top1: float | None = None
    train_top1: float | None = None


def finetune(
    model: nn.Module,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    teacher: nn.Module | Teacher | None = None,
    checkpoints: str | Path | None = None,
    resume: bool = False,
    halvings: int = 0,
    progress: bool = True,
    after_epoch: Callable[[Epoch], object] | None = None,
    **recipe: float,
) -> list[Epoch]:
    """Train `model` in place and return what each epoch measured; the weights kept are those of the last epoch.

    bf16 autocast is used where the device gains from it (`autocast_dtype`).

    Args:
        model: returns logits (B, classes), or an output whose first tensor they are; `torch.compile(model)` trains by
            what is compiled. All of it is in training mode meanwhile, so that statistics of frozen batch norms move
            too; its modes are put back afterwards.
        train_loader: sized; `(inputs, labels, ...)` batches or dicts with `labels`. A torch DataLoader is spread over
            the processes; anything else gives each process its share itself, as `ImageLoader` does.
        val_loader: Top-1 is measured on it after every epoch, for people to watch; nothing is chosen by it. Read
            once an epoch.
        teacher: a module that takes the same inputs, or a callable from a batch to logits such as `CachedTeacher`.
        checkpoints: a folder for the state after each epoch; only the newest is kept. SIGTERM is then obeyed only
            after the step that it comes in (in several processes within 25), whose state is written too.
        resume: go on from the newest state in `checkpoints`, to the result of an uninterrupted run: amid an epoch,
            its batches up to there are drawn once more. Workers that persist draw by generators of their own, which no
            state brings back. With another number of epochs, the rate goes on along the cosine of that number.
        halvings: how often to go back to the newest state, with half the rate, if the loss stops being finite; needs
            `checkpoints`.
        progress: show a bar.
        after_epoch: called with what each epoch measured, before its state is written.
        recipe: the fields of `Recipe`: epochs, lr, momentum, weight_decay, warmup, distill, temperature.

    Raises:
        ValueError: for arguments out of range, a model that is its own teacher or has nothing to train, a folder with
            states of a run, finished or not, without `resume`, or with states of another recipe, network or more
            epochs, or one where another run is at work.
        OSError: if `checkpoints` cannot be written.
        RuntimeError: if the loss stops being finite (more than `halvings` times); names epoch and step. The newest
            state stays, and the model keeps what broke it. Also where accelerate has not seen the processes of
            torch.distributed, each of which would train alone.
    """
    constants = Recipe(**recipe)  # type: ignore[arg-type]
    taught_by: Any = teacher.model if isinstance(teacher, CachedTeacher) else teacher
    if bare(taught_by) is bare(model) or _holds_only(taught_by, model):
        raise ValueError("the teacher is the model itself, from which nothing is learnt: copy.deepcopy it beforehand")
    if isinstance(val_loader, Iterator):
        raise ValueError("val_loader can be read only once, not after every epoch: give a list or a DataLoader")
    folder = None if checkpoints is None else Path(checkpoints)
    _check_folder(folder, resume, halvings)
    ended = nullcontext(Notice(SIGTERM, SIG_IGN)) if folder is None else put_off(SIGTERM)
    with (
        ended as told,
        accelerate_left_as_found(),
        alone(folder) if folder is not None and meet(device_of(model)) else nullcontext(),
        torch.inference_mode(False),
        torch.enable_grad(),
        modes_kept(model),
        teaching(teacher) as teach,
    ):
        run = _Run(model, train_loader, teacher, constants, folder)
        if folder is not None and resume:
            run.check_resumable(folder)
            load_newest(run.accelerator, folder)
            run.set_rate()
        if folder is not None and halvings and not states(folder):
            run.save(folder, 0)  # for the first epoch to go back to
        while (epoch := len(run.history)) < constants.epochs:
            try:
                loss, right, speed = run.epoch(epoch, teach, progress, told)
            except Diverged:
                if folder is None or run.halved >= halvings:
                    raise
                run.go_back(folder)
                continue
            top1 = evaluate(model, val_loader).top1 if val_loader is not None else None
            run.history.append(Epoch(epoch + 1, loss, run.rate, speed, top1, right))
            if after_epoch is not None:
                after_epoch(run.history[-1])
            if folder is not None:
                run.save(folder, epoch + 1)
                if told.anywhere():
                    told.obey()
    return run.history


def _holds_only(teacher: object, model: nn.Module) -> bool:
    """Whether a teacher is a module around the model, or a shallow copy of it: it has no parameter of its own."""
    held = set(teacher.parameters()) if isinstance(teacher, nn.Module) else set()
    return bool(held) and held <= set(model.parameters())


def _check_folder(folder: Path | None, resume: bool, halvings: int) -> None:
    """Whether states can be written to it and read from it as wanted."""
    if (resume or halvings) and folder is None:
        name = "resume=True" if resume else f"halvings={halvings}"
        raise ValueError(f"{name} needs checkpoints=FOLDER: the folder that states are written to")
    if halvings < 0:
        raise ValueError(f"halvings={halvings}: at least 0 is needed")
    if folder is not None:
        check_writable(folder)
        if not resume:
            check_empty(folder)


class _Run:
    """One training run: everything that a checkpoint has to bring back."""

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], teacher: object, recipe: Recipe, folder: Path | None
    ) -> None:
        self.model, self.recipe, self.folder, self.device = model, recipe, folder, device_of(model)
        self.history: list[Epoch] = []
        self.halved = 0
        self.begun: dict[str, Any] | None = None  # of an epoch that a state lies in: how far it had come
        self.own: list[dict[str, Any]] = []  # of each process, what its teacher has said and its loader has drawn
        self.distill = recipe.distill if teacher is not None else 0.0
        self.cached = teacher if isinstance(teacher, CachedTeacher) else None
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(f"no parameter of the {type(model).__name__} requires a gradient: nothing can be trained")
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())  # autocast would mix the two
        self.accelerator = accelerator_for(self.device, "bf16" if autocast_dtype(self.device) and not half else "no")
        # With one process the loader stays as it is: accelerate's fetches a batch ahead, which would change the random
        # numbers after a resume.
        spread = isinstance(loader, DataLoader) and self.accelerator.num_processes > 1
        self.loader: Any = self.accelerator.prepare(loader) if spread else loader
        self.steps = _steps(self.loader)
        self.optimizer: Any = torch.optim.SGD(
            model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay,
            nesterov=recipe.momentum > 0,
        )  # fmt: skip
        warm, total = recipe.warmup * self.steps, recipe.epochs * self.steps
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 0.5**self.halved * warmup_cosine(step, warm, total)
        )
        self.net, self.optimizer = prepared(self.accelerator, model, self.optimizer)
        self.optimizer.zero_grad()  # of what somebody's own loop has left
        self.accelerator.register_for_checkpointing(self.schedule, self)

    def check_resumable(self, folder: Path) -> None:
        """Before the state is loaded, which would leave the model with the weights of a run that is refused."""
        found = states(folder)
        if not found:
            return
        newest = found[-1]
        try:
            # the second one registered
            state = torch.load(newest / "custom_checkpoint_1.pkl", weights_only=True, map_location="cpu")
            theirs, mine, done = state["constants"], self.constants, len(state["history"]) + bool(state["begun"])
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError) as error:
            raise ValueError(f"{newest}: cannot be read ({first_line(error)}): start in a new folder") from None
        of_others = difference(newest, self.model.state_dict())
        if of_others:
            raise ValueError(f"{newest}: the state of another network: {of_others}: start in a new folder")
        other = {n: value for n, value in theirs.items() if n != "epochs" and value != mine.get(n)}
        if other:
            has = {n: mine.get(n) for n in other}
            raise ValueError(f"the checkpoint is of a run with {other}, this one has {has}: start in a new folder")
        if done > self.recipe.epochs:
            raise ValueError(f"epochs={self.recipe.epochs}: the run in {folder} has done or begun {done} already")

    def go_back(self, folder: Path) -> None:
        """To the newest state, with half the rate."""
        halved = self.halved + 1
        load_newest(self.accelerator, folder)
        self.halved = halved
        self.set_rate()

    def set_rate(self) -> None:
        """Of the next step, by the schedule of this run: a state brings that of its own number of epochs."""
        schedule = self.schedule
        rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        for group, (lr, factor) in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = lr * factor(schedule.last_epoch)

    @property
    def constants(self) -> dict[str, Any]:
        """What a run that goes on must have in common with this one; the epochs may become more."""
        counts = {"steps": self.steps, "processes": self.accelerator.num_processes}
        return {**asdict(self.recipe), "distill": self.distill, **counts}

    @property
    def rate(self) -> float:
        return float(self.schedule.get_last_lr()[0])

    def epoch(
        self, epoch: int, teach: Teacher | None, progress: bool, told: Notice
    ) -> tuple[float, float | None, float]:
        """One pass over the data: mean loss, Top-1 in percent, and images per second over all processes.

        Once any process is told to end, the state is written after the step, and the signal obeyed.
        """
        self.model.train()
        set_epoch(self.loader, epoch)
        title = f"epoch {epoch + 1}/{self.recipe.epochs}"
        quiet = not (progress and self.accelerator.is_main_process)
        bar = tqdm(self.loader, title, self.steps, leave=False, disable=quiet)
        means, seen, started = Means(title, self.accelerator), 0, time.perf_counter()
        first, start, batches = 0, random_state(self.loader), iter(bar)
        if self.begun:
            first, start = self.begun["step"], self.begun["start"][place()[0]]
            batches = from_batch(self.loader, batches, first, start)
            means.load_state_dict(self.begun)
            self.begun = None
        for step, batch in enumerate(batches, first + 1):
            if first and step == first + 1:
                started = time.perf_counter()  # those drawn again are not counted
            loss, right, images = self.step(to_device(batch, self.device), teach)
            means.add(loss, right, images)
            seen += images * self.accelerator.num_processes
            due = means.due
            if due:
                top1 = {} if means.top1() is None else {"top1": f"{means.top1():.1f}"}
                speed = f"{seen / (time.perf_counter() - started):.0f}/s"
                bar.set_postfix({"loss": f"{means.loss():.3f}", **top1, "lr": f"{self.rate:.4f}", "images": speed})
            if self.folder is not None and (due or self.accelerator.num_processes == 1) and told.anywhere():
                self.begun = {"step": step, **means.state_dict(), "start": everyones(start)}
                self.check_finite(title)
                self.save(self.folder, epoch, step)
                self.begun = None
                told.obey()
        done = means.loss(), means.top1(), seen / (time.perf_counter() - started)
        self.check_finite(title)
        from_first(self.model.buffers())  # each process has its own since the last step
        return done

    def check_finite(self, title: str) -> None:
        """Before a state is written: the loss tells only what the weights were before the step."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise Diverged(f"{title}: the weights are not finite after the last step; try a lower lr")

    def step(self, batch: Any, teach: Teacher | None) -> tuple[Tensor, Tensor, int]:
        """One update: loss, share of right answers, number of images."""
        inputs, labels = split_batch(batch)
        with self.accelerator.autocast():
            logits = logits_of(call(self.net, inputs)).float()
            check_logits(logits)
            if not len(logits):
                raise ValueError("train_loader gives a batch without samples, whose loss is no number: leave it out")
            soft = teach and teach(batch)
        labels = None if labels is None else labels.to(logits.device)  # lists and arrays have not come along
        loss = distillation_loss(logits, labels, soft, self.distill, self.recipe.temperature)
        if self.schedule.last_epoch == 0 and self.distill < 1 and labels is not None and labels.is_floating_point():
            check_probabilities(labels)  # once: a device has to be waited for
        self.accelerator.backward(loss)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return loss.detach(), share_right(logits.detach(), labels), len(logits)

    def save(self, folder: Path, epoch: int, step: int = 0) -> None:
        """Write the state. What each process has of its own is told before: amid the writing one may have failed."""
        said = self.cached.state_dict() if self.cached else None
        self.own = everyones({"teacher": said, "drawn": own_state(self.loader)})
        save_state(self.accelerator, folder, epoch, step)

    def state_dict(self) -> dict[str, Any]:
        """For accelerate, which `save` calls."""
        history = [asdict(epoch) for epoch in self.history]
        done = {"history": history, "begun": self.begun, "halved": self.halved}
        return {"constants": self.constants, **done, "own": self.own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.halved, self.begun = state["halved"], state["begun"]
        self.history[:] = [Epoch(**epoch) for epoch in state["history"]]
        own = state["own"][place()[0]]
        set_own_state(own["drawn"], self.loader)
        if self.cached and own["teacher"]:
            self.cached.load_state_dict(own["teacher"])


def _steps(loader: Iterable[Any]) -> int:
    try:
        steps = len(loader)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over an IterableDataset has a length that raises it
        name = type(loader).__name__.removesuffix("Shard")  # as accelerate calls its own
        raise ValueError(f"train_loader of type {name} has no length, which the schedule needs") from None
    if steps == 0:
        raise ValueError("train_loader gives no batch: it is empty, or its batch size is larger than the data")
    return steps
