"""The optimizers and our callbacks in the real frameworks, on tiny models."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cases
import pytest
import torch
from schedulefree_cpp import AdamWScheduleFree
from test_ecosystem import _Tied, documented

pytestmark = [
    pytest.mark.frameworks,
    pytest.mark.filterwarnings("default"),  # the frameworks' own
]

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)

NAMES = ["AdamWScheduleFree", "ScheduleFreeWrapper"]


def x_of(optimizer, model):
    return optimizer.averaged_state_dict(model)


def assert_equal_dicts(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


def assert_is_x(optimizer, model):
    assert not cases.entry(optimizer.param_groups[0], "train_mode")
    assert_equal_dicts(model.state_dict(), x_of(optimizer, model))


def layer() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(4, 1)


def test_the_package_needs_no_framework():
    frameworks = {"lightning", "transformers", "timm", "accelerate"}
    program = (
        "import sys, schedulefree_cpp.integrations.timm\n"
        f"found = {frameworks} & set(sys.modules)\n"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- Lightning -----------------------------------------------------------------------------------------


@pytest.fixture
def fit(tmp_path):
    """A run of a tiny module. Returns the module, its optimizer, and in which modes its steps were."""
    import lightning
    from schedulefree_cpp.integrations.lightning import ScheduleFreeCallback

    class Module(lightning.LightningModule):
        lr, batch_size = 0.05, 8

        def __init__(self, name, train_mode, modes):
            super().__init__()
            self.layer = layer()
            self.name, self.train_mode, self.modes = name, train_mode, modes

        def train_dataloader(self):
            data = torch.utils.data.TensorDataset(X, Y)
            return torch.utils.data.DataLoader(data, batch_size=self.batch_size)

        val_dataloader = train_dataloader

        def loss(self, batch, kind):
            self.modes.add((kind, cases.entry(self.optimizers().param_groups[0], "train_mode")))
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def training_step(self, batch, _):
            return self.loss(batch, "train")

        def validation_step(self, batch, _):
            self.loss(batch, "val")

        def configure_optimizers(self):
            optimizer = cases.make(self.name, self.parameters(), lr=self.lr)
            optimizer.train(self.train_mode)
            return optimizer

    def run(name, *callbacks, ours=True, validate=True, ckpt_path=None, module=None, tune=None, **kwargs):
        """``tune`` gets a tuner and the module, and its call takes the place of the fit."""
        modes = set()
        module = module or Module(name, not ours, modes)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=bool(callbacks),
            callbacks=[*([ScheduleFreeCallback()] if ours else []), *callbacks],
            default_root_dir=tmp_path,
            limit_val_batches=1.0 if validate else 0,
            **{"max_epochs": 2, **kwargs},
        )
        if tune:
            tune(lightning.pytorch.tuner.Tuner(trainer), module)
        else:
            trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
        return module, trainer.optimizers[0], modes

    return run


@pytest.mark.parametrize("name", NAMES)
def test_lightning(name, fit):
    module, optimizer, modes = fit(name, val_check_interval=2)
    assert modes == {("train", True), ("val", False)}
    assert cases.entry(optimizer.param_groups[0], "k") == 6
    assert_is_x(optimizer, module)


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_of_lightning_is_x(name, weights_only, fit, tmp_path):
    import lightning

    xs = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            assert cases.entry(trainer.optimizers[0].param_groups[0], "train_mode")
            xs.append(x_of(trainer.optimizers[0], module.layer))

    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only
    )
    module, _, modes = fit(name, Watch(), saver, validate=False)
    assert modes == {("train", True)}
    plain, _, _ = fit(name, validate=False)
    assert_equal_dicts(module.state_dict(), plain.state_dict())  # the checkpoints have changed nothing
    assert len(xs) == 6
    for step, x in enumerate(xs, 1):
        checkpoint = torch.load(tmp_path / f"step={step}.ckpt", weights_only=True)
        assert_equal_dicts(checkpoint["state_dict"], {f"layer.{key}": value for key, value in x.items()})
        if not weights_only:
            assert not cases.entry(checkpoint["optimizer_states"][0]["param_groups"][0], "train_mode")


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_lightning_resumes_exactly(name, mode, fit, tmp_path):
    import lightning

    saver = lightning.pytorch.callbacks.ModelCheckpoint(
        tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True
    )
    # Without our callback, the checkpoints are those of train mode.
    fit(name, saver, ours=mode == "eval", validate=False, max_epochs=1)
    whole, _, _ = fit(name, validate=False, max_epochs=3)
    path = tmp_path / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=True)["optimizer_states"][0]["param_groups"][0]
    assert cases.entry(saved, "train_mode") == (mode == "train")
    resumed, optimizer, _ = fit(name, validate=False, max_epochs=3, ckpt_path=path)
    assert cases.entry(optimizer.param_groups[0], "k") == 9
    assert_equal_dicts(resumed.state_dict(), whole.state_dict())


def test_a_state_dict_within_a_batch_of_lightning_is_y(fit):
    import lightning

    class Meddle(lightning.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            module.state_dict()
            assert cases.entry(optimizer.param_groups[0], "train_mode")

        def on_train_epoch_end(self, trainer, module):
            trainer.optimizers[0].train()
            x_of(trainer.optimizers[0], module)
            assert cases.entry(trainer.optimizers[0].param_groups[0], "train_mode")

    module, optimizer, _ = fit("AdamWScheduleFree", Meddle())
    plain, _, _ = fit("AdamWScheduleFree")
    assert_equal_dicts(module.state_dict(), plain.state_dict())
    # Once training has ended, state dicts leave modes alone.
    optimizer.train()
    module.state_dict()
    assert cases.entry(optimizer.param_groups[0], "train_mode")
    assert not {name for name in vars(module) if name.startswith("on_")}


def find_lr(tuner, module):
    finder = tuner.lr_find(module, num_training=30, early_stop_threshold=None)
    assert module.lr == finder.suggestion() != 0.05


def scale_batch_size(tuner, module):
    assert tuner.scale_batch_size(module, init_val=2, max_trials=3) == module.batch_size == 8


@pytest.mark.parametrize("tune", [find_lr, scale_batch_size])
@pytest.mark.parametrize("name", NAMES)
def test_lightnings_tuners_train_at_y_and_leave_the_model_as_it_was(name, tune, fit):
    module, optimizer, modes = fit(name, tune=tune, accumulate_grad_batches=2, max_epochs=40)
    assert modes == {("train", True), ("val", False)}
    assert_equal_dicts(module.layer.state_dict(), layer().state_dict())
    assert_is_x(optimizer, module)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_a_tuner_of_lightning_changes_no_training(name, epoch, fit):
    import lightning

    class Find(lightning.pytorch.callbacks.LearningRateFinder):
        def on_fit_start(self, *_):
            pass

        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == epoch:
                self.lr_find(trainer, module)

    found = Find(num_training_steps=5, early_stop_threshold=None, update_attr=False)
    module, optimizer, _ = fit(name, found, validate=False, max_epochs=5)
    assert len(found.optimal_lr.results["loss"]) == 5
    assert cases.entry(optimizer.param_groups[0], "k") == 15
    plain, _, _ = fit(name, validate=False, max_epochs=5)
    assert_equal_dicts(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize("validate", [False, True])
def test_modes_are_switched_where_the_callbacks_of_lightning_were_replaced(validate, fit):
    import lightning

    class Other(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            module.state_dict()
            assert_is_x(trainer.optimizers[0], module)
            trainer.optimizers[0].train()

    class Replace(lightning.Callback):
        def on_fit_start(self, trainer, module):
            trainer.callbacks = [Other()]

    # Validations in the middle and at the end of an epoch.
    kwargs = {"validate": validate, "val_check_interval": 2}
    module, optimizer, modes = fit("AdamWScheduleFree", Replace(), **kwargs)
    assert modes == ({("train", True), ("val", False)} if validate else {("train", True)})
    assert_is_x(optimizer, module)
    plain, _, _ = fit("AdamWScheduleFree", **kwargs)
    assert_equal_dicts(module.state_dict(), plain.state_dict())


def test_a_failed_fit_of_lightning_leaves_later_ones_alone(fit):
    import lightning

    class Fail(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            self.module = module
            raise ValueError("on purpose")

    class Watch(lightning.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            module.state_dict()

    fail = Fail()
    with pytest.raises(ValueError, match="on purpose"):
        fit("AdamWScheduleFree", fail, validate=False)
    fail.module.load_state_dict({f"layer.{key}": value for key, value in layer().state_dict().items()})
    module, _, _ = fit("AdamWScheduleFree", Watch(), module=fail.module)
    plain, _, _ = fit("AdamWScheduleFree")
    assert_equal_dicts(module.state_dict(), plain.state_dict())


@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("average", ["EMA", "SWA"])
@pytest.mark.parametrize("name", NAMES)
def test_the_average_of_another_callback_of_lightning_stays_whatever_the_order(name, average, validate, fit):
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
    from schedulefree_cpp.integrations.lightning import ScheduleFreeCallback

    class Watch(lightning.Callback):
        def on_train_end(self, trainer, module):
            self.train_mode = cases.entry(trainer.optimizers[0].param_groups[0], "train_mode")

    finals = []
    for ours_at in range(3):
        if average == "EMA":
            other = EMAWeightAveraging(decay=0.9)
        else:
            other = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1)
        callbacks = [watch := Watch(), other]
        callbacks.insert(ours_at, ScheduleFreeCallback())
        module, optimizer, _ = fit(name, *callbacks, ours=False, validate=validate, max_epochs=4)
        assert (watch.train_mode, cases.entry(optimizer.param_groups[0], "train_mode")) == (False, False)
        held = getattr(other._average_model, "module", other._average_model)
        assert_equal_dicts(module.state_dict(), held.state_dict())
        finals.append(module.state_dict())
    for final in finals:
        assert_equal_dicts(final, finals[0])


# ---- Fabric --------------------------------------------------------------------------------------------


def fabricated(steps, model, optimizer, fabric, start=0):
    optimizer.train()
    for i in range(start, start + steps):
        batch = slice(8 * (i % 3), 8 * (i % 3) + 8)
        optimizer.zero_grad()
        fabric.backward((model(X[batch]) - Y[batch]).square().mean())
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_fabric_trains_as_a_plain_loop_does_and_resumes_exactly(name, mode, tmp_path):
    import lightning

    fabric = lightning.Fabric(accelerator="cpu", devices=1)

    def prepare():
        model = layer()
        return model, *fabric.setup(model, cases.make(name, model.parameters()))

    model, prepared, optimizer = prepare()
    fabricated(5, prepared, optimizer, fabric)
    with optimizer.averaged():
        x = {key: value.clone() for key, value in model.state_dict().items()}
    getattr(optimizer, mode)()
    if mode == "eval":
        assert_equal_dicts(model.state_dict(), x)
    fabric.save(tmp_path / "checkpoint", {"model": prepared, "optimizer": optimizer})
    fabricated(5, prepared, optimizer, fabric, start=5)

    other, prepared, optimizer = prepare()
    with torch.no_grad():
        other.weight.zero_()
    fabric.load(tmp_path / "checkpoint", {"model": prepared, "optimizer": optimizer}, weights_only=True)
    fabricated(5, prepared, optimizer, fabric, start=5)
    assert cases.entry(optimizer.param_groups[0], "k") == 10

    plain = layer()
    expected = cases.make(name, plain.parameters())
    for i in range(10):
        batch = slice(8 * (i % 3), 8 * (i % 3) + 8)
        expected.zero_grad()
        (plain(X[batch]) - Y[batch]).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        expected.step()
    cases.assert_same(model.parameters(), plain.parameters())
    cases.assert_same(other.parameters(), plain.parameters())


# ---- skorch --------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("skorch") is None, reason="skorch is not installed")
@pytest.mark.parametrize("validate", [False, True])
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_skorch(name, validate, tmp_path):
    import schedulefree_cpp
    import skorch
    from skorch.callbacks import Callback, Checkpoint

    modes = set()

    class Modes(Callback):
        def on_batch_begin(self, net, training=False, **_):
            net.optimizer_.train(training)

        def on_epoch_end(self, net, **_):
            net.optimizer_.eval()

    class Net(skorch.NeuralNetRegressor):
        def get_loss(self, *args, training=False, **kwargs):
            modes.add((training, cases.entry(self.optimizer_.param_groups[0], "train_mode")))
            return super().get_loss(*args, training=training, **kwargs)

    def fit(epochs, *callbacks, net=None):
        torch.manual_seed(0)
        net = net or Net(
            torch.nn.Linear,
            module__in_features=4,
            module__out_features=1,
            optimizer=getattr(schedulefree_cpp, name),
            lr=0.05,
            batch_size=8,
            iterator_train__shuffle=False,
            verbose=0,
            **({} if validate else {"train_split": None}),
            callbacks=[Modes(), *callbacks],
        )
        return net.partial_fit(X.numpy(), Y.numpy(), epochs=epochs)

    saver = Checkpoint(monitor=None, dirname=tmp_path)  # behind the modes
    net = fit(3, saver)
    assert modes == ({(True, True), (False, False)} if validate else {(True, True)})
    losses = net.history[:, "train_loss"]
    assert losses[-1] < losses[0]
    x = net.optimizer_.averaged_state_dict(net.module_)
    assert_equal_dicts(torch.load(tmp_path / "params.pt", weights_only=True), x)
    predicted = torch.from_numpy(net.predict(X.numpy()))
    torch.testing.assert_close(predicted, torch.nn.functional.linear(X, x["weight"], x["bias"]))

    resumed = fit(0)
    resumed.load_params(checkpoint=saver)
    whole, resumed = fit(5), fit(2, net=resumed)
    assert_equal_dicts(resumed.module_.state_dict(), whole.module_.state_dict())


# ---- Transformers --------------------------------------------------------------------------------------


@pytest.fixture
def train(tmp_path):
    """A run of the Trainer on a tiny model. Returns the trainer, and in which modes its steps were."""
    import transformers
    from schedulefree_cpp.integrations.transformers import ScheduleFreeCallback

    class Model(torch.nn.Module):
        def __init__(self, modes):
            super().__init__()
            self.layer, self.modes, self.optimizer = layer(), modes, None

        def forward(self, x, labels):
            if self.optimizer:
                self.modes.add((self.training, cases.entry(self.optimizer().param_groups[0], "train_mode")))
            return {"loss": (self.layer(x) - labels).square().mean(), "logits": self.layer(x)}

    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]

    def run(name, *callbacks, ours=True, by_class=False, folder="run", resume=None, **kwargs):
        modes = set()
        model = Model(modes)
        if by_class:
            how = {"optimizer_cls_and_kwargs": (AdamWScheduleFree, {"lr": 0.05})}
        else:
            how = {"optimizers": (cases.make(name, model.parameters(), lr=0.05), None)}
        arguments = transformers.TrainingArguments(
            output_dir=tmp_path / folder,
            per_device_train_batch_size=8,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **{"max_steps": 7, "save_strategy": "no", **kwargs},
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=data,
            eval_dataset=data,
            callbacks=[*callbacks, *([ScheduleFreeCallback()] if ours else [])],
            **how,
        )
        model.optimizer = lambda: optimizer_of(trainer)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, modes

    return run


def optimizer_of(trainer):
    return getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def saved_model(folder):
    from safetensors.torch import load_file

    return load_file(Path(folder) / "model.safetensors")


@pytest.mark.parametrize("by_class", [False, True])
def test_transformers(by_class, train):
    trainer, modes = train(
        "AdamWScheduleFree", by_class=by_class, eval_strategy="steps", eval_steps=3, learning_rate=0.05
    )
    assert modes == {(True, True), (False, False)}
    assert cases.entry(optimizer_of(trainer).param_groups[0], "k") == 7
    assert_is_x(optimizer_of(trainer), trainer.model)


@pytest.mark.parametrize("name", NAMES)
def test_every_checkpoint_of_transformers_is_x(name, train, tmp_path):
    import transformers

    xs = {}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model=None, optimizer=None, **_):
            optimizer = getattr(optimizer, "optimizer", optimizer)
            assert cases.entry(optimizer.param_groups[0], "train_mode")
            xs[state.global_step] = x_of(optimizer, model)

    trainer, _ = train(name, Watch(), save_strategy="steps", save_steps=2)
    for step in (2, 4, 6, 7):
        assert_equal_dicts(saved_model(tmp_path / "run" / f"checkpoint-{step}"), xs[step])
    plain, _ = train(name, folder="plain")
    assert_equal_dicts(trainer.model.state_dict(), plain.model.state_dict())
    trainer.save_model(tmp_path / "final")
    assert_equal_dicts(saved_model(tmp_path / "final"), xs[7])


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_resumes_exactly(name, mode, train, tmp_path):
    # Without our callback, and where no evaluation precedes, checkpoints are those of train mode.
    train(name, ours=mode == "eval", save_strategy="steps", save_steps=3)
    path = tmp_path / "run" / "checkpoint-3"  # at the end of an epoch
    saved = torch.load(path / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert cases.entry(saved, "train_mode") == (mode == "train")
    whole, _ = train(name, folder="whole", max_steps=8)
    resumed, _ = train(name, folder="resumed", max_steps=8, resume=str(path))
    assert cases.entry(optimizer_of(resumed).param_groups[0], "k") == 8
    assert_equal_dicts(resumed.model.state_dict(), whole.model.state_dict())


@pytest.mark.parametrize("ours_last", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_the_average_of_another_callback_of_transformers_stays_whatever_the_order(name, ours_last, train):
    import transformers
    from schedulefree_cpp.integrations.transformers import ScheduleFreeCallback

    class Average(transformers.TrainerCallback):
        held = None

        def on_step_end(self, args, state, control, model=None, **_):
            now = model.state_dict()
            self.held = {k: self.held[k].lerp(now[k], 0.1) if self.held else now[k].clone() for k in now}

        def on_train_end(self, args, state, control, model=None, **_):
            model.load_state_dict(self.held)

    callbacks = [Average(), ScheduleFreeCallback()]
    trainer, _ = train(name, *(callbacks if ours_last else callbacks[::-1]), ours=False)
    assert_equal_dicts(trainer.model.state_dict(), callbacks[0].held)


def test_the_best_model_of_transformers_is_x(train, tmp_path):
    trainer, _ = train(
        "AdamWScheduleFree",
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
    )
    best = saved_model(trainer.state.best_model_checkpoint)
    assert_equal_dicts(trainer.model.state_dict(), best)
    assert not cases.entry(optimizer_of(trainer).param_groups[0], "train_mode")


# ---- Accelerate ----------------------------------------------------------------------------------------


def accelerated(steps, model, optimizer, accelerator, start=0):
    optimizer.train()
    for i in range(start, start + steps):
        with accelerator.accumulate(model):
            batch = slice(8 * (i % 3), 8 * (i % 3) + 8)
            accelerator.backward((model(X[batch]) - Y[batch]).square().mean())
            optimizer.step()
            optimizer.zero_grad()


def accelerator_of():
    from accelerate import Accelerator

    return Accelerator(cpu=True, gradient_accumulation_steps=2)


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_accumulates_as_a_plain_loop_does(name):
    accelerator = accelerator_of()
    model = layer()
    prepared, optimizer = accelerator.prepare(model, cases.make(name, model.parameters()))
    accelerated(8, prepared, optimizer, accelerator)
    plain = layer()
    expected = cases.make(name, plain.parameters())
    for i in range(8):
        batch = slice(8 * (i % 3), 8 * (i % 3) + 8)
        ((plain(X[batch]) - Y[batch]).square().mean() / 2).backward()
        if i % 2:
            expected.step()
            expected.zero_grad()
    cases.assert_same(model.parameters(), plain.parameters())
    assert cases.entry(optimizer.param_groups[0], "k") == 4
    optimizer.eval()
    expected.eval()
    cases.assert_same(model.parameters(), plain.parameters())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_accelerate_resumes_exactly(name, mode, tmp_path):
    accelerator = accelerator_of()
    model = layer()
    prepared, optimizer = accelerator.prepare(model, cases.make(name, model.parameters()))
    accelerated(4, prepared, optimizer, accelerator)
    getattr(optimizer, mode)()
    accelerator.save_state(tmp_path)
    accelerated(4, prepared, optimizer, accelerator, start=4)

    accelerator = accelerator_of()
    other = torch.nn.Linear(4, 1)
    prepared, optimizer = accelerator.prepare(other, cases.make(name, other.parameters()))
    accelerator.load_state(tmp_path)
    accelerated(4, prepared, optimizer, accelerator, start=4)
    assert cases.entry(optimizer.param_groups[0], "k") == 4
    cases.assert_same(model.parameters(), other.parameters())


def test_accelerate_hides_what_the_optimizer_in_it_has():
    accelerator = accelerator_of()
    model = layer()
    inner = cases.make("AdamWScheduleFree", model.parameters(), max_grad_norm=1.0)
    prepared, optimizer = accelerator.prepare(model, inner)
    accelerated(4, prepared, optimizer, accelerator)
    for name in ("averaged", "averaged_state_dict", "grad_norm"):
        assert not hasattr(optimizer, name)
    losses = [(model(X) - Y).square().mean().item()]
    expected = inner.averaged_state_dict(model)

    def validate(model):
        assert_equal_dicts(model.state_dict(), expected)
        return (model(X) - Y).square().mean().item()

    names = documented("inner.averaged()", optimizer=optimizer, model=prepared, validate=validate)
    assert names["loss"] != losses[0]
    assert (model(X) - Y).square().mean().item() == losses[0]
    assert_equal_dicts(names["inner"].averaged_state_dict(prepared), expected)
    assert names["inner"].grad_norm > 0


@pytest.mark.parametrize("capturable", [False, True])
def test_accelerate_skips_what_overflows(capturable):
    from accelerate.optimizer import AcceleratedOptimizer

    accelerator_of()
    model = layer()
    inner = cases.make("AdamWScheduleFree", model.parameters(), capturable=capturable)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = AcceleratedOptimizer(inner, scaler=scaler)
    own_step = inner.step
    for i, factor in enumerate([1.0, torch.inf, 1.0]):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        scaler.scale((model(X) - Y).square().mean() * factor).backward()
        optimizer.step()
        assert all(map(torch.equal, before, model.parameters())) == (i == 1)
        # Accelerate asks whether step() was called, and a capturable one always is.
        assert optimizer.step_was_skipped == (i == 1 and not capturable)
    assert float(cases.entry(inner.param_groups[0], "k")) == 2
    assert scaler.get_scale() == 512.0
    assert inner.step == own_step


# ---- ignite --------------------------------------------------------------------------------------------


def ignited(name, epochs, folder=None, resume=None, seed=0):
    """A run of an engine of ignite, which saves into a folder. Returns its model, its optimizer and x."""
    engine = pytest.importorskip("ignite.engine", reason="ignite is not installed")
    handlers = pytest.importorskip("ignite.handlers")
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 1)
    optimizer = cases.make(name, model.parameters(), lr=0.05)

    def update(_, batch):
        assert cases.entry(optimizer.param_groups[0], "train_mode")
        optimizer.zero_grad()
        (model(X[batch]) - Y[batch]).square().mean().backward()
        optimizer.step()

    trainer = engine.Engine(update)
    evaluator = engine.Engine(lambda _, batch: assert_is_x(optimizer, model))
    documented("trainer.on", trainer=trainer, optimizer=optimizer, Events=engine.Events)
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda: evaluator.run([0]))
    xs = []
    trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, lambda: xs.append(x_of(optimizer, model)))
    saved = {"model": model, "optimizer": optimizer, "trainer": trainer}
    if folder is not None:
        checkpoint = handlers.Checkpoint(saved, handlers.DiskSaver(str(folder)), n_saved=None)
        trainer.add_event_handler(engine.Events.EPOCH_COMPLETED, checkpoint)
    if resume is not None:
        handlers.Checkpoint.load_objects(saved, torch.load(resume, weights_only=True))
    trainer.run([slice(8 * i, 8 * i + 8) for i in range(3)], max_epochs=epochs)
    assert len(xs) == epochs - (resume is not None)
    return model, optimizer, xs


@pytest.mark.parametrize("name", NAMES)
def test_ignite(name, tmp_path):
    model, optimizer, xs = ignited(name, 3, tmp_path)
    assert cases.entry(optimizer.param_groups[0], "k") == 9
    assert_is_x(optimizer, model)
    for epoch, x in enumerate(xs, 1):
        (path,) = tmp_path.glob(f"checkpoint_{3 * epoch}.pt")
        assert_equal_dicts(torch.load(path, weights_only=True)["model"], x)
    resumed, _, _ = ignited(name, 3, resume=tmp_path / "checkpoint_3.pt", seed=1)
    assert_equal_dicts(resumed.state_dict(), model.state_dict())


# ---- timm ----------------------------------------------------------------------------------------------

# In a process of its own, for the names that stand for torchvision.
TIMM = """
import torch
import torchvision_names

