"""The whole curve of ResNet56 against a plain forward pass of the same images; one interleaved run.

python -m benchmarks.curve_speed --data-dir DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks._env import write_result
from benchmarks.modularity_speed import seconds
from modprune import modularity_curve
from modprune.data import ImageLoader, cifar10
from modprune.models import resnet56

SAMPLES, REPEATS, BATCH, ROUNDS = 500, 5, 125, 3


def main(data_dir: Path) -> None:
    """Measure and write benchmarks/results/curve-speed.json."""
    images = cifar10(data_dir, train=True).subset(torch.arange(SAMPLES * REPEATS))
    loader, model = ImageLoader(images, BATCH), resnet56().eval()
    features = [torch.randn(SAMPLES, m).relu() for m in [16 * 32 * 32] * 10 + [32 * 16 * 16] * 9 + [64 * 8 * 8] * 9]

    def forward() -> None:
        with torch.no_grad():
            for x, _, _ in loader:
                model(x)

    def products() -> None:
        for _ in range(REPEATS):
            for rows in features:
                torch.mm(rows, rows.T)

    times = seconds(
        {"forward": forward, "products": products, "curve": lambda: modularity_curve(model, loader)}, ROUNDS
    )
    result = {
        "command": "python -m benchmarks.curve_speed --data-dir DIR",
        **times,
        "curve_over_forward": times["curve"] / times["forward"],
        "products_over_forward": times["products"] / times["forward"],
    }
    print(write_result("curve-speed", result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    main(parser.parse_args().data_dir)
