#!/usr/bin/env bash
# Runs the Python tests of the operators on a library that was built with AddressSanitizer.
#
#   tools/asan_python.sh BUILD PYTHON [PYTEST ARGUMENTS]
#
# BUILD is a build folder configured with -DSCHEDULEFREE_SANITIZE=ON (make test-asan). The package is copied beside
# it, with that library in the place of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build=$1 python=$2
shift 2
package=$build/python/schedulefree_cpp
rm -rf "$package"
mkdir -p "$package"
cp -r python/schedulefree_cpp/. "$package"
cp "$build/libschedulefree_cpp.so" "$package"
# Python and torch leak by design, and torch throws through code that is not instrumented.
export ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so)" \
  PYTHONPATH="$build/python" OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider \
  tests/ops/test_ops.py tests/ops/test_checks.py tests/facade/test_fuzz.py tests/facade/test_clipping.py -m "not (long or compile)" "$@"
