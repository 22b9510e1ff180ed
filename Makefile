# Each target sets up .venv by itself, and again when pyproject.toml or constraints.txt change.
# PYTHON chooses the interpreter (3.11 or newer): make PYTHON=python3.12 test

PYTHON ?= python3
VENV = .venv
STAMP = $(VENV)/.installed
BIN = $(VENV)/bin

.POSIX:
.PHONY: help demo test check bench chaos simulate fuzz clean install

help:
	@echo "make demo     run the default preset, digits: no download, no GPU needed"
	@echo "make test     the whole test suite"
	@echo "make check    lint, format and types"
	@echo "make bench    the benchmarks"
	@echo "make chaos    kill everything that a run is made of, 100 times, and check its account (about 20 minutes)"
	@echo "make simulate a million simulated histories of ledger, service and clients"
	@echo "make fuzz     throw 10,000 odd queries and configurations at what takes input (minutes)"
	@echo "make clean    remove caches and builds; $(VENV) and runs stay"

demo: install
	$(BIN)/exsim run digits

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --durations=10

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python -m benchmarks

chaos: install
	$(BIN)/python -m benchmarks.chaos --kills 100 --minutes 10

simulate: install
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.simulation --histories 1000000 --plants

fuzz: install
	$(BIN)/python -m benchmarks.fuzz --cases 10000

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer: name one with make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || { echo "==> creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "==> installing into $(VENV) (the first time this takes minutes and 6 GB)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
