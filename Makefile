.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-real test test-full test-slow test-all test-oldest lint format bench docs docs-hooks docs-pictures setup clean

PYTHON ?= python3
JOBS ?= auto
VENV := .venv
BIN := $(VENV)/bin
SPEC := pyproject.toml setup.py constraints.txt
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Workers and the commands that tests start find modules compiled.
unexport PYTHONDONTWRITEBYTECODE

help:
	@echo "make demo        two heads of the bundled toy model read a page: turn them down, on one HTML page"
	@echo "make demo-real   a published model: downloads SmolVLM-256M (0.5 GB), verifies it, ranks the heads that see the picture"
	@echo "make test        every law on its fewest cases (five minutes on two cores, no download, no GPU)"
	@echo "make test-full   the cases that make test leaves out: all families, inputs and switches (a quarter of an hour)"
	@echo "make test-slow   browser, cluster, kills, long fuzzing, notebooks (a quarter of an hour or more)"
	@echo "make test-all    all of them"
	@echo "make test-oldest the tests with the oldest dependencies that pyproject.toml allows"
	@echo "make lint        ruff and pyright"
	@echo "make format      let ruff rewrite what it can"
	@echo "make bench       timings and memory, side by side with transformers (half an hour)"
	@echo "make docs        the documentation as a site, in out/site"
	@echo "make docs-hooks  regenerate the generated pages (hooks, checkpoints, transformerlens, architecture)"
	@echo "make docs-pictures  run the gallery, the notebooks and the demo's picture again (three minutes)"
	@echo "make setup       everything a developer needs, pre-commit hooks included"
	@echo "make clean       remove .venv and all that was built"

demo: $(VENV)/.installed
	$(BIN)/hooked-vlm demo --model toy-qwen2-vl --out out/demo

demo-real: $(VENV)/.installed
	$(BIN)/python -m tools.real_demo --out out/demo-real

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal

test-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --further --numprocesses $(JOBS) --dist worksteal

# One at a time: these are large.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest --full -m slow --run-slow --exitfirst

test-all: test test-full test-slow

# What needs no reference, for the oldest transformers is none (docs/references.md), and parity of the families on which it
# agrees. Shapes are not executed: the oldest jaxtyping cannot share a process with the tests' own imports.
test-oldest:
	$(PYTHON) -m venv out/oldest
	out/oldest/bin/python -m pip install --quiet --constraint constraints-oldest.txt --editable . \
	  pytest pytest-xdist hypothesis beartype peft
	out/oldest/bin/python -m pytest --numprocesses $(JOBS) --override-ini addopts='-ra --import-mode=importlib' \
	  tests/activations tests/analysis tests/model/test_generation.py tests/patching tests/steering tests/sweeps \
	  tests/test_lens.py tests/viewer/test_view.py
	out/oldest/bin/python -m pytest --numprocesses $(JOBS) --override-ini addopts='-ra --import-mode=importlib' \
	  tests/model/test_parity.py -k 'not (gemma3 or paligemma or onevision or dynamic)'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(VENV)/.installed-dev
	@set -e; for name in forward families overhead scoring sweeps memory loading peers regression mask_designs lab figure; do \
	  echo "== $$name"; PYTHONPATH=. $(BIN)/python "benchmarks/$$name.py"; done

docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

docs-hooks: $(VENV)/.installed-dev
	$(BIN)/python -m tools.hook_page
	$(BIN)/python -m tools.tool_page
	$(BIN)/python -m tools.checkpoint_page
	$(BIN)/python -m tools.family_page
	$(BIN)/python -m tools.architecture_page

docs-pictures: $(VENV)/.installed-dev
	$(BIN)/python -m tools.gallery
	$(BIN)/python -m tools.notebooks
	HOOKED_VLM_SCREENSHOTS=docs/pictures $(BIN)/python -m pytest --run-slow tests/experiments/demo -k photographed

setup: $(VENV)/.installed-dev
	$(BIN)/pre-commit install

clean:
	rm -rf $(VENV) build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Development installs include what the demo needs, so that either order of the two works and a repeat is instant.
$(VENV)/.installed-dev: $(SPEC) | $(BIN)/python
	$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.installed $@

$(VENV)/.installed: $(SPEC) | $(BIN)/python
	$(INSTALL) --editable .
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "hooked_vlm needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
	  echo "Install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
