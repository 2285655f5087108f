"""What a constructor takes and refuses, for every class: numbers, parameters, base optimizers."""

from __future__ import annotations

import inspect
import io
import math
from typing import Any

import cases
import numpy as np
import pytest
import schedulefree_cpp
import torch
from schedulefree_cpp import _C

NUMBERS = {
    **{name: ["lr", "weight_decay", "r", "weight_lr_power"] for name in cases.COMPLETE},
    **{
        name: ["momentum", "weight_decay_at_y", "r", "weight_lr_power", "max_grad_norm"]
        for name in cases.WRAPPER
    },
}
for _name in cases.NATIVE + cases.CLOSURE + cases.PLUS + cases.MUON:
    NUMBERS[_name] = [
        *NUMBERS[_name],
        *([] if "RAdam" in _name or _name in cases.PLUS else ["warmup_steps"]),
        *(["momentum"] if "SGD" in _name else ["eps"]),
        *(["max_grad_norm", "decoupling_c", "averaging_weight"] if _name not in cases.PLUS else []),
        *(["inner_momentum"] if _name in ("AdamWScheduleFree", "AdamWScheduleFreeClosure") else []),
        *(
            ["sf_beta1", "sf_beta1_max", "polyak_beta", "c_warmup", "sf_beta1_anneal_steps"]
            if _name in cases.PLUS
            else []
        ),
    ]
EVERY_NUMBER = [(name, number) for name, numbers in NUMBERS.items() for number in numbers]

# What came out of a configuration file as something else than a number.
NO_NUMBERS = [
    ("1e-3", "str"),
    (None, "NoneType"),
    (True, "bool"),
    (np.ones(2), "ndarray"),
    (torch.ones(2), "Tensor"),
    ([0.1], "list"),
]
BETAS = [
    (name, i) for name in cases.COMPLETE for i in (0, 1) if name not in cases.WRAPPER and "SGD" not in name
]


@pytest.mark.parametrize(("value", "kind"), NO_NUMBERS, ids=[kind for _, kind in NO_NUMBERS])
@pytest.mark.parametrize(("name", "number"), EVERY_NUMBER)
def test_what_is_no_number_is_refused_by_name_with_its_type(name, number, value, kind):
    if number == "max_grad_norm" and value is None:
        return  # no clipping
    with pytest.raises(ValueError, match=rf"Invalid {number}: (.|\n)* of type {kind}, expected a number"):
        cases.make(name, cases.parameters([(3,)]), **{number: value})


@pytest.mark.parametrize(("value", "kind"), NO_NUMBERS, ids=[kind for _, kind in NO_NUMBERS])
@pytest.mark.parametrize(("name", "i"), BETAS)
def test_a_beta_that_is_no_number_is_refused_by_name_with_its_type(name, i, value, kind):
    betas: list[Any] = [0.9, 0.99]
    betas[i] = value
    with pytest.raises(ValueError, match=rf"Invalid betas\[{i}\]: (.|\n)* of type {kind}, expected a number"):
        cases.make(name, cases.parameters([(3,)]), betas=betas)


@pytest.mark.parametrize(
    "of", [np.float64, np.float32, lambda v: torch.tensor(v), lambda v: torch.tensor([v])]
)
@pytest.mark.parametrize(("name", "number"), EVERY_NUMBER)
def test_scalars_of_numpy_and_tensors_of_one_element_are_numbers(name, number, of):
    value = 2.0 if number in ("sf_beta1_anneal_steps", "c_warmup") else 0.5  # counts
    plain, other = (
        cases.make(name, cases.parameters([(3,), (4, 5)]), **{number: given}) for given in (value, of(value))
    )
    cases.run(plain, 8), cases.run(other, 8)
    cases.assert_same(cases.params_of(plain), cases.params_of(other))


@pytest.mark.parametrize(("name", "i"), BETAS)
def test_betas_may_be_scalars_of_numpy_and_tensors_of_one_element(name, i):
    results = []
    for of in (float, np.float64, torch.tensor, lambda v: torch.tensor([v], dtype=torch.float64)):
        betas: list[Any] = [0.5, 0.5]
        betas[i] = of(0.5)
        optimizer = cases.make(name, cases.parameters([(3,)]), betas=tuple(betas))
        cases.run(optimizer, 8)
        results.append(cases.params_of(optimizer))
    for result in results[1:]:
        cases.assert_same(results[0], result)


