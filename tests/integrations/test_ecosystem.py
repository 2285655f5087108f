"""What people combine with an optimizer (docs/methods.md), on tiny models.

Each method is written here in the few lines that matter to the optimizer; recipes are run as the page has them.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import re
import weakref
from collections import deque
from pathlib import Path

import cases
import pytest
import schedulefree_cpp
import torch
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn

NAMES = ["AdamWScheduleFree", "SGDScheduleFree", "ScheduleFreeWrapper"]
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)
DOCS = Path(__file__).parents[2] / "docs"


def documented(text, **names):
    """Runs the one block of the pages that has this text. Returns its names.

    With the names of a wrapper's entries, as the page tells.
    """
    pages = "".join(page.read_text() for page in DOCS.rglob("*.md"))
    blocks = [block for block in re.findall(r"```python\n(.*?)```", pages, re.DOTALL) if text in block]
    assert len(blocks) == 1
    code = blocks[0]
    if isinstance(names.get("optimizer"), schedulefree_cpp.ScheduleFreeWrapper):
        code = code.replace('"z"', '"sf_z"').replace('"y_lo"', '"sf_y_lo"')
    exec(code, names)
    return names


def test_the_page_names_tests_that_exist():
    named = re.findall(r"`(test_\w+)`", (DOCS / "methods.md").read_text())
    assert len(named) > 10
    assert set(named) <= globals().keys()


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1))


def start(name="AdamWScheduleFree", model=None, steps=0, **kwargs):
    model = model or network()
    optimizer = cases.make(name, model.parameters(), lr=0.02, **kwargs)
    train(model, optimizer, steps)
    return model, optimizer


def backward(model, optimizer):
    optimizer.zero_grad()
    loss = (model(X) - Y).square().mean()
    loss.backward()
    return loss.item()


def train(model, optimizer, steps, after=lambda: None):
    for _ in range(steps):
        backward(model, optimizer)
        optimizer.step()
        after()


def assert_switches_exactly(optimizer):
    y = cases.copies(cases.params_of(optimizer))
    optimizer.eval(), optimizer.train()
    cases.assert_same(cases.params_of(optimizer), y)


def plain_run(name, steps):
    return start(name, steps=steps)[0].parameters()


# ---- learning-rate finders -----------------------------------------------------------------------------


def find_lr(model, optimizer, lrs):
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.train()
    losses = []
    for lr in lrs:
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses.append(backward(model, optimizer))
        optimizer.step()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    return losses


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("name", NAMES)
def test_a_learning_rate_finder_leaves_no_trace(name, steps, mode):
    model, optimizer = start(name, steps=steps)
    getattr(optimizer, mode)()
    losses = find_lr(model, optimizer, [10**e for e in torch.linspace(-4, 0, 20).tolist()])
    assert min(losses) < losses[0]
    optimizer.train()
    train(model, optimizer, 5)
    cases.assert_same(model.parameters(), plain_run(name, steps + 5))


# ---- Lookahead -----------------------------------------------------------------------------------------


class _Lookahead(torch.optim.Optimizer):
    """Every third step goes half of the way back to where the three began."""

    def __init__(self, base):
        super().__init__(base.param_groups, base.defaults)
        self.base, self.count = base, 0

    def step(self, closure=None):
        for p in cases.params_of(self):
            self.state[p].setdefault("slow", p.detach().clone())
        self.base.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            with torch.no_grad():
                for p in cases.params_of(self):
                    p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


def test_lookahead_within_the_wrapper_steps_z():
    params, alone = cases.parameters([(50, 3)]), cases.parameters([(50, 3)])
    base = _Lookahead(torch.optim.SGD(alone, lr=0.1, momentum=0.5))
    inner = _Lookahead(torch.optim.SGD(params, lr=0.1, momentum=0.5))
    optimizer = schedulefree_cpp.ScheduleFreeWrapper(inner)
    optimizer.train()
    zs = []
    for seed in range(10):
        cases.drive(optimizer, seed), cases.drive(base, seed)
        cases.assert_same([optimizer.state[params[0]]["sf_z"]], alone)
        zs.append(alone[0].detach().clone())
    optimizer.eval()
    torch.testing.assert_close(params[0].detach(), torch.stack(zs).mean(0))


def iterates(optimizer):
    """Copies of x and z."""
    with optimizer.averaged():
        return [
            [p.detach().clone(), cases.entry(optimizer.state[p], "z").clone()]
            for p in cases.params_of(optimizer)
        ]


@pytest.mark.parametrize("name", NAMES)
def test_lookahead_around_pulls_x_and_z_together(name):
    model, optimizer = start(name, steps=5)
    slow = iterates(optimizer)
    first = backward(model, optimizer)
    for _ in range(20):
        train(model, optimizer, 5)
        before, fast = copy.deepcopy(slow), iterates(optimizer)
        by_parameter = dict(zip(model.parameters(), slow, strict=True))
        documented("slow_z.lerp_", optimizer=optimizer, slow=by_parameter, alpha=0.5, torch=torch)
        for now, s, f in zip(iterates(optimizer), before, fast, strict=True):
            torch.testing.assert_close(now, [s[0].lerp(f[0], 0.5), s[1].lerp(f[1], 0.5)])
        assert_switches_exactly(optimizer)
    assert backward(model, optimizer) < first / 2


def test_lookahead_that_pulls_y_alone_misplaces_the_average():
    (p,) = params = cases.parameters([(50, 3)], torch.float64)
    optimizer = cases.make("AdamWScheduleFree", params)
    cases.run(optimizer, 5)
    y_slow, (x_slow, z_slow) = p.detach().clone(), iterates(optimizer)[0]
    cases.run(optimizer, 5, start=5)
    x_fast, z_fast = iterates(optimizer)[0]
    with torch.no_grad():
        p.copy_(y_slow.lerp(p, 0.5))
    error = 0.5 * (1 - 0.9) / 0.9 * (z_slow - z_fast)
    assert error.abs().max() > 1e-3
    torch.testing.assert_close(iterates(optimizer)[0][0], x_slow.lerp(x_fast, 0.5) + error)


# ---- sharpness-aware minimisation ----------------------------------------------------------------------


class _SAM(torch.optim.Optimizer):
    """The gradient is that of a point uphill; the base optimizer steps from where the parameters were."""

    def __init__(self, params, base, rho=0.05, **kwargs):
        super().__init__(params, {"rho": rho})
        self.base = base(self.param_groups, **kwargs)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def climb(self):
        params = cases.params_of(self)
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.origin = [p.clone() for p in params]
        for p in params:
            p.add_(p.grad, alpha=self.param_groups[0]["rho"] / norm.item())

    @torch.no_grad()
    def step(self, closure=None):
        for p, origin in zip(cases.params_of(self), self.origin, strict=True):
            p.copy_(origin)
        self.base.step()


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_sam_climbs_from_y_and_steps_from_y(name):
    model, other = network(), network()
    sam = _SAM(model.parameters(), getattr(schedulefree_cpp, name), lr=0.02)
    sam.base.train()
    expected = cases.make(name, other.parameters(), lr=0.02)
    for _ in range(10):
        backward(model, sam)
        sam.climb()
        backward(model, sam)
        sam.step()
        assert_switches_exactly(sam.base)

        backward(other, expected)
        params = dict(other.named_parameters())
        norm = torch.stack([p.grad.norm() for p in params.values()]).norm().item()
        uphill = {
            key: p.detach().add(p.grad, alpha=0.05 / norm).requires_grad_() for key, p in params.items()
        }
        (torch.func.functional_call(other, uphill, X) - Y).square().mean().backward()
        for key, p in params.items():
            p.grad = uphill[key].grad
        expected.step()
        cases.assert_same(model.parameters(), other.parameters())


# ---- gradient filters ----------------------------------------------------------------------------------


class _Grokfast:
    """Adds the running average of gradients, amplified."""

    def __init__(self):
        self.average = {}

    def __call__(self, params):
        for i, p in enumerate(params):
            self.average[i] = self.average.get(i, p.grad).lerp(p.grad, 0.1)
            p.grad += 2.0 * self.average[i]


class _OrthoGrad:
    """Leaves of a gradient what is orthogonal to its parameter, at the length it had."""

    def __call__(self, params):
        for p in [p for p in params if p.numel() > 1]:
            w, g = p.detach().flatten(), p.grad.flatten()
            rest = g - (w @ g) / (w @ w + 1e-30) * w
            p.grad.copy_((rest * g.norm() / (rest.norm() + 1e-30)).view_as(p))


@pytest.mark.parametrize("make_filter", [_Grokfast, _OrthoGrad])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_filters_change_gradients_before_a_step(name, make_filter):
    model, other = network().double(), network().double()
    optimizer = cases.make(name, model.parameters(), lr=0.02, max_grad_norm=torch.inf)
    reference = cases.make(name + "Reference", other.parameters(), lr=0.02)
    both = [(m, o, make_filter()) for m, o in ((model, optimizer), (other, reference))]
    for _ in range(10):
        for m, o, change in both:
            o.zero_grad()
            (m(X.double()) - Y).square().mean().backward()
            change(list(m.parameters()))
            filtered = [p.grad.clone() for p in m.parameters()]
            if make_filter is _OrthoGrad:
                assert all(abs((p * p.grad).sum()) < 1e-12 for p in m.parameters() if p.numel() > 1)
            o.step()
            if o is optimizer:
                cases.assert_same([p.grad for p in m.parameters()], filtered)
                norm = torch.cat([g.flatten() for g in filtered]).norm()
                torch.testing.assert_close(optimizer.grad_norm, norm)
    optimizer.eval(), reference.eval()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ---- EMA and SWA on top --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_swa_averages_x_within_averaged(name):
    model, optimizer = start(name)
    swa, xs, ys = AveragedModel(model), [], []

    def after():
        with optimizer.averaged():
            swa.update_parameters(model)
        xs.append([x for x, _ in iterates(optimizer)])
        ys.append(cases.copies(model.parameters()))

    train(model, optimizer, 10, after)
    cases.assert_same(model.parameters(), plain_run(name, 10))
    for average, *values in zip(swa.module.parameters(), *xs, strict=True):
        torch.testing.assert_close(average.detach(), torch.stack(values).mean(0))
    mean_y = torch.stack([y[0].detach() for y in ys]).mean(0)
    assert (next(swa.module.parameters()) - mean_y).abs().max() > 1e-3


def test_update_bn_gathers_statistics_at_x_and_changes_no_training():
    def batch_norm():
        return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, 1))

    torch.manual_seed(0)
    model = batch_norm()
    plain, expected = start(model=copy.deepcopy(model))
    model, optimizer = start(model=model)
    for _ in range(3):
        train(model, optimizer, 4)
        x = optimizer.averaged_state_dict(model)
        optimizer.eval()
        update_bn([X], model)
        hidden = torch.nn.functional.linear(X, x["0.weight"], x["0.bias"])
        torch.testing.assert_close(model[1].running_mean, hidden.mean(0))
        optimizer.train()
        train(plain, expected, 4)
        assert (plain[1].running_mean - model[1].running_mean).abs().max() > 1e-3
    cases.assert_same(model.parameters(), plain.parameters())


def test_latest_weights_are_averaged_from_copies_of_x():
    model, optimizer = start()
    latest, kept = deque(maxlen=3), []
    for _ in range(5):
        train(model, optimizer, 2)
        names = {"optimizer": optimizer, "model": model, "latest": latest, "torch": torch}
        average = documented("latest.append(optimizer", **names)["average"]
        kept.append([x for x, _ in iterates(optimizer)])
    for a, *xs in zip(average.values(), *kept[-3:], strict=True):
        torch.testing.assert_close(a, torch.stack(xs).mean(0))
    cases.assert_same(model.parameters(), plain_run("AdamWScheduleFree", 10))


class _EMA:
    """Averages some parameters, and lends the average to them."""

    def __init__(self, params):
        self.params = list(params)
        self.shadow = [p.detach().clone() for p in self.params]

    @torch.no_grad()
    def update(self):
        for s, p in zip(self.shadow, self.params, strict=True):
            s.lerp_(p, 0.3)

    @contextlib.contextmanager
    def average_parameters(self):
        with torch.no_grad():
            stored = [p.clone() for p in self.params]
            for s, p in zip(self.shadow, self.params, strict=True):
                p.copy_(s)
            yield
            for s, p in zip(stored, self.params, strict=True):
                p.copy_(s)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_an_ema_of_x_is_lent_in_either_mode(name, mode):
    model, optimizer = start(name)
    ema = _EMA(model.parameters())
    expected = [p.detach().clone() for p in model.parameters()]

    def after():
        with optimizer.averaged():
            ema.update()
        for e, (x, _) in zip(expected, iterates(optimizer), strict=True):
            e.lerp_(x, 0.3)
        getattr(optimizer, mode)()
        with ema.average_parameters():
            cases.assert_same(model.parameters(), expected)
        optimizer.train()

    train(model, optimizer, 10, after)
    cases.assert_same(model.parameters(), plain_run(name, 10))


# ---- pruning with masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_masks_of_prune_go_with_both_modes(name):
    model, optimizer = start(name, steps=5)
    layer = model[0]
    weight = layer.weight
    optimizer.eval()
    prune.l1_unstructured(layer, "weight", amount=0.5)  # the smallest of x
    assert layer.weight_orig is weight
    kept = layer.weight_mask.bool()
    assert kept.sum() == 12
    assert weight[~kept].abs().max() <= weight[kept].abs().min()
    optimizer.train()
    train(model, optimizer, 5, lambda: assert_switches_exactly(optimizer))
    optimizer.eval()
    torch.testing.assert_close(
        model[0](X), torch.nn.functional.linear(X, weight * layer.weight_mask, layer.bias)
    )

    documented("prune.remove(", optimizer=optimizer, layer=layer, prune=prune)
    assert layer.weight is weight
    assert not weight[~kept].any()
    assert_switches_exactly(optimizer)
    train(model, optimizer, 1)
    assert weight[~kept].any()  # without a mask they are trained


# ---- quantised models with adapters --------------------------------------------------------------------


class _Adapted(torch.nn.Module):
    """A frozen layer of integers beside a trained one of low rank."""

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        low = 0 if dtype == torch.uint8 else -128
        base = torch.randint(low, low + 256, (4, 4), generator=generator).to(dtype)
        self.base = torch.nn.Parameter(base, requires_grad=False)
        self.down = torch.nn.Parameter(torch.randn(2, 4, generator=generator))
        self.up = torch.nn.Parameter(torch.zeros(1, 2))

    def forward(self, x):
        return (x @ self.base.to(x).T).mean(1, keepdim=True) / 128 + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("name", NAMES)
def test_adapters_train_beside_frozen_integers_in_the_list(name, dtype):
    model, optimizer = start(name, _Adapted(dtype))
    alone = _Adapted(dtype)
    expected = cases.make(name, [alone.down, alone.up], lr=0.02)
    before = model.base.clone()
    first = backward(model, optimizer)
    for _ in range(5):
        train(model, optimizer, 5)
        train(alone, expected, 5)
        assert_switches_exactly(optimizer)
        cases.assert_same(model.parameters(), alone.parameters())
    assert backward(model, optimizer) < first
    assert torch.equal(model.base, before)
    assert model.base not in optimizer.state
    for mode in ("train", "eval"):
        getattr(optimizer, mode)()
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        optimizer.train()
        other = _Adapted(dtype)
        resumed = cases.make(name, other.parameters())
        other.load_state_dict(saved[0]), resumed.load_state_dict(saved[1])
        resumed.train()
        train(model, optimizer, 2), train(other, resumed, 2)
        cases.assert_same(model.parameters(), other.parameters())


# ---- programs made of a model --------------------------------------------------------------------------


def exported(model):
    return torch.export.export(model, (X,))


def traced(model):
    return torch.jit.trace(model, X)


def frozen(model):
    return torch.jit.freeze(traced(model.eval()))


def through_a_file(program):
    file = io.BytesIO()
    module = torch.export if isinstance(program, torch.export.ExportedProgram) else torch.jit
    module.save(program, file)
    file.seek(0)
    return module.load(file)


def output(program):
    return getattr(program, "module", lambda: program)()(X).detach()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("make", [exported, traced, frozen])
def test_a_program_follows_the_modes_and_its_file_does_not(make):
    model, optimizer = start(steps=5)
    y = model(X).detach()
    optimizer.eval()
    x = model(X).detach()
    assert (x - y).abs().max() > 1e-3
    program = make(model)
    loaded = through_a_file(program)
    assert torch.equal(output(program), x)
    optimizer.train()
    assert torch.equal(output(program), y)
    train(model, optimizer, 1)
    assert torch.equal(output(program), model(X))
    with optimizer.averaged():
        assert torch.equal(output(program), model(X))
    assert torch.equal(output(loaded), x)


# ---- tied weights --------------------------------------------------------------------------------------


class _Tied(torch.nn.Module):
    """Its last layer has the weight of the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(4, 6)
        self.head = torch.nn.Linear(6, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x.argmax(1)).tanh()).mean(1, keepdim=True)


