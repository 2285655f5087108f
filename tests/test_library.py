"""The binary policy, and what a user is told when a library does not load."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

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
    source = (Path(__file__).parent.parent / "csrc" / "schema.cpp").read_text()
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
    with pytest.raises(ImportError, match=r"nothing\.so: the file is missing.*Build it again.*pip install"):
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


@pytest.mark.parametrize(
    ("stand_in", "expected"),
    [
        ("int loaded_by_schedulefree = 1;", "None"),
        ("void no_such_function(void); void f(void) { no_such_function(); }", "no_such_function"),
        (
            None,
            r"libschedulefree_cpp_cuda\.so: cannot open shared object file|the CUDA kernels were not built: ",
        ),
    ],
)
def test_the_cuda_half_is_loaded_from_beside_the_library(tmp_path, stand_in, expected):
    library = shutil.copy(LIBRARY, tmp_path)
    if stand_in is not None:
        source = tmp_path / "cuda.c"
        source.write_text(stand_in)
        out = tmp_path / "libschedulefree_cpp_cuda.so"
        subprocess.run(["cc", "-shared", "-fPIC", source, "-o", out], check=True)
    # In a process of its own: a second copy of the library would register the operators again.
    code = f"""
import ctypes, torch
load = ctypes.CDLL({str(library)!r}).schedulefree_cpp_load_cuda
load.restype = ctypes.c_char_p
print(load(), load())
print("libschedulefree_cpp_cuda" in open("/proc/self/maps").read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reasons, mapped = done.stdout.splitlines()
    assert len(re.findall(expected, reasons)) == 2
    assert mapped == str(expected == "None")
