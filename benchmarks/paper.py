"""The experiments of Lu et al. (ECCV 2022), and the page that holds their claims against what they give here.

    python -m benchmarks.paper --data-dir DIR --weights-dir DIR [NAME ...]

Each run is a `modprune study` command, written to benchmarks/paper/NAME with the command and the machine beside it.
Resumable. `python -m benchmarks.paper` alone writes the page anew from what is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._env import environment
from modprune._files import write_text
from modprune.studies.study import rank_correlation
from modprune.studies.training import settled

PAPER = Path(__file__).parent / "paper"
WEIGHTS = {
    n: f"{n}-{key}.th" for n, key in (("resnet20", "12fca82f"), ("resnet32", "d509ac18"), ("resnet56", "4bfd9763"))
}


def network(name: str) -> list[str]:
    """The options that name a public network."""
    return ["--model", name, "--weights", f"WEIGHTS/{WEIGHTS[name]}"]


def trained(name: str) -> list[str]:
    """The options that name a network which one of the runs trains."""
    weights = f"benchmarks/paper/training-{name}/model.safetensors"
    return ["--model", f"benchmarks/paper_networks.py:{name}", "--weights", weights]


RUNS: dict[str, list[str]] = {
    "curves": ["curves", *network("resnet20"), *network("resnet32"), *network("resnet56")],
    "separation": ["separation", *network("resnet20")],
    "ablation": ["ablation", *network("resnet56")],
    "difference": ["difference", *network("resnet56")],
    "plateaus": ["plateaus", *network("resnet56"), "--cuts", "2", "--cuts", "4", "--cuts", "8", "--cuts", "16"],
    "redundancy": ["redundancy", *network("resnet20"), "--cuts", "2", "--epochs", "1"],
    "attacks": ["attacks", *network("resnet20"), "--samples", "200"],
    "training-vgg11": ["training", "--model", "benchmarks/paper_networks.py:vgg11", "--epochs", "10"],
    "training-vgg16": ["training", "--model", "benchmarks/paper_networks.py:vgg16", "--epochs", "10"],
    "training-resnet18": ["training", "--model", "benchmarks/paper_networks.py:resnet18", "--epochs", "10"],
    "curves-vgg": ["curves", *trained("vgg11"), *trained("vgg16")],
    "separation-vgg11": ["separation", *trained("vgg11")],
    "redundancy-vgg11": ["redundancy", *trained("vgg11"), "--cuts", "2", "--epochs", "1"],
}


def grows_with_depth(numbers: Mapping[str, Any]) -> bool:
    """Whether each deeper network has more points on plateaus and degradations, and a larger share of them."""
    flat = [len(row["plateaus"]) + len(row["degradations"]) for row in numbers["networks"]]
    share = [n / (len(row["layers"]) - 1) for n, row in zip(flat, numbers["networks"], strict=True)]
    return bool(np.all(np.diff(flat) > 0) and np.all(np.diff(share) > 0))


def costs_more(numbers: Mapping[str, Any]) -> bool:
    """Whether needed blocks cost more Top-1 than as many redundant ones, in every state."""
    lost = {(row["kind"], row["blocks"], s): row["states"][s]["top1"] for row in numbers["cuts"] for s in row["states"]}
    return all(top1 < lost["redundant", n, s] for (kind, n, s), top1 in lost.items() if kind == "needed")


def leaves_the_rest(numbers: Mapping[str, Any]) -> bool:
    """Whether each cut ranks the points that stay as the whole network does (Spearman, 0.9)."""
    whole = dict(zip(numbers["layers"], np.mean(numbers["q"], 0), strict=True))
    return all(
        rank_correlation([[whole[layer] for layer in row["layers"]], np.mean(row["q"], 0)])[0, 1] >= 0.9
        for row in numbers["cuts"]
    )


def parts_with_q(numbers: Mapping[str, Any]) -> bool:
    """Whether Q and the silhouette of the classes in the picture rise together (correlation of 0.5)."""
    rows = numbers["layers"]
    return bool(np.corrcoef([row["q"] for row in rows], [row["silhouette"] for row in rows])[0, 1] >= 0.5)


def differs_inside(numbers: Mapping[str, Any]) -> bool:
    """Whether Q changes more where the path enters or leaves a block than elsewhere."""
    inside, step = np.array([p == "inside" for p in numbers["place"]]), np.abs(np.diff(numbers["q"]))
    change = inside[1:] != inside[:-1]
    return bool(step[change].mean() > step[~change].mean())


def falls_at_the_end(numbers: Mapping[str, Any]) -> bool:
    """Whether Q of the last point falls under every attack that fools enough images."""
    return all(row["q"][-1] < row["clean"][-1] for row in numbers["attacks"] if "q" in row)


def keeps_its_shape(numbers: Mapping[str, Any]) -> bool:
    """Whether the curves of any two cells rank the layers alike (Spearman, 0.9)."""
    return bool(np.min(numbers["rank_correlation"]) >= 0.9)


def shallow_first(numbers: Mapping[str, Any]) -> bool:
    """Whether the shallow half of the points settles in earlier epochs, in the mean, than the deep half."""
    q = np.array([row["q"] for row in numbers["epochs"]])
    rows = [settled(column) for column in q.T]
    half = len(rows) // 2
    return bool(np.mean(rows[:half]) < np.mean(rows[half:]))


@dataclass(frozen=True)
class Claim:
    """What the paper says, what agreeing means here, and whether numbers do."""

    text: str
    meaning: str
    holds: Callable[[Mapping[str, Any]], bool]


CLAIMS = {
    "curves": Claim(
        "Plateau and degradation grow with depth on the same data.",
        "more such steps, and a larger share of all, in each deeper network",
        grows_with_depth,
    ),
    "separation": Claim(
        "Q rises as the classes part.", "correlation of Q and silhouette of 0.5 at least", parts_with_q
    ),
    "ablation": Claim(
        "The curve keeps its shape whatever k and N.",
        "rank correlation of any two curves of 0.9 at least",
        keeps_its_shape,
    ),
    "plateaus": Claim(
        "Cutting plateaus leaves the rest of the curve as it was.",
        "rank correlation of 0.9 at least with the whole, for every cut",
        leaves_the_rest,
    ),
    "redundancy": Claim(
        "Removing layers that raise Q costs accuracy, removing others does not.",
        "needed blocks cost more Top-1 than as many redundant ones, in every state",
        costs_more,
    ),
    "difference": Claim(
        "Points after the sum of a block differ from those inside.",
        "Q changes more at entering or leaving a block than elsewhere",
        differs_inside,
    ),
    "attacks": Claim(
        "Attacks blur the classes: Q falls in deep layers.",
        "Q of the last point falls under every attack",
        falls_at_the_end,
    ),
    "training": Claim(
        "Shallow layers settle early in training.",
        "Q of the shallow half comes to stay near its last value (a tenth of its range) in earlier epochs",
        shallow_first,
    ),
}


def run(name: str, data_dir: Path, weights_dir: Path) -> None:
    """One study into benchmarks/paper/NAME."""
    out = PAPER / name
    arguments = ["study", *RUNS[name], "--data", "cifar10", "--data-dir", "DATA", "--out", "OUT"]
    real = {"DATA": str(data_dir), "OUT": str(out)}
    command = [real.get(a, a.replace("WEIGHTS/", f"{weights_dir}/")) for a in arguments]
    resume = ["--resume"] if (out / "parts.json").exists() else []
    subprocess.run([sys.executable, "-m", "modprune", *command, *resume], check=True)
    text = "modprune " + " ".join(arguments)
    write_text(out / "run.json", json.dumps({"command": text, "environment": environment()}, indent=2) + "\n")


def page() -> str:
    """Each claim, what agreeing means, what was found; as Markdown."""
    lines = [
        "# The paper's claims, held against what is measured here",
        "",
        "Lu et al., *Understanding the Dynamics of DNNs Using Graph Modularity* (ECCV 2022), study by study, on",
        "CIFAR-10. What counts as agreeing stands in `benchmarks/paper.py`, and was not moved once a study had run.",
        "What was moved is the recovery in `redundancy`, whose first run warmed up for the whole of its one epoch.",
        "VGG11, VGG16 and ResNet18 are trained here, in ten epochs at a quarter of the paper's width.",
        "`python -m benchmarks.paper --data-dir DIR --weights-dir DIR` runs them all; each folder holds the numbers",
        "(`study.json`), the pictures, and the command and machine (`run.json`).",
        "",
        "| claim | agrees if | here |",
        "|---|---|---|",
    ]
    done = [name for name in RUNS if (PAPER / name / "run.json").exists()]
    found = {name: json.loads((PAPER / name / "study.json").read_text()) for name in done}
    for name, numbers in found.items():
        claim = CLAIMS[name.split("-")[0]]
        verdict = "agrees" if claim.holds(numbers) else "**does not agree**"
        lines.append(f"| [{claim.text}](#{name}){_of(name)} | {claim.meaning} | {verdict} |")
    for name in found:
        text = (PAPER / name / "study.md").read_text().split("\n\n")[1]
        command = json.loads((PAPER / name / "run.json").read_text())["command"]
        lines += ["", f"## {name.capitalize()}", "", f"    {command}", "", text, "", f"![{name}]({name}/study.png)"]
    return "\n".join(lines) + "\n"


def _of(name: str) -> str:
    """The network, where there is one run of several."""
    return f" {name.split('-')[1]}" if "-" in name else ""


def main(names: Sequence[str], data_dir: Path | None, weights_dir: Path | None) -> None:
    """Run what is asked for and write the page."""
    if data_dir and weights_dir:
        for name in names or RUNS:
            run(name, data_dir, weights_dir)
    write_text(PAPER / "README.md", page())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(RUNS)}; all if none are named")
    parser.add_argument("--data-dir", type=Path, help="folder that holds cifar-10-batches-py")
    parser.add_argument("--weights-dir", type=Path, help="folder of the public checkpoints")
    main(**vars(parser.parse_args()))
