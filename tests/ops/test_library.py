"""The binary policy, and what a user is told when a library does not load."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nvrtc
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp._core import library
from schedulefree_cpp._core.library import _C, explain, load_operators

LIBRARY = Path(schedulefree_cpp.__file__).parent / "libschedulefree_cpp.so"


def undefined_symbols(path: Path) -> list[str]:
    """What a library takes from others; of symbols with a version (``memcpy@GLIBC_2.14``), that, too."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", path], capture_output=True, text=True, check=True
    )
    return [line.split()[-1] for line in listing.stdout.splitlines()]


def outside_stable_abi(symbols: list[str]) -> list[str]:
    """Symbols that are neither torch's C shims nor of the system's C and C++ libraries."""
    inside = re.compile(
        r"(aoti_)?torch_\w+|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+|_ITM_\w+|__gmon_start__|__cxa_finalize"
    )
    # Of std::, without a version where a library of torch has the symbol, too; but of no type of torch.
    standard = re.compile(r"_ZN?K?St(?!\w*?(2at|3c10|5torch|6caffe2)\w)\w+")
    return [name for name in symbols if not inside.fullmatch(name) and not standard.fullmatch(name)]


def test_only_the_stable_abi_is_used():
    symbols = undefined_symbols(LIBRARY)
    assert any(symbol.startswith("torch_") for symbol in symbols)
    assert outside_stable_abi(symbols) == []


def test_the_symbol_check_can_fail():
    unstable = [
        "_ZN2at4_ops5empty4callEv",
        "_ZNK3c1010TensorImpl5sizesEv",
        "_ZN5torch8autograd3fooEv",
        "_ZNSt6vectorIN2at6TensorESaIS1_EE9push_backERKS1_",
        "aoti_undocumented",
        "PyList_New",
        "_Py_Dealloc",
    ]
    assert outside_stable_abi(unstable) == unstable
    module = next(LIBRARY.parent.glob("_C.*.so"))
    assert outside_stable_abi(undefined_symbols(module)) != []


def test_every_operator_is_registered_and_documented():
    for name in library.OPERATORS:
        assert getattr(torch.ops.schedulefree_cpp, name).overloads() == ["default"]
        assert getattr(schedulefree_cpp.ops, name).__doc__
    source = (Path(__file__).parents[2] / "csrc" / "schema.cpp").read_text()
    assert set(re.findall(r'"(\w+)\(Tensor', source)) == set(library.OPERATORS)


def test_autograd_passes_every_operator_by():
    for name in library.OPERATORS:
        assert re.search(
            r"^Autograd\[alias\].*fallthrough", torch._C._dispatch_dump(f"schedulefree_cpp::{name}"), re.M
        )


def test_build_information():
    assert _C.version() == schedulefree_cpp.__version__
    assert _C.min_torch() == ".".join(map(str, library.MIN_TORCH))
    assert _C.compiler()
    assert _C.cpu_isa() in ("baseline", "avx2", "avx512")


def test_a_missing_library_is_explained(tmp_path):
    with pytest.raises(
        ImportError,
        match=r"nothing\.so: the file is missing.*Build it for this environment: pip install --no-build-isolation \S",
    ):
        load_operators(tmp_path / "nothing.so")


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"not a library at all", "another architecture"),
        # An ELF header of a 32-bit library.
        (b"\x7fELF\x01\x01\x01" + bytes(9) + b"\x03\x00\x03\x00\x01" + bytes(200), "another architecture"),
    ],
)
def test_a_foreign_library_is_explained(tmp_path, content, cause):
    path = tmp_path / "libschedulefree_cpp.so"
    path.write_bytes(content)
    with pytest.raises(ImportError, match=cause):
        load_operators(path)


def test_an_unresolved_symbol_is_explained(tmp_path):
    source = tmp_path / "lib.c"
    source.write_text("void torch_no_such_shim(void); void f(void) { torch_no_such_shim(); }")
    path = tmp_path / "lib.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wl,-z,now", source, "-o", path], check=True)
    with pytest.raises(ImportError, match=r"lacks a symbol that it was built against.*torch_no_such_shim"):
        load_operators(path)


@pytest.mark.parametrize(
    ("error", "version", "cause"),
    [
        (None, "2.9.1+cu128", "torch 2.9.1\\+cu128 is too old: torch>=2.10 is needed"),
        (OSError("version `GLIBC_2.38' not found"), "2.13.0", "runtime is older"),
        (OSError("out of memory"), "2.13.0", "the loader refused it"),
    ],
)
def test_other_causes_are_named(error, version, cause):
    assert re.search(cause, explain(LIBRARY, error, version))


def in_a_process(code, **environment):
    """What a program prints that uses the library's C functions; a second copy would register operators again."""
    head = f"""
import ctypes, torch
library = ctypes.CDLL({str(LIBRARY)!r})
for name in ("load_cuda", "cuda_report", "compile_kernels"):
    getattr(library, "schedulefree_cpp_" + name).restype = ctypes.c_char_p
"""
    command = [sys.executable, "-c", head + code]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_without_a_cuda_torch_there_are_no_cuda_operators():
    lines = in_a_process("for _ in range(2): print(library.schedulefree_cpp_load_cuda().decode())")
    assert lines.splitlines() == ["this torch was built without CUDA"] * 2
    assert library.CUDA_MISSING == "this torch was built without CUDA"


def test_an_nvrtc_that_is_named_is_the_one(tmp_path):
    report = "print(library.schedulefree_cpp_cuda_report().decode())"
    found = in_a_process(report, SCHEDULEFREE_CPP_NVRTC=str(nvrtc.stand_in(tmp_path)))
    assert f"NVRTC\t99.1, {tmp_path}/stand_in_nvrtc.so\n" in found
    missing = in_a_process(report, SCHEDULEFREE_CPP_NVRTC=str(tmp_path / "nothing.so"))
    message = r"NVRTC was not found. Install it \(pip install nvidia-cuda-nvrtc\), or name the library in"
    assert re.search(
        rf"NVRTC\tnone: {message} SCHEDULEFREE_CPP_NVRTC. Tried: {tmp_path}/nothing.so:", missing
    )


LOGGED = """
import logging
import schedulefree_cpp
if {asks}:
    logging.basicConfig(level=logging.INFO)
logging.getLogger("schedulefree_cpp").info("compiled the CUDA kernel x")
"""


@pytest.mark.parametrize("asks", [False, True])
def test_what_is_logged_is_seen_by_who_asks(asks):
    code = LOGGED.format(asks=asks)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ("INFO:schedulefree_cpp:compiled the CUDA kernel x\n" if asks else "")
