# Every target does its own set-up: `make demo` and `make test` work on a fresh checkout.
SHELL := bash
PY := .venv/bin/python
export PYTHON
# One thread a process: tests and workers run side by side.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.DEFAULT_GOAL := help
.PHONY: help setup demo test check test-gpu bench docs clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: ## Make .venv with the tested versions (PYTHON=… chooses the interpreter)
	@tools/setup.sh

demo: setup ## Search, aggregate, extrapolate, pretrain two models, report (ARGS="--text PATH… --output DIR")
	@$(PY) tools/demo.py $(ARGS)

test: setup ## All tests that run without a GPU, two at a time
	@$(TEST_ENV) $(PY) -m pytest -n 2 --dist loadfile $(ARGS)

check: setup ## Lint, format and types
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

test-gpu: setup ## Tests that need a CUDA GPU
	@$(PY) -m pytest -m "gpu or multigpu" $(ARGS)

bench: setup ## Measure training throughput on this machine (ARGS="--quick")
	@.venv/bin/composer-megatron bench training $(ARGS)

docs: setup ## Build the documentation into site/
	@.venv/bin/python -m pip install -qq --disable-pip-version-check mkdocs
	@.venv/bin/mkdocs build --strict

clean: ## Remove caches and built pages; keeps .venv and runs/
	@rm -rf build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
