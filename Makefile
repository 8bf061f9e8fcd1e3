# One command each for a person with Python 3.11 to 3.13 and make, and nothing else. `make` lists them.

# The newest supported Python that runs and can make environments: one that is found may do neither (pyenv's shims of
# versions that are not active end with an error, Debian keeps ensurepip in a package of its own).
PYTHON  ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
  $$p -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && \
  command -v $$p && break; done)
VENV    ?= .venv
EXTRAS  ?= test,lint
DOCS_VENV ?= .venv-docs
ZOOS_VENV ?= .venv-zoos
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
WORKDIR ?= runs/demo
ARGS    ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
# A file's tests stay together: what its fixtures made is made once.
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP   := $(BIN)/python -m pip --disable-pip-version-check

# Data sets beside the checkout are used unless COMPRESSX_DATA names others.
ifndef COMPRESSX_DATA
ifneq ($(wildcard ../shared/data),)
export COMPRESSX_DATA := $(abspath ../shared/data)
endif
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help env demo test test-all test-zoos lint types package tables docs bench peers clean

help:  ## list these commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(MAKEFILE_LIST) | expand -t 18
	@echo "  Variables: PYTHON, VENV, EXTRAS ($(EXTRAS)), WORKERS ($(WORKERS)), WORKDIR ($(WORKDIR)), ARGS (for pytest and demo), COMPRESSX_DATA"

env: $(STAMP)  ## make the pinned environment in .venv, where it is missing or out of date
	@test "$(origin PYTHON)" = file || test "$$("$(PYTHON)" --version)" = "$$($(BIN)/python --version)" || { echo "$(VENV) holds $$($(BIN)/python --version), and PYTHON=$(PYTHON) is $$("$(PYTHON)" --version). Remove it, or name another folder: make PYTHON=$(PYTHON) VENV=.venv-other" >&2; exit 1; }

$(STAMP): setup.cfg pyproject.toml $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "No Python 3.11 to 3.13 was found that runs and has venv and ensurepip (python3.11-venv on Debian). Install one, or name one: make PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	  || { echo "$(PYTHON) does not run, or is not Python 3.11 to 3.13. Name another: make PYTHON=/path/to/python" >&2; exit 1; }
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV) \
	  || { rm -rf $(VENV); echo "$(PYTHON) cannot make an environment: its venv and ensurepip modules are needed (python3.11-venv on Debian)." >&2; exit 1; }
	@echo "Installing the pinned environment into $(VENV): a minute or two."
	@$(PIP) install -qq -c $(CONSTRAINTS) pip setuptools
	@$(PIP) install -qq -c $(CONSTRAINTS) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

demo: env  ## train, compress, pack and report a small network on the embedded data set; again to resume
	$(BIN)/python -m experiments.cnn --config=configs/cnn.py:digits --workdir=$(WORKDIR) $(ARGS)
	@echo "Report: $(abspath $(WORKDIR))/report.html"

test: env  ## run the default test suite
	$(PYTEST) $(ARGS)

test-all: env  ## run every test, the slow ones too, compiled as for users, with more examples per property
	COMPRESSX_TEST_OPTIMIZE=1 $(PYTEST) -m '' --hypothesis-profile=thorough $(ARGS)

# tunix asks for safetensors below the pinned one; what only these packages need is not pinned.
test-zoos:  ## take other people's networks through the whole path, in an environment of their own
	@mkdir -p build && grep -v '^safetensors==' constraints.txt > build/constraints-zoos.txt
	@$(MAKE) --no-print-directory env VENV=$(ZOOS_VENV) EXTRAS=zoos,test CONSTRAINTS=build/constraints-zoos.txt
	COMPRESSX_ZOOS=1 $(ZOOS_VENV)/bin/python -m pytest -q tests/zoos $(ARGS)

lint: env  ## check the code with ruff
	$(BIN)/python -m ruff check .

types: env  ## check the types with mypy
	$(BIN)/python -m mypy

package:  ## build wheel and sdist into dist/, install each in fresh environments, and use them there
	"$(PYTHON)" .ci/package.py $(ARGS)

tables: env  ## rebuild README's tables from docs/results
	$(BIN)/python -m experiments.common.report.tables

docs:  ## build the site in build/docs, in an environment of its own; notebooks run, and any warning ends it
	@$(MAKE) --no-print-directory env VENV=$(DOCS_VENV) EXTRAS=docs
	$(DOCS_VENV)/bin/python -m sphinx -b html -E -a -q -W --keep-going docs build/docs $(ARGS)
	@echo "Site: $(abspath build/docs)/index.html"

bench: env  ## list the benchmarks and how to run them
	@echo "Install what they compare with:  make peers"
	@$(BIN)/python -c 'import ast, pathlib; \
	[print(f"$(BIN)/python -m benchmarks.{p.stem:20} # {(ast.get_docstring(ast.parse(p.read_text())) or str()).split(chr(10))[0]}") \
	for p in sorted(pathlib.Path("benchmarks").glob("[!_]*.py"))]'

peers: env  ## install the engines that the benchmarks compare with, one by one, and say what failed and why
	$(BIN)/python -m benchmarks.install_peers $(ARGS)

clean:  ## remove caches and build outputs; keeps .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
