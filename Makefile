# `make demo` and `make test` do all the set-up they need, once.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test test-all mutants lint types lock clean

PYTHON := .venv/bin/python
# The compile-only CUDA wheels come without cuDNN: JAX would log an error and fall back to the CPU, so it is told to take the CPU at once.
# A JAX_PLATFORMS of the user's, or a GPU with the wheels of lcx[cuda], has its way.
SITE := .venv/lib/python3*/site-packages
CPU_ONLY = if compgen -G '$(SITE)/jax_cuda13_plugin' >/dev/null && ! { [ -e /dev/nvidia0 ] && compgen -G '$(SITE)/nvidia/cudnn' >/dev/null; }; \
  then export JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu}; fi
ARGS ?=

help:
	@echo 'make demo      set up, then sweep SmolLM2-135M over the recipes into runs/smollm2_quick (ARGS=... for its flags)'
	@echo 'make test      set up, then run the tests (ARGS=... for pytest); make test-all has the full counts'
	@echo 'make setup     the set-up of demo alone; make setup-test also what tests, lint and types need'
	@echo 'make mutants   put each seeded fault of tests/mutants/ into a copy and run its tests (ARGS=--methods=h2o,snapkv or --changed)'
	@echo 'make lint      ruff; make types: pyrefly; make lock: write requirements/ anew; make clean: remove .venv and caches'

setup:
	@scripts/setup.sh

setup-test:
	@scripts/setup.sh test

demo: setup
	@$(CPU_ONLY); $(PYTHON) -m experiments.sweep --config=configs/smollm2_quick.py --workdir=runs/smollm2_quick --isolate=none $(ARGS)

test: setup-test
	@$(CPU_ONLY); $(PYTHON) -m pytest -n 2 $(ARGS)

test-all: setup-test
	@$(CPU_ONLY); $(PYTHON) -m pytest -n 2 -m 'not gemma' --timeout=3600 $(ARGS)
	@$(CPU_ONLY); $(PYTHON) scripts/mutants.py

mutants: setup-test
	@$(CPU_ONLY); $(PYTHON) scripts/mutants.py $(ARGS)

lint: setup-test
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

types: setup-test
	@.venv/bin/pyrefly check --python-interpreter-path $(PYTHON)

# Writes requirements/ from pyproject.toml.  Needs uv on the PATH, or UV=path.  Pins stay where they can; `make lock LOCK=--upgrade` renews
# them.  The files hold packages, versions and hashes, for Python >= 3.12: no host, no index, no path.  requirements/model.txt is written
# by hand: one wheel, whose own dependencies (a C++ build) must never be installed.
UV ?= uv
JAX_VERSION ?= 0.11.2
LOCK ?=
COMPILE = $(UV) pip compile --quiet --universal --python-version 3.12 --generate-hashes --no-header --no-annotate $(LOCK)
lock:
	@scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; \
	printf '%s\n' 'jax==$(JAX_VERSION)' 'jax-cuda13-plugin==$(JAX_VERSION)' 'jax-cuda13-pjrt==$(JAX_VERSION)' >"$$scratch/pins.txt"; \
	printf '%s\n' hatchling editables >"$$scratch/build.in"; \
	$(COMPILE) pyproject.toml "$$scratch/build.in" -c "$$scratch/pins.txt" -o requirements/run.txt >/dev/null; \
	in_run=$$(sed -n 's/^\([A-Za-z0-9._-]*\).*==.*/--no-emit-package \1/p' requirements/run.txt); \
	$(COMPILE) pyproject.toml --extra test --extra plan --extra slurm --extra parquet --extra notebooks -c "$$scratch/pins.txt" -c requirements/run.txt $$in_run \
	  -o requirements/test.txt >/dev/null; \
	for lock in run test; do grep -v '^ *#' requirements/$$lock.txt >"$$scratch/lock.txt"; cp "$$scratch/lock.txt" requirements/$$lock.txt; done

clean:
	rm -rf .venv build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
