"""A small GPT that learns to write Python, one byte at a time, from the sources of the standard library.

Nothing is downloaded: the text lies on every machine that has Python. The model, some 50 lines below, is
trained with ``AdamWScheduleFree``, or with ``MuonScheduleFree``, whose Muon takes the matrices of the blocks
and whose AdamW takes embeddings, head and vectors. The picture shows the validation loss at ``y``, where
gradients are taken, and at the average ``x``, which is to be used, and their difference: ``y`` is close to
``x`` by construction.

    python examples/charlm.py
    python examples/charlm.py --optimizer muon --lr 0.04
    python examples/charlm.py --steps 5000 --compile --device cuda

With ``--autocast``, the default but on the CPU, where few processors are fast at it, the model computes in
bfloat16 and parameters stay in float32; ``--dtype`` is for parameters of 16 bits. ``--compile`` compiles the
model.
"""

import argparse
import math
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from schedulefree_cpp import create
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

BYTES = 256  # the vocabulary


class Block(nn.Module):
    """Causal self-attention and a perceptron, each added to the stream."""

    def __init__(self, width: int, heads: int) -> None:
        """Sizes of the stream and of what divides it."""
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, stream: Tensor) -> Tensor:
        """Take and return a stream of shape (batch, time, width)."""
        batch, time, width = stream.shape
        qkv = self.qkv(self.norm1(stream)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        stream = stream + self.out(attended.transpose(1, 2).reshape(batch, time, width))
        return stream + self.down(functional.gelu(self.up(self.norm2(stream))))


class GPT(nn.Module):
    """Predicts the next byte after each of up to ``context`` bytes."""

    def __init__(self, context: int, width: int, heads: int, layers: int) -> None:
        """All sizes of the model."""
        super().__init__()
        self.context = context
        self.token = nn.Embedding(BYTES, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * layers))

    def forward(self, text: Tensor) -> Tensor:
        """From bytes, shape (batch, time), to logits, shape (batch, time, 256)."""
        stream = self.token(text) + self.position.weight[: text.shape[1]]
        return self.head(self.norm(self.blocks(stream)))  # type: ignore[no-any-return]


def load_text(limit: int) -> tuple[Tensor, Tensor]:
    """Return bytes to train on, at most ``limit``, and a tenth as many to validate on, from other files."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(folder.glob("*.py"))
    train, validation = bytearray(), bytearray()
    for i, path in enumerate(paths):
        (validation if i % 10 == 0 else train).extend(path.read_bytes())
    if not train or not validation:
        raise SystemExit(f"The standard library's sources are not in {folder}")

    def tensor(text: bytearray, size: int) -> Tensor:
        return torch.frombuffer(text, dtype=torch.uint8)[:size].long()

    return tensor(train, limit), tensor(validation, limit // 10)


def draw_batch(text: Tensor, batch: int, context: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return windows of the text at random places, and the same one byte later."""
    begin = torch.randint(len(text) - context, (batch, 1), generator=generator)
    windows = text[begin + torch.arange(context + 1)]
    return windows[:, :-1], windows[:, 1:]


