# `make help` lists the verbs. A fresh machine needs Python 3.11 or newer and nothing else.
# Another interpreter: make demo PYTHON=python3.12      Another place for the packages: make demo VENV=/tmp/venv

PYTHON ?= python3
VENV ?= .venv
OUT ?= runs/demo
JOBS ?= 2
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint types bench bench-sparse bench-quality bench-context docs

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed, $(PYTHON) is older; name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# A stamp for each set of packages: a second call installs nothing until the pins change.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo  ## train a tiny reasoning model on the CPU and write its report
	$(BIN)/rorqual run configs/r1_zero/tiny.toml --out $(OUT)
	$(BIN)/rorqual report $(OUT)

test: $(VENV)/.installed-dev  ## run every test that ends in seconds
	$(BIN)/python -m pytest -n $(JOBS)

test-slow: $(VENV)/.installed-dev  ## run the slow tests too
	$(BIN)/python -m pytest -n $(JOBS) -m 'not gpu' --timeout 1800

lint: $(VENV)/.installed-dev  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## check types
	$(BIN)/mypy

bench: $(VENV)/.installed-bench  ## time the training step and generation beside their peers
	$(BIN)/python benchmarks/grpo_step.py
	$(BIN)/python benchmarks/generate.py
	$(BIN)/python benchmarks/serve.py

bench-sparse: $(VENV)/.installed-bench  ## time sparse attention and its decoding beside dense attention on the CPU
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/ops.py --kl --tokens 16384 65536
	$(BIN)/python benchmarks/decode.py

bench-quality: $(VENV)/.installed-bench  ## what sparse attention costs in quality: left alone for the better part of an hour
	$(BIN)/python benchmarks/sparse_quality.py --arm nsa & $(BIN)/python benchmarks/sparse_quality.py --arm dsa && wait
	$(BIN)/python benchmarks/sparse_quality.py
	$(BIN)/python benchmarks/recall.py

bench-context: $(VENV)/.installed-dev  ## compare strategies of context management offline
	$(BIN)/python benchmarks/context.py

docs: $(VENV)/.installed-dev  ## write docs/cli.md anew and check every link in the docs
	$(BIN)/python -m rorqual.cli docs > docs/cli.md
	$(BIN)/python -m pytest tests/test_docs.py
