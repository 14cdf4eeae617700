"""A plan survives JSON; what is no plan says so."""

from __future__ import annotations

import json
import os
import stat

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modprune.plan import PruningPlan

names = st.lists(st.text(min_size=1, max_size=12), unique=True, max_size=6)
numbers = st.dictionaries(st.text(max_size=8), st.floats(allow_nan=False, allow_infinity=False), max_size=4)


kinds = st.sampled_from(["identity", "transition", "plain", None])
forms = st.none() | st.lists(st.integers(-1, 99), max_size=3).map(tuple)
channels = st.lists(st.integers(), unique=True, max_size=3).map(tuple)
widths = st.lists(st.tuples(st.text(min_size=1, max_size=9), channels), unique_by=lambda cut: cut[0], max_size=3)


@settings(max_examples=80, deadline=None)
@given(names, kinds, forms, widths, st.text(max_size=9), numbers, numbers)
def test_json_round_trip(remove, kind, output, width, criterion, scores, freed):
    kinds = (kind,) * len(remove) if kind else ()
    outputs = (output,) * len(remove) if output is not None else ()
    plan = PruningPlan(tuple(remove), kinds, outputs, tuple(width), criterion, scores, freed)
    assert PruningPlan.from_json(plan.to_json()) == plan


leaves = st.none() | st.booleans() | st.floats() | st.text(max_size=5)
fields = st.sampled_from(["remove", "kinds", "outputs", "width", "scores", "freed", "format", "criterion", "x"])
anything = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(fields, x, max_size=6))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(fields, anything, max_size=6))
def test_any_json_is_a_plan_or_one_clear_line(value):
    text = json.dumps({"remove": ["a"], **value})
    try:
        assert all(isinstance(name, str) for name in PruningPlan.from_json(text).remove)
    except ValueError as error:
        message = str(error)
        if "plan" not in message or "\n" in message:
            raise


def test_a_plan_is_a_value():
    scores = {"layer1.0": 0.5}
    plan = PruningPlan(("layer1.0",), scores=scores)
    scores["layer1.0"] = 9.0
    numpys = PruningPlan(
        ("a",), outputs=((np.int64(-1),),), width=(("b", np.arange(2)),), scores={"a": np.float32(0.5)}
    )
    assert PruningPlan.from_json(numpys.to_json()) == numpys
    assert plan.scores == {"layer1.0": 0.5}
    assert {plan} == {PruningPlan(("layer1.0",), scores={"layer1.0": 0.5})}
    with pytest.raises(ValueError, match="maps names to finite numbers"):
        PruningPlan(("layer1.0",), scores={1: 0.5})


def test_links_stay_and_pipes_are_written_to(tmp_path):
    plan, link, pipe = PruningPlan(("a",)), tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(tmp_path / "real.json")
    plan.to_json(link)
    assert link.is_symlink()
    assert PruningPlan.from_json(tmp_path / "real.json") == plan
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    text = plan.to_json(pipe)
    assert os.read(reader, 10_000).decode() == text
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


def test_files(tmp_path):
    plan = PruningPlan(("layer1.0",))
    plan.to_json(tmp_path / "deep" / "plan.json")
    assert PruningPlan.from_json(tmp_path / "deep" / "plan.json") == plan
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"]
    with pytest.raises(FileNotFoundError, match=r"nothing.json: no such file"):
        PruningPlan.from_json(tmp_path / "nothing.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"remove": ["a"], "format": 2}', "format 2; this modprune reads up to 1"),
        ('{"remove": ["a", "a"]}', "every block once"),
        ('{"remove": [], "width": [["a", [1]], ["a", [2]]]}', "every layer once"),
        ('{"remove": [], "width": [["a", [1, 1]]]}', r"every channel of it, not .*\(1, 1\)"),
        ('{"remove": ["a"], "scores": {"a": 1' + "0" * 400 + "}}", "finite numbers"),
        ('{"remove": "ab"}', "tuple of strings"),
        ('{"remove": ["a"], "kinds": ["wide"]}', "identity, transition"),
        ('{"remove": ["a"], "code": 1}', "unknown field 'code'"),
        ("{", "not JSON"),
        ("{}", "with 'remove' is needed"),
        (None, "a plan in a NoneType: give JSON text"),
        (b'{"remove": ["a"]}', "a plan in a bytes: give JSON text"),
    ],
)
def test_errors(text, message):
    with pytest.raises(ValueError, match=message):
        PruningPlan.from_json(text)
