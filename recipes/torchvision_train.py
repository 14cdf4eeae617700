"""Training as torchvision's references/classification/train.py has it; the lines to add for pruning are marked.

    torchrun --nproc-per-node 8 recipes/torchvision_train.py --data-dir imagenet --out pruned.safetensors

--data-dir holds train/CLASS/*.jpg and val/CLASS/*.jpg. One process or many: blocks go before the model is wrapped, so
the wrapper, the optimizer, the schedule and the average (EMA) are those of what is left.
"""

import argparse
import os
from pathlib import Path

import torch
import torchvision
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import modprune  # added

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TO_TENSOR = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]


def main(arguments: argparse.Namespace) -> None:
    """Prune, train what is left, save."""
    processes, cuda = int(os.environ.get("WORLD_SIZE", "1")), torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)  # NCCL sends Python objects over the current one
    if processes > 1:
        init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(arguments.seed)
    size = arguments.size
    crops = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *TO_TENSOR])
    centre = v2.Compose([v2.Resize(size * 256 // 224, antialias=True), v2.CenterCrop(size), *TO_TENSOR])
    train_set = ImageFolder(arguments.data_dir / "train", crops)
    test_set = ImageFolder(arguments.data_dir / "val", centre)
    if odd := sorted({*train_set.classes} ^ {*test_set.classes}):
        raise ValueError(
            f"{arguments.data_dir}: only one of train/ and val/ has the class {odd[0]!r}: both need the same"
        )
    if len(train_set) < arguments.batch_size * processes:
        raise ValueError(f"{len(train_set)} images for --batch-size {arguments.batch_size}: give a smaller one")
    options = {"batch_size": arguments.batch_size, "num_workers": arguments.workers}
    sampler = DistributedSampler(train_set) if processes > 1 else None
    train = DataLoader(train_set, sampler=sampler, shuffle=sampler is None, drop_last=True, **options)
    test = DataLoader(test_set, **options)
    if arguments.weights == "none":
        model = torchvision.models.get_model(arguments.model, num_classes=len(train_set.classes)).to(device)
    else:
        model = torchvision.models.get_model(arguments.model, weights=arguments.weights).to(device)

    plain = ImageFolder(arguments.data_dir / "train", centre)  # added: calibration images without augmentation
    mine = DistributedSampler(plain) if processes > 1 else torch.utils.data.RandomSampler(plain)  # added
    criterion = modprune.criteria.Modularity(samples=arguments.samples, repeats=1, budget=2**33)  # added
    example = torch.zeros(1, 3, size, size, device=device)  # added
    calibration = DataLoader(plain, sampler=mine, **options)  # added
    pruner = modprune.ModularityPruner(model, example, calibration, criterion, flops=arguments.flops)  # added
    model = pruner.step()  # added: in every process the same blocks, or an error that names the ranks

    net = DistributedDataParallel(model, device_ids=[device.index] if cuda else None) if processes > 1 else model
    decay = max(0.0, 1 - 20 / (arguments.epochs * len(train)))  # an average over the last twentieth, on any data
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), arguments.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=arguments.epochs)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for epoch in range(arguments.epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        net.train()
        for images, labels in train:
            loss = loss_of(net(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ema.update_parameters(model)
        schedule.step()
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"epoch {epoch + 1}: loss {loss:.3f}, Top-1 {modprune.evaluate(ema.module, test).top1:.2f} %")
            modprune.save(ema.module, arguments.out)  # added: weights and plan
    if processes > 1:
        destroy_process_group()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet50", help="a name that torchvision knows")
    parser.add_argument("--weights", default="DEFAULT", help="torchvision's name of the weights; none for random ones")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds train/ and val/")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--epochs", type=int, default=30, help="of training")
    parser.add_argument("--flops", type=float, default=0.3, help="fraction of MACs to remove, at least")
    parser.add_argument("--samples", type=int, default=5000, help="images a measurement of Q: some five a class")
    parser.add_argument("--batch-size", type=int, default=32, help="images a step and process")
    parser.add_argument("--lr", type=float, default=0.1, help="peak rate")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order; the same in every process")
    parser.add_argument("--out", type=Path, required=True, help="file for the pruned network")
    arguments = parser.parse_args(argv)
    if arguments.epochs < 1:
        parser.error(f"--epochs {arguments.epochs}: at least 1 is needed")
    if arguments.out.is_dir():
        parser.error(f"--out {arguments.out}: it is a folder, give a file")
    return arguments


if __name__ == "__main__":
    main(parse())
