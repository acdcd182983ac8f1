PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PACKAGE := --editable . --no-deps --no-build-isolation
COUNT ?= 10000
SEED ?= 0
BASE := requirements/base.txt requirements/constraints.txt pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo test check docs zoo bench fuzz clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: requirements/demo.txt $(BASE) | $(VENV)/.created
	$(PIP) --requirement $<
	$(PIP) $(PACKAGE)
	@touch $@

$(VENV)/.test: requirements/test.txt requirements/demo.txt $(BASE) | $(VENV)/.created
	$(PIP) --requirement $<
	$(PIP) $(PACKAGE)
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo  ## train a small network, then inspect, convert, fold, export and verify it
	$(BIN)/python examples/demo.py

test: $(VENV)/.test  ## run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

check: $(VENV)/.test  ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.test  ## write docs/cli.md from the commands
	$(BIN)/python -m normswap.manual > docs/cli.md.new
	mv docs/cli.md.new docs/cli.md

zoo: $(VENV)/.test  ## convert, fold, verify and examine the models of torchvision and timm, into docs/zoo.md
	$(BIN)/python scripts/zoo.py convert
	$(BIN)/python scripts/zoo.py fold
	$(BIN)/python scripts/zoo.py verify
	$(BIN)/python scripts/zoo.py health

bench: $(VENV)/.test  ## measure time and memory against named peers
	$(BIN)/python scripts/bench.py convert
	$(BIN)/python scripts/bench.py fold
	$(BIN)/python scripts/bench.py verify
	$(BIN)/python scripts/bench.py calibrate
	$(BIN)/python scripts/bench.py layers
	$(BIN)/python scripts/bench.py files

fuzz: $(VENV)/.test  ## fold random networks, compare them with the originals; read malformed files, kill conversions (COUNT=10000 SEED=0)
	$(BIN)/python scripts/fuzz.py --count $(COUNT) --seed $(SEED)
	$(BIN)/python scripts/fuzz_files.py --seed $(SEED)
	$(BIN)/python scripts/crash_files.py --seed $(SEED)

clean:  ## remove what the targets made, the environment too
	rm -rf $(VENV) demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
