# Every target makes the environment it needs (.venv) and is safe to rerun.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
CONFIG ?= examples/configs/quickstart.yaml
SHARED := --numprocesses 3 --dist loadfile --no-loadscope-reorder
export PYTHONUNBUFFERED := 1

.PHONY: help env quickstart test lint types docs prove bench

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

env:  ## make .venv: torch, the pinned dependencies, the C++ extension
	@$(PYTHON) tools/setup_environment.py --folder $(VENV)

quickstart: env  ## raw media to a trained model, generated samples and a report, on a CPU in minutes
	$(RUN) tools/quickstart.py --config $(CONFIG)

test: export OMP_NUM_THREADS := 1
test: env  ## the test suite, fast tests first
	$(RUN) -m pytest -m "not slow" $(SHARED)
	$(RUN) -m pytest -m slow $(SHARED)

lint: env  ## style of code
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: env  ## strict types of the package
	$(RUN) -m mypy

docs: env  ## build the documentation site; a broken link or reference fails
	$(RUN) -m mkdocs build --strict --quiet

prove: env  ## a long proof: make prove NAME=sample-world (see docs/development/proofs.md)
	@test -n "$(NAME)" || { echo "error: NAME is empty; choose one of: $$(ls tests/proofs | grep -v __ | sed 's/\.py//' | tr '_\n' '- ')" >&2; exit 2; }
	$(RUN) tests/proofs/$(subst -,_,$(NAME)).py $(ARGS)
