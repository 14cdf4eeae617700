"""What the README shows is so: its quickstart runs, its tables and the API page are those of the results."""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks import paper
from benchmarks.api import PAGE, page
from benchmarks.paper import PAPER
from benchmarks.tables import PAGES, ZOO_PAGE, filled, zoo

README = PAGES[0]
TEXT = README.read_text()


def test_the_quickstart_runs(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    exec(compile(code[1], "README.md", "exec"), {})
    assert "Top-1 (%)" in capsys.readouterr().out
    assert Path("pruned.safetensors").exists()


def test_tables_are_made_from_the_results():
    for path in PAGES:
        assert filled(path.read_text()) == path.read_text()
    assert TEXT.count("\n") < 200
    assert ZOO_PAGE.read_text() == zoo()


def test_the_api_page_is_made_from_the_docstrings():
    assert PAGE.read_text() == page()


def test_the_page_of_the_paper_is_made_from_its_studies():
    assert (PAPER / "README.md").read_text() == paper.page()


def test_what_it_links_to_is_there():
    for path in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", path.read_text()):
            assert (path.parent / target).exists(), target
