"""Draws how close steps come to the speed of memory, from the figures of ``benchmarks/step.py``.

    python docs/roofline.py

Each point is the time of a loop that moves the same memory without arithmetic, by the time of the step: 1 is
the roof. Both times were taken in the same round, and the ratio is the median over the rounds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent
RESULTS = DOCS.parent / "benchmarks" / "results"

OURS, TORCH, ROOF = "schedulefree_cpp", "torch fused", "no arithmetic"

# Bytes that one parameter's update reads and writes, by the row of the benchmark.
LARGE = {"8 x 4M fp32, AdamW step": 28, "8 x 4M fp32, SGD step": 20, "8 x 4M fp32, eval+train": 12}


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
    """Left: float32 steps. Right: AdamW in every format."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    whole, few = figure.subplots(1, 2, sharey=True)
    figures = load("cpu")
    reached, of_torch = ratios(figures, ROOF), ratios(figures, TORCH)
    for row, moved in LARGE.items():
        label = row.split(", ")[1]
        whole.plot(moved, reached[row], "o", color="tab:blue")
        whole.annotate(f"{label}", (moved, reached[row]), textcoords="offset points", xytext=(8, -12))
        if row in of_torch:
            whole.plot(moved, reached[row] * of_torch[row], "s", color="tab:orange", fillstyle="none")
    whole.plot([], [], "o", color="tab:blue", label="schedulefree_cpp")
    whole.plot([], [], "s", color="tab:orange", fillstyle="none", label="torch fused")
    whole.set_title(f"float32, {figures['threads']} threads, {figures['isa'].upper()}")
    whole.set_ylabel("part of the speed of memory")
    whole.set_xlim(8, 33)
    for isa, marker, color in (("avx512", "o", "tab:blue"), ("avx2", "^", "tab:green")):
        figures = load(f"formats_{isa}")
        points = formats(figures)
        few.plot(*zip(*points.values(), strict=True), marker, color=color, label=isa.upper())
        if isa == "avx512":
            for name, (moved, part) in points.items():
                if "random" not in name:
                    few.annotate(name, (moved, part), textcoords="offset points", xytext=(6, 3), fontsize=8)
    few.set_title(f"AdamW by storage format, {figures['threads']} threads")
    few.set_xlim(15, 33)
    for axes in (whole, few):
        axes.axhline(1, color="0.4", linewidth=1)
        axes.set_ylim(0, 1.2)
        axes.set_xlabel("bytes moved for each parameter")
        axes.legend(loc="lower right")
    return figure


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
