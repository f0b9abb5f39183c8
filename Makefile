VENV ?= .venv
# The first Python that really runs, is new enough and can make a virtual environment: a name on
# the path proves none of these (a pyenv shim exists for versions that are not selected).
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.14; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& echo $$python && break; done)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-compile
SOURCES := replay kernels experiments tests
# pyright would announce its newer versions, but the version is pinned in pyproject.toml.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
# Compilation keeps one core busy, and a test that waits for a process of its own none: hence one
# worker more than there are cores. The tests of a file share recordings, so they stay together.
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); \
	echo $$((n < 4 ? n + 1 : 4)))
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: help demo test test-all suite lint bench clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.installed  ## record a small run, ask it questions, draw the answers
	@$(BIN)/replay demo

# pyright keeps one core busy for as long as the first tests take: side by side they cost less.
test: $(VENV)/.installed  ## lint, type-check, and run every test that takes seconds
	@$(MAKE) --no-print-directory -j 2 lint suite

suite: $(VENV)/.installed
	@$(PYTEST)

test-all: $(VENV)/.installed  ## run every test, the complete matrices included
	@$(PYTEST) -m "" --hypothesis-profile=thorough

lint: $(VENV)/.installed  ## ruff and pyright
	@$(BIN)/ruff check --quiet $(SOURCES)
	@$(BIN)/ruff format --check --quiet $(SOURCES)
	@$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed  ## measure what recording costs
	@$(BIN)/python experiments/bench_record.py

clean:  ## remove the default environment, the caches and what was built
	@rm -rf .venv build dist *.egg-info .hypothesis .pytest_cache .ruff_cache
	@find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer with venv was found;" \
		"say where one is: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up $(VENV) (once, about a minute)"
	@"$(PYTHON)" -m venv $(VENV)
	@$(PIP) --editable '.[all,test]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # pip would do so on one core
	@touch $@
