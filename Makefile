# make run   set up, run the whole pipeline on the bundled photographs, say where the report is
# make test  set up, run the tests
SHELL := /bin/bash
# The newest that is there and works: a version manager leaves commands that only print an error.
PYTHON ?= $(firstword $(foreach name,python3.13 python3.12 python3.11 python3,\
  $(shell $(name) -c 'import ensurepip, sys, venv; 11 <= sys.version_info[1] <= 13 and print(sys.executable)' 2>/dev/null)))
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.ready-dev
# Programs of an environment hold its place: those of a clone that was moved or copied start the other
# clone's Python, or none. The shell finds the place: pasted into its command, a folder's name such
# as `a$(b)` would be run.
MOVED := $(shell test ! -L $(VENV) -a -f $(BIN)/ultraflux && \
  ! head -n 3 $(BIN)/ultraflux | grep -qF "$$(cd $(VENV) && pwd -P)/" && echo moved)
# A link is somebody's own arrangement: nothing is installed through it, and this clone's code stands
# before what is installed there.
LINKED := $(shell test ! -L $(VENV) || echo linked)
ifdef LINKED
  export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
endif
# Tests wait a quarter of their time, for servers and for other processes: three use two cores.
WORKERS ?= 3
ENGINE ?= prefect
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Stages, ranks and tests are processes that import torch: without cached bytecode each of them
# compiles it anew, which costs four times the import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: always run test test-all bench lint services services-down clean setup lock help

help:
	@sed -n '1,2p' Makefile; echo "also: test-all, bench, lint, services, services-down, lock, clean"

# Ended while it was made, an environment may lack pip (as those of `uv venv` do), or hold uv's entry
# without its program.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes

setup: $(READY)

LINK_HAS = $(BIN)/python -c 'import importlib.util, sys; \
  sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13) or not all(map(importlib.util.find_spec, sys.argv[1:])))' $(1) 2> /dev/null || \
  { echo "error: $(VENV) is a link to an environment without Python 3.11 to 3.13 or one of $(1): install them there, or remove the link"; exit 2; }

ifdef LINKED
$(READY): always
	@$(call LINK_HAS,dvc mlflow prefect torch)

$(DEV_READY): always
	@$(call LINK_HAS,dvc mlflow prefect torch pytest xdist hypothesis ruff mypy)
else
$(READY): requirements.lock requirements-bootstrap.lock pyproject.toml $(if $(MOVED),always)
	@$(if $(MOVED),echo "$(VENV) was made for another folder (this clone was moved or copied): making it anew"; rm -rf $(VENV),:)
	@test -x $(BIN)/python || test -n "$(PYTHON)" || \
	  { echo "error: Python 3.11, 3.12 or 3.13 with its module venv is needed: set PYTHON=/path/to/python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "error: $(VENV) has $$($(BIN)/python --version 2>&1), and 3.11 to 3.13 is needed: \`make clean\`, then PYTHON=/path/to/python3.12"; exit 2; }
	@$(BIN)/python -c 'import pip' 2> /dev/null || $(BIN)/python -m ensurepip > /dev/null
	@echo "Installing the locked packages into $(VENV)"
	@$(PIP_INSTALL) -r requirements-bootstrap.lock
	@$(BIN)/uv --version > /dev/null 2>&1 || $(PIP_INSTALL) --ignore-installed -r requirements-bootstrap.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $(READY)

$(DEV_READY): $(READY) requirements-dev.lock
	@echo "Installing the locked test tools and optional libraries into $(VENV)"
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements-dev.lock
	@touch $(DEV_READY)
endif

run: $(READY)
	@$(BIN)/ultraflux run --engine $(ENGINE)

# Files in the order of tests/conftest.py, the longest first: xdist's own order is by the number of
# tests, and a pipeline of five minutes behind one of them would come last, on one worker alone.
IN_ORDER = --dist loadfile --no-loadscope-reorder

test: $(DEV_READY)
	@$(BIN)/python -m pytest -q -n $(WORKERS) $(IN_ORDER) -m "not slow"

test-all: $(DEV_READY)
	@HYPOTHESIS_PROFILE=explore $(BIN)/python -m pytest -q -n $(WORKERS) $(IN_ORDER)

bench: $(DEV_READY)
	@$(BIN)/python benchmarks/bench.py

lint: $(DEV_READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

# SERVED=1: on PostgreSQL; its drivers are among the optional libraries.
services: $(if $(SERVED),$(DEV_READY),$(READY))
	@$(BIN)/ultraflux up $(if $(SERVED),--served)

services-down: $(READY)
	@$(BIN)/ultraflux down

# Only for maintainers: resolve pyproject.toml anew.
COMPILE = $(BIN)/uv pip compile -q pyproject.toml --universal --upgrade --python-version 3.11 \
  --generate-hashes --no-header --no-annotate
# The lock is for the environments of [tool.uv] in pyproject.toml alone; uv would repeat their
# markers on every line.
MARKERS = implementation_name == 'cpython' and platform_machine == 'x86_64' and \
  platform_python_implementation == 'CPython' and sys_platform == 'linux'
lock: $(READY)
	$(COMPILE) --extra dev -o requirements-dev.lock
	$(COMPILE) -c requirements-dev.lock -o requirements.lock
	sed -i -E "s/ and $(MARKERS)//; s/ ; python_full_version < '3\.14'( \\\\)$$/\1/" requirements*.lock

# Also runs of working trees: sets of a sweep, submissions. The program of a moved environment would not
# start: its Python does. It finds servers whose notes (runs/services) have gone, too.
clean:
	@for lock in runs/clone.lock runs/*/*/runs/clone.lock runs/*/*/*/runs/clone.lock; do \
	  test ! -e "$$lock" || flock -n "$$lock" true || \
	  { echo "error: a run works in this clone: end it first"; exit 2; }; done
	@test ! -x $(BIN)/ultraflux -a ! -d runs/services || \
	  { test -x $(BIN)/python && PYTHONPATH="$$PWD" $(BIN)/python -m flows.entry down; } || test ! -d runs/services || \
	  { echo "error: servers of this clone may run and cannot be stopped: \`make setup\`, or end them and remove runs/services"; exit 2; }
	@unsent=0; for run in runs/records/*/run.json; do \
	  test ! -e "$$run" -o -e "$${run%run.json}mlflow.json" || unsent=$$((unsent + 1)); done; \
	  test ! -d runs || echo "runs/ goes: databases, secrets, checkpoints and records of runs, $$unsent of which MLflow never had"
	rm -rf $(if $(LINKED),,$(VENV)) runs .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
