"""The examples run as a user starts them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_digits_exports_its_data(tmp_path):
    table = tmp_path / "digits.csv"
    done = run("--export-csv", str(table))
    assert done.returncode == 0, done.stderr
    data = runpy.run_path(str(DIGITS))["load_data"]()
    assert done.stdout == f"Wrote 1078 training and 719 test images to {table}\n"
    header, *lines = table.read_text().splitlines()
    assert header.split(",") == ["split", "label", *(f"p{pixel}" for pixel in range(64))]
    assert [line.split(",")[0] for line in lines] == ["train"] * 1078 + ["test"] * 719
    numbers = torch.tensor([[int(number) for number in line.split(",")[1:]] for line in lines])
    labels, images = numbers[:, 0], numbers[:, 1:].view(-1, 1, 8, 8) / 16
    assert torch.equal(labels, torch.cat([data.train_labels, data.test_labels]))
    assert torch.equal(images, torch.cat([data.train_images, data.test_images]))


def test_digits_explains_its_options():
    text = run("--help").stdout
    for option in ("--optimizer", "--epochs", "--lr", "--seeds", "--seed", "--out", "--export-csv"):
        assert re.search(rf"{option} \S+\s+\w+", text), option


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "must be at least 1, not 0"),
        (["--lr", "-1"], "must be finite and more than 0"),
        (["--optimizer", "lion"], "invalid choice"),
        (["--export-csv", "missing/digits.csv"], "argument --export-csv: no such directory: missing"),
    ],
)
def test_digits_refuses_bad_options(arguments, message):
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
