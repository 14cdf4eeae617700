"""Two networks side by side: accuracy, parameters, MACs by three counters, time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from modprune._files import write_text
from modprune._inputs import device_of
from modprune.cost import count_params, latency, macs_by_counter
from modprune.evaluate import Evaluation, evaluate

BATCHES = (1, 64)
BATCH_NORM = {"fvcore": "batch norm at 2 per element", "thop": "batch norm at 4 per element"}


@dataclass(frozen=True)
class Summary:
    """What one network is: parameters, MACs per sample by counter, seconds a batch by batch size, accuracy if known."""

    params: int
    macs: Mapping[str, int]
    seconds: Mapping[int, float]
    accuracy: Evaluation | None = None


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
        return {name: 1 - self.pruned.macs[name] / count for name, count in self.original.macs.items()}

    @property
    def params_removed(self) -> float:
        """Fraction of the parameters removed."""
        return 1 - self.pruned.params / self.original.params

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(quantity, original, pruned, change) as text, what the tables show."""
        a, b = self.original, self.pruned
        rows = []
        if a.accuracy and b.accuracy:
            for name in ("top1", "top5"):
                x, y = getattr(a.accuracy, name), getattr(b.accuracy, name)
                rows.append((f"Top-{name[3:]} (%)", f"{x:.2f}", f"{y:.2f}", f"{y - x:+.2f}"))
            rows.append(
                (
                    "Loss",
                    f"{a.accuracy.loss:.4f}",
                    f"{b.accuracy.loss:.4f}",
                    f"{b.accuracy.loss - a.accuracy.loss:+.4f}",
                )
            )
        rows.append(("Parameters", f"{a.params:,}", f"{b.params:,}", _percent(self.params_removed)))
        for name, removed in self.flops_removed.items():
            label = "MACs" if name == "modprune" else f"MACs ({name})"
            rows.append((label, f"{a.macs[name] / 1e6:,.3f} M", f"{b.macs[name] / 1e6:,.3f} M", _percent(removed)))
        for batch, x in a.seconds.items():
            y = b.seconds[batch]
            rows.append((f"Time, batch {batch}", f"{1e3 * x:.2f} ms", f"{1e3 * y:.2f} ms", f"{x / y:.2f}x faster"))
        return rows

    def notes(self) -> list[str]:
        """What a reader has to know beside the table."""
        notes = [f"Times: median forward pass on {self.device}, {self.threads} threads."]
        for name, why in BATCH_NORM.items():
            macs = self.original.macs.get(name)
            if macs and abs(macs / self.original.macs["modprune"] - 1) > 0.02:
                notes.append(f"{name} differs by over 2 %: it counts {why}, and attention products not at all.")
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
        text = json.dumps(data, indent=2) + "\n"
        if path is not None:
            write_text(path, text)
        return text


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
        Summary(
            count_params(model),
            macs_by_counter(model, example_inputs),
            {batch: times[key] for batch, times in seconds.items()},
            evaluate(model, val_loader) if val_loader is not None else None,
        )
        for key, model in (("a", original), ("b", pruned))
    )
    return Report(first, second, str(device_of(original)), torch.get_num_threads())


def _percent(removed: float) -> str:
    return f"-{removed:.2%}".replace("--", "+").replace("%", " %")
