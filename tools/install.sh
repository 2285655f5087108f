#!/usr/bin/env bash
# Installs the package into an environment, editable; shows the compiler's steps, and the rest where it fails:
#
#   tools/install.sh PYTHON
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
PATH=$(cd "$(dirname "$1")" && pwd):$PATH  # cmake and ninja
export PATH
mkdir -p build
"$1" -m pip install --disable-pip-version-check --verbose --no-build-isolation --no-deps --editable . 2>&1 |
  tee build/install.log | sed -un 's/^ *\(\[[0-9]*\/[0-9]*\].*\)/    \1/p'
status=${PIPESTATUS[0]}
if [ "$status" != 0 ]; then tail -50 build/install.log >&2; fi
exit "$status"
