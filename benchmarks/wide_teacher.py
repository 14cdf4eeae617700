"""Another teacher for ResNet56's benchmark: a wide residual network, trained here on CIFAR-10's training set.

    python -m benchmarks.wide_teacher --data-dir DIR

Wide layers use a processor better than deep ones: with more MACs than ResNet56 it trains and answers about as fast. It
learns from labels alone, half of its batches mixed by CutMix. Resumable: the same command goes on where a killed one
was. The weights are those of the last epoch, kept in half precision; test images choose nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks._env import RESULTS, write_result
from benchmarks.resnet56_cifar10 import BATCH, PAD
from modprune import finetune
from modprune._memory import keep_freed_memory
from modprune.checkpoints import states
from modprune.data import ImageLoader, cifar10
from modprune.evaluate import evaluate
from modprune.recipe import Recipe

NAME, STEM, WIDTHS, SEED = "wide-teacher", 32, (64, 256, 256), 0
# CutMix's labels are shares, so its logits lie closer together than those of networks that learnt from plain labels;
# in a mean with these it would hardly be heard.
SHARPER = 2.6


class Residual(nn.Module):
    """x + branch(x)."""

    def __init__(self, *branch: nn.Module) -> None:
        super().__init__()
        self.branch = nn.Sequential(*branch)

    def forward(self, x: Tensor) -> Tensor:
        """The shape of `x`."""
        return x + self.branch(x)


def wide_network() -> nn.Sequential:
    """(B, 3, 32, 32) to logits (B, 10): each stage halves the image, then adds one residual block."""
    layers = [unit(3, STEM)]
    for before, width in zip((STEM, *WIDTHS), WIDTHS, strict=False):
        layers += [unit(before, width, nn.MaxPool2d(2)), Residual(unit(width, width), unit(width, width))]
    return nn.Sequential(*layers, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 10))


def unit(channels: int, width: int, *pool: nn.Module) -> nn.Sequential:
    """Convolution, pooling if any, batch norm, ReLU."""
    convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, *pool, nn.BatchNorm2d(width), nn.ReLU())


class CutMixed:
    """The batches of a loader, of which a part at random is mixed by CutMix; labels become (B, classes) shares.

    Each batch is mixed with itself in another order, under one box, drawn from torch's own generator.
    """

    def __init__(self, loader: ImageLoader, part: float) -> None:
        self.loader, self.part = loader, part
        self.mix = v2.CutMix(num_classes=loader.data.num_classes)

    def set_epoch(self, epoch: int) -> None:
        """Of the loader."""
        self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels, _ in self.loader:
            if torch.rand(()) < self.part:
                yield self.mix(images, labels)
            else:
                yield images, nn.functional.one_hot(labels, self.loader.data.num_classes).float()


def wide_teacher() -> nn.Module:
    """The trained network of benchmarks/results/wide-teacher.safetensors, float32, its logits spread by `SHARPER`."""
    network = wide_network()
    network.load_state_dict(load_file(RESULTS / f"{NAME}.safetensors"))
    for parameter in network[-1].parameters():
        parameter.data *= SHARPER
    return network


def main(data_dir: Path, epochs: int, lr: float) -> None:
    """Train, and write benchmarks/results/wide-teacher.json and the network."""
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    network = wide_network().to(device, memory_format=torch.channels_last)
    train, test = cifar10(data_dir, train=True), cifar10(data_dir, train=False)
    recipe, checkpoints = Recipe(epochs=epochs, lr=lr), Path("runs") / NAME / "checkpoints"
    loader = CutMixed(ImageLoader(train, BATCH, pad=PAD, shuffle=True, seed=SEED, device=device), 0.5)
    history = finetune(network, loader, checkpoints=checkpoints, resume=bool(states(checkpoints)), **asdict(recipe))
    state = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    halves = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    save_file(halves, RESULTS / f"{NAME}.safetensors")
    top1 = evaluate(wide_teacher().to(device), ImageLoader(test, 100, device=device)).top1
    result = {
        "command": f"python -m benchmarks.wide_teacher --data-dir DIR --epochs {epochs} --lr {lr}",
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "top1": top1,
        "recipe": {**asdict(recipe), "batch_size": BATCH, "pad": PAD, "cutmix": loader.part},
        "seed": SEED,
        "device": device,
        "history": [asdict(epoch) for epoch in history],
    }
    print(top1, write_result(NAME, result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--epochs", type=int, default=40, help="of training")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    main(**vars(parser.parse_args()))
