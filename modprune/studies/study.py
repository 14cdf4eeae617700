"""What every study gives: numbers, a picture of them, and a paragraph that says what was measured."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modprune._files import to_json, write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 6.9  # inches: two columns of a paper
# Told apart without colour: each with a marker and a grey of its own.
INKS = ("#08306b", "#c8442f", "#2e8b57", "#b07aa1", "#e08214", "#4d4d4d", "#67a9cf", "#8c6d31")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "p")


@dataclass(frozen=True)
class Study:
    """A finished study.

    Attributes:
        name: as in `modprune study NAME`.
        numbers: all that was measured, of JSON's types alone.
        figure: the picture of the numbers.
        text: a paragraph of Markdown.
    """

    name: str
    numbers: dict[str, Any]
    figure: Figure
    text: str

    def write(self, out: str | Path) -> None:
        """`study.json`, `study.png`, `study.svg` and `study.md` to the folder `out`, each in one step.

        Raises:
            OSError: if the folder cannot be written.
        """
        out = Path(out)
        to_json({"study": self.name, **self.numbers}, out / "study.json", indent=1)
        for form in ("png", "svg"):
            buffer = io.BytesIO()
            with style():
                self.figure.savefig(buffer, format=form, dpi=200, metadata={"Date": None} if form == "svg" else None)
            write_bytes(out / f"study.{form}", buffer.getvalue())
        write_text(out / "study.md", f"# {self.name.capitalize()}\n\n{self.text}\n\n![{self.name}](study.png)\n")


@contextmanager
def style() -> Iterator[None]:
    """Letters that can be read at paper size, and SVG files that do not change from run to run."""
    from matplotlib import rc_context

    sizes: dict[Any, Any] = {
        "font.size": 8,
        "axes.titlesize": 8,
        "legend.fontsize": 7,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
    }
    with rc_context({**sizes, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "modprune"}):
        yield


def panels(count: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels, `columns` in a row, each row `height` inches high."""
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten().tolist()
    for spare in axes[count:]:
        spare.set_axis_off()
    return figure, axes[:count]


def looks(count: int) -> list[tuple[str, str]]:
    """A colour and a marker for each of `count` lines: a pair comes again after forty."""
    return [(INKS[i % len(INKS)], MARKERS[i % len(MARKERS)]) for i in range(count)]


def plural(count: int, word: str) -> str:
    """A number of things.

    >>> plural(1, "draw"), plural(2, "draw")
    ('1 draw', '2 draws')
    """
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def extra(module: str) -> Any:
    """A module of the extra `studies`.

    Raises:
        ModuleNotFoundError: where it is not installed; says how to.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"this study needs {error.name}: pip install 'modprune[studies]'") from None


def rank_correlation(rows: Sequence[Any]) -> np.ndarray:
    """(R, R): Spearman's, of every pair of R rows of numbers."""
    values = np.asarray(rows)
    # Of each number, how many are smaller less how many are larger: equal numbers have equal ranks.
    ranks = np.sign(values[:, :, None] - values[:, None]).sum(2)
    return np.atleast_2d(np.corrcoef(ranks))


class Parts:
    """Parts of a long study, kept in a file as they come, so that an interrupted one goes on where it was.

    Args:
        path: the file; None keeps nothing.
        arguments: of the study; parts of other arguments are refused.
        resume: go on with the file; without it, one that is there is refused.

    Raises:
        ValueError: for parts that are there without `resume`, or of other arguments.
    """

    def __init__(self, path: str | Path | None = None, arguments: Any = None, resume: bool = False) -> None:
        self.path = None if path is None else Path(path)
        self.arguments = json.loads(to_json(arguments))
        self.known: dict[str, Any] = {}
        if self.path is None or not self.path.exists():
            return
        if not resume:
            raise ValueError(f"{self.path}: holds an unfinished study: resume it, delete it, or give another folder")
        try:
            held = json.loads(self.path.read_text())
            known, theirs = held["parts"], held["arguments"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{self.path}: holds no parts of a study: delete it, or give another folder") from None
        if theirs != self.arguments:
            raise ValueError(
                f"{self.path}: of a study with other arguments or weights: delete it, or give another folder"
            )
        self.known = known

    def __call__(self, name: str, make: Callable[..., Any], *arguments: Any) -> Any:
        """The part of this name, of JSON's types alone: `make(*arguments)` if it is not there yet."""
        if name not in self.known:
            self.keep(name, make(*arguments))
        return self.known[name]

    def keep(self, name: str, value: Any) -> None:
        """Write a part down."""
        self.known[name] = value
        if self.path is not None:
            to_json({"arguments": self.arguments, "parts": self.known}, self.path, indent=None)

    def done(self) -> None:
        """The study is written: its parts are no longer needed."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
