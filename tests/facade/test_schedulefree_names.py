"""This package under the name ``schedulefree``: the distribution that has the name, and one process alone."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
import schedulefree_cpp
from schedulefree_cpp import _schedulefree

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "packaging" / "schedulefree-shim"

# Trains by Transformers' own names, whole and resumed, and prints whose optimizer that was.
TRAIN = """
import sys
import torch
import transformers


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(4, 1)

    def forward(self, x, labels):
        return {"loss": (self.layer(x) - labels).square().mean()}


torch.manual_seed(1)
data = [{"x": x, "labels": x.sum(0, keepdim=True)} for x in torch.randn(40, 4)]


def train(optim, folder, steps, resume=None):
    arguments = transformers.TrainingArguments(
        output_dir=f"{optim}/{folder}", optim=optim, max_steps=steps, save_steps=4, learning_rate=0.05,
        lr_scheduler_type="constant", use_cpu=True, report_to=[], disable_tqdm=True, warmup_steps=2,
    )
    trainer = transformers.Trainer(Model(), arguments, train_dataset=data)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


for optim in ("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam"):
    whole = train(optim, "whole", 8)
    resumed = train(optim, "resumed", 8, f"{optim}/whole/checkpoint-4")
    for p, q in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    optimizer = getattr(resumed.optimizer, "optimizer", resumed.optimizer)
    assert optimizer.param_groups[0]["k"] == 8 if optim != "schedule_free_radam" else True
    print(type(optimizer).__module__, type(optimizer).__name__)
"""
TRAINED = [
    "schedulefree_cpp.adamw AdamWScheduleFree",
    "schedulefree_cpp.sgd SGDScheduleFree",
    "schedulefree_cpp.radam RAdamScheduleFree",
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The Python of an environment that has all that this one has, but for upstream's package."""
    path = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
    (target,) = (path / "lib").glob("python*/site-packages")
    for entry in Path(site.getsitepackages()[0]).iterdir():
        if entry.name != "schedulefree" and not entry.name.startswith("schedulefree-"):
            (target / entry.name).symlink_to(entry)
    return path / "bin" / "python"


def run(python, script, folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([python, "-c", script], cwd=folder, env=environment, capture_output=True, text=True)


def test_submodules_are_those_of_schedulefree():
    upstream = pytest.importorskip("schedulefree")
    classes = {
        name: cls.__module__.removeprefix("schedulefree.")
        for name, cls in vars(upstream).items()
        if isinstance(cls, type)
    }
    assert {cls: module for module, cls in _schedulefree._CLASSES.items()} == classes


@pytest.mark.build
def test_transformers_trains_with_the_distribution(environment, tmp_path):
    source = tmp_path / "source"  # the build leaves files beside its sources
    shutil.copytree(SHIM, source)
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "wheel", "--no-build-isolation", "--no-deps", "-q", "-w", tmp_path, source]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("schedulefree-1.4.1+cpp-*.whl")
    target = tmp_path / "shim"
    subprocess.run([*pip, "install", "--no-deps", "-q", "--target", target, wheel], check=True)
    script = f"""
import sys
sys.path.insert(0, {str(target)!r})
import importlib.metadata
import schedulefree
from schedulefree.wrap_schedulefree import ScheduleFreeWrapper
assert importlib.metadata.version("schedulefree") == schedulefree.__version__ == {_schedulefree.VERSION!r}
assert ScheduleFreeWrapper is schedulefree.ScheduleFreeWrapper
{TRAIN}"""
    done = run(environment, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("schedulefree_cpp.")] == TRAINED


@pytest.mark.frameworks
def test_transformers_trains_after_install_as_schedulefree(environment, tmp_path):
    script = f"import schedulefree_cpp; schedulefree_cpp.install_as_schedulefree()\n{TRAIN}"
    done = run(environment, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("schedulefree_cpp.")] == TRAINED


def test_install_as_schedulefree_gives_every_name(environment, tmp_path):
    script = """
import schedulefree_cpp
schedulefree_cpp.install_as_schedulefree()
schedulefree_cpp.install_as_schedulefree()
import schedulefree
import schedulefree.radam_schedulefree_closure as module
from schedulefree.adamw_schedulefree import AdamWScheduleFree
assert AdamWScheduleFree is schedulefree.AdamWScheduleFree is schedulefree_cpp.AdamWScheduleFree
assert module.RAdamScheduleFreeClosure is schedulefree_cpp.RAdamScheduleFreeClosure
"""
    done = run(environment, script, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.frameworks
@pytest.mark.parametrize(
    ("first", "message"),
    [
        (
            "import types, sys; sys.modules['schedulefree'] = types.ModuleType('schedulefree')",
            "had been imported from",
        ),
        ("from transformers.utils import is_schedulefree_available as a; a()", "Transformers had looked for"),
    ],
)
def test_install_as_schedulefree_says_when_it_comes_too_late(environment, tmp_path, first, message):
    script = f"""
import sys
{first}
before = {{name for name in sys.modules if name.split(".")[0] == "schedulefree"}}
import schedulefree_cpp
try:
    schedulefree_cpp.install_as_schedulefree()
except RuntimeError as error:
    print(error)
assert before == {{name for name in sys.modules if name.split(".")[0] == "schedulefree"}}
"""
    done = run(environment, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert message in done.stdout


def test_the_distribution_has_the_names_of_the_package():
    names = set(_schedulefree._CLASSES.values())
    text = (SHIM / "schedulefree" / "__init__.py").read_text()
    assert all(f'    "{name}",' in text for name in names)
    assert all(hasattr(schedulefree_cpp, name) for name in names)
