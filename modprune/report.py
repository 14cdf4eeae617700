"""Two networks side by side: accuracy, parameters, MACs by three counters, time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modprune._bare import bare
from modprune._files import to_json
from modprune._inputs import device_of
from modprune._state import state_kept
from modprune.cost import count_params, latency, mac_differences, macs_by_counter
from modprune.evaluate import Evaluation, evaluate

BATCHES = (1, 64)
COUNTERS = ("modprune", "fvcore", "thop")
TOLERANCE = 0.02  # of the primary count: cross-checks that differ by more are explained


@dataclass(frozen=True)
class Summary:
    """What one network is: parameters, MACs per sample by counter, seconds a batch by batch size, accuracy if known.

    `mac_differences` says, for counters that differ from the primary by over 2 %, by how much for each type of module.
    """

    params: int
    macs: Mapping[str, int]
    seconds: Mapping[int, float]
    accuracy: Evaluation | None = None
    mac_differences: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The comparison of a pruned network with its original; `print` it, or take Markdown or JSON."""

    original: Summary
    pruned: Summary
    device: str
    threads: int

    @property
    def flops_removed(self) -> dict[str, float]:
        """Fraction of the MACs removed, by counter."""
        both = [name for name in self.original.macs if name in self.pruned.macs]
        return {name: _removed(self.original.macs[name], self.pruned.macs[name]) for name in both}

    @property
    def params_removed(self) -> float:
        """Fraction of the parameters removed."""
        return _removed(self.original.params, self.pruned.params)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(quantity, original, pruned, change) as text, what the tables show."""
        a, b = self.original, self.pruned
        rows = []
        if a.accuracy and b.accuracy:
            measures = ("Top-1 (%)", "top1", ".2f"), ("Top-5 (%)", "top5", ".2f"), ("Loss", "loss", ".4f")
            for label, name, form in measures:
                x, y = getattr(a.accuracy, name), getattr(b.accuracy, name)
                rows.append((label, f"{x:{form}}", f"{y:{form}}", f"{y - x:+{form}}"))
        rows.append(("Parameters", f"{a.params:,}", f"{b.params:,}", _percent(self.params_removed)))
        for name, removed in self.flops_removed.items():
            label = "MACs" if name == "modprune" else f"MACs ({name})"
            rows.append((label, f"{a.macs[name] / 1e6:,.3f} M", f"{b.macs[name] / 1e6:,.3f} M", _percent(removed)))
        for batch, x in a.seconds.items():
            y = b.seconds[batch]
            rows.append((f"Time, batch {batch}", f"{1e3 * x:.2f} ms", f"{1e3 * y:.2f} ms", f"{x / y:.2f}x as fast"))
        return rows

    def notes(self) -> list[str]:
        """What a reader has to know beside the table."""
        notes = [f"Times: median forward pass on {self.device}; CPU threads: {self.threads}."]
        primary = max(self.original.macs["modprune"], 1)
        for name, types in self.original.mac_differences.items():
            largest = sorted(types, key=lambda t: -abs(types[t]))[:3]
            parts = ", ".join(f"{t} {types[t] / 1e6:+,.3f} M" for t in largest)
            change = self.original.macs[name] / primary - 1
            more = f"{abs(change):.1%}".replace("%", " %") + (" more" if change > 0 else " fewer")
            notes.append(f"{name} counts {more} MACs in the original: {parts}.")
        left_out = [name for name in COUNTERS if name not in self.flops_removed]
        if left_out:
            notes.append(f"Left out, since it cannot count this network or its inputs: {', '.join(left_out)}.")
        return notes

    def __str__(self) -> str:
        rows = [("", "original", "pruned", "change"), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))]) for row in rows]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], *self.notes()])

    def to_markdown(self) -> str:
        """The table in Markdown with its notes."""
        lines = ["| | original | pruned | change |", "|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(row)} |" for row in self.rows()]
        return "\n".join([*lines, "", *self.notes()]) + "\n"

    def to_json(self, path: str | Path | None = None) -> str:
        """All numbers as JSON text; written to `path` as well if given, in one step."""
        data = asdict(self) | {"flops_removed": self.flops_removed, "params_removed": self.params_removed}
        return to_json(data, path)


def compare(
    original: nn.Module, pruned: nn.Module, example_inputs: Any, val_loader: Iterable[Any] | None = None
) -> Report:
    """Compare two networks; both are left as found.

    Args:
        original, pruned: on the same device, for times that can be compared.
        example_inputs: a tensor, a tuple or a dict; times repeat its first sample.
        val_loader: for Top-1, Top-5 and loss; left out without it.

    Raises:
        ValueError, RuntimeError: see `evaluate`.
    """
    seconds = {n: latency({"a": original, "b": pruned}, example_inputs, batch=n) for n in BATCHES}
    first, second = (
        _summary(model, example_inputs, {batch: times[key] for batch, times in seconds.items()}, val_loader)
        for key, model in (("a", original), ("b", pruned))
    )
    return Report(first, second, str(device_of(original)), torch.get_num_threads())


def _summary(
    model: nn.Module, example_inputs: Any, seconds: dict[int, float], val_loader: Iterable[Any] | None
) -> Summary:
    counted = bare(model)  # in what is compiled nothing is seen
    counts = macs_by_counter(counted, example_inputs)
    macs = {counter: by_module[""] for counter, by_module in counts.items()}
    far = [name for name, count in macs.items() if abs(count - macs["modprune"]) > TOLERANCE * macs["modprune"]]
    differences = mac_differences(counted, counts) if far else {}
    with state_kept(model):
        accuracy = evaluate(model, val_loader) if val_loader is not None else None
    return Summary(count_params(model), macs, seconds, accuracy, {name: differences[name] for name in far})


def _removed(original: int, pruned: int) -> float:
    return 1 - pruned / original if original else 0.0


def _percent(removed: float) -> str:
    return f"{0.0 - removed:+.2%}".replace("%", " %")  # nothing removed is no -0
