# Each target does all its own set-up, in a virtual environment of its own (.venv).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell git ls-files "*.h" "*.cpp" "*.cu" "*.cuh")

.DEFAULT_GOAL := help
.PHONY: help build train test test-asan lint bench clean gtest

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

# The stamp changes when the requirements do.
$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $$(sed -n 's/^# without dependencies: //p' requirements-dev.txt)
	touch $@

build: $(VENV)/.installed  ## Build the package into .venv (editable; rebuilds only what changed)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .

train: build  ## Train on real data and show the result
	$(BIN)/python examples/digits.py

# The system's GoogleTest where there is one or it can be installed; CMake downloads it elsewhere.
gtest:
	@[ -e /usr/include/gtest/gtest.h ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq libgtest-dev >/dev/null; } || true

CONFIGURE_TESTS = PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -G Ninja -DSCHEDULEFREE_TESTS=ON -DSCHEDULEFREE_PYTHON=OFF -DSCHEDULEFREE_CUDA=OFF \
  -DSCHEDULEFREE_TORCH_ROOT="$$($(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')"

test: build gtest  ## Run every test that this machine can run: ctest, pytest, and test-asan
	$(CONFIGURE_TESTS) -B build/tests >/dev/null
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --test-dir build/tests --output-on-failure
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest
	$(MAKE) test-asan

test-asan: build gtest  ## Run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(CONFIGURE_TESTS) -B build/asan -DSCHEDULEFREE_SANITIZE=ON >/dev/null
	$(BIN)/cmake --build build/asan
	ASAN_OPTIONS=detect_stack_use_after_return=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/ctest --test-dir build/asan --output-on-failure

lint: build  ## Check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

bench: build  ## Measure a step beside its rivals
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/step.py

clean:  ## Remove everything that was built
	rm -rf build dist $(VENV) python/schedulefree_cpp/*.so python/*.egg-info
