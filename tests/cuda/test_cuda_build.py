"""The CUDA kernels as NVRTC compiles them, looked at without a GPU: registers, spills, and a fault of ptxas."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nvrtc
import pytest
from nvrtc import Compiled, Handed, Nvrtc

NEWEST, OLDER = "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"
ARCHITECTURES = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120"]
OLDER_ARCHITECTURES = ARCHITECTURES[:3]  # what NVRTC 12.6 knows

# ptxas puts a value or two aside where that saves a block's registers (docs/cuda.md).
FEW_BYTES, FEW_KERNELS = 64, 6

# One of each kind: what has most streams, most arithmetic, most registers.
FEW = [
    "update_kernel<Swap<Split24>, LargeTable<4>>",
    "sum_kernel<PolyakSums<Float32, Float32>, LargeTable<3>>",
    "sum_kernel<SumOfSquares<Float32>, LargeTable<1>>",
    "update_kernel<BaseStep<Float64, false, true, Captured<DecayAt::kNowhere>>, LargeTable<2>>",
    "update_kernel<BaseStep<SplitFp16, false, false, Known<DecayAt::kNowhere, false>>, LargeTable<3>>",
    "update_kernel<BaseStep<Float32, true, true, Known<DecayAt::kNowhere, false>>, LargeTable<2>>",
    "update_kernel<Step<Float32, Float32, NoMoment, false, Known<DecayAt::kNowhere, false>>, LargeTable<3>>",
    "update_kernel<Step<Float32, Float32, WholeMoment<float>, false, Known<DecayAt::kY, false>>, LargeTable<4>>",
    "update_kernel<Step<Float64, Float64, WholeMoment<double>, true, Known<DecayAt::kZ, false>>, LargeTable<5>>",
    "update_kernel<Step<SplitBf16, Bf16, Moment8, true, Known<DecayAt::kZ, false>>, LargeTable<7>>",
    "update_kernel<Step<SplitFp16, Fp16, WholeMoment<float>, false, Captured<DecayAt::kY>>, LargeTable<5>>",
    "update_kernel<Step<Split24, Bf16, Moment8, false, Known<DecayAt::kZ, true>>, LargeTable<7>>",
    "update_kernel<Step<Split24, Bf16, Moment8, true, Captured<DecayAt::kY>>, LargeTable<8>>",
    "resolve_kernel<float>",
    "schedule_step_kernel<StepKind(2)>",
    "total_kernel<1, true>",
]

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(nvrtc.file_of(NEWEST, ".*") is None, reason=f"{NEWEST} is not installed"),
]


@pytest.fixture(scope="module")
def handed(tmp_path_factory) -> Handed:
    """What the library gives to NVRTC."""
    return nvrtc.handed_over(tmp_path_factory.mktemp("stand_in"))


# ---- what can be wrong with machine code ---------------------------------------------------------------


def disassemble(cubin: bytes, folder: Path) -> str:
    path = folder / f"{hash(cubin):x}.cubin"
    path.write_bytes(cubin)
    tool = nvrtc.file_of("nvidia-cuda-nvdisasm", "nvdisasm")
    assert tool is not None
    return subprocess.run([tool, "-c", path], capture_output=True, text=True, check=True).stdout


def clamps_with_a_predicate(code: str) -> list[str]:
    """Minima and maxima that also set a predicate.

    ptxas of CUDA 12.6 to 13.3 reads those of sm_90 and sm_100 the wrong way round after a clamp
    (VIMNMX.RELU R, P0, P0, a, b).
    """
    return re.findall(r"\S*MNMX[0-9A-Z.]* U?R[0-9]+, (?:P[0-6]|P., P[0-6]).*", code)


# Clamp to [0, 4] and compare with 4.
CLAMP = """
extern "C" __global__ void clamp(float4* out, const float4* in, int size) {
  int i = threadIdx.x * 4;
  int left = size - i;
  int n = left < 0 ? 0 : left < 4 ? left : 4;
  if (n == 4) { out[threadIdx.x] = in[threadIdx.x]; return; }
  const float* p = (const float*)in + i; float* q = (float*)out + i;
  #pragma unroll
  for (int e = 0; e < 4; ++e) if (e < n) q[e] = p[e];
}
template <int size> __global__ void spills(float* out, const float* in) {
  float all[size];
  #pragma unroll
  for (int i = 0; i < size; ++i) all[i] = in[i * 32 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < size; ++i) out[i * 32 + threadIdx.x] = all[size - 1 - i] * all[i];
}
"""


@pytest.mark.skipif(nvrtc.file_of(OLDER, ".*") is None, reason=f"{OLDER} is not installed")
def test_the_fault_of_ptxas_would_be_seen(tmp_path):
    bad = Handed(CLAMP.encode(), {}, ["-std=c++17"], [])
    code = Nvrtc(OLDER).compile(bad, "clamp", "sm_90").cubin
    assert clamps_with_a_predicate(disassemble(code, tmp_path))
    code = Nvrtc(NEWEST).compile(bad, "clamp", "sm_90").cubin
    assert not clamps_with_a_predicate(disassemble(code, tmp_path))


def test_a_kernel_that_spills_would_be_seen():
    bad = Handed(CLAMP.encode(), {}, ["-std=c++17", "--maxrregcount=32"], [])
    compiled = Nvrtc(NEWEST).compile(bad, "spills<64>", "sm_90")
    assert compiled.spilled > 0
    assert compiled.stack > 0


# ---- our kernels ---------------------------------------------------------------------------------------


def look_at(handed: Handed, package: str, kernels: list[str], architecture: str, folder: Path) -> None:
    """Compiles kernels; none may use local memory to speak of, or have the fault of ptxas."""
    compiler = Nvrtc(package)

    def one(kernel: str) -> tuple[Compiled, list[str]]:
        compiled = compiler.compile(handed, kernel, architecture)
        return compiled, clamps_with_a_predicate(disassemble(compiled.cubin, folder))

    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(kernels, pool.map(one, kernels), strict=True))
    assert {name: code for name, (_, code) in found.items() if code} == {}
    # A tensor with gaps is rare, and its offsets are computed by a function that is called.
    dense = {name: compiled for name, (compiled, _) in found.items() if "StridedTensor" not in name}
    assert {name: c.stack for name, c in dense.items() if c.stack and not c.spilled} == {}
    spilled = {name: c.spilled for name, c in dense.items() if c.spilled}
    assert {name: spills for name, spills in spilled.items() if spills > FEW_BYTES} == {}
    assert len(spilled) <= FEW_KERNELS, spilled
    steps = {name: c.registers for name, c in dense.items() if "Step<" in name}
    assert {name: registers for name, registers in steps.items() if registers > bound_of(name)} == {}


def bound_of(step: str) -> int:
    """64 registers leave room for four blocks of 256 threads on a multiprocessor, 80 for three, 128 for two."""
    at_random = re.search(r"Known<\S+ true>", step)
    return 128 if "Float64" in step else 80 if "Captured" in step or at_random else 64


def mixed(kernels: list[str]) -> list[str]:
    """The same for gradients of other dtypes than those of their parameters."""
    changed = [
        re.sub(r"(<(?:Step|PolyakSums)<\w+, )\w+", rf"\g<1>{grad}", kernel)
        for kernel in kernels
        if "Float64" not in kernel
        for grad in ("Float32", "Bf16", "Fp16")
    ]
    return sorted(set(changed) - set(kernels))


def in_tables(kernels: list[str], table: str) -> list[str]:
    return [kernel.replace("LargeTable", table) for kernel in kernels if "LargeTable" in kernel]


def test_the_common_kernels_are_those_of_every_format(handed):
    assert len(handed.kernels) == len(set(handed.kernels)) >= 150
    assert set(FEW) <= set(handed.kernels)
    for name in ("Float32", "Float64", "SplitFp16", "SplitBf16", "Split24"):
        assert [kernel for kernel in handed.kernels if f"Step<{name}" in kernel]
    assert {"--fmad=false", "--prec-div=true", "--prec-sqrt=true", "--ftz=false"} <= set(handed.options)


def test_kernels_stay_in_registers(handed, tmp_path):
    look_at(handed, NEWEST, FEW, "sm_90", tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("package", "architecture"),
    [(NEWEST, each) for each in ARCHITECTURES] + [(OLDER, each) for each in OLDER_ARCHITECTURES],
)
def test_every_common_kernel_stays_in_registers(handed, tmp_path, package, architecture):
    look_at(handed, package, handed.kernels, architecture, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["mixed", "SmallTable", "StridedTensor"])
def test_every_rare_kernel_compiles(handed, tmp_path, kind, architecture):
    kernels = mixed(handed.kernels) if kind == "mixed" else in_tables(handed.kernels, kind)
    assert len(kernels) > 100
    look_at(handed, NEWEST, kernels, architecture, tmp_path)


COMPILE_SOME = """
from schedulefree_cpp._core.library import _C

