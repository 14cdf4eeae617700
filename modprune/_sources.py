"""What a command works on: the network, its data and the device, as the options name them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import typer
from torch import nn

from modprune.data import ImageData, ImageLoader, calibration
from modprune.specs import build_model, load_data
from modprune.weights import load_weights


@dataclass
class Source:
    """A network and its data, each loaded when it is asked for."""

    model: str
    weights: Path | None
    data: str
    data_dir: Path
    device: str
    seed: int = 0

    @cached_property
    def train(self) -> ImageData:
        """Training images."""
        return load_data(self.data, self.data_dir, train=True)

    @property
    def network(self) -> nn.Module:
        """Another one each time."""
        return load_network(self.model, self.weights, self.device, self.train.num_classes)

    @property
    def calibration(self) -> ImageLoader:
        """Training images as they are, in random order."""
        return calibration(self.train, self.seed, pick_device(self.device))

    @property
    def training(self) -> ImageLoader:
        """Training images, augmented; small sets in small batches, for more steps an epoch."""
        size = 128 if len(self.train) > 10_000 else 64
        device = pick_device(self.device)
        return ImageLoader(self.train, size, pad=self.train.pad, shuffle=True, seed=self.seed, device=device)

    @property
    def test(self) -> ImageLoader:
        """Test images in order."""
        return ImageLoader(load_data(self.data, self.data_dir, train=False), 100, device=pick_device(self.device))


def load_network(name: str, weights: Path | None, device: str, num_classes: int) -> nn.Module:
    """The network of a spec on a device, with weights or fresh ones; a built-in one has that many classes."""
    network = build_model(name, num_classes)
    return (load_weights(network, weights) if weights is not None else network).to(pick_device(device))


def pick_device(name: str) -> str:
    """The device of `--device`; raises typer.BadParameter where there is none of the name."""
    if name == "auto":
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # "meta", say, is a device and holds nothing
    except (RuntimeError, AssertionError) as error:
        raise typer.BadParameter(
            f"--device {name}: {str(error).splitlines()[0]:.120}; auto takes what there is"
        ) from None
    return name
