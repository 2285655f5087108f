"""The examples run as a user starts them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DIGITS = Path(__file__).parent.parent / "examples" / "digits.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, DIGITS, *arguments], capture_output=True, text=True)


def test_digits_trains_prints_and_draws(tmp_path):
    picture = tmp_path / "digits.png"
    done = run("--epochs", "4", "--seeds", "1", "--out", str(picture))
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\S.*?) +(\d+) +([\d.]+) % +[\d.]+$", done.stdout, re.MULTILINE)
    assert [(name, epochs) for name, epochs, _ in rows] == [
        ("SGDScheduleFree", "4"),
        ("AdamWScheduleFree", "4"),
        ("AdamW + cosine", "1"),
        ("AdamW + cosine", "2"),
        ("AdamW + cosine", "4"),
    ]
    assert all(float(accuracy) > 94 for _, epochs, accuracy in rows if epochs == "4")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_digits_reaches_its_accuracy(tmp_path):
    done = run("--optimizer", "adamw", "--epochs", "16", "--seeds", "1", "--out", str(tmp_path / "a.png"))
    (accuracy,) = re.findall(r"AdamWScheduleFree +16 +([\d.]+) %", done.stdout)
    assert float(accuracy) >= 97


def test_digits_explains_its_options():
    text = run("--help").stdout
    for option in ("--optimizer", "--epochs", "--lr", "--seeds", "--seed", "--out"):
        assert re.search(rf"{option} \S+\s+\w+", text), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1, not 0"),
        (["--lr", "-1"], "must be finite and more than 0"),
        (["--optimizer", "lion"], "invalid choice"),
    ],
)
def test_digits_refuses_bad_options(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
