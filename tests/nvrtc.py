"""NVRTC without torch and without a GPU: a stand-in that compiles nothing, and PyPI's, by ctypes.

The stand-in keeps what the library gives to NVRTC: sources, options and the names of kernels. PyPI's then
compiles the same, with a report of registers and spills.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

STAND_IN = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char* kernel = "";

// A file of $STAND_IN_NVRTC, or nothing where that is not set.
static void keep(const char* folder, const char* name, const char* text) {
  char path[4096];
  const char* const root = getenv("STAND_IN_NVRTC");
  if (root == NULL) return;
  char part[256];
  int i = 0;
  for (; name[i] != 0; ++i) part[i] = name[i] == '/' ? '@' : name[i];
  part[i] = 0;
  snprintf(path, sizeof(path), "%s/%s/%s", root, folder, part);
  FILE* const file = fopen(path, "w");
  if (file == NULL) exit(77);
  fputs(text, file);
  fclose(file);
}

int nvrtcVersion(int* major, int* minor) { return *major = 99, *minor = 1, 0; }
int nvrtcCreateProgram(void** program, const char* text, const char* name, int count,
                       const char* const* texts, const char* const* names) {
  keep(".", "program", text);
  for (int i = 0; i < count; ++i) keep("headers", names[i], texts[i]);
  *program = &kernel;
  return 0;
}
int nvrtcDestroyProgram(void** program) { return *program = NULL, 0; }
int nvrtcAddNameExpression(void* program, const char* name) {
  (void)program;
  kernel = name;
  return 0;
}
int nvrtcCompileProgram(void* program, int count, const char* const* options) {
  char all[4096] = "";
  (void)program;
  for (int i = 0; i < count; ++i) strcat(strcat(all, options[i]), "\n");
  keep(".", "options", all);
  return strstr(all, "sm_999") != NULL ? 5 : 0;  // NVRTC_ERROR_INVALID_OPTION
}
int nvrtcGetProgramLogSize(void* program, size_t* size) { (void)program; return *size = 24, 0; }
int nvrtcGetProgramLog(void* program, char* log) { (void)program; return strcpy(log, "no such architecture"), 0; }
int nvrtcGetLoweredName(void* program, const char* name, const char** lowered) {
  (void)program;
  return *lowered = name, 0;
}
int nvrtcGetCUBINSize(void* program, size_t* size) { (void)program; return *size = 8, 0; }
int nvrtcGetCUBIN(void* program, char* cubin) { (void)program; return memcpy(cubin, "no code", 8), 0; }
"""

LIST_KERNELS = """
import json
from schedulefree_cpp._core.library import _C
names = []
_C.compile_kernels("sm_90", lambda line: names.append(line.split(" compiled ")[1]))
print(json.dumps(names))
"""


def stand_in(folder: Path) -> Path:
    """Builds the stand-in, for SCHEDULEFREE_CPP_NVRTC."""
    source, library = folder / "stand_in_nvrtc.c", folder / "stand_in_nvrtc.so"
    source.write_text(STAND_IN)
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", library], check=True)
    return library


@dataclass(frozen=True)
class Handed:
    """What the library hands to NVRTC."""

    program: bytes
    headers: dict[str, bytes]
    options: list[str]  # without that for the architecture
    kernels: list[str]  # C++ expressions of the common ones


def handed_over(folder: Path) -> Handed:
    """Has the library compile its common kernels with the stand-in."""
    (folder / "headers").mkdir()
    environment = os.environ | {
        "SCHEDULEFREE_CPP_NVRTC": str(stand_in(folder)),
        "SCHEDULEFREE_CPP_CACHE": str(folder / "cache"),
        "STAND_IN_NVRTC": str(folder),
    }
    command = [sys.executable, "-c", LIST_KERNELS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    options = (folder / "options").read_text().split()
    return Handed(
        (folder / "program").read_bytes(),
        {path.name.replace("@", "/"): path.read_bytes() for path in (folder / "headers").iterdir()},
        [option for option in options if not option.startswith("--gpu-architecture")],
        json.loads(done.stdout),
    )


def file_of(package: str, name: str) -> Path | None:
    """A file of a package of PyPI; None where the package is not installed."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if re.fullmatch(name, file.name)), None)


@dataclass(frozen=True)
class Compiled:
    """The machine code of a kernel."""

    cubin: bytes
    registers: int
    spilled: int  # bytes that registers are put aside into, and read from again
    stack: int


class Nvrtc:
    """NVRTC of a package of PyPI."""

    def __init__(self, package: str) -> None:
        """Loads it, and before it the part that it asks for by name alone."""
        library = file_of(package, r"libnvrtc\.so\.\d+")
        builtins = file_of(package, r"libnvrtc-builtins\.so\.[\d.]+")
        if library is None or builtins is None:
            raise ModuleNotFoundError(package)
        ctypes.CDLL(str(builtins))
        self._library = ctypes.CDLL(str(library))

    def compile(self, handed: Handed, kernel: str, architecture: str) -> Compiled:
        """Compiles a kernel as the library does."""
        call, program, size = self._library, ctypes.c_void_p(), ctypes.c_size_t()

        def array(texts: list[bytes]) -> ctypes.Array[ctypes.c_char_p]:
            return (ctypes.c_char_p * len(texts))(*texts)

        names, texts = [name.encode() for name in handed.headers], list(handed.headers.values())
        created = call.nvrtcCreateProgram(
            ctypes.byref(program), handed.program, b"kernels.cu", len(names), array(texts), array(names)
        )
        assert created == 0
        call.nvrtcAddNameExpression(program, kernel.encode())
        options = [*handed.options, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
        result = call.nvrtcCompileProgram(program, len(options), array([o.encode() for o in options]))
        call.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        call.nvrtcGetProgramLog(program, log)
        text = log.value.decode()
        if result:
            raise RuntimeError(f"{kernel} for {architecture}: {text}")
        call.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        call.nvrtcGetCUBIN(program, cubin)
        call.nvrtcDestroyProgram(ctypes.byref(program))

        def sum_of(pattern: str) -> int:
            return sum(map(int, re.findall(pattern, text)))

        return Compiled(
            cubin.raw,
            max(map(int, re.findall(r"Used (\d+) registers", text))),
            sum_of(r"(\d+) bytes spill"),
            sum_of(r"(\d+) bytes stack frame"),
        )
