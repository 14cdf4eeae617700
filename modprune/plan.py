"""`PruningPlan`: what to remove, as a plain value that survives JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modprune._files import to_json

if TYPE_CHECKING:
    from torch import nn

FORMAT = 1
KINDS = ("identity", "transition", "branch", "plain")


@dataclass(frozen=True)
class PruningPlan:
    """Which blocks to remove, and where the choice came from.

    Attributes:
        remove: names of blocks, in forward order.
        kinds: the kind of each, see `modprune.Block.kind`; empty in a plan written by hand, then found out.
        outputs: the form of what each gave back, see `modprune.Block.outputs`; empty as `kinds`.
        width: layers by name with the output channels that go from them once the blocks are gone.
        criterion: what scored the blocks.
        scores: the score of every candidate: what is lost if it goes.
        freed: fractions of the MACs (`flops`) and parameters (`params`) that go, and of the time (`latency`) that its
            blocks took, if that was the budget.

    >>> PruningPlan(remove=("layer1.0",)) == PruningPlan.from_json('{"format": 1, "remove": ["layer1.0"]}')
    True
    """

    remove: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    outputs: tuple[tuple[int, ...], ...] = ()
    width: tuple[tuple[str, tuple[int, ...]], ...] = ()
    criterion: str = ""
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    freed: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("remove", "kinds"):
            value = getattr(self, name)
            if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"a plan's '{name}' is a tuple of strings, not {value!r:.60}")
            object.__setattr__(self, name, tuple(value))
        if len(set(self.remove)) < len(self.remove) or "" in self.remove:
            raise ValueError("a plan's 'remove' names every block once, and not the whole model")
        if self.kinds and (len(self.kinds) != len(self.remove) or not set(self.kinds) <= set(KINDS)):
            raise ValueError(f"a plan's 'kinds' gives one of {', '.join(KINDS)} for each block to remove, or nothing")
        self._check_outputs()
        self._check_width()
        if not isinstance(self.criterion, str):
            raise ValueError("a plan's 'criterion' is a string")
        for name in ("scores", "freed"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                value = {key: _own(number) for key, number in value.items()}  # a copy: theirs may change
            if not isinstance(value, dict) or not all(isinstance(k, str) and _is_number(v) for k, v in value.items()):
                raise ValueError(f"a plan's '{name}' maps names to finite numbers")
            object.__setattr__(self, name, value)

    def _check_outputs(self) -> None:
        try:
            outputs: Any = tuple(tuple(map(_own, positions)) for positions in self.outputs)
        except TypeError:
            outputs = (("",),)
        if not all(type(i) is int and -1 <= i < 100 and len(form) < 100 for form in outputs for i in form):
            raise ValueError(
                f"a plan's 'outputs' holds positions of arguments for each block, not {self.outputs!r:.60}"
            )
        if outputs and len(outputs) != len(self.remove):
            raise ValueError("a plan's 'outputs' gives a form for each block to remove, or nothing")
        object.__setattr__(self, "outputs", outputs)

    def _check_width(self) -> None:
        try:
            width = tuple((name, tuple(map(_own, channels))) for name, channels in self.width)
        except (TypeError, ValueError):
            width = (("", ()),)
        if not all(
            isinstance(name, str) and name and all(type(c) is int for c in channels) for name, channels in width
        ):
            raise ValueError(f"a plan's 'width' pairs names of layers with channels, not {self.width!r:.60}")
        for names in ([name for name, _ in width], *(channels for _, channels in width)):
            if len(set(names)) < len(names):
                raise ValueError(f"a plan's 'width' names every layer once, and every channel of it, not {width!r:.60}")
        object.__setattr__(self, "width", width)

    def to_json(self, path: str | Path | None = None) -> str:
        """The plan as JSON text; written to `path` as well if given, in one step."""
        return to_json({"format": FORMAT, **asdict(self)}, path)

    @classmethod
    def from_json(cls, source: str | Path) -> PruningPlan:
        """A plan from JSON text (it begins with a brace) or from the file of that name.

        Raises:
            ValueError: for text that is not a plan, or one of a newer format; OSError: for a file that is not there.
        """
        if not isinstance(source, (str, os.PathLike)):
            raise ValueError(f"a plan in a {type(source).__name__}: give JSON text, or the name of a file")
        text = source if isinstance(source, str) and source.lstrip().startswith("{") else _read(Path(source))
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            where = "" if text is source else f"{source}: "
            raise ValueError(f"{where}not a plan: the text is not JSON ({str(error)[:80]})") from None
        if not isinstance(data, dict) or "remove" not in data:
            raise ValueError("not a plan: a JSON object with 'remove' is needed, as PruningPlan.to_json writes it")
        version = data.pop("format", FORMAT)
        if not isinstance(version, int) or not 1 <= version <= FORMAT:
            raise ValueError(f"a plan of format {version!r:.20}; this modprune reads up to {FORMAT}: update modprune")
        unknown = sorted(set(data) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"not a plan: it has an unknown field {unknown[0]!r:.60}")
        return cls(**data)

    def apply(self, model: nn.Module, example_inputs: Any = None) -> nn.Module:
        """Carry the plan out on `model` in place, prove that it runs, and return it.

        Args:
            model: a bare module, as it was when the plan was made.
            example_inputs: a tensor, a tuple or a dict. Without it nothing is proven, kinds that the plan does
                not give are found out by tracing each block, and no channels can be cut.

        Raises:
            ValueError: for a plan that does not fit the model; RuntimeError: if the pruned model fails its proof. The
                model is as it was.
        """
        from modprune.surgery import apply_plan  # the one step back along the way of the data

        return apply_plan(model, self, example_inputs)


def _own(value: Any) -> Any:
    """A number of numpy as Python's own, which JSON takes."""
    return value.item() if isinstance(value, np.generic) else value


def _is_number(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and value.bit_length() < 1000  # JSON has integers beyond any float
    return isinstance(value, float) and math.isfinite(value)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        shown = " ".join(str(path).split())[:200]  # a text that is no plan may be many lines long
        raise FileNotFoundError(f"{shown}: no such file; a plan is what `modprune plan` writes") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a plan: it is not text") from None
