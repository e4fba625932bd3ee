# make train       make a virtual environment, install, and train the built-in job on two nodes
# make test        the same environment with what tests need, and the tests
# make test-slow   the tests that take more than about twenty seconds each
# make test-campaign   random faults under every strategy, real Slurm and sshd, several machines: most of an hour
# make lint        ruff and basedpyright
# make benchmark   what docs/benchmarks.md reports
# make clean       remove what tools leave; the environment and the runs stay
#
# PYTHON=python3.12 chooses the interpreter, VENV=path the environment, ARGS="-k layers" goes to pytest; JOBS=0 runs the
# tests in one process, as ARGS=--pdb wants it.
# What is installed is not installed again until pyproject.toml changes.

VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Asked for first, by its bounds: so pip takes a CPU build where one lies at hand.
TORCH := torch>=2.9,<2.14

# Files of tests that run at the same time: most of them wait for processes more than they compute.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14 python; do \
	$$p -c '$(SUITABLE)' >/dev/null 2>&1 && { echo $$p; break; }; done)

.PHONY: train test test-slow test-campaign lint benchmark clean

train: $(VENV)/.installed
	$(BIN)/dltrain launch --nodes 2

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not campaign" $(ARGS)

test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m "slow and not campaign" $(ARGS)

test-campaign: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m campaign $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright --pythonpath $(BIN)/python

benchmark: $(VENV)/.installed-benchmarks
	$(BIN)/python benchmarks/order.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/launch.py
	$(BIN)/python benchmarks/strategies.py
	$(BIN)/python benchmarks/checkpoint.py
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/recovery.py --goodput

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 with venv found here (Debian: apt install python3-venv);" \
		"name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)"
	$(PIP) install -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -e ".[dev]"
	@touch $@

$(VENV)/.installed-benchmarks: $(VENV)/.installed
	$(PIP) install -e ".[benchmarks]"
	@touch $@

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
