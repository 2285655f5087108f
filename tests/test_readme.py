"""The README's Python, run as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"train_loader": [torch.randn(16, 8) for _ in range(3)]}
    use, *recipes = blocks()
    exec(use, namespace)
    errors = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 3
    assert errors[-1] < errors[0]
    assert len(recipes) == 4
    for recipe in recipes:
        exec(recipe, namespace)
    assert namespace["optimizer"].param_groups[0]["train_mode"]


def test_the_batchnorm_recipe_gives_the_statistics_of_x():
    import schedulefree_cpp

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = schedulefree_cpp.AdamWScheduleFree(model.parameters(), lr=0.1)
    optimizer.train()
    data = torch.randn(64, 8)
    for _ in range(20):
        optimizer.zero_grad()
        (model(data) - data.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
    (recipe,) = [block for block in blocks() if "update_bn" in block]
    stale = model[1].running_mean.clone()
    exec(recipe, {"torch": torch, "model": model, "optimizer": optimizer, "train_loader": [data]})
    expected = model[0](data).mean(0)
    torch.testing.assert_close(model[1].running_mean, expected)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(stale, expected)
