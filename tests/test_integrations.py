"""The callbacks, in the trainers they are for."""

from __future__ import annotations

import subprocess
import sys

import cases
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("default")  # the frameworks' own

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


def x_of(optimizer, model):
    return optimizer.averaged_state_dict(model)


def assert_is_x(optimizer, model):
    assert not optimizer.param_groups[0]["train_mode"]
    for key, value in x_of(optimizer, model).items():
        assert torch.equal(model.state_dict()[key], value)


def test_the_package_needs_no_framework():
    program = "import sys, schedulefree_cpp.integrations; assert not {'lightning', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_lightning(name, tmp_path):
    import lightning
    from schedulefree_cpp.integrations.lightning import ScheduleFreeCallback

    modes = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def step(self, batch, kind):
            modes.append((kind, self.optimizers().param_groups[0]["train_mode"]))
            return (self.layer(batch[0]) - batch[1]).square().mean()

        def training_step(self, batch, _):
            return self.step(batch, "train")

        def validation_step(self, batch, _):
            self.step(batch, "val")

        def configure_optimizers(self):
            optimizer = cases.make(name, self.parameters(), lr=0.05)
            optimizer.eval()
            return optimizer

    torch.manual_seed(0)
    module = Module()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), batch_size=8)
    trainer = lightning.Trainer(
        max_epochs=2,
        val_check_interval=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ScheduleFreeCallback()],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader, loader)
    assert {("train", True), ("val", False)} == set(modes)
    assert sum(kind == "train" for kind, _ in modes) == 6
    assert_is_x(trainer.optimizers[0], module)


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "ScheduleFreeWrapper"])
def test_transformers(name, tmp_path):
    import transformers
    from schedulefree_cpp.integrations.transformers import ScheduleFreeCallback

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        def forward(self, x, labels):
            return {"loss": (self.layer(x) - labels).square().mean()}

    torch.manual_seed(0)
    model = Model()
    optimizer = cases.make(name, model.parameters(), lr=0.05)
    data = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]
    saved = {}

    class Watch(transformers.TrainerCallback):
        def on_save(self, args, state, control, **_):
            path = tmp_path / f"checkpoint-{state.global_step}" / "model.safetensors"
            saved[state.global_step] = (path, {k: v.clone() for k, v in x_of(optimizer, model).items()})

    arguments = transformers.TrainingArguments(
        output_dir=tmp_path,
        max_steps=7,
        save_steps=2,
        per_device_train_batch_size=8,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        optimizers=(optimizer, None),
        callbacks=[ScheduleFreeCallback(), Watch()],
    )
    trainer.train()
    from safetensors.torch import load_file

    assert set(saved) >= {2, 4, 6}
    for path, x in saved.values():
        for key, value in load_file(path).items():
            assert torch.equal(value, x[key])
    assert optimizer.param_groups[0]["k"] == 7
    assert_is_x(optimizer, model)
