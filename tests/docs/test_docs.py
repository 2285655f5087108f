"""What the README and the pages of ``docs/`` show is run as it stands, and what they link to is there."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import traceback
import unicodedata
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import schedulefree_cpp
import torch
import torchvision_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]

NOT_INSTALLED = 2  # status of a process whose page needs a framework that cannot be imported

# Pages with Python that is not run as a page (marked ``py``), and why.
NOT_RUN = {
    "docs/cuda-graphs.md": "captures a graph, which needs a GPU; tests/cuda/test_cuda.py does so",
    "docs/from-schedulefree.md": "would hide the package that the rest of the page compares with",
    "docs/trainers/deepspeed.md": "needs two processes; tests/integrations/test_integrations.py starts them where DeepSpeed is installed",
}


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    line: int  # of the page, that is before its text
    text: str


def blocks(page: Path, *languages: str) -> list[Block]:
    """The blocks of a page in these languages, or all."""
    text = page.read_text()
    return [
        Block(match[2], text[: match.start(3)].count("\n"), re.sub(f"^{match[1]}", "", match[3], flags=re.M))
        for match in re.finditer(r"^( *)```(\S*)[^\n]*\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE)
        if not languages or match[2] in languages
    ]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ---- Python --------------------------------------------------------------------------------------------


def frameworks_of(page: Path) -> list[str]:
    """What a page imports beside Python's own library, torch and this package."""
    text = "\n".join(block.text for block in blocks(page, "python"))
    names = set(re.findall(r"^(?:import|from) (\w+)", text, re.MULTILINE))
    return sorted(names - sys.stdlib_module_names - {"torch", "schedulefree_cpp"})


