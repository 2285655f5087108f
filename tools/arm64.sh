#!/usr/bin/env bash
# Builds the package for Linux on arm64 and runs its tests there, on an emulated processor:
#
#   tools/arm64.sh [COMMAND...]    # a Python command of its own in place of the tests: -m pytest tests/ops/test_ops.py, say
#
# An arm64 Python comes from the distribution's packages, torch from its oldest wheel that the package is for (newer ones
# bring CUDA), all into build/arm64, without root. python3 is one that has the package and what builds it (make build), whose
# results arm64 must have. Needs Debian and: apt-get install qemu-user-static g++-aarch64-linux-gnu
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
here=$PWD/build/arm64
root=$here/root           # the arm64 system
site=$here/site           # torch and what the tests need
tree=$here/tree           # a copy of the sources, with the package built for arm64
python=$root/usr/bin/python
for tool in qemu-aarch64-static aarch64-linux-gnu-g++ apt-get; do
  command -v "$tool" >/dev/null || { echo "tools/arm64.sh needs $tool" >&2; exit 2; }
done

# ---- an arm64 system ------------------------------------------------------------------------------------------------

if [ ! -e "$here/.fetched" ]; then
  rm -rf "$here"
  mkdir -p "$here"/apt/{state/lists/partial,cache/archives/partial} "$root" "$site"
  touch "$here/apt/status"
  cat >"$here/apt.conf" <<END
#clear APT::Architectures;
APT::Architecture "arm64";
APT::Architectures { "arm64"; };
APT::Sandbox::User "";
Dir::State "$here/apt/state";
Dir::State::status "$here/apt/status";
Dir::Cache "$here/apt/cache";
END
  export APT_CONFIG=$here/apt.conf
  apt-get -qq update
  apt-get -qq install --yes --download-only --no-install-recommends python3 libpython3-dev libstdc++6 libgomp1 >/dev/null
  for package in "$here"/apt/cache/archives/*.deb; do dpkg-deb -x "$package" "$root"; done
  version=$(basename "$root"/usr/bin/python3.[0-9]* | cut -c7-)
  # Programs that tests start as sys.executable run on the emulated processor, too.
  cat >"$python" <<END
#!/bin/sh
exec qemu-aarch64-static -L "$root" -0 "$python" "$root/usr/bin/python$version" "\$@"
END
  chmod +x "$python"
  oldest=$(sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml | head -1)
  # pip on another machine would take the dependencies of this one: torch's are named.
  pip=(python3 -m pip install --quiet --target "$site" --only-binary=:all: --python-version "$version")
  for platform in manylinux_2_28 manylinux_2_17 manylinux2014; do pip+=(--platform "${platform}_aarch64"); done
  "${pip[@]}" --no-deps "torch==$oldest.*" "$(grep -o "schedulefree==[0-9.]*" pyproject.toml)"
  "${pip[@]}" filelock typing-extensions "sympy>=1.13.3" networkx jinja2 fsspec numpy pytest hypothesis
  touch "$here/.fetched"
fi

# ---- the package ----------------------------------------------------------------------------------------------------

rm -rf "$tree"
mkdir -p "$tree"
cp -r csrc python tests tools pyproject.toml "$tree"
rm -f "$tree"/python/schedulefree_cpp/*.so
cmake -S . -B "$here/cmake" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ "-DCMAKE_CXX_FLAGS=-idirafter$root/usr/include" -DSCHEDULEFREE_WERROR=ON \
  -DSCHEDULEFREE_PYTHON=ON "-DPython_EXECUTABLE=$python" "-Dpybind11_DIR=$(python3 -m pybind11 --cmakedir)" \
  "-DSCHEDULEFREE_TORCH_ROOT=$site/torch" >/dev/null
cmake --build "$here/cmake" >/dev/null
cmake --install "$here/cmake" --prefix "$tree/python/schedulefree_cpp" >/dev/null
# Its metadata, for which setup.py looks for torch.
PYTHONPATH=$site python3 -c "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare; prepare('$tree/python')" >/dev/null

# ---- its tests ------------------------------------------------------------------------------------------------------

if [ $# = 0 ]; then
  python3 tools/determinism.py --write "$tree/results.pt"
fi
export PYTHONPATH=$tree/python:$site OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive  # threads that spin take hours
cd "$tree"
if [ $# != 0 ]; then
  exec "$python" "$@"
fi
"$python" tools/determinism.py --beside results.pt \
  --only "1 thread" "7 threads" "parameters in another order" "evaluated after every step" "resumed from checkpoints"
"$python" -m pytest -q -p no:cacheprovider tests/facade/test_golden.py tests/ops/test_exact.py tests/ops/test_ops.py \
  -m "not (build or compile or long)"