@pytest.mark.parametrize("name", NAMES)
def test_tied_weights_are_one_parameter(name):
    model, optimizer = start(name, _Tied(), steps=5)
    assert optimizer.param_groups[0]["params"] == [model.embedding.weight]
    assert list(optimizer.state) == [model.embedding.weight]
    assert cases.entry(optimizer.param_groups[0], "k") == 5
    assert_switches_exactly(optimizer)
    copied = optimizer.averaged_state_dict(model)
    assert copied["head.weight"].data_ptr() == copied["embedding.weight"].data_ptr()
    optimizer.eval()
    cases.assert_same(copied.values(), model.state_dict().values())


# ---- two optimizers that alternate ---------------------------------------------------------------------


def adversaries(name, evaluate):
    """A generator, and a discriminator that takes two steps to its one."""
    torch.manual_seed(0)
    generator, discriminator = torch.nn.Linear(2, 4), network()
    optimizers = [cases.make(name, m.parameters(), lr=0.02) for m in (generator, discriminator)]
    for i in range(30):
        which = i % 3 == 2
        optimizer = optimizers[not which]
        optimizer.zero_grad()  # the other's step has left gradients
        fake = generator(X[:, :2])
        if which:
            loss = -discriminator(fake).mean()
        else:
            loss = (discriminator(fake.detach()) - discriminator(X)).tanh().mean()
        loss.backward()
        optimizer.step()
        if evaluate:
            with optimizers[0].averaged():  # samples of the generator's average
                x = cases.copies(generator.parameters())
            before = cases.copies(discriminator.parameters())
            optimizers[0].eval()
            cases.assert_same(generator.parameters(), x)
            cases.assert_same(discriminator.parameters(), before)
            optimizers[1].eval()
            for o in optimizers:
                o.train()
    return generator, discriminator, optimizers


