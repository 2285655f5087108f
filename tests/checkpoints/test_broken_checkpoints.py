"""State dicts that no run can have written, files that are damaged, and what is saved: numbers of any kind."""

from __future__ import annotations

import copy
import decimal
import fractions
import io
from typing import Any

import cases
import numpy as np
import pytest
import schedulefree_cpp
import torch

nan, inf = float("nan"), float("inf")


def ours(state: dict[str, Any]) -> dict[str, Any]:
    return state["schedulefree_cpp"]


def sparse_fingerprint(state: dict[str, Any]) -> None:
    ours(state)["fingerprint"]["y"] = ours(state)["fingerprint"]["y"].to_sparse()


CHANGES = {
    "z is a number": (
        lambda s: s["state"][0].update(z=5),
        "z of parameter 0 .* has type int, expected a tensor",
    ),
    "z is None": (lambda s: s["state"][1].update(z=None), "z of parameter 1 .* has type NoneType"),
    "z is complex": (
        lambda s: s["state"][0].update(z=s["state"][0]["z"].to(torch.complex64)),
        "z of parameter 0",
    ),
    "z is sparse": (
        lambda s: s["state"][0].update(z=s["state"][0]["z"].to_sparse()),
        "z of parameter 0 .* has layout torch.sparse_coo, expected a dense one",
    ),
    "y_beta is empty": (
        lambda s: ours(s).update(y_beta=[]),
        r"Invalid y_beta in the state dict: \[\], expected 1",
    ),
    "y_beta is a number": (lambda s: ours(s).update(y_beta=0.9), "Invalid y_beta in the state dict: 0.9"),
    "y_beta is NaN": (lambda s: ours(s).update(y_beta=[nan]), "Invalid y_beta in parameter group 0"),
    "y_beta is 0": (
        lambda s: ours(s).update(y_beta=[0.0]),
        r"Invalid y_beta in parameter group 0 .* \(0, 1\]",
    ),
    "k is NaN": (lambda s: s["param_groups"][0].update(k=nan), "Invalid k in parameter group 0 .*: nan"),
    "k is negative": (lambda s: s["param_groups"][0].update(k=-1), "Invalid k in parameter group 0 .*: -1"),
    "k is text": (lambda s: s["param_groups"][0].update(k="3"), "Invalid k in parameter group 0 .*: '3'"),
    "lr_max is NaN": (
        lambda s: s["param_groups"][0].update(lr_max=nan),
        "Invalid lr_max in parameter group 0",
    ),
    "scheduled_lr is infinite": (
        lambda s: s["param_groups"][0].update(scheduled_lr=inf),
        "Invalid scheduled_lr",
    ),
    "weight_sum is negative": (
        lambda s: s["param_groups"][0].update(weight_sum=-0.02),
        "Invalid weight_sum .*-0.02",
    ),
    "the fingerprint is sparse": (sparse_fingerprint, "Invalid fingerprint"),
    "parameters are numbered from 5": (
        lambda s: s["param_groups"][0].update(params=[5, 6]),
        "state has parameter 0, which is in no parameter group",
    ),
    "no state": (lambda s: s.pop("state"), "expected state, a dict of dicts"),
    "a state is a list": (lambda s: s["state"].update({0: []}), "expected state, a dict of dicts"),
    "no groups": (lambda s: s.pop("param_groups"), "expected param_groups, a list of dicts"),
    "a group is a list": (lambda s: s.update(param_groups=[[]]), "expected param_groups, a list of dicts"),
    "a group without params": (lambda s: s["param_groups"][0].pop("params"), "group 0 has no list of params"),
}


@pytest.mark.parametrize("name", [*cases.NATIVE, *cases.CLOSURE])
@pytest.mark.parametrize("change", CHANGES)
def test_a_state_dict_that_no_run_has_written_is_refused_and_nothing_loaded(name, change):
    optimizer = cases.make(name, cases.parameters([(4,), (2, 3)]))
    cases.run(optimizer, 2)
    state, before = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    changed, message = CHANGES[change]
    changed(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    now = optimizer.state_dict()
    assert now["param_groups"] == before["param_groups"]
    for key, tensors in before["state"].items():
        cases.assert_same(tensors.values(), now["state"][key].values())


MOMENTS = {
    "codes without a scale": (lambda s: s.pop("exp_avg_sq_scale"), "torch.uint8 and .* of NoneType"),
    "a scale without codes": (
        lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].float()),
        "torch.float32 and .* of torch.float32",
    ),
    "codes that are a number": (lambda s: s.update(exp_avg_sq=3), "of int and"),
    "a scale that is a number": (lambda s: s.update(exp_avg_sq_scale=3.0), "torch.uint8 and .* of float"),
    "a scale that is NaN": (lambda s: s["exp_avg_sq_scale"].fill_(nan), "expected values from 0 to"),
    "a scale that is negative": (lambda s: s["exp_avg_sq_scale"].fill_(-1), "expected values from 0 to"),
    "a scale that is infinite": (lambda s: s["exp_avg_sq_scale"].fill_(inf), "expected values from 0 to"),
}


