"""The C++ optimizers beside those of Python: one trajectory, one checkpoint."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import schedulefree
import schedulefree_cpp
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
CLASSES = {
    "SGD": schedulefree_cpp.SGDScheduleFree,
    "AdamW": schedulefree_cpp.AdamWScheduleFree,
    "RAdam": schedulefree_cpp.RAdamScheduleFree,
}
WRAPPED = {
    "Wrapper": lambda groups: schedulefree_cpp.ScheduleFreeWrapper(torch.optim.RMSprop(groups)),
}
pytestmark = pytest.mark.build

# Two groups whose every hyperparameter differs. RAdam has no warmup, the others no silent phase.
COMMON = (
    {"lr": 0.1, "weight_decay": 0.01},
    {
        "lr": 0.03,
        "weight_decay": 0.2,
        "r": 0.5,
        "weight_lr_power": 1.5,
        "decoupling_c": 50.0,
        "decay_at": "z",
        "maximize": True,
    },
)
OWN = {
    "SGD": (
        {"momentum": 0.9, "warmup_steps": 20},
        {"momentum": 0.95, "warmup_steps": 35, "averaging_weight": 0.02},
    ),
    "AdamW": (
        {"betas": (0.9, 0.99), "warmup_steps": 20},
        {"betas": (0.95, 0.999), "warmup_steps": 35, "inner_momentum": 0.5, "eps": 1e-6},
    ),
    "RAdam": ({"betas": (0.9, 0.99)}, {"betas": (0.95, 0.999), "silent_sgd_phase": False, "eps": 1e-6}),
}
# Not centered: there C++ and Python round torch's RMSprop in different ways.
OF_WRAPPER = (
    {
        "lr": 0.01,
        "alpha": 0.9,
        "weight_decay": 0.0,
        "momentum": 0.0,
        "centered": False,
        "sf_weight_decay_at_y": 0.1,
        "sf_max_grad_norm": 5.0,
    },
    {
        "lr": 0.003,
        "alpha": 0.99,
        "weight_decay": 0.01,
        "momentum": 0.5,
        "centered": False,
        "sf_momentum": 0.95,
        "sf_r": 0.5,
        "sf_weight_lr_power": 1.5,
    },
)
NAMES = (["a", "b", "bf16"], ["c", "f64", "late"])
STEPS = 200


@pytest.fixture(scope="session")
def trajectory() -> Path:
    """The program of tests/cpp/trajectory.cpp."""
    build = ROOT / "build" / "tests"
    options = ["-DSCHEDULEFREE_TESTS=ON", f"-DSCHEDULEFREE_TORCH_ROOT={Path(torch.__file__).parent}"]
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options],
        ["cmake", "--build", build, "--target", "trajectory"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build / "tests" / "cpp" / "trajectory"


def groups_of(name: str, **changes: object) -> list[dict]:
    if name in WRAPPED:
        return [{"names": names, **own} for names, own in zip(NAMES, OF_WRAPPER, strict=True)]
    return [
        {"names": names, **common, **own, **changes}
        for names, common, own in zip(NAMES, COMMON, OWN[name], strict=True)
    ]


def make_case(name: str, seed: int = 0, **changes: object) -> dict:
    """Parameters of several dtypes and strides, one without a gradient in every third step, one at first."""
    torch.manual_seed(seed)
    params = {
        "a": torch.randn(13, 7),
        "b": torch.randn(5, 3, 2).permute(2, 0, 1),
        "bf16": torch.randn(33).bfloat16(),
        "c": torch.randn(()),
        "f64": torch.randn(4, 6, dtype=torch.float64),
        "late": torch.randn(9),
    }
    moved = {82: 0.8, 100: 0.97}  # while "b" rests
    steps = []
    for k in range(STEPS):
        absent = {"b"} if k % 3 == 1 else set()
        absent |= {"late"} if k < 50 else set()
        grads = {key: torch.randn_like(p) for key, p in params.items() if key not in absent}
        change: dict[str, object] = {}
        if k in moved:
            beta = {"SGD": "momentum", "Wrapper": "sf_momentum"}.get(name)
            change = {beta: moved[k]} if beta else {"betas": (moved[k], 0.995)}
        steps.append({"grads": grads, "lr": 0.7 if k == 120 else 1.0, "change": change, "eval": k % 17 == 3})
    return {
        "optimizer": name,
        "params": params,
        "groups": groups_of(name, **changes),
        "steps": steps,
        "train_mode": True,
    }


class Model(torch.nn.Module):
    """Holds parameters under their names."""

    def __init__(self, params: dict[str, Tensor]) -> None:
        """Copies them."""
        super().__init__()
        for name, p in params.items():
            self.register_parameter(name, torch.nn.Parameter(p.clone()))


def in_python(
    case: dict,
    checkpoint: dict | None = None,
    *,
    named: bool = False,
    cls: type | None = None,
) -> dict:
    """What the program does, in Python."""
    model = Model(case["params"])
    params = dict(model.named_parameters())
    groups = [
        {**group, "params": [(n, params[n]) if named else params[n] for n in group["names"]]}
        for group in case["groups"]
    ]
    for group in groups:
        del group["names"]
    optimizer = (cls or (WRAPPED | CLASSES)[case["optimizer"]])(groups)
    if checkpoint is not None:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    optimizer.train()
    for step in case["steps"]:
        optimizer.zero_grad()
        for name, grad in step["grads"].items():
            params[name].grad = grad.clone()
        for group in optimizer.param_groups:
            group["lr"] *= step["lr"]
            group |= step["change"]
        optimizer.step()
        if step["eval"]:
            optimizer.eval()
            optimizer.train()
    if not case["train_mode"]:
        optimizer.eval()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}


def in_cpp(program: Path, case: dict, tmp_path: Path, checkpoint: dict | None = None) -> dict:
    files = [tmp_path / "case.pt", tmp_path / "out.pt"]
    torch.save(case, files[0])
    if checkpoint is not None:
        files.append(tmp_path / "checkpoint.pt")
        torch.save(checkpoint, files[-1])
    done = subprocess.run([program, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(files[1], weights_only=True)


def by_name(optimizer: dict) -> tuple[dict, list[dict]]:
    """State under the names of parameters, and the groups without what only Python has."""
    names = [name for names in NAMES for name in names]
    state = {name if isinstance(name, str) else names[name]: own for name, own in optimizer["state"].items()}
    dropped = ("params", "param_names", "foreach", "differentiable")
    of_rmsprop = ("capturable", "maximize")
    return state, [
        {k: v for k, v in group.items() if k not in dropped and not ("sf_k" in group and k in of_rmsprop)}
        for group in optimizer["param_groups"]
    ]


def assert_identical(one: dict, other: dict) -> None:
    assert one["model"].keys() == other["model"].keys()
    for name, p in one["model"].items():
        assert p.dtype == other["model"][name].dtype
        assert torch.equal(p, other["model"][name]), name
    (state, groups), (other_state, other_groups) = by_name(one["optimizer"]), by_name(other["optimizer"])
    assert state.keys() == other_state.keys()
    for name, own in state.items():
        assert own.keys() == other_state[name].keys(), name
        for key, value in own.items():
            if isinstance(value, Tensor):
                assert value.dtype == other_state[name][key].dtype
                assert torch.equal(value, other_state[name][key]), (name, key)
            else:
                assert value == other_state[name][key], (name, key)
    assert groups == other_groups
    (ours, print_), (other_ours, other_print) = (
        (entry, entry.pop("fingerprint"))
        for entry in ({**saved["optimizer"]["schedulefree_cpp"]} for saved in (one, other))
    )
    assert ours == other_ours  # of a wrapper empty
    assert print_["params"] == other_print["params"]
    assert torch.equal(print_["y"], other_print["y"])
    assert torch.equal(print_["x"], other_print["x"])


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("name", [*CLASSES, *WRAPPED])
def test_two_hundred_steps_are_the_same_bits(trajectory, tmp_path, name, train_mode):
    case = {**make_case(name), "train_mode": train_mode}
    one, other = in_python(case), in_cpp(trajectory, case, tmp_path)
    assert_identical(one, other)


@pytest.mark.parametrize("name", CLASSES)
def test_clipped_steps_are_the_same_bits(trajectory, tmp_path, name):
    case = make_case(name)
    case["groups"][0]["max_grad_norm"] = 3.0
    one = in_python(case)
    assert one["optimizer"]["param_groups"][0]["max_grad_norm"] == 3.0
    plain = in_python(make_case(name))
    assert not torch.equal(one["model"]["a"], plain["model"]["a"])
    assert torch.equal(one["model"]["c"], plain["model"]["c"])  # of the group that does not clip
    assert_identical(one, in_cpp(trajectory, case, tmp_path))


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("name", [*CLASSES, *WRAPPED])
def test_training_goes_to_cpp_and_comes_back(trajectory, tmp_path, name, train_mode, named):
    case = make_case(name, seed=1)
    alone = in_python(case)
    parts = [
        {**case, "steps": case["steps"][begin:end], "train_mode": mode}
        for begin, end, mode in ((0, 63, train_mode), (63, 83, train_mode), (83, STEPS, True))
    ]
    there = in_python(parts[0], named=named)
    back = in_cpp(trajectory, parts[1], tmp_path, there)
    group = back["optimizer"]["param_groups"][0]
    if name in WRAPPED:
        mode, y_beta = group["sf_train_mode"], group["sf_momentum_of_y"]
    else:
        mode, y_beta = group["train_mode"], back["optimizer"]["schedulefree_cpp"]["y_beta"][0]
    assert mode is train_mode
    assert y_beta == 0.8  # of the step that "b" has rested in
    assert_identical(alone, in_python(parts[2], back, named=named))


def test_state_finds_its_parameter_by_name(trajectory, tmp_path):
    case = make_case("AdamW", seed=2)
    reversed_groups = [{**group, "names": group["names"][::-1]} for group in case["groups"]]
    parts = [
        {**case, "steps": case["steps"][:63]},
        {**case, "steps": case["steps"][63:131], "groups": reversed_groups},
        {**case, "steps": case["steps"][131:]},
    ]
    there = in_python(parts[0], named=True)
    wrong = {**there, "model": in_python({**parts[0], "train_mode": False})["model"]}
    with pytest.raises(AssertionError, match="the parameters are those of eval mode"):
        in_cpp(trajectory, parts[1], tmp_path, wrong)
    back = in_cpp(trajectory, parts[1], tmp_path, there)
    assert back["optimizer"]["param_groups"][0]["params"] == NAMES[0][::-1]
    assert_identical(in_python(case), in_python(parts[2], back, named=True))


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("train_mode", [True, False])
def test_a_checkpoint_of_upstream_goes_on_the_same_in_both(trajectory, tmp_path, name, train_mode):
    case = make_case(name, seed=3)
    for group in case["groups"]:
        for key in ("decay_at", "maximize", "inner_momentum", "decoupling_c", "averaging_weight"):
            group.pop(key, None)
    parts = [{**case, "steps": case["steps"][begin:end]} for begin, end in ((0, 40), (40, 80))]
    parts[0]["train_mode"] = train_mode
    upstream = getattr(schedulefree, f"{name}ScheduleFree")
    there = in_python(parts[0], cls=upstream)
    assert "y_lo" not in there["optimizer"]["state"][2]
    assert_identical(in_python(parts[1], there), in_cpp(trajectory, parts[1], tmp_path, there))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_repeated_and_foreign_names_go_by_position(trajectory, tmp_path, prefix):
    case = make_case("AdamW", seed=4)
    parts = [{**case, "steps": case["steps"][:63]}, {**case, "steps": case["steps"][63:]}]
    there = in_python(parts[0], named=True)
    for group in there["optimizer"]["param_groups"]:
        names = [prefix + name for name in group["param_names"]]
        group["param_names"] = names if prefix else [names[0]] * len(names)
    assert_identical(in_python(case), in_cpp(trajectory, parts[1], tmp_path, there))


def test_repeated_names_go_by_position_in_python():
    models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
    optimizers = []
    for _ in range(2):
        named = [named for model in models for named in model.named_parameters()]
        optimizers.append(schedulefree_cpp.AdamWScheduleFree(named))
    optimizers[0].train()
    for model in models:
        model(torch.ones(2)).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for p in optimizers[0].state:
        assert torch.equal(optimizers[0].state[p]["z"], optimizers[1].state[p]["z"])


def test_names_that_are_numbers_are_no_positions():
    params = torch.nn.ParameterList([torch.ones(2), torch.zeros(3)])
    saved = schedulefree_cpp.SGDScheduleFree(params.parameters(), lr=0.25).state_dict()
    named = schedulefree_cpp.SGDScheduleFree(params.named_parameters())
    named.load_state_dict(saved)
    assert named.param_groups[0]["lr"] == 0.25


def test_names_that_do_not_fit_are_refused():
    case = make_case("SGD")
    saved = in_python({**case, "steps": case["steps"][:1]}, named=True)["optimizer"]
    strings = saved["param_groups"][0]
    strings["params"] = strings.pop("param_names")[:-1] + ["other"]
    with pytest.raises(ValueError, match=r"parameter group 0 .*'other'.*'bf16'"):
        in_python(case, {"model": Model(case["params"]).state_dict(), "optimizer": saved}, named=True)


def test_entries_of_others_are_passed_on(trajectory, tmp_path):
    case = make_case("AdamW")
    case["steps"] = case["steps"][:2]
    there = in_python(case)
    for i, group in enumerate(there["optimizer"]["param_groups"]):
        group |= {"initial_lr": 0.5, "name": f"group {i}", "none": None}
    back = in_cpp(trajectory, case, tmp_path, there)["optimizer"]["param_groups"]
    for i, group in enumerate(back):
        assert (group["initial_lr"], group["name"], group["none"]) == (0.5, f"group {i}", None)
        assert group["foreach"] is True


def cyclic() -> list:
    values: list = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["optimizer"]["param_groups"].pop(), "1 parameter groups, expected 2"),
        (lambda c: c["optimizer"]["param_groups"][1]["params"].pop(), "2 parameters with 2 names, expected 3"),
        (lambda c: c["optimizer"]["param_groups"][1].pop("betas"), "it lacks betas, so it is not of AdamW"),
        (lambda c: c["optimizer"]["param_groups"][0].update(lr=-1.0), "Invalid lr in parameter group 0.*: -1"),
        (lambda c: c["optimizer"]["param_groups"][0].update(eps="x"), "Invalid eps.*String.*expected a number"),
        (lambda c: c["optimizer"]["state"][1].pop("exp_avg_sq"), "lacks exp_avg_sq"),
        (lambda c: c["optimizer"]["state"][1].update(z=torch.ones(3)), r"shape \[3\], expected \[2, 5, 3\]"),
        (lambda c: c["optimizer"]["state"][1].update(z=1.0), "Invalid z of 1.*expected a tensor"),
        (lambda c: c["model"].pop("bf16"), 'the model lacks "bf16"'),
        (lambda c: c["model"].update(bf16=torch.ones(2)), r'"bf16" of the model has shape \[2\], expected \[33\]'),
        (lambda c: c["model"].update(more=torch.ones(2)), 'the model has "more", which this one has not'),
        (lambda c: c.update(optimizer=3), 'expected a dict under "optimizer"'),
        (lambda c: c["model"].update(bf16=torch.ones(33).to_sparse()), "cannot be read"),
        (lambda c: c["optimizer"]["param_groups"][0].update(f=Path("x")), "cannot be read: it holds pathlib"),
        (lambda c: c["optimizer"]["param_groups"][0].update(f=torch.float32), "it holds a Python object"),
        (lambda c: c["optimizer"]["param_groups"][0].update(f=cyclic()), "nested too deeply"),
        (lambda c: c["optimizer"]["param_groups"][1].update(params=["c", "f64", "x"]), 'there is "x"'),
        (lambda c: c["optimizer"]["param_groups"][1].update(params=["c", "f64", "c"]), 'there is "c"'),
        (lambda c: c["optimizer"]["param_groups"][1].update(params=[3, 4, None]), "an integer or a name"),
        (lambda c: c.update(model_state_dict=c.pop("model")), 'expected a dict under "model"'),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_explained(trajectory, tmp_path, change, message):
    case = make_case("AdamW")
    case["steps"] = case["steps"][:2]
    checkpoint = in_python(case)
    change(checkpoint)
    with pytest.raises(AssertionError, match=message):
        in_cpp(trajectory, case, tmp_path, checkpoint)


def test_files_of_other_formats_are_explained(trajectory, tmp_path):
    case = make_case("SGD")
    file = tmp_path / "case.pt"
    torch.save(case, file, pickle_protocol=4)
    done = subprocess.run([trajectory, file, tmp_path / "out.pt"], capture_output=True, text=True)
    assert "it was pickled by another protocol than 2" in done.stderr
    torch.save(case, file, _use_new_zipfile_serialization=False)
    done = subprocess.run([trajectory, file, tmp_path / "out.pt"], capture_output=True, text=True)
    assert "cannot be read as a file of torch.save (in its zip format, which is the default)" in done.stderr


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip at all", b"x" * 1000])
def test_another_kind_of_file_is_explained(trajectory, tmp_path, content):
    case = tmp_path / "case.pt"
    case.write_bytes(content)
    done = subprocess.run([trajectory, case, tmp_path / "out.pt"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "case.pt cannot be read as a file of torch.save" in done.stderr


def test_a_model_at_x_with_an_optimizer_at_y_is_refused(trajectory, tmp_path):
    case = make_case("AdamW")
    case["steps"] = case["steps"][:30]
    checkpoint = in_python(case)
    checkpoint["model"] = in_python({**case, "train_mode": False})["model"]
    with pytest.raises(AssertionError, match=r"the parameters are those of eval mode .* says train mode"):
        in_cpp(trajectory, case, tmp_path, checkpoint)
