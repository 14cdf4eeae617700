"""The command line: parse, one public call, print or write."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import modprune
from modprune import _studies_cli
from modprune._files import to_json
from modprune._memory import keep_freed_memory
from modprune._options import (
    Count,
    Criterion,
    Data,
    DataDir,
    Device,
    Flops,
    Json,
    K,
    Latency,
    Model,
    Params,
    Rate,
    Repeats,
    Samples,
    Seed,
    Weights,
    Width,
    check_model,
    to_write,
)
from modprune._processes import meet, place
from modprune._sources import Source, load_network, pick_device
from modprune.budget import Budget
from modprune.criteria import fitted
from modprune.data import ImageLoader
from modprune.job import RESULTS, prune_job
from modprune.picture import check_png, save_picture
from modprune.recipe import Recipe
from modprune.specs import build_model, data_shape, load_data
from modprune.weights import is_plain

INTERRUPTED = 130  # as typer ends a command after Ctrl-C

# Of click, which some versions of typer carry inside them.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # an error is one line, not a box
    help="Remove whole redundant residual blocks from trained networks, chosen by graph modularity.",
)
app.add_typer(_studies_cli.app, name="study")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"modprune {version('modprune')}")
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and exit.")]
    = False,
) -> None:  # fmt: skip
    pass


def _png(value: Path | None) -> Path | None:
    if value is not None:
        with _usage():
            check_png(value)
    return to_write(value)


@contextmanager
def _usage() -> Iterator[None]:
    """A value that the library refuses is wrong usage here."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command()
def blocks(
    model: Model, data: Data = "cifar10",
    size: Annotated[int | None, typer.Option(min=1, help="Height and width of the images, if not those of --data.")]
    = None, json_: Json = None,
) -> None:  # fmt: skip
    """List the blocks of a network that can be removed, what that would free, and why others have to stay."""
    num_classes, (channels, *sides) = data_shape(data)
    network = build_model(model, num_classes)
    example = torch.zeros(1, channels, *([size, size] if size else sides))
    try:
        found = modprune.find_blocks(network, example)
    except RuntimeError as error:
        raise RuntimeError(f"{error}; the commands give images: --size says how large") from error
    macs, params = modprune.count_macs(network, example), modprune.count_params(network)
    width = max(map(len, ("block", *found.names, *found.refused)))
    print(f"{'block':<{width}} {'kind':<11} {'parameters':>11} {'of all':>7} {'MACs':>12} {'of all':>7}")
    for b in found:
        share = b.params / params, b.macs / macs
        macs_m = f"{b.macs / 1e6:,.3f} M"
        print(f"{b.name:<{width}} {b.kind:<11} {b.params:>11,} {share[0]:>7.2%} {macs_m:>12} {share[1]:>7.2%}")
    for name, reason in found.refused.items():
        print(f"{name:<{width}} stays: {reason}")
    if not found:
        print(f"none can go: {found.why_no_more}")
    print(f"{len(found)} blocks; the network has {params:,} parameters and {macs / 1e6:.3f} M MACs")
    _write(json_, {"blocks": [asdict(b) for b in found], "refused": found.refused, "params": params, "macs": macs})


@app.command()
def curve(
    model: Model, weights: Weights, data: Data = "cifar10", data_dir: DataDir = Path("data"), k: K = 3,
    samples: Samples = 500, repeats: Repeats = 5, seed: Seed = 0, device: Device = "auto",
    picture: Annotated[
        Path | None, typer.Option(help="Draw the curve to this PNG file as well.", callback=_png)
    ] = None,
    json_: Json = None,
) -> None:  # fmt: skip
    """Measure the modularity Q of every layer on training images: where the classes separate, where nothing changes.

    Under torchrun or accelerate launch, the processes share the work.
    """
    first = meet(pick_device(device))
    source = Source(model, weights, data, data_dir, device, seed)
    result = modprune.modularity_curve(source.network, source.calibration, k, samples, repeats)
    if not first:
        return
    flat, falling = result.plateaus(), result.degradations()
    width = max(map(len, ("layer", *result.layers)))
    print(f"{'layer':<{width}} {'Q':>8} {'spread':>8} {'gain':>8}")
    gains = [None, *result.gain]
    for name, q, std, gain in zip(result.layers, result.mean, result.std, gains, strict=True):
        word = "plateau" if name in flat else "degradation" if name in falling else ""
        print(f"{name:<{width}} {q:>8.4f} {std:>8.4f} {'' if gain is None else f'{gain:+.4f}':>8}  {word}".rstrip())
    if picture is not None:
        save_picture(result.plot(), picture)
    if json_ is not None:
        result.to_json(json_)


@app.command()
def plan(
    model: Model, weights: Weights, data: Data = "cifar10", data_dir: DataDir = Path("data"), flops: Flops = None,
    params: Params = None, count: Count = None, latency: Latency = None, width: Width = None,
    criterion: Criterion = "modularity", seed: Seed = 0, device: Device = "auto", json_: Json = None,
) -> None:  # fmt: skip
    """Choose the blocks to remove; nothing is changed. The JSON is the plan that PruningPlan.from_json reads.

    Under torchrun or accelerate launch, the processes share the work.
    """
    _check_budget(flops, params, count, latency)
    first = meet(pick_device(device))
    source = Source(model, weights, data, data_dir, device, seed)
    network, loader = source.network, source.calibration
    example = torch.zeros(1, *source.train.images.shape[1:])
    pruner = modprune.ModularityPruner(
        network, example, loader, fitted(criterion, loader.samples),
        flops=flops, params=params, blocks=count, latency=latency, width=width,
    )  # fmt: skip
    chosen = pruner.plan()
    if not first:
        return
    longest = max(map(len, chosen.scores))
    for name, score in chosen.scores.items():
        # Significant digits: the scores of some criteria are all below a ten-thousandth.
        print(f"{name:<{longest}} {f'{score:+#.4g}':>10}  {'remove' if name in chosen.remove else ''}".rstrip())
    freed = chosen.freed
    channels = f", channels: {sum(len(c) for _, c in chosen.width)}" if chosen.width else ""
    time = "time, by blocks alone" if chosen.width else "time"
    units = {"flops": "MACs", "params": "parameters", "latency": time}
    share = ", ".join(f"{value:.2%} of the {units[name]}" for name, value in freed.items())
    print(f"Blocks to remove: {len(chosen.remove)}{channels} ({share})")
    if json_ is not None:
        chosen.to_json(json_)


