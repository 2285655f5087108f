"""What users of ``schedulefree`` were bitten by. Each test fails with it, and passes here."""

from __future__ import annotations

import io

import cases
import pytest
import schedulefree
import schedulefree_cpp
import torch

pytestmark = pytest.mark.parametrize(
    "package",
    [
        pytest.param(schedulefree_cpp, id="ours"),
        pytest.param(schedulefree, id="upstream", marks=pytest.mark.xfail(strict=True)),
    ],
)


def model_and_optimizer(package, name="AdamWScheduleFree", steps=8, **kwargs):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    optimizer = cases.make(name, model.parameters(), package=package, lr=0.05, **kwargs)
    cases.run(optimizer, steps)
    return model, optimizer


def evaluated(model, optimizer):
    """The parameters that an evaluation uses."""
    optimizer.eval()
    x = [p.detach().clone() for p in model.parameters()]
    optimizer.train()
    return x


def test_saved_weights_are_the_evaluated_ones_without_a_switch(package):
    model, optimizer = model_and_optimizer(package)
    y = [p.detach().clone() for p in model.parameters()]
    saved = optimizer.averaged_state_dict(model)
    with optimizer.averaged():
        inside = [p.detach().clone() for p in model.parameters()]
    cases.assert_same(model.parameters(), y)
    x = evaluated(model, optimizer)
    cases.assert_same(model.parameters(), y)
    cases.assert_same(saved.values(), x)
    cases.assert_same(inside, x)


def test_a_group_in_eval_mode_is_named_with_the_call_to_make(package):
    params = cases.parameters([(3,), (4,)])
    optimizer = cases.make(
        "AdamWScheduleFree", [{"params": params[:1]}, {"params": params[1:]}], package=package
    )
    cases.run(optimizer, 2)
    optimizer.param_groups[1]["train_mode"] = False
    cases.set_gradients(params, 2)
    with pytest.raises(Exception, match=r"parameter group 1 is in eval mode.*Call optimizer\.train\(\)"):
        optimizer.step()


def evaluated_run(package, evaluate):
    model, optimizer = model_and_optimizer(package)
    for seed in range(8, 40):
        cases.drive(optimizer, seed)
        if evaluate:
            optimizer.eval(), optimizer.train()
    return list(model.parameters())


def test_evaluation_does_not_change_training(package):
    cases.assert_same(evaluated_run(package, True), evaluated_run(package, False))


@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_wrapper_has_a_mode_that_can_be_asked_for_and_is_saved(package, name):
    params = cases.parameters([(3, 4)])
    optimizer = getattr(package, name)(torch.optim.SGD(params, lr=0.1))
    optimizer.train()
    cases.run(optimizer, 3)
    optimizer.eval()
    assert optimizer.train_mode is False
    resumed = getattr(package, name)(torch.optim.SGD(cases.copies(params), lr=0.1))
    resumed.train()
    resumed.load_state_dict(optimizer.state_dict())
    resumed.train()
    optimizer.train()
    cases.assert_same(params, cases.params_of(resumed))


@pytest.mark.parametrize("modes", [("eval", "train"), ("train", "eval")])
def test_a_model_saved_in_one_mode_and_an_optimizer_in_the_other_are_refused(package, modes):
    model, optimizer = model_and_optimizer(package)
    getattr(optimizer, modes[0])()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    getattr(optimizer, modes[1])()
    state = optimizer.state_dict()
    other = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
    resumed = cases.make("AdamWScheduleFree", other.parameters(), package=package)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    with pytest.raises(RuntimeError, match="saved in one mode and the optimizer in the other"):
        resumed.train()


def test_there_are_callbacks_for_the_trainers(package):
    import importlib

    for framework in ("lightning", "transformers"):
        module = importlib.import_module(f"{package.__name__}.integrations.{framework}")
        assert callable(module.ScheduleFreeCallback)


def test_frozen_and_gradless_parameters_are_left_alone(package):
    params = cases.parameters([(3,), (4,), (5,)])
    params[1].requires_grad_(False)
    for name in ("SGDScheduleFreeClosure", "AdamWScheduleFreeClosure", "RAdamScheduleFreeClosure"):
        optimizer = cases.make(name, [{"params": params}, {"params": []}], package=package)
        optimizer.step(lambda: None)
        optimizer.step(lambda: params[0].square().sum().backward())
        assert params[1] not in optimizer.state


def test_a_group_added_in_train_mode_is_evaluated_and_trained_like_the_others(package):
    params, late = cases.parameters([(3, 4)]), cases.parameters([(50,)], seed=1)
    optimizer = cases.make("SGDScheduleFree", params, package=package, lr=0.3)
    cases.run(optimizer, 2)
    optimizer.add_param_group({"params": late})
    cases.run(optimizer, 4, start=2)
    y = late[0].detach().clone()
    optimizer.eval(), optimizer.train()
    torch.testing.assert_close(late[0].detach(), y)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_first_step_at_learning_rate_zero_breaks_nothing(package, name):
    params = cases.parameters([(3, 4)])
    optimizer = cases.make(name, params, package=package, lr=torch.tensor(0.0), foreach=False)
    cases.run(optimizer, 1)
    optimizer.param_groups[0]["lr"].fill_(0.1)
    cases.run(optimizer, 2, start=1)
    assert params[0].isfinite().all()


@pytest.mark.parametrize("name", cases.NATIVE)
def test_gradients_are_what_backward_left(package, name):
    params = cases.parameters([(3, 4)])
    optimizer = cases.make(name, params, package=package, weight_decay=0.1)
    cases.run(optimizer, 7)
    grads = [p.grad.clone() for p in params]
    cases.set_gradients(params, 6)
    cases.assert_same([p.grad for p in params], grads)


@pytest.mark.parametrize("after", [torch.bfloat16, torch.float64])
def test_the_state_of_a_parameter_that_is_cast_goes_along(package, after):
    model, optimizer = model_and_optimizer(package)
    model.to(after)
    optimizer.train()
    cases.run(optimizer, 3, start=8)
    optimizer.eval(), optimizer.train()
    wide = torch.float64 if after == torch.float64 else torch.float32
    for p in model.parameters():
        assert optimizer.state[p]["z"].dtype == wide
        assert p.isfinite().all()


def test_loading_keeps_float32_state_under_16_bit_parameters(package):
    model, optimizer = model_and_optimizer(package)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    half = [torch.nn.Parameter(p.detach().bfloat16()) for p in model.parameters()]
    resumed = cases.make("AdamWScheduleFree", half, package=package)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for p, q in zip(model.parameters(), half, strict=True):
        assert torch.equal(optimizer.state[p]["z"], resumed.state[q]["z"])


@pytest.mark.parametrize("name", cases.WRAPPER)
def test_a_wrapper_is_an_optimizer_and_wraps_any_whose_state_is_made_late(package, name):
    params = cases.parameters([(3, 4)])
    optimizer = getattr(package, name)(torch.optim.Adam(params, lr=0.01))
    optimizer.train()
    assert isinstance(optimizer, torch.optim.Optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    cases.run(optimizer, 4)
    scheduler.step()
    resumed = getattr(package, name)(torch.optim.Adam(cases.copies(params), lr=0.01))
    resumed.load_state_dict(optimizer.state_dict())
    cases.run(optimizer, 4, start=4), cases.run(resumed, 4, start=4)
    cases.assert_same(params, cases.params_of(resumed))
