"""The main job in one and a half minutes on two cores, without network or files: scikit-learn's handwritten digits.

Trains a ResNet32, measures its modularity curve, removes seven of its fifteen blocks, fine-tunes with the unpruned
network as teacher, and writes the report. Copy it and put your own network and data in.
"""

import argparse
from pathlib import Path

import torch

import modprune
from modprune.data import ImageLoader, digits
from modprune.job import prune_job
from modprune.models import resnet32
from modprune.recipe import Recipe

TRAIN_EPOCHS = 24
RECOVERY = Recipe(epochs=16, lr=0.05)
BLOCKS = 7  # of 15: an exact number, where `flops=0.45` would also take every further block that lowers Q
PAD = 1  # of 8 pixels; a shift of more than one makes other digits of them
SEED = 0


def main(out: Path) -> None:
    """Train, prune, recover, report."""
    torch.manual_seed(SEED)
    train, test = digits(train=True), digits(train=False)
    network = resnet32()
    print(f"Training ResNet32 on {len(train)} digits")
    loader = ImageLoader(train, 64, pad=PAD, shuffle=True, seed=SEED)
    modprune.finetune(network, loader, epochs=TRAIN_EPOCHS)
    print("Measuring, pruning, fine-tuning")
    report = prune_job(network, train, test, out, blocks=BLOCKS, recipe=RECOVERY, batch_size=64, pad=PAD, seed=SEED)
    print(f"\n{report}\n\nWritten to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for all results")
    main(parser.parse_args().out)
