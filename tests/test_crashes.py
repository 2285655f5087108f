"""Checkpoints that survive a crash, and processes that are killed, interrupted or forked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parent.parent
LONG = os.environ.get("SCHEDULEFREE_LONG_TESTS") == "1"


class Odd:
    """What torch.load(weights_only=True) does not read."""


def program(name: str = "AdamWScheduleFree", steps: int = 3) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))
    optimizer = cases.make(name, model.parameters())
    cases.run(optimizer, steps)
    return model, optimizer


# ---- save_checkpoint and load_checkpoint ---------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.FAMILY)
def test_a_checkpoint_resumes_exactly_and_holds_x(name, mode, tmp_path):
    model, optimizer = program(name)
    if name in cases.REFERENCE:
        mode = "eval"  # they have no averaged()
    getattr(optimizer, mode)()
    before = cases.copies(model.parameters())
    save_checkpoint(tmp_path / "c.pt", model, optimizer, step=3, rng=torch.get_rng_state())
    cases.assert_same(model.parameters(), before)
    other_model, other = program(name, 0)
    more = load_checkpoint(tmp_path / "c.pt", other_model, other)
    assert more["step"] == 3
    assert torch.equal(more["rng"], torch.get_rng_state())
    optimizer.eval()
    cases.assert_same(model.state_dict().values(), other_model.state_dict().values())
    for each in (optimizer, other):
        each.train()
        cases.run(each, 3, start=3)
    cases.assert_same(model.parameters(), other_model.parameters())
    assert os.listdir(tmp_path) == ["c.pt"]


def test_the_file_is_on_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    model, optimizer = program()
    calls: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        calls.append(f"fsync {os.readlink(f'/proc/self/fd/{descriptor}')}")
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        calls.append(f"replace {self} {target}")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    path = tmp_path / "c.pt"
    save_checkpoint(path, model, optimizer)
    partial = rf"{path}\.\w+\.partial"
    for call, expected in zip(
        calls, (rf"fsync {partial}", rf"replace {partial} {path}", f"fsync {tmp_path}"), strict=True
    ):
        assert re.fullmatch(expected, call)


def test_what_could_not_be_read_again_is_not_saved(tmp_path):
    model, optimizer = program()
    path = tmp_path / "c.pt"
    save_checkpoint(path, model, optimizer, step=1)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"Invalid checkpoint .*\.partial: torch.load\(weights_only=True\)"):
        save_checkpoint(path, model, optimizer, odd=Odd())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_a_full_disk_leaves_the_old_file():
    code = """
import os, resource, signal, sys, torch, schedulefree_cpp
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Linear(300, 300)
optimizer = schedulefree_cpp.SGDScheduleFree(model.parameters())
schedulefree_cpp.save_checkpoint("c.pt", model, optimizer)
before = open("c.pt", "rb").read()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    schedulefree_cpp.save_checkpoint("c.pt", model, optimizer)
except Exception as error:
    print(type(error).__name__)
assert open("c.pt", "rb").read() == before and os.listdir(".") == ["c.pt"], os.listdir(".")
print("whole")
"""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "whole"
    assert len(done.stdout.splitlines()) == 2


def test_the_recipe_without_the_helper_writes_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "reliability.md").read_text(), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(recipe, namespace)
    model = torch.nn.Linear(8, 1)
    load_checkpoint("checkpoint.pt", model, schedulefree_cpp.AdamWScheduleFree(model.parameters()))
    cases.assert_same(model.parameters(), namespace["model"].parameters())
    assert os.listdir() == ["checkpoint.pt"]


def without(key: str) -> Any:
    return lambda c: c["model"].pop(key)


def of_another_shape(c: Any) -> None:
    c["model"]["0.weight"] = torch.zeros(2, 2)


REFUSED = {
    "no model": (lambda c: c.pop("model"), "expected dicts under 'model' and 'optimizer'"),
    "a parameter less": (without("0.bias"), "the file lacks '0.bias'"),
    "a parameter more": (lambda c: c["model"].update(more=torch.ones(1)), "the model lacks 'more'"),
    "another shape": (of_another_shape, r"'0.weight' of the model has shape \(2, 2\), expected \(3, 5\)"),
    "another optimizer": (lambda c: c["optimizer"]["param_groups"][0].pop("k"), "lacks k"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_of_something_else_changes_nothing(case, tmp_path):
    change, message = REFUSED[case]
    model, optimizer = program()
    save_checkpoint(tmp_path / "c.pt", model, optimizer)
    checkpoint = torch.load(tmp_path / "c.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, tmp_path / "c.pt")
    other_model, other = program(steps=5)
    before, state = cases.copies(other_model.parameters()), cases.copies(cases.states_of(other))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c.pt", other_model, other)
    cases.assert_same(other_model.parameters(), before)
    cases.assert_same(cases.states_of(other), state)


def test_a_damaged_file_is_refused(tmp_path):
    model, optimizer = program()
    path = tmp_path / "c.pt"
    save_checkpoint(path, model, optimizer)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        ValueError, match=r"Invalid checkpoint .*c.pt: torch.load\(weights_only=True\) cannot"
    ):
        load_checkpoint(path, model, optimizer)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nothing.pt", model, optimizer)


# ---- processes that are killed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kills", [pytest.param(10, id="short"), pytest.param(200, id="long", marks=pytest.mark.long)]
)
def test_killed_runs_resume_exactly_from_a_whole_file(kills):
    command = [sys.executable, "tools/crash_loop.py", "--kills", str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.match(rf"{kills} kills in \d+ runs", done.stdout)
