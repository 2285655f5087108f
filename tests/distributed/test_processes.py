"""Threads, forks, interrupts, and many processes at once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import cases
import pytest
from schedulefree_cpp import ops

LONG = os.environ.get("SCHEDULEFREE_LONG_TESTS") == "1"
SHAPES = [(40, 130), (7,), ()]


# ---- threads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "ScheduleFreeWrapper"])
def test_optimizers_in_threads_do_not_meet(name):
    def train(seed: int, results: dict[int, Any]) -> None:
        params = cases.parameters(SHAPES, seed=seed)
        optimizer = cases.make(name, params)
        for step in range(20):
            cases.set_gradients(params, 100 * seed + step)
            optimizer.step()
            optimizer.eval(), optimizer.train()
        results[seed] = params

    alone: dict[int, Any] = {}
    together: dict[int, Any] = {}
    for seed in range(4):
        train(seed, alone)
    threads = [threading.Thread(target=train, args=(seed, together)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        cases.assert_same(alone[seed], together[seed])


# ---- forks ---------------------------------------------------------------------------------------------

FORK = """
import os, sys
import torch
import schedulefree_cpp

torch.set_num_threads({threads})

def train():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn({size}))
    optimizer = schedulefree_cpp.AdamWScheduleFree([p])
    optimizer.train()
    for _ in range(3):
        p.grad = p.detach() * 2
        optimizer.step()
    optimizer.eval()
    return p.detach()

before = train() if {after_a_step} else None
child = os.fork()
if child == 0:
    own = train()
    os._exit(0 if before is None or torch.equal(own, before) else 1)
print(os.waitpid(child, 0)[1])
"""


@pytest.mark.parametrize(
    ("threads", "after_a_step", "size"), [(2, False, 500_000), (1, True, 500_000), (2, True, 500)], ids=str
)
def test_a_forked_process_trains(threads, after_a_step, size):
    # With several threads a step of much work starts torch's thread pool, which no fork survives.
    code = FORK.format(threads=threads, after_a_step=after_a_step, size=size)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def test_many_processes_import_at_once():
    count = 12 if LONG else 3
    code = "import schedulefree_cpp; print(schedulefree_cpp._C.cpu_isa())"
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    outs = {process.communicate(timeout=300)[0] for process in started}
    assert all(process.returncode == 0 for process in started)
    assert len(outs) == 1


# ---- interrupts ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def interruptible():
    """Python's own handler, where the process was started with SIGINT ignored, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(function: Any) -> Any:
    """The function, during which SIGINT comes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        signal.raise_signal(signal.SIGINT)
        return result

    return call


def expected_after(name: str, steps: int) -> Any:
    twin = cases.make(name, [{"params": [p]} for p in cases.parameters(SHAPES)])
    cases.run(twin, steps)
    return twin


@pytest.mark.parametrize("name", cases.NATIVE + cases.PLUS + cases.CLOSURE)
def test_an_interrupt_within_a_step_comes_after_it(name, monkeypatch):
    optimizer = expected_after(name, 3)
    for step in ("sgd_step_", "adamw_step_"):
        monkeypatch.setattr(ops, step, interrupted(getattr(ops, step)))
    with pytest.raises(KeyboardInterrupt):
        cases.run(optimizer, 1, start=3)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    twin = expected_after(name, 4)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    cases.assert_same(cases.states_of(optimizer), cases.states_of(twin))
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == [4] * len(SHAPES)


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", cases.NATIVE + cases.PLUS + ["ScheduleFreeWrapper"])
def test_an_interrupt_within_eval_leaves_every_group_what_it_says_it_is(name, mode, monkeypatch):
    optimizer, twin = expected_after(name, 3), expected_after(name, 3)
    if mode == "train":
        optimizer.eval()
    for swap in ("y_to_x_", "x_to_y_"):
        monkeypatch.setattr(ops, swap, interrupted(getattr(ops, swap)))
    with pytest.raises(KeyboardInterrupt):
        getattr(optimizer, mode)()
    monkeypatch.undo()
    optimizer.train()
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    optimizer.eval(), twin.eval()
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))


@pytest.mark.parametrize("name", cases.NATIVE)
def test_an_interrupt_within_step_parameter_comes_after_it(name, monkeypatch):
    optimizer = expected_after(name, 3)
    params = cases.params_of(optimizer)
    cases.set_gradients(params, 3)
    for step in ("sgd_step_", "adamw_step_"):
        monkeypatch.setattr(ops, step, interrupted(getattr(ops, step)))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step_parameter(params[0])
    monkeypatch.undo()
    optimizer.step()
    twin = expected_after(name, 4)
    cases.assert_same(params, cases.params_of(twin))
    cases.assert_same(cases.states_of(optimizer), cases.states_of(twin))


def fails() -> None:
    raise ValueError("the base optimizer refuses")


# With a closure, SIGINT may end the base optimizer's step, whose own state then stays as it is.
@pytest.mark.parametrize(
    ("where", "closure", "base", "steps"),
    [
        ("base", None, None, 4),
        ("before_base_step_", None, None, 4),
        ("before_base_step_", lambda: 1.0, None, 3),  # on the way to z, which is undone
        ("after_base_step_", lambda: 1.0, None, 4),  # on the way to the next y
        ("after_base_step_", None, fails, 3),  # on the way back from z
        ("after_base_step_", lambda: 1.0, lambda _: fails(), 3),
    ],
)
def test_an_interrupt_within_a_wrappers_step_leaves_it_whole_or_undone(
    where, closure, base, steps, monkeypatch
):
    optimizer = expected_after("ScheduleFreeWrapper", 3)
    cases.set_gradients(cases.params_of(optimizer), 3)
    if base:
        monkeypatch.setattr(optimizer.base, "step", base)
    owner, name = (optimizer.base, "step") if where == "base" else (ops, where)
    monkeypatch.setattr(owner, name, interrupted(getattr(owner, name)))
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    monkeypatch.undo()
    twin = expected_after("ScheduleFreeWrapper", steps)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    cases.assert_same(cases.states_of(optimizer), cases.states_of(twin))
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == [steps] * len(SHAPES)


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "ScheduleFreeWrapper"])
def test_interrupts_at_random_moments_leave_a_run_that_goes_on(name, count):
    """Another thread sends SIGINT while this one steps and evaluates; afterwards the run is a twin's."""
    shapes = [(300, 700), (50,)]
    optimizer, twin = (cases.make(name, cases.parameters(shapes)) for _ in range(2))
    moments, stop = random.Random(0), threading.Event()
    within = [False]  # no Event, whose lock an interrupt may leave behind

    def send() -> None:
        for _ in range(count):
            time.sleep(moments.uniform(0, 0.004))
            if within[0]:
                os.kill(os.getpid(), signal.SIGINT)
        stop.set()

    sender = threading.Thread(target=send)
    came = steps = 0
    sender.start()
    while not stop.is_set():
        before = int(cases.entry(optimizer.param_groups[0], "k"))
        cases.set_gradients(cases.params_of(optimizer), before)
        try:
            within[0] = True
            optimizer.step()
            optimizer.eval()
            optimizer.train()
            within[0] = False
        except KeyboardInterrupt:
            within[0] = False
            came += 1
        try:
            time.sleep(0.0002)  # for what is still on its way
        except KeyboardInterrupt:
            came += 1
        optimizer.train()
        assert int(cases.entry(optimizer.param_groups[0], "k")) in (before, before + 1)
        if int(cases.entry(optimizer.param_groups[0], "k")) > before:
            cases.set_gradients(cases.params_of(twin), before)
            twin.step()
            steps += 1
        cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    sender.join()
    assert came > 0
    assert steps > 0


