"""The studies run, and ``docs/studies.md`` says what their results say."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from schedulefree_cpp import AdamCScheduleFreePlus, SGDScheduleFree

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("convex", "digits", "anytime", "sensitivity", "averaging", "gpt")
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


@pytest.fixture(scope="module")
def gpt(common):
    """The module ``studies/gpt.py``."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "studies")
        import gpt

        yield gpt
    del sys.modules["gpt"]


def results(name):
    return json.loads((ROOT / "studies" / "results" / f"{name}.json").read_text())


def runs_of(name):
    return ROOT / "studies" / "results" / f"{name}.jsonl"


def study(name, *arguments):
    done = subprocess.run(
        [sys.executable, f"studies/{name}.py", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- the page ------------------------------------------------------------------------------------------


def test_the_page_has_every_study():
    scripts = {path.stem for path in (ROOT / "studies").glob("*.py")} - {"common"}
    assert set(SECTIONS) == set(NAMES)
    assert scripts == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_results(common, name):
    content, section = results(name), SECTIONS[name]
    about = content["about"]
    for table in common.table(content["rows"]).split("\n\n"):
        assert table in section
    assert f"{about['cpu seconds'] / 60:.1f} CPU minutes" in section
    assert re.search(rf"!\[.+\]\(studies/{name}\.png\)", section)
    assert (ROOT / "docs" / "studies" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert about["cpu"] in PAGE
    assert f"torch {about['torch'].split('+')[0]}" in PAGE


@pytest.mark.frameworks
@pytest.mark.parametrize("name", NAMES)
def test_the_results_are_those_of_the_runs(tmp_path, name):
    copy = tmp_path / f"{name}.jsonl"
    copy.write_bytes(runs_of(name).read_bytes())
    study(name, "--out", tmp_path)
    assert copy.read_bytes() == runs_of(name).read_bytes()  # nothing was missing
    assert json.loads((tmp_path / f"{name}.json").read_text()) == results(name)


def test_the_page_counts_who_ends_closer_to_the_minimum():
    rows = [row for row in results("convex")["rows"] if row["at the end"] == "above the minimum"]
    sets = list(rows[0])[2:]
    wins = []
    for free, *others in (rows[:4], rows[4:]):
        assert free["optimizer"].endswith("ScheduleFree")
        for name in sets:
            for other in others:
                wins.append(sum(ours < theirs for ours, theirs in zip(free[name], other[name], strict=True)))
    assert set(wins) == {3, 4, 5}
    assert f"in {wins.count(5)} of the {len(wins)} comparisons with every seed" in SECTIONS["convex"].replace(
        "\n", " "
    )


def factors_beside_the_best(choice):
    """By how much the loss is higher at the values beside the one that was chosen."""
    losses = list(choice["losses"].values())
    best = losses.index(min(losses))
    return [losses[i] / losses[best] for i in (best - 1, best + 1) if 0 <= i < len(losses)]


def test_the_page_tells_what_neighbouring_rates_do():
    free, others = [], []
    for choice in results("convex")["tuning"]:
        (free if "ScheduleFree" in choice["method"] else others).extend(factors_beside_the_best(choice))
        assert not choice["at an end of the grid"]
    told = (
        f"{min(free):.1f} to {max(free):.1f} times, and those of the others "
        f"{min(others):.1f} to {max(others):.0f} times"
    )
    assert told in SECTIONS["convex"].replace("\n", " ")


@pytest.mark.parametrize(
    ("free", "other"),
    [
        ("SGDScheduleFree", "SGD, cosine"),
        ("SGDScheduleFree", "SGD, linear"),
        ("AdamWScheduleFree", "AdamW, cosine"),
        ("AdamWScheduleFree", "AdamW, linear"),
    ],
)
def test_the_page_tells_differences_by_seed(common, free, other):
    losses = {row["optimizer"]: row["test loss"] for row in results("digits")["rows"]}
    differences = [a - b for a, b in zip(losses[free], losses[other], strict=True)]
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    shown = f"{mean:.4f} ± {spread:.4f}" if max(differences) > 0 else f"{-mean:.4f} ± {spread:.4f}"
    assert shown in SECTIONS["digits"]


def test_the_page_tells_what_swa_does():
    rows = {(row["optimizer"], row["average on top"]): row for row in results("averaging")["rows"]}
    free, swa = rows["AdamWScheduleFree", "none"], rows["AdamWScheduleFree", "SWA"]
    constant = rows["AdamW, constant", "SWA"]["test loss"]
    assert max(swa["minus that without"]) < 0
    assert round(-statistics.fmean(free["test loss"]) / statistics.fmean(swa["minus that without"])) == 7
    for row in (free, swa):
        differences = [a - b for a, b in zip(row["test loss"], constant, strict=True)]
        told = f"{statistics.fmean(differences):.4f} ± {statistics.stdev(differences):.4f}"
        assert told in SECTIONS["averaging"]


def test_the_page_tells_how_far_contenders_are_from_the_cosine_run():
    ends = {
        row["contender"]: statistics.fmean(row["bits per byte at 2000"])
        for row in results("gpt")["rows"]
        if "lr" in row
    }
    cosine, section = ends["AdamW, cosine"], " ".join(SECTIONS["gpt"].split())
    constant = next(name for name in ends if "EMA" in name and "the same" not in name)
    for name, words in (
        ("AdamWScheduleFree, beta 0.9", "the schedule-free run ends {:.3f} bits above it"),
        ("AdamW, WSD", "WSD ends {:.3f} bits below it"),
        (constant, "the EMA {:.3f}"),
        ("AdamW, cosine, twice the lr", "at twice its rate the cosine run itself is {:.3f} bits lower"),
    ):
        assert words.format(abs(ends[name] - cosine)) in section


@pytest.mark.parametrize("name", NAMES)
def test_the_rows_are_of_all_seeds(name):
    content = results(name)
    for row in content["rows"]:
        lists = [value for value in row.values() if isinstance(value, list)]
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


def test_training_repeats_and_is_scored_at_x(common):
    generator = torch.Generator().manual_seed(0)
    part = common.Part(torch.randn(60, 4, generator=generator), torch.arange(60) % 2)
    problem = common.Problem(
        lambda: torch.nn.Linear(4, 2), lambda: common.shuffled(part, 8), common.cross_entropy
    )
    method = common.Method("free", SGDScheduleFree, [0.1])

    def at_x_and_y(seed):
        *_, (model, optimizer) = common.train(problem, method, 1.0, 30, seed)
        at_y = common.score(model, part, part)
        with common.averaged(optimizer):
            return common.score(model, part, part), at_y

    at_x, at_y = at_x_and_y(0)
    assert at_x != at_y
    assert at_x_and_y(0) == (at_x, at_y)
    assert at_x_and_y(1) != (at_x, at_y)


def test_a_method_decays_and_warms_up(common):
    method = common.Method("free", AdamCScheduleFreePlus, [1.0], warmup=0.1, warmup_option="c_warmup")
    optimizer, schedule = method.start(torch.nn.Linear(2, 2), 0.5, 50, 0.25)
    (group,) = optimizer.param_groups
    assert schedule is None
    assert (group["lr"], group["weight_decay"], group["c_warmup"]) == (0.5, 0.25, 5)


def test_nothing_is_trained_on_what_is_held_out(common):
    digits = common.Digits(4)
    parts = [
        {tuple(image.flatten().tolist()) for image in digits.part([fold]).inputs} for fold in digits.folds
    ]
    _, rest = digits.without([1, 3])
    assert len(rest.labels) == len(digits.part([0]).labels) + len(digits.part([2]).labels)
    assert not {tuple(image.flatten().tolist()) for image in rest.inputs} & (parts[1] | parts[3])
    assert digits.epoch([1, 3]) == len(rest.labels) // common.BATCH_SIZE


@pytest.fixture
def quick(common, tmp_path, monkeypatch):
    """A study to be tried, without a script."""
    monkeypatch.setattr(sys, "argv", ["try.py", "--out", str(tmp_path), "--seeds", "2"])
    threads = torch.get_num_threads()
    yield common.Study("try.py", "A study.", {})
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def test_a_fold_chooses_by_the_others(quick):
    pairs = []

    def losses(candidate, pair):
        pairs.append(pair)
        # On fold 0 the first is best, on the others the last.
        return [candidate if fold == 0 else -candidate for fold in pair]

    folds = range(3)
    assert [quick.choose_for_fold(fold, folds, [1, 2, 4], losses) for fold in folds] == [4, 1, 1]
    assert set(map(tuple, pairs)) == {(0, 1), (0, 2), (1, 2)}


def test_a_run_is_not_repeated(common, quick, tmp_path):
    calls = []

    def measure(lr, seed):
        calls.append((lr, seed))
        return {"loss": lr * seed}

    def other(lr, seed):
        return "other"

    assert quick.run(measure, lr=0.1, seed=2) == quick.run(measure, seed=2, lr=0.1) == {"loss": 0.2}
    assert quick.run(other, lr=0.1, seed=2) == "other"
    file = tmp_path / "try.jsonl"
    kept = file.read_text()
    assert [next(iter(json.loads(line))) for line in kept.splitlines()] == ["process", "settings", "settings"]
    file.write_text(kept + '{"settings": {"lr"')  # as a killed process leaves it
    again = common.Study("try.py", "A study.", {})
    assert file.read_text() == kept
    assert again.run(measure, lr=0.1, seed=2) == {"loss": 0.2}
    assert calls == [(0.1, 2)]
    assert file.read_text() == kept
    again.run(measure, lr=0.2, seed=2)
    assert calls == [(0.1, 2), (0.2, 2)]
    assert file.read_text().startswith(kept)


def test_tables_are_divided_where_their_columns_change(common):
    rows = [{"a": 1, "b": 2}, {"a": 3, "b": 4}, {"c": "x"}]
    assert common.table(rows) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |\n\n| c |\n| --- |\n| x |"


# ---- the GPT -------------------------------------------------------------------------------------------

SIZE = {"size": [16, 1, 16], "batch": 2, "seed": 3, "part": "test"}


def test_a_cool_down_is_a_run_of_its_own(gpt):
    marks = [4, 10]
    settings = SIZE | {"lr": 0.01, "decay": 0.1, "warmup": 2}
    found = gpt.constant(horizons=[5, 10], marks=marks, **settings)
    alone = gpt.constant(horizons=[], marks=marks, **settings)
    assert found | {"WSD": []} == alone
    run = gpt.Run(SIZE["size"], SIZE["batch"], SIZE["seed"], gpt.adamw(0.01, 0.1))
    # The last two of ten steps, at all and at half of the rate.
    (end,) = run.measured([10], "test", lambda step: gpt.warmed(0.01, 2, step) * min(1.0, (10 - step) / 2))
    assert [step for step, _ in found["WSD"]] == [5, 10]
    assert found["WSD"][1] == end
    assert found["constant"][1] != end


def test_contenders_begin_alike(gpt):
    free = gpt.schedule_free(lr=0.0, decay=0.0, beta=0.9, c=0.0, warmup=0, marks=[2], **SIZE)
    cosine = gpt.cosine(lr=0.0, decay=0.0, marks=[2], **SIZE)
    assert free == cosine
    assert gpt.cosine(lr=0.0, decay=0.0, marks=[2], **SIZE | {"seed": 4}) != cosine


def test_steps_to_a_loss_are_between_two_points(gpt):
    assert gpt.steps_to(2.5, [10, 100, 1000], [4, 3, 2]) == pytest.approx(10**2.5)
    assert gpt.steps_to(5.0, [10, 100], [4, 3]) == 10
    assert gpt.steps_to(1.0, [10, 100], [4, 3]) == math.inf


def test_intervals_hold_what_resampled_seeds_give(gpt):
    ends = [[[100, 3.0]], [[100, 3.0]]]
    curves = [[[10, 4.0], [100, 3.0], [1000, 2.0]], [[10, 4.0], [100, 2.0], [1000, 1.0]]]
    assert gpt.ratio(curves, ends, 100) == "0.46 (0.32 to 1.00)"
    never = [[[10, 4.0], [100, 3.5]], [[10, 4.0], [100, 3.5]]]
    assert gpt.ratio(never, ends, 100) == "not reached (not reached to not reached)"


# ---- the scripts ---------------------------------------------------------------------------------------


@pytest.mark.frameworks
@pytest.mark.parametrize("name", NAMES)
def test_a_study_can_be_tried(common, tmp_path, name):
    committed = sorted((ROOT / "studies" / "results").glob(f"{name}.*"))
    before = [path.read_bytes() for path in committed]
    shown = study(name, "--quick", "--out", tmp_path)
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert common.table(content["rows"]) in shown
    numbers = [
        value
        for row in content["rows"]
        for values in row.values()
        if isinstance(values, list)
        for value in values
    ]
    assert numbers
    assert all(map(math.isfinite, numbers))
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    files = [f"{name}.json", f"{name}.jsonl", f"{name}.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files
    assert sorted((ROOT / "studies" / "results").glob(f"{name}.*")) == committed
    assert [path.read_bytes() for path in committed] == before


@pytest.mark.frameworks
def test_a_study_that_was_stopped_goes_on_where_it_was(tmp_path):
    study("convex", "--quick", "--out", tmp_path)
    content = json.loads((tmp_path / "convex.json").read_text())
    runs = tmp_path / "convex.jsonl"
    kept = runs.read_bytes().splitlines(keepends=True)[:-3]
    runs.write_bytes(b"".join(kept))
    study("convex", "--quick", "--out", tmp_path)
    after = runs.read_bytes().splitlines(keepends=True)
    assert after[: len(kept)] == kept
    assert len(after) == len(kept) + 4  # three runs and their process
    again = json.loads((tmp_path / "convex.json").read_text())
    assert [again[key] for key in ("rows", "tuning")] == [content[key] for key in ("rows", "tuning")]


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