@pytest.mark.parametrize("change", MOMENTS)
@pytest.mark.parametrize("bits", [8, 32])
def test_a_second_moment_that_no_run_has_written_is_refused(change, bits):
    optimizer = schedulefree_cpp.AdamWScheduleFree(cases.parameters([(4,)]), exp_avg_sq_bits=8)
    optimizer.train()
    cases.run(optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    changed, message = MOMENTS[change]
    changed(state["state"][0])
    other = schedulefree_cpp.AdamWScheduleFree(cases.parameters([(4,)]), exp_avg_sq_bits=bits)
    with pytest.raises(ValueError, match=rf"Invalid state dict: .*exp_avg_sq.*{message}"):
        other.load_state_dict(state)
    assert not other.state


def test_the_largest_second_moment_of_8_bits_loads():
    optimizer = schedulefree_cpp.AdamWScheduleFree(cases.parameters([(200,)]), exp_avg_sq_bits=8)
    optimizer.train()
    (p,) = cases.params_of(optimizer)
    p.grad = torch.full_like(p, 3e38)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    cases.assert_same(optimizer.state[p].values(), state["state"][0].values())


# ---- files -----------------------------------------------------------------------------------------------


def trained(seed: int) -> tuple[torch.nn.Module, Any]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    optimizer = cases.make("AdamWScheduleFree", model.parameters())
    cases.run(optimizer, 3)
    return model, optimizer


MODELS = {
    "a buffer is a number": lambda m: m.update({"1.num_batches_tracked": 3}),
    "a weight is sparse": lambda m: m.update({"1.weight": m["1.weight"].to_sparse()}),
    "a weight is complex": lambda m: m.update({"0.weight": m["0.weight"].to(torch.complex64)}),
    "a weight is an integer": lambda m: m.update({"0.weight": m["0.weight"].int()}),
    "a weight has no values": lambda m: m.update({"1.weight": m["1.weight"].to("meta")}),
}


@pytest.mark.parametrize("change", MODELS)
def test_a_file_that_the_model_cannot_take_changes_neither(change, tmp_path):
    path = tmp_path / "c.pt"
    schedulefree_cpp.save_checkpoint(path, *trained(3))
    file = torch.load(path, weights_only=True)
    MODELS[change](file["model"])
    torch.save(file, path)
    refused(path, ValueError, "Invalid checkpoint .* of the model has .*, expected")


def refused(path: Any, error: type[Exception], message: str, prepare: Any = None) -> None:
    model, optimizer = trained(2)
    if prepare is not None:
        prepare(model, optimizer)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message):
        schedulefree_cpp.load_checkpoint(path, model, optimizer)
    cases.assert_same(before[0].values(), model.state_dict().values())
    assert before[1]["param_groups"] == optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("who", ["model", "optimizer"])
def test_a_hook_that_fails_leaves_both_as_they_were(who, tmp_path):
    path = tmp_path / "c.pt"
    schedulefree_cpp.save_checkpoint(path, *trained(3))

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    def prepare(model: Any, optimizer: Any) -> None:
        if who == "model":
            model[1].register_load_state_dict_post_hook(fail)
        else:
            optimizer.register_load_state_dict_pre_hook(fail)

    refused(path, OSError, "the disk is gone", prepare)


def test_one_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    model, optimizer = trained(3)
    schedulefree_cpp.save_checkpoint(path, model, optimizer)
    with optimizer.averaged():
        weight = model[0].weight.detach().numpy().tobytes()
    good = path.read_bytes()
    at = good.index(weight)
    for bit in (0, 30):
        bad = bytearray(good)
        bad[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(bad))
        refused(path, ValueError, "the checksum of its entry .* does not match")


# ---- numbers ---------------------------------------------------------------------------------------------

NUMBERS = [np.float64(0.5), np.float32(0.5), np.array(0.5), fractions.Fraction(1, 2), decimal.Decimal("0.5")]


@pytest.mark.parametrize("key", ["lr", "weight_decay", "a key of the user's"])
@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "ScheduleFreeWrapper"])
def test_numbers_of_any_kind_are_saved_as_plain_ones(name, number, key):
    optimizer = cases.make(name, cases.parameters([(3,)]))
    cases.run(optimizer, 2)
    optimizer.param_groups[0][key] = number
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)["param_groups"][0][key]
    assert (type(saved), saved) == (float, 0.5)


def test_betas_of_numpy_are_saved_as_plain_numbers():
    optimizer = cases.make("AdamWScheduleFree", cases.parameters([(3,)]))
    optimizer.param_groups[0]["betas"] = (np.float64(0.9), np.float64(0.99))
    cases.run(optimizer, 1)
    saved = optimizer.state_dict()["param_groups"][0]["betas"]
    assert [*map(type, saved)] == [float, float]


def test_the_optimizer_of_a_lazy_module_waits_for_its_shapes():
    model = torch.nn.Linear(4, 3)
    saved = cases.make("AdamWScheduleFree", model.parameters())
    cases.run(saved, 2)
    lazy = torch.nn.LazyLinear(3)
    optimizer = cases.make("AdamWScheduleFree", lazy.parameters())
    with pytest.raises(ValueError, match="parameter 0 of parameter group 0 has no shape yet"):
        optimizer.load_state_dict(saved.state_dict())
    assert not optimizer.state
    lazy(torch.zeros(1, 4))
    optimizer.load_state_dict(saved.state_dict())
    assert optimizer.param_groups[0]["k"] == 2
