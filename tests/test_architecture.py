"""The way of the data: a module imports only from rows above it."""

from __future__ import annotations

import ast
from pathlib import Path

import modprune

PACKAGE = Path(modprune.__file__).parent
# Leaves first; each knows only what stands before it. plan.apply's import of surgery is the one step back.
ORDER = [
    "_files", "_environment", "_memory", "_random", "_processes", "_accelerate", "signals", "_inputs", "_bare",
    "_hooks", "_state", "_autograd", "_calls", "_depgraph", "cost", "_trace", "_probe", "models", "data", "bypass",
    "_residual", "_branches", "_plain", "graph", "blocks", "samples", "visits", "features", "evaluate", "picture",
    "curve", "similarity", "criteria", "budget", "plan", "width", "_proof", "surgery", "checkpoints", "carry",
    "distill", "recipe", "_means", "precision", "finetune", "tracking", "weights", "store", "report", "pruner",
    "gradual", "callbacks", "job", "specs", "studies", "_options", "_sources", "_studies_cli", "cli",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    """First names below `modprune.` that run when the module does; those for type checkers alone are not."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    return {
        node.module.split(".")[1]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("modprune.")
        and id(node) not in typing_only
    }  # fmt: skip


def test_modules_import_only_from_rows_above():
    modules = [p for p in PACKAGE.glob("*.py") if not p.stem.startswith("__")]
    packages = list(PACKAGE.glob("*/*.py"))
    assert {p.stem for p in modules} | {p.parent.name for p in packages} == set(ORDER)
    for path in modules + packages:
        name = path.stem if path in modules else path.parent.name
        allowed = set(ORDER[: ORDER.index(name)]) | ({"surgery"} if name == "plan" else set())
        assert imports(path) - {name} <= allowed, path


def test_one_module_knows_torch_pruning():
    users = [p.stem for p in PACKAGE.rglob("*.py") if "import torch_pruning" in p.read_text()]
    assert users == ["_depgraph"]


def test_what_is_public_is_documented():
    for name in modprune.__all__:
        assert (getattr(modprune, name).__doc__ or "").strip(), name
