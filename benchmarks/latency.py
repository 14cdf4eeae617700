"""Depth against width by the clock: the unpruned network, ours, and torch-pruning's at the same MACs, in turns.

    python -m benchmarks.latency --weights FILE [--network NAME ...] [--compiled]

ResNet56 has the weights of its public checkpoint and loses the blocks of the committed plan. The other networks have
random weights, since only time matters, and lose half their MACs. Width is torch-pruning's `GroupNormPruner`, global,
its ratio searched for the same MACs as ours, with numbers of channels as they come and in multiples of eight; on
ResNet56 with projections for the padded shortcuts, whose channels torch-pruning does not follow.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from benchmarks._env import RESULTS, environment, peak_rss, write_result
from modprune import ModularityPruner, PruningPlan, count_macs, load_weights
from modprune._memory import keep_freed_memory
from modprune.cost import latency
from modprune.models.resnet import PadShortcut, resnet56

SECONDS = 20.0
WIDTHS = {"width": None, "eights": 8}  # multiples that the numbers of channels are rounded to
# Name -> how to build it, the size of its images, and batches to measure.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, ...]]] = {
    "resnet56": (resnet56, 32, (1, 32, 256)),
    "resnet50": (torchvision.models.resnet50, 224, (1, 32)),
    "vit_b_16": (torchvision.models.vit_b_16, 224, (1, 8)),
}


def main(weights: Path, names: Sequence[str], compiled: bool) -> None:
    """Measure the networks named, or all, and write benchmarks/results/latency.json, which keeps the others' rows."""
    keep_freed_memory()
    path = RESULTS / "latency.json"
    command = "python -m benchmarks.latency --weights FILE [--compiled]"
    rows: dict[str, Any] = json.loads(path.read_text())["networks"] if path.exists() else {}
    for name in names or NETWORKS:
        row = {**measure(name, weights, compiled), "environment": environment()}
        rows.setdefault(name, {})["compiled" if compiled else "eager"] = row
        write_result("latency", {"command": command, "networks": rows})


def measure(name: str, weights: Path, compiled: bool) -> dict[str, Any]:
    """MACs of the networks, and for each batch size median seconds, speed-up and peak memory."""
    torch.manual_seed(0)
    build, size, batches = NETWORKS[name]
    example = torch.randn(1, 3, size, size)
    whole = build().eval()
    if name == "resnet56":
        load_weights(whole, weights)
    ours = pruned(name, copy.deepcopy(whole), example)
    narrow = {key: narrowed(whole, example, count_macs(ours, example), multiple) for key, multiple in WIDTHS.items()}
    models = {"unpruned": whole, "depth": ours, **narrow}
    macs = {key: count_macs(model, example) for key, model in models.items()}
    row: dict[str, Any] = {"macs": macs, "batches": {}}
    for batch in batches:
        # Anew for each batch: past a few sizes of one `forward`, compiled code takes any size, or runs eagerly.
        torch.compiler.reset()
        ready = {key: torch.compile(model) for key, model in models.items()} if compiled else models
        seconds = latency(ready, example, batch=batch, seconds=SECONDS)
        row["batches"][str(batch)] = {
            "seconds": seconds,
            "speed_up": {key: seconds["unpruned"] / value for key, value in seconds.items()},
            "peak_mib": {key: memory(model, example, batch) for key, model in ready.items()},
        }
        print(name, "compiled" if compiled else "eager", batch, row["batches"][str(batch)], flush=True)
    return row


def pruned(name: str, model: nn.Module, example: torch.Tensor) -> nn.Module:
    """Ours: whole blocks removed."""
    if name == "resnet56":
        return PruningPlan.from_json(RESULTS / "resnet56-cifar10-plan.json").apply(model, example)
    return ModularityPruner(model, example, (), "random", flops=0.5).step()


def narrowed(model: nn.Module, example: torch.Tensor, macs: int, multiple: int | None) -> nn.Module:
    """torch-pruning's: the ratio of channels is halved in on until the MACs are those asked for."""
    low, high, best = 0.0, 0.95, copy.deepcopy(model)
    for _ in range(8):
        ratio = (low + high) / 2
        trial = _narrowed_by(model, example, ratio, multiple)
        left = count_macs(trial, example)
        low, high = (ratio, high) if left > macs else (low, ratio)
        best = min(best, trial, key=lambda m: abs(count_macs(m, example) - macs))
    return best


def _narrowed_by(model: nn.Module, example: torch.Tensor, ratio: float, multiple: int | None) -> nn.Module:
    import torch_pruning as tp

    trial = copy.deepcopy(model)
    for name, shortcut in [(n, m) for n, m in trial.named_modules() if isinstance(m, PadShortcut)]:
        channels = trial.get_submodule(f"{name.rpartition('.')[0]}.conv2").out_channels
        projection = nn.Conv2d(channels - 2 * shortcut.border, channels, 1, 2, bias=False)
        trial.set_submodule(name, nn.Sequential(projection, nn.BatchNorm2d(channels)))
    heads = {m: m.num_heads for m in trial.modules() if isinstance(m, nn.MultiheadAttention)}
    last = [m for m in trial.modules() if isinstance(m, nn.Linear)][-1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp.pruner.GroupNormPruner(
            trial, example, tp.importance.GroupMagnitudeImportance(p=2), global_pruning=True, pruning_ratio=ratio,
            ignored_layers=[last], num_heads=heads, max_pruning_ratio=0.95, round_to=multiple,
        ).step()  # fmt: skip
    return trial.eval()


def memory(model: Any, example: torch.Tensor, batch: int) -> float:
    """By how many MiB a forward pass raises the memory in use at its peak."""
    images = example.expand(batch, *example.shape[1:]).contiguous()
    with torch.no_grad():
        model(images)
        ctypes.CDLL(None).malloc_trim(0)  # else what the first pass freed would not count
        peak = peak_rss()
        model(images)
    return peak()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="the public checkpoint of ResNet56")
    parser.add_argument("--network", dest="names", nargs="*", default=(), choices=[*NETWORKS], help="all if not given")
    parser.add_argument("--compiled", action="store_true", help="with torch.compile")
    main(**vars(parser.parse_args()))
