"""Images per second of fine-tuning against the usual torchvision Dataset and DataLoader loop; one interleaved run.

python -m benchmarks.finetune_speed --data-dir DIR
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
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
IMAGES, BATCH, ROUNDS, WORKERS = 5120, 128, 3, 2
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
    model.to(memory_format=torch.channels_last)
    return finetune(model, loader, epochs=1, lr=0.01, progress=False)[0].images_per_second


def main(root: Path) -> None:
    """Measure and write benchmarks/results/finetune-speed.json."""
    loader = ImageLoader(cifar10(root, train=True).subset(torch.arange(IMAGES)), BATCH, pad=4, shuffle=True)
    rows = []
    for name, remove in (("resnet56", ()), ("pruned", PruningPlan.from_json(PLAN).remove)):
        speeds: dict[str, list[float]] = {"usual": [], "modprune": []}
        for _ in range(ROUNDS):
            speeds["usual"].append(usual(PruningPlan(remove).apply(resnet56()), root))
            speeds["modprune"].append(ours(PruningPlan(remove).apply(resnet56()), loader))
        medians = {way: statistics.median(values) for way, values in speeds.items()}
        rows.append({"network": name, **medians, "ratio": medians["modprune"] / medians["usual"]})
    dtype = autocast_dtype(torch.device("cpu"))
    result = {
        "command": "python -m benchmarks.finetune_speed --data-dir DIR",
        "autocast": str(dtype) if dtype else None,
        "images_per_second": rows,
    }
    print(write_result("finetune-speed", result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    main(parser.parse_args().data_dir)
