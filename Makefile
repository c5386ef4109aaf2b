PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help demo test check bench tutorials docs clean
.DELETE_ON_ERROR:

help:  ## Say what there is to make
	@sed -nE 's/^([a-z]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(VENV)/.all  ## Fit the flows to two data sets; a table and pictures in demo/
	$(BIN)/python examples/demo.py --out demo

test: check  ## Check, then run every test and every example of the documentation
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -q

check: $(VENV)/.dev  ## Lint, layout of the code, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy -n $(JOBS)

bench: $(VENV)/.bench  ## Run every benchmark, one after another
	set -e; for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file; done

tutorials: $(VENV)/.dev  ## Run every notebook, and write it with its outputs
	OMP_NUM_THREADS=1 $(BIN)/python tutorials/run.py

docs: $(VENV)/.docs  ## Build the documentation into site/, to be read in a browser without a server
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python docs/hooks/links.py site

clean:  ## Remove what was built, the environment included
	rm -rf $(VENV) demo site dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# A stamp for each extra, so that it is installed again only when its requirements have changed. torch comes first: with
# the pinned version in place nothing else pulls in another build of it.
INSTALL := $(BIN)/pip install -q --no-compile -c constraints.txt
# pip compiles one file after another, those of packages' tests too; this on all cores. What does not compile is left.
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
	@touch $(VENV)/.all $@  # dev holds all

$(VENV)/.bench: $(VENV)/.dev
	$(INSTALL) -e '.[bench]'
	$(COMPILE)
	@touch $@

$(VENV)/.docs: $(VENV)/.all
	$(INSTALL) -e '.[docs]'
	$(COMPILE)
	@touch $@
