"""`modprune study NAME`: one command for each study; parse, one public call, write."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from modprune import save, studies
from modprune._files import alone
from modprune._options import (
    Data,
    DataDir,
    Device,
    K,
    Model,
    Rate,
    Repeats,
    Samples,
    Seed,
    Weights,
    check_data,
    check_model,
)
from modprune._processes import started
from modprune._sources import Source
from modprune.checkpoints import check_writable
from modprune.studies import Parts, Study
from modprune.studies.adversarial import ATTACKS

app = typer.Typer(
    no_args_is_help=True,
    help="Analyse a network with modularity: the experiments of Lu et al. (ECCV 2022), each written to --out as "
    "study.json, study.png, study.svg and study.md.",
)

Out = Annotated[Path, typer.Option(help="Folder for study.json, study.png, study.svg and study.md.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an interrupted study in --out.")]
Cuts = Annotated[int, typer.Option(min=1, help="How many blocks the largest cut removes; smaller ones remove fewer.")]
Epochs = Annotated[int, typer.Option(min=0, help="Epochs of fine-tuning each cut; 0 leaves it out.")]


def _each_model(values: list[str]) -> list[str]:
    return [check_model(value) for value in values]


def _each_attack(values: list[str]) -> list[str]:
    if unknown := [value for value in values if value not in ATTACKS]:
        raise typer.BadParameter(f"{unknown[0]!r} is unknown: give some of {', '.join(ATTACKS)}")
    return values


def _each_data(values: list[str]) -> list[str]:
    return [check_data(value) for value in values]


@app.command()
def curves(
    model: Annotated[list[str], typer.Option(help="Network, as elsewhere; give one or more.", callback=_each_model)],
    weights: Annotated[list[Path], typer.Option(help="Trained weights, one file for each --model, in order.")],
    out: Out,
    data: Annotated[
        list[str],
        typer.Option(help="Data set, as elsewhere: one, or one for each --model, in order.", callback=_each_data),
    ] = ["cifar10"],  # noqa: B006 (typer reads it, nobody changes it)
    data_dir: DataDir = Path("data"), k: K = 3, samples: Samples = 500, repeats: Repeats = 5, seed: Seed = 0,
    device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """The curves of several networks side by side: where Q rises, where it is flat, where it falls."""
    if len(model) != len(weights):
        raise typer.BadParameter(f"{len(model)} --model and {len(weights)} --weights: give one file for each network")
    if len(data) not in (1, len(model)):
        raise typer.BadParameter(f"{len(model)} --model and {len(data)} --data: give one for all, or one for each")

    def study(parts: Parts) -> Study:
        sets = data * len(model) if len(data) == 1 else data
        sources = [Source(*given, data_dir, device, seed) for given in zip(model, weights, sets, strict=True)]
        networks = {title: (s.network, s.calibration) for title, s in zip(_titles(sources), sources, strict=True)}
        return studies.curves(networks, k=k, samples=samples, repeats=repeats, parts=parts)

    _run(out, resume, [model, weights, data, k, samples, repeats, seed], study)


@app.command()
def separation(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"), k: K = 3,
    samples: Samples = 500, seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """t-SNE of every layer, coloured by class, beside its Q."""

    def study(parts: Parts) -> Study:
        source = Source(model, weights, data, data_dir, device, seed)
        return studies.separation(source.network, source.calibration, k=k, samples=samples, seed=seed, parts=parts)

    _run(out, resume, [model, weights, data, k, samples, seed], study)


@app.command()
def training(
    model: Model, out: Out,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from; fresh ones if none.")] = None,
    data: Data = "cifar10", data_dir: DataDir = Path("data"),
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of training.")] = 30, lr: Rate = 0.1, k: K = 3,
    samples: Samples = 500, seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Train a network and follow Q of every layer over the epochs, beside its Top-1 on the test images."""

    def study(parts: Parts) -> Study:
        source = Source(model, weights, data, data_dir, device, seed)
        torch.manual_seed(seed)
        network = source.network
        done = studies.training(
            network, source.calibration, source.training, source.test, epochs=epochs, lr=lr, k=k, samples=samples,
            checkpoints=out / "checkpoints", parts=parts,
        )  # fmt: skip
        save(network, out / "model.safetensors")
        return done

    _run(out, resume, [model, weights, data, epochs, lr, k, samples, seed], study)


