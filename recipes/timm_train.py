"""Training by timm's own parts, as its train.py puts them together; the lines to add for pruning are marked.

    python recipes/timm_train.py --data-dir imagenet --out pruned.safetensors

--data-dir holds train/CLASS/*.jpg and val/CLASS/*.jpg. In timm's train.py the same lines go to the same places: after
the model, the optimizer and the loaders are made, and at the end of the epoch loop. It wraps the model in
DistributedDataParallel before that loop; in several processes, prune before the wrapping.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, ModelEmaV3, accuracy

import modprune  # added


def main(arguments: argparse.Namespace) -> None:
    """Train, prune on the way, save."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(arguments.seed)
    train_set = create_dataset("", arguments.data_dir, "train", is_training=True)
    if len(train_set) < arguments.batch_size:
        raise ValueError(f"{len(train_set)} images for --batch-size {arguments.batch_size}: give a smaller one")
    classes = train_set.reader.class_to_idx  # for val/ too: by itself it would number the folders that it has
    model = timm.create_model(arguments.model, pretrained=arguments.pretrained, num_classes=len(classes)).to(device)
    common = {
        "input_size": (3, arguments.size, arguments.size), "batch_size": arguments.batch_size, "device": device,
        "num_workers": arguments.workers, "persistent_workers": False, "use_prefetcher": False,
    }  # fmt: skip
    train = create_loader(train_set, is_training=True, **common)
    test = create_loader(create_dataset("", arguments.data_dir, "val", class_map=classes), **common)
    plain = create_loader(create_dataset("", arguments.data_dir, "train"), **common).dataset  # added: not augmented
    optimizer = create_optimizer_v2(model, opt="sgd", lr=arguments.lr, weight_decay=2e-5, momentum=0.9)
    scheduler, epochs = create_scheduler_v2(optimizer, sched="cosine", num_epochs=arguments.epochs)
    decay = max(0.0, 1 - 20 / (epochs * len(train)))  # an average over the last twentieth, on any data
    ema = ModelEmaV3(model, decay=decay)
    smoothed = LabelSmoothingCrossEntropy(0.1)
    shuffled = torch.utils.data.DataLoader(plain, arguments.batch_size, shuffle=True)  # added: all classes in it
    criterion = modprune.criteria.Modularity(samples=arguments.samples, repeats=1, budget=2**33)  # added
    prune = modprune.GradualPruning(model, shuffled, criterion, at=arguments.at, flops=arguments.flops)  # added

    for epoch in range(epochs):
        model.train()
        losses = AverageMeter()
        for images, labels in train:
            loss = smoothed(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update(model)
            losses.update(loss.item(), len(labels))
        scheduler.step(epoch + 1)
        plan = prune(epoch + 1, optimizer)  # added: momentum and schedule go on with what stays
        if plan is not None:  # added
            ema = ModelEmaV3(model, decay=decay)  # added: the old average holds on to what went
            print("removed", ", ".join(plan.remove))  # added
        print(f"epoch {epoch + 1}: loss {losses.avg:.3f}, Top-1 {top1(ema.module, test, device):.2f} %")
        modprune.save(ema.module, arguments.out)  # added: weights and plan
    prune.warn_if_unfinished()  # added: warns if training ended before all stages came due


@torch.no_grad()
def top1(model: torch.nn.Module, loader: torch.utils.data.DataLoader, device: torch.device) -> float:
    """In percent."""
    model.eval()
    right = AverageMeter()
    for images, labels in loader:
        right.update(accuracy(model(images.to(device)), labels.to(device))[0].item(), len(labels))
    return right.avg


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a name that timm knows")
    parser.add_argument("--pretrained", action="store_true", help="begin with timm's weights")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds train/ and val/")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--epochs", type=int, default=30, help="of training")
    parser.add_argument("--at", type=int, nargs="+", default=[5, 10, 15], help="epochs after which a stage goes")
    parser.add_argument("--flops", type=float, default=0.3, help="fraction of MACs to remove in all, at least")
    parser.add_argument("--samples", type=int, default=5000, help="images a measurement of Q: some five a class")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step")
    parser.add_argument("--lr", type=float, default=0.05, help="peak rate")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order")
    parser.add_argument("--out", type=Path, required=True, help="file for the pruned network")
    arguments = parser.parse_args(argv)
    for part in ("train", "val"):
        if not (arguments.data_dir / part).is_dir():  # timm would take all images for either
            parser.error(f"--data-dir {arguments.data_dir}: it has no folder {part}")
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: at least 1 is needed")
    if arguments.out.is_dir():
        parser.error(f"--out {arguments.out}: it is a folder, give a file")
    return arguments


if __name__ == "__main__":
    main(parse())
