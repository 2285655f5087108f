"""Types that editors and type checkers see, and what ``help()`` shows."""

from __future__ import annotations

import subprocess
import sys

import pytest
import schedulefree_cpp
import torch

USE = """
import torch
import schedulefree_cpp as schedulefree
from typing_extensions import assert_type

model = torch.nn.Linear(2, 1)


def tensor() -> torch.Tensor:
    return torch.zeros(())


def number() -> float:
    return 0.0


for optimizer in (
    schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01, betas=(0.9, 0.99)),
    schedulefree.RAdamScheduleFree(model.parameters()),
    schedulefree.SGDScheduleFree([{"params": list(model.parameters()), "lr": 0.1}]),
    schedulefree.AdamWScheduleFreeClosure(model.parameters()),
    schedulefree.AdamCScheduleFreePlus(model.parameters()),
    schedulefree.MuonScheduleFree(model.parameters(), lr=0.01, momentum=0.9),
    schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1)),
):
    assert_type(optimizer.train(), None)
    assert_type(optimizer.eval(), None)
    assert_type(optimizer.step(), None)
    assert_type(optimizer.step(tensor), torch.Tensor)
    assert_type(optimizer.step(number), float)
    with optimizer.averaged():
        pass
    x: dict[str, torch.Tensor] = optimizer.averaged_state_dict(model)
fused = schedulefree.AdamWScheduleFree(model.parameters())
assert_type(fused.grad_norm, torch.Tensor | None)
with fused.step_in_backward():
    pass
"""


def pyright(*arguments):
    pytest.importorskip("pyright", reason="pyright is not installed")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.frameworks
def test_every_public_type_is_known():
    done = pyright("--verifytypes", "schedulefree_cpp", "--ignoreexternal")
    assert "Type completeness score: 100%" in done.stdout, done.stdout


@pytest.mark.frameworks
@pytest.mark.parametrize("checker", ["pyright", "mypy"])
def test_a_program_is_typed(checker, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(USE)
    if checker == "pyright":
        done = pyright(str(program))
    else:
        command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", tmp_path, program]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


OWN = {
    "train",
    "eval",
    "averaged",
    "averaged_state_dict",
    "step_parameter",
    "step_in_backward",
    "grad_norm",
    "capturable",
}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("SGDScheduleFree", set()),
        ("AdamWScheduleFree", set()),
        ("RAdamScheduleFreeClosure", set()),
        ("MuonScheduleFree", set()),
        ("AdamCScheduleFreePlus", {"step_func"}),
    ],
)
def test_help_shows_what_users_call(name, more):
    public = {entry for entry in dir(getattr(schedulefree_cpp, name)) if not entry.startswith("_")}
    assert public - set(dir(torch.optim.Optimizer)) == OWN | more