@app.command()
def attacks(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"),
    attack: Annotated[
        list[str], typer.Option(help=f"Some of {', '.join(ATTACKS)}; all if not given.", callback=_each_attack)
    ] = list(ATTACKS),  # noqa: B006
    k: K = 3, samples: Samples = 500, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Q of test images under six attacks against the same images clean."""

    def study(parts: Parts) -> Study:
        source = Source(model, weights, data, data_dir, device)
        test = source.test
        normal = {"mean": test.data.mean, "std": test.data.std}
        return studies.attacks(source.network, test, **normal, names=attack, k=k, samples=samples, parts=parts)

    _run(out, resume, [model, weights, data, attack, k, samples], study)


@app.command()
def ablation(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"),
    k: Annotated[list[int], typer.Option(min=1, help="Neighbours; give one or more.")] = [3, 5, 7, 9, 11],  # noqa: B006
    samples: Annotated[list[int], typer.Option(min=2, help="Images, N; give one or more.")]
    = [200, 500, 1000, 2000, 5000],  # noqa: B006
    repeats: Annotated[int, typer.Option(min=1, help="Draws of the largest N.")] = 1, seed: Seed = 0,
    device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """The curve for many k and N, and how alike these curves rank the layers."""

    def study(parts: Parts) -> Study:
        source = Source(model, weights, data, data_dir, device, seed)
        return studies.ablation(source.network, source.calibration, ks=k, sizes=samples, repeats=repeats, parts=parts)

    _run(out, resume, [model, weights, data, k, samples, repeats, seed], study)


@app.command()
def plateaus(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"),
    cuts: Annotated[list[int], typer.Option(min=1, help="Blocks that a cut removes; one or more cuts.")] = [1, 2, 4],  # noqa: B006
    epochs: Epochs = 0, lr: Rate = 0.05, k: K = 3, samples: Samples = 500, repeats: Repeats = 5, seed: Seed = 0,
    device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Curves of ever shorter cuts of a network laid over each other."""

    def study(parts: Parts) -> Study:
        source = Source(model, weights, data, data_dir, device, seed)
        return studies.plateaus(
            source.network, source.calibration, source.training, cuts=cuts, epochs=epochs, lr=lr, k=k,
            samples=samples, repeats=repeats, parts=parts,
        )  # fmt: skip

    _run(out, resume, [model, weights, data, cuts, epochs, lr, k, samples, repeats, seed], study)


@app.command()
def redundancy(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"),
    cuts: Cuts = 3, epochs: Epochs = 0, lr: Rate = 0.05, k: K = 3, samples: Samples = 500, repeats: Repeats = 5,
    seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Cuts of redundant and of needed blocks: the change of Q beside the change of Top-1 on the test images."""

    def study(parts: Parts) -> Study:
        source = Source(model, weights, data, data_dir, device, seed)
        return studies.redundancy(
            source.network, source.calibration, source.training, source.test, cuts=cuts, epochs=epochs, lr=lr, k=k,
            samples=samples, repeats=repeats, parts=parts,
        )  # fmt: skip

    _run(out, resume, [model, weights, data, cuts, epochs, lr, k, samples, repeats, seed], study)


@app.command()
def difference(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"), k: K = 3,
    samples: Samples = 500, repeats: Annotated[int, typer.Option(min=1, help="How many times to measure.")] = 1,
    seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Heatmap of abs(Q_i - Q_j) between all layers, inside blocks and after them, with CKA beside it."""

    def study(parts: Parts) -> Study:
        source = Source(model, weights, data, data_dir, device, seed)
        return studies.difference(
            source.network, source.calibration, k=k, samples=samples, repeats=repeats, parts=parts
        )

    _run(out, resume, [model, weights, data, k, samples, repeats, seed], study)


def _titles(sources: list[Source]) -> list[str]:
    """The network, without where it comes from; where that does not tell all apart, with data or weights where these
    differ, else by number.
    """
    titles = [Path(source.model.rpartition(":")[2]).name for source in sources]
    for more in ("data", "weights"):
        names = [Path(str(getattr(source, more))).name for source in sources]
        if len(set(titles)) < len(titles) and len(set(names)) > 1:
            titles = [f"{title}, {name}" for title, name in zip(titles, names, strict=True)]
    if len(set(titles)) < len(titles):
        titles = [f"{number}: {title}" for number, title in enumerate(titles, 1)]
    return titles


def _run(out: Path, resume: bool, arguments: list[Any], study: Callable[[Parts], Study]) -> None:
    if started() > 1:
        raise ValueError(f"{started()} processes were started, and a study runs in one: start it without a launcher")
    check_writable(out)
    with alone(out):
        parts = Parts(out / "parts.json", [_known(argument) for argument in arguments], resume)
        done = study(parts)
        done.write(out)
        parts.done()
        shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of a training
    print(done.text)
    print(f"Written to {out}")


def _known(argument: Any) -> Any:
    """An argument as parts of a study are known by: a file of weights by what is in it."""
    if isinstance(argument, list):
        return [_known(item) for item in argument]
    if not isinstance(argument, Path):
        return argument
    return hashlib.sha256(argument.read_bytes()).hexdigest()[:16] if argument.is_file() else str(argument)
