#!/usr/bin/env bash
# Builds the package for this machine's GPU, tests it there, and measures it beside its rivals.
#
#   tools/gpu_check.sh
#
# Needs Linux with an NVIDIA GPU, nvcc, cmake, ninja, and a Python with a CUDA torch and the modules named below.
# The package is installed into that Python, editable. Environment variables:
#
#   PYTHON      the interpreter; otherwise `python` or `python3` of the active environment
#   OUT         folder for all that is written: logs, summary.txt, benchmark.json. Otherwise logs go to
#               build/gpu_check, and the figures of a full benchmark to benchmarks/results
#   CUDAARCHS   architectures to compile for, such as "80;90"; otherwise that of the GPU
#   STAGES      which of the stages to run; otherwise all: "build tests cpu-tests memcheck racecheck initcheck
#               synccheck diagnostics benchmark"
#   BENCH_ARGS  more arguments for benchmarks/step.py, such as "--only ResNet --rounds 11"
#
# Exit status: 0 if no stage failed, 1 if one did, 2 if something is missing and nothing was run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-$(command -v python || command -v python3 || true)}
STAGES=${STAGES:-build tests cpu-tests memcheck racecheck initcheck synccheck diagnostics benchmark}
BENCH_ARGS=${BENCH_ARGS:-}

# ---- what is missing ---------------------------------------------------------------------------------

# Prints the GPU's architecture, or says on stderr what is missing.
PROBE='
import importlib.util, sys
missing = []
if sys.version_info < (3, 10):
    missing.append(f"python >= 3.10: {sys.executable} is {sys.version.split()[0]}")
for name in ("setuptools", "wheel", "pybind11", "pytest", "hypothesis", "schedulefree", "numpy"):
    if importlib.util.find_spec(name) is None:
        missing.append(f"the Python module {name}: {sys.executable} -m pip install {name}")
try:
    import torch
except ImportError as error:
    missing.append(f"torch: {sys.executable} cannot import it ({error})")
else:
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version < (2, 10):
        missing.append(f"torch >= 2.10: {sys.executable} has {torch.__version__}")
    if torch.version.cuda is None:
        missing.append(f"a torch with CUDA: {torch.__version__} was built without")
    elif not torch.cuda.is_available():
        missing.append(f"a GPU: torch {torch.__version__} sees no CUDA device")
    else:
        print("{}{}".format(*torch.cuda.get_device_capability()))
for line in missing:
    print(f"missing: {line}", file=sys.stderr)
sys.exit(bool(missing))
'

missing=0
if [ -z "$PYTHON" ] || ! PYTHON=$(command -v "$PYTHON"); then
  echo "missing: python >= 3.10, on PATH or as PYTHON=" >&2
  missing=1
else
  # Tools that were installed with pip stand beside the interpreter.
  PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH
  export PATH
  architecture=$("$PYTHON" -c "$PROBE") || missing=1
fi
for tool in nvcc cmake ninja; do
  if ! command -v "$tool" >/dev/null; then
    echo "missing: $tool on PATH" >&2
    missing=1
  fi
done
if [ "$missing" != 0 ]; then
  echo "tools/gpu_check.sh: nothing was run." >&2
  exit 2
fi

# ---- stages ------------------------------------------------------------------------------------------

logs=${OUT:-build/gpu_check}
mkdir -p "$logs"
logs=$(cd "$logs" && pwd)
summary=()
failed=0
built=1

wanted() { [[ " $STAGES " == *" $1 "* ]]; }

not_run() { summary+=("$(printf '%-12s not run: %s' "$1" "$2")"); }

# stage NAME COMMAND...: runs a command, keeps its output, and notes how it ended.
stage() {
  local name=$1 status
  shift
  if ! wanted "$name"; then
    not_run "$name" "not in STAGES"
    return
  fi
  if [ "$built" = 0 ]; then
    not_run "$name" "the build failed"
    return
  fi
  printf '\n==== %s\n' "$name"
  "$@" 2>&1 | tee "$logs/$name.log"
  status=${PIPESTATUS[0]}
  if [ "$status" = 0 ]; then
    summary+=("$(printf '%-12s PASS' "$name")")
  else
    summary+=("$(printf '%-12s FAIL (exit status %s, %s)' "$name" "$status" "$logs/$name.log")")
    failed=1
    if [ "$name" = build ]; then built=0; fi
  fi
}

export SCHEDULEFREE_REQUIRE_CUDA=1

stage build env SCHEDULEFREE_CUDA=1 CUDAARCHS="${CUDAARCHS:-$architecture}" \
  "$PYTHON" -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable . --verbose

stage tests "$PYTHON" -m pytest tests/test_cuda.py -q -p no:cacheprovider

stage cpu-tests "$PYTHON" -m pytest -q -p no:cacheprovider \
  tests/test_ops.py tests/test_checks.py tests/test_library.py tests/test_clipping.py tests/test_optimizers.py \
  tests/test_family.py tests/test_modes.py tests/test_golden.py tests/test_capturable.py tests/test_amp.py

# Every kernel, at sizes around those of vectors, blocks and chunks. One allocation for each tensor, or an access
# behind its end would fall into a neighbour unseen.
SANITIZED='one_tensor_of_any_size or mixed_dtypes or what_is_not_finite or skipped_step
or (swap_as and 0.9) or (misaligned and offsets7) or (operators_schedule and radam) or (scheduled_coefs and 0.1)'
for tool in memcheck racecheck initcheck synccheck; do
  if wanted "$tool" && ! command -v compute-sanitizer >/dev/null; then
    not_run "$tool" "no compute-sanitizer on PATH"
    continue
  fi
  options=(--tool "$tool" --error-exitcode 9 --target-processes all)
  # torch probes the driver with calls that may fail.
  if [ "$tool" = memcheck ]; then options+=(--report-api-errors no); fi
  stage "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer "${options[@]}" \
    "$PYTHON" -m pytest tests/test_cuda.py -q -p no:cacheprovider -k "${SANITIZED//$'\n'/ }"
done

stage diagnostics "$PYTHON" -m schedulefree_cpp

results=()
if [ -n "${OUT:-}" ]; then results=(--json "$logs/benchmark.json"); fi
# shellcheck disable=SC2086 # BENCH_ARGS holds several arguments
stage benchmark "$PYTHON" benchmarks/step.py --device cuda "${results[@]}" $BENCH_ARGS

# ---- summary -----------------------------------------------------------------------------------------

{
  printf '\n==== summary\n'
  printf '%s\n' "${summary[@]}"
  if [ "$failed" = 0 ]; then echo "no stage failed"; else echo "a stage failed"; fi
} | tee "$logs/summary.txt"
exit "$failed"