@pytest.mark.parametrize("name", NAMES)
def test_two_optimizers_alternate_and_switch_each_for_itself(name):
    generator, discriminator, optimizers = adversaries(name, evaluate=True)
    others = adversaries(name, evaluate=False)
    cases.assert_same(generator.parameters(), others[0].parameters())
    cases.assert_same(discriminator.parameters(), others[1].parameters())
    assert [cases.entry(o.param_groups[0], "k") for o in optimizers] == [10, 20]


# ---- parameters that grow and shrink -------------------------------------------------------------------


replace = documented("def replace", torch=torch)["replace"]


def keep(optimizer, p, kept):
    return documented("rows[kept]", replace=replace, optimizer=optimizer, p=p, kept=kept)["p"]


def grow(optimizer, p, parents, offsets):
    names = {"replace": replace, "optimizer": optimizer, "p": p, "parents": parents, "offsets": offsets}
    return documented("rows[parents]", torch=torch, **names)["p"]


ROWS = 40
GROWING = [*cases.NATIVE, "ScheduleFreeWrapper"]


def drive_rows(optimizer, p, rows, seed):
    """A step with gradients that are those of the rows, however many there are."""
    p.grad = torch.stack([_gradient(row, seed) for row in rows]).to(p)
    optimizer.step()


