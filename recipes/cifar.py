"""CIFAR-10 and CIFAR-100: train a ResNet or VGG if there are no weights yet, prune it by modularity, fine-tune, report.

    python recipes/cifar.py --model resnet56 --weights resnet56-4bfd9763.th --data-dir data --out runs/resnet56
    python recipes/cifar.py --model vgg16_bn --data cifar100 --data-dir data --out runs/vgg16

The same command with --resume goes on with an interrupted run; under `torchrun --nproc-per-node N` the processes share
the work. Copy it and change what you like.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState

import modprune
from modprune.data import ImageLoader, cifar10, cifar100
from modprune.job import prune_job
from modprune.models import MODELS
from modprune.recipe import Recipe

DATA = {"cifar10": cifar10, "cifar100": cifar100}
BATCH, PAD = 128, 4  # of He et al. (2016), section 4.2
TRAINING = {"lr": 0.1, "weight_decay": 5e-4}


def main(arguments: argparse.Namespace) -> None:
    """Train if need be, prune, recover, report."""
    recipe = Recipe(epochs=arguments.epochs, lr=arguments.lr)
    pruning = {name: getattr(arguments, name) for name in ("criterion", "flops", "params", "width")}
    processes = PartialState()
    out, device = arguments.out, processes.device
    torch.manual_seed(arguments.seed)
    train, test = (DATA[arguments.data](arguments.data_dir, train=part) for part in (True, False))
    network = MODELS[arguments.model](num_classes=train.num_classes).to(device)
    modprune.ModularityPruner(network, None, (), **pruning)  # what is wrong is told before the training, not after
    made_by = (arguments.model, arguments.data, arguments.train_epochs, "epochs-seed", arguments.seed)
    trained = out / f"{'-'.join(map(str, made_by))}.safetensors"
    if arguments.weights or trained.exists():  # of an earlier command with the same --out
        modprune.load_weights(network, arguments.weights or trained)
    else:
        loader = ImageLoader(train, BATCH, pad=PAD, shuffle=True, seed=arguments.seed, device=device)
        modprune.finetune(
            network, loader, epochs=arguments.train_epochs, checkpoints=trained.with_suffix(""),
            resume=arguments.resume, **TRAINING,
        )  # fmt: skip
        if processes.is_main_process:
            modprune.save(network, trained)
    report = prune_job(
        network, train, test, out, **pruning,
        recipe=recipe, batch_size=BATCH, pad=PAD, seed=arguments.seed, compiled=arguments.compile,
        resume=arguments.resume,
    )  # fmt: skip
    processes.print(report)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="resnet56", help="network")
    parser.add_argument("--weights", type=Path, help="its trained weights; without, it is trained first")
    parser.add_argument("--data", choices=DATA, default="cifar10", help="data set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder of the data set")
    parser.add_argument("--flops", type=float, default=0.60, help="fraction of MACs to remove, at least")
    parser.add_argument("--params", type=float, help="fraction of parameters to remove, at least")
    parser.add_argument("--width", type=float, help="fraction of channels to cut inside the blocks that stay")
    parser.add_argument("--criterion", default="modularity", help="what scores the blocks")
    parser.add_argument("--train-epochs", type=int, default=200, help="of training without --weights")
    parser.add_argument("--epochs", type=int, default=80, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.1, help="peak rate of fine-tuning")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    parser.add_argument("--compile", action="store_true", help="fine-tune by torch.compile")
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main(parse())
