# Each target does all its own set-up, in a virtual environment of its own (.venv).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES = $(shell git ls-files "*.h" "*.cpp" "*.cuh")

.DEFAULT_GOAL := help
.PHONY: help build train check test test-long test-asan test-asan-python test-tsan lint format docs coverage bench wheels studies clean gtest \
  doxygen configure-tests

help:  ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "make %-16s %s\n", $$1, $$2}'

PIP = $(BIN)/python -m pip --disable-pip-version-check
STAGE = @tools/stage.sh

# What `make train` needs, and what all other targets need. The stamps change when the requirements do.
$(VENV)/.train: requirements-train.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make needs Python 3.11 or newer, for its tools: make PYTHON=python3.12, say (the package itself runs from 3.10 on)" >&2; exit 1; }
	@echo "Into $(VENV) go torch (0.8 GB without CUDA; with CUDA, as PyPI has it, several) and 0.6 GB of other packages."
	$(STAGE) "Making the environment $(VENV)" $(PYTHON) -m venv $(VENV)
	$(STAGE) "Installing what training needs (minutes)" $(PIP) install -r requirements-train.txt
	@touch $@

$(VENV)/.installed: requirements-dev.txt $(VENV)/.train
	@echo "Into $(VENV) go 2 GB of tools and of frameworks that tests run."
	$(STAGE) "Installing what the tests and the tools need (minutes)" $(PIP) install -r requirements-dev.txt
	$(STAGE) "Installing what brings no dependencies" $(PIP) install --no-deps \
	  $$(sed -n 's/^# without dependencies: //p' requirements-dev.txt)
	@touch $@

# Warnings are errors for who changes the sources, and for nobody else.
build: $(VENV)/.installed  ## Build the package into .venv (editable; rebuilds only what changed)
	$(STAGE) "Building the package" env SCHEDULEFREE_CMAKE_ARGS="-DSCHEDULEFREE_WERROR=ON $$SCHEDULEFREE_CMAKE_ARGS" tools/install.sh $(BIN)/python

train: $(VENV)/.train  ## Train on real data and show the result
	$(STAGE) "Building the package (two to three minutes on two cores)" tools/install.sh $(BIN)/python
	$(STAGE) "Training on handwritten digits (a minute)" $(BIN)/python examples/digits.py

# The system's GoogleTest where there is one or it can be installed; CMake downloads it elsewhere.
gtest:
	@[ -e /usr/include/gtest/gtest.h ] || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq libgtest-dev >/dev/null; } || true

CONFIGURE_TESTS = PATH="$(CURDIR)/$(BIN):$$PATH" cmake -S . -G Ninja -DSCHEDULEFREE_TESTS=ON -DSCHEDULEFREE_PYTHON=OFF \
  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
  -DSCHEDULEFREE_TORCH_ROOT="$$($(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)')"

# Each process has one thread, or they would wait for each other's.
PYTEST = PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
  --numprocesses auto --maxprocesses 8 --dist loadgroup
configure-tests: build gtest
	$(CONFIGURE_TESTS) -B build/tests >/dev/null

check: configure-tests  ## Run the tests for after every edit: two minutes at most
	$(BIN)/cmake --build build/tests --target schedule_test storage_test update_math_test
	$(BIN)/ctest --parallel 2 --test-dir build/tests --output-on-failure --tests-regex "^(schedule|storage|update_math)_test\."
	$(PYTEST) -m "not (build or compile or distributed or frameworks or cuda or long)"

test: configure-tests  ## Run ctest and pytest: everything that this machine can run, but for the long tests
	$(BIN)/cmake --build build/tests
	$(BIN)/ctest --parallel 2 --test-dir build/tests --output-on-failure
	$(PYTEST) -m "not long"

test-long: configure-tests test-asan test-asan-python test-tsan  ## Run the long tests: full matrices, long forms, sanitizers
	$(BIN)/cmake --build build/tests
	SCHEDULEFREE_LONG_TESTS=1 $(BIN)/ctest --parallel 2 --test-dir build/tests --output-on-failure
	SCHEDULEFREE_LONG_TESTS=1 $(PYTEST) -m long

