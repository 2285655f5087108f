"""Draws x, y and z of schedule-free SGD on a problem with two weights.

    python docs/how_it_works.py

The problem is logistic regression on two measurements of 569 tumours (scikit-learn's breast cancer data), one
batch of 8 at a time. Nothing is random but the order of the batches, whose seed is fixed.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.figure import Figure
from schedulefree_cpp import SGDScheduleFree
from sklearn.datasets import load_breast_cancer
from torch import Tensor
from torch.nn import functional

BETA, LR, STEPS, BATCH = 0.9, 3.0, 150, 8
MEASUREMENTS = ("mean radius", "mean concave points")
COLORS = {"z": "tab:orange", "x": "tab:blue", "y": "black"}
WIDTHS = {"z": 1.0, "x": 3.0, "y": 0.8}


def load_data() -> tuple[Tensor, Tensor]:
    """Two standardised measurements, shape (569, 2), and 1 for malignant, 0 for benign."""
    data = load_breast_cancer()
    columns = [list(data.feature_names).index(name) for name in MEASUREMENTS]
    inputs = torch.tensor(data.data[:, columns])
    return (inputs - inputs.mean(0)) / inputs.std(0), torch.tensor(1.0 - data.target)


def loss_of(weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """The mean logistic loss of weights of shape (..., 2)."""
    scores = weights @ inputs.T
    losses = functional.binary_cross_entropy_with_logits(scores, labels.expand_as(scores), reduction="none")
    return losses.mean(-1)


def paths(inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The weights at x, y and z after every step."""
    torch.manual_seed(0)
    weights = torch.nn.Parameter(torch.tensor([-2.0, 5.0], dtype=inputs.dtype))
    optimizer = SGDScheduleFree([weights], lr=LR, momentum=BETA)
    optimizer.train()
    found: dict[str, list[Tensor]] = {name: [weights.detach().clone()] for name in COLORS}
    for _ in range(STEPS):
        batch = torch.randint(len(inputs), (BATCH,))
        optimizer.zero_grad()
        loss_of(weights, inputs[batch], labels[batch]).backward()
        optimizer.step()
        found["y"].append(weights.detach().clone())
        found["z"].append(optimizer.state[weights]["z"].clone())
        with optimizer.averaged():
            found["x"].append(weights.detach().clone())
    return {name: torch.stack(path) for name, path in found.items()}


def minimum(inputs: Tensor, labels: Tensor) -> Tensor:
    """The best weights, by Newton's method."""
    weights = torch.zeros(2, dtype=inputs.dtype)
    for _ in range(20):
        p = (inputs @ weights).sigmoid()
        hessian = (inputs * (p * (1 - p)).unsqueeze(1)).T @ inputs
        weights = weights - torch.linalg.solve(hessian, inputs.T @ (p - labels))
    return weights


def draw(found: dict[str, Tensor], inputs: Tensor, labels: Tensor) -> Figure:
    """The three paths over the contours of the loss, and their losses against steps."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    plane, curves = figure.subplots(1, 2)
    everything = torch.cat(list(found.values()))
    low, high = everything.amin(0) - 0.7, everything.amax(0) + 0.7
    first, second = (torch.linspace(float(a), float(b), 120) for a, b in zip(low, high, strict=True))
    grid = torch.stack(torch.meshgrid(first, second, indexing="xy"), -1).to(inputs.dtype)
    best = minimum(inputs, labels)
    least = loss_of(best, inputs, labels)
    heights = loss_of(grid, inputs, labels) - least
    plane.contour(first, second, heights, levels=torch.logspace(-3, 0.6, 12), colors="0.8", linewidths=0.8)
    for name, path in found.items():
        style = {"color": COLORS[name], "linewidth": WIDTHS[name], "label": name}
        plane.plot(*path.T, **style)
        curves.plot(loss_of(path, inputs, labels) - least, **style)
    plane.plot(*found["x"][0], "ko", markersize=5)
    plane.plot(*best, "k*", markersize=12)
    plane.set_xlabel(f"weight of {MEASUREMENTS[0]}")
    plane.set_ylabel(f"weight of {MEASUREMENTS[1]}")
    plane.set_title("paths from the dot; the star is the minimum")
    curves.set_yscale("log")
    curves.set_xlabel("step")
    curves.set_title("loss on all 569 tumours, above the minimum")
    curves.legend()
    return figure


def main() -> None:
    """Writes the picture and prints the losses."""
    parser = argparse.ArgumentParser(description="Draw x, y and z on a problem with two weights.")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("how-it-works.png"))
    arguments = parser.parse_args()
    inputs, labels = load_data()
    found = paths(inputs, labels)
    torch.testing.assert_close(found["y"], BETA * found["x"] + (1 - BETA) * found["z"])
    least = loss_of(minimum(inputs, labels), inputs, labels)
    print(f"the minimum: loss {least:.4f}")
    for name, path in found.items():
        losses = loss_of(path[-50:], inputs, labels)
        print(f"{name}: loss {losses.mean():.4f}, mean of the last 50 steps")
    draw(found, inputs, labels).savefig(arguments.out, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    main()
