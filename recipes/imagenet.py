"""ImageNet: prune a pretrained torchvision or timm network by modularity, fine-tune it with the original as teacher.

Images come in the size, mean and spread that the network was published with; those of a network of yours are below.

    accelerate launch recipes/imagenet.py --model torchvision:resnet50 --data-dir imagenet --flops 0.3 --out runs/r50

--data-dir holds train/CLASS/*.jpg and val/CLASS/*.jpg. One process or many, bf16 where the device has it, gradient
accumulation, label smoothing, an average of the weights (EMA). --resume goes on after an interruption: after SIGTERM
from the update that it came at (in several processes from one of the next), after a kill from the last whole epoch.
"""

import argparse
import copy
import json
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration, skip_first_batches
from PIL.Image import DecompressionBombError
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets import ImageFolder
from torchvision.models import get_model, get_model_weights
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import modprune
from modprune.checkpoints import check_empty, check_writable, load_newest, save_state
from modprune.criteria import Modularity
from modprune.precision import autocast_dtype
from modprune.recipe import warmup_cosine
from modprune.signals import Notice, put_off
from modprune.specs import build_model
from modprune.store import checksum

SIZE, RESIZE = 224, 256  # of images that are trained on, and of the short side before the middle of it is tested on
MEAN, STD, INTERPOLATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"
MOMENTUM, WEIGHT_DECAY, SMOOTHING = 0.9, 1e-4, 0.1  # of torchvision's reference for ResNets
DISTILL, TEMPERATURE = 0.5, 1.0
RESULTS = ("plan.json", "report.json", "model.safetensors")
MAY_DIFFER = ("data_dir", "workers", "epochs", "out", "resume")  # of the arguments of a run and its resumption
BUDGET = 2**33  # bytes of features that are held at a time: with less, images are forwarded more often
LOOK = 25  # updates between looks at the loss and at the others, which an accelerator has to wait for


class Images(ImageFolder):
    """An image folder whose unreadable files are named, counted in `unread` and left out by `together`."""

    def __init__(self, root: Path, transform: v2.Compose) -> None:
        super().__init__(root, transform)
        self.unread = torch.zeros(len(self), dtype=torch.bool).share_memory_()  # the workers of a loader share it

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        """An image and its class, or None."""
        path, label = self.samples[index]
        try:
            image = self.loader(path)
        except (OSError, SyntaxError, ValueError, DecompressionBombError) as error:  # what PIL has for damaged files
            if not self.unread[index]:
                print(f"skipped {path}: {str(error).splitlines()[0]}", file=sys.stderr)
            self.unread[index] = True
            return None
        return self.transform(image), label


def together(samples: list[tuple[Tensor, int] | None]) -> list[Tensor]:
    """A batch of the images that could be read."""
    read = [sample for sample in samples if sample is not None]
    if not read:
        raise OSError(f"none of the {len(samples)} images of a batch can be read: remove the files that were skipped")
    return default_collate(read)


def pretrained(spec: str, weights: str) -> nn.Module:
    """A network by `torchvision:NAME` or `timm:NAME`, with its published weights or those of a file."""
    source, _, name = spec.partition(":")
    if weights != "published":
        return modprune.load_weights(build_model(spec), weights)
    if source not in ("torchvision", "timm") or not name:
        raise ValueError(f"--model {spec}: give torchvision:NAME or timm:NAME, or --weights too")
    if source == "timm":
        import timm

        return timm.create_model(name, pretrained=True)
    return get_model(name, weights="DEFAULT")


def transforms(spec: str, model: nn.Module) -> tuple[int, Callable, Callable]:
    """The size of a network's images, and what makes them for training and for testing."""
    source, _, name = spec.partition(":")
    size, mean, std, mode = SIZE, MEAN, STD, InterpolationMode(INTERPOLATION)
    tensor = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    test = v2.Compose([v2.Resize(RESIZE, mode), v2.CenterCrop(size), *tensor, v2.Normalize(mean, std)])
    if source == "torchvision":
        test = get_model_weights(name)["DEFAULT"].transforms()
        size, mean, std, mode = test.crop_size[0], test.mean, test.std, test.interpolation
    if source == "timm":
        from timm.data import create_transform, resolve_model_data_config

        published = resolve_model_data_config(model)
        test = create_transform(**published)
        size, mean, std = published["input_size"][-1], published["mean"], published["std"]
        mode = InterpolationMode(published["interpolation"])
    crop = v2.RandomResizedCrop(size, interpolation=mode)
    return size, v2.Compose([crop, v2.RandomHorizontalFlip(), *tensor, v2.Normalize(mean, std)]), test


