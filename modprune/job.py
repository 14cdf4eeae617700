"""The main job, end to end: measure, plan, remove, fine-tune with the unpruned network as teacher, report."""

from __future__ import annotations

import copy
import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modprune._environment import commit, environment
from modprune._files import alone, to_json, write_text
from modprune._inputs import device_of, first_line
from modprune._processes import everyones, meet
from modprune._state import evaluating
from modprune.checkpoints import check_empty, check_writable
from modprune.criteria import Criterion, fitted, name_of, resolve
from modprune.data import ImageData, ImageLoader, calibration
from modprune.distill import CachedTeacher
from modprune.evaluate import logits_and_labels
from modprune.finetune import Epoch, finetune
from modprune.picture import save_picture
from modprune.plan import PruningPlan
from modprune.pruner import ModularityPruner
from modprune.recipe import Recipe
from modprune.report import Report, compare
from modprune.store import checksum, load, save
from modprune.tracking import check_names, trackers

RESULTS = ("curve.json", "curve.png", "metrics.csv", "model.safetensors", "report.json", "report.md")


def prune_job(
    model: nn.Module,
    train: ImageData,
    test: ImageData,
    out: str | Path,
    *,
    flops: float | None = None,
    params: float | None = None,
    blocks: int | None = None,
    latency: float | None = None,
    width: float | None = None,
    criterion: str | Criterion = "modularity",
    recipe: Recipe | None = None,
    batch_size: int = 128,
    pad: int = 4,
    seed: int = 0,
    compiled: bool = False,
    log_with: Sequence[str] = (),
    resume: bool = False,
) -> Report:
    """Prune an image classifier and recover it; the original stays as it was.

    Writes to `out`: `run.json` (arguments, versions, commit, host, whether it is finished), `plan.json`, `curve.json`
    and `curve.png` (if blocks are chosen by a curve of Q), `metrics.csv` after each epoch, `model.safetensors`,
    `report.json`, `report.md`, what trackers log; while it trains also `checkpoints/`. Files are whole or not there at
    any moment. Those of a finished run that was there go once the new one has its plan.

    Args:
        model: on the device to work on.
        train: for calibration and fine-tuning; nothing is chosen by `test`, which the report is measured on.
        test: as `train`.
        out: a folder, made if needed.
        flops, params, blocks, latency, width, criterion: see `ModularityPruner`. A criterion given by
            name measures all images there are, to the last whole batch, where its default is more.
        recipe: of the fine-tuning; None leaves it out.
        batch_size, pad: of the training images, see `ImageLoader`.
        seed: of calibration images, order and augmentation.
        compiled: fine-tune by `torch.compile`, which begins each time with a minute or less of compiling.
        log_with: names of accelerate's trackers that get the epochs as well: "tensorboard", "wandb", ...
        resume: go on from the newest checkpoint in `out`, to the result of an uninterrupted run. Of a finished one,
            the report is made again and nothing else is done, but that checkpoints which a kill has left go.

    Raises:
        ValueError: for a budget that cannot be met, test images of another kind than the training images, a network of
            fewer classes, `compiled` where `torch.compile` does not work, a folder where another run is at work, with
            results of no run, with an unfinished run without `resume`, or with a run of other arguments, weights or
            images (but for the number of epochs, while it is unfinished).
        OSError: if `out` cannot be written.
    """
    out, device = Path(out), device_of(model)
    first = meet(device)
    budgets = {"flops": flops, "params": params, "blocks": blocks, "latency": latency, "width": width}
    rest = {"batch_size": batch_size, "pad": pad, "seed": seed, "compiled": compiled}
    how = {"criterion": _constants(resolve(criterion)), **budgets, "recipe": recipe and asdict(recipe), **rest}
    arguments = {**_made_of(model, train), **how}
    # Before the minutes of measuring, not after.
    check_names(log_with)
    if compiled:
        _check_compiler(device)
    check_writable(out)
    _check_folder(out)
    _check_images(model, train, test, batch_size)
    with alone(out) if first else nullcontext():
        if resume and _check_same(out, arguments):
            if first:
                _drop_checkpoints(out)  # a kill may have left some
            return _compared(model, load(out / "model.safetensors", copy.deepcopy(model)).to(device), test)
        if not resume:
            check_empty(out / "checkpoints")
        example = torch.zeros(1, *train.images.shape[1:], device=device)
        plan = _begun(out) if resume else None
        if plan is None:
            images = calibration(train, seed, device)
            scorer = fitted(criterion, images.samples)
            pruner = ModularityPruner(model, example, images, scorer, **budgets)  # type: ignore[arg-type]
            plan = pruner.plan()
            if first:
                _begin(pruner, out, arguments, device)
        pruned = plan.apply(copy.deepcopy(model), example)
        if recipe is not None:
            loader = ImageLoader(train, batch_size, pad=pad, shuffle=True, seed=seed, device=device)
            with trackers(log_with if first else (), out, arguments) as log:
                _recover(pruned, model, loader, recipe, out, compiled, resume, log if first else None)
        report = _compared(model, pruned, test)
        if first:
            save(pruned, out / "model.safetensors")
            sizes = f"training images: {len(train):,}, test images: {len(test):,}"
            epochs = recipe.epochs if recipe else 0
            run = f"Network: {type(model).__name__}, {sizes}, epochs of fine-tuning: {epochs}."
            _write_report(report, plan, out, run)
            _describe(out, arguments, device, finished=True)
            _drop_checkpoints(out)
        everyones(None)  # nobody goes on before the files are there
    return report


