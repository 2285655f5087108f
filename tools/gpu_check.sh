#!/usr/bin/env bash
# Ten minutes of a GPU: builds the package, compares every bit, looks for races, measures and profiles.
#
#   tools/gpu_check.sh
#
# Needs Linux with an NVIDIA GPU, cmake, ninja, a C++ compiler, and a Python with a CUDA torch and the modules named
# below; no CUDA toolkit, and no network. The package is installed into that Python, editable. Stages come in the order
# in which they tell most, and each has a limit of its own, so that none costs the others more. Environment variables:
#
#   PYTHON   the interpreter; otherwise `python` or `python3` of the active environment
#   OUT      folder for what is written, otherwise build/gpu_check: summary.txt, report.txt, benchmark.txt,
#            benchmark.json, and logs.tgz with the output of every stage
#   LIMIT    seconds for everything, otherwise 570
#   JOBS     compilations and test processes at a time, otherwise 8
#   STAGES   which of the stages to run, otherwise all
#   WHEELS   folder with wheels of modules that the Python lacks, such as schedulefree, otherwise .whl
#
# Exit status: 0 if no stage failed, 1 if one did, 2 if something is missing and nothing was run.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

PYTHON=${PYTHON:-$(command -v python || command -v python3 || true)}
LIMIT=${LIMIT:-570}
JOBS=${JOBS:-8}
STAGES=${STAGES:-build first-use smoke compile memcheck racecheck tests serial benchmark ncu synccheck}
WHEELS=${WHEELS:-.whl}

# ---- what is missing ---------------------------------------------------------------------------------

PROBE='
import importlib.util, sys
missing = []
if sys.version_info < (3, 10):
    missing.append(f"python >= 3.10: {sys.executable} is {sys.version.split()[0]}")
for name in ("setuptools", "pybind11", "pytest", "schedulefree"):
    if importlib.util.find_spec(name) is None:
        missing.append(f"the Python module {name}: {sys.executable} -m pip install {name}, or its wheel in WHEELS")
if importlib.util.find_spec("setuptools"):
    from importlib.metadata import version
    if int(version("setuptools").split(".")[0]) < 77:
        missing.append("setuptools >= 77: it is " + version("setuptools"))
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
for line in missing:
    print(f"missing: {line}", file=sys.stderr)
sys.exit(bool(missing))
'

scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
missing=0
if [ -z "$PYTHON" ] || ! PYTHON=$(command -v "$PYTHON"); then
  echo "missing: python >= 3.10, on PATH or as PYTHON=" >&2
  missing=1
else
  # Tools that were installed with pip stand beside the interpreter.
  PATH=$(cd "$(dirname "$PYTHON")" && pwd):$PATH
  export PATH
  if compgen -G "$WHEELS/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --target "$scratch/modules" "$WHEELS"/*.whl
    export PYTHONPATH="$scratch/modules${PYTHONPATH:+:$PYTHONPATH}"
  fi
  "$PYTHON" -c "$PROBE" || missing=1
fi
for tool in cmake ninja; do
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

out=${OUT:-build/gpu_check}
mkdir -p "$out"
out=$(cd "$out" && pwd)
logs=$scratch/logs
mkdir -p "$logs"
: >"$out/summary.txt"
failed=0

# Every stage but first-use shares one cache of kernels, which begins empty.
export SCHEDULEFREE_CPP_CACHE=$scratch/kernels SCHEDULEFREE_REQUIRE_CUDA=1
export MAX_JOBS=$JOBS OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

wanted() { [[ " $STAGES " == *" $1 "* ]]; }
say() { printf '%4s s  %s\n' "$SECONDS" "$*" | tee -a "$out/summary.txt"; }
pack() { tar czf "$scratch/logs.tgz" -C "$logs" . && cp "$scratch/logs.tgz" "$out/logs.tgz"; }

# run NAME SECONDS COMMAND...: at most so long, and so that 15 s remain for packing. Leaves its status in NAME.status.
run() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS - 15)) begin=$SECONDS status
  shift 2
  if ((most > left)); then most=$left; fi
  if ((most < 5)); then
    echo "no time was left" >"$logs/$name.status"
    return
  fi
  timeout -k 5 "$most" "$@" >"$logs/$name.log" 2>&1
  status=$?
  echo "$status" >"$logs/$name.status"
  echo "$((SECONDS - begin))" >"$logs/$name.seconds"
}

# tell NAME: how it ended, with the last line of what it printed.
tell() {
  local name=$1 status how
  status=$(cat "$logs/$name.status")
  case $status in
    0) how=PASS ;;
    124 | 137) how="FAIL (stopped at its limit)" failed=1 ;;
    [0-9]*) how="FAIL ($status)" failed=1 ;;
    *)
      say "$name: not run: $status"
      return
      ;;
  esac
  say "$name: $how, $(cat "$logs/$name.seconds") s: $(grep -vE '^\s*$' "$logs/$name.log" | tail -1 | cut -c1-150)"
  pack
  [ "$status" = 0 ]
}

# stage NAME SECONDS COMMAND...
stage() {
  if ! wanted "$1"; then return 0; fi
  run "$@"
  tell "$1"
}

{
  uname -r
  nvidia-smi
  cmake --version | head -1
  c++ --version | head -1
} >"$logs/machine.log" 2>&1