class Training:
    """What is left of the network on its way: optimizer, schedule and average of the weights, as a state has them."""

    def __init__(self, arguments: argparse.Namespace, accelerator: Accelerator, bare: nn.Module, loader: DataLoader):
        self.accelerator, self.bare, self.loader = accelerator, bare, loader
        self.epochs, self.checkpoints = arguments.epochs, arguments.out / "checkpoints"
        steps = len(loader) * arguments.epochs
        decay = max(0.0, 1 - 20 * arguments.accumulate / steps)  # an average over the last twentieth
        self.ema = AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        lr = arguments.lr * arguments.batch_size * arguments.accumulate * accelerator.num_processes / 256
        optimizer = torch.optim.SGD(bare.parameters(), lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
        self.schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, 0.05 * steps, steps))
        self.model, self.optimizer = accelerator.prepare(bare, optimizer)
        accelerator.register_for_checkpointing(self.schedule, self.ema)

    def run(self, teacher: nn.Module, test_loader: DataLoader, resume: bool) -> nn.Module:
        """All epochs, or those that are left; returns the average."""
        first, begun = load_newest(self.accelerator, self.checkpoints) if resume else (0, 0)
        with put_off(signal.SIGTERM) as told:
            for epoch in range(first, self.epochs):
                self.epoch(epoch, begun if epoch == first else 0, teacher, told)
                self.save(epoch + 1)
                if told.anywhere():
                    told.obey()
                if self.accelerator.is_main_process:
                    top1 = modprune.evaluate(self.ema.module, test_loader).top1
                    print(f"epoch {epoch + 1}: Top-1 of the average {top1:.2f} %")
        return self.ema.module

    def epoch(self, epoch: int, begun: int, teacher: nn.Module, told: Notice) -> None:
        """One pass over the images, but for the `begun` batches that a state has seen."""
        self.model.train()
        left = skip_first_batches(self.loader, begun)
        left.set_epoch(epoch)
        bar = tqdm(left, f"epoch {epoch + 1}", disable=not self.accelerator.is_main_process)
        for step, (images, labels) in enumerate(bar, begun + 1):
            with self.accelerator.accumulate(self.model), self.accelerator.autocast():
                loss = self.loss(images, labels, teacher)
                self.accelerator.backward(loss)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.schedule.step()
            if not self.accelerator.sync_gradients:
                continue
            self.ema.update_parameters(self.bare)
            look = step // self.accelerator.gradient_accumulation_steps % LOOK == 0
            if look:
                if not loss.isfinite():
                    raise RuntimeError(f"epoch {epoch + 1}, step {step}: the loss is {loss}; try a lower --lr")
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if (look or self.accelerator.num_processes == 1) and told.anywhere():
                self.save(epoch, step)
                told.obey()

    def save(self, epoch: int, step: int = 0) -> None:
        """The state, in the place of the one before, unless nothing could go on from it."""
        if not all(parameter.isfinite().all() for parameter in self.bare.parameters()):
            raise RuntimeError(f"epoch {epoch + bool(step)}: the weights are no longer finite; try a lower --lr")
        save_state(self.accelerator, self.checkpoints, epoch, step)

    def loss(self, images: Tensor, labels: Tensor, teacher: nn.Module) -> Tensor:
        """What the labels and the teacher say."""
        logits = self.model(images).float()
        with torch.no_grad():
            soft = F.log_softmax(teacher(images).float() / TEMPERATURE, 1)
        hard = F.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        kl = F.kl_div(F.log_softmax(logits / TEMPERATURE, 1), soft, reduction="batchmean", log_target=True)
        return (1 - DISTILL) * hard + DISTILL * TEMPERATURE**2 * kl


def main(arguments: argparse.Namespace) -> None:
    """Prune, fine-tune, report."""
    check_out(arguments)
    cuda = torch.cuda.is_available()
    precision = "bf16" if autocast_dtype(torch.device("cuda" if cuda else "cpu")) else "no"
    # The order of an epoch is the same when it is begun again.
    order = DataLoaderConfiguration(use_seedable_sampler=True, data_seed=arguments.seed)
    accelerator = Accelerator(
        mixed_precision=precision, gradient_accumulation_steps=arguments.accumulate, dataloader_config=order,
        cpu=not torch.accelerator.is_available(),  # else torchrun's processes on CPUs are taken for one each
    )  # fmt: skip
    teacher = pretrained(arguments.model, arguments.weights).to(accelerator.device).eval()
    size, augmented, as_is = transforms(arguments.model, teacher)
    train, test = Images(arguments.data_dir / "train", augmented), Images(arguments.data_dir / "val", as_is)
    example = torch.zeros(1, 3, size, size, device=accelerator.device)
    with torch.no_grad():
        check_classes(arguments, train, test, teacher(example).shape[1])
    options = {"batch_size": arguments.batch_size, "num_workers": arguments.workers, "collate_fn": together}
    train_loader = accelerator.prepare(DataLoader(train, shuffle=True, drop_last=True, **options))
    test_loader = DataLoader(test, **options)
    if not len(train_loader):
        raise ValueError(
            f"{len(train)} images for --batch-size {arguments.batch_size} in {accelerator.num_processes} processes: "
            "give a smaller one"
        )
    plain, seeded = Images(arguments.data_dir / "train", as_is), torch.Generator().manual_seed(arguments.seed)
    calibration = DataLoader(plain, shuffle=True, generator=seeded, **options)
    criterion = Modularity(samples=arguments.samples, repeats=arguments.repeats, budget=BUDGET)
    pruner = modprune.ModularityPruner(teacher, example, calibration, criterion, flops=arguments.flops)
    begin(arguments, accelerator, teacher, len(train_loader))
    plan = planned(arguments, accelerator, pruner)
    accelerator.print(f"removing {len(plan.remove)} blocks: {', '.join(plan.remove)}")
    bare = plan.apply(copy.deepcopy(teacher), example)
    pruned = Training(arguments, accelerator, bare, train_loader).run(teacher, test_loader, arguments.resume)

    unread = [accelerator.reduce(data.unread.int().to(accelerator.device)) for data in (train, test)]
    accelerator.print(f"unreadable images left out: {sum(int((by > 0).sum()) for by in unread)}")
    if accelerator.is_main_process:
        report = modprune.compare(teacher, pruned, example, test_loader)
        print(report)
        report.to_json(arguments.out / "report.json")
        modprune.save(pruned, arguments.out / "model.safetensors")