torchvision_names.provide()
import timm
from timm.optim import create_optimizer_v2, list_optimizers
from schedulefree_cpp.integrations.timm import NAMES, register

register()
assert set(NAMES) <= set(list_optimizers("*schedulefree*"))
assert {"adamwschedulefreeclosure", "adamcschedulefreeplus", "adamcschedulefreepluspaper"} <= set(NAMES)

def build(name):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=1, embed_dim=16, num_heads=2, num_classes=3
    )
    # What timm's script hands over, whether the class takes it or not.
    beta = 0.8
    optimizer = create_optimizer_v2(
        model, name, lr=0.01, weight_decay=0.05, momentum=beta, betas=(beta, 0.99), eps=1e-6, layer_decay=0.7
    )
    assert type(optimizer) is NAMES[name]
    for group in optimizer.param_groups:
        assert group["lr"] == 0.01 and beta in (group.get("momentum"), *group.get("betas", ()))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    return model, optimizer

images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 3

def run(model, optimizer, steps):
    optimizer.train()

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    for _ in range(steps):
        if "closure" in type(optimizer).__name__.lower() or hasattr(optimizer, "step_func"):
            loss = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
    return float(loss)

for name in NAMES:
    model, optimizer = build(name)
    first = run(model, optimizer, 1)
    run(model, optimizer, 4)
    for mode in ("train", "eval"):
        getattr(optimizer, mode)()
        torch.save([model.state_dict(), optimizer.state_dict()], f"{mode}.pt")
    assert run(model, optimizer, 10) < first, name
    for mode in ("train", "eval"):
        other, resumed = build(name)
        weights, state = torch.load(f"{mode}.pt", weights_only=True)
        other.load_state_dict(weights)
        resumed.load_state_dict(state)
        run(other, resumed, 10)
        assert all(map(torch.equal, model.parameters(), other.parameters())), (name, mode)