def _gradient(row, seed):
    return torch.randn(3, generator=torch.Generator().manual_seed(1000 * seed + row))


def splats(name, dtype, rows):
    p = cases.parameters([(ROWS, 3)], dtype)[0].detach()[rows].clone().requires_grad_()
    return p, cases.make(name, [p], lr=0.02)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GROWING)
def test_rows_that_stay_train_as_if_the_others_had_never_been(name, dtype, mode):
    p, optimizer = splats(name, dtype, range(ROWS))
    rows = [row for row in range(ROWS) if row % 3]
    q, without = splats(name, dtype, rows)
    for seed in range(6):
        drive_rows(optimizer, p, range(ROWS), seed), drive_rows(without, q, rows, seed)
    getattr(optimizer, mode)()
    p = keep(optimizer, p, torch.arange(ROWS) % 3 != 0)
    optimizer.train()
    for seed in range(6, 12):
        cases.assert_same([p, *cases.states_of(optimizer)], [q, *cases.states_of(without)])
        drive_rows(optimizer, p, rows, seed), drive_rows(without, q, rows, seed)
        assert_switches_exactly(optimizer)
    optimizer.eval(), without.eval()
    cases.assert_same([p], [q])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", GROWING)
def test_new_rows_begin_with_one_value_and_leave_the_old_ones_alone(name, dtype, mode):
    p, optimizer = splats(name, dtype, range(ROWS))
    q, without = splats(name, dtype, range(ROWS))
    for seed in range(6):
        drive_rows(optimizer, p, range(ROWS), seed), drive_rows(without, q, range(ROWS), seed)
    parents = torch.tensor([0, 7, 7])
    getattr(optimizer, mode)()
    p = grow(optimizer, p, parents, 0.01 * torch.arange(9.0).view(3, 3).to(dtype))
    new = p.detach()[ROWS:].clone()
    optimizer.train()
    cases.assert_same([p[:ROWS], p[ROWS:]], [q, new])
    optimizer.eval()
    cases.assert_same([p[ROWS:]], [new])
    if dtype != torch.float32:
        assert not cases.entry(optimizer.state[p], "y_lo")[ROWS:].any()
    optimizer.train()
    cases.assert_same([p[:ROWS], p[ROWS:]], [q, new])
    for key, value in optimizer.state[p].items():
        if "sq" in key:
            assert torch.equal(value[ROWS:], value[parents])
    rows = range(ROWS + 3)
    for seed in range(6, 12):
        drive_rows(optimizer, p, rows, seed), drive_rows(without, q, range(ROWS), seed)
        cases.assert_same([p[:ROWS]], [q])
        assert_switches_exactly(optimizer)
    # A checkpoint has the new rows.
    resumed = cases.make(name, [torch.nn.Parameter(p.detach().clone())], lr=0.02)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    drive_rows(optimizer, p, rows, 12), drive_rows(resumed, cases.params_of(resumed)[0], rows, 12)
    cases.assert_same([p], cases.params_of(resumed))


