"""Schedule-Free Muon: against a reference by singular values, and against torch.optim.Muon."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import cases
import pytest
import torch
from reference import Hyperparameters, MuonReference, Reference
from schedulefree_cpp import AdamWScheduleFree, MuonScheduleFree

MATRICES = [(8, 5), (5, 8), (6, 6), (1, 3), (3, 1), (1, 1), (40, 130)]
OTHERS = [(), (7,), (4, 3, 3)]
BATCHES_AND_FILTERS = [(3, 5, 4), (2, 3, 6), (1, 1, 1), (4, 3, 3, 3), (6, 1, 2, 2), (2, 3, 1, 2, 2)]
SHAPES = [shape for pair in zip(MATRICES, OTHERS, strict=False) for shape in pair] + MATRICES[len(OTHERS) :]

# Of float64 arithmetic: an iteration of Newton-Schulz multiplies errors by at most 3.4445.
EXACT = {"rtol": 1e-8, "atol": 1e-10}

OPTIONS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"lr": 0.02}, {}),
    ({"lr": 0.02, "weight_decay": 0.1, "warmup_steps": 10}, {"adjust_lr_fn": "original"}),
    ({"lr": 0.02, "weight_decay": 0.1, "beta": 0.95, "decay_at": "y", "r": 1.0}, {"nesterov": False}),
    ({"lr": 0.02, "maximize": True, "decoupling_c": 20.0}, {"momentum": 0.5, "ns_steps": 3}),
    ({"lr": 0.02, "weight_decay": 0.1, "averaging_weight": 0.1}, {"momentum": 0.0}),
    (
        {"lr": 0.008, "weight_decay": 0.05, "beta2": 0.95, "warmup_steps": 10},
        {"momentum": 0.8, "nesterov": False, "normalize_rows": True},
    ),
]


def trained(params: Any, steps: int = 8, **kwargs: Any) -> MuonScheduleFree:
    """An optimizer in train mode that has taken some steps."""
    optimizer: MuonScheduleFree = cases.make("MuonScheduleFree", params, **kwargs)
    cases.run(optimizer, steps)
    return optimizer


def saved(optimizer: Any) -> Any:
    """The state dict, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the step ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("h", "own"), OPTIONS)
def test_matrices_and_others_follow_the_reference(h, own):
    params = cases.parameters(SHAPES + BATCHES_AND_FILTERS, torch.float64)
    hyper = Hyperparameters(adam=True, **{"decay_at": "z", **h})
    kwargs = cases.arguments(hyper) | own
    del kwargs["inner_momentum"]
    more = params[len(SHAPES) :]
    optimizer = cases.make(
        "MuonScheduleFree", [{"params": params[: len(SHAPES)]}, {"params": more, "use_muon": True}], **kwargs
    )
    others = [p for p in params[: len(SHAPES)] if p.ndim != 2]
    matrices = [p for p in params[: len(SHAPES)] if p.ndim == 2] + more
    references = [
        MuonReference.of(matrices, replace(hyper, adam=False)),
        Reference.of(others, hyper),
    ]
    for name, value in own.items():
        setattr(references[0], name, value)
    iterates = [it for reference in references for it in reference.iterates]
    for seed in range(30):
        cases.set_gradients(params, seed)
        for reference, group in zip(references, (matrices, others), strict=True):
            reference.step([p.grad for p in group])
        optimizer.step()
        for p, it in zip(matrices + others, iterates, strict=True):
            torch.testing.assert_close(p.detach(), it.y, **EXACT)
            torch.testing.assert_close(optimizer.state[p]["z"], it.z, **EXACT)
        with optimizer.averaged():
            for p, it in zip(matrices + others, iterates, strict=True):
                torch.testing.assert_close(p.detach(), it.x, **EXACT)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_takes_the_steps_of_torchs_muon(dtype, adjust_lr_fn, nesterov):
    params = cases.parameters([*MATRICES, (0, 3), (3, 0)], dtype)
    kwargs = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    optimizer = cases.make("MuonScheduleFree", params, **kwargs)
    others = [torch.nn.Parameter(p.detach().float().clone()) for p in params[:-2]]
    muon = torch.optim.Muon(others, **kwargs)
    for seed in range(20):
        cases.set_gradients(params, seed)
        for p, q in zip(params[:-2], others, strict=True):
            q.grad = p.grad.float()
        optimizer.step(), muon.step()
    for p, q in zip(params[:-2], others, strict=True):
        # The last bits of a mean may round it to another bfloat16 value.
        torch.testing.assert_close(optimizer.state[p]["z"], q.detach(), rtol=0, atol=2e-3)
    assert (optimizer.state[params[0]]["z"] - params[0].detach().float()).abs().max() > 0.02