"""


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
def test_timm(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", TIMM], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr


# ---- torchtitan ----------------------------------------------------------------------------------------


def container(seed=0, steps=0, name="AdamWScheduleFree", dtype=torch.float32, **factory):
    """Torchtitan's container of the optimizers of two parts of a model, and with two groups in each."""
    pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not installed")
    from schedulefree_cpp.integrations.torchtitan import ScheduleFreeOptimizersContainer
    from torchtitan.components.optimizer import ParamGroupConfig

    torch.manual_seed(seed)
    parts = [torch.nn.ModuleDict({part: torch.nn.Linear(4, 4, dtype=dtype)}) for part in ("first", "second")]
    groups = [
        ParamGroupConfig(pattern=pattern, optimizer_name=name, optimizer_kwargs={"lr": lr})
        for pattern, lr in (("bias", 0.02), (".*", 0.05))
    ]
    config = ScheduleFreeOptimizersContainer.Config(
        param_groups=groups, optimizer_factory_kwargs_by_name={name: factory}
    )
    whole = config.build(model_parts=parts)
    contained(whole, steps)
    return whole


def contained(whole, steps):
    whole.train()
    first, second = whole.model_parts
    dtype = second["second"].weight.dtype
    for _ in range(steps):
        whole.zero_grad()
        out = second["second"](first["first"](X.to(dtype)).tanh())
        (out - Y).square().mean().backward()
        whole.step()


