"""A small network sharded by FSDP2 over several processes, with checkpoints that any number of them resume.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 200 --resume

One process for each GPU, or on the CPU any number. Parameters, gradients and the optimizer's state are
DTensors; nothing is specific to schedule-free learning but ``train()`` and ``eval()``.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from schedulefree_cpp import AdamWScheduleFree
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

FEATURES = 16


def make_data(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return inputs and a fixed nonlinear function of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, FEATURES, generator=generator)
    return inputs, (inputs[:, ::2] * inputs[:, 1::2]).sum(1, keepdim=True)


def save(model: nn.Module, optimizer: AdamWScheduleFree, step: int, path: Path) -> None:
    """Write what all processes have of the model and the optimizer, in the mode they are in."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state, "step": step}, checkpoint_id=path)


def load(model: nn.Module, optimizer: AdamWScheduleFree, path: Path) -> int:
    """Read it into a model and an optimizer that may be sharded otherwise. Returns the step."""
    model_state, optimizer_state = get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state, "step": 0}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    return int(state["step"])  # type: ignore[call-overload]


def train(arguments: argparse.Namespace, device: torch.device) -> None:
    """Train, evaluate, save."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    layers = [nn.Linear(FEATURES, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 1)]
    model = nn.Sequential(*layers).to(device)
    mesh = init_device_mesh(device.type, (world,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = AdamWScheduleFree(model.parameters(), lr=arguments.lr, warmup_steps=20)  # after sharding

    first = load(model, optimizer, arguments.out) if arguments.resume else 0
    inputs, targets = make_data(4096, seed=0)
    optimizer.train()
    for step in range(first, arguments.steps):
        # A batch of 64, of which every process takes its share.
        chosen = torch.randint(len(inputs), (64,), generator=torch.Generator().manual_seed(step))[rank::world]
        optimizer.zero_grad()
        outputs = model(inputs[chosen].to(device))
        functional.mse_loss(outputs, targets[chosen].to(device)).backward()
        optimizer.step()

    optimizer.eval()  # the average, to evaluate and to save
    inputs, targets = make_data(1024, seed=1)
    with torch.no_grad():
        loss = functional.mse_loss(model(inputs.to(device)), targets.to(device)).item()
    save(model, optimizer, arguments.steps, arguments.out)
    if rank == 0:
        print(f"Test loss after {arguments.steps} steps on {world} processes: {loss:.6f}")
        print(f"Checkpoint: {arguments.out}")


def main() -> None:
    """Start the process group that torchrun has prepared."""
    parser = argparse.ArgumentParser(
        description="Train a small network with FSDP2; start it by torchrun.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=100, help="steps in all, resumed ones included")
    parser.add_argument("--lr", type=float, default=0.01, help="learning rate")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    parser.add_argument("--cpu", action="store_true", help="train on the CPU even where there are GPUs")
    parser.add_argument("--out", type=Path, default=Path("fsdp2_checkpoint"), help="folder of the checkpoint")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available() and not arguments.cpu
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        train(arguments, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
