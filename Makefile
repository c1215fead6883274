# `make train` runs the small experiment, `make test` the checks. Both make their own virtual environment first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXPERIMENT ?= experiments/uso_srl.yaml
# Test processes at a time, each of one thread.
JOBS ?= 2
# For example ARGS=--resume, or ARGS="train.num_steps=20 --output runs/short".
ARGS ?=

.PHONY: train test lint types clean

train: $(STAMP)
	$(BIN)/rewardgen train $(EXPERIMENT) $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell

types: $(STAMP)
	$(BIN)/mypy rewardgen

# torch comes first and by its exact version, so that nothing that follows chooses another build of it.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .hypothesis
