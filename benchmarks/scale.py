"""The curve and an epoch of fine-tuning of ResNet56 in one process and in two, and what they send each other.

    python -m benchmarks.scale --data-dir DIR

One thread a process, so that two processes have twice the arithmetic; gloo. Times are those of rank 0.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks._env import write_result
from modprune import find_blocks, finetune, modularity_curve
from modprune.data import ImageLoader, cifar10
from modprune.models import resnet56

K, SAMPLES, REPEATS, ROUNDS, STEPS, BATCH = 3, 500, 5, 2, 6, 128
EXAMPLE = torch.zeros(1, 3, 32, 32)


def measure(rank: int, processes: int, port: int, folder: str, data_dir: Path) -> None:
    """In each process: times, and how many bytes of features and of sums it sends; written by the first."""
    torch.set_num_threads(1)
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}  # as torchrun does
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo")
    data = cifar10(data_dir, train=True)
    torch.manual_seed(0)
    model = resnet56()
    blocks = find_blocks(model, EXAMPLE)
    calibration = ImageLoader(data, 100, shuffle=True)
    train = ImageLoader(data.subset(torch.arange(STEPS * BATCH)), BATCH // processes, pad=4, shuffle=True)
    sent = count_bytes()
    curves, epochs = [], []
    for _ in range(ROUNDS):
        sent.update(features=0, sums=0)
        started = time.perf_counter()
        curve = modularity_curve(model, calibration, K, SAMPLES, REPEATS, blocks=blocks, example_inputs=EXAMPLE)
        curves.append(time.perf_counter() - started)
        mib = {name: count / 2**20 for name, count in sent.items()}
        epochs.append(finetune(resnet56(), train, epochs=1, progress=False)[0].images_per_second)
    if rank == 0:
        found = {
            "processes": processes,
            "curve_seconds": statistics.median(curves),
            "features_mib": mib["features"],
            "sums_mib": mib["sums"],
            "images_per_second": statistics.median(epochs),
            "q": curve.mean.tolist(),
        }
        torch.save(found, f"{folder}/{processes}.pt")
    if processes > 1:
        dist.barrier()
        dist.destroy_process_group()


def count_bytes() -> dict[str, int]:
    """Watch what this process sends to others, and what it adds up with theirs."""
    sent = {"features": 0, "sums": 0}
    transfer, add = dist.batch_isend_irecv, dist.all_reduce

    def size(tensor: torch.Tensor) -> int:
        return tensor.numel() * tensor.element_size()

    def transfers(ops: list[dist.P2POp]) -> Any:
        sent["features"] += sum(size(op.tensor) for op in ops if op.op is dist.isend)
        return transfer(ops)

    def adds(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent["sums"] += size(tensor)
        return add(tensor, *args, **kwargs)

    dist.batch_isend_irecv, dist.all_reduce = transfers, adds
    return sent


def main(data_dir: Path) -> None:
    """Measure and write benchmarks/results/scale.json."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the numpy of the processes to come
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    rows = []
    for processes in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(measure, (processes, port, folder, data_dir), nprocs=processes)
            rows.append(torch.load(f"{folder}/{processes}.pt", weights_only=True))
    one, two = (row.pop("q") for row in rows)
    result = {
        "command": "python -m benchmarks.scale --data-dir DIR",
        "samples": SAMPLES,
        "repeats": REPEATS,
        "points": len(one),
        "largest_difference_of_q": max(abs(a - b) for a, b in zip(one, two, strict=True)),
        "rows": rows,
    }
    print(write_result("scale", result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    main(parser.parse_args().data_dir)
