"""What the host does for a call: how many Python frames, whatever the machine."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import cases
import pytest
import schedulefree_cpp
import torch

ROOT = Path(__file__).parents[2]


def program(path: str) -> Any:
    """A program of the repository as a module."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


calls = program("tools/calls.py")


@pytest.mark.parametrize("name", calls.LIMITS)
def test_calls_stay_within_their_limits(name):
    counts = calls.count(calls.operations()[name])
    assert counts[0] <= calls.LIMITS[name][0]
    assert counts[1] <= calls.LIMITS[name][1]


def test_the_count_sees_a_call_more(monkeypatch):
    step = schedulefree_cpp.AdamWScheduleFree._step
    optimizer = calls.trained()
    before = calls.count(optimizer.step)
    monkeypatch.setattr(type(optimizer), "_step", lambda *args, **kwargs: [step(*args, **kwargs)][0])
    assert calls.count(optimizer.step)[0] == before[0]  # a frame of this file is none of the package's
    monkeypatch.setattr(calls, "PACKAGE", str(ROOT))
    assert calls.count(optimizer.step)[0] > before[0]


@pytest.mark.parametrize("name", [*cases.NATIVE, "ScheduleFreeWrapper"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_mode_that_is_set_already_costs_the_same_for_any_number_of_parameters(name, mode):
    frames = []
    for n in (2, 60):
        optimizer = cases.make(name, cases.parameters([(3,)] * n))
        cases.run(optimizer, 2)
        getattr(optimizer, mode)()
        frames.append(len(calls.frames(getattr(optimizer, mode))))
    assert frames[0] == frames[1]


@pytest.mark.parametrize("name", [*cases.NATIVE, *cases.PLUS, *cases.MUON])
def test_a_group_costs_the_same_however_many_there_are(name):
    def construct(n: int) -> int:
        groups = [{"params": [p]} for p in cases.parameters([(3,)] * n)]
        return len(calls.frames(lambda: getattr(schedulefree_cpp, name)(groups)))

    few, more, most = (construct(n) for n in (10, 20, 40))
    assert most - more == 2 * (more - few)


def test_importing_loads_no_compiler():
    code = "import sys, torch, schedulefree_cpp; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_growth_of_every_method_is_measured(capsys):
    growth = program("benchmarks/growth.py")
    for of_groups in (False, True):
        rows = growth.growth(of_groups, (3, 6), 0.0)
        growth.show("few", (3, 6), rows)
        assert len(rows) > 15
        assert all(len(row["ms"]) == 2 and min(row["ms"]) > 0 for row in rows.values())
    assert "step(), clipped" in capsys.readouterr().out
    assert growth.exponent((10, 1000), [1.0, 100.0]) == pytest.approx(1.0)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_guards_a_compiled_step_grows_with_the_parameters_alone():
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    def lines(n: int) -> list[str]:
        torch._dynamo.reset()
        optimizer = cases.make("AdamWScheduleFree", cases.parameters([(3,)] * n))
        cases.run(optimizer, 1)

        def step() -> None:
            optimizer.step()

        compiled = torch.compile(step, backend="eager", fullgraph=True)
        compiled(), compiled()
        (entry,) = _debug_get_cache_entry_list(step.__code__)
        return str(entry.guard_manager).splitlines()

    few, more, most = (lines(n) for n in (5, 10, 20))
    assert len(most) - len(more) == pytest.approx(2 * (len(more) - len(few)), abs=5)
    assert not any("dict_keys" in line for line in most)  # it would be walked for every entry
    torch._dynamo.reset()
