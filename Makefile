# The two commands of the README: `make demo` and `make test`. CI runs `make check`.
PYTHON ?= python3
BIN := .venv/bin
DEMO := demo

.PHONY: demo test quick check format lint types docs-tables faults venv clean

# Runs the main job on the embedded default: data from this Python's own standard library, pruning by the detector.
demo: .venv/.installed
	rm -rf $(DEMO)
	$(BIN)/secateur pretrain --out $(DEMO) --steps 700 --max-data-bytes 8000000 --vocab-size 2048 \
	  --multiple-of 2 --eval-steps 100 --save-steps 350
	@echo "open $(DEMO)/report.html"

# Whole files to three workers, as some wait for jobs of theirs, in the order that tests/conftest.py gives them.
SPREAD := -n 3 --dist loadfile --no-loadscope-reorder

test: .venv/.installed-dev
	$(BIN)/python -m pytest $(SPREAD)

# What to run while working: two minutes.
quick: .venv/.installed-dev
	$(BIN)/python -m pytest $(SPREAD) -m "not slow"

check: lint types test

format: .venv/.installed-dev
	$(BIN)/ruff format src tests benchmarks examples
	$(BIN)/ruff check --fix src tests benchmarks examples

lint: .venv/.installed-dev
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples

types: .venv/.installed-dev
	$(BIN)/mypy

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e .
	touch $@

.venv/.installed-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch -e ".[dev]"
	touch $@ .venv/.installed

# Tables of docs/ that are made from tables of the source.
docs-tables: .venv/.installed-dev
	PYTHONPATH=src:tests $(BIN)/python tests/support/docs_tables.py

# Kills, signals, full disks, changed and damaged files, against every command (docs/faults.md): an hour or more, in
# the background of other work; started again it goes on. FAULTS takes options, such as FAULTS="--seconds 600".
faults: .venv/.installed-dev
	PYTHONPATH=src:tests nice $(BIN)/python benchmarks/faults.py $(FAULTS)

clean:
	rm -rf .venv $(DEMO) build dist
