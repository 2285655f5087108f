#!/usr/bin/env bash
# Builds examples/cpp as an outside program does, from an installed package, and trains with it:
#
#     consumer.sh wheel|install_prefix SOURCE PYTHON TORCH
#
# The package is the wheel in an environment of its own, or a prefix installed by CMake without Python. TORCH is
# a directory with include/ and lib/. PYTHON builds the wheel, and writes the images to train on.
set -euo pipefail
mode=$1 source=$2 python=$3 torch=$4

export PATH="$(dirname "$python"):$PATH"  # cmake and ninja
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'echo "consumer.sh: line $LINENO failed: $BASH_COMMAND" >&2' ERR

fail() {
  echo "consumer.sh: $*" >&2
  exit 1
}

if [ "$mode" = wheel ]; then
  "$python" -m pip wheel --no-build-isolation --no-deps -q -w "$tmp" "$source"
  "$python" -m venv --without-pip "$tmp/venv"
  packages=$("$tmp/venv/bin/python" -c 'import site; print(site.getsitepackages()[0])')
  "$python" -m zipfile -e "$tmp"/*.whl "$packages"
  # torch beside the package, where CMake looks for it; what torch imports comes from PYTHON.
  ln -s "$torch" "$packages/torch"
  "$python" -c 'import site; print(*site.getsitepackages(), sep="\n")' >"$packages/needs_of_torch.pth"
  cd "$tmp"
  prefix_path=$("$tmp/venv/bin/python" -m schedulefree_cpp --cmake-prefix-path)
  [ "$prefix_path" = "$packages/schedulefree_cpp" ] || fail "the prefix is $prefix_path, not in $packages"
else
  cd "$tmp"
  # torch's own CMake package fails where torch has CUDA and the machine no CUDA toolkit.
  mkdir -p libtorch/share/cmake/Torch
  ln -s "$torch/include" "$torch/lib" libtorch
  echo 'message(FATAL_ERROR "no CUDA toolkit")' >libtorch/share/cmake/Torch/TorchConfig.cmake
  torch=$tmp/libtorch
  cmake -S "$source" -B library -G Ninja -DCMAKE_DISABLE_FIND_PACKAGE_Python=ON "-DCMAKE_PREFIX_PATH=$torch"
  cmake --build library
  cmake --install library --prefix "$tmp/prefix"
  prefix_path="$tmp/prefix;$torch"
fi

cp -r "$source/examples/cpp" example
cat >example/wrapper.cpp <<'EOF'
// Fits a line with torch's RMSprop and LBFGS, made schedule-free.
#include <schedulefree_cpp/wrapper.h>
#include <torch/torch.h>

#include <cstdio>

bool fits(torch::nn::Linear model, torch::optim::Optimizer& base, int steps) {
  schedulefree::Wrapper optimizer(base);
  optimizer.train();
  const auto inputs = torch::randn({64, 4}), outputs = inputs.sum(1, true) + 1;
  const auto loss_of = [&] { return torch::mse_loss(model(inputs), outputs); };
  for (int step = 0; step < steps; ++step)
    optimizer.step([&] {
      optimizer.zero_grad();
      const auto loss = loss_of();
      loss.backward();
      return loss;
    });
  optimizer.eval();
  schedulefree::save_state_dict(optimizer, model, "wrapper.pt");
  schedulefree::load_state_dict(optimizer, model, "wrapper.pt");
  const double loss = loss_of().item<double>();
  std::printf("%g\n", loss);
  return loss < 1e-3;
}

int main() {
  torch::manual_seed(0);
  torch::nn::Linear one(4, 1), other(4, 1);
  torch::optim::RMSprop rmsprop(one->parameters(), torch::optim::RMSpropOptions(0.02));
  torch::optim::LBFGS lbfgs(other->parameters(), torch::optim::LBFGSOptions(1).max_iter(4));
  return fits(one, rmsprop, 1000) && fits(other, lbfgs, 20) ? 0 : 1;
}
EOF
cat >>example/CMakeLists.txt <<'EOF'
add_executable(wrapper wrapper.cpp)
target_link_libraries(wrapper PRIVATE schedulefree_cpp::schedulefree_cpp)
EOF
cmake -S example -B build -G Ninja "-DCMAKE_PREFIX_PATH=$prefix_path" -DCMAKE_EXPORT_COMPILE_COMMANDS=ON
cmake --build build

if [ "$mode" = wheel ]; then
  grep -q "^SCHEDULEFREE_TORCH_INCLUDE:PATH=$packages/torch/" build/CMakeCache.txt || fail "torch is not the one beside the package"
fi
if grep -e TORCH_TARGET_VERSION -e "$source/csrc" build/compile_commands.json; then
  fail "the program inherits what only the build of the library needs"
fi
libraries=$(ldd build/digits)
if grep -e libpython -e 'not found' <<<"$libraries"; then fail "the program needs Python, or doesn't find a library"; fi
grep -q libschedulefree_cpp <<<"$libraries" || fail "the program is not linked to libschedulefree_cpp"

"$python" "$source/examples/digits.py" --export-csv digits.csv
build/digits digits.csv --epochs 16 --checkpoint digits.pt | tee table
accurate=$(awk '$4 == "%" && $3 >= 97' table | wc -l)
[ "$accurate" = 2 ] || fail "$accurate of the 2 optimizers reach an accuracy of 97 %"

build/wrapper || fail "a wrapped optimizer does not fit a line"

if [ "$mode" = install_prefix ]; then
  mkdir versions
  cat >versions/CMakeLists.txt <<'EOF'
cmake_minimum_required(VERSION 3.24)
project(versions LANGUAGES CXX)
find_package(schedulefree_cpp 99 CONFIG)
if(schedulefree_cpp_FOUND OR NOT schedulefree_cpp_CONSIDERED_VERSIONS)
  message(FATAL_ERROR "version 99 was asked for: found '${schedulefree_cpp_CONSIDERED_VERSIONS}', and not refused")
endif()
EOF
  cmake -S versions -B versions/build -G Ninja "-DCMAKE_PREFIX_PATH=$prefix_path"

  # Another library than that of the headers, as far as the program can see.
  echo 'extern "C" const char* schedulefree_cpp_version() { return "9.9.9"; }' >other.cpp
  "${CXX:-c++}" -shared -fPIC other.cpp -o other.so
  if LD_PRELOAD=./other.so build/digits digits.csv 2>message; then fail "a library of version 9.9.9 is not refused"; fi
  cat message
  grep -q 'headers of version [0-9.]* but runs with libschedulefree_cpp 9.9.9' message || fail "the message lacks a version"
fi
