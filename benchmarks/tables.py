"""Write the tables of README.md, benchmarks/README.md and docs/ from the JSON files in benchmarks/results.

python -m benchmarks.tables
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks._env import RESULTS
from benchmarks.curve_memory import FEATURES
from benchmarks.published import LAYERS, LU
from benchmarks.resnet56_cifar10 import epochs_on_another_schedule
from benchmarks.wide_teacher import NAME as WIDE
from modprune._files import write_text
from modprune.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", ROOT / "docs" / "scale.md")
ZOO_PAGE = ROOT / "docs" / "zoo.md"
ZOO_HEAD = """# Networks

What `modprune.find_blocks` finds in networks with random weights, and what works once every one of these blocks is
removed: the forward pass with the same output shapes, saving and loading bit for bit, half of the blocks removed and
0.3 of the channels inside the others cut, `ModularityPruner` on a loader, gradients, torch-pruning's dependency graph,
`torch.compile`, `torch.export`, ONNX in onnxruntime (outputs equal to 1e-4 of the largest). The numbers of blocks were
counted by hand from the papers beforehand. Last, the time of `find_blocks` in ms, the least of some rounds, and as a
share of three forward passes and one build of the dependency graph. *neither*: the unpruned network cannot do it
either; *no*: see below the table. By `python -m benchmarks.zoo`; rows come from several commits, and the times of those
that had been near 1 or above it were measured anew."""
TRAINING_IMAGES = 50_000
MACHINES = (RESULTS, RESULTS / "xeon")  # where the clock was read: one without AMX, one with
OURS = {
    "resnet56-cifar10-restored": "blocks and a little width",
    "resnet56-cifar10": "blocks",
    "resnet56-cifar10-from-restored": "blocks and a little width",
    "resnet56-cifar10-quarter-again": "blocks and width",
}
TRIED = ("resnet56-cifar10-narrow", "resnet56-cifar10-strict", "resnet56-cifar10-quarter-longer")
PRUNED = ("unpruned", "depth", "width", "eights")
SHOWN_LEFT = 0.60  # the budget at which the blocks left are shown
LONGER = 10  # epochs of the longer fine-tuning of some cuts
STEPS = ("forward", "round_trip", "width", "pruner", "gradients", "depgraph", "compile", "export", "onnx")


def load(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """The JSON of a result."""
    data: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return data


def headline() -> str:
    """Ours beside the published rows."""
    runs = {name: load(name) for name in OURS}
    whole = next(iter(runs.values()))
    base = whole["report"]["original"]["accuracy"]["top1"]
    lines = ["| method | Top-1 % | parameters removed % | FLOPs removed % |", "|---|---:|---:|---:|"]
    lines.append(f"| ResNet56, base of Lu et al. | {LU.base:.2f} | 0 | 0 |")
    for point in LAYERS:
        params = "not given" if point.params is None else f"{point.params:.2f}"
        lines.append(f"| {point.method} | {point.top1:.2f} | {params} | {point.macs:.2f} |")
    lines.append(f"| ResNet56, base of modprune | {base:.2f} | 0 | 0 |")
    for name, run in runs.items():
        removed = run["report"]["params_removed"], run["report"]["flops_removed"]["fvcore"]
        cells = [f"**{value:.2f}**" for value in (_top1(run), 100 * removed[0], 100 * removed[1])]
        lines.append(_row([f"**modprune, {len(run['removed'])} {OURS[name]}**", *cells]))
    gains = [f"{_top1(run) - base:+.2f}" for run in runs.values()]
    epochs = [sum(r["trained_epochs"] * (1 + r.get("mixed", 0)) for r in _chain(run)) for run in runs.values()]
    note = (
        f"Of {len(whole['scores'])} blocks; one seed, last epoch; "
        f"FLOPs as fvcore counts. Against its own base: ours {', '.join(gains)}; {LU.method} {LU.top1 - LU.base:+.2f}. "
        f"Ours were fine-tuned for {', '.join(map(str, epochs))} epochs of {TRAINING_IMAGES:,} images in all, "
        "in several runs, with several teachers (some of them other networks) and, where they gained most, images that "
        "CutMix made. The unpruned network had no such training, so a gain is the recipe's as much as the pruning's. "
        f"Our networks, in `benchmarks/results`: {', '.join(f'`{name}.safetensors`' for name in OURS)}."
    )
    return "\n".join([*lines, "", note])


def levers() -> str:
    """What each run added to the one that it goes on from, and what it gave."""
    lines = [_row(["run", "goes on from", "new in it", "epochs", "peak rate", "FLOPs removed %", "Top-1 %"])]
    lines.append(_row(["---", "---", "---", *["---:"] * 4]))
    runs = {run["command"]: run for name in (*OURS, *TRIED) for run in _chain(load(name))}
    for number, run in enumerate(runs.values(), 1):
        before = run.get("before")
        origin = str([*runs].index(before["command"]) + 1) if before else "the public network"
        top1 = f"{_top1(run):.2f}" + (f" ({_top1(run) - _top1(before):+.2f})" if before else "")
        removed = f"{100 * run['report']['flops_removed']['fvcore']:.2f}"
        lines.append(_row([str(number), origin, _new(run), _epochs(run), str(run["recipe"]["lr"]), removed, top1]))
    wide = load(WIDE)
    note = (
        f"The wide one: {wide['parameters'] / 1e6:.1f} M parameters, {wide['recipe']['epochs']} epochs from random "
        f"weights, {wide['top1']:.2f} %; by `python -m benchmarks.wide_teacher`."
    )
    return "\n".join([*lines, "", note])


def _chain(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs before it, and itself."""
    return [*(_chain(run["before"]) if "before" in run else []), run]


