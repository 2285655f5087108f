"""What a refused call leaves behind: everything as it was, and grad mode and version counters too."""

from __future__ import annotations

import copy
import math
from typing import Any

import cases
import pytest
import torch

SHAPES = [(3, 4), (5,)]


def trained(name: str, mode: str = "train", **kwargs: Any) -> Any:
    """An optimizer with a group for each parameter, gradients, and some steps behind it."""
    params = cases.parameters(SHAPES)
    optimizer = cases.make(name, [{"params": [p]} for p in params], **kwargs)
    cases.run(optimizer, 3)
    cases.set_gradients(params, 3)
    getattr(optimizer, mode)()
    return optimizer


def step(optimizer: Any) -> None:
    """A step with the gradients that are there."""
    name = type(optimizer).__name__
    if name in cases.CLOSURE:
        optimizer.step(lambda: None)
    elif name in cases.PLUS:
        optimizer.step_func(1.0)
    else:
        optimizer.step()


def moved(**change: Any) -> Any:
    def prepare(optimizer: Any) -> Any:
        group = optimizer.param_groups[1]
        for name, value in change.items():
            group[f"sf_{name}" if f"sf_{name}" in group else name] = value
        return lambda: step(optimizer)

    return prepare


def moved_before_a_first_step(optimizer: Any) -> Any:
    """With a learning rate of 0 in the other group, as in the probes of distributed checkpoints."""
    optimizer.state.clear()
    optimizer.param_groups[0]["lr"] = 0.0
    return moved(lr="x")(optimizer)


def in_eval_mode(optimizer: Any) -> Any:
    optimizer.eval()
    return lambda: step(optimizer)


def sparse(optimizer: Any) -> Any:
    p = cases.params_of(optimizer)[1]
    p.grad = p.grad.to_sparse()
    return lambda: step(optimizer)


def state_lacks_an_entry(optimizer: Any) -> Any:
    state = optimizer.state[cases.params_of(optimizer)[0]]
    del state["momentum_buffer" if "momentum_buffer" in state else "exp_avg_sq"]
    return lambda: step(optimizer)


def overlapping(optimizer: Any) -> Any:
    p = cases.params_of(optimizer)[0]
    p.data = p.data[:1].expand(3, 4)
    return lambda: step(optimizer)


def unsupported_dtype(optimizer: Any) -> Any:
    frozen = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64), requires_grad=False)
    frozen.grad = torch.zeros(3, dtype=torch.complex64)
    optimizer.param_groups[1]["params"].append(frozen)
    return lambda: step(optimizer)


def cast(optimizer: Any) -> Any:
    p = cases.params_of(optimizer)[0]
    p.data = p.data.double()
    p.grad = torch.ones_like(p)
    return lambda: step(optimizer)


def foreign(optimizer: Any) -> Any:
    other = torch.optim.AdamW([{"params": [p]} for p in cases.parameters(SHAPES)])
    cases.run(other, 1)
    return lambda: optimizer.load_state_dict(other.state_dict())


def of_another_shape(optimizer: Any) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    entries = state["state"][1]
    entries["sf_z" if "sf_z" in entries else "z"] = torch.zeros(9)
    return lambda: optimizer.load_state_dict(state)


def without_values(optimizer: Any) -> Any:
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1] = {k: v.to("meta") for k, v in state["state"][1].items() if torch.is_tensor(v)}
    return lambda: optimizer.load_state_dict(state)


def adds(**group: Any) -> Any:
    def prepare(optimizer: Any) -> Any:
        return lambda: optimizer.add_param_group({"params": cases.parameters([(2,)]), **group})

    return prepare


def adds_another_dtype(optimizer: Any) -> Any:
    params = [*cases.parameters([(2,)]), torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))]
    return lambda: optimizer.add_param_group({"params": params})


def adds_a_parameter_again(optimizer: Any) -> Any:
    p = cases.params_of(optimizer)[1]
    return lambda: optimizer.add_param_group(
        {"params": [("late", torch.nn.Parameter(torch.ones(2))), ("p", p)]}
    )


