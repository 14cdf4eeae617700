"""Write docs/api.md from the docstrings of all that is public.

python -m benchmarks.api
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import modprune
from modprune import checkpoints, data, job, models, recipe, signals, specs, studies
from modprune._files import write_text
from modprune.callbacks import lightning, transformers
from modprune.criteria import CRITERIA
from modprune.finetune import Epoch
from modprune.precision import autocast_dtype

PAGE = Path(__file__).parents[1] / "docs" / "api.md"


def page() -> str:
    """The page as Markdown."""
    parts = ["# API", "", "Made from the docstrings by `python -m benchmarks.api`.", ""]
    things = {name: getattr(modprune, name) for name in modprune.__all__}
    things |= {f"studies.{name}": getattr(studies, name) for name in studies.__all__}
    rooms = {
        "data": (data.ImageData, data.ImageLoader, data.cifar10, data.cifar100, data.digits),
        "models": (models.CifarResNet, models.CifarResNet18, models.CifarVGG, *models.MODELS.values()),
        "recipe": (recipe.Recipe, recipe.warmup_cosine),
        "finetune": (Epoch,),
        "precision": (autocast_dtype,),
        "checkpoints": (checkpoints.save_state, checkpoints.load_newest, checkpoints.check_empty),
        "signals": (signals.put_off, signals.Notice),
        "specs": (specs.build_model, specs.load_data),
        "job": (job.prune_job,),
        "callbacks.lightning": (lightning.PruningCallback,),
        "callbacks.transformers": (transformers.PruningCallback,),
    }
    things |= {f"{room}.{thing.__name__}": thing for room, public in rooms.items() for thing in public}
    things |= {f"criteria.{made.__name__}": made for made in CRITERIA.values()}
    for name, thing in things.items():
        parts += [f"## {_title(name, thing)}", "", *_text(thing)]
        if inspect.isclass(thing):
            for member, value in vars(thing).items():
                function = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
                if (member.startswith("_") and member != "__call__") or not callable(function):
                    continue
                title = f"`{member}`" if isinstance(value, property) else _title(member, function)
                parts += [f"### {title}", "", *_text(function)]
    return "\n".join(parts)


def _title(name: str, thing: Callable[..., object]) -> str:
    """The call with its defaults; types are in the text."""
    signature = inspect.signature(thing)
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    bare = bare[1:] if bare and bare[0].name in ("self", "cls") else bare
    return f"`{name}{signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)}`"


def _text(thing: object) -> list[str]:
    return ["```text", inspect.getdoc(thing) or "", "```", ""]


if __name__ == "__main__":
    write_text(PAGE, page())