def _new(run: dict[str, Any]) -> str:
    before = run.get("before")
    new = [] if before else [f"{len(run['removed'])} blocks removed by modularity, jointly"]
    new += [f"{' and '.join(run['restored'])} restored"] if run.get("restored") else []
    new += [f"{' and '.join(run['removed_again'])} removed again"] if run.get("removed_again") else []
    where = f"of {run['within']} " if run.get("within") else ""
    new += [f"{run['width']:.0%} of the inner channels {where}cut"] if run.get("width") else []
    if not before or before["recipe"]["teacher"] != run["recipe"]["teacher"]:
        new.append(f"taught by {_teacher(run)}")
    new += [f"{run['mixed']} images made by CutMix for each, without labels"] if run.get("mixed") else []
    return "; ".join(new) or "more epochs"


def _teacher(run: dict[str, Any]) -> str:
    names = run["recipe"]["teacher"]
    public, ours, wide = (names.count(f"{end}'") for end in (".th", ".safetensors", f"{WIDE}.safetensors"))
    several = f"the mean of {public} public networks" + (", the wide one" if wide else "")
    several += f" and {ours - wide} of these" if ours > wide else ""
    return several if public else "the unpruned network"


def _epochs(run: dict[str, Any]) -> str:
    """How long a run was, and whether all of it was on one schedule."""
    recipe = Recipe(**{field.name: run["recipe"][field.name] for field in fields(Recipe)})
    times = 1 + run.get("mixed", 0)
    steps = times * TRAINING_IMAGES // run["recipe"]["batch_size"]
    other = epochs_on_another_schedule(run["history"], recipe, steps)
    of = f" of {times} x {TRAINING_IMAGES:,} images" if times > 1 else ""
    return f"{run['trained_epochs']}{of}" + (f" (the first {other} on schedules of other lengths)" if other else "")


def _top1(run: dict[str, Any]) -> float:
    return float(run["report"]["pruned"]["accuracy"]["top1"])


