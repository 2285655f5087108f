"""The examples run as a user starts them."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.frameworks

FEW_BYTES = [
    "--dtype",
    "bfloat16",
    "--state-bits",
    "24",
    "--exp-avg-sq-bits",
    "8",
    "--rounding",
    "stochastic",
]

EXAMPLES = Path(__file__).parents[2] / "examples"
DIGITS = EXAMPLES / "digits.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, DIGITS, *arguments], capture_output=True, text=True)


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs a script in this process, which is to end at its arguments. Returns its status and what it printed."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
        out, err = capsys.readouterr()
        return end.value.code, out + err

    return call


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


def test_digits_trains_in_few_bytes(tmp_path):
    done = run(
        "--optimizer", "adamw", "--epochs", "4", "--seeds", "1", *FEW_BYTES, "--out", str(tmp_path / "a.png")
    )
    assert done.returncode == 0, done.stderr
    (accuracy,) = re.findall(r"AdamWScheduleFree +4 +([\d.]+) %", done.stdout)
    assert float(accuracy) > 94


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


def test_digits_explains_its_options(refused):
    status, text = refused(DIGITS, "--help")
    assert status == 0
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
def test_digits_refuses_bad_options(arguments, message, refused):
    status, text = refused(DIGITS, *arguments)
    assert status == 2
    assert message in text


# ---- the others ----------------------------------------------------------------------------------------


def start(command, folder):
    """Runs a command in a folder, with one thread, and returns what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern, text):
    (found,) = re.findall(pattern + r" ([\d.]+)", text)
    return float(found)


CHARLM = [EXAMPLES / "charlm.py", "--width", "32", "--heads", "2", "--layers", "1", "--context", "32"]


def charlm(folder, *arguments):
    """Runs it, and returns its losses at y and at x by the step."""
    out = start([*CHARLM, "--sample", "10", *arguments], folder)
    assert "\ndef " in out
    assert (folder / "charlm.png").read_bytes().startswith(b"\x89PNG")
    lines = re.findall(r"^step (\d+): ([\d.]+) bits per byte at y, ([\d.]+) at x$", out, re.MULTILINE)
    return {int(step): (float(at_y), float(at_x)) for step, at_y, at_x in lines}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_charlm_learns_and_draws(tmp_path, optimizer):
    losses = charlm(tmp_path, "--steps", "100", "--eval-every", "50", "--optimizer", optimizer)
    assert list(losses) == [50, 100]
    for at_y, at_x in losses.values():
        assert max(at_y, at_x) < 5.5  # of 8 bits for a byte of which nothing is known
        assert at_y != at_x


def test_charlm_trains_in_few_bytes(tmp_path):
    ((at_y, at_x),) = charlm(tmp_path, "--steps", "100", "--eval-every", "100", *FEW_BYTES).values()
    assert max(at_y, at_x) < 5.5


@pytest.mark.compile
def test_charlm_runs_compiled_in_bfloat16(tmp_path):
    how = ["--steps", "6", "--batch", "4", "--eval-every", "6"]
    (compiled,) = charlm(tmp_path, *how, "--compile", "--autocast").values()
    (eager,) = charlm(tmp_path, *how).values()
    assert compiled == pytest.approx(eager, abs=0.05)


def test_charlm_refuses_bad_options(refused):
    status, text = refused(EXAMPLES / "charlm.py", "--heads", "5")
    assert status == 2
    assert "argument --heads: 5 does not divide a width of 96" in text


def test_lightning_trains_and_resumes(tmp_path):
    script = EXAMPLES / "lightning.py"
    out = start([script, "--epochs", "4"], tmp_path)
    assert number("Accuracy after 4 epochs:", out) > 90
    assert number("Accuracy after 4 epochs:", out) == number(r"Accuracy of \S+:", out)
    out = start([script, "--epochs", "5", "--resume", "lightning_run/last.ckpt"], tmp_path)
    assert number("Accuracy after 5 epochs:", out) > 90


def test_transformers_trains_saves_x_and_resumes(tmp_path):
    script = [EXAMPLES / "transformers_trainer.py", "--cpu", "--width", "32"]
    out = start([*script, "--steps", "40"], tmp_path)
    loss = number("Loss after 40 steps:", out)
    assert loss < 3.8  # 5.5 before
    assert loss == number("Loss of the saved model:", out)
    out = start([*script, "--steps", "80", "--resume"], tmp_path)
    assert number("Loss after 80 steps:", out) < loss


@pytest.mark.distributed
def test_fsdp2_trains_and_resumes(tmp_path):
    def torchrun(*arguments):
        script = [EXAMPLES / "fsdp2.py", "--cpu", *arguments]
        return start(
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script], tmp_path
        )

    whole = number("Test loss after 40 steps on 2 processes:", torchrun("--steps", "40", "--out", "whole"))
    half = number("Test loss after 20 steps on 2 processes:", torchrun("--steps", "20", "--out", "half"))
    out = torchrun("--steps", "40", "--resume", "--out", "half")
    assert number("Test loss after 40 steps on 2 processes:", out) == whole < half