# Without a stack of AddressSanitizer's own, on which GCC 12 aligns the arrays of AVX-512 wrongly (GCC bug 110027).
test-asan: build gtest  ## Run the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(CONFIGURE_TESTS) -B build/asan -DSCHEDULEFREE_SANITIZE=ON >/dev/null
	$(BIN)/cmake --build build/asan
	ASAN_OPTIONS=detect_stack_use_after_return=0:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/ctest --parallel 2 --test-dir build/asan --output-on-failure

test-asan-python: test-asan  ## Run the operators' Python tests with AddressSanitizer
	tools/asan_python.sh build/asan $(BIN)/python

# One thread in torch's pool: libgomp, which is not instrumented, would look like a race.
test-tsan: build gtest  ## Run the C++ optimizers in threads under ThreadSanitizer
	$(CONFIGURE_TESTS) -B build/tsan -DSCHEDULEFREE_SANITIZE=THREAD >/dev/null
	$(BIN)/cmake --build build/tsan --target fuzz_test
	OMP_NUM_THREADS=1 TSAN_OPTIONS=halt_on_error=1:suppressions=tests/cpp/tsan.supp build/tsan/tests/cpp/fuzz_test --gtest_filter="Threads.*:Sequences.*"

lint: $(VENV)/.installed  ## Check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.installed  ## Format all sources, and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

# The system's Doxygen where there is one or it can be installed.
doxygen:
	@command -v doxygen >/dev/null || [ "$$(id -u)" != 0 ] || ! command -v apt-get >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends doxygen >/dev/null; }
	@command -v doxygen >/dev/null || { echo "make docs: the C++ reference needs doxygen, which is not installed" >&2; exit 1; }

docs: build doxygen  ## Build the documentation site into build/docs; warnings are errors
	mkdir -p build
	doxygen docs/Doxyfile
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -d build/doctrees docs build/docs

# A copy of the package whose libraries count, and so have no vectors. Without ctest's programs that build the package
# once more. The operators' tests run again in one process: pytest-xdist kills those that are slow to end, counts and all.
VECTORISED = tests/ops/test_isa.py::test_the_loops_of_adamw_are_vectorised
COUNTING = $(CURDIR)/build/coverage/python
coverage: build gtest  ## Measure which lines the tests reach, in Python and in C++
	$(CONFIGURE_TESTS) -B build/coverage -DSCHEDULEFREE_PYTHON=ON -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS="--coverage -O1" -DSCHEDULEFREE_WERROR=OFF >/dev/null
	find build/coverage -name "*.gcda" -delete -or -name ".coverage*" -delete
	$(BIN)/cmake --build build/coverage
	$(BIN)/ctest --parallel 2 --test-dir build/coverage --output-on-failure --exclude-regex consumer
	rm -rf $(COUNTING) && cp -r python $(COUNTING)
	$(BIN)/cmake --install build/coverage --prefix $(COUNTING)/schedulefree_cpp --strip >/dev/null
	PYTHONPATH=$(COUNTING) $(PYTEST) -m "not (build or cuda or long)" --cov --deselect $(VECTORISED)
	PYTHONPATH=$(COUNTING) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not (build or compile or long)" --deselect $(VECTORISED) \
	  $(addprefix tests/ops/test_,checks.py formats.py isa.py ops.py) $(addprefix tests/facade/test_,clipping.py family.py fuzz.py) \
	  tests/repository/test_diagnostics.py
	$(BIN)/gcovr --root . --filter csrc/ --merge-lines build/coverage

bench: build  ## Measure a step beside its rivals
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python benchmarks/step.py

wheels:  ## Build a manylinux wheel for each Python that is here, and test each on the oldest and the newest torch
	tools/wheels.sh

studies: build  ## Run what is missing of the studies of docs/studies.md: all of them take about five CPU hours
	for name in convex digits anytime averaging sensitivity gpt; do $(BIN)/python studies/$$name.py || exit 1; done

clean:  ## Remove everything that was built
	rm -rf build dist $(VENV) docs/api/generated python/schedulefree_cpp/*.so python/*.egg-info