def speed() -> str:
    """What the hot paths cost, on each machine."""
    costs = [_costs(folder) for folder in MACHINES]
    lines = [_row(["", *(_machine(load("modularity-speed", folder)) for folder in MACHINES)])]
    lines.append(_row(["---"] * (1 + len(costs))))
    lines += [_row([what, *(cost.get(what, "not measured") for cost in costs)]) for what in costs[0]]
    return "\n".join([*lines, "", "; ".join(map(_commits, MACHINES)) + "."])


def _costs(folder: Path) -> dict[str, str]:
    """What was measured, and the result."""
    q, curve, tune = (load(name, folder) for name in ("modularity-speed", "curve-speed", "finetune-speed"))
    floor, large = q["floor"], q["large"]
    found = {
        f"Q of {r['samples']} x {r['columns']} against a Python loop and networkx": f"{r['ratio']:.0f}x faster"
        for r in q["reference"]
    }
    what = f"Q of {floor['samples']} x {floor['columns']} against the product `F @ F.T` alone"
    found[f"{what} (ours: half of it, by oneDNN)"] = f"{floor['ratio']:.2f}x its time"
    found[f"Q of {large['samples']} x {large['columns']}"] = (
        f"{large['seconds']:.1f} s, {large['peak_mib']:.0f} MiB beside the features"
    )
    found["ResNet56's curve (images channels last) against a forward pass of its images as they come"] = (
        f"{curve['curve_over_forward']:.2f}x its time"
    )
    if (folder / "curve-memory.json").exists():
        memory = load("curve-memory", folder)
        features = f"{memory['samples']} images: {memory['features_mib']:.0f} MiB of features"
        found[f"resnet50's curve at 224 x 224, {features}"] = (
            f"peak {memory['peak_mib']:.0f} MiB with a budget of {memory['budget_mib']:.0f} MiB (a forward pass alone: "
            f"{memory['peak_of_a_forward_pass_mib']:.0f}), in {memory['seconds'] / 60:.0f} minutes"
        )
    ways = {"float32": "in float32", "bfloat16": "in bfloat16", "compiled": "compiled as well"}
    for row in tune["networks"]:
        found[f"Fine-tuning {row['network']} against Dataset and DataLoader in float32: images per second"] = ", ".join(
            f"{ratio:.2f}x {ways[way]}" for way, ratio in row["ratios"].items()
        )
    return found


def _commits(folder: Path) -> str:
    """What was measured where: the commits and the version of torch."""
    names = {
        "modularity-speed": "Q", "curve-speed": "ResNet56's curve", "finetune-speed": "fine-tuning",
        "curve-memory": "resnet50's curve",
    }  # fmt: skip
    places: dict[str, list[str]] = {}
    for name, what in names.items():
        if (folder / f"{name}.json").exists():
            run = load(name, folder)
            on = f"{_machine(run)}, torch {run['environment']['versions']['torch']}"
            places.setdefault(on, []).append(f"{what} at {run['environment']['commit']}")
    return "; ".join(f"{on}: {', '.join(which)}" for on, which in places.items())


def clock() -> str:
    """How many times as fast as the unpruned network depth and width make ResNet56, at equal MACs."""
    head = ["machine", "batch", "ideal, by MACs", "blocks removed", "channels removed", "channels, by eights"]
    lines = [_row(head), _row(["---", *["---:"] * 5])]
    for run in (load("latency", folder) for folder in MACHINES):
        row = run["networks"]["resnet56"]["eager"]
        lines += [_row([_machine(run), batch, *_speed_ups(row, cell)]) for batch, cell in row["batches"].items()]
    return "\n".join(lines)


def clocks() -> str:
    """The same of every network, eager and compiled, with throughput and memory, a table for each machine."""
    return "\n\n".join(_clocks(load("latency", folder)) for folder in MACHINES)


