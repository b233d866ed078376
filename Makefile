# Everything runs in .venv, made by `make install`; nothing else on the machine is touched.
PYTHON ?= python3.11
BIN := .venv/bin
DEMO_DIR ?= out/demo

.DEFAULT_GOAL := help
.PHONY: help install demo up test test-fast test-families test-templates test-device chaos check format clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: .venv/installed ## Make .venv with the pinned dependencies and the edgekiln command

.venv/installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "EdgeKiln needs Python 3.11: set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: install ## Convert the example checkpoint, prove it, measure it, ask it something
	$(BIN)/python examples/demo.py -o $(DEMO_DIR)

up: install ## Run the embedded profile until Ctrl-C
	$(BIN)/edgekiln up

test: install ## Run every test (about 20 minutes on 2 cores)
	$(BIN)/python -m pytest

test-fast: install ## Run the tests that need no conversion
	$(BIN)/python -m pytest tests/unit tests/contract tests/migration

test-families: install ## Convert and prove every family, and write docs/supported.md (about 10 minutes on 2 cores)
	$(BIN)/python -m pytest tests/families/test_families.py

test-templates: install ## Make and prove a graph template of every family (about half an hour on 2 cores)
	$(BIN)/python -m pytest tests/families/test_templates.py

SERIAL ?=

test-device: install ## Hold an attached phone to what EdgeKiln counts on: SERIAL=... as `adb devices` lists it
	@[ -n "$(SERIAL)" ] || { echo "Name the phone: make test-device SERIAL=..., as adb devices lists it"; exit 1; }
	EDGEKILN_TEST_SERIAL='$(SERIAL)' $(BIN)/python -m pytest -v tests/devices

# What the long form is made of; the same seed plays the same faults.
SEED := $(or $(SEED),$(shell date +%s))
JOBS ?= 2000
RACES ?= 5000
EXAMPLES ?= 300
STORE_JOBS ?= 100
SOAK_MIN ?= 10
OBJECT_BYTES ?= 5368709121
STORM_MIN ?= 0
S3 ?= swift
CHAOS := CHAOS_SEED=$(SEED) CHAOS_JOBS=$(JOBS) CHAOS_RACES=$(RACES) CHAOS_EXAMPLES=$(EXAMPLES) \
	CHAOS_STORE_JOBS=$(STORE_JOBS) CHAOS_SOAK_MIN=$(SOAK_MIN) CHAOS_STORM_MIN=$(STORM_MIN) \
	CHAOS_OBJECT_BYTES=$(OBJECT_BYTES) CHAOS_S3=$(S3)

chaos: install ## Prove by faults, the long form: SEED, JOBS, ... (see docs/reliability.md; hours)
	$(CHAOS) $(BIN)/python -m pytest -v --hypothesis-seed=$(SEED) tests/chaos/test_*.py tests/chaos/soak.py

check: install ## Lint, types, import rules, known vulnerabilities of dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python .ci/audit.py

format: install ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## Remove the environment and what was built
	rm -rf .venv build dist out .pytest_cache .mypy_cache .ruff_cache
