# setup: environment and native build; test: fast and slow tests; faults: those that inject faults, and their report;
# lint: every static check; demo: the whole loop.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUNDLE ?= $(wildcard demo/bundles/v2)
REPORT ?= build/faults
STAMP := $(VENV)/.ready
NATIVE := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name 'CMakeLists.txt' 2>/dev/null)

.PHONY: setup build test test-fast faults lint format bench demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt scripts/setup.sh scripts/ort_headers.sh $(NATIVE)
	@PYTHON=$(PYTHON) scripts/setup.sh
	@touch $@

build:
	@PYTHON=$(PYTHON) scripts/setup.sh && touch $(STAMP)

# Tests that start whole fleets come last and alone: they are measured in seconds of a user's patience.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not e2e"
	$(BIN)/python -m pytest -q -m e2e

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow"

faults: setup
	$(BIN)/python -m pytest -q -m faults -p tests.fault_report --fault-report $(REPORT)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'kernels/*.cpp' 'kernels/*.h' 'kernels/*.cu' 'kernels/*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'kernels/*.cpp' 'kernels/*.h' 'kernels/*.cu' 'kernels/*.cuh' | xargs -r $(BIN)/clang-format -i

bench: setup
	@[ -n "$(BUNDLE)" ] || { echo "Error: no bundle to measure. Try: make bench BUNDLE=<directory>" >&2; exit 2; }
	$(BIN)/skerry bench engine $(BUNDLE)

demo: setup
	$(BIN)/skerry demo

clean:
	rm -rf build .dev demo $(VENV)