def _clocks(run: dict[str, Any]) -> str:
    head = ["network", "batch", "ideal", "blocks", "channels", "by eights", "images/s", "peak memory, MiB"]
    lines = [_row(head), _row(["---", *["---:"] * 7])]
    for name, modes in run["networks"].items():
        for mode, row in modes.items():
            for batch, cell in row["batches"].items():
                throughput = " / ".join(f"{int(batch) / cell['seconds'][key]:,.0f}" for key in PRUNED)
                memory = " / ".join(f"{cell['peak_mib'][key]:,.0f}" for key in PRUNED)
                lines.append(_row([f"{name}, {mode}", batch, *_speed_ups(row, cell), throughput, memory]))
    left = [f"{name} {_all_left(row)}" for name, row in _eager(run)]
    note = (
        "Images/s and memory: unpruned / blocks / channels / channels by eights. MACs left by the three: "
        f"{', '.join(left)}. Medians of passes in turns; {_machine(run)}."
    )
    return "\n".join([*lines, "", note])


def _eager(run: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, modes["eager"]) for name, modes in run["networks"].items()]


def _all_left(row: dict[str, Any]) -> str:
    return " / ".join(f"{_macs_left(row, key):.1%}" for key in PRUNED[1:])


def _macs_left(row: dict[str, Any], key: str) -> float:
    return float(row["macs"][key] / row["macs"]["unpruned"])


def _speed_ups(row: dict[str, Any], cell: dict[str, Any]) -> list[str]:
    """The most that the MACs allow, what depth gives, what width gives in two ways."""
    depth, *width = (f"{cell['speed_up'][key]:.2f}x" for key in PRUNED[1:])
    return [f"{1 / _macs_left(row, 'depth'):.2f}x", f"**{depth}**", *width]


def _machine(run: dict[str, Any]) -> str:
    cpu = re.sub(r"\(R\)| Processor| @ \S+", "", run["environment"]["cpu"])
    return f"{cpu}, {run['environment']['threads']} threads"


def criteria() -> str:
    """For every criterion and budget, what ResNet56 keeps of its Top-1."""
    rows = load("criteria-resnet56")["rows"]
    budgets = sorted({row["asked"] for row in rows})
    by_budget = {f"{budget:.0%} of the MACs": [row for row in rows if row["asked"] == budget] for budget in budgets}
    several = [row for row in rows if len(_finetuned(row)) > 1]
    return _rivals(by_budget, [f"{SHOWN_LEFT:.0%} of the MACs"]) + (f"\n\n{_spread(several)}" if several else "")


def criteria_of_others() -> str:
    """For every criterion, what smaller networks keep under one budget."""
    networks = {f"ResNet{depth}": load(f"criteria-resnet{depth}")["rows"] for depth in (20, 32)}
    return _rivals(networks, list(networks))


def criteria_for_longer() -> str:
    """What a short fine-tuning and a longer one make of some cuts, as they come out of the latter."""
    rows = [row for row in load("criteria-resnet56")["rows"] if _finetuned(row, LONGER)]
    lines = [_row(["criterion", "removed", "1 epoch", f"{LONGER} epochs"]), _row(["---", "---:", "---:", "---:"])]
    for row in sorted(rows, key=lambda row: -statistics.mean(_finetuned(row, LONGER))):
        top1 = (_mean_and_range(_finetuned(row, epochs)) for epochs in (1, LONGER))
        lines.append(_row([f"`{row['criterion']}`", f"{row['asked']:.0%}", *top1]))
    return "\n".join(lines)