def test_filters_take_the_step_of_the_matrix_that_they_are_in_any_memory_format():
    filters = cases.parameters([(4, 3, 2, 2)])[0]
    last = torch.nn.Parameter(filters.detach().clone(memory_format=torch.channels_last))
    matrix = torch.nn.Parameter(filters.detach().flatten(1).clone())
    optimizers = [trained([{"params": [p], "use_muon": True}], 0) for p in (filters, last, matrix)]
    for seed in range(5):
        cases.set_gradients([filters], seed)
        last.grad = filters.grad.clone(memory_format=torch.channels_last)
        matrix.grad = filters.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(filters, last)
    assert torch.equal(filters.flatten(1), matrix)
    assert optimizers[1].state[last]["z"].is_contiguous(memory_format=torch.channels_last)


def test_rows_of_even_size_are_what_normalization_leaves_of_uneven_ones():
    """The definition's purpose: every neuron moves as far, and the matrix as far as an orthogonal one."""
    p = torch.nn.Parameter(torch.zeros(4, 64, dtype=torch.float64))
    optimizer = cases.make("MuonScheduleFree", [p], lr=1.0, eps=0.0, normalize_rows=True, ns_steps=1)
    p.grad = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).double()
    p.grad[0] *= 1e-3
    optimizer.step()
    moved = optimizer.state[p]["z"].norm(dim=1)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.2 * 8), rtol=1e-6, atol=0)


def test_a_bfloat16_parameter_follows_the_float32_trajectory():
    params = cases.parameters(SHAPES, torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]  # copies
    half, full = (cases.make("MuonScheduleFree", ps, weight_decay=0.1) for ps in (params, wide))
    for seed in range(10):
        cases.set_gradients(params, seed)
        for p, q in zip(params, wide, strict=True):
            q.grad = p.grad.float()
        half.step(), full.step()
    for p, q in zip(params, wide, strict=True):
        assert torch.equal(half.state[p]["z"], full.state[q]["z"])
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=2**-8, atol=1e-6)


def test_few_bytes_stay_near_the_float32_trajectory_and_resume_exactly():
    bits = {"state_bits": 24, "exp_avg_sq_bits": 8, "rounding": "stochastic"}
    params = cases.parameters([(6, 4), (5,)], torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in params]
    few = trained(params, **bits)
    trained(wide)
    assert [few.state[p]["z_lo"].dtype for p in params] == [torch.int8] * 2
    assert few.state[params[1]]["exp_avg_sq"].dtype == torch.uint8
    for p, q in zip(params, wide, strict=True):
        torch.testing.assert_close(p.detach().float(), q.detach(), rtol=2**-6, atol=1e-3)

    others = cases.copies(params)
    other = MuonScheduleFree(others, **bits)
    other.load_state_dict(saved(few))
    for optimizer in (few, other):
        optimizer.eval(), optimizer.train()
        cases.run(optimizer, 3, start=8)
    cases.assert_same(params, others)
    cases.assert_same(cases.states_of(few), cases.states_of(other))


