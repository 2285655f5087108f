"""The README's Python, run as it stands."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import schedulefree_cpp
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # within the compiler
def test_the_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"train_loader": [torch.randn(16, 8) for _ in range(3)]}
    use, *recipes = blocks()
    exec(use, namespace)
    errors = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert len(errors) == 3
    assert errors[-1] < errors[0]
    assert len(recipes) == 14
    for recipe in recipes:
        with torch._dynamo.config.patch(trace_autograd_ops=False):  # which a recipe sets
            exec(recipe, namespace)
    assert namespace["optimizer"].param_groups[0]["train_mode"]


def test_a_step_of_the_operators_takes_five_lines_and_reaches_the_minimum():
    (recipe,) = [block for block in blocks() if "ops.coefs" in block]
    lines = recipe.splitlines()
    loop = lines[lines.index("for k in range(1000):") + 1 :]
    assert [line.startswith("    ") for line in loop].index(False) == 5
    namespace = {}
    exec(recipe, namespace)
    (x,), (z,) = namespace["y"], namespace["z"]
    torch.testing.assert_close(x, torch.ones(8), rtol=0, atol=0.01)
    assert not torch.equal(x, z)


def test_a_late_parameter_gets_counts_of_its_own():
    (recipe,) = [block for block in blocks() if "add_param_group" in block]
    model = torch.nn.Linear(8, 1)
    for mode in (True, False):
        optimizer = schedulefree_cpp.AdamWScheduleFree(model.parameters(), lr=0.1)
        optimizer.train()
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        optimizer.train(mode)
        exec(recipe, {"torch": torch, "optimizer": optimizer})
        first, late = optimizer.param_groups
        assert late["train_mode"] == mode
        assert [(group["k"], group["weight_sum"], group["lr_max"]) for group in (first, late)] == [
            (1, 0.1**2, 0.1),
            (0, 0.0, -1.0),
        ]


def test_the_batchnorm_recipe_gives_the_statistics_of_x():
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


@pytest.mark.build
def test_the_cpp_section_works_when_pasted(tmp_path):
    (main,), (lists,) = blocks("cpp"), blocks("cmake")
    (commands,) = [block for block in blocks("sh") if "--cmake-prefix-path" in block]
    (tmp_path / "main.cpp").write_text(main)
    (tmp_path / "CMakeLists.txt").write_text(lists)
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
