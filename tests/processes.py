"""Two processes with what a launcher tells them. Forks, which need not import the libraries anew."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch


def in_two(function: Callable[..., object], folder: Path, *arguments: object) -> str:
    """Call the function in each; what both printed, after they have ended well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(_rank, (function, folder, port, arguments), nprocs=2, start_method="fork")
    return "".join((folder / f"{rank}.txt").read_text() for rank in range(2))


def _rank(rank: int, function: Callable[..., object], folder: Path, port: int, arguments: tuple[object, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    with (folder / f"{rank}.txt").open("w") as file, redirect_stdout(file):
        function(*arguments)