def test_clipping_scales_what_enters_the_mean():
    """A direction does not depend on the gradient's size, but the mean of several does."""
    params = cases.parameters([(6, 4), (5,)], torch.float64)
    clipped, other = (cases.make("MuonScheduleFree", ps) for ps in (params, cases.copies(params)))
    for group in clipped.param_groups:
        group["max_grad_norm"] = 0.5
    for seed in range(5):
        cases.set_gradients(params, seed)
        for p, q in zip(params, cases.params_of(other), strict=True):
            p.grad.mul_(10**seed)
            q.grad = p.grad.clone()
        torch.nn.utils.clip_grad_norm_(cases.params_of(other), 0.5)
        clipped.step(), other.step()
    for p, q in zip(params, cases.params_of(other), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_step_within_backward_is_the_same():
    params, others = (cases.parameters(SHAPES) for _ in range(2))
    optimizer, other = (cases.make("MuonScheduleFree", ps) for ps in (params, others))
    with other.step_in_backward():
        for _ in range(4):
            sum(p.sin().sum() for p in params).backward()
            optimizer.step(), optimizer.zero_grad()
            sum(p.sin().sum() for p in others).backward()
            other.step()
    cases.assert_same(params, others)


def test_an_overflow_under_a_gradient_scaler_changes_nothing():
    params = cases.parameters(SHAPES)
    optimizer = trained(params)
    before, state = cases.copies(params), [t.clone() for t in cases.states_of(optimizer)]
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    cases.set_gradients(params, 8)
    params[0].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    cases.assert_same([*params, *cases.states_of(optimizer)], [*before, *state])
    assert [group["k"] for group in optimizer.param_groups] == [8, 8]


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("use_muon", [None, False])
def test_a_compiled_step_is_the_same(use_muon):
    """Without matrices it needs no graph break."""
    torch._dynamo.reset()
    params, others = (cases.parameters(SHAPES) for _ in range(2))
    optimizer, other = (
        cases.make("MuonScheduleFree", [{"params": ps, "use_muon": use_muon}], lr=0.01)
        for ps in (params, others)
    )
    step = torch.compile(other.step, fullgraph=use_muon is False)
    for seed in range(4):
        cases.set_gradients(params, seed), cases.set_gradients(others, seed)
        optimizer.step(), step()
    cases.assert_same(params, others)


# ---- groups --------------------------------------------------------------------------------------------


def test_a_group_of_both_kinds_becomes_two_with_their_names():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    optimizer = MuonScheduleFree(model.named_parameters(), lr=0.1)
    assert [group["param_names"] for group in optimizer.param_groups] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias", "2.bias"],
    ]
    assert [group["use_muon"] for group in optimizer.param_groups] == [True, False]
    optimizer = trained(cases.parameters([(3, 4)]), lr=0.1)
    optimizer.add_param_group({"params": torch.nn.Parameter(torch.ones(2, 3)), "lr": 0.5})
    optimizer.add_param_group({"params": []})
    late = optimizer.param_groups[1:]
    assert [(group["use_muon"], group["lr"], group["train_mode"]) for group in late] == [
        (True, 0.5, True),
        (False, 0.1, True),
    ]


def test_a_matrix_without_use_muon_takes_the_step_of_adamw():
    params, others = (cases.parameters([(6, 4), (5,)]) for _ in range(2))
    optimizer = trained([{"params": params, "use_muon": False}], weight_decay=0.1)
    other = AdamWScheduleFree(others, lr=0.05, weight_decay=0.1, decay_at="z")
    other.train()
    cases.run(other, 8)
    cases.assert_same(params, others)
    assert optimizer.state[params[0]].keys() == other.state[others[0]].keys()


def test_what_is_no_matrix_is_refused_by_group_and_name_and_nothing_is_added():
    optimizer = trained(cases.parameters([(6, 4)]))
    named = [("weight", torch.nn.Parameter(torch.ones(2, 2))), ("bias", torch.nn.Parameter(torch.ones(2)))]
    message = (
        r"Invalid params\[1\] \('bias'\) in parameter group 0: shape \(2,\), expected two dimensions or more"
    )
    with pytest.raises(ValueError, match=message):
        MuonScheduleFree([{"params": named, "use_muon": True}])
    with pytest.raises(ValueError, match=r"Invalid params\[1\] in parameter group 1: shape \(2,\)"):
        optimizer.add_param_group({"params": [p for _, p in named], "use_muon": True})
    assert len(optimizer.param_groups) == 1
    cases.run(optimizer, 1, start=8)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("momentum", 1.0, r"Invalid momentum{}: 1, expected a value in \[0, 1\)"),
        ("momentum", "high", "Invalid momentum{}: 'high' of type str"),
        ("ns_steps", -1, "Invalid ns_steps{}: -1, expected"),
        ("normalize_rows", "yes", "Invalid normalize_rows{}: 'yes', expected one of"),
        ("adjust_lr_fn", "none", r"Invalid adjust_lr_fn{}: 'none', expected one of \['original', 'match_rms"),
        ("use_muon", "yes", "Invalid use_muon{}: 'yes', expected one of"),
        ("capturable", True, "Invalid capturable{}: True, expected False: a step of MuonScheduleFree needs"),
    ],
)
def test_hyperparameters_are_refused_by_name_and_group(name, value, message):
    params = cases.parameters([(6, 4), (5,)])
    optimizer = trained(params)
    if name not in ("use_muon", "capturable"):
        with pytest.raises(ValueError, match=message.format("")):
            MuonScheduleFree(params, **{name: value})
    with pytest.raises(ValueError, match=message.format(" in parameter group 2")):
        optimizer.add_param_group({"params": cases.parameters([(3,)]), name: value})
    if name == "capturable":
        return
    before, state = cases.copies(params), [t.clone() for t in cases.states_of(optimizer)]
    good, optimizer.param_groups[0][name] = optimizer.param_groups[0][name], value
    with pytest.raises(ValueError, match=message.format(" in parameter group 0")):
        cases.drive(optimizer, 8)
    cases.assert_same([*params, *cases.states_of(optimizer)], [*before, *state])
    optimizer.param_groups[0][name] = good
    cases.run(optimizer, 1, start=8)


