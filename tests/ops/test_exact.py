"""Looking at the average never changes training: at any step, through any kind of checkpoint, bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import cases
import pytest
import schedulefree
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

SHAPES = [(3, 5), (), (0,), (1030,), (2, 3, 4, 4)]
RESTS = (0, 3)  # the parameters that have no gradient in some steps
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BETAS = [0.9, 0.9, 0.95, 0.5, 0.98, 0.7]


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Magnitudes from 1e-4 to 10, so that x often is in another binade than y; one channels-last."""
    params = cases.parameters(SHAPES, dtype)
    for p in params:
        spread = 10 ** torch.empty(p.shape).uniform_(-4, 1, generator=torch.Generator().manual_seed(1))
        p.data = (p.detach().float() * spread).to(dtype)
    params[-1].data = params[-1].data.contiguous(memory_format=torch.channels_last)
    return params


def options_of(name: str) -> dict[str, Any]:
    """Hyperparameters under which everything moves that may move."""
    if name in cases.PLUS:
        return {"sf_beta1_anneal_steps": 9, "weight_decay": 5.0}
    if name in cases.WRAPPER:
        return {"weight_decay_at_y": 0.1}
    return {"weight_decay": 0.1} | ({} if "RAdam" in name else {"warmup_steps": 3})


def make(name: str, params: list[torch.nn.Parameter], **kwargs: Any) -> Any:
    return cases.make(name, params, lr=0.1, **options_of(name), **kwargs)


def step(optimizer: Any, seed: int) -> None:
    """A step in which beta is another than before, and sometimes a parameter has no gradient."""
    name = type(optimizer).__name__
    if name not in cases.PLUS + cases.WRAPPER:
        cases.set_beta(optimizer, BETAS[seed % len(BETAS)])
    params = cases.params_of(optimizer)

    def backward() -> None:
        cases.set_gradients(params, seed)
        if seed % 4 == 3:
            for i in RESTS:
                params[i].grad = None

    if name in cases.CLOSURE:
        optimizer.step(backward)
        return
    backward()
    if name in cases.PLUS:
        optimizer.step_func(1.0 + seed % 3)
    else:
        optimizer.step()


# ---- kinds of checkpoints ------------------------------------------------------------------------------


def loaded(optimizer: Any, state: dict[str, Any]) -> Any:
    """A fresh optimizer that has been given the parameters of another one and a state dict."""
    other = make(type(optimizer).__name__, cases.copies(cases.params_of(optimizer)))
    other.load_state_dict(state)
    return other