def execute(page: Path, frameworks: list[str], folder: Path) -> None:
    """Runs the blocks of a page one after the other, as one program, in a process of its own."""
    os.chdir(folder)
    with (
        open("output", "w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        if "timm" in frameworks:
            torchvision_names.provide()
        if not frameworks:
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", ".torch.jit.", DeprecationWarning)  # of torch itself
        torch.manual_seed(0)
        namespace = {"__name__": "__main__"}
        try:
            for block in blocks(page, "python"):
                exec(compile("\n" * block.line + block.text, name_of(page), "exec"), namespace)
        except ModuleNotFoundError as error:
            traceback.print_exc()
            sys.exit(NOT_INSTALLED if error.name in frameworks else 1)
        except BaseException:
            traceback.print_exc()
            sys.exit(1)


def page_cases():
    for page in PAGES:
        text = "".join(block.text for block in blocks(page, "python"))
        marks = [pytest.mark.frameworks] if frameworks_of(page) else []
        marks += [pytest.mark.compile] if "torch.compile(" in text else []
        if text:
            yield pytest.param(page, id=name_of(page), marks=marks)


@pytest.mark.parametrize("page", list(page_cases()))
def test_the_python_of_a_page_runs(page, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["torch", "schedulefree_cpp"])
    process = processes.Process(target=execute, args=(page, frameworks_of(page), tmp_path))
    process.start()
    process.join()
    output = (tmp_path / "output").read_text()
    if process.exitcode == NOT_INSTALLED:
        pytest.skip(output.splitlines()[-1])
    assert process.exitcode == 0, output


def test_python_that_is_not_run_has_a_reason():
    assert {name_of(page) for page in PAGES if blocks(page, "py")} == NOT_RUN.keys()


def test_every_block_is_marked_with_what_it_is():
    known = {"python", "py", "sh", "cpp", "cmake", "yaml", "toml", "text", "bibtex"}
    unknown = [
        f"{name_of(page)}:{block.line}: {block.language!r}"
        for page in PAGES
        for block in blocks(page)
        if block.language not in known and not block.language.startswith("{")
    ]
    assert unknown == []


def test_a_step_of_the_operators_takes_five_lines_and_reaches_the_minimum():
    recipe = next(b.text for b in blocks(DOCS / "operators.md", "python") if "ops.sgd_step_" in b.text)
    lines = recipe.splitlines()
    loop = lines[lines.index("for k in range(1000):") + 1 :]
    assert [line.startswith("    ") for line in loop].index(False) == 5
    namespace = {}
    exec(recipe, namespace)
    (x,), (z,) = namespace["y"], namespace["z"]
    torch.testing.assert_close(x, torch.ones(8), rtol=0, atol=0.01)
    assert not torch.equal(x, z)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_example_learns(seed):
    torch.manual_seed(seed)
    namespace = {}
    exec(blocks(ROOT / "README.md", "python")[0].text, namespace)
    assert abs(namespace["model"](torch.ones(1, 8)).item() - 8) < 0.1


# ---- C++ -----------------------------------------------------------------------------------------------


@pytest.mark.build
def test_the_cpp_page_works_when_pasted(tmp_path):
    page = DOCS / "cpp.md"
    (main, wrapped), (lists, _) = blocks(page, "cpp"), blocks(page, "cmake")
    commands = next(block.text for block in blocks(page, "sh") if "build/app" in block.text)
    (tmp_path / "main.cpp").write_text(main.text)
    (tmp_path / "wrapped.cpp").write_text(wrapped.text)
    of_wrapped = lists.text[lists.text.index("add_executable") :].replace("app", "wrapped")
    (tmp_path / "CMakeLists.txt").write_text(lists.text + of_wrapped.replace("main.cpp", "wrapped.cpp"))
    commands += "build/wrapped\n"
    done = subprocess.run(["bash", "-e", "-c", commands], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    errors = [float(line.split()[1]) for line in done.stdout.splitlines() if re.fullmatch(r"\d \S+", line)]
    assert len(errors) == 3
    assert errors[-1] < errors[0]
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = torch.nn.Linear(8, 1)
    optimizer = schedulefree_cpp.AdamWScheduleFree(model.parameters())
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    optimizer.train()
    assert optimizer.param_groups[0]["k"] == 150
    checkpoint = torch.load(tmp_path / "wrapped.pt", weights_only=True)
    wrapper = schedulefree_cpp.ScheduleFreeWrapper(torch.optim.RMSprop(model.parameters()))
    wrapper.load_state_dict(checkpoint["optimizer"])
    assert wrapper.param_groups[0]["sf_k"] == 150
    assert wrapper.param_groups[0]["lr"] == 0.005


# ---- numbers -------------------------------------------------------------------------------------------


def test_the_table_of_speed_and_memory_has_the_results_of_the_benchmark():
    results = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    ratios = {(t["row"], t["contender"]): t["ratio"] for t in results["timings"]}
    counts = {(c["row"], c["contender"]): c["count"] for c in results["counts"]}
    rows = re.findall(
        r"^\| (\d+ x .*?) \| (.*?) ?\| (.*?) ?\| (.*) \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == 11
    for row, upstream, fused, ours in rows:
        torch_fused = "clip_grad_norm_, fused" if "clipped" in row else "torch fused"
        for cell, contender in ((upstream, "schedulefree foreach"), (fused, torch_fused)):
            if row.endswith("memory"):
                assert cell == f"{counts[row, contender]} bytes"
            elif cell or (row, contender) in ratios:
                assert cell == f"{1 / ratios[row, contender]:#.2g}", (row, contender)
        assert ours == (f"{counts[row, 'schedulefree_cpp']} bytes" if row.endswith("memory") else "1")


def test_the_tables_of_the_tuning_page_have_the_results_of_the_benchmark():
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("advice", ROOT / "benchmarks" / "advice.py")
    advice = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(advice)
    rows = json.loads((ROOT / "benchmarks" / "results" / "advice.json").read_text())["rows"]
    assert [(row["heading"], row["row"]) for row in rows] == [row[:2] for row in advice.rows()]
    page = (DOCS / "tuning.md").read_text()
    assert [table for table in advice.tables(rows) if table not in page] == []


# ---- commands, links and references --------------------------------------------------------------------


def test_commands_name_files_and_targets_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    missing = []
    for page in PAGES:
        text = page.read_text()
        shown = "\n".join([*re.findall(r"`([^`\n]+)`", text), *(b.text for b in blocks(page, "sh"))])
        missing += [
            f"{name_of(page)}: make {t}" for t in re.findall(r"\bmake ([a-z-]+)", shown) if t not in targets
        ]
        paths = re.findall(
            r"(?<![\w./-])((?:benchmarks|csrc|docs|examples|packaging|studies|tests|tools)/[\w./-]+)", shown
        )
        missing += [f"{name_of(page)}: {path}" for path in paths if not (ROOT / path).exists()]
    assert missing == []


def anchor(heading: str) -> str:
    """The name that GitHub and MyST give to a heading."""
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", heading).strip().lower()
    kept = [c for c in plain if c in " -_" or unicodedata.category(c)[0] in "LN"]
    return "".join(kept).replace(" ", "-")


def prose(page: Path) -> str:
    """A page without its blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


def test_links_lead_somewhere():
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=True)
    broken = []
    for page in sorted({*PAGES, *(ROOT / name for name in listed.stdout.split())}):
        for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            path, _, part = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            to = (page.parent / path).resolve() if path else page
            if not to.exists() or (part and to.suffix == ".md" and part not in anchors(to)):
                broken.append(f"{name_of(page)}: {target}")
    assert broken == []


def test_the_python_reference_has_every_public_name():
    page = (DOCS / "api" / "python.md").read_text()
    listed = set(re.findall(r"^   (\w+)$|^\.\. auto\w+:: (\w+)$", page, re.MULTILINE))
    names = {a or b for a, b in listed}
    assert names == {name for name in schedulefree_cpp.__all__ if name != "ops"}


# ---- the site's looks ----------------------------------------------------------------------------------

# The longest word that is one line of a phone in the size that docs/_static/site.css gives to titles there.
LONGEST = len("ScheduleFreeWrapperReference")


def test_no_word_of_a_title_is_too_long_for_a_phone():
    titles = {name: "the page of a class" for name in schedulefree_cpp.__all__}
    for page in PAGES:
        for title in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
            titles[re.sub(r"\[([^]]*)\]\([^)]*\)|`", r"\1", title)] = name_of(page)
    words = [(word, page) for title, page in titles.items() for word in re.split(r"[^\w.]+", title)]
    assert [(word, page) for word, page in words if len(word) > LONGEST] == []


def test_the_site_has_its_style():
    style = (DOCS / "_static" / "site.css").read_text()
    assert '"site.css"' in (DOCS / "conf.py").read_text()
    assert re.search(r"^h1 \{ font-size: clamp\(", style, re.MULTILINE)  # a name stays whole
    assert re.search(r"\.highlight pre \{ white-space: pre-wrap;", style)  # code is not cut
    dark = re.findall(r"^ *body\S+ article img \{ filter: invert\(", style, re.MULTILINE)
    assert len(dark) == 2  # by the reader's choice, and by the system's
    for section in re.findall(r"^#([\w-]+) ", style, re.MULTILINE):
        assert section in anchors(DOCS / "architecture.md")


def test_the_cpp_reference_begins_with_the_classes_that_programs_use():
    page = (DOCS / "api" / "cpp.md").read_text()
    assert re.findall(r"^```\{doxygen\w+\} (\S+)$", page, re.MULTILINE)[:5] == [
        "schedulefree::SGD",
        "schedulefree::AdamW",
        "schedulefree::RAdam",
        "schedulefree::Wrapper",
        "schedulefree::Optimizer",
    ]
    header = ROOT / "csrc" / "include" / "schedulefree_cpp" / "optim.h"
    command = [sys.executable, DOCS / "doxygen_filter.py", header]
    read = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name in ("SGD", "AdamW", "RAdam"):
        assert f"class {name} : public Optimizer {{" in read
        assert f"explicit {name}(std::vector<at::Tensor> params, {name}Options defaults = {{}})" in read
    assert "OptimizerOf" not in read
