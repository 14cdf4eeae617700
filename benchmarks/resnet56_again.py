"""The real run, continued: the network of an earlier run learns once more, from several teachers.

    python -m benchmarks.resnet56_again --data-dir DIR --weights FILE --teachers FILE FILE [--start NAME] [--name NAME]
        [--restore BLOCK BLOCK] [--remove BLOCK BLOCK] [--width R [--within BLOCK]] [--mixed K]

A student that has come as near to one teacher as it can still gains from the mean of several, and from images that
none of them has learnt by heart: those that CutMix makes. Starts from benchmarks/results/START.safetensors. With
--restore, blocks that are gone from it come back first, with --remove, others go, and with --width, torch-pruning then
cuts that fraction of the channels inside the blocks that stay. Resumable: the same command goes on where a killed one
was. The weights are those of the last epoch; test images choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from benchmarks._env import RESULTS, write_result
from benchmarks.resnet56_cifar10 import BATCH, PAD
from benchmarks.wide_teacher import NAME as WIDE
from benchmarks.wide_teacher import wide_teacher
from modprune import CachedTeacher, PruningPlan, compare, find_blocks, finetune, load, load_weights, models, save
from modprune._memory import keep_freed_memory
from modprune.checkpoints import states
from modprune.data import ImageData, ImageLoader, cifar10
from modprune.finetune import Epoch
from modprune.recipe import Recipe
from modprune.surgery import removed_blocks
from modprune.width import choose_cuts

LOOKS = 2
PATCHES = 10  # images that share the box of one CutMix
EXAMPLE = torch.zeros(1, 3, 32, 32)


class Ensemble(nn.Module):
    """Networks that answer together: the mean of their logits."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, 32, 32) to (B, classes)."""
        return torch.stack([network(images) for network in self.networks]).mean(0)


def main(
    data_dir: Path,
    weights: Path,
    teachers: Sequence[Path],
    start: str,
    name: str,
    restore: Sequence[str],
    remove: Sequence[str],
    width: float,
    within: str | None,
    mixed: int,
    epochs: int,
    lr: float,
    seed: int,
) -> None:
    """Run, and write benchmarks/results/NAME.json and the network."""
    keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = load_weights(models.resnet56(), weights)
    pruned = restored(load(RESULTS / f"{start}.safetensors"), network, restore)
    pruned = narrowed(PruningPlan(tuple(remove)).apply(pruned, EXAMPLE), width, within)
    pruned.to(device, memory_format=torch.channels_last)
    train, test = with_mixed(cifar10(data_dir, train=True), mixed, seed), cifar10(data_dir, train=False)
    taught_by = Ensemble([teacher(path) for path in (weights, *teachers)]).to(device, memory_format=torch.channels_last)
    # Of a mixed image the teachers say more than its two labels do.
    recipe = Recipe(epochs=epochs, lr=lr, distill=1.0 if mixed else Recipe.distill)
    checkpoints = Path("runs") / name / "checkpoints"
    history = finetune(
        pruned,
        ImageLoader(train, BATCH, pad=PAD, shuffle=True, seed=seed, device=device),
        teacher=CachedTeacher(taught_by, len(train), LOOKS),
        checkpoints=checkpoints,
        resume=bool(states(checkpoints)),
        **asdict(recipe),
    )
    names = [path.name for path in (weights, *teachers)]
    back = f" --restore {' '.join(restore)}" if restore else ""
    gone = f" --remove {' '.join(remove)}" if remove else ""
    only = f" --within {within}" if within else ""
    facts = {
        "command": "python -m benchmarks.resnet56_again --data-dir DIR --weights FILE"
        f" --teachers {' '.join(names[1:])} --start {start} --name {name}{back}{gone} --width {width}{only}"
        f" --mixed {mixed} --epochs {epochs} --lr {lr} --seed {seed}",
        "restored": list(restore),
        "removed_again": list(remove),
        "width": width,
        "within": within,
        "mixed": mixed,
        "recipe": {**asdict(recipe), "batch_size": BATCH, "pad": PAD, "teacher": f"mean of {names}, {LOOKS} looks"},
        "seed": seed,
    }
    publish(name, start, facts, history, network.to(device), pruned, ImageLoader(test, 100, device=device))


