"""Draws how close steps come to the speed of memory, from the figures of ``benchmarks/step.py``.

    python docs/roofline.py

Each point is the time of a loop that moves the same memory without arithmetic, by the time of the step: 1 is
the roof. Both times were taken in the same round, and the ratio is the median over the rounds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"

OURS, TORCH, ROOF = "schedulefree_cpp", "torch fused", "no arithmetic"

# Bytes that one parameter's update reads and writes, by the row of the benchmark.
LARGE = {
    "8 x 4M fp32, AdamW step": 28,
    "8 x 4M fp32, SGD step": 20,
    "8 x 4M fp32, around a base step": 16,
    "8 x 4M fp32, eval+train": 12,
}


def load(name: str) -> dict[str, Any]:
    """The figures of one run."""
    figures: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return figures


def ratios(figures: dict[str, Any], contender: str) -> dict[str, float]:
    """A contender's ratios by row: ours by its time, for the roof its time by ours."""
    return {t["row"]: t["ratio"] for t in figures["timings"] if t["contender"] == contender}


def formats(figures: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Bytes moved and the part of the roof that is reached, by storage format."""
    kept = {
        c["row"]: c["count"]
        for c in figures["counts"]
        if c["contender"] == OURS and c["unit"] == "bytes/parameter"
    }
    reached = ratios(figures, ROOF)
    found = {}
    for row, stored in kept.items():
        gradient = 4 if "fp32" in row else 2
        found[row.removeprefix("8 x 4M ")] = (2 * stored + gradient, reached[f"{row}, AdamW step"])
    return found


def draw() -> Figure:
    """Left: float32 steps. Right: AdamW in every format. A row is one loop, with the bytes that it moves."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    whole, few = figure.subplots(1, 2, sharex=True)
    figures = load("cpu")
    reached, of_torch = ratios(figures, ROOF), ratios(figures, TORCH)
    place(whole, [(row.split(", ")[1], moved) for row, moved in LARGE.items()])
    whole.plot([reached[row] for row in LARGE], range(len(LARGE)), "o", color="tab:blue", label=OURS)
    compared = [i for i, row in enumerate(LARGE) if row in of_torch]
    rows = [*LARGE]
    whole.plot(
        [reached[rows[i]] * of_torch[rows[i]] for i in compared],
        compared, "s", color="tab:orange", fillstyle="none", label=TORCH,
    )  # fmt: skip
    whole.set_title(f"float32, {figures['threads']} threads, {figures['isa'].upper()}")
    for isa, marker, color in (("avx512", "o", "tab:blue"), ("avx2", "^", "tab:green")):
        figures = load(f"formats_{isa}")
        points = sorted(formats(figures).items(), key=lambda item: -item[1][0])
        few.plot(
            [part for _, (_, part) in points], range(len(points)), marker, color=color, label=isa.upper()
        )
    place(few, [(name, moved) for name, (moved, _) in points])
    few.set_title(f"AdamW by storage format, {figures['threads']} threads")
    for axes in (whole, few):
        axes.axvline(1, color="0.4", linewidth=1)
        axes.set_xlim(0, 1.1)
        axes.set_xlabel("part of the speed of memory")
        axes.legend(loc="upper left")
    return figure


def place(axes: Axes, rows: list[tuple[str, float]]) -> None:
    """Gives each row a name and a line, the first on top."""
    axes.set_yticks(range(len(rows)), [f"{name}\n{moved:.3g} bytes" for name, moved in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def main() -> None:
    """Writes the picture and prints its points."""
    parser = argparse.ArgumentParser(description="Draw how close steps come to the speed of memory.")
    parser.add_argument("--out", type=Path, default=DOCS / "roofline.png")
    arguments = parser.parse_args()
    for row, part in ratios(load("cpu"), ROOF).items():
        print(f"{row:50} {LARGE[row]:5} bytes {part:.2f}")
    for isa in ("avx512", "avx2"):
        for name, (moved, part) in formats(load(f"formats_{isa}")).items():
            print(f"{isa} {name:43} {moved:5.1f} bytes {part:.2f}")
    draw().savefig(arguments.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
