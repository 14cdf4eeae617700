"""`modprune study NAME`: one command for each study; parse, one public call, write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modprune._options import (
    Data,
    DataDir,
    Device,
    K,
    Model,
    Repeats,
    Samples,
    Seed,
    Weights,
    check_model,
    load_data,
    load_network,
    pick_device,
)

if TYPE_CHECKING:
    from modprune.data import ImageLoader
    from modprune.studies import Parts, Study

ATTACK_NAMES = ("fgsm", "pgd", "cw", "jsma", "one_pixel", "local_search")

app = typer.Typer(
    no_args_is_help=True,
    help="Read a network with modularity: the experiments of Lu et al. (ECCV 2022), each written to --out as "
    "study.json, study.png, study.svg and study.md.",
)

Out = Annotated[Path, typer.Option(help="Folder for study.json, study.png, study.svg and study.md.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted study in --out.")]
Cuts = Annotated[int, typer.Option(min=1, help="Blocks of the largest cut.")]
Epochs = Annotated[int, typer.Option(min=0, help="Of fine-tuning each cut; 0 leaves it out.")]
Rate = Annotated[float, typer.Option(min=0.0, help="Peak learning rate.")]


def _each(values: list[str]) -> list[str]:
    return [check_model(value) for value in values]


@app.command()
def curves(
    model: Annotated[list[str], typer.Option(help="Network, as elsewhere; give one or more.", callback=_each)],
    weights: Annotated[list[Path], typer.Option(help="Trained weights, one file for each --model, in order.")],
    out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"), k: K = 3, samples: Samples = 500,
    repeats: Repeats = 5, seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """The curves of several networks side by side: where Q rises, where it is flat, where it falls."""
    from modprune import studies

    if len(model) != len(weights):
        raise typer.BadParameter(f"{len(model)} --model and {len(weights)} --weights: give one file for each network")

    def study(parts: Parts) -> Study:
        networks = {
            f"{name} ({file.stem})" if model.count(name) > 1 else name: (
                load_network(name, file, device),
                _calibration(data, data_dir, seed, device),
            )
            for name, file in zip(model, weights, strict=True)
        }
        return studies.curves(networks, k=k, samples=samples, repeats=repeats, parts=parts)

    _run(out, resume, [model, list(map(str, weights)), data, k, samples, repeats, seed], study)


@app.command()
def separation(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"), k: K = 3,
    samples: Samples = 500, seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """t-SNE of every layer, coloured by class, beside its Q."""
    from modprune import studies

    def study(parts: Parts) -> Study:
        network, loader = load_network(model, weights, device), _calibration(data, data_dir, seed, device)
        return studies.separation(network, loader, k=k, samples=samples, seed=seed, parts=parts)

    _run(out, resume, [model, str(weights), data, k, samples, seed], study)


@app.command()
def training(
    model: Model, out: Out,
    weights: Annotated[Path | None, typer.Option(help="Weights to start from; fresh ones if none.")] = None,
    data: Data = "cifar10", data_dir: DataDir = Path("data"),
    epochs: Annotated[int, typer.Option(min=1, help="Of training.")] = 30, lr: Rate = 0.1, k: K = 3,
    samples: Samples = 500, seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Train a network and follow Q of every layer over the epochs, beside its Top-1 on the test images."""
    import torch

    from modprune import save, studies

    def study(parts: Parts) -> Study:
        torch.manual_seed(seed)
        network = load_network(model, weights, device)
        done = studies.training(
            network, _calibration(data, data_dir, seed, device), _training(data, data_dir, seed, device),
            _test(data, data_dir, device), epochs=epochs, lr=lr, k=k, samples=samples,
            checkpoints=out / "checkpoints", parts=parts,
        )  # fmt: skip
        save(network, out / "model.safetensors")
        return done

    _run(out, resume, [model, str(weights), data, epochs, lr, k, samples, seed], study)


