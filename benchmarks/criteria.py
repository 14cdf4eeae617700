"""Every criterion under one budget: which blocks of a CIFAR ResNet it removes, and what is left of the Top-1.

    python -m benchmarks.criteria --data-dir DIR --weights FILE
        [--network N --criterion NAME ... --removed F ... --epochs E --seeds S ...]

For 30, 45, 60 and 75 % of the MACs removed, or those given: Top-1 on CIFAR-10 at once, with batch-norm statistics
measured anew on 2,000 training images, and, if asked, after an equal fine-tuning for each seed: with the labels and
what the unpruned network has said of each image once. Criteria see training images alone. Resumable: what is in the
JSON is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from benchmarks._env import RESULTS, write_result
from modprune import CachedTeacher, ModularityPruner, PruningPlan, evaluate, finetune, load_weights
from modprune._memory import keep_freed_memory
from modprune.blocks import Blocks
from modprune.criteria import (
    CRITERIA,
    BlockScores,
    Consensus,
    Criterion,
    Modularity,
    ModularityDrop,
    ModularityPooled,
    Random,
)
from modprune.data import ImageData, ImageLoader, cifar10
from modprune.models import resnet20, resnet32, resnet56

NETWORKS = {"resnet20": resnet20, "resnet32": resnet32, "resnet56": resnet56}
REMOVED = (0.30, 0.45, 0.60, 0.75)
SEED, CALIBRATION, RECALIBRATION = 0, 10_000, 2_000
LR, WARMUP = 0.05, 0.1  # of the fine-tuning: peak rate, and the part of the epochs in which it rises
EXAMPLE = torch.zeros(1, 3, 32, 32)


def gains(model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
    """What Q of pooled features gains across each block, where `modularity_pooled` takes the factor."""
    curve = ModularityPooled()(model, blocks, loader).curve
    assert curve is not None
    return BlockScores(blocks.names, np.diff(curve.q, axis=1), curve)


# By name: what scores the blocks, and in how many stages, the network measured anew before each.
CONTENDERS: dict[str, tuple[Criterion, int]] = {
    **{name: (make(), 1) for name, make in CRITERIA.items()},
    **{f"random, seed {seed}": (Random(seed), 1) for seed in (1, 2)},
    "modularity, N = 2,000": (Modularity(samples=2000), 1),
    "modularity_pooled, gains": (gains, 1),
    "modularity_pooled, gains, and _drop": (Consensus((gains, "modularity_drop")), 1),
    "modularity, 4 stages": (Modularity(), 4),
    "modularity_drop, 4 stages": (ModularityDrop(), 4),
}


def main(
    network: str,
    data_dir: Path,
    weights: Path,
    criterion: Sequence[str],
    removed: Sequence[float],
    epochs: int,
    seeds: Sequence[int],
) -> None:
    """Measure what is missing in benchmarks/results/criteria-NETWORK.json."""
    keep_freed_memory()
    model = load_weights(NETWORKS[network](), weights)
    train, test = cifar10(data_dir, train=True), cifar10(data_dir, train=False)
    title = f"criteria-{network}"
    path = RESULTS / f"{title}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in criterion:
        there = {row["asked"] for row in rows if row["criterion"] == name}
        if missing := [flops for flops in removed if flops not in there]:
            rows += cuts(model, train, test, name, missing)
            store(title, weights, rows)
    for seed in seeds if epochs else ():
        key, teacher = f"{epochs} epochs, seed {seed}", CachedTeacher(model, len(train), looks=1)
        asked = [row for row in rows if row["criterion"] in criterion and row["asked"] in removed]
        for row in [row for row in asked if key not in row["finetuned"]]:
            known = [r["finetuned"][key] for r in rows if r["removed"] == row["removed"] and key in r["finetuned"]]
            pruned = PruningPlan(tuple(row["removed"])).apply(copy.deepcopy(model))
            row["finetuned"][key] = known[0] if known else recovered(pruned, train, test, teacher, epochs, seed)
            store(title, weights, rows)


def cuts(
    model: nn.Module, train: ImageData, test: ImageData, name: str, removed: Sequence[float]
) -> list[dict[str, Any]]:
    """The rows of one criterion."""
    loader = ImageLoader(train.subset(torch.arange(CALIBRATION)), 100, shuffle=True, seed=SEED)
    criterion, stages = CONTENDERS[name]
    measure, rows = Once(criterion), []
    for flops in removed:
        plan = ModularityPruner(model, EXAMPLE, loader, measure, flops=flops, iterative_steps=stages).plan()
        pruned = plan.apply(copy.deepcopy(model))
        row: dict[str, Any] = {
            "criterion": name,
            "asked": flops,
            "freed": dict(plan.freed),
            "removed": list(plan.remove),
            "scores": dict(plan.scores),
            "scoring_seconds": measure.seconds,
            "top1_at_once": top1(pruned, test),
        }
        update_bn((images for images, *_ in ImageLoader(train.subset(torch.arange(RECALIBRATION)), 100)), pruned)
        rows.append(row | {"top1_with_new_batch_norm": top1(pruned, test), "finetuned": {}})
        print(name, flops, row["top1_at_once"], rows[-1]["top1_with_new_batch_norm"], flush=True)
    return rows


class Once:
    """A criterion that measures once what is left of the network, for all budgets; `seconds` is what the whole took."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion, self.seconds = criterion, 0.0
        self.known: dict[tuple[str, ...], BlockScores] = {}

    def __call__(self, model: nn.Module, blocks: Blocks, loader: Iterable[Any]) -> BlockScores:
        """Scores of `blocks`."""
        if blocks.names not in self.known:
            started = time.perf_counter()
            self.known[blocks.names] = self.criterion(model, blocks, loader)
            self.seconds = self.seconds or time.perf_counter() - started
        return self.known[blocks.names]


def recovered(
    pruned: nn.Module, train: ImageData, test: ImageData, teacher: CachedTeacher, epochs: int, seed: int
) -> float:
    """Top-1 after the last epoch of a short fine-tuning."""
    pruned.to(memory_format=torch.channels_last)
    loader = ImageLoader(train, 128, pad=4, shuffle=True, seed=seed)
    finetune(pruned, loader, teacher=teacher, epochs=epochs, lr=LR, warmup=WARMUP * epochs)
    return top1(pruned, test)


def top1(model: nn.Module, test: ImageData) -> float:
    """On all test images, which nothing is chosen by."""
    return evaluate(model, ImageLoader(test, 125)).top1


def store(title: str, weights: Path, rows: list[dict[str, Any]]) -> None:
    """Write the JSON anew."""
    command = f"python -m benchmarks.criteria --network {title.removeprefix('criteria-')} --data-dir DIR --weights FILE"
    write_result(title, {"command": command, "checkpoint": weights.name, "seed": SEED, "rows": rows})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="the public checkpoint of the network")
    parser.add_argument("--network", choices=NETWORKS, default="resnet56")
    parser.add_argument(
        "--criterion",
        choices=CONTENDERS,
        nargs="+",
        default=list(CONTENDERS),
        metavar="NAME",
        help="all, if none is given",
    )
    parser.add_argument("--removed", type=float, nargs="+", default=REMOVED, help="fractions of the MACs")
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning every cut; 0 for none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the fine-tuning")
    main(**vars(parser.parse_args()))
