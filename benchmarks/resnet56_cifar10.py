"""The real run: ResNet56 on CIFAR-10, 60 % of the MACs and 42.5 % of the parameters removed by modularity, recovered.

    python -m benchmarks.resnet56_cifar10 --data-dir DIR --weights FILE

Starts from the public 93.39 % checkpoint. Resumable: the same command goes on where a killed one was. Calibration and
training use training images alone; the weights are those of the last epoch; test images choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks._env import RESULTS, write_result
from modprune import PruningPlan, Report, compare, load_weights, save
from modprune._memory import keep_freed_memory
from modprune.checkpoints import states
from modprune.data import ImageData, ImageLoader, cifar10
from modprune.job import prune_job
from modprune.models import resnet56
from modprune.recipe import Recipe, warmup_cosine
from modprune.tracking import read_metrics

FLOPS, PARAMS, SEED, BATCH, PAD = 0.60, 0.425, 0, 128, 4


def main(data_dir: Path, weights: Path, out: Path, epochs: int, now: bool) -> None:
    """Run, and write benchmarks/results/resnet56-cifar10-first.json, the network, its plan and its curve."""
    keep_freed_memory()
    recipe = Recipe(epochs=epochs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_weights(resnet56(), weights).to(device)
    train, test = cifar10(data_dir, train=True), cifar10(data_dir, train=False)
    options: dict[str, Any] = {"flops": FLOPS, "params": PARAMS, "batch_size": BATCH, "pad": PAD, "seed": SEED}
    if now:
        report, history = report_on_newest(network, train, test, out, options)
    else:
        resume = bool(states(out / "checkpoints"))
        report = prune_job(network, train, test, out, recipe=recipe, resume=resume, **options)
        history = [asdict(epoch) for epoch in read_metrics(out / "metrics.csv")]
    print(report)
    plan = PruningPlan.from_json(out / "plan.json")
    result = {
        "command": f"python -m benchmarks.resnet56_cifar10 --data-dir DIR --weights FILE --epochs {epochs}",
        "checkpoint": weights.name,
        "asked": {"flops": FLOPS, "params": PARAMS},
        "report": json.loads(report.to_json()),
        "removed": plan.remove,
        "kept": [name for name in plan.scores if name not in plan.remove],
        "scores": dict(plan.scores),
        "recipe": {**asdict(recipe), "batch_size": BATCH, "pad": PAD, "teacher": "the unpruned network, cached"},
        "trained_epochs": len(history),
        "seed": SEED,
        "device": device,
        "history": history,
        "curve": json.loads((out / "curve.json").read_text()),
    }
    shutil.copyfile(out / "model.safetensors", RESULTS / "resnet56-cifar10-first.safetensors")
    plan.to_json(RESULTS / "resnet56-cifar10-plan.json")
    print(write_result("resnet56-cifar10-first", result))


def epochs_on_another_schedule(history: list[dict[str, Any]], recipe: Recipe, steps: int) -> int:
    """How many epochs had passed when the run was resumed with another number of epochs; 0 for one schedule."""
    rates = [
        recipe.lr * warmup_cosine(epoch["epoch"] * steps, recipe.warmup * steps, recipe.epochs * steps)
        for epoch in history
    ]
    return max((e["epoch"] for e, rate in zip(history, rates, strict=True) if abs(e["lr"] - rate) > 1e-9), default=0)


def report_on_newest(
    network: nn.Module, train: ImageData, test: ImageData, out: Path, options: dict[str, Any]
) -> tuple[Report, list[dict[str, Any]]]:
    """The report and the history of an unfinished run as it stands; its checkpoints stay."""
    prune_job(network, train, test, out / "start", **options)
    for name in ("plan.json", "curve.json", "curve.png"):
        shutil.copyfile(out / "start" / name, out / name)
    newest = states(out / "checkpoints")[-1]
    pruned = PruningPlan.from_json(out / "plan.json").apply(copy.deepcopy(network))
    pruned.load_state_dict(load_file(newest / "model.safetensors"))
    save(pruned, out / "model.safetensors")
    history = torch.load(newest / "custom_checkpoint_1.pkl", weights_only=True)["history"]
    return compare(network, pruned, torch.zeros(1, 3, 32, 32), ImageLoader(test, 125)), history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="the public checkpoint of ResNet56")
    parser.add_argument("--out", type=Path, default=Path("runs/resnet56-cifar10"), help="folder to work in")
    parser.add_argument("--epochs", type=int, default=74, help="of fine-tuning")
    parser.add_argument("--now", action="store_true", help="report on the newest checkpoint without training on")
    main(**vars(parser.parse_args()))
