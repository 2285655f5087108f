"""Trajectories of the reference implementation, reproduced.

``golden/trajectories.pt`` holds what facebookresearch/schedule_free (commit 70785b5) computes in float64: three
parameters in two groups, the second with half the weight decay, 40 steps with given gradients.
"""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import schedulefree_cpp
import torch

GOLDEN = torch.load(Path(__file__).parents[1] / "golden" / "trajectories.pt", weights_only=True)

# The classes of ours that compute what the reference's class of an entry does, and with which arguments.
ENTRIES = [
    ("adamw", "AdamWScheduleFree", {}),
    ("adamw", "AdamWScheduleFreeReference", {}),
    ("adamw_inner_momentum", "AdamWScheduleFree", {}),
    ("adamw_inner_momentum", "AdamWScheduleFreeReference", {}),
    ("adamw_reference_decay_at_z", "AdamWScheduleFree", {"decay_at": "z"}),
    ("adamw_reference_decay_at_z", "AdamWScheduleFreeReference", {"decay_at_z": True}),
    ("adamw_paper", "AdamWScheduleFreePaper", {}),
    ("plus", "AdamCScheduleFreePlus", {}),  # without polyak_beta there is no mean to correct twice
    ("plus", "AdamCScheduleFreePlusPaper", {}),
    ("plus_annealed", "AdamCScheduleFreePlusPaper", {}),
    ("radam", "RAdamScheduleFree", {}),
    ("radam_sgd_phase", "RAdamScheduleFree", {}),
    ("sgd", "SGDScheduleFree", {}),
    ("sgd", "SGDScheduleFreeReference", {}),
]


def test_no_trajectory_is_left_out():
    assert {name for name, *_ in ENTRIES} == GOLDEN.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "cls", "extra"), ENTRIES)
def test_trajectory(name, cls, extra, dtype):
    golden = GOLDEN[name]
    kwargs = {key: value for key, value in golden["kwargs"].items() if key != "decay_at_z"} | extra
    params = [torch.nn.Parameter(p.to(dtype, copy=True)) for p in golden["initial"]]
    second = {"params": params[2:], "weight_decay": kwargs["weight_decay"] / 2}
    optimizer = getattr(schedulefree_cpp, cls)([{"params": params[:2]}, second], **kwargs)
    optimizer.train()
    exact = dtype == torch.float64
    tolerance = {"rtol": 0, "atol": 1e-12} if exact else cases.PARITY

    def compare(expected):
        for p, e in zip(params, expected, strict=True):
            torch.testing.assert_close(p.detach(), e.to(dtype), **tolerance)

    for step, grads in enumerate(golden["grads"]):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.to(dtype)
        if "plus" in name:
            optimizer.step_func(function_value=golden["losses"][step])
        else:
            optimizer.step()
        compare(golden["y"][step])
        if step in golden["x_at"]:
            optimizer.eval()
            compare(golden["x_at"][step])
            optimizer.train()
        for group, scalars in zip(optimizer.param_groups, golden["group_scalars"][step], strict=True):
            for key, value in scalars.items():
                assert group[key] == pytest.approx(value, rel=1e-12 if exact else 1e-5), key
    for p, state in zip(params, golden["final_state"], strict=True):
        for key in optimizer.state[p].keys() & state.keys():
            torch.testing.assert_close(optimizer.state[p][key], state[key].to(dtype), **tolerance)
