# setup: environment and native build; test: fast and slow tests; test-thorough: what takes many more examples; faults:
# those that inject faults, and their report; lint: every static check; demo: the whole loop; cuda-all: GPU kernels for
# every architecture; gpu-check: tests and measures them with what the machine has (ARGS=--dry-run: where there is none).
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUNDLE ?= $(wildcard demo/bundles/v2)
REPORT ?= build/faults
STAMP := $(VENV)/.ready
NATIVE := $(shell find kernels -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cmake' -o -name 'CMakeLists.txt' 2>/dev/null)

.PHONY: setup build test test-fast test-thorough faults lint format bench cuda-all gpu-check demo clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt CMakeLists.txt scripts/setup.sh scripts/ort_headers.sh $(NATIVE)
	@PYTHON=$(PYTHON) scripts/setup.sh
	@touch $@

build:
	@PYTHON=$(PYTHON) scripts/setup.sh && touch $(STAMP)

# Tests that start whole fleets come last and alone: they are measured in seconds of a user's patience.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not alone and not thorough"
	$(BIN)/python -m pytest -q -m alone

test-thorough: setup
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m thorough

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow and not thorough"

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

# The GPU kernels for every architecture that this nvcc knows; `make setup` builds those of three.
cuda-all: setup
	$(BIN)/cmake -G Ninja -S . -B build/cuda-all -DSKERRY_CUDA_ARCHS=all -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
		-DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja > /dev/null
	$(BIN)/cmake --build build/cuda-all --target skerry_cuda

gpu-check:
	@PYTHON=$(PYTHON) scripts/gpu_check.sh $(ARGS)

demo: setup
	$(BIN)/skerry demo

clean:
	rm -rf build .dev demo $(VENV)