def models_of(whole):
    return {key: value for part in whole.model_parts for key, value in part.state_dict().items()}


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("reader", ["train", "eval"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("AdamWScheduleFree", {}),
        ("AdamWScheduleFree", {"dtype": torch.bfloat16}),
        ("AdamWScheduleFree", {"capturable": True}),
        ("AdamWScheduleFreePaper", {}),
        ("RAdamScheduleFree", {}),
        ("SGDScheduleFree", {}),
    ],
    ids=str,
)
def test_a_torchtitan_container_resumes(name, options, mode, reader, steps, tmp_path):
    import torch.distributed.checkpoint as dcp

    whole = container(0, 5, name, **options)
    getattr(whole, mode)()
    dcp.save({"model": models_of(whole), "optimizer": whole}, checkpoint_id=tmp_path, no_dist=True)
    contained(whole, 5)

    resumed = container(1, steps, name, **options)
    getattr(resumed, reader)()
    # The model's tensors are loaded in place.
    dcp.load({"model": models_of(resumed), "optimizer": resumed}, checkpoint_id=tmp_path, no_dist=True)
    assert all(
        cases.entry(optimizer.param_groups[1], "train_mode") == (mode == "train") for optimizer in resumed
    )
    contained(resumed, 5)
    assert all(int(group["k"]) == 10 for optimizer in resumed for group in optimizer.param_groups)
    assert_equal_dicts(models_of(whole), models_of(resumed))


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_a_look_at_a_torchtitan_container_changes_nothing(name):
    whole, looked = container(name=name), container(name=name)
    assert any(key.endswith(".z") for key in looked.state_dict())
    for one in (whole, looked):
        contained(one, 3)
    assert_equal_dicts(models_of(whole), models_of(looked))


