"""A tiny GPT-2 in the Trainer of Transformers, on the sources of the standard library.

    python examples/transformers_trainer.py
    python examples/transformers_trainer.py --steps 400 --resume

The model is made from a config and its tokens are bytes, so nothing is downloaded. The Trainer switches the
optimizer's modes for training and evaluation; the callback has every saved model be the average ``x``.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from schedulefree_cpp import AdamWScheduleFree
from schedulefree_cpp.integrations.transformers import ScheduleFreeCallback
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def load_windows(context: int, limit: int) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Return windows of text to train on, at most ``limit``, and a tenth as many to evaluate on."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = []
    for chosen, size in ((paths[1::2], limit), (paths[::2], max(1, limit // 10))):
        text = b"".join(path.read_bytes() for path in chosen)[: size * context]
        windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        windows = windows[: len(windows) // context * context].view(-1, context)
        parts.append([{"input_ids": window, "labels": window} for window in windows])
    return parts[0], parts[1]


def main() -> None:
    """Train, evaluate, save, and load what was saved."""
    parser = argparse.ArgumentParser(
        description="Train a tiny GPT-2 on the standard library's sources in the Trainer of Transformers.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=200, help="steps in all, resumed ones included")
    parser.add_argument("--lr", type=float, default=0.005, help="learning rate")
    parser.add_argument("--width", type=int, default=64, help="size of the model's stream, a multiple of 4")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there is a GPU")
    parser.add_argument("--out", type=Path, default=Path("transformers_run"), help="folder for checkpoints")
    arguments = parser.parse_args()

    train, evaluation = load_windows(context=64, limit=8000)
    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=arguments.width,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    settings = TrainingArguments(
        output_dir=arguments.out,
        max_steps=arguments.steps,
        per_device_train_batch_size=16,
        lr_scheduler_type="constant",  # or the Trainer would decay the learning rate
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=max(1, arguments.steps // 2),
        save_steps=max(1, arguments.steps // 2),
        report_to=[],
        use_cpu=arguments.cpu,
    )
    trainer = Trainer(
        GPT2LMHeadModel(config),
        settings,
        train_dataset=train,
        eval_dataset=evaluation,
        optimizer_cls_and_kwargs=(AdamWScheduleFree, {"lr": arguments.lr, "warmup_steps": 20}),
        callbacks=[ScheduleFreeCallback()],
    )
    trainer.train(resume_from_checkpoint=arguments.resume)
    loss = trainer.evaluate()["eval_loss"]
    print(f"Loss after {trainer.state.global_step} steps: {loss:.4f}")

    trainer.save_model(arguments.out / "final")
    saved = GPT2LMHeadModel.from_pretrained(arguments.out / "final")
    loss = Trainer(saved, settings, eval_dataset=evaluation).evaluate()["eval_loss"]
    print(f"Loss of the saved model: {loss:.4f}")


if __name__ == "__main__":
    main()