def publish(
    name: str,
    start: str,
    facts: dict[str, Any],
    history: Sequence[Epoch],
    network: nn.Module,
    pruned: nn.Module,
    test: ImageLoader,
) -> None:
    """Measure the network of a run and write it, and what is known of the run and of those before it."""
    pruned.to(memory_format=torch.contiguous_format)
    report = compare(network, pruned, EXAMPLE.to(test.device), test)
    print(report)
    save(pruned, RESULTS / f"{name}.safetensors")
    before = json.loads((RESULTS / f"{start}.json").read_text())
    removed = removed_blocks(pruned).remove
    result = {
        **facts,
        "start": start,
        "removed": removed,
        "kept": [name for name in before["scores"] if name not in removed],
        "report": json.loads(report.to_json()),
        "device": test.device.type,
        "trained_epochs": len(history),
        "history": [asdict(epoch) for epoch in history],
    }
    lasting = {key: before[key] for key in ("checkpoint", "scores", "curve")}
    print(write_result(name, {**result, **lasting, "before": before}))


def with_mixed(data: ImageData, times: int, seed: int) -> ImageData:
    """`data`, and after it `times` images for each of its own, made by CutMix of two; labels are of the larger part."""
    cutmix = v2.CutMix(num_classes=data.num_classes)
    images, labels = [data.images], [data.labels]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for part in torch.cat([torch.randperm(len(data)) for _ in range(times)] or [torch.arange(0)]).split(PATCHES):
            both, shares = cutmix(data.images[part], data.labels[part])
            images.append(both)
            labels.append(shares.argmax(1))
    return replace(data, images=torch.cat(images), labels=torch.cat(labels))


def restored(network: nn.Module, whole: nn.Module, names: Sequence[str]) -> nn.Module:
    """`network`, in place, with blocks of `whole` again; they begin as the identity: the others learnt without them."""
    for name in names:
        block = copy.deepcopy(whole.get_submodule(name))
        nn.init.zeros_(block.get_submodule("bn2").get_parameter("weight"))
        nn.init.zeros_(block.get_submodule("bn2").get_parameter("bias"))
        network.set_submodule(name, block)
    return network


def narrowed(network: nn.Module, width: float, within: str | None) -> nn.Module:
    """`network`, in place, without that fraction of the channels inside its blocks, or inside one of them."""
    if not width:
        return network
    blocks = find_blocks(network, EXAMPLE)
    others = [block.name for block in blocks if within and block.name != within]
    cuts = choose_cuts(network, blocks, EXAMPLE, width, others)
    return PruningPlan((), width=cuts).apply(network, EXAMPLE)


def teacher(path: Path) -> nn.Module:
    """The wide one, one of modprune's own file, or of a public checkpoint, told by its name: `resnet32-d509ac18.th`."""
    if path.stem == WIDE:
        return wide_teacher()
    if path.suffix == ".safetensors":
        return load(path)
    return load_weights(getattr(models, path.name.split("-")[0])(), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, required=True, help="the public checkpoint of ResNet56")
    parser.add_argument("--teachers", type=Path, nargs="+", required=True, help="more of them, or pruned networks")
    parser.add_argument("--start", default="resnet56-cifar10-first", help="result whose network learns once more")
    parser.add_argument("--name", default="resnet56-cifar10", help="result to write, and folder in runs/ to work in")
    parser.add_argument("--restore", nargs="+", default=(), metavar="BLOCK", help="blocks that come back first")
    parser.add_argument("--remove", nargs="+", default=(), metavar="BLOCK", help="blocks that go first")
    parser.add_argument("--width", type=float, default=0.0, help="fraction of the channels inside blocks to cut first")
    parser.add_argument("--within", help="the only block to cut channels in")
    parser.add_argument("--mixed", type=int, default=0, help="images made by CutMix, for each of the training set")
    parser.add_argument("--epochs", type=int, default=28, help="of fine-tuning")
    parser.add_argument("--lr", type=float, default=0.04, help="peak learning rate")
    # Another seed than that of the run before: its augmentations would come again.
    parser.add_argument("--seed", type=int, default=1, help="of the augmentation")
    main(**vars(parser.parse_args()))