def test_a_torchtitan_container_has_modes_and_the_other_optimizers_too():
    whole = container(steps=5)
    averages = {
        key: value
        for part, optimizer in zip(whole.model_parts, whole, strict=True)
        for key, value in x_of(optimizer, part).items()
    }
    y = {key: value.clone() for key, value in models_of(whole).items()}
    whole.eval()
    assert_equal_dicts(models_of(whole), averages)
    assert not torch.equal(models_of(whole)["first.weight"], y["first.weight"])
    whole.train()
    assert_equal_dicts(models_of(whole), y)
    plain = container(steps=1, name="AdamW", fused=False)
    assert {type(optimizer) for optimizer in plain} == {torch.optim.AdamW}
    plain.eval()


# ---- PEFT ----------------------------------------------------------------------------------------------


class _Base(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(4, 6)
        self.outer = torch.nn.Linear(6, 1)

    def forward(self, x):
        return self.outer(self.inner(x).tanh())


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NAMES)
def test_peft_saves_adapters_at_x_and_resumes_exactly(name, mode, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def run(model, optimizer):
        optimizer.train()
        for _ in range(5):
            optimizer.zero_grad()
            (model(X) - Y).square().mean().backward()
            optimizer.step()

    torch.manual_seed(1)
    model = peft.get_peft_model(_Base(), peft.LoraConfig(r=2, target_modules=["inner"]))
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    optimizer = cases.make(name, model.parameters(), lr=0.05)
    first = (model(X) - Y).square().mean()
    run(model, optimizer)
    assert (model(X) - Y).square().mean() < first
    assert len(optimizer.state) == 2
    cases.assert_same([p for p in model.parameters() if not p.requires_grad], frozen)
    y = model(X).detach()
    with optimizer.averaged():
        x = model(X).detach()
        model.save_pretrained(tmp_path / "x")
        torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(X), x)
    optimizer.eval()
    model.save_pretrained(tmp_path / "eval")
    for folder in ("x", "eval"):
        loaded = peft.PeftModel.from_pretrained(_Base(), tmp_path / folder)
        assert torch.equal(loaded(X), x)
    assert (x - y).abs().max() > 1e-3

    getattr(optimizer, mode)()
    model.save_pretrained(tmp_path / "checkpoint")
    torch.save(optimizer.state_dict(), tmp_path / "optimizer")
    resumed = peft.PeftModel.from_pretrained(_Base(), tmp_path / "checkpoint", is_trainable=True)
    other = cases.make(name, resumed.parameters(), lr=0.05)
    other.load_state_dict(torch.load(tmp_path / "optimizer", weights_only=True))
    run(model, optimizer), run(resumed, other)
    cases.assert_same(model.parameters(), resumed.parameters())


