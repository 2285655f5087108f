"""The table of ``tools/determinism.py``: ways to run that change no bit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
QUICK = ("7 threads", "parameters in another order", "evaluated after every step", "resumed from checkpoints")


def table(*arguments: str) -> str:
    command = [sys.executable, "tools/determinism.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("only", [QUICK, pytest.param((), marks=pytest.mark.long)])
def test_every_row_agrees(only):
    lines = table(*(["--only", *only] if only else [])).splitlines()
    assert len(lines) == (len(only) or 12)
    for line in lines:
        counts = re.search(r"(\d+) of (\d+) tensors equal$", line)
        assert counts or " skipped: " in line
        assert counts is None or int(counts[1]) == int(counts[2]) > 50


def test_a_row_that_differs_is_seen(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import determinism

    monkeypatch.setattr(determinism, "CASES", determinism.CASES[:1])
    one = list(determinism.all_cases())
    other = [[t.clone() for t in result] for result in one]
    other[0][0][0, 0] += 1e-6
    equal, count = determinism.compare(iter(other), iter(one))
    assert (equal, count) == (len(one[0]) - 1, len(one[0]))
    monkeypatch.setitem(determinism.ROWS, "C++", lambda: iter(other))
    monkeypatch.setattr(sys, "argv", ["determinism.py", "--only", "C++"])
    with pytest.raises(SystemExit) as exit:
        determinism.main()
    assert exit.value.code
    assert f"{equal} of {count}" in capsys.readouterr().out
    torch._dynamo.reset()


def test_the_results_of_another_machine_are_compared(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import determinism

    monkeypatch.setattr(determinism, "CASES", determinism.CASES[:1])
    file = tmp_path / "results.pt"

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["determinism.py", *map(str, arguments)])
        determinism.main()

    def beside():
        with pytest.raises(SystemExit) as exit:
            main("--beside", file, "--only")
        (count, of) = re.search(
            r"^another machine +(\d+) of (\d+) tensors equal$", capsys.readouterr().out
        ).groups()
        return exit.value.code, int(of) - int(count)

    main("--write", file)
    assert beside() == (False, 0)
    results = torch.load(file)
    results[0][1][0] += 1e-6
    torch.save(results, file)
    assert beside() == (True, 1)


@pytest.mark.long
def test_arm64_has_the_bits_of_this_machine():
    """What is not fetched yet is: an arm64 Python, and torch."""
    missing = [
        tool for tool in ("qemu-aarch64-static", "aarch64-linux-gnu-g++", "apt-get") if not shutil.which(tool)
    ]
    if missing:
        pytest.skip(f"no {' and no '.join(missing)}")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["tools/arm64.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^another machine +(\d+) of \1 tensors equal$", done.stdout, re.M)