def through_a_file(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return loaded(optimizer, torch.load(file, weights_only=True))


def through_schedulefree(optimizer: Any) -> Any:
    name, params = type(optimizer).__name__, cases.copies(cases.params_of(optimizer))
    theirs = cases.make(name, params, package=schedulefree, lr=0.1)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    state = copy.deepcopy(theirs.state_dict())
    assert "schedulefree_cpp" not in state
    return loaded(optimizer, state)


def through_dcp(optimizer: Any, *, flatten: bool = False) -> Any:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = get_optimizer_state_dict(module_of(optimizer), optimizer, options=options)
    other = make(type(optimizer).__name__, cases.copies(cases.params_of(optimizer)))
    set_optimizer_state_dict(module_of(other), other, copy.deepcopy(state), options=options)
    return other


def module_of(optimizer: Any) -> torch.nn.Module:
    return torch.nn.ParameterList(cases.params_of(optimizer))


RELOADS = {
    "torch.save": through_a_file,
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "schedulefree": through_schedulefree,
    "dcp": through_dcp,
    "flattened dcp": lambda optimizer: through_dcp(optimizer, flatten=True),
}
ACTIONS = [
    "evaluate",
    "evaluate twice",
    "averaged",
    "reload in train mode",
    "reload in eval mode",
    "nothing",
]


def possible(name: str, dtype: torch.dtype, reload: str) -> bool:
    """What schedulefree can hold: it stores 16-bit state, has no ScheduleFree+ and no mode in wrappers."""
    return reload != "schedulefree" or (dtype == torch.float32 and name in cases.NATIVE + cases.CLOSURE)


def act(action: str, optimizer: Any, reload: str) -> Any:
    if action == "averaged":
        with optimizer.averaged(), optimizer.averaged():
            pass
        optimizer.averaged_state_dict(module_of(optimizer))
    elif action.startswith("reload"):
        optimizer.train("train" in action)
        optimizer = RELOADS[reload](optimizer)
        optimizer.train()
    elif action.startswith("evaluate"):
        for _ in range(1 + ("twice" in action)):
            optimizer.eval(), optimizer.eval()
            optimizer.train()
    return optimizer


CASES = [
    (name, dtype, reload)
    for name in cases.COMPLETE
    for dtype in [*DTYPES, torch.float64]
    for reload in RELOADS
    if possible(name, dtype, reload) and (dtype in DTYPES[:2] or reload in ("torch.save", "dcp"))
]


@pytest.mark.parametrize(("name", "dtype", "reload"), CASES)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(actions=st.lists(st.sampled_from(ACTIONS), min_size=12, max_size=18))
def test_a_run_that_is_looked_at_is_the_run(name, dtype, reload, actions):
    plain, looked_at = make(name, parameters(dtype)), make(name, parameters(dtype))
    for seed, action in enumerate(actions):
        step(plain, seed), step(looked_at, seed)
        looked_at = act(action, looked_at, reload)
        cases.assert_same(cases.params_of(plain), cases.params_of(looked_at))
        cases.assert_same(cases.states_of(plain), cases.states_of(looked_at))
    for group, other in zip(plain.param_groups, looked_at.param_groups, strict=True):
        # ScheduleFree+ reports its last step under keys that a flattened checkpoint does not ask for.
        reports = {"grad_l1_ema_corr", "function_value_ema", "ip_term"} - other.keys()
        assert {k: v for k, v in group.items() if k not in {"params", *reports}} == {
            k: v for k, v in other.items() if k != "params"
        }


@pytest.mark.parametrize("reload", ["torch.save", "deepcopy", "pickle"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.NATIVE + cases.CLOSURE + cases.MUON)
def test_a_beta_moved_since_the_last_step_is_reloaded_too(name, dtype, reload):
    plain, looked_at = make(name, parameters(dtype)), make(name, parameters(dtype))
    for seed in range(10):
        step(plain, seed), step(looked_at, seed)
        for optimizer in (plain, looked_at):
            cases.set_beta(optimizer, 0.6)
        looked_at = act(ACTIONS[seed % len(ACTIONS)], looked_at, reload)
        cases.assert_same(cases.params_of(plain), cases.params_of(looked_at))
        cases.assert_same(cases.states_of(plain), cases.states_of(looked_at))


@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_checkpoint_of_schedulefree_is_settled_by_the_first_step(name):
    upstream = cases.make(name, parameters(torch.float32), package=schedulefree, lr=0.1)
    cases.run(upstream, 8)
    plain, looked_at = (loaded_from(upstream, name) for _ in range(2))
    for seed in range(8, 16):
        step(plain, seed), step(looked_at, seed)
        looked_at = act(ACTIONS[seed % len(ACTIONS)], looked_at, "torch.save")
        cases.assert_same(cases.params_of(plain), cases.params_of(looked_at))


def loaded_from(upstream: Any, name: str) -> Any:
    optimizer = make(name, cases.copies(cases.params_of(upstream)))
    optimizer.load_state_dict(copy.deepcopy(upstream.state_dict()))
    return optimizer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.COMPLETE)
def test_the_number_of_threads_changes_no_bit_of_it(name, dtype):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for looks in (False, True):
                optimizer = make(name, cases.parameters([cases.LARGE, (7,), (3, 5), (9,)], dtype))
                for seed in range(7):
                    step(optimizer, seed)
                    if looks:
                        optimizer = act("evaluate", optimizer, "")
                results.append([*cases.params_of(optimizer), *cases.states_of(optimizer)])
    finally:
        torch.set_num_threads(before)
    cases.assert_same(results[0], results[1])
    cases.assert_same(results[2], results[3])
    if name not in cases.WRAPPER:  # torch's own optimizers round by the thread
        cases.assert_same(results[0], results[2])
