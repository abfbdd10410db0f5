# Every target works on a fresh clone: the virtual environment is made, and made again when its inputs change.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Named after what it was installed from, so that a checkout with other requirements does not pass for this one.
STAMP := $(VENV)/.installed-$(firstword $(shell cat pyproject.toml constraints.txt | cksum))
# Two workers with one thread each: tests are many and small, and some start processes of their own.
PYTEST_ARGS ?= -n 2 --dist worksteal
DEMO_ARGS ?=

.PHONY: demo test test-gpu sanitize lint format types bench clean help

help:
	@echo "make demo      train a small model without and with offload, and compare (about two minutes)"
	@echo "make test      run the test suite"
	@echo "make test-gpu  run the tests that need a CUDA device"
	@echo "make sanitize  compute-sanitizer over those that judge neither times nor memory (long)"
	@echo "make lint      check style and format        make format  apply both"
	@echo "make types     run the type checker"
	@echo "make bench     host cost of a saved tensor, beside save_on_cpu"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
# torch alone and first: nothing that comes after may choose another build of it.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation \
		-e '.[demo,test,lint]'
	rm -f $(VENV)/.installed-*
	touch $@

$(VENV): $(STAMP)

demo: $(STAMP)
	$(BIN)/lighterage demo $(DEMO_ARGS)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu

sanitize: $(STAMP)
	PYTHON=$(BIN)/python benchmarks/sanitize.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m benchmarks.overhead

clean:
	rm -rf $(VENV) build dist demo-out src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
