"""Versions that several files name: of the package, of Python, of torch."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.metadata import distribution
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no reader of TOML")

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="an sdist has no hidden files")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]


def read(name: str) -> str:
    return (ROOT / name).read_text()


def found(pattern: str, text: str) -> str:
    (value,) = set(re.findall(pattern, text))
    return value


def minors(versions: list[str]) -> list[int]:
    assert all(version.startswith("3.") for version in versions)
    return [int(version[2:]) for version in versions]


def read_by_wheels_sh(beginning: str) -> list[str]:
    """What a line of tools/wheels.sh reads in pyproject.toml."""
    edit = found(rf"sed -n '(s/{re.escape(beginning)}.*?)' pyproject.toml", read("tools/wheels.sh"))
    command = ["sed", "-n", edit, ROOT / "pyproject.toml"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


SUPPORTED = minors(re.findall(r"Python :: (3\.\d+)", " ".join(PROJECT["classifiers"])))


def test_the_oldest_python_is_the_same_everywhere():
    oldest = f"3.{SUPPORTED[0]}"
    assert PROJECT["requires-python"] == f">={oldest}"
    assert PYPROJECT["tool"]["mypy"]["python_version"] == oldest
    assert PYPROJECT["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    assert found(r'requires-python = ">=(.*)"', read("packaging/schedulefree-shim/pyproject.toml")) == oldest
    assert found(r"python >= (3\.\d+)", read("tools/gpu_check.sh")) == oldest


def test_wheels_are_built_for_every_python():
    assert list(range(SUPPORTED[0], SUPPORTED[-1] + 1)) == SUPPORTED
    assert minors(read_by_wheels_sh(".*Python ::")) == SUPPORTED
    span = f"Python 3.{SUPPORTED[0]} to 3.{SUPPORTED[-1]}"
    assert span in " ".join(read("RELEASING.md").split())


def test_developers_need_the_python_that_the_pins_need():
    """The versions in requirements-*.txt ask for a newer Python than the package does."""
    lists = read("requirements-train.txt") + read("requirements-dev.txt")
    names = re.findall(r"^([\w-]+)(?:\[\w+\])?==", lists, re.MULTILINE)
    requirements = [distribution(name).metadata["Requires-Python"] or "" for name in names]
    needed = max(int(minor) for text in requirements for minor in re.findall(r">=\s*3\.(\d+)", text))
    assert found(r"Python 3\.(\d+) or newer", read("README.md")) == str(needed)
    assert found(r"sys.version_info < \(3, (\d+)\)", read("Makefile")) == str(needed)
    assert found(r"python:3\.(\d+)", json.loads(read(".devcontainer/devcontainer.json"))["image"]) == str(
        needed
    )
    assert found(r'python-version: "3\.(\d+)"', read(".github/workflows/tests.yml")) == str(needed)


def test_the_oldest_torch_is_the_same_everywhere():
    (oldest,) = [text.removeprefix("torch>=") for text in PROJECT["dependencies"]]
    assert f"torch>={oldest}" in PYPROJECT["build-system"]["requires"]
    lists = read("CMakeLists.txt")
    assert ".".join(re.findall(r"MIN_TORCH_M[AJINOR]+ (\d+)\)", lists)) == oldest
    assert found(r"pytorch >=([\d.]+)", read("packaging/conda/recipe.yaml")) == oldest
    assert found(r"MIN_TORCH = \((.*)\)", read("setup.py")).replace(", ", ".") == oldest
    assert read_by_wheels_sh("^dependencies") == [oldest]


def test_the_version_of_the_package_is_the_same_everywhere():
    assert found(r'version: "(.*)"', read("packaging/conda/recipe.yaml")) == PROJECT["version"]
    assert re.search(rf"(?m)^## .*{re.escape(PROJECT['version'])}", read("CHANGELOG.md"))
