"""Variants against their definitions, written down anew in float64: 200 steps, to 1e-9."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import cases
import pytest
import torch
from reference import Hyperparameters, Iterate, MuonReference, Reference
from schedulefree_cpp import AdamWScheduleFree, MuonScheduleFree

STEPS = 200
EXACT = {"rtol": 1e-9, "atol": 1e-9}
SHAPES = [(6, 4), (4, 3, 3), (5,), ()]
MATRICES = [(6, 4), (3, 5, 4), (4, 3, 2, 2)]  # one, a batch of them, and filters
PAGE = Path(__file__).parents[2] / "docs" / "variants.md"


def assert_iterates(optimizer, params, iterates):
    """Y in the parameters, z in the state, and x within averaged() are those of a definition."""
    for p, it in zip(params, iterates, strict=True):
        torch.testing.assert_close(p.detach(), it.y, **EXACT)
        torch.testing.assert_close(optimizer.state[p]["z"], it.z, **EXACT)
    with optimizer.averaged():
        for p, it in zip(params, iterates, strict=True):
            torch.testing.assert_close(p.detach(), it.x, **EXACT)


def test_amuse_is_what_its_authors_derive_of_the_averaging_weights():
    """Kim et al., arXiv 2605.22432: beta of c, after a warmup whose learning rates weigh the average."""
    definition = re.search(r"^def amuse.*?\n(?=\n\n)", PAGE.read_text(), re.DOTALL | re.MULTILINE)[0]
    namespace = {}
    exec(definition, namespace)
    beta0, rho, warmup, lr = 0.6, 0.8, 20, 0.01
    params = cases.parameters(MATRICES + SHAPES[1:], torch.float64)
    matrices, others = params[: len(MATRICES)], params[len(MATRICES) :]
    optimizer = MuonScheduleFree(
        [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}],
        lr=lr,
        betas=(beta0, 0.999),
        weight_decay=0.05,
        warmup_steps=warmup,
    )
    optimizer.train()
    h = Hyperparameters(adam=True, lr=lr, beta=beta0, weight_decay=0.05, warmup_steps=warmup, decay_at="z")
    references = [MuonReference.of(matrices, replace(h, adam=False)), Reference.of(others, h)]
    total, c0, betas = 0.0, math.nan, []
    for t in range(1, STEPS + 1):
        weight = (lr * min(1.0, t / warmup)) ** 2
        total += weight
        c = weight / total
        c0 = c if t == warmup else c0
        beta = beta0
        if t > warmup:
            beta = 1 - (c * (1 - c0) / (c0 * (1 - c))) ** rho * (1 - beta0)
        betas.append(beta)
        cases.set_gradients(params, t)
        for reference, own in zip(references, (matrices, others), strict=True):
            reference.h = replace(reference.h, beta=beta)
            reference.step([p.grad for p in own])
        namespace["amuse"](optimizer, beta0, rho)
        optimizer.step()
        assert optimizer.param_groups[0]["betas"][0] == pytest.approx(beta, rel=1e-12)
    assert_iterates(optimizer, params, [it for reference in references for it in reference.iterates])
    assert betas[warmup - 1] == beta0 < betas[warmup] < betas[-1] < 1


@pytest.mark.parametrize("decay_at", ["y", "z"])
def test_generalized_primal_averaging_is_the_papers(decay_at):
    """Defazio et al., arXiv 2512.17131, around AdamW, with the values of its authors."""
    mu_x, mu_y, lr, decay, beta1, beta2, eps = 0.9967, 0.7, 1e-3, 0.1, 0.9, 0.999, 1e-8
    params = cases.parameters(SHAPES, torch.float64)
    iterates = [Iterate.start(p) for p in params]
    optimizer = AdamWScheduleFree(
        params,
        lr=lr,
        betas=(mu_y, beta2),
        eps=eps,
        weight_decay=decay,
        decay_at=decay_at,
        averaging_weight=1 - mu_x,
        inner_momentum=beta1,
    )
    optimizer.train()
    for t in range(1, STEPS + 1):
        cases.set_gradients(params, t)
        for p, it in zip(params, iterates, strict=True):
            g = p.grad
            it.m = beta1 * it.m + (1 - beta1) * g
            it.v = beta2 * it.v + (1 - beta2) * g * g
            d = it.m / (1 - beta1**t) / ((it.v / (1 - beta2**t)).sqrt() + eps)
            it.z = it.z - lr * d - lr * decay * (it.y if decay_at == "y" else it.z)
            it.x = mu_x * it.x + (1 - mu_x) * it.z
            it.y = mu_y * it.x + (1 - mu_y) * it.z
        optimizer.step()
    assert_iterates(optimizer, params, iterates)


def test_inner_steps_of_gpas_table_are_powers():
    """The table of the page, by the rule that it states."""
    rows = re.search(r"\| inner steps \| (.*) \|\n.*\n\| `averaging_weight` \| (.*) \|", PAGE.read_text())
    steps, weights = ([float(cell) for cell in rows[i].split(" | ")] for i in (1, 2))
    for h, weight in zip(steps, weights, strict=True):
        assert 1 - 0.9 ** (1 / h) == pytest.approx(weight, abs=6e-5)


def test_sf_normuon_is_its_papers_algorithm():
    """Apte et al., arXiv 2605.23061, algorithm 1, with a constant learning rate."""
    lr, mu, beta1, beta2, decay, eps = 0.008, 0.8, 0.9, 0.95, 0.05, 1e-8
    (p,) = params = cases.parameters([(6, 4)], torch.float64)
    it = Iterate.start(p)
    v, s = torch.zeros(6, dtype=torch.float64), 0.0
    optimizer = MuonScheduleFree(
        params,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=decay,
        momentum=mu,
        nesterov=False,
        normalize_rows=True,
    )
    optimizer.train()
    for t in range(1, STEPS + 1):
        cases.set_gradients(params, t)
        it.m = mu * it.m + (1 - mu) * p.grad
        left, values, right = torch.linalg.svd(it.m, full_matrices=False)
        values = values / values.norm()
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        polar = left @ values.diag() @ right
        v = beta2 * v + (1 - beta2) * (polar * polar).mean(1)
        direction = polar / (v.sqrt() + eps)[:, None]
        it.z = it.z - lr * decay * it.z - 0.2 * lr * math.sqrt(24) / direction.norm() * direction
        s += lr**2
        it.x = (1 - lr**2 / s) * it.x + lr**2 / s * it.z
        it.y = (1 - beta1) * it.z + beta1 * it.x
        optimizer.step()
    assert_iterates(optimizer, params, [it])
