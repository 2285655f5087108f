"""What the libraries export, where they look for others, and how they are hardened: read from the ELF files."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import schedulefree_cpp

FOLDER = Path(schedulefree_cpp.__file__).parent
EXPORTS = {
    "libschedulefree_cpp.so": r"schedulefree_cpp_\w+",
    "_C.so": r"PyInit__C",
}
LIBRARIES = [path for path in sorted(FOLDER.glob("*.so")) if path.is_file()]
pytestmark = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is missing")


def read(path: Path, *options: str) -> str:
    return subprocess.run(
        ["readelf", "-W", *options, path], capture_output=True, text=True, check=True
    ).stdout


def symbols(path: Path) -> list[list[str]]:
    """The dynamic symbols: number, value, size, type, binding, visibility, section, name."""
    lines = [line.split() for line in read(path, "--dyn-syms").splitlines()]
    return [fields for fields in lines if len(fields) >= 8 and fields[0].rstrip(":").isdigit()]


def exported(path: Path) -> list[str]:
    return [fields[7] for fields in symbols(path) if fields[6] != "UND"]


def faults(path: Path) -> list[str]:
    """What a hardened library would not have."""
    dynamic, segments = read(path, "--dynamic"), read(path, "--segments")
    found = []
    if not re.search(r"\(FLAGS(_1)?\).*\b(BIND_)?NOW\b", dynamic) or "GNU_RELRO" not in segments:
        found.append("no full RELRO")
    stack = re.search(r"GNU_STACK\s.*", segments)
    if stack is None or " RWE " in stack[0]:
        found.append("an executable stack")
    if re.search(r"\bRWE\b", segments):
        found.append("a segment to write and execute")
    if "TEXTREL" in dynamic:
        found.append("text relocations")
    for kind, paths in re.findall(r"\((RPATH|RUNPATH)\).*\[(.*)\]", dynamic):
        outside = [part for part in paths.split(":") if not part.startswith("$ORIGIN")]
        found += [f"{kind} {part}" for part in outside]
    if not any(fields[7].startswith("__stack_chk_fail") for fields in symbols(path)):
        found.append("no stack protector")
    if ".symtab" in read(path, "--sections"):
        found.append("symbols that only a debugger reads")
    return found


def test_the_libraries_are_there():
    assert {re.sub(r"^_C\..*", "_C.so", path.name) for path in LIBRARIES} >= {
        "libschedulefree_cpp.so",
        "_C.so",
    }


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_a_library_exports_what_others_call_and_nothing_else(path):
    pattern = EXPORTS[re.sub(r"^_C\..*", "_C.so", path.name)]
    names = exported(path)
    assert [name for name in names if not re.fullmatch(pattern, name)] == []
    assert names


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_a_library_is_hardened_and_looks_for_others_beside_itself(path):
    assert faults(path) == []


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.name)
def test_a_library_needs_torch_and_the_system_alone(path):
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", read(path, "--dynamic"))
    known = r"lib(torch|torch_cpu|schedulefree_cpp|stdc\+\+|m|gcc_s|c|dl|pthread|rt)\.so(\.\d+)?|ld-linux\S*"
    assert [name for name in needed if not re.fullmatch(known, name)] == []


def test_a_library_that_is_not_hardened_is_seen(tmp_path):
    source = tmp_path / "lib.c"
    source.write_text("int f(int x) { return x; }")
    path = tmp_path / "lib.so"
    flags = ["-Wl,-z,lazy", "-Wl,-z,norelro", "-Wl,-z,execstack", "-Wl,-rpath,/tmp"]
    subprocess.run(["cc", "-shared", "-fPIC", *flags, source, "-o", path], check=True)
    assert set(faults(path)) >= {
        "no full RELRO",
        "an executable stack",
        "no stack protector",
        "symbols that only a debugger reads",
    }
    assert any(fault.endswith(" /tmp") for fault in faults(path))
    assert exported(path)
