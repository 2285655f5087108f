"""The pictures of ``docs/``, and the numbers that pages give beside them, come from scripts and committed figures."""

from __future__ import annotations

import json
import re
import runpy
import statistics
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
UPSTREAM_WRAPPER = "schedulefree's wrapper"


def drawn(script: str, tmp_path: Path) -> str:
    picture = tmp_path / "picture.png"
    command = [sys.executable, ROOT / "docs" / script, "--out", picture]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")
    return done.stdout


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


@pytest.mark.frameworks
def test_the_losses_of_x_y_and_z_are_those_of_the_page(tmp_path):
    losses = re.findall(r"loss ([\d.]+)", drawn("how_it_works.py", tmp_path))
    assert len(losses) == 4
    assert [loss for loss in losses if loss not in page("how-it-works.md")] == []


@pytest.mark.frameworks
def test_the_roofline_is_drawn_from_every_format(tmp_path):
    parts = [
        float(part) for part in re.findall(r"bytes ([\d.]+)$", drawn("roofline.py", tmp_path), re.MULTILINE)
    ]
    assert len(parts) == 4 + 2 * 10
    assert all(0 < part < 1.5 for part in parts)


def timings(name: str, kind: str) -> dict[tuple[str, str], float]:
    figures = json.loads((RESULTS / f"{name}.json").read_text())
    return {(t["row"], t["contender"]): t[kind] for t in figures["timings"] if t[kind] is not None}


def test_the_host_cost_on_the_performance_page_is_that_of_the_results():
    seconds = timings("cpu", "median_s")
    rows = re.findall(
        r"^\| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$", page("performance.md").split("## The roof")[0], re.M
    )
    contenders = {"torch fused": "torch fused", "`schedulefree`": "schedulefree foreach"}
    work, found = "", []
    for label, *cells in rows:
        if not label.startswith("the same, "):
            work = label
        contender = contenders.get(label.removeprefix("the same, "), "schedulefree_cpp")
        for size, cell in zip(("1 x 8", "300 x 8"), cells, strict=True):
            found.append((label, size, cell, 1e6 * seconds[f"{size} fp32, {work}", contender]))
    assert len(found) == 8
    assert [f for f in found if f[2] != (f"{f[3]:.1f}" if f[3] < 10 else f"{f[3]:.0f}")] == []


@pytest.mark.parametrize(
    ("results", "row", "contender"),
    [
        ("cpu", "8 x 4M fp32, AdamW step", "torch fused"),
        ("cpu", "8 x 4M fp32, SGD step", "torch fused"),
        ("cpu", "1 x 8 fp32, AdamW step", "torch fused"),
        ("cpu", "1 x 8 fp32, eval+train", "schedulefree foreach"),
        ("formats_avx2", "8 x 4M fp32, AdamW step", "torch fused"),
        ("cpu", "8 x 4M fp32, clipped AdamW step", "clip_grad_norm_, then ours"),
        ("cpu", "300 x 8 fp32, clipped AdamW step", "clip_grad_norm_, then ours"),
        ("cpu", "8 x 4M fp32, AdamW step", "no arithmetic"),
        ("cpu", "8 x 4M fp32, SGD step", "no arithmetic"),
        ("cpu", "8 x 4M fp32, around a base step", "no arithmetic"),
        ("cpu", "8 x 4M fp32, eval+train", "no arithmetic"),
        ("formats_avx512", "8 x 4M fp32, AdamW step", "no arithmetic"),
        ("formats_avx2", "8 x 4M fp32, AdamW step", "no arithmetic"),
    ],
)
def test_a_ratio_on_the_performance_page_is_that_of_the_results(results, row, contender):
    text = page("performance.md").split("## The roof")[1]
    assert f"{timings(results, 'ratio')[row, contender]:.2f}" in re.findall(r"\d+\.\d+", text)


def test_how_times_grow_is_what_was_measured():
    growth = runpy.run_path(str(ROOT / "benchmarks" / "growth.py"))
    figures = json.loads((RESULTS / "growth.json").read_text())
    compiled = figures["compiled"]
    of_compiled = {name: row for name, row in compiled.items() if name != "counts"}
    for title, counts, rows in (
        ("tensors", figures["counts"], figures["tensors"]),
        ("groups", figures["counts"], figures["groups"]),
        ("parameters", compiled["counts"], of_compiled),
    ):
        assert growth["page_table"](title, counts, rows) in page("performance.md")


def test_the_costs_on_the_page_of_the_wrapper_are_those_of_the_results():
    seconds, ratio = timings("cpu", "median_s"), timings("cpu", "ratio")
    tensors = {t["row"]: t["tensors"] for t in json.loads((RESULTS / "cpu.json").read_text())["timings"]}
    rows = re.findall(r"^\| (\d+ x .*?) \| (.*?) \| (.*?) \| (.*?) \|$", page("wrapper.md"), re.M)
    assert len(rows) == 4
    for row, *cells in rows:
        work = f"{row}, overhead"
        times = [seconds[work, contender] for contender in ("schedulefree_cpp", UPSTREAM_WRAPPER)]
        if row.startswith("8 x"):
            expected = [f"{1e3 * t:.1f} ms" for t in times]
        else:
            expected = [f"{1e6 * t / tensors[work]:.1f} us/tensor" for t in times]
        assert cells == [*expected, f"{ratio[work, UPSTREAM_WRAPPER]:.2f}"], row