class Enough(Exception): pass

def progress(line):
    print(line)
    if "Moment8" in line:
        raise Enough

try:
    _C.compile_kernels("sm_80", progress)
except Enough:
    print(_C.cuda_report())
"""


def test_the_library_compiles_and_keeps_kernels_by_itself(tmp_path):
    """Its own path, with an NVRTC that is named: what `--compile` runs for each kernel."""
    library = nvrtc.file_of(NEWEST, r"libnvrtc\.so\.\d+")
    environment = os.environ | {
        "SCHEDULEFREE_CPP_NVRTC": str(library),
        "SCHEDULEFREE_CPP_CACHE": str(tmp_path / "cache"),
    }
    times = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", COMPILE_SOME], env=environment, capture_output=True, text=True, check=True
        )
        times.append(done.stdout)
    lines = times[0].splitlines()
    count = sum(line.startswith("sm_80 compiled ") for line in lines)
    assert count > 10
    assert f"kernels compiled\t{count} for sm_80, NVRTC 13." in times[0]
    assert times[1].count("sm_80 was there: ") == count
    files = list((tmp_path / "cache").glob("*.kernel"))
    assert len(files) == count
    for path in files:
        magic, identity, _, entry, cubin = path.read_bytes().split(b"\n", 4)
        assert magic == b"schedulefree_cpp kernel 1"
        assert identity.startswith(b"sm_80, NVRTC 13.")
        assert entry.startswith(b"_Z")
        assert cubin.startswith(b"\x7fELF")