@app.command()
def attacks(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"),
    attack: Annotated[list[str], typer.Option(help=f"Some of {', '.join(ATTACK_NAMES)}; all if not given.")]
    = list(ATTACK_NAMES),  # noqa: B006 (typer reads it, nobody changes it)
    k: K = 3, samples: Samples = 500, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Q of test images under six attacks against the same images clean."""
    from modprune import studies

    def study(parts: Parts) -> Study:
        network, loader = load_network(model, weights, device), _test(data, data_dir, device)
        normal = {"mean": loader.data.mean, "std": loader.data.std}
        return studies.attacks(network, loader, **normal, names=attack, k=k, samples=samples, parts=parts)

    _run(out, resume, [model, str(weights), data, attack, k, samples], study)


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
    from modprune import studies

    def study(parts: Parts) -> Study:
        network, loader = load_network(model, weights, device), _calibration(data, data_dir, seed, device)
        return studies.ablation(network, loader, ks=k, sizes=samples, repeats=repeats, parts=parts)

    _run(out, resume, [model, str(weights), data, k, samples, repeats, seed], study)


@app.command()
def plateaus(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"),
    cuts: Annotated[list[int], typer.Option(min=1, help="Blocks that a cut lacks; give one or more.")] = [1, 2, 4],  # noqa: B006
    epochs: Epochs = 0, lr: Rate = 0.05, k: K = 3, samples: Samples = 500, repeats: Repeats = 5, seed: Seed = 0,
    device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Curves of ever shorter cuts of a network laid over each other."""
    from modprune import studies

    def study(parts: Parts) -> Study:
        return studies.plateaus(
            load_network(model, weights, device), _calibration(data, data_dir, seed, device),
            _training(data, data_dir, seed, device), cuts=cuts, epochs=epochs, lr=lr, k=k, samples=samples,
            repeats=repeats, parts=parts,
        )  # fmt: skip

    _run(out, resume, [model, str(weights), data, cuts, epochs, lr, k, samples, repeats, seed], study)


@app.command()
def redundancy(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"),
    cuts: Cuts = 3, epochs: Epochs = 0, lr: Rate = 0.05, k: K = 3, samples: Samples = 500, repeats: Repeats = 5,
    seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Cuts of redundant and of needed blocks: the change of Q beside the change of Top-1 on the test images."""
    from modprune import studies

    def study(parts: Parts) -> Study:
        return studies.redundancy(
            load_network(model, weights, device), _calibration(data, data_dir, seed, device),
            _training(data, data_dir, seed, device), _test(data, data_dir, device), cuts=cuts, epochs=epochs, lr=lr,
            k=k, samples=samples, repeats=repeats, parts=parts,
        )  # fmt: skip

    _run(out, resume, [model, str(weights), data, cuts, epochs, lr, k, samples, repeats, seed], study)


@app.command()
def difference(
    model: Model, weights: Weights, out: Out, data: Data = "cifar10", data_dir: DataDir = Path("data"), k: K = 3,
    samples: Samples = 500, repeats: Annotated[int, typer.Option(min=1, help="How many times to measure.")] = 1,
    seed: Seed = 0, device: Device = "auto", resume: Resume = False,
) -> None:  # fmt: skip
    """Heatmap of abs(Q_i - Q_j) between all layers, inside blocks and after them, with CKA beside it."""
    from modprune import studies

    def study(parts: Parts) -> Study:
        network, loader = load_network(model, weights, device), _calibration(data, data_dir, seed, device)
        return studies.difference(network, loader, k=k, samples=samples, repeats=repeats, parts=parts)

    _run(out, resume, [model, str(weights), data, k, samples, repeats, seed], study)


def _run(out: Path, resume: bool, arguments: list[Any], study: Callable[[Parts], Study]) -> None:
    from modprune.studies import Parts

    parts = Parts(out / "parts.json", arguments, resume)
    done = study(parts)
    done.write(out)
    parts.done()
    shutil.rmtree(out / "checkpoints", ignore_errors=True)  # of a training
    print(done.text)
    print(f"Written to {out}")


def _calibration(data: str, folder: Path, seed: int, device: str) -> ImageLoader:
    from modprune.data import ImageLoader

    return ImageLoader(load_data(data, folder, train=True), 100, shuffle=True, seed=seed, device=pick_device(device))


def _training(data: str, folder: Path, seed: int, device: str) -> ImageLoader:
    from modprune.data import ImageLoader

    size, pad = (64, 1) if data == "digits" else (128, 4)
    images = load_data(data, folder, train=True)
    return ImageLoader(images, size, pad=pad, shuffle=True, seed=seed, device=pick_device(device))


def _test(data: str, folder: Path, device: str) -> ImageLoader:
    from modprune.data import ImageLoader

    return ImageLoader(load_data(data, folder, train=False), 100, device=pick_device(device))