@pytest.mark.parametrize("bad", ["sparse", "overlapping", "moved"])
def test_a_refused_step_changes_no_mean(bad):
    params = cases.parameters([(6, 4), (4, 6), (5, 5)])
    optimizer = trained(params)
    cases.set_gradients(params, 8)
    if bad == "sparse":
        params[2].grad = params[2].grad.to_sparse()
    elif bad == "overlapping":
        optimizer.state[params[2]]["z"] = params[2].data
    else:
        optimizer.state[params[2]]["z"] = optimizer.state[params[2]]["z"].double()
    before, state = cases.copies(params), [t.clone() for t in cases.states_of(optimizer)]
    with pytest.raises(RuntimeError):
        optimizer.step()
    cases.assert_same([*params, *cases.states_of(optimizer)], [*before, *state])
    assert optimizer.param_groups[0]["k"] == 8


# ---- checkpoints ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_checkpoint_resumes_exactly(mode, dtype):
    params = cases.parameters(SHAPES, dtype)
    optimizer = trained(params, weight_decay=0.1)
    getattr(optimizer, mode)()
    others = cases.copies(params)
    other = MuonScheduleFree(others, lr=1.0)
    other.load_state_dict(saved(optimizer))
    optimizer.train(), other.train()
    cases.run(optimizer, 3, start=8), cases.run(other, 3, start=8)
    cases.assert_same(params, others)
    cases.assert_same(cases.states_of(optimizer), cases.states_of(other))


def test_rows_are_normalized_by_a_1_as_by_true():
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = trained([{"params": [p], "use_muon": True}], normalize_rows=1)
    assert "row_exp_avg_sq" in optimizer.state[p]


def test_rows_filters_and_batches_resume_exactly():
    params = cases.parameters([(6, 4), (3, 5, 4), (4, 3, 2, 2)])
    kwargs = {"lr": 0.05, "normalize_rows": True}
    optimizer = trained([{"params": params, "use_muon": True}], **kwargs)
    assert [optimizer.state[p]["row_exp_avg_sq"].shape for p in params] == [(6,), (3, 5), (4,)]
    others = cases.copies(params)
    other = MuonScheduleFree([{"params": others, "use_muon": True}])
    other.load_state_dict(saved(optimizer))
    other.train()
    for each in (optimizer, other):
        cases.run(each, 3, start=8)
    cases.assert_same(params, others)
    cases.assert_same(cases.states_of(optimizer), cases.states_of(other))
    changed = saved(optimizer)
    changed["state"][1]["row_exp_avg_sq"] = torch.ones(3, 4)
    message = r"row_exp_avg_sq of parameter 1 .* has shape \(3, 4\), expected \(3, 5\)"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(changed)
    cases.assert_same(params, others)


def test_a_state_dict_of_other_kinds_of_groups_is_refused():
    params = cases.parameters([(6, 4), (5,)])
    optimizer = trained(params)
    before = saved(optimizer)
    changed = copy.deepcopy(before)
    changed["param_groups"][1]["use_muon"] = True
    message = r"Invalid params\[0\] in parameter group 1 of the state dict: shape \(5,\), expected two"
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(changed)
    changed = copy.deepcopy(before)
    changed["param_groups"][0]["use_muon"] = False
    with pytest.raises(ValueError, match="of parameter group 0 lacks exp_avg_sq, has"):
        optimizer.load_state_dict(changed)
    changed = copy.deepcopy(before)
    changed["state"][0]["momentum_buffer"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"momentum_buffer of .* has shape \(3,\), expected \(6, 4\)"):
        optimizer.load_state_dict(changed)
    cases.run(optimizer, 1, start=8)
