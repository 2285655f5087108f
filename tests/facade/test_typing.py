"""Types that editors and type checkers see, and what ``help()`` shows."""

from __future__ import annotations

import inspect
import math
import re
import subprocess
import sys
import textwrap
import typing

import cases
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp import _create, muon
from schedulefree_cpp._core import types
from schedulefree_cpp._core.hyperparameters import CHOICES

USE = """
import torch
import schedulefree_cpp as schedulefree
from typing_extensions import assert_type

model = torch.nn.Linear(2, 1)


def tensor() -> torch.Tensor:
    return torch.zeros(())


def number() -> float:
    return 0.0


for optimizer in (
    schedulefree.AdamWScheduleFree(model.parameters(), lr=0.01, betas=(0.9, 0.99)),
    schedulefree.RAdamScheduleFree(model.parameters()),
    schedulefree.SGDScheduleFree([{"params": list(model.parameters()), "lr": 0.1}]),
    schedulefree.AdamWScheduleFreeClosure(model.parameters()),
    schedulefree.AdamCScheduleFreePlus(model.parameters()),
    schedulefree.MuonScheduleFree(model.parameters(), lr=0.01, momentum=0.9),
    schedulefree.ScheduleFreeWrapper(torch.optim.SGD(model.parameters(), lr=0.1)),
):
    assert_type(optimizer.train(), None)
    assert_type(optimizer.eval(), None)
    assert_type(optimizer.step(), None)
    assert_type(optimizer.step(tensor), torch.Tensor)
    assert_type(optimizer.step(number), float)
    with optimizer.averaged():
        pass
    x: dict[str, torch.Tensor] = optimizer.averaged_state_dict(model)
assert_type(schedulefree.create("adamw", model.parameters()), schedulefree.AdamWScheduleFree)
assert_type(schedulefree.create("MuonScheduleFree", model.parameters()), schedulefree.MuonScheduleFree)
fused = schedulefree.AdamWScheduleFree(model.parameters())
assert_type(fused.grad_norm, torch.Tensor | None)
with fused.step_in_backward():
    pass
"""


def pyright(*arguments):
    pytest.importorskip("pyright", reason="pyright is not installed")
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.frameworks
def test_every_public_type_is_known():
    done = pyright("--verifytypes", "schedulefree_cpp", "--ignoreexternal")
    assert "Type completeness score: 100%" in done.stdout, done.stdout


def lines_refused(checker, program):
    """The lines of a program that a type checker refuses, and what it said."""
    if checker == "pyright":
        done = pyright(str(program))
        return {int(n) for n in re.findall(r":(\d+):\d+ - error", done.stdout)}, done.stdout
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", program.parent / "cache", program]
    done = subprocess.run(command, capture_output=True, text=True)
    return {int(n) for n in re.findall(r":(\d+): error", done.stdout)}, done.stdout


CHECKERS = pytest.mark.parametrize("checker", ["pyright", "mypy"])


@pytest.mark.frameworks
@CHECKERS
def test_a_program_is_typed(checker, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(USE)
    refused, said = lines_refused(checker, program)
    assert refused == set(), said


WRONG = [
    ("AdamWScheduleFree", 'rounding="random"'),
    ("AdamWScheduleFree", "state_bits=16"),
    ("AdamWScheduleFree", "exp_avg_sq_bits=16"),
    ("AdamWScheduleFree", 'decay_at="x"'),
    ("RAdamScheduleFree", 'nonfinite="skipp"'),
    ("SGDScheduleFree", "state_bits=16"),
    ("SGDScheduleFreeClosure", 'rounding="random"'),
    ("SGDScheduleFreeClosure", "nesterov=True"),
    ("AdamWScheduleFreeClosure", 'decay_at="x"'),
    ("AdamCScheduleFreePlus", 'nonfinite="skipp"'),
    ("MuonScheduleFree", 'adjust_lr_fn="none"'),
    ("SGDScheduleFreeReference", "maximise=True"),
    ("AdamWScheduleFreeReference", 'maximize="yes"'),
]


@pytest.mark.frameworks
@CHECKERS
def test_a_value_outside_its_choices_is_refused(checker, tmp_path):
    lines = ["import schedulefree_cpp", "import torch", "params = [torch.nn.Parameter(torch.zeros(3))]"]
    lines += [f"schedulefree_cpp.{name}(params, {argument})" for name, argument in WRONG]
    lines += ["wrong: schedulefree_cpp.SGDScheduleFree = schedulefree_cpp.create('adamw', params)"]
    program = tmp_path / "program.py"
    program.write_text("\n".join(lines) + "\n")
    refused, said = lines_refused(checker, program)
    assert refused == set(range(4, len(lines) + 1)), said


NAMES = [name for name in schedulefree_cpp.__all__ if inspect.isclass(getattr(schedulefree_cpp, name))]
OPTIMIZERS = [name for name in NAMES if "Wrapper" not in name]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_types_of_choices_are_what_is_checked(name):
    hints = typing.get_type_hints(getattr(schedulefree_cpp, name).__init__)
    expected = {**CHOICES, "adjust_lr_fn": typing.get_args(types.AdjustLrFn)}
    for argument in hints.keys() & expected.keys():
        assert typing.get_args(hints[argument]) == expected[argument], argument


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads came with Python 3.11")
def test_create_is_typed_for_every_class():
    known = {}
    for overload in typing.get_overloads(_create.create)[:-1]:
        hints = typing.get_type_hints(overload)
        for name in typing.get_args(hints["name"]):
            known[name] = hints["return"]
            assert type(schedulefree_cpp.create(name, cases.parameters([(2, 2)]))) is hints["return"]
    assert {*known.values()} == {*_create.CLASSES}


OWN = {
    "train",
    "eval",
    "averaged",
    "averaged_state_dict",
    "step_parameter",
    "step_in_backward",
    "grad_norm",
    "capturable",
}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("SGDScheduleFree", set()),
        ("AdamWScheduleFree", set()),
        ("RAdamScheduleFreeClosure", set()),
        ("MuonScheduleFree", set()),
        ("AdamCScheduleFreePlus", {"step_func"}),
    ],
)
def test_help_shows_what_users_call(name, more):
    public = {entry for entry in dir(getattr(schedulefree_cpp, name)) if not entry.startswith("_")}
    assert public - set(dir(torch.optim.Optimizer)) == OWN | more