@pytest.mark.parametrize(("value", "kind"), NO_NUMBERS, ids=[kind for _, kind in NO_NUMBERS])
@pytest.mark.parametrize(("name", "number"), EVERY_NUMBER)
def test_what_is_no_number_is_refused_in_a_group_of_its_own_too(name, number, value, kind):
    if number == "max_grad_norm" and value is None:
        return
    if name in cases.WRAPPER and number != "lr":
        number = f"sf_{number}"
    optimizer = cases.make(name, cases.parameters([(3,)]))
    with pytest.raises(ValueError, match=rf"Invalid {number} in parameter group 1: (.|\n)* of type {kind}"):
        optimizer.add_param_group({"params": cases.parameters([(4,)]), number: value})
    assert len(optimizer.param_groups) == 1
    if name in cases.WRAPPER:
        base = torch.optim.SGD([{"params": cases.parameters([(3,)]), number: value}], lr=0.1)
        with pytest.raises(
            ValueError, match=rf"Invalid {number} in parameter group 0: (.|\n)* of type {kind}"
        ):
            getattr(schedulefree_cpp, name)(base)


@pytest.mark.parametrize(
    ("entry", "value"),
    [("k", "x"), ("k", -1), ("k", 2.5), ("weight_sum", -1.0), ("lr_max", math.nan), ("scheduled_lr", None)]
    + [("train_mode", "no")],
)
def test_a_schedule_that_no_steps_lead_to_is_refused_in_a_group_that_is_added(entry, value):
    optimizer = cases.make("AdamWScheduleFree", cases.parameters([(3,)]))
    with pytest.raises(ValueError, match=f"Invalid {entry} in parameter group 1: "):
        optimizer.add_param_group({"params": cases.parameters([(4,)]), entry: value})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("capturable", [False, True])
def test_a_group_may_be_a_copy_of_another_with_its_schedule(capturable):
    kinds = []
    for source in (False, True):
        first = cases.make("AdamWScheduleFree", cases.parameters([(3,)]), capturable=source)
        cases.run(first, 3)
        optimizer = cases.make("AdamWScheduleFree", cases.parameters([(3,)]), capturable=capturable)
        group = {**first.param_groups[0], "params": cases.parameters([(4,)]), "capturable": capturable}
        optimizer.add_param_group(group)
        cases.run(optimizer, 1)
        assert int(optimizer.param_groups[1]["k"]) == 4
        kinds.append({name: type(optimizer.param_groups[1][name]) for name in ("k", "weight_sum", "lr_max")})
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("name", [name for name, number in EVERY_NUMBER if number == "warmup_steps"])
def test_warmup_steps_may_be_a_fraction(name):
    optimizer = cases.make(name, cases.parameters([(3,)]), warmup_steps=12.5)
    cases.run(optimizer, 20)
    assert math.isfinite(optimizer.param_groups[0]["weight_sum"])


# ---- parameters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn, torch.complex64, torch.bool])
@pytest.mark.parametrize("name", cases.FAMILY)
def test_a_frozen_parameter_may_be_of_any_dtype(name, dtype):
    frozen = torch.nn.Parameter(torch.zeros(8).to(dtype), requires_grad=False)
    trained = cases.parameters([(3, 4)])
    before = cases.copies(trained)
    optimizer = cases.make(name, [frozen, *trained])
    optimizer.add_param_group({"params": [torch.nn.Parameter(frozen.detach().clone(), requires_grad=False)]})
    for seed in range(8):
        step_of(optimizer, trained, seed)
    assert not torch.equal(trained[0], before[0])
    assert torch.equal(frozen.view(torch.uint8), torch.zeros(8).to(dtype).view(torch.uint8))
    if name in cases.CLOSURE:
        return
    optimizer.eval(), optimizer.train()
    if name not in cases.REFERENCE:
        with optimizer.averaged():
            pass
        others = cases.copies(trained)
        other = cases.make(name, [frozen, *others])
        other.add_param_group({"params": [torch.nn.Parameter(frozen.detach().clone(), requires_grad=False)]})
        other.load_state_dict(optimizer.state_dict())
        step_of(optimizer, trained, 8), step_of(other, others, 8)
        cases.assert_same(trained, others)


