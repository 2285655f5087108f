"""Checkpoints that survive a crash, and processes that are killed, interrupted or forked."""

from __future__ import annotations

import copy
import io
import os
import re
import signal
import subprocess
import sys
from operator import is_
from pathlib import Path
from typing import Any

import cases
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
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


def to(dtype: torch.dtype, key: str = "0.weight") -> Any:
    return lambda c: c["model"].update({key: c["model"][key].to(dtype)})


REFUSED = {
    "no model": (lambda c: c.pop("model"), "expected dicts under 'model' and 'optimizer'"),
    "a parameter less": (without("0.bias"), "the file lacks '0.bias'"),
    "a parameter more": (lambda c: c["model"].update(more=torch.ones(1)), "the model lacks 'more'"),
    "another shape": (of_another_shape, r"'0.weight' of the model has shape \(2, 2\), expected \(3, 5\)"),
    "complex": (
        to(torch.complex64),
        "'0.weight' of the model has dtype torch.complex64, expected torch.float32 or",
    ),
    "integers": (to(torch.int64), "'0.weight' of the model has dtype torch.int64"),
    "bools": (to(torch.bool, "1.running_mean"), "'1.running_mean' of the model has dtype torch.bool"),
    "a fraction": (
        to(torch.float32, "1.num_batches_tracked"),
        "'1.num_batches_tracked' of the model has dtype",
    ),
    "a number": (
        lambda c: c["model"].update({"1.num_batches_tracked": 3}),
        "has type int, expected a tensor",
    ),
    "sparse": (
        lambda c: c["model"].update({"1.weight": c["model"]["1.weight"].to_sparse()}),
        "'1.weight' of the model has layout torch.sparse_coo, expected torch.strided",
    ),
    "no values": (
        lambda c: c["model"].update({"1.weight": c["model"]["1.weight"].to("meta")}),
        "'1.weight' of the model has device meta, expected one that holds values",
    ),
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
    check = unchanged(other_model, other)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(tmp_path / "c.pt", other_model, other)
    check()


def unchanged(model: torch.nn.Module, optimizer: Any) -> Any:
    """Looks now, and again when called."""
    tensors = [*model.parameters(), *model.buffers()]
    before, attributes = copy.deepcopy(tensors), [dict(vars(module)) for module in model.modules()]
    state = copy.deepcopy(optimizer.state_dict())

    def check() -> None:
        assert all(map(is_, tensors, (*model.parameters(), *model.buffers())))
        cases.assert_same(tensors, before)
        assert [dict(vars(module)) for module in model.modules()] == attributes
        after = optimizer.state_dict()
        assert after["param_groups"] == state["param_groups"]
        assert after["state"].keys() == state["state"].keys()
        for key, entries in state["state"].items():
            cases.assert_same(after["state"][key].values(), entries.values())

    return check


class Stop(BaseException):
    """Such as an interrupt."""


def stop(*_: Any, **__: Any) -> None:
    raise Stop


def replace_and_stop(module: Any, *_: Any) -> None:
    module.weight = torch.nn.Parameter(torch.ones(2))
    module.running_mean.data = torch.ones(7)
    module.extra = 3
    stop()


class Closed(torch.nn.BatchNorm1d):
    """Refuses what it is given, as a module with a format of its own may."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        args[-1].append("not today")


def closed(model: Any, _: Any) -> None:
    model[1].__class__ = Closed


IN_THE_MIDST = {
    "a hook of the model": lambda model, _: model[1].register_load_state_dict_pre_hook(stop),
    "a hook behind the model": lambda model, _: model.register_load_state_dict_post_hook(stop),
    "a hook that replaces": lambda model, _: model[1].register_load_state_dict_pre_hook(replace_and_stop),
    "a module that refuses": closed,
    "a hook of the optimizer": lambda _, optimizer: optimizer.register_load_state_dict_pre_hook(stop),
    "a hook behind the optimizer": lambda _, optimizer: optimizer.register_load_state_dict_post_hook(stop),
}


@pytest.mark.parametrize("case", IN_THE_MIDST)
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper", "SGDScheduleFreeClosure"])
def test_an_error_in_the_midst_of_a_load_changes_nothing(name, case, tmp_path):
    save_checkpoint(tmp_path / "c.pt", *program(name))
    model, optimizer = program(name, steps=5)
    twin = copy.deepcopy((model, optimizer))
    IN_THE_MIDST[case](model, optimizer)
    check = unchanged(model, optimizer)
    with pytest.raises((Stop, RuntimeError), match="not today" if case == "a module that refuses" else None):
        load_checkpoint(tmp_path / "c.pt", model, optimizer)
    check()
    for each in (optimizer, twin[1]):
        cases.run(each, 2, start=5)
    cases.assert_same(model.parameters(), twin[0].parameters())


def test_a_lazy_module_gets_its_shapes_from_the_file(tmp_path):
    model, optimizer = program()
    save_checkpoint(tmp_path / "c.pt", model, optimizer)
    lazy = torch.nn.Sequential(torch.nn.LazyLinear(3), torch.nn.LazyBatchNorm1d())
    other = cases.make("AdamWScheduleFree", lazy.parameters())
    load_checkpoint(tmp_path / "c.pt", lazy, other)
    optimizer.eval()
    cases.assert_same(model.state_dict().values(), lazy.state_dict().values())


def test_a_flipped_bit_is_refused_or_of_no_account(tmp_path):
    model, optimizer = program()
    path = tmp_path / "c.pt"
    save_checkpoint(path, model, optimizer, step=3)
    content, expected = bytearray(path.read_bytes()), torch.load(path, weights_only=True)
    other_model, other = program(steps=5)
    bias = expected["model"]["0.bias"].numpy().tobytes()
    within = {content.find(bias) + i for i in range(len(bias))}
    refused = {}
    for position in sorted(within | {*range(0, len(content), 1 if LONG else 29)}):
        content[position] ^= 1 << position % 8
        try:
            more = load_checkpoint(io.BytesIO(content), other_model, other)
        except ValueError as error:
            refused[position] = str(error)
        else:
            assert more == {"step": 3}
            cases.assert_same(other_model.state_dict().values(), expected["model"].values())
        content[position] ^= 1 << position % 8
    for position in within:
        assert re.search(r"Invalid checkpoint .*: the checksum of its entry '.*/data/\d+'", refused[position])


def test_what_was_written_is_compared_before_it_takes_its_name(tmp_path, monkeypatch):
    model, optimizer = program()
    path = tmp_path / "c.pt"
    save_checkpoint(path, model, optimizer)
    before = path.read_bytes()
    words = model.state_dict()["0.bias"]
    fsync = os.fsync

    def flip(descriptor: int) -> None:
        fsync(descriptor)
        (partial,) = tmp_path.glob("*.partial")
        content = bytearray(partial.read_bytes())
        content[content.find(words.numpy().tobytes())] ^= 1
        partial.write_bytes(content)

    optimizer.eval()
    monkeypatch.setattr(os, "fsync", flip)
    with pytest.raises(ValueError, match=r"Invalid checkpoint .*\.partial: the checksum of its entry"):
        save_checkpoint(path, model, optimizer)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


def test_checksums_are_written_whatever_torch_is_told(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        save_checkpoint(tmp_path / "c.pt", *program())
        assert not torch.serialization.get_crc32_options()
    finally:
        torch.serialization.set_crc32_options(True)
    load_checkpoint(tmp_path / "c.pt", *program())


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o400])
def test_the_mode_of_a_file_is_kept(mode, tmp_path):
    path = tmp_path / "c.pt"
    for step in range(2):
        save_checkpoint(path, *program(), step=step)
        path.chmod(mode)
    save_checkpoint(path, *program(), step=2)
    assert path.stat().st_mode & 0o777 == mode
    assert load_checkpoint(path, *program()) == {"step": 2}


def test_a_new_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "other").touch()
    save_checkpoint(tmp_path / "c.pt", *program())
    assert (tmp_path / "c.pt").stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed(exists, tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there" / "1.pt", tmp_path / "last.pt"
    if exists:
        save_checkpoint(target, *program(), step=0)
    link.symlink_to(target)
    save_checkpoint(link, *program(), step=1)
    assert link.is_symlink()
    assert load_checkpoint(target, *program()) == {"step": 1}
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "there"]
    assert os.listdir(tmp_path / "there") == ["1.pt"]


def test_what_a_killed_process_left_is_removed_by_the_next_save(tmp_path):
    code = """
import os, signal, torch, schedulefree_cpp
model = torch.nn.Linear(3, 3)
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
schedulefree_cpp.save_checkpoint("c.pt", model, schedulefree_cpp.SGDScheduleFree(model.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path)
    assert done.returncode == -signal.SIGKILL
    (partial,) = os.listdir(tmp_path)
    assert re.fullmatch(r"c\.pt\.\w{8}\.partial", partial)
    others = ["c.pt.partial", "cXpt.01234567.partial", "c.pt.backups.partial", "b.pt.01234567.partial"]
    for other in others:
        (tmp_path / other).touch()
    save_checkpoint(tmp_path / "c.pt", *program())
    assert sorted(os.listdir(tmp_path)) == sorted(["c.pt", *others])


def test_a_save_within_a_save_of_the_same_file_leaves_it_alone(tmp_path, monkeypatch):
    path, fsync = tmp_path / "c.pt", os.fsync

    def save_again(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        save_checkpoint(path, *program(), step=1)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", save_again)
    save_checkpoint(path, *program(), step=0)
    assert load_checkpoint(path, *program()) == {"step": 0}
    assert os.listdir(tmp_path) == ["c.pt"]


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
