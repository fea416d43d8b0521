# Two commands on a fresh machine with Python >= 3.10, pip and make:
#     make demo    learn, export, serve, query and evaluate a policy; ends with a report to look at
#     make test    lint, types, proto drift check and tests
# Everything is installed into .venv, at the versions of requirements.lock.

SHELL := /bin/sh
PYTHON ?= python3
EXTRAS := serve,serve-openvino,train,export,eval,dev,docs
BIN := .venv/bin
READY := .venv/.ready
UV := uv==0.13.9
# Modules are compiled when first imported: that halves the installation. For pip's own lines: make PIP_FLAGS= ...
PIP_FLAGS ?= -qq --no-compile --disable-pip-version-check --no-input

# ONNX Runtime reports its use to its vendor unless told not to.
export ORT_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help demo test pytest test-matrix setup lint format types protos check-protos docs docs-serve lock image clean
.DELETE_ON_ERROR:

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' Makefile

demo: $(READY) ## learn, export, serve, query and evaluate a policy (1 to 4 minutes after installation)
	$(BIN)/python examples/demo.py

# Two at a time: mypy has a core to itself while the longest test, the README's, keeps one worker busy.
test: $(READY) ## everything that must pass: lint, types, proto drift, docs, tests
	@$(MAKE) --no-print-directory -j 2 lint types check-protos docs pytest

pytest: $(READY) ## the tests alone
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-matrix: $(READY) ## the tests as on a fast, a slow and a busy machine: three runs, a line for each
	$(BIN)/python -m tests.matrix -n 2 --dist worksteal

setup: $(READY) ## create or update .venv from the lock

lint: $(READY) ## ruff: rules and format
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check

format: $(READY) ## rewrite what ruff can rewrite
	$(BIN)/python -m ruff check --fix
	$(BIN)/python -m ruff format

types: $(READY) ## mypy, strict
	$(BIN)/python -m mypy

protos: $(READY) ## regenerate rsm_serve/pb from protos/
	$(BIN)/python protos/generate.py

check-protos: $(READY) ## fail if rsm_serve/pb is not what protos/ generates
	$(BIN)/python protos/generate.py --check

# Material's banner advertises its successor; it says nothing of this site.
docs: $(READY) ## build the documentation site into build/site, without warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

docs-serve: $(READY) ## show the documentation site on http://127.0.0.1:8000 while you edit it
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs serve --livereload

image: ## build the container image rsm-serve (Docker, or buildah where no Docker engine runs)
	deploy/image.sh

clean: ## remove environments, caches and build results (runs/ and demo/ stay)
	rm -rf .venv .venv-* .image build dist .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call venv,DIR) makes an empty environment, or says in one sentence why it cannot.
# An existing one is kept: pip then changes only what the lock changed.
define venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
    { echo "make: Python 3.10 or newer is needed, and $(PYTHON) is not; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
    { echo "make: $(PYTHON) cannot create virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
@echo "Installing into $(1), from requirements.lock ..."
@$(PYTHON) -m venv $(1)
endef

# The build backend comes first, from the lock, so that the project itself is built without an isolated
# environment, whose versions no lock would hold.
$(READY): pyproject.toml requirements.lock
	$(call venv,.venv)
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c requirements.lock hatchling editables
	@$(BIN)/python -m pip install $(PIP_FLAGS) -c requirements.lock --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

# Keeps the versions of the present lock where they still fit; `make lock UPGRADE=1` takes the newest.
# The leading comment of requirements.in becomes the lock's header.
lock: ## rewrite requirements.lock from pyproject.toml and requirements.in
	$(call venv,.venv-lock)
	@.venv-lock/bin/python -m pip install $(PIP_FLAGS) $(UV)
	.venv-lock/bin/uv pip compile --quiet --universal --python-version 3.10 $(if $(UPGRADE),--upgrade) \
	    $(foreach extra,$(subst $(comma), ,$(EXTRAS)),--extra $(extra)) \
	    --annotation-style line --no-header -o requirements.lock pyproject.toml requirements.in
	@{ sed '/^$$/q' requirements.in; cat requirements.lock; } > requirements.lock.new
	@mv requirements.lock.new requirements.lock

comma := ,