def step_of(optimizer: Any, params: list[torch.nn.Parameter], seed: int) -> None:
    """A step in which only these parameters have a gradient."""
    name = type(optimizer).__name__
    if name in cases.CLOSURE:
        optimizer.step(lambda: cases.set_gradients(params, seed))
        return
    cases.set_gradients(params, seed)
    if name in cases.PLUS:
        optimizer.step_func(1.0)
    else:
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", cases.NATIVE + cases.PLUS + cases.MUON)
def test_a_frozen_parameter_with_a_gradient_is_refused_by_its_dtype(name, dtype):
    frozen = torch.nn.Parameter(torch.zeros(8).to(dtype), requires_grad=False)
    trained = cases.parameters([(3, 4)])
    optimizer = cases.make(name, [frozen, *trained])
    before = cases.copies(trained)
    frozen.grad = torch.zeros(8).to(dtype)
    with pytest.raises(RuntimeError, match=f"a parameter of dtype {dtype} has a gradient"):
        step_of(optimizer, trained, 0)
    cases.assert_same(trained, before)
    frozen.grad = None
    step_of(optimizer, trained, 0)
    assert cases.entry(optimizer.param_groups[0], "k") == 1


@pytest.mark.parametrize("name", [n for n in cases.COMPLETE if n not in cases.WRAPPER])
def test_a_parameter_that_stands_twice_in_a_group_takes_one_step(name):
    params, others = (cases.parameters([(6, 4), (4, 2)]) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = cases.make(name, [*params, params[0]])
    other = cases.make(name, others)
    for seed in range(8):
        step_of(optimizer, params, seed), step_of(other, others, seed)
    cases.assert_same(params, others)
    named = [{"params": [("encoder", params[0])]}, {"params": [("head", params[1]), ("tied", params[0])]}]
    with pytest.raises(
        ValueError,
        match=r"Invalid params\[1\] \('tied'\) in parameter group 1: it is in parameter group 0, too; "
        "some parameters appear in more than one parameter group",
    ):
        cases.make(name, named)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_a_parameter_that_stands_twice_keeps_its_name_through_a_checkpoint(name):
    def build(params):
        named = [("a", params[0]), ("b", params[1]), ("a", params[0]), ("c", params[2])]
        return cases.make(name, named)

    params = cases.parameters([(6, 4), (4, 2), (3,)])
    optimizer = build(params)
    cases.run(optimizer, 3)
    other = build(cases.copies(params))
    other.load_state_dict(optimizer.state_dict())
    cases.run(optimizer, 2), cases.run(other, 2)
    cases.assert_same(params, cases.params_of(other))
    assert [n for group in other.param_groups for n in group["param_names"]] == ["a", "b", "c"]


@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_wrapper_takes_one_step_for_a_parameter_that_stands_twice(name):
    params, others = (cases.parameters([(6, 4), (4, 2)]) for _ in range(2))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        base = torch.optim.SGD([*params, params[0]], lr=0.1)
    optimizer = getattr(schedulefree_cpp, name)(base)
    other = getattr(schedulefree_cpp, name)(torch.optim.SGD(others, lr=0.1))
    optimizer.train(), other.train()
    for seed in range(8):
        step_of(optimizer, params, seed), step_of(other, others, seed)
    cases.assert_same(params, others)


# ---- base optimizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", cases.COMPLETE + cases.REFERENCE)
@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_wrapper_around_a_schedule_free_optimizer_is_refused(name, base):
    inner = cases.make(base, cases.parameters([(3,)]))
    with pytest.raises(TypeError, match="Invalid base: expected an optimizer that is not schedule-free"):
        getattr(schedulefree_cpp, name)(inner)


# ---- a parameter that starts late ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.WRAPPER + cases.MUON)
def test_a_late_group_takes_a_first_step_as_large_as_any(name, mode):
    early, late = cases.parameters([(3, 5)]), cases.parameters([(40,)], seed=3)
    kwargs = {} if "RAdam" in name or name in cases.WRAPPER else {"warmup_steps": 4}
    optimizer = cases.make(name, early, **kwargs)
    alone = cases.make(name, cases.copies(late), **kwargs)
    for seed in range(50):
        step_of(optimizer, early, seed)
    getattr(optimizer, mode)()
    optimizer.add_param_group({"params": late})
    optimizer.train()
    for seed in range(10):
        cases.set_gradients(early, seed + 50)
        step_of(optimizer, late, seed)
        step_of(alone, cases.params_of(alone), seed)
        if seed % 3 == 1:
            optimizer.eval(), optimizer.train()
        cases.assert_same(late, cases.params_of(alone))
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == [60, 10]


@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE)
def test_defaults_are_those_of_cpp(name):
    """A signature is documentation, so it repeats the values that csrc/hyperparameters.h declares."""
    signature = inspect.signature(getattr(schedulefree_cpp, name)).parameters
    ours = {key: p.default for key, p in signature.items() if p.default is not inspect.Parameter.empty}
    betas = dict(zip(("beta", "beta2"), ours.pop("betas", ()), strict=False))
    rename = {"lr": "sgd_lr" if "SGD" in name else "adam_lr", "momentum": "beta"}
    ours = {rename.get(key, key): value for key, value in {**ours, **betas}.items()}
    shared = ours.keys() & _C.DEFAULTS.keys()
    assert {"beta", "weight_decay", "r", "weight_lr_power"} < shared
    assert {key: ours[key] for key in shared} == {key: _C.DEFAULTS[key] for key in shared}