def _made_of(model: nn.Module, train: ImageData) -> dict[str, str]:
    """What a run was given, in a few letters."""
    return {
        "network": type(model).__name__,
        "weights": _digest(model.state_dict()),
        "images": _digest({"images": train.images, "labels": train.labels}),
    }


def _check_compiler(device: torch.device) -> None:
    """ValueError if `torch.compile` does not work here, for want of a C++ compiler say."""
    try:
        torch.compile(lambda x: x.neg())(torch.zeros(2, device=device))
    except RuntimeError as error:
        raise ValueError(f"compiled: torch.compile does not work here, leave it out: {first_line(error)}") from None


def _check_folder(out: Path) -> None:
    """ValueError if results would take the place of files that no run has written."""
    own = [name for name in (*RESULTS, "plan.json") if (out / name).exists()]
    if own and not (out / "run.json").exists():
        raise ValueError(
            f"{out}: its {own[0]} is of no run of modprune prune and would be replaced: give another folder"
        )


def _check_images(model: nn.Module, train: ImageData, test: ImageData, batch_size: int) -> None:
    if not 1 <= batch_size <= len(train):
        raise ValueError(f"batch_size={batch_size}: it lies between 1 and {len(train)}, the number of training images")
    kinds = [f"{data.num_classes} classes of {tuple(data.images.shape[1:])}" for data in (train, test)]
    if len(test) == 0 or kinds[0] != kinds[1]:
        raise ValueError(f"test: {len(test)} images, {kinds[1]}, where the training images are {kinds[0]}: give such")
    last = torch.zeros(2, *train.images.shape[1:]), torch.full((2,), train.num_classes - 1)
    with torch.no_grad(), evaluating(model):  # a network of fewer classes is said to be one
        logits_and_labels(model, last)


def _recover(
    pruned: nn.Module,
    original: nn.Module,
    loader: ImageLoader,
    recipe: Recipe,
    out: Path,
    compiled: bool,
    resume: bool,
    log: Callable[[Epoch], None] | None,
) -> None:
    """Fine-tune what is left, taught by the original."""
    pruned.to(memory_format=torch.channels_last)
    net: Any = torch.compile(pruned) if compiled else pruned  # not in place: what is measured and saved is not compiled
    finetune(
        net, loader, teacher=CachedTeacher(original, len(loader.data)), checkpoints=out / "checkpoints",
        resume=resume, after_epoch=log, **asdict(recipe),
    )  # fmt: skip
    pruned.to(memory_format=torch.contiguous_format)  # as the original, for the clock