# ---- docstrings ----------------------------------------------------------------------------------------


def docstring_blocks(name, title):
    """The literal blocks of a class's docstring under ``Title::``."""
    found = re.findall(
        rf"^{title}::\n\n((?: {{4}}.*\n|\n)+)", inspect.getdoc(getattr(schedulefree_cpp, name)), re.M
    )
    return [textwrap.dedent(text) for text in found]


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_class_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (example,) = docstring_blocks(name, "Example")
    torch.manual_seed(0)
    namespace = {}
    exec(example, namespace)
    if "weights" in namespace:
        torch.testing.assert_close(namespace["weights"].detach(), torch.ones(8), rtol=0, atol=0.2)
    else:
        inputs = torch.randn(64, 8)
        error = (namespace["model"](inputs) - inputs.sum(1, keepdim=True)).square().mean()
        assert error < 1, error  # 8 before training


@pytest.mark.parametrize("name", [*OPTIMIZERS, "ScheduleFreeWrapper"])
def test_every_argument_of_a_class_is_documented(name):
    cls = getattr(schedulefree_cpp, name)
    section = re.search(r"^Args:\n((?: {4}.*\n?)+)", inspect.getdoc(cls), re.MULTILINE)[1]
    documented = [a for names in re.findall(r"^ {4}(\w[\w, ]*): ", section, re.M) for a in names.split(", ")]
    assert sorted(documented) == sorted(inspect.signature(cls).parameters)


@pytest.mark.parametrize("name", NAMES)
def test_help_has_no_roles(name):
    written = [
        (key, inspect.getdoc(value) or "")
        for cls in getattr(schedulefree_cpp, name).__mro__
        if cls.__module__.startswith("schedulefree_cpp")
        for key, value in {cls.__name__: cls, **vars(cls)}.items()
    ]
    assert [key for key, text in written if re.search(r":[a-z:]+:`", text)] == []


def loss(y):
    return 0.5 * (torch.linspace(1, 3, y.numel(), dtype=y.dtype).reshape(y.shape) * y * y).sum() + 1


def gradient(y):
    return torch.linspace(1, 3, y.numel(), dtype=y.dtype).reshape(y.shape) * y


COMMON = {"lr": 0.1, "weight_decay": 0.1, "r": 1.0, "weight_lr_power": 2.0}
ADAM = {**COMMON, "betas": (0.9, 0.99), "eps": 1e-8}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("SGDScheduleFree", {**COMMON, "momentum": 0.8, "warmup_steps": 5}),
        ("AdamWScheduleFree", {**ADAM, "warmup_steps": 5}),
        ("AdamWScheduleFreePaper", {**ADAM, "warmup_steps": 5}),
        ("RAdamScheduleFree", {**ADAM, "silent_sgd_phase": True}),
        ("RAdamScheduleFree", {**ADAM, "silent_sgd_phase": False}),
        ("MuonScheduleFree", {**ADAM, "warmup_steps": 5, "momentum": 0.9, "nesterov": True, "ns_steps": 5}),
        ("MuonScheduleFree", {**ADAM, "warmup_steps": 5, "momentum": 0.9, "nesterov": False, "ns_steps": 5}),
        (
            "AdamCScheduleFreePlus",
            {**ADAM, "sf_beta1": 0.8, "polyak_beta": 0.5, "c_warmup": 3, "sf_beta1_anneal_steps": 9}
            | {"sf_beta1_max": 0.95},
        ),
    ],
)
def test_the_algorithm_of_a_class_is_what_it_computes(name, arguments):
    (algorithm,) = docstring_blocks(name, "Algorithm")
    steps = 12
    start = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)
    written = {
        **arguments,
        "y": start.clone(),
        "steps": steps,
        "loss": loss,
        "gradient": gradient,
        "sqrt": lambda v: v**0.5,
        "pi": math.pi,
        "sum": torch.sum,
        "orthogonalize": muon._orthogonalize,
        "lr_factor": lambda shape: muon._LR_FACTORS["match_rms_adamw"](*shape),
    }
    exec(algorithm, written)
    p = torch.nn.Parameter(start.clone())
    optimizer = getattr(schedulefree_cpp, name)([p], **arguments)
    optimizer.train()
    for _ in range(steps):
        p.grad = gradient(p.detach())
        if name == "AdamCScheduleFreePlus":
            optimizer.step_func(loss(p.detach()))
        else:
            optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["z"], written["z"], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(p.detach(), written["y"], rtol=1e-9, atol=1e-9)
    optimizer.eval()
    torch.testing.assert_close(p.detach(), written["x"], rtol=1e-9, atol=1e-9)