# ---- configurations ----------------------------------------------------------------------------------------


class Sequence(list):
    """Stands for the sequences of configuration systems: no list to pickle, no tuple."""


@pytest.mark.parametrize(
    "betas",
    [
        [0.8, 0.95],
        Sequence([0.8, 0.95]),
        np.array([0.8, 0.95]),
        torch.tensor([0.8, 0.95], dtype=torch.float64),
    ],
)
@pytest.mark.parametrize("where", ["argument", "group", "late group", "state dict"])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "RAdamScheduleFreeClosure", "AdamCScheduleFreePlus"])
def test_hyperparameters_are_stored_as_plain_numbers(name, where, betas):
    def construct(params, **kwargs):
        return getattr(schedulefree_cpp, name)(params, **kwargs)

    p, given = (
        torch.nn.Parameter(torch.ones(3)),
        {"betas": betas, "lr": np.float64(0.5), "eps": np.float32(0.25)},
    )
    if where == "argument":
        optimizer = construct([p], **given)
    elif where == "group":
        optimizer = construct([{"params": [p], **given}])
    elif where == "late group":
        optimizer = construct([torch.nn.Parameter(torch.ones(3))])
        optimizer.add_param_group({"params": [p], **given})
    else:
        optimizer = construct([p])
        state_dict = optimizer.state_dict()
        state_dict["param_groups"][0] |= given
        optimizer.load_state_dict(state_dict)
    group = optimizer.param_groups[-1]
    assert group["betas"] == (0.8, 0.95)
    assert type(group["betas"]) is tuple
    assert {type(group[key]) for key in ("lr", "eps")} | {*map(type, group["betas"])} == {float}
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("adamw", "AdamWScheduleFree"),
        ("AdamWScheduleFree", "AdamWScheduleFree"),
        ("schedule_free_sgd", "SGDScheduleFree"),
        ("radam_schedulefree", "RAdamScheduleFree"),
        ("adamw-closure", "AdamWScheduleFreeClosure"),
        ("AdamWPaper", "AdamWScheduleFreePaper"),
        ("adamcplus", "AdamCScheduleFreePlus"),
        ("muon", "MuonScheduleFree"),
    ],
)
def test_an_optimizer_is_created_by_name(name, cls):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = schedulefree_cpp.create(name, [p], lr=0.5)
    assert type(optimizer) is getattr(schedulefree_cpp, cls)
    assert optimizer.param_groups[0]["params"] == [p]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_create_reads_numbers_from_texts():
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    groups = [{"params": [p], "weight_decay": decay} for p, decay in zip(params, ("1e-2", 0), strict=True)]
    optimizer = schedulefree_cpp.create(
        "adamw", groups, lr="1e-3", betas=["0.8", "0.95"], warmup_steps="10", decay_at="z"
    )
    first, second = optimizer.param_groups
    assert (first["lr"], first["betas"], first["warmup_steps"]) == (0.001, (0.8, 0.95), 10)
    assert (first["weight_decay"], second["weight_decay"]) == (0.01, 0)
    assert first["decay_at"] == "z"


def test_create_refuses_by_name():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(TypeError, match="params"):
        schedulefree_cpp.create("adamw", p)
    with pytest.raises(ValueError, match=r"Invalid name: 'adam', expected one of 'SGDScheduleFree', "):
        schedulefree_cpp.create("adam", [p])
    with pytest.raises(ValueError, match=r"Invalid lr: 'high' of type str"):
        schedulefree_cpp.create("adamw", [p], lr="high")
    with pytest.raises(TypeError, match="momentum"):
        schedulefree_cpp.create("adamw", [p], momentum=0.9)
