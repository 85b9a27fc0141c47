# make demo   three stages on handwritten digits, then the model reads digits it has never seen
# make test   what CI runs: lint, types, layers, and every test but the slow ones
#
# Every target first makes .venv, and brings it up to date where setup.cfg or constraints.txt changed.
# PYTHON=python3.12 make ... takes another interpreter; pip's own settings and variables are honoured.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

# What Python keeps of megatron-core halves the time of its import: dozens of times in make test.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test test-fast test-full checks bench gpu

help:
	@echo "make demo        train three stages on handwritten digits on the CPU, then read unseen ones"
	@echo "make test        lint, types, layers, and every test but the slow ones"
	@echo "make test-fast   only the tests that start no other process"
	@echo "make test-full   lint, types, layers, and every test"
	@echo "make checks      lint, types and layers"
	@echo "make bench       measure, and print a table"
	@echo "make gpu         where there are GPUs: check and measure all that concerns CUDA, on one page"
	@echo "make install     only make .venv"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: PYTHON=/path/to/python3.11 make $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || \
	  { echo "No virtual environment could be made. On Debian: apt-get install python3-venv"; exit 1; }
	@$(BIN)/pip install --disable-pip-version-check -e '.[dev]' -c constraints.txt || \
	  { echo "The installation failed; the reason stands above. Mend it and type make $(MAKECMDGOALS) again:"; \
	    echo "what was downloaded is kept. Behind a mirror or a proxy, set pip's variables, as PIP_INDEX_URL."; exit 1; }
	@touch $@

demo: $(INSTALLED)
	$(BIN)/python launch/demo.py

checks: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: checks
	$(BIN)/python tests/helpers/side_by_side.py "not slow"

test-fast: $(INSTALLED)
	$(BIN)/python tests/helpers/side_by_side.py --fast

test-full: checks
	$(BIN)/python tests/helpers/side_by_side.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/bench.py

gpu: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_check.py