# ---- other signals -------------------------------------------------------------------------------------


class Stop(BaseException):
    """Raised by a handler."""


@pytest.fixture
def handled():
    """Sets Python's handlers of signals, and puts the earlier ones back."""
    before: dict[int, Any] = {}

    def handle(number: int, handler: Any) -> None:
        before.setdefault(number, signal.signal(number, handler))

    yield handle
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled(function: Any, *numbers: int) -> Any:
    """The function, during which signals come."""

    def call(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        for number in numbers:
            signal.raise_signal(number)
        return result

    return call


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGALRM])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_a_handler_that_saves_sees_the_mode_that_the_parameters_are_in(name, number, handled, monkeypatch):
    optimizer, twin = expected_after(name, 3), expected_after(name, 3)
    twin.eval()
    averages: list[Any] = []

    def save(*_: Any) -> None:
        with optimizer.averaged():
            averages.append(cases.copies(cases.params_of(optimizer)))

    handled(number, save)
    monkeypatch.setattr(ops, "y_to_x_", signalled(ops.y_to_x_, number))
    optimizer.eval()
    monkeypatch.undo()
    assert len(averages) >= 1
    for params in averages:
        cases.assert_same(params, cases.params_of(twin))


@pytest.mark.parametrize("name", cases.NATIVE)
def test_a_handler_that_raises_within_a_step_comes_after_it(name, handled, monkeypatch):
    optimizer = expected_after(name, 3)

    def stop(*_: Any) -> None:
        raise Stop

    handled(signal.SIGUSR1, stop)
    for step in ("sgd_step_", "adamw_step_"):
        monkeypatch.setattr(ops, step, signalled(getattr(ops, step), signal.SIGUSR1))
    with pytest.raises(Stop):
        cases.run(optimizer, 1, start=3)
    monkeypatch.undo()
    twin = expected_after(name, 4)
    cases.assert_same(cases.params_of(optimizer), cases.params_of(twin))
    assert [cases.entry(group, "k") for group in optimizer.param_groups] == [4] * len(SHAPES)


def test_every_signal_is_handled_once_and_in_order(handled, monkeypatch):
    """Also where asyncio counts what comes through the wakeup descriptor."""
    optimizer, came = expected_after("AdamWScheduleFree", 1), []
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        handled(number, lambda number, _: came.append(number))
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    before = signal.set_wakeup_fd(write)
    try:
        numbers = (signal.SIGUSR1, signal.SIGINT, signal.SIGUSR2)
        monkeypatch.setattr(ops, "y_to_x_", signalled(ops.y_to_x_, *numbers))
        optimizer.param_groups[:] = optimizer.param_groups[:1]
        optimizer.eval()
        assert came == [*numbers]
        assert [*os.read(read, 100)] == [*numbers]
    finally:
        signal.set_wakeup_fd(before)
        os.close(read), os.close(write)