def unfit_z(call: str) -> Any:
    def prepare(optimizer: Any) -> Any:
        state = optimizer.state[cases.params_of(optimizer)[1]]
        state["sf_z" if "sf_z" in state else "z"] = torch.zeros(9)
        return lambda: use(optimizer, call)

    return prepare


def unfit_z_in_one_group(optimizer: Any) -> Any:
    first, second = optimizer.param_groups
    first["params"] += second["params"]
    second["params"] = []
    return unfit_z("eval")(optimizer)


def use(optimizer: Any, call: str) -> None:
    if call == "averaged":
        with optimizer.averaged():
            pass
    elif call == "averaged_state_dict":
        optimizer.averaged_state_dict(torch.nn.Linear(2, 2))
    else:
        getattr(optimizer, call)()


def within_a_step(call: str) -> Any:
    def prepare(optimizer: Any) -> Any:
        p = cases.params_of(optimizer)[0]
        optimizer.step_parameter(p)
        return lambda: optimizer.step_parameter(p) if call == "step_parameter" else use(optimizer, call)

    return prepare


ALL = [*cases.NATIVE, *cases.PLUS, *cases.CLOSURE, *cases.WRAPPER, *cases.MUON]
FUSED = [*cases.NATIVE, *cases.PLUS, *cases.CLOSURE, *cases.MUON]
ADAM = [name for name in FUSED if "SGD" not in name]

# What is called, by whom, and how it is refused.
REFUSED: dict[str, tuple[Any, list[str], type[Exception], str]] = {
    "step in eval mode": (in_eval_mode, cases.SWITCHED, RuntimeError, "in eval mode"),
    "a sparse gradient": (
        sparse,
        FUSED,
        RuntimeError,
        r"grad\[0\]( in parameter group 1)?: expected a dense",
    ),
    "lr moved to nan": (moved(lr=math.nan), ALL, ValueError, "Invalid lr in parameter group 1: nan"),
    "lr moved below 0": (moved(lr=-1.0), ALL, ValueError, "Invalid lr in parameter group 1: -1"),
    "lr moved to text": (moved(lr="x"), ALL, ValueError, "Invalid lr in parameter group 1: 'x' of type str"),
    "lr moved to text before a first step": (
        moved_before_a_first_step,
        [*cases.NATIVE, "ScheduleFreeWrapper"],
        ValueError,
        "Invalid lr in parameter group 1: 'x' of type str",
    ),
    "decay moved to nan": (
        moved(weight_decay=math.nan, weight_decay_at_y=math.nan),
        ALL,
        ValueError,
        "Invalid (sf_)?weight_decay(_at_y)? in parameter group 1: nan",
    ),
    "a sum that is no number": (
        moved(weight_sum=math.nan),
        ALL,
        ValueError,
        r"Invalid weight_sum: nan.*in parameter group 1",
    ),
    "a state without an entry": (
        state_lacks_an_entry,
        ADAM,
        RuntimeError,
        "lacks '(exp_avg_sq|momentum_buffer)'",
    ),
    "overlapping memory": (overlapping, FUSED, RuntimeError, "memory of its own|overlap"),
    "a gradient of another dtype": (
        unsupported_dtype,
        FUSED,
        RuntimeError,
        "dtype torch.complex64 has a gradi",
    ),
    "a parameter that was cast": (
        cast,
        cases.SWITCHED,
        RuntimeError,
        r"optimizer.train\(\) moves the state along",
    ),
    "another optimizer's state": (foreign, FUSED, ValueError, "lacks k, weight_sum, lr_max"),
    "a state of another shape": (of_another_shape, ALL, ValueError, r"z of parameter 1 .* shape \(9,\)"),
    "a state without values": (without_values, FUSED, NotImplementedError, "no data"),
    "a group with a bad lr": (adds(lr=-1.0), ALL, ValueError, "Invalid lr in parameter group 2: -1"),
    "a group with a bad decay": (
        adds(weight_decay="x", sf_weight_decay_at_y="x"),
        ALL,
        ValueError,
        "Invalid (sf_)?weight_decay(_at_y)? in parameter group 2: 'x' of type str",
    ),
    "a group of another dtype": (
        adds_another_dtype,
        ALL,
        ValueError,
        r"Invalid params\[1\] in parameter group 2: dtype torch.complex64",
    ),
    "a parameter in two groups": (
        adds_a_parameter_again,
        ALL,
        ValueError,
        r"Invalid params\[1\] \('p'\) in parameter group 2: it is in parameter group 1, too",
    ),
    **{
        f"{call} where z is unfit": (
            unfit_z(call),
            [*cases.NATIVE, *cases.PLUS, "ScheduleFreeWrapper"],
            RuntimeError,
            r"z\[0\]: expected shape \[5\] like y\[0\], got \[9\]",
        )
        for call in ("eval", "averaged", "averaged_state_dict")
    },
    "eval where one z of a group is unfit": (
        unfit_z_in_one_group,
        [*cases.NATIVE, *cases.PLUS, "ScheduleFreeWrapper"],
        RuntimeError,
        r"expected shape \[5\]",
    ),
    **{
        f"{call} within a step": (
            within_a_step(call),
            cases.NATIVE,
            RuntimeError,
            "taken this iteration's step already|between step_parameter",
        )
        for call in (
            "step_parameter",
            "eval",
            "averaged",
            "averaged_state_dict",
            "state_dict",
            "__getstate__",
        )
    },
}


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for case, (_, names, *_) in REFUSED.items() for name in names]
)
def test_a_refused_call_leaves_everything_as_it_was(name, case, graded):
    prepare, _, error, message = REFUSED[case]
    optimizer = trained(name)
    call = prepare(optimizer)
    before = cases.snapshot(optimizer)
    params = cases.params_of(optimizer)
    versions = [p._version for p in params]
    with torch.set_grad_enabled(graded):
        with pytest.raises(error, match=f"(?s){message}"):
            call()
        assert torch.is_grad_enabled() == graded
    cases.assert_unchanged(optimizer, before)
    # Closure forms go to y and back; a swap that is undone has written, too.
    if name not in cases.CLOSURE and "z is unfit" not in case and "z of a group" not in case:
        assert [p._version for p in params] == versions


