"""Peak memory of the curve of torchvision's resnet50 at 224x224 under a budget, in a process of its own.

python -m benchmarks.curve_memory --samples 500
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision

from benchmarks._env import peak_rss, write_result
from modprune import modularity_curve
from modprune.features import GIB

# Values a sample: stem, three blocks at 56 pixels, four at 28, six at 14, three at 7.
FEATURES = 64 * 112**2 + 3 * 256 * 56**2 + 4 * 512 * 28**2 + 6 * 1024 * 14**2 + 3 * 2048 * 7**2


def main(samples: int) -> None:
    """Measure and write benchmarks/results/curve-memory.json."""
    model = torchvision.models.resnet50().eval()
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(20, 3, 224, 224, generator=generator), torch.arange(i, i + 20) % 10)
        for i in range(0, samples, 20)
    ]  # fmt: skip
    budget = GIB * samples // 500
    with torch.no_grad():
        peak = peak_rss()
        model(batches[0][0])
        forward = peak()
    peak = peak_rss()
    started = time.perf_counter()
    curve = modularity_curve(model, batches, samples=samples, repeats=1, budget=budget)
    result = {
        "command": f"python -m benchmarks.curve_memory --samples {samples}",
        "samples": samples,
        "points": len(curve.layers),
        "features_mib": samples * 4 * FEATURES / 2**20,
        "budget_mib": budget / 2**20,
        "peak_mib": peak(),
        "peak_of_a_forward_pass_mib": forward,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip
    print(write_result("curve-memory", result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=500, help="N; the budget is 1 GiB for 500 and in proportion")
    main(parser.parse_args().samples)
