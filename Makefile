# Every target first makes the environment it needs; `make demo` and `make test` need nothing but python3 and make.
#
#   make demo    align the embedded generator, write pictures and a table into a fresh folder under runs/
#   make test    run the tests
#   make lint    ruff, pyright, import-linter
#
# PYTHON       interpreter of the environment                 make test PYTHON=python3.12
# VENV         where the environment is                       make test VENV=/tmp/venv
# TORCH_INDEX  index that torch comes from; the one for CPU builds (its URL is on PyTorch's install page) saves gigabytes:
#                                                             make demo TORCH_INDEX=URL
# TORCH_SPEC   which torch                                    make test TORCH_SPEC=torch==2.13.0

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
TORCH_SPEC ?= torch>=2.11,<2.14

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# The stamps name what was installed, so that another checkout, torch or set of entry points installs again.
KEY := $(shell { cat setup.py pyproject.toml; echo '$(CURDIR) $(TORCH_INDEX) $(TORCH_SPEC)'; } | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.armillary-$(KEY)

.PHONY: demo test lint install clean

demo: $(STAMP)
	@out=runs/demo; n=2; while [ -e $$out ]; do out=runs/demo-$$n; n=$$((n + 1)); done; \
	set -x; $(BIN)/armillary train --gin_file embedded/nft.gin --output_dir $$out

test: $(STAMP)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

install: $(STAMP)

$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.armillary-*
	$(PIP) install --upgrade "pip>=24" "setuptools>=77"
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH_SPEC)"
	$(PIP) install -e ".[serve]"  # tests of the reward service run with it, and are skipped without
	touch $@

$(STAMP)-dev: $(STAMP)
	$(PIP) install -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