# A warning of another compiler costs nothing: they are no errors for who installs.
if wanted build; then
  if ! stage build 240 "$PYTHON" -m pip install --disable-pip-version-check --no-build-isolation --no-deps --editable . --verbose; then
    tail -40 "$logs/build.log"
    say "nothing else was run: the build failed"
    exit 1
  fi
fi
"$PYTHON" -m schedulefree_cpp >"$out/report.txt" 2>&1

# In two processes: compiled and proved, then from disk.
FIRST_USE='
import time, torch, schedulefree_cpp
p = torch.nn.Parameter(torch.ones(1000, device="cuda"))
p.grad = torch.ones_like(p)
optimizer = schedulefree_cpp.AdamWScheduleFree([p])
def seconds(what, call):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return f"{what} {1e3 * (time.perf_counter() - begin):.1f} ms"
print(", ".join(seconds(what, getattr(optimizer, call)) for what, call in (
    ("train", "train"), ("first step", "step"), ("second step", "step"), ("first eval", "eval"), ("train", "train"))))
'
stage first-use 60 env SCHEDULEFREE_CPP_CACHE="$scratch/first" bash -c '"$0" -c "$1" && "$0" -c "$1"' "$PYTHON" "$FIRST_USE"
if [ -f "$logs/first-use.log" ]; then say "  at first: $(head -1 "$logs/first-use.log" | cut -c1-150)"; fi

PYTEST=("$PYTHON" -m pytest -v -p no:cacheprovider --tb=short)  # -v: one that is stopped still tells what failed
stage smoke 90 "${PYTEST[@]}" tests/cuda/test_cuda.py -x \
  -k "mixed_dtypes or any_size or skipped_step or (scheduled_coefs and 0.1 and not momentum)"
stage compile 120 "$PYTHON" -m schedulefree_cpp --compile

# Two sanitizers look at our kernels alone, beside the tests; nothing is timed meanwhile. One allocation for each
# tensor, or an access behind its end would fall into a neighbour unseen.
sanitize() {
  local tool=$1 tests=$2 options=()
  if [ "$tool" = memcheck ]; then options=(--report-api-errors no); fi  # torch probes the driver with calls that may fail
  run "$tool" 170 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
    --kernel-regex kns=schedulefree "${options[@]}" "${PYTEST[@]}" tests/cuda/test_cuda.py -k "$tests"
}
SANITIZED=(
  [0]="mixed_dtypes or what_is_not_finite or skipped_step or (misaligned and offsets7 and (24 or float32)) or (strides and 8-bit and expanded and contiguous)"
  [1]="what_is_not_finite or skipped_step or (scheduled_coefs and 0.1 and (8-bit or float32))"
)
beside=()
if ! command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    if wanted "$tool"; then say "$tool: not run: no compute-sanitizer on PATH"; fi
  done
  STAGES=" $STAGES "
  for tool in memcheck racecheck synccheck; do STAGES=${STAGES/ $tool / }; done
fi
if wanted memcheck; then sanitize memcheck "${SANITIZED[0]}" & beside+=($!); fi
if wanted racecheck; then sanitize racecheck "${SANITIZED[1]}" & beside+=($!); fi
workers=()
if "$PYTHON" -c "import xdist" 2>/dev/null; then workers=(-n "$JOBS"); fi
SERIAL="launch or no_memory or takes_no_memory or wait or billion or two_streams or current_stream"
stage tests 200 "${PYTEST[@]}" tests/cuda/test_cuda.py "${workers[@]}" --maxfail=60 -k "not ($SERIAL)"
for process in "${beside[@]}"; do wait "$process"; done
for tool in memcheck racecheck; do
  if wanted "$tool"; then tell "$tool"; fi
done
stage serial 80 "${PYTEST[@]}" tests/cuda/test_cuda.py -k "$SERIAL"

stage benchmark 160 "$PYTHON" benchmarks/step.py --device cuda --brief --seconds 130 --json "$out/benchmark.json"
if [ -f "$logs/benchmark.log" ]; then cp "$logs/benchmark.log" "$out/benchmark.txt"; fi

# Counters of the kernels that are expected to be furthest from a copy.
if wanted ncu && ! command -v ncu >/dev/null; then
  say "ncu: not run: no ncu on PATH"
elif wanted ncu; then
  for row in "bf16, 24 bits, 8-bit moment" "fp32, capturable" "fp32"; do
    name=ncu-${row//[ ,]/}
    run "$name" 60 ncu --clock-control none -k "regex:update_kernel" --launch-skip 3 --launch-count 1 \
      --section SpeedOfLight --section Occupancy --section WarpStateStats --section InstructionStats --section MemoryWorkloadAnalysis \
      "$PYTHON" benchmarks/step.py --device cuda --steps-of "$row"
    tell "$name"
  done
fi
if wanted synccheck; then
  run synccheck 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool synccheck --error-exitcode 9 \
    --kernel-regex kns=schedulefree "${PYTEST[@]}" tests/cuda/test_cuda.py -k "skipped_step or what_is_not_finite"
  tell synccheck
fi

# ---- summary -----------------------------------------------------------------------------------------

"$PYTHON" -m schedulefree_cpp >"$out/report.txt" 2>&1
for log in smoke tests serial; do
  if [ -f "$logs/$log.log" ]; then grep -E "^(FAILED|ERROR)" "$logs/$log.log" | head -20 | cut -c1-200; fi
done | tee -a "$out/summary.txt"
if [ "$failed" = 0 ]; then say "no stage failed"; else say "a stage failed"; fi
pack
exit "$failed"
