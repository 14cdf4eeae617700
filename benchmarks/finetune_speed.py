"""Images per second of fine-tuning against the usual torchvision Dataset and DataLoader loop; one interleaved run.

python -m benchmarks.finetune_speed --data-dir DIR
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import CIFAR10

from benchmarks._env import write_result
from modprune import PruningPlan, finetune
from modprune.data import IMAGENET_MEAN, IMAGENET_STD, ImageLoader, cifar10
from modprune.models import resnet56
from modprune.precision import autocast_dtype

# An epoch is long enough that the start of the workers and of the kernels does not count, as in a real one.
IMAGES, BATCH, ROUNDS, WORKERS = 5120, 128, 5, 2
PLAN = Path(__file__).parent / "results" / "resnet56-cifar10-plan.json"


def usual(model: nn.Module, root: Path) -> float:
    """The loop of the tutorials: PIL transforms in two workers, float32, one image at a time."""
    transform = transforms.Compose([
        transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    images = Subset(CIFAR10(str(root), train=True, transform=transform), range(IMAGES))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    model.train()
    started = time.perf_counter()
    for x, y in DataLoader(images, BATCH, shuffle=True, num_workers=WORKERS):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return IMAGES / (time.perf_counter() - started)


def ours(model: nn.Module, loader: ImageLoader) -> float:
    """The same work by `modprune.finetune`."""
    return finetune(model, loader, epochs=1, lr=0.01, progress=False)[0].images_per_second


def ours_in_float32(model: nn.Module, loader: ImageLoader) -> float:
    """As it is where bfloat16 is no faster."""
    with patch.object(sys.modules["modprune.finetune"], "autocast_dtype", lambda device: None):
        return ours(model, loader)


def measure(remove: Sequence[str], root: Path, loader: ImageLoader) -> dict[str, Any]:
    """Images per second by the usual loop and by each means that is added to ours, and how many times the usual ones.

    Each has a network of its own, which is trained on from round to round: what is compiled stays so.
    """
    plain, *networks = (PruningPlan(tuple(remove)).apply(resnet56()) for _ in range(4))
    in_float32, in_bfloat16, whole = (network.to(memory_format=torch.channels_last) for network in networks)
    compiled: Any = torch.compile(whole)
    started = time.perf_counter()
    ours(compiled, ImageLoader(loader.data.subset(torch.arange(BATCH)), BATCH, pad=4, shuffle=True))
    seconds = time.perf_counter() - started
    ways: dict[str, Callable[[], float]] = {"usual": lambda: usual(plain, root)}
    ways["float32"] = lambda: ours_in_float32(in_float32, loader)
    if autocast_dtype(torch.device("cpu")):
        ways["bfloat16"] = lambda: ours(in_bfloat16, loader)
    ways["compiled"] = lambda: ours(compiled, loader)
    speeds = [{way: run() for way, run in ways.items()} for _ in range(ROUNDS)]
    medians = {way: statistics.median(speed[way] for speed in speeds) for way in ways}
    ratios = {way: statistics.median(speed[way] / speed["usual"] for speed in speeds) for way in ways if way != "usual"}
    return {"images_per_second": medians, "ratios": ratios, "seconds_to_compile": seconds}


def main(root: Path) -> None:
    """Measure and write benchmarks/results/finetune-speed.json."""
    loader = ImageLoader(cifar10(root, train=True).subset(torch.arange(IMAGES)), BATCH, pad=4, shuffle=True)
    torch._inductor.config.force_disable_caches = True  # compiling takes as long as it does the first time
    plans: dict[str, Sequence[str]] = {"resnet56": (), "pruned": PruningPlan.from_json(PLAN).remove}
    rows = [{"network": name, **measure(remove, root, loader)} for name, remove in plans.items()]
    command = "python -m benchmarks.finetune_speed --data-dir DIR"
    print(write_result("finetune-speed", {"command": command, "networks": rows}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    main(parser.parse_args().data_dir)
