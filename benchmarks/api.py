"""Write docs/api.md from the docstrings of all that is public.

python -m benchmarks.api
"""

from __future__ import annotations

import inspect
from pathlib import Path

import modprune
from modprune._files import write_text

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def page() -> str:
    """The page as Markdown."""
    parts = ["# API", "", "Made from the docstrings by `python -m benchmarks.api`.", ""]
    for name in modprune.__all__:
        thing = getattr(modprune, name)
        parts += [f"## {_title(name, thing)}", "", *_text(thing)]
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if member.startswith("_") or not callable(function):
                    continue
                title = f"`{member}`" if isinstance(value, property) else _title(member, function)
                parts += [f"### {title}", "", *_text(function)]
    return "\n".join(parts)


def _title(name: str, thing: object) -> str:
    signature = str(inspect.signature(thing)) if callable(thing) else ""
    return f"`{name}{signature}`"


def _text(thing: object) -> list[str]:
    return ["```text", inspect.getdoc(thing) or "", "```", ""]


if __name__ == "__main__":
    write_text(PAGE, page())
