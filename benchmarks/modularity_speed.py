"""Q against the straightforward way, and against the matrix product that it cannot do without; one interleaved run.

python -m benchmarks.modularity_speed
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import networkx as nx
import torch

from benchmarks._env import write_result
from modprune import modularity

SIZES = ((500, 4096), (2000, 256), (5000, 256))
FLOOR = (2000, 4096)
LARGE = (50_000, 64)
ROUNDS, K = 3, 3


def reference(features: torch.Tensor, labels: torch.Tensor) -> float:
    """A Python loop over samples for the neighbours, networkx for Q: what one writes down first."""
    graph = nx.Graph()
    graph.add_nodes_from(range(len(features)))
    for i in range(len(features)):
        cosines = torch.nn.functional.cosine_similarity(features[i : i + 1], features)
        cosines[i] = 0
        for j in torch.argsort(cosines, descending=True)[:K].tolist():
            if cosines[j] > 0:
                weight = graph.get_edge_data(i, j, {"weight": 0.0})["weight"]
                graph.add_edge(i, j, weight=weight + float(cosines[j]) / 2)
    communities = [set(torch.nonzero(labels == c).flatten().tolist()) for c in labels.unique()]
    return nx.community.modularity(graph, communities)


def seconds(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured in turns; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def data(samples: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features as after a ReLU, ten classes."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, columns, generator=generator).relu(), torch.arange(samples) % 10


def against_reference(samples: int, columns: int) -> dict[str, float]:
    features, labels = data(samples, columns)
    times = seconds(
        {"reference": lambda: reference(features, labels), "modprune": lambda: modularity(features, labels, K)},
        ROUNDS if samples < 5000 else 2,
    )
    difference = abs(reference(features, labels) - modularity(features, labels, K))
    ratio = times["reference"] / times["modprune"]
    return {"samples": samples, "columns": columns, **times, "ratio": ratio, "difference": difference}


def against_floor() -> dict[str, float]:
    features, labels = data(*FLOOR)
    times = seconds(
        {"product": lambda: features @ features.T, "modprune": lambda: modularity(features, labels, K)}, 3 * ROUNDS
    )
    return {"samples": FLOOR[0], "columns": FLOOR[1], **times, "ratio": times["modprune"] / times["product"]}


def large() -> dict[str, float]:
    """In a process of its own, for its peak memory."""
    code = (
        "import time; from benchmarks._env import peak_rss; from benchmarks.modularity_speed import *;"
        "f, y = data(*LARGE); modularity(f[:500], y[:500], K); peak = peak_rss(); t = time.perf_counter();"
        "modularity(f, y, K); print(time.perf_counter() - t, peak())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    elapsed, mib = map(float, done.stdout.split())
    return {"samples": LARGE[0], "columns": LARGE[1], "seconds": elapsed, "peak_mib": mib}


def main() -> None:
    """Measure and write benchmarks/results/modularity-speed.json."""
    result = {
        "command": "python -m benchmarks.modularity_speed",
        "reference": [against_reference(*size) for size in SIZES],
        "floor": against_floor(),
        "large": large(),
    }
    print(write_result("modularity-speed", result))


if __name__ == "__main__":
    main()
