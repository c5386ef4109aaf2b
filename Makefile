PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check bench tutorials docs clean
.DELETE_ON_ERROR:

help:  ## List the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.all  ## Fit the flows to two data sets; a table and plots in demo/
	$(BIN)/python examples/demo.py --out demo

test: check  ## Check, then run all tests and the examples of the documentation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

check: $(VENV)/.dev  ## Check lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -n $(JOBS)

bench: $(VENV)/.bench  ## Run all benchmarks, one after another
	set -e; for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file; done

tutorials: $(VENV)/.dev  ## Run all notebooks and store their outputs
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/run.py

docs: $(VENV)/.docs  ## Build the documentation in site/, which needs no server
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/hooks/links.py site

clean:  ## Remove everything that was built, including the environment
	rm -rf $(VENV) demo site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# A stamp for each extra, so that it is reinstalled only when its requirements change. torch is installed first, so that
# no other package pulls in another build of it.
INSTALL := $(BIN)/pip install -q --no-compile -c constraints.txt
# pip would compile on one core, packages' tests included. Files that do not compile are ignored.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x /tests/ $(VENV)/lib || true

$(VENV)/.all: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) torch
	$(INSTALL) -e '.[all]'
	$(COMPILE)
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	$(COMPILE)
	@touch $(VENV)/.all $@  # dev includes all

$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) -e '.[bench]'
	$(COMPILE)
	@touch $@

$(VENV)/.docs: $(VENV)/.all
	$(INSTALL) -e '.[docs]'
	$(COMPILE)
	@touch $@