def sample(model: Callable[[Tensor], Tensor], context: int, prompt: bytes, size: int, device: str) -> str:
    """Continue the prompt by ``size`` bytes."""
    generator = torch.Generator().manual_seed(0)
    text = torch.tensor([list(prompt)], device=device)
    for _ in range(size):
        logits = model(text[:, -context:])[0, -1].float().cpu() / 0.8
        byte = torch.multinomial(logits.softmax(0), 1, generator=generator)
        text = torch.cat([text, byte[None].to(device)], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def draw(steps: list[int], at_y: list[float], at_x: list[float], path: Path) -> None:
    """Draw validation loss against steps at y and at x, and below it the difference."""
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    above.plot(steps, at_y, color="#D55E00", linewidth=4, label="at y, where gradients are taken")
    above.plot(steps, at_x, color="#0072B2", linewidth=1.5, label="at x, the average")
    above.set_title("A small GPT on the standard library's sources: one run, no schedule")
    above.set_ylabel("validation loss (bits per byte)")
    above.legend()
    below.axhline(0, color="#444444", linewidth=1)
    below.plot(steps, [1000 * (y - x) for y, x in zip(at_y, at_x, strict=True)], color="#444444")
    below.set_ylabel("y minus x (0.001 bits per byte)")
    below.set_xlabel("steps")
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def train(arguments: argparse.Namespace) -> float:
    """Train, evaluate at y and x on the way, and show the outcome.

    Returns:
        Bits per byte at x in the end.
    """
    device: str = arguments.device
    context, batch = arguments.context, arguments.batch
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    train_text, validation_text = load_text(arguments.bytes)
    model = GPT(context, arguments.width, arguments.heads, arguments.layers)
    model.to(device, getattr(torch, arguments.dtype))
    blocks = {*model.blocks.parameters()}
    rest = [p for p in model.parameters() if p not in blocks]
    groups: list[dict[str, Any]] = [{"params": rest}, {"params": [*model.blocks.parameters()]}]
    formats: dict[str, Any] = {}
    if arguments.optimizer == "muon":
        groups[0]["use_muon"] = False
    else:
        formats = {"state_bits": arguments.state_bits, "exp_avg_sq_bits": arguments.exp_avg_sq_bits}
        formats["rounding"] = arguments.rounding
    optimizer = create(
        arguments.optimizer,
        groups,
        lr=arguments.lr,
        betas=(0.95, 0.99),
        weight_decay=0.1,
        warmup_steps=arguments.steps // 20,
        max_grad_norm=1.0,
        **formats,
    )
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if arguments.compile else model
    # The same windows at every evaluation.
    windows = draw_batch(validation_text, 4 * batch, context, torch.Generator().manual_seed(1))

    def loss_of(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=arguments.autocast):
            logits = forward(inputs.to(device))
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.to(device).flatten())

    @torch.no_grad()
    def evaluate() -> float:
        model.eval()
        pieces = zip(windows[0].split(batch), windows[1].split(batch), strict=True)
        losses = [loss_of(*piece).item() for piece in pieces]
        model.train()
        return sum(losses) / len(losses) / math.log(2)

    size = sum(p.numel() for p in model.parameters())
    print(f"{size:,} parameters, {len(train_text):,} bytes of text, on {device}", flush=True)
    steps, at_y, at_x = [], [], []
    optimizer.train()
    with tqdm(total=arguments.steps, unit="step", disable=None) as bar:
        for step in range(1, arguments.steps + 1):
            optimizer.zero_grad()
            loss = loss_of(*draw_batch(train_text, batch, context, generator))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            bar.update()
            if step % arguments.eval_every == 0 or step == arguments.steps:
                steps.append(step)
                at_y.append(evaluate())
                with optimizer.averaged():  # the parameters are x in here
                    at_x.append(evaluate())
                bar.set_postfix_str(f"bits per byte: {at_y[-1]:.3f} at y, {at_x[-1]:.3f} at x")
                if bar.disable:
                    print(f"step {step}: {at_y[-1]:.3f} bits per byte at y, {at_x[-1]:.3f} at x", flush=True)
    optimizer.eval()
    draw(steps, at_y, at_x, arguments.out)
    print(f"Bits per byte after {steps[-1]} steps: {at_y[-1]:.3f} at y, {at_x[-1]:.3f} at x")
    print(f"Picture: {arguments.out}")
    if arguments.sample:
        model.eval()
        with torch.no_grad():
            print("\n" + sample(model, context, b"def ", arguments.sample, device))
    return at_x[-1]


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small GPT on the standard library's sources; draw its loss at y and at x.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps")
    parser.add_argument("--batch", type=int, default=16, help="windows of text in a batch")
    parser.add_argument("--context", type=int, default=96, help="bytes that the model sees")
    parser.add_argument("--width", type=int, default=96, help="size of the stream")
    parser.add_argument("--heads", type=int, default=4, help="attention heads; they divide the width")
    parser.add_argument("--layers", type=int, default=3, help="blocks")
    parser.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw", help="by its name")
    parser.add_argument("--lr", type=float, default=0.005, help="learning rate")
    parser.add_argument("--bytes", type=int, default=5_000_000, help="at most so much text")
    parser.add_argument("--eval-every", type=int, default=50, help="steps between two evaluations")
    parser.add_argument("--sample", type=int, default=200, help="bytes to write in the end")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--device", default="cpu", help="such as cuda")
    parser.add_argument(
        "--autocast",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16; but for cpu, the default",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of the parameters, and of the arithmetic without --autocast",
    )
    parser.add_argument("--state-bits", type=int, default=32, help="of the optimizer (docs/precision.md)")
    parser.add_argument("--exp-avg-sq-bits", type=int, default=32, help="of the optimizer")
    parser.add_argument("--rounding", default="nearest", help="of the optimizer")
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--out", type=Path, default=Path("charlm.png"), help="picture to write")
    arguments = parser.parse_args(given)
    if arguments.autocast is None:
        arguments.autocast = arguments.dtype == "float32" and torch.device(arguments.device).type != "cpu"
    for name in ("steps", "batch", "context", "width", "heads", "layers", "eval_every"):
        if getattr(arguments, name) < 1:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least 1")
    if arguments.width % arguments.heads:
        parser.error(f"argument --heads: {arguments.heads} does not divide a width of {arguments.width}")
    if arguments.bytes < 20 * (arguments.context + 1):
        parser.error("argument --bytes: must be at least 20 windows of text")
    if not arguments.out.parent.is_dir():
        parser.error(f"argument --out: no such directory: {arguments.out.parent}")
    return arguments


if __name__ == "__main__":
    train(parse_arguments())