# ---- safetensors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_safetensors_hold_x_and_tied_weights_once(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")

    model = _Tied()
    optimizer = cases.make(name, model.parameters(), lr=0.05)
    for _ in range(5):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
    y = [p.detach().clone() for p in model.parameters()]
    with optimizer.averaged():
        x = model(X).detach()
        safetensors.save_model(model, tmp_path / "model.safetensors")
    cases.assert_same(model.parameters(), y)
    assert (model(X) - x).abs().max() > 1e-3
    assert len(safetensors.load_file(tmp_path / "model.safetensors")) == 1
    loaded = _Tied()
    safetensors.load_model(loaded, tmp_path / "model.safetensors")
    assert torch.equal(loaded(X), x)
    with pytest.raises(RuntimeError, match="share memory"):
        safetensors.save_file(optimizer.averaged_state_dict(model), tmp_path / "refused")

    plain = layer()
    optimizer = cases.make(name, plain.parameters(), lr=0.05)
    (plain(X) - Y).square().mean().backward()
    optimizer.step()
    safetensors.save_file(optimizer.averaged_state_dict(plain), tmp_path / "plain")
    optimizer.eval()
    assert_equal_dicts(safetensors.load_file(tmp_path / "plain"), plain.state_dict())


# ---- Keras ---------------------------------------------------------------------------------------------