# ---- docs/digits.png --------------------------------------------------------------------------------------


def curves() -> list[dict]:
    """The numbers of the picture, which its description holds: of each optimizer the accuracies by seed and epoch."""
    from PIL import Image

    return json.loads(Image.open(ROOT / "docs" / "digits.png").text["Description"])


@pytest.mark.frameworks
def test_the_readme_says_where_the_runs_of_its_picture_end():
    text = (ROOT / "README.md").read_text().split("## Install")[0]
    ends = [statistics.fmean(run[-1] for run in curve["accuracy"]) for curve in curves()]
    sgd, adamw, *shorter, longest = ends
    assert re.findall(r"(\d\d\.\d\d) %", text) == [f"{end:.2f}" for end in (sgd, adamw, longest)]
    assert max(sgd, adamw) < longest  # as the text says
    for end, epochs in zip(shorter, (8, 16), strict=True):
        for schedule_free in curves()[:2]:
            assert statistics.fmean(run[epochs - 1] for run in schedule_free["accuracy"]) >= end


@pytest.mark.frameworks
@pytest.mark.parametrize(("seeds", "epochs"), [(1, 4), pytest.param(5, 32, marks=pytest.mark.long)])
def test_the_picture_of_the_readme_is_what_is_drawn(seeds, epochs):
    digits = runpy.run_path(str(ROOT / "examples" / "digits.py"))
    data, names = digits["load_data"](), {label: name for name, label in digits["NAMES"].items()}
    for curve in curves():
        name, length = names[curve["optimizer"]], len(curve["accuracy"][0])
        lr, last = digits["LEARNING_RATES"][name], min(epochs, length) - 1
        runs = [digits["train"](name, length, seed, lr, data) for seed in range(seeds)]
        mean = statistics.fmean(next(islice(run, last, None))[0] for run in runs)
        drawn = statistics.fmean(run[last] for run in curve["accuracy"][:seeds])
        # Processors differ in the last bits of a convolution, and in time in some of the 719 test images.
        assert mean == pytest.approx(drawn, abs=1 / seeds**0.5), curve["optimizer"]


# ---- docs/precision.md ---------------------------------------------------------------------------------


def rows_of(heading: str) -> list[list[str]]:
    """The cells of the tables in a section of the page, those of the heads left out."""
    section = re.split(r"^## ", page("precision.md").split(f"\n## {heading}\n")[1], flags=re.M)[0]
    lines = re.findall(r"^\| ([^|\n]+ \| .*\d.*) \|$", section, re.M)
    return [[cell.strip() for cell in line.split("|")] for line in lines]


def test_the_accuracy_on_the_precision_page_is_that_of_the_results():
    figures = json.loads((RESULTS / "precision.json").read_text())
    problems = ["lr 1e-2", "lr 1e-4", "spread, lr 1e-2", "word, lr 1e-2"]
    of_quadratic = {(q["mode"], q["problem"].strip()): q for q in figures["quadratic"]}
    digits, charlm = ({r["mode"]: r for r in figures[name]} for name in ("digits", "charlm"))

    def spread(values: list[float], digits: int) -> str:
        mean, least, most = (f"{v:.{digits}f}" for v in (statistics.fmean(values), min(values), max(values)))
        return f"{mean} ({least}-{most})"

    rows = rows_of("Accuracy")
    quadratic = {row[0]: row for row in rows if len(row) == 7}
    networks = {row[0]: row for row in rows if len(row) == 4}
    assert len(quadratic) == 12
    assert len(networks) == 10
    for mode, (_, _, _, *cells) in quadratic.items():
        for problem, cell in zip(problems, cells, strict=True):
            q = of_quadratic[mode, problem]
            if not mode.startswith("schedulefree"):
                assert cell == f"{q['ratio']:.4f} ({q['distance']:.3f})", (mode, problem)
    for mode, (_, accuracy, loss, bits) in networks.items():
        assert accuracy == spread(digits[mode]["accuracy"], 2)
        assert loss == spread(digits[mode]["loss"], 4)
        assert bits == spread(charlm[mode]["bits per byte"], 3)


def test_the_speed_on_the_precision_page_is_that_of_the_results():
    rows = rows_of("Speed")
    assert len(rows) == 10
    contenders = ("torch fused", "torch fused bf16", "no arithmetic")
    for mode, *cells in rows:
        row = f"8 x 4M {mode}, AdamW step"
        expected = [
            timings(name, "ratio")[row, contender]
            for name in ("formats_avx512", "formats_avx2")
            for contender in contenders
        ]
        assert cells == [f"{ratio:.2f}" for ratio in expected]
