"""What was built for CUDA, looked at without a GPU: symbols, architectures, registers."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp._core.library import _C
from test_library import outside_stable_abi, undefined_symbols
from test_packaging import ROOT, configure_with

LIBRARY = Path(schedulefree_cpp.__file__).parent / "libschedulefree_cpp_cuda.so"
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
DEFAULT_ARCHITECTURES = {75, 80, 86, 89, 90, 100, 120}

pytestmark = pytest.mark.build

built = pytest.mark.skipif(_C.cuda_build().startswith("not built"), reason=_C.cuda_build())
with_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@built
def test_only_the_stable_abi_is_used():
    symbols = undefined_symbols(LIBRARY)
    assert {"aoti_torch_create_cuda_guard", "aoti_torch_get_current_cuda_stream"} <= set(symbols)
    assert outside_stable_abi(symbols) == []


@built
def test_the_cuda_runtime_is_linked_statically():
    assert [s for s in undefined_symbols(LIBRARY) if re.match(r"_*cuda|cu[A-Z]", s)] == []
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
    # libtorch.so brings whatever the torch at hand has for CUDA.
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(needed)
    assert [name for name in needed if "cuda" in name or "cudart" in name] == []


@built
def test_nothing_of_the_cuda_runtime_is_exported():
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True
    )
    exported = [line.split()[-1] for line in listing.stdout.splitlines()]
    assert [name for name in exported if name.startswith(("cuda", "__cuda"))] == []


def images(path: Path) -> list[set[tuple[str, int]]]:
    """Kinds and architectures of the device code in an ELF file, for each translation unit."""
    data = path.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    entry_size, entries, names_index = struct.unpack_from("<HHH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", data, table + i * entry_size) for i in range(entries)]
    names = sections[names_index][4]
    units = []
    for section in sections:
        name = data[names + section[0] : data.index(b"\0", names + section[0])]
        if name != b".nv_fatbin":
            continue
        at, end = section[4], section[4] + section[5]
        while at < end:
            magic, _, header, size = struct.unpack_from("<IHHQ", data, at)
            if magic != 0xBA55ED50:  # padding
                at += 8
                continue
            at += header
            unit, unit_end = set(), at + size
            while at < unit_end:
                kind, _, entry_header, entry_size_ = struct.unpack_from("<HHIQ", data, at)
                (architecture,) = struct.unpack_from("<I", data, at + 28)
                unit.add(({1: "ptx", 2: "elf"}[kind], architecture))
                at += entry_header + entry_size_
            units.append(unit)
    return units


@built
def test_the_library_has_the_architectures_that_the_build_says():
    said = re.fullmatch(r"nvcc [\d.]+ for (.+)", _C.cuda_build())
    assert said is not None
    expected = set()
    for name in said[1].split():
        number, _, kind = name.partition("-")
        expected |= {("elf", int(number))} if kind != "virtual" else set()
        expected |= {("ptx", int(number))} if kind != "real" else set()
    units = images(LIBRARY)
    assert len(units) >= 4
    assert all(unit == expected for unit in units)


@with_nvcc
@pytest.mark.parametrize(
    ("variables", "options", "expected"),
    [
        ({}, [], "75-real 80-real 86-real 89-real 90-real 100-real 120"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}, [], "80-real 90"),
        ({"CUDAARCHS": "89-real"}, [], "89-real"),
        ({"CUDAARCHS": "89-real"}, ["-DCMAKE_CUDA_ARCHITECTURES=90"], "90"),
    ],
)
def test_architectures_can_be_chosen(tmp_path, variables, options, expected):
    root = Path(torch.__file__).parent
    done = configure_with(tmp_path, root, "-DSCHEDULEFREE_CUDA=ON", *options, **variables)
    assert done.returncode == 0, done.stderr
    (summary,) = re.findall(r"CUDA kernels: nvcc [\d.]+ for (.*)", done.stdout)
    if not variables and not options:
        chosen = {int(name.partition("-")[0]) for name in summary.split()}
        assert chosen <= DEFAULT_ARCHITECTURES
        assert {75, 80, 86, 89, 90} <= chosen
        assert not summary.split()[-1].endswith("-real")  # PTX for what is to come
    else:
        assert summary == expected


@pytest.mark.parametrize(
    ("option", "message"),
    [("ON", "no nvcc was found that works"), ("maybe", "expected ON, OFF or AUTO, got 'maybe'")],
)
def test_cuda_that_was_asked_for_but_cannot_be_is_an_error(tmp_path, option, message):
    variables = {"CUDACXX": "/nowhere/nvcc"}
    done = configure_with(tmp_path, Path(torch.__file__).parent, f"-DSCHEDULEFREE_CUDA={option}", **variables)
    assert done.returncode != 0
    assert message in " ".join(done.stderr.split())


def test_without_nvcc_the_build_says_so(tmp_path):
    variables = {"CUDACXX": "/nowhere/nvcc"}
    done = configure_with(tmp_path, Path(torch.__file__).parent, "-DSCHEDULEFREE_CUDA=AUTO", **variables)
    assert done.returncode == 0, done.stderr
    assert re.search(r"CUDA kernels: not built: no nvcc was found", done.stdout)
    off = configure_with(tmp_path, Path(torch.__file__).parent, "-DSCHEDULEFREE_CUDA=OFF")
    assert re.search(r"CUDA kernels: not built: SCHEDULEFREE_CUDA is OFF", off.stdout)


def kernels_for(architecture: int, commands: list[dict[str, str]], out: Path) -> dict[str, tuple[int, int]]:
    """Registers and spilled bytes of every kernel, as the build's own commands compile it for one target."""

    def compile_unit(entry: dict[str, str]) -> str:
        command = shlex.split(entry["command"])
        kept = [a for a in command if not a.startswith(("--generate-code", "-gencode"))]
        kept[kept.index("-o") + 1] = str(out / (Path(entry["file"]).stem + ".o"))
        target = f"--generate-code=arch=compute_{architecture},code=[sm_{architecture}]"
        done = subprocess.run(
            [*kept, target, "-Xptxas=-v"], cwd=entry["directory"], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    with ThreadPoolExecutor(2) as pool:
        log = "\n".join(pool.map(compile_unit, commands))
    found = {}
    for name, body in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", body).groups()
        (registers,) = re.search(r"Used (\d+) registers", body).groups()
        found[name] = (int(registers), int(stores) + int(loads))
    return found


@built
@with_nvcc
def test_no_kernel_spills_on_sm_90(tmp_path):
    listed = json.loads((BUILD / "compile_commands.json").read_text())
    commands = [entry for entry in listed if entry["file"].endswith(".cu")]
    assert len(commands) >= 4
    kernels = kernels_for(90, commands, tmp_path)
    assert len(kernels) > 60
    # A tensor with gaps is rare: its index arithmetic may put registers aside.
    dense = {name: kernel for name, kernel in kernels.items() if "StridedTensor" not in name}
    assert {name: spilled for name, (_, spilled) in dense.items() if spilled} == {}
    # 64 registers leave room for four blocks of 256 threads on a multiprocessor, 128 for two. Where the
    # coefficients are on the device, one thread of a block computes with them in float64.
    steps = {name: registers for name, (registers, _) in dense.items() if re.search("(Sgd|Adamw)Step", name)}
    bound = {name: 128 if "captured" in name or "IdE" in name else 64 for name in steps}
    assert len(steps) >= 80
    assert {name: registers for name, registers in steps.items() if registers > bound[name]} == {}
