"""Files from strangers are data only: whatever stands in them, a correct result or one clear line.

`MODPRUNE_FUZZ=10000 pytest tests/test_fuzz.py` tries as many files of each kind; a few dozen otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modprune import PruningPlan, load, save
from modprune.models import CifarResNet
from modprune.store import checksum

EXAMPLES = int(os.environ.get("MODPRUNE_FUZZ", "60"))
FUZZ = settings(max_examples=EXAMPLES, deadline=5000, suppress_health_check=list(HealthCheck), derandomize=True)

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
words = st.sampled_from(
    [
        *(
            "remove",
            "kinds",
            "outputs",
            "width",
            "scores",
            "freed",
            "format",
            "criterion",
            "plan",
            "narrowed",
            "blocks",
        ),
        *("identity", "transition", "layer1.1", "layer1.0", "conv1", "..", "../../x", "/etc/passwd", "__class__"),
    ]
)
anything = st.recursive(
    leaves | words, lambda x: st.lists(x, max_size=4) | st.dictionaries(words | st.text(max_size=5), x, max_size=5)
)


def tiny() -> CifarResNet:
    torch.manual_seed(0)
    return CifarResNet((2, 1, 1), num_classes=3)


def make_file(path: Path) -> bytes:
    save(PruningPlan(("layer1.1",)).apply(tiny()), path)
    return path.read_bytes()


def one_line_or(result: Callable[[], Any]) -> Any:
    """What it gives, or None where it raises what callers catch, in one line; anything else is a failure."""
    try:
        return result()
    except (ValueError, OSError) as error:
        line = str(error)
    assert line.strip()
    assert "\n" not in line
    return None


def check(path: Path, folder: Path) -> None:
    """Loading gives the tensors of the file, or an error that leaves the given network as it was."""
    before = sorted(folder.rglob("*"))
    given_one = tiny()
    state = {name: t.clone() for name, t in given_one.state_dict().items()}
    for model in (None, given_one):
        loaded = one_line_or(lambda model=model: load(path, model))
        if loaded is not None:
            held = safetensors.torch.load_file(path)
            assert loaded.state_dict().keys() == held.keys()
            assert all(torch.equal(t.nan_to_num(), held[n].nan_to_num()) for n, t in loaded.state_dict().items())
        elif model is not None:
            assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert sorted(folder.rglob("*")) == before


@FUZZ
@given(st.data())
def test_damaged_bytes(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    content = bytearray(make_file(folder / "a.safetensors"))
    head = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the damage in the length and the header, which are a small part of the file.
        at = data.draw(st.integers(0, head if data.draw(st.booleans()) else len(content)))
        what = data.draw(st.sampled_from(["flip", "cut", "insert", "drop"]))
        if what == "flip" and at < len(content):
            content[at] ^= data.draw(st.integers(1, 255))
        elif what == "cut":
            del content[at:]
        elif what == "insert":
            content[at:at] = data.draw(st.binary(max_size=9))
        else:
            del content[at : at + data.draw(st.integers(1, 9))]
    (folder / "a.safetensors").write_bytes(content)
    check(folder / "a.safetensors", folder)


@FUZZ
@given(st.data())
def test_forged_headers_with_the_right_checksum(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("forged")
    path = folder / "a.safetensors"
    make_file(path)
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["modprune"])
    tensors = safetensors.torch.load_file(path)
    places: list[tuple[Any, Any]] = [(header, key) for key in header if key != "sha256"]
    places += [(header[part], key) for part in ("plan", "built_in") for key in header[part]]
    places += [(header["built_in"]["arguments"], key) for key in header["built_in"]["arguments"]]
    for where, key in data.draw(st.lists(st.sampled_from(range(len(places))), min_size=1, max_size=3).map(
        lambda chosen: [places[i] for i in chosen]
    )):  # fmt: skip
        where[key] = data.draw(anything)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), max_size=2, unique=True)):
        shape = data.draw(st.lists(st.integers(0, 5), max_size=5))
        tensors[name] = torch.zeros(shape, dtype=data.draw(st.sampled_from([torch.float32, torch.int8, torch.bool])))
    signed = {key: header.get(key) for key in ("plan", "narrowed", "built_in")}
    header["sha256"] = checksum(signed, tensors)
    path.write_bytes(safetensors.torch.save(tensors, {"modprune": json.dumps(header)}))
    check(path, folder)


@FUZZ
@given(st.dictionaries(words, anything, max_size=6) | anything)
def test_plans(value):
    plan = one_line_or(lambda: PruningPlan.from_json(json.dumps(value)))
    if plan is not None:
        assert PruningPlan.from_json(plan.to_json()) == plan


@FUZZ
@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda raw: raw.decode("latin-1")))
def test_text_that_is_no_plan(text):
    if "{" not in text:
        with pytest.raises((ValueError, OSError)):
            PruningPlan.from_json(text)
    else:
        one_line_or(lambda: PruningPlan.from_json(text))