# A loop of one's own, as Keras' guide for its torch backend has it. The tenth layer comes before the ninth in
# the order of model.parameters().
KERAS = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, torch
from schedulefree_cpp import AdamWScheduleFree
folder, mode = sys.argv[1:]
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)

def start():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(4), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    optimizer = AdamWScheduleFree([v.value for v in model.trainable_variables], lr=0.05)
    return model, optimizer

def run(model, optimizer, steps):
    optimizer.train()
    for _ in range(steps):
        model.zero_grad()
        (model(X, training=True) - Y).square().mean().backward()
        optimizer.step()

model, optimizer = start()
run(model, optimizer, 10)
y = model(X).detach()
optimizer.eval()
x = model(X).detach()
assert (x - y).abs().max() > 1e-3
model.save(folder + "/model.keras")
assert torch.equal(keras.models.load_model(folder + "/model.keras")(X), x)
assert abs(model.predict(X, verbose=0) - x.numpy()).max() < 1e-5

getattr(optimizer, mode)()
model.save_weights(folder + "/model.weights.h5")
torch.save(optimizer.state_dict(), folder + "/optimizer")
run(model, optimizer, 5)
shuffled = False
for _ in range(5):
    resumed, optimizer = start()
    optimizer.load_state_dict(torch.load(folder + "/optimizer", weights_only=True))
    resumed.load_weights(folder + "/model.weights.h5")
    run(resumed, optimizer, 5)
    assert torch.equal(resumed(X), model(X))
    names = [name for name, _ in resumed.named_parameters()]
    shuffled |= names != sorted(names, key=lambda name: int(name.split("/dense_")[1].split("/")[0]))