def check_out(arguments: argparse.Namespace) -> None:
    """ValueError if the run would mix with one in --out, or replace what no run has written."""
    if not arguments.resume:
        check_empty(arguments.out / "checkpoints")
    own = [name for name in RESULTS if (arguments.out / name).exists()]
    if own and not (arguments.out / "run.json").exists():
        raise ValueError(f"{arguments.out}: its {own[0]} is of no run and would be replaced: give another folder")


def check_classes(arguments: argparse.Namespace, train: Images, test: Images, outputs: int) -> None:
    """ValueError unless the folders and the network have the same classes; a folder's number is its label."""
    if odd := sorted({*train.classes} ^ {*test.classes}):
        raise ValueError(
            f"{arguments.data_dir}: only one of train/ and val/ has the class {odd[0]!r}: both need the same"
        )
    if outputs != len(train.classes):
        raise ValueError(
            f"{arguments.model} tells {outputs} classes apart and {arguments.data_dir} has {len(train.classes)}: "
            "give a network of yours, --model path/to/file.py:function, with --weights"
        )


def begin(arguments: argparse.Namespace, accelerator: Accelerator, teacher: nn.Module, steps: int) -> None:
    """Note what plan, steps and rate follow from; to go on with another run's state would turn them into others."""
    run = {name: value for name, value in vars(arguments).items() if name not in MAY_DIFFER}
    run |= {"steps an epoch": steps, "processes": accelerator.num_processes}
    run["digest of the weights"] = checksum({}, teacher.state_dict())[:16]
    noted = arguments.out / "run.json"
    if arguments.resume and noted.exists():
        try:
            before = dict(json.loads(noted.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{noted}: not the record of a run; give another folder") from None
        if odd := [name for name in run if before.get(name) != run[name]]:
            there, here = ({name: values.get(name) for name in odd} for values in (before, run))
            raise ValueError(f"--resume: the run in {arguments.out} has {there}, this one {here}: start it as that was")
    accelerator.wait_for_everyone()  # to have read it
    if accelerator.is_main_process:
        check_writable(arguments.out)
        for name in () if arguments.resume else RESULTS:
            (arguments.out / name).unlink(missing_ok=True)  # of a run that was cut short there
        partial = noted.with_suffix(".partial")
        partial.write_text(json.dumps(run, indent=2) + "\n")
        partial.replace(noted)  # whole, or as it was


def planned(
    arguments: argparse.Namespace, accelerator: Accelerator, pruner: modprune.ModularityPruner
) -> modprune.PruningPlan:
    """The plan that the run was begun with, or a new one."""
    file = arguments.out / "plan.json"
    if arguments.resume and file.exists():
        return modprune.PruningPlan.from_json(file)
    plan = pruner.plan()
    if accelerator.is_main_process:
        plan.to_json(file)
    return plan


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="torchvision:resnet50", help="torchvision:NAME or timm:NAME")
    parser.add_argument("--weights", default="published", help="a file of its weights in place of the published ones")
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that holds train/ and val/")
    parser.add_argument("--flops", type=float, default=0.30, help="fraction of MACs to remove, at least")
    parser.add_argument("--samples", type=int, default=5000, help="images a measurement of Q: some five a class")
    parser.add_argument("--repeats", type=int, default=1, help="measurements of Q")
    parser.add_argument("--epochs", type=int, default=30, help="of fine-tuning")
    parser.add_argument("--batch-size", type=int, default=128, help="images a step and process")
    parser.add_argument("--accumulate", type=int, default=1, help="steps whose gradients are added up")
    parser.add_argument("--lr", type=float, default=0.02, help="peak rate for 256 images an update")
    parser.add_argument("--workers", type=int, default=8, help="processes that read images")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration images, and of the order of training")
    parser.add_argument("--out", type=Path, required=True, help="folder for all results")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    arguments = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "accumulate", "samples", "repeats"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1 is needed")
    if not 0 < arguments.lr < math.inf:
        parser.error(f"--lr {arguments.lr}: a rate above 0 is needed")
    return arguments


if __name__ == "__main__":
    main(parse())
