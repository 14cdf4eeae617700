"""The real run, continued: the network of an earlier run learns once more, from the wide teacher, at every image anew.

    python -m benchmarks.resnet56_patient --data-dir DIR --weights FILE [--start NAME] [--name NAME]
        [--width R [--within BLOCK]]

A teacher that answers from memory (`resnet56_again`) speaks of another crop than the one that its student sees, and of
a set of mixed images that is soon known by heart. Here teacher and student see the same crop, and CutMix mixes most
batches anew, for as long as it takes (Beyer et al., "Knowledge distillation: A good teacher is patient and consistent",
CVPR 2022). Labels are not used. Resumable: the same command goes on where a killed one was. The weights are those of
the last epoch; test images choose nothing.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks._env import RESULTS
from benchmarks.resnet56_again import narrowed, publish
from benchmarks.resnet56_cifar10 import BATCH, PAD
from benchmarks.wide_teacher import NAME as TEACHER
from benchmarks.wide_teacher import CutMixed, wide_teacher
from modprune import finetune, load, load_weights, models
from modprune._memory import keep_freed_memory
from modprune.checkpoints import states
from modprune.data import ImageLoader, cifar10
from modprune.recipe import Recipe

CUTMIX, TEMPERATURE = 0.75, 2.0


def main(
    data_dir: Path,
    weights: Path,
    start: str,
    name: str,
    width: float,
    within: str | None,
    epochs: int,
    lr: float,
    seed: int,
) -> None:
    """Run, and write benchmarks/results/NAME.json and the network."""
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)  # of the boxes
    network = load_weights(models.resnet56(), weights).to(device)
    pruned = narrowed(load(RESULTS / f"{start}.safetensors"), width, within)
    pruned.to(device, memory_format=torch.channels_last)
    teacher = wide_teacher().to(device, memory_format=torch.channels_last)
    train, test = cifar10(data_dir, train=True), cifar10(data_dir, train=False)
    loader = CutMixed(ImageLoader(train, BATCH, pad=PAD, shuffle=True, seed=seed, device=device), CUTMIX)
    recipe = Recipe(epochs=epochs, lr=lr, distill=1.0, temperature=TEMPERATURE)
    checkpoints = Path("runs") / name / "checkpoints"
    history = finetune(
        pruned, loader, teacher=teacher, checkpoints=checkpoints, resume=bool(states(checkpoints)), **asdict(recipe)
    )
    facts = {
        "command": "python -m benchmarks.resnet56_patient --data-dir DIR --weights FILE"
        f" --start {start} --name {name} --width {width}"
        f"{f' --within {within}' if within else ''} --epochs {epochs} --lr {lr} --seed {seed}",
        "width": width,
        "within": within,
        "mixed": 0,
        "recipe": {**asdict(recipe), "batch_size": BATCH, "pad": PAD, "teacher": TEACHER, "cutmix": CUTMIX},
        "seed": seed,
    }
    publish(name, start, facts, history, network, pruned, ImageLoader(test, 100, device=device))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="the public checkpoint of ResNet56")
    parser.add_argument("--start", default="resnet56-cifar10-longer", help="result whose network learns once more")
    parser.add_argument("--name", default="resnet56-cifar10-patient", help="result to write, and folder in runs/")
    parser.add_argument("--width", type=float, default=0.0, help="fraction of the channels inside blocks to cut first")
    parser.add_argument("--within", help="the only block to cut channels in")
    parser.add_argument("--epochs", type=int, default=60, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate")
    # Another seed than that of the run before: its augmentations would come again.
    parser.add_argument("--seed", type=int, default=6, help="of the augmentation")
    main(**vars(parser.parse_args()))
