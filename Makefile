# `make demo` is the main job on data that needs no network; `make test` is what CI runs after lint and types.
PYTHON ?= python3
BIN := .venv/bin

# Libraries are compiled once, not by every process that imports them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install demo test lint types docs check clean

install: .venv/installed

# uv where it is to be had (a quarter of the time), pip where not. Both compile what they install: in a shell that writes
# no bytecode, every command would spend over ten seconds on that.
.venv/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("modprune needs Python 3.11 or newer: make PYTHON=python3.11 ..." if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet uv || true
	$(BIN)/python -m uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]' \
		|| $(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

demo: install
	$(BIN)/python recipes/digits.py --out runs/demo

test: install
	$(BIN)/python -m pytest -q -n 2 --dist worksteal

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

docs: install
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.pictures
	$(BIN)/python -m benchmarks.paper
	$(BIN)/python -m benchmarks.api

check: lint types test

clean:
	rm -rf .venv runs/demo