assert shuffled
"""


@pytest.mark.skipif(importlib.util.find_spec("keras") is None, reason="keras is not installed")
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_loop_with_keras_torch_backend(mode, tmp_path):
    done = subprocess.run([sys.executable, "-c", KERAS, tmp_path, mode], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- DeepSpeed -----------------------------------------------------------------------------------------

# One of two processes. It compares with a plain loop, and resumes from checkpoints of both modes.
DEEPSPEED = """
import json, os, sys, warnings
import torch

case, rank, folder = json.loads(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
os.environ.update(
    RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu"
)
warnings.simplefilter("ignore")
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

import deepspeed
from schedulefree_cpp import AdamWScheduleFree
from schedulefree_cpp.integrations import deepspeed as modes

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
deepspeed.init_distributed(dist_backend="gloo")
dtype = torch.bfloat16 if case.get("bf16") else torch.float32
stage = case["zero_optimization"]["stage"]
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
Y = X.sum(1, keepdim=True)

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 1))

def build():
    model = network()
    groups = [{"params": list(model[i].parameters())} for i in (0, 2)]
    optimizer = AdamWScheduleFree(groups if case["groups"] else model.parameters(), lr=0.05)
    config = {key: value for key, value in case.items() if key != "groups"}
    config |= {"train_batch_size": 24, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0}
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer

def run(engine, steps):
    modes.train(engine)
    for _ in range(steps):
        engine.backward((engine(X[rank::2]) - Y[rank::2]).square().mean())
        engine.step()

def weights(engine):
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), enabled=stage == 3):
        return [p.detach().clone() for p in engine.module.parameters()]

engine, optimizer = build()
try:
    run(engine, 5)
except ValueError as error:
    sys.exit(str(error))
y = weights(engine)

plain = network()
expected = AdamWScheduleFree(plain.parameters(), lr=0.05)
expected.train()
for _ in range(5):
    expected.zero_grad()
    (plain(X.float()) - Y.float()).square().mean().backward()
    expected.step()
apart = max((p - q).abs().max().item() for p, q in zip(expected.averaged_state_dict(plain).values(), y))
assert apart > 0.01
tolerance = 0.3 * apart if case.get("bf16") else 1e-5
for p, q in zip(plain.parameters(), y):
    torch.testing.assert_close(p.detach(), q.float(), rtol=0, atol=tolerance)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    optimizer.eval(), optimizer.train()
assert any("integrations.deepspeed" in str(w.message) for w in caught) == (engine.optimizer is not optimizer)

with warnings.catch_warnings():
    warnings.filterwarnings("error", "eval()")
    modes.eval(engine)
assert not optimizer.param_groups[0]["train_mode"]
expected.eval()
for p, q in zip(plain.parameters(), weights(engine)):
    torch.testing.assert_close(p.detach(), q.float(), rtol=0, atol=tolerance)
with torch.no_grad():
    torch.testing.assert_close(plain(X.float()), engine(X).float(), rtol=0, atol=10 * tolerance)
modes.train(engine)
assert all(map(torch.equal, weights(engine), y))

for mode in ("train", "eval"):
    getattr(modes, mode)(engine)
    engine.save_checkpoint(folder, tag=mode)
run(engine, 5)
for mode in ("train", "eval"):
    resumed, optimizer = build()
    resumed.load_checkpoint(folder, tag=mode)
    run(resumed, 5)
    assert cases.entry(optimizer.param_groups[0], "k") == 10
    assert all(map(torch.equal, weights(resumed), weights(engine))), mode
"""


def deepspeed_processes(tmp_path, stage, groups=False, bf16=False, **options):
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    case = {"zero_optimization": {"stage": stage, **options.pop("zero", {})}, "groups": groups, **options}
    if bf16:
        case["bf16"] = {"enabled": True}
    command = [sys.executable, "-c", DEEPSPEED, json.dumps(case)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), tmp_path], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, outputs, strict=True)]


@pytest.mark.parametrize(
    ("stage", "options"),
    [
        (0, {"groups": True}),
        (1, {}),
        (2, {"bf16": True}),
        (3, {}),
        (3, {"bf16": True, "zero": {"stage3_param_persistence_threshold": 8}}),
        (1, {"bf16": True, "groups": True, "data_types": {"grad_accum_dtype": "fp32"}}),
    ],
    ids=str,
)
def test_deepspeed(stage, options, tmp_path):
    for returncode, error in deepspeed_processes(tmp_path, stage, **options):
        assert returncode == 0, error


@pytest.mark.parametrize(
    ("stage", "options", "message"),
    [
        (2, {"groups": True}, "2 parameter groups, expected 1"),
        (3, {"zero": {"sub_group_size": 10}}, "set sub_group_size"),
    ],
)
def test_deepspeed_that_steps_in_parts_is_refused(stage, options, message, tmp_path):
    for returncode, error in deepspeed_processes(tmp_path, stage, **options):
        assert returncode == 1
        assert message in error


def test_the_modes_of_deepspeed_want_an_engine_they_know():
    from schedulefree_cpp.integrations import deepspeed as modes

    optimizer = AdamWScheduleFree(layer().parameters())
    for outer in (torch.optim.SGD(layer().parameters()), SimpleNamespace(optimizer=optimizer)):
        with pytest.raises(TypeError, match="Invalid engine"):
            modes.train(SimpleNamespace(optimizer=outer))
