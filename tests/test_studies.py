"""The studies run, and ``docs/studies.md`` says what their results say."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from schedulefree_cpp import SGDScheduleFree

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("convex", "digits", "anytime", "sensitivity", "averaging", "charlm")
PAGE = (ROOT / "docs" / "studies.md").read_text()
SECTIONS = {
    re.findall(r"python studies/(\w+)\.py", part)[0]: part
    for part in PAGE.split("\n## ")
    if "python studies/" in part
}


@pytest.fixture(scope="module")
def common():
    """The module ``studies/common.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "studies")
        import common

        yield common
    del sys.modules["common"]


def results(name):
    return json.loads((ROOT / "studies" / "results" / f"{name}.json").read_text())


# ---- the page ------------------------------------------------------------------------------------------


def test_the_page_has_every_study():
    scripts = {path.stem for path in (ROOT / "studies").glob("*.py")} - {"common"}
    assert set(SECTIONS) == set(NAMES) == scripts


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_results(common, name):
    content, section = results(name), SECTIONS[name]
    about = content["about"]
    assert common.table(content["rows"]) in section
    assert f"{about['cpu seconds'] / 60:.1f} CPU minutes" in section
    assert re.search(rf"!\[.+\]\(studies/{name}\.png\)", section)
    assert (ROOT / "docs" / "studies" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert about["cpu"] in PAGE
    assert f"torch {about['torch'].split('+')[0]}" in PAGE


def test_the_page_counts_who_ends_closer_to_the_minimum():
    rows = [row for row in results("convex")["rows"] if row["at the end"] == "above the minimum"]
    sets = list(rows[0])[2:]
    wins = []
    for free, *others in (rows[:4], rows[4:]):
        assert free["optimizer"].endswith("ScheduleFree")
        for name in sets:
            for other in others:
                wins.append(sum(ours < theirs for ours, theirs in zip(free[name], other[name], strict=True)))
    assert set(wins) == {4, 5}
    assert f"in {wins.count(5)} of the {len(wins)} comparisons with every seed" in SECTIONS["convex"].replace(
        "\n", " "
    )


def test_the_page_tells_how_far_behind_the_gpt_ends():
    (free,), (cosine,) = (list(row.values())[-2] for row in results("charlm")["rows"])
    assert f"{free - cosine:.3f} bits per byte lower" in SECTIONS["charlm"]
    assert PAGE.count(f"{free - cosine:.3f} bits per byte lower") == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_are_of_all_seeds(name):
    content = results(name)
    for row in content["rows"]:
        lists = [value for value in row.values() if isinstance(value, list)]
        assert lists
        assert all(len(each) == len(content["about"]["seeds"]) for each in lists)


def test_the_recipe_averages_x(common):
    (recipe,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    torch.manual_seed(0)
    namespace = {}
    exec(recipe, namespace)
    kept, average = namespace["latest"], namespace["lawa"]
    expected = torch.stack([model.weight.detach() for model in kept]).mean(0)
    assert len(kept) == kept.maxlen
    torch.testing.assert_close(average.module.weight.detach(), expected)
    torch.testing.assert_close(
        namespace["model"].weight.detach(), kept[-1].weight.detach()
    )  # x, in eval mode


# ---- what the studies share ----------------------------------------------------------------------------


def test_cells_hold_the_spread_that_their_places_show(common):
    assert common.cell([0.5, 0.52, 0.54]) == "0.520 ± 0.020"
    assert common.cell([1e-5, 3e-5]) == "2.0e-05 ± 1e-05"
    assert common.cell([97.0, 97.0]) == "97.00 ± 0.00"
    assert common.cell([1.23456]) == "1.235"


@pytest.mark.parametrize(("schedule", "half"), [("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)])
def test_schedules_warm_up_and_end(common, schedule, half):
    method = common.Method("SGD", torch.optim.SGD, [0.1], schedule, warmup=0.1)
    optimizer, scheduler = method.start(torch.nn.Linear(2, 2), 0.1, 100)
    lrs = []
    for _ in range(100):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert lrs[0] == pytest.approx(0.01)
    assert max(lrs[:9]) < 0.1
    assert lrs[50] == pytest.approx(0.1 * half)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 if schedule == "constant" else 0.0)


def test_runs_repeat_and_are_scored_at_x(common):
    data = common.split(
        torch.randn(100, 4, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 2
    )
    assert [len(part.labels) for part in (data.train, data.validation, data.test)] == [60, 20, 20]
    problem = common.Problem(
        lambda: torch.nn.Linear(4, 2), lambda: common.shuffled(data.train, 8), common.cross_entropy
    )
    method = common.Method("free", SGDScheduleFree, [0.1])
    first = common.run(problem, data, method, 1.0, 30, seed=0)
    assert first == common.run(problem, data, method, 1.0, 30, seed=0)
    assert first != common.run(problem, data, method, 1.0, 30, seed=1)
    *_, (model, optimizer) = common.train(problem, method, 1.0, 30, seed=0)
    at_y = common.score(model, data.test, data.train)
    optimizer.eval()
    assert common.score(model, data.test, data.train) == first != at_y


# ---- the scripts ---------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize("name", NAMES)
def test_a_study_can_be_tried(common, tmp_path, name):
    before = (ROOT / "studies" / "results" / f"{name}.json").read_bytes()
    done = subprocess.run(
        [sys.executable, f"studies/{name}.py", "--quick", "--out", str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert common.table(content["rows"]) in done.stdout
    assert list(content["rows"][0])[:2] == list(results(name)["rows"][0])[:2]
    numbers = [
        value
        for row in content["rows"]
        for values in row.values()
        if isinstance(values, list)
        for value in values
    ]
    assert all(map(math.isfinite, numbers))
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.png"]
    assert (ROOT / "studies" / "results" / f"{name}.json").read_bytes() == before


@pytest.mark.frameworks
def test_a_study_explains_and_refuses_options():
    def start(*arguments):
        return subprocess.run(
            [sys.executable, "studies/digits.py", *arguments], cwd=ROOT, capture_output=True, text=True
        )

    assert re.search(r"--epochs EPOCHS\s+\w", start("--help").stdout)
    done = start("--seeds", "0")
    assert done.returncode == 2
    assert "must be at least 1, not 0" in done.stderr