# ---- in compiled code ----------------------------------------------------------------------------------

COMPILED = ["step in eval mode", "lr moved to nan", "lr moved to text", "a sum that is no number"]


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", COMPILED)
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_refused_call_of_compiled_code_leaves_everything_as_it_was(name, case):
    prepare, _, error, message = REFUSED[case]
    torch._dynamo.reset()
    optimizer = trained(name)
    compiled = torch.compile(optimizer.step, backend="aot_eager")
    compiled()
    prepare(optimizer)
    before = cases.snapshot(optimizer)
    with pytest.raises(error, match=f"(?s){message}"):
        compiled()
    assert torch.is_grad_enabled()
    cases.assert_unchanged(optimizer, before)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", cases.REFERENCE)
def test_a_reference_class_refuses_what_it_cannot_step_before_anything_changes(name):
    rows, weight = cases.parameters([(5, 2), (3,)])
    optimizer = cases.make(name, [weight])
    optimizer.add_param_group({"params": [rows]})
    optimizer.train()
    before = [p.detach().clone() for p in (weight, rows)]
    weight.grad, rows.grad = torch.ones_like(weight), torch.ones_like(rows).to_sparse()
    with pytest.raises(RuntimeError, match=r"grad\[0\] in parameter group 1: expected a dense gradient"):
        optimizer.step()
    cases.assert_same([weight, rows], before)
    assert not optimizer.state
    assert [group["k"] for group in optimizer.param_groups] == [0, 0]
    with pytest.raises(ValueError, match=r"Invalid params\[0\] in parameter group 2: dtype torch.complex64"):
        optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.complex64, requires_grad=True)]})
    assert len(optimizer.param_groups) == 2