def test_a_new_row_whose_z_is_zero_has_a_wrong_average():
    p, optimizer = splats("AdamWScheduleFree", torch.float32, range(ROWS))
    drive_rows(optimizer, p, range(ROWS), 0)
    p = grow(optimizer, p, torch.tensor([0, 1]), torch.zeros(2, 3))
    optimizer.state[p]["z"][ROWS:] = 0
    y = p.detach()[ROWS:].clone()
    optimizer.eval()
    torch.testing.assert_close(p.detach()[ROWS:], y / 0.9)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("name", GROWING)
def test_what_a_replaced_parameter_held_is_freed(name, in_place):
    p, optimizer = splats(name, torch.float32, range(ROWS))
    drive_rows(optimizer, p, range(ROWS), 0)
    optimizer.eval(), optimizer.train()
    old = [weakref.ref(t) for t in (p, p.grad, cases.entry(optimizer.state[p], "z"))]
    if not in_place:
        optimizer.param_groups[0]["params"] = [p]  # the optimizer knows another list until the next step
    p = keep(optimizer, p, torch.arange(ROWS) < 5)
    if not in_place:
        drive_rows(optimizer, p, range(5), 1)
    gc.collect()
    assert [reference() for reference in old] == [None] * 3


def test_a_replaced_parameter_is_freed_after_steps_within_backward():
    p, optimizer = splats("AdamWScheduleFree", torch.float32, range(ROWS))
    with optimizer.step_in_backward():
        p.square().sum().backward()
        optimizer.step()
    old = weakref.ref(p)
    p = keep(optimizer, p, torch.arange(ROWS) < 5)
    gc.collect()
    assert old() is None