def _mean_and_range(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"


def _rivals(columns: dict[str, list[dict[str, Any]]], shown: list[str]) -> str:
    """A line for every criterion, best first: its cell in each column, its mean place, the blocks left in `shown`."""
    head = [_row(["criterion", *columns, "mean place", *(f"blocks left, {column}" for column in shown)])]
    head.append(_row(["---", *["---:"] * len(columns), "---:", *["---"] * len(shown)]))
    lines: list[tuple[float, str]] = []
    cells = {column: {row["criterion"]: row for row in rows} for column, rows in columns.items()}
    for name in next(iter(cells.values())):
        place = statistics.mean(_place(cells[column][name], rows) for column, rows in columns.items())
        recovered = [_recovery(cells[column][name]) for column in columns]
        left = [_left_by_stage(cells[column][name]) for column in shown]
        lines.append((place, _row([f"`{name}`", *recovered, f"{place:.1f}", *left])))
    return "\n".join([*head, *(line for _, line in sorted(lines))])


def _spread(rows: list[dict[str, Any]]) -> str:
    """How far the fine-tunings of one cut lie apart."""
    budgets: dict[int, list[str]] = {}
    for budget, seeds in sorted({(row["asked"], len(_finetuned(row))) for row in rows}):
        budgets.setdefault(seeds, []).append(f"{budget:.0%}")
    means = " and ".join(f"of {seeds} seeds at {', '.join(asked)}" for seeds, asked in budgets.items())
    ranges = [max(values) - min(values) for values in map(_finetuned, rows)]
    return (
        f"The third figure is the mean {means}: those of one cut lie {statistics.mean(ranges):.1f} points apart on "
        f"average, {max(ranges):.1f} at the most."
    )


def _place(row: dict[str, Any], rivals: list[dict[str, Any]]) -> float:
    """Among the fine-tuned, 1 for the best; equal ones share theirs."""
    own, *others = (statistics.mean(_finetuned(r)) for r in [row, *(r for r in rivals if r is not row)])
    return 1 + sum(other > own for other in others) + 0.5 * sum(other == own for other in others)


def _finetuned(row: dict[str, Any], epochs: int = 1) -> list[float]:
    """Top-1 after so many epochs, one for each seed."""
    return [top1 for run, top1 in row["finetuned"].items() if run.startswith(f"{epochs} epochs")]


def _left_by_stage(row: dict[str, Any]) -> str:
    """How many of the blocks of each stage stay, as `2 3 6`."""
    stages = sorted({name.split(".")[0] for name in row["scores"]})
    left = [name.split(".")[0] for name in row["scores"] if name not in row["removed"]]
    return " ".join(str(left.count(stage)) for stage in stages)


def _recovery(row: dict[str, Any]) -> str:
    stages = [row["top1_at_once"], row["top1_with_new_batch_norm"], statistics.mean(_finetuned(row))]
    return " → ".join(f"{top1:.1f}" for top1 in stages)


def scale() -> str:
    """The curve and training in one process and in two."""
    run = load("scale")
    one = run["rows"][0]
    lines = [_row(["processes", "curve", "training", "features sent", "products added up"]), _row(["---:"] * 5)]
    for row in run["rows"]:
        faster = one["curve_seconds"] / row["curve_seconds"], row["images_per_second"] / one["images_per_second"]
        cells = f"{row['curve_seconds']:.1f} s ({faster[0]:.2f}x)", f"{row['images_per_second']:.0f} images/s"
        mib = [f"{row[name]:.0f} MiB" for name in ("features_mib", "sums_mib")]
        lines.append(_row([str(row["processes"]), cells[0], f"{cells[1]} ({faster[1]:.2f}x)", *mib]))
    note = (
        f"{run['repeats']} repeats of {run['samples']} images at {run['points']} points; bytes are of rank 0. Largest "
        f"difference between the two curves: {run['largest_difference_of_q']:.0e}. {run['environment']['cpu']}."
    )
    return "\n".join([*lines, "", note])


def arithmetic() -> str:
    """What a process of 1, 8 or 64 does for one repeat of ResNet50's curve, by the formulas of the page."""
    samples, points, gib = 5000, 17, 2**30
    head = ["processes", "samples a pass", "features sent", "products added up", "multiplications"]
    lines = [_row(head), _row(["---:"] * 5)]
    passes = {budget: -(-FEATURES // (budget * gib // (4 * samples) - 2 * samples)) for budget in (1, 16, 128)}
    for processes in (1, 8, 64):
        sent = 4 * FEATURES * samples / processes * (processes - 1) / processes / gib
        added = 4 * points * samples**2 / gib if processes > 1 else 0.0
        cells = f"{samples / processes:,.0f}", f"{sent:.1f} GiB", f"{added:.1f} GiB"
        lines.append(_row([str(processes), *cells, f"{samples**2 * FEATURES / processes / 1e12:.1f} T"]))
    note = f"ResNet50 at 224 x 224: {points} points, M = {FEATURES:,} values a sample. Passes by `budget=`: "
    note += ", ".join(f"{count} with {budget} GiB" for budget, count in passes.items()) + "."
    return "\n".join([*lines, "", note])


TABLES: dict[str, Callable[[], str]] = {
    "headline": headline,
    "levers": levers,
    "clock": clock,
    "clocks": clocks,
    "speed": speed,
    "criteria": criteria,
    "criteria-of-others": criteria_of_others,
    "criteria-for-longer": criteria_for_longer,
    "scale": scale,
    "arithmetic": arithmetic,
}


def filled(text: str) -> str:
    """`text` with every table between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if start in text:
            head, rest = text.split(start)
            text = f"{head}{start}\n{table()}\n{end}{rest.split(end)[1]}"
    return text


def zoo() -> str:
    """The page of networks: what was found in each and what works once it is all removed."""
    run = load("zoo")
    head = ["network", "identity", "transition", "plain", "refused", "removed", *STEPS, "finding, ms", "share"]
    lines = [_row(head), _row(["---", *["---:"] * 5, *["---"] * len(STEPS), "---:", "---:"])]
    notes: list[str] = []
    for row in run["networks"]:
        cells = [_mark(row.get(step, ""), f"{row['network']}, {step}", notes) for step in STEPS]
        found = [f"{n}" if n == e else f"{n} (not {e})" for n, e in zip(row["found"], row["expected"], strict=True)]
        time = [f"{1000 * row['find_seconds']:.0f}", f"{_share(row):.2f}"]
        lines.append(
            _row([f"`{row['network']}`", *found, str(len(row["refused"])), str(row["removed"]), *cells, *time])
        )
        notes += [f"- `{row['network']}`: `{name}` stays: {why}" for name, why in row["refused"].items()]
    machine = run["environment"]
    note = f"{machine['cpu']}, {machine['threads']} threads, torch {machine['versions']['torch']}."
    return "\n".join([ZOO_HEAD, "", *lines, "", note, "", *notes, "", *_usual_sizes(), ""])


def _usual_sizes() -> list[str]:
    """Finding at the sizes that networks are used at, where Python is not most of the time."""
    rows = load("find-speed")["networks"]
    text = (
        "Most inputs above are small, and Python takes longer there than the arithmetic. One sample of the usual size:"
    )
    lines = [_row(["network", "forward, ms", "dependency graph, ms", "finding, ms", "share"])]
    lines.append(_row(["---", *["---:"] * 4]))
    for row in rows:
        seconds = [row[f"{what}_seconds"] for what in ("forward", "depgraph", "find")]
        cells = ["none" if value is None else f"{1000 * value:.0f}" for value in seconds]
        lines.append(_row([f"`{row['network']}`", *cells, f"{_share(row):.2f}"]))
    return ["## At usual sizes", "", text, "", *lines]


def _share(row: dict[str, Any]) -> float:
    """Of the time that finding may take: three forward passes and a dependency graph."""
    allowed: float = 3 * row["forward_seconds"] + (row["depgraph_seconds"] or 0.0)
    return row["find_seconds"] / allowed


def _mark(verdict: str, what: str, notes: list[str]) -> str:
    if verdict.startswith("unpruned too"):
        return "neither"
    if verdict not in ("ok", ""):
        notes.append(f"- {what}: {verdict}")
    return {"ok": "yes", "": ""}.get(verdict, "no")


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for page in PAGES:
        write_text(page, filled(page.read_text()))
    write_text(ZOO_PAGE, zoo())