def _constants(criterion: Criterion) -> str:
    """A criterion with its constants, the same in every process: functions print where they lie in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(criterion)) if is_dataclass(criterion) else name_of(criterion)


def _check_same(out: Path, arguments: Mapping[str, Any]) -> bool:
    """Whether the run in `out` is finished; ValueError if it had other arguments: its plan and order would not fit."""
    record = out / "run.json"
    if not record.exists():
        return False
    mine = _flat(json.loads(to_json(arguments)))
    try:
        found = json.loads(record.read_text())
        theirs, finished = _flat(found["arguments"]), bool(found["finished"])
        longer = not finished and min(theirs["epochs"], mine["epochs"]) > 0  # they may become more
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{record}: not the record of a run of modprune prune; give another folder") from None
    other = [name for name in mine if mine[name] != theirs.get(name) and not (longer and name == "epochs")]
    other = [name for name in other if name in theirs] or other  # without epochs there are no other constants
    if other:
        had, has = ({name: values.get(name) for name in other} for values in (theirs, mine))
        raise ValueError(f"{out}: the run there has {had}, this one {has}: resume it as it was, or give another folder")
    return finished


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments with the recipe's constants among them; where there is none, there are no epochs."""
    rest = dict(arguments)
    return rest | (rest.pop("recipe") or {"epochs": 0})


def _compared(model: nn.Module, pruned: nn.Module, test: ImageData) -> Report:
    device = device_of(model)
    example = torch.zeros(1, *test.images.shape[1:], device=device)
    return compare(model, pruned, example, ImageLoader(test, 100, device=device))


def _write_report(report: Report, plan: PruningPlan, out: Path, run: str) -> None:
    report.to_json(out / "report.json")
    picture = "\n![curve](curve.png)\n" if (out / "curve.png").exists() else ""
    head = f"# Pruned by {plan.criterion}\n\n{run}"
    write_text(out / "report.md", f"{head}\n\n{report.to_markdown()}\n{_story(plan)}{picture}")


def _begun(out: Path) -> PruningPlan | None:
    """The plan of the run that `out` holds; one that no run has made counts for nothing."""
    made = all((out / name).exists() for name in ("run.json", "plan.json"))
    return PruningPlan.from_json(out / "plan.json") if made else None


def _begin(pruner: ModularityPruner, out: Path, arguments: dict[str, Any], device: torch.device) -> None:
    """In the place of a run that may have been there; a kill at any moment leaves nothing of it to go on with."""
    (out / "plan.json").unlink(missing_ok=True)
    _describe(out, arguments, device)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    plan = pruner.plan()
    if pruner.scores is not None and pruner.scores.curve is not None:
        curve = pruner.scores.curve
        curve.to_json(out / "curve.json")
        save_picture(curve.plot(removed=plan.remove), out / "curve.png")
    plan.to_json(out / "plan.json")


def _drop_checkpoints(out: Path) -> None:
    shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _describe(out: Path, arguments: dict[str, Any], device: torch.device, finished: bool = False) -> None:
    """`run.json`: what somebody needs to know of the run a year later."""
    place = {"device": str(device), "host": platform.node(), "folder": str(Path.cwd()), "commit": commit(Path.cwd())}
    facts = {"arguments": arguments, "finished": finished, "command": sys.argv, **place, **environment()}
    to_json(facts, out / "run.json")


def _digest(values: Mapping[str, Any]) -> str:
    """A few letters that are others for other tensors."""
    return checksum({}, {name: value for name, value in values.items() if isinstance(value, Tensor)})[:16]


def _story(plan: PruningPlan) -> str:
    names = ", ".join(f"`{name}`" for name in plan.remove) or "none"
    story = f"Blocks removed by {plan.criterion}, {len(plan.remove)} in all: {names}.\n"
    cut = sum(len(channels) for _, channels in plan.width)
    return f"{story}\nChannels cut by torch-pruning: {cut} of {len(plan.width)} layers.\n" if cut else story