@app.command()
def prune(
    model: Model, weights: Weights, out: Annotated[Path, typer.Option(help="Folder for all results.")],
    data: Data = "cifar10", data_dir: DataDir = Path("data"), flops: Flops = None, params: Params = None,
    count: Count = None, latency: Latency = None, width: Width = None, criterion: Criterion = "modularity",
    epochs: Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning; 0 leaves it out.")] = 40,
    lr: Rate = 0.1,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per training step.")] = 128,
    seed: Seed = 0, device: Device = "auto",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fine-tune by torch.compile: faster, after a minute or less of compiling.")
    ] = False,
    log_with: Annotated[list[str], typer.Option(help="Trackers of accelerate: tensorboard, wandb, ...; repeatable.")]
    = [],  # noqa: B006 (typer reads it, nobody changes it)
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run in --out.")] = False,
) -> None:  # fmt: skip
    """The whole job: measure, plan, remove, fine-tune with the unpruned network as teacher, report.

    Writes run.json, plan.json, curve.json and curve.png (of modularity), metrics.csv, model.safetensors, report.json
    and report.md to --out, in the place of a finished run that is there. Under torchrun or accelerate launch, the
    processes share the work.
    """
    _check_budget(flops, params, count, latency)
    if weights.resolve() in [(out / name).resolve() for name in RESULTS]:
        raise typer.BadParameter(f"--weights {weights} lies in --out, where it would be replaced: give another folder")
    train, test = load_data(data, data_dir, train=True), load_data(data, data_dir, train=False)
    network = load_network(model, weights, device, train.num_classes)
    recipe = Recipe(epochs=epochs, lr=lr) if epochs else None
    report = prune_job(
        network, train, test, out, flops=flops, params=params, blocks=count, latency=latency, width=width,
        criterion=criterion, recipe=recipe, batch_size=batch_size, pad=train.pad, seed=seed, compiled=compiled,
        log_with=log_with, resume=resume,
    )  # fmt: skip
    if place()[0] == 0:
        print(report)
        print(f"Results are in {out}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="A model that modprune saved (.safetensors), or weights for --network.")],
    data: Data = "cifar10", data_dir: DataDir = Path("data"),
    network: Annotated[
        str | None,
        typer.Option(help="The unpruned network, as --model elsewhere; not needed for saved built-in ones.",
                     callback=lambda value: value and check_model(value)),
    ] = None,
    device: Device = "auto", json_: Json = None,
) -> None:  # fmt: skip
    """Top-1, Top-5 and loss of a saved model, or of an unpruned one with its weights, on the test images."""
    if model.suffix == ".json":
        raise typer.BadParameter(f"--model {model}: JSON, as a plan is, holds no weights; give the .safetensors file")
    test = load_data(data, data_dir, train=False)
    if is_plain(model):
        if network is None:
            raise typer.BadParameter(f"--model {model}: plain weights; say with --network of which network they are")
        measured = load_network(network, model, device, test.num_classes)
    else:
        unpruned = load_network(network, None, device, test.num_classes) if network else None
        measured = modprune.load(model, unpruned).to(pick_device(device))
    result = modprune.evaluate(measured, ImageLoader(test, 100, device=pick_device(device)))
    print(f"Top-1 {result.top1:.2f} %  Top-5 {result.top5:.2f} %  loss {result.loss:.4f}  on {result.samples} images")
    _write(json_, asdict(result))


def main() -> None:
    """The `modprune` command: 2 for wrong usage, 1 for every other error, one line each; 130 after Ctrl-C, 143 after
    SIGTERM.
    """
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(prog_name="modprune", standalone_mode=False)
        if code == INTERRUPTED:
            print("modprune: interrupted; prune and study go on with --resume", file=sys.stderr)
        sys.exit(code)
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
        else:
            path = f"{error.ctx.command_path} --help" if error.ctx else "modprune --help"
            print(f"modprune: {' '.join(error.format_message().split()).rstrip('.')}; see {path}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, RuntimeError, OSError, ModuleNotFoundError) as error:
        print(f"modprune: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def _terminated(*_: object) -> None:
    """A scheduler wants its machine back: leave as after Ctrl-C, with no half-written file."""
    print("modprune: terminated; prune and study go on with --resume", file=sys.stderr)
    sys.exit(143)


def _check_budget(flops: float | None, params: float | None, count: int | None, latency: float | None) -> None:
    if flops is params is count is latency is None:
        raise typer.BadParameter("say how much to remove: --flops, --latency, --params or --blocks")
    with _usage():
        Budget(flops, params, count, latency)


def _write(path: Path | None, data: Any) -> None:
    if path is not None:
        to_json(data, path)
