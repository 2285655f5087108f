"""Two processes that run functions of this module in a process group, for tests/distributed/test_distributed.py."""

from __future__ import annotations

import copy
import datetime
import functools
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cases
import schedulefree_cpp as schedulefree
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

WORLD = 2


class Ranks:
    """The processes. A call runs a function in each and returns what they returned, by rank."""

    def __init__(self) -> None:
        """Starts them."""
        context = torch.multiprocessing.get_context("spawn")
        self.directory = tempfile.TemporaryDirectory()
        self.pipes = []
        self.processes = []
        for rank in range(WORLD):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.directory.name, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """Runs a function of this module."""
        for pipe in self.pipes:
            pipe.send((function.__name__, args, kwargs))
        answers = [pipe.recv() for pipe in self.pipes]
        errors = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(answers) if error]
        if errors:
            raise AssertionError("\n".join(errors))
        return [result for _, result in answers]

    def close(self) -> None:
        """Ends them."""
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(timeout=60)
            process.kill()
        self.directory.cleanup()


def _serve(rank: int, directory: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD), LOCAL_RANK=str(rank))
    store = dist.FileStore(f"{directory}/store", WORLD)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timeout)
    while call := pipe.recv():
        name, args, kwargs = call
        try:
            torch.manual_seed(0)
            answer = (None, globals()[name](*args, **kwargs))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
    dist.destroy_process_group()


@functools.cache
def mesh() -> Any:
    return init_device_mesh("cpu", (WORLD,))


# ---- steps of DTensors beside the same steps of plain tensors ------------------------------------------

# Rows that do not divide evenly, one shard that is empty, one dimension, a parameter in two pieces by columns.
SHAPES = [(5, 3), (1, 4), (7,), (1,), (4, 6)]
PLACEMENTS = [Shard(0), Shard(0), Shard(0), Shard(0), Shard(1)]


def whole(t: torch.Tensor) -> torch.Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def pair(
    name: str, dtype: torch.dtype, plain: tuple[int, ...] = (), **kwargs: Any
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """An optimizer of whole parameters and one of the same in pieces, but for those numbered ``plain``."""
    params = cases.parameters(SHAPES, dtype)
    pieces = [
        nn.Parameter(p.detach().clone() if i in plain else distribute_tensor(p.detach(), mesh(), [placed]))
        for i, (p, placed) in enumerate(zip(params, PLACEMENTS, strict=True))
    ]
    return cases.make(name, params, **kwargs), cases.make(name, pieces, **kwargs)


def set_gradients(one: Any, other: Any, seed: int, partial: bool = False) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p, q in zip(cases.params_of(one), cases.params_of(other), strict=True):
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        if not isinstance(q, DTensor):
            q.grad = p.grad.clone()
        elif partial:
            # Halves, whose sum is exact.
            q.grad = DTensor.from_local(p.grad / 2, mesh(), [Partial()])
        else:
            q.grad = distribute_tensor(p.grad, mesh(), q.placements)


def take(one: Any, other: Any, seed: int, **kwargs: Any) -> None:
    set_gradients(one, other, seed, **kwargs)
    for optimizer in (one, other):
        if hasattr(optimizer, "step_func"):
            optimizer.step_func(1.0 + 0.1 * seed)
        elif type(optimizer).__name__.endswith("Closure"):
            optimizer.step(lambda: 0.0)
        else:
            optimizer.step()


def difference(one: Any, other: Any) -> float:
    """Largest difference of parameters and state."""
    worst = 0.0
    for p, q in zip(cases.params_of(one), cases.params_of(other), strict=True):
        assert one.state[p].keys() == other.state[q].keys()
        pairs = [(p, q)]
        for key, value in one.state[p].items():
            if isinstance(value, torch.Tensor):
                if isinstance(q, DTensor):
                    assert isinstance(other.state[q][key], DTensor), key
                    assert other.state[q][key].placements == q.placements
                pairs.append((value, other.state[q][key]))
        for a, b in pairs:
            worst = max(worst, float((a.detach().double() - whole(b.detach().double())).abs().max()))
    return worst


def pieces_step(name: str, dtype: torch.dtype, **options: Any) -> list[float]:
    """Steps, evaluations, averages: differences after each."""
    kwargs = {key: value for key, value in options.items() if key not in ("plain", "partial")}
    one, other = pair(name, dtype, options.get("plain", ()), **kwargs)
    modes = hasattr(one, "train") and "Closure" not in name
    found = []
    for seed in range(8):
        if modes:
            one.train(), other.train()
        take(one, other, seed, partial=options.get("partial", False))
        found.append(difference(one, other))
        if modes and seed % 3 == 2:
            one.eval(), other.eval()
            found.append(difference(one, other))
    return found


def pieces_average(name: str, dtype: torch.dtype) -> tuple[float, bool]:
    """averaged_state_dict of a model in pieces: its difference from eval mode, and whether it left the model."""
    model = nn.Linear(3, 5, dtype=dtype)
    fully_shard(model)
    optimizer = cases.make(name, list(model.parameters()))
    optimizer.train()
    for seed in range(5):
        for p in model.parameters():
            p.grad = distribute_tensor(
                torch.full(p.shape, 0.1 + seed, dtype=dtype), p.device_mesh, p.placements
            )
        optimizer.step()
    before = [whole(p.detach()).clone() for p in model.parameters()]
    averages = {key: whole(value) for key, value in optimizer.averaged_state_dict(model).items()}
    same = all(torch.equal(a, whole(p.detach())) for a, p in zip(before, model.parameters(), strict=True))
    optimizer.eval()
    worst = max(float((averages[k] - whole(v)).abs().max()) for k, v in model.state_dict().items())
    return worst, same


def pieces_mixed_up(name: str) -> str:
    """The refusal of parameters in one mode and a state in the other."""
    one, other = pair(name, torch.float32)
    other.train(), one.train()
    for seed in range(5):
        take(one, other, seed)
    state = copy.deepcopy(other.state_dict())
    other.eval()
    fresh = cases.make(name, [nn.Parameter(p.detach().clone()) for p in cases.params_of(other)])
    fresh.load_state_dict(state)
    try:
        fresh.train()
    except RuntimeError as error:
        return str(error)
    return ""


def pieces_resume(name: str, mode: str) -> float:
    """A state dict of one process's pieces, saved with torch.save: difference after resuming."""
    one, other = pair(name, torch.float32)
    one.train(), other.train()
    for seed in range(5):
        take(one, other, seed)
    getattr(other, mode)()
    with tempfile.TemporaryFile() as file:
        torch.save(other.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=False)
    resumed = cases.make(name, [nn.Parameter(p.detach().clone()) for p in cases.params_of(other)])
    resumed.load_state_dict(state)
    resumed.train()
    for seed in range(5, 8):
        take(one, resumed, seed)
    return difference(one, resumed)


def pieces_from_whole(name: str) -> float:
    """A state of whole tensors, loaded by an optimizer of pieces."""
    one, other = pair(name, torch.float32)
    one.train(), other.train()
    take(one, other, 0)
    take(one, other, 1)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    take(one, other, 2)
    return difference(one, other)


def pieces_norms(**kwargs: Any) -> tuple[float, float, float]:
    """grad_norm of whole parameters and of pieces, and the largest difference after clipped steps."""
    one, other = pair("AdamWScheduleFree", torch.float64, max_grad_norm=0.5, **kwargs)
    one.train(), other.train()
    for seed in range(3):
        take(one, other, seed)
    return float(one.grad_norm), float(other.grad_norm), difference(one, other)


def replicated_norm() -> tuple[float, float]:
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh(), [Replicate()]))
    optimizer = schedulefree.SGDScheduleFree([p], max_grad_norm=1.0)
    optimizer.train()
    p.grad = distribute_tensor(torch.ones(4), mesh(), [Replicate()])
    optimizer.step()
    return float(optimizer.grad_norm), 2.0


def versions_rise() -> bool:
    _, other = pair("AdamWScheduleFree", torch.float32)
    other.train()
    one, _ = pair("AdamWScheduleFree", torch.float32)
    one.train()
    before = [p._version for p in cases.params_of(other)]
    take(one, other, 0)
    return all(p._version > v for p, v in zip(cases.params_of(other), before, strict=True))


def warmup_from_zero(name: str) -> list[int]:
    """A first step with lr 0, where one process has nothing but zeros: it counts in both."""
    _, other = pair(name, torch.float32, lr=0.0)
    other.train()
    for i, p in enumerate(cases.params_of(other)):
        grad = torch.zeros(p.shape)
        if i == 0:
            grad[0] = 1.0
        p.grad = distribute_tensor(grad, mesh(), p.placements)
    other.step()
    return [cases.entry(group, "k") for group in other.param_groups]


# ---- models, as frameworks split them ------------------------------------------------------------------


class Net(nn.Module):
    """Odd sizes, and parameters of one row: empty shards."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Four layers."""
        super().__init__()
        self.up = nn.Linear(6, 10, dtype=dtype)
        self.norm = nn.LayerNorm(10, dtype=dtype)
        self.down = nn.Linear(10, 3, dtype=dtype)
        self.last = nn.Linear(3, 1, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One number for each row."""
        return self.last(self.down(torch.tanh(self.norm(self.up(x)))))


def build(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    model = Net(dtype)
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp2":
        for layer in (model.up, model.down):
            fully_shard(layer, mesh=mesh())
        return fully_shard(model, mesh=mesh())
    if kind.startswith("fsdp1"):
        return FullyShardedDataParallel(
            model, use_orig_params="flat" not in kind, device_id=torch.device("cpu")
        )
    if kind == "tp":
        # The norm and the last layer stay plain tensors in the same group.
        plan = {
            "up": ColwiseParallel(output_layouts=Replicate()),
            "down": RowwiseParallel(input_layouts=Replicate()),
        }
        return parallelize_module(model, mesh(), plan)
    assert kind == "single"
    return model


def train(kind: str, model: nn.Module, optimizer: Any, steps: range) -> list[float]:
    """Trains on one global batch, of which processes with data of their own take their part."""
    rank = dist.get_rank()
    losses = []
    for seed in steps:
        generator = torch.Generator().manual_seed(1000 + seed)
        dtype = next(model.parameters()).dtype
        inputs = torch.randn(8, 6, generator=generator, dtype=dtype)
        targets = inputs.sum(1, keepdim=True)
        if kind not in ("single", "tp"):
            inputs, targets = (t.chunk(WORLD)[rank] for t in (inputs, targets))
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        mean = loss.detach().clone()
        if kind not in ("single", "tp"):
            dist.all_reduce(mean)
            mean /= WORLD
        if hasattr(optimizer, "step_func"):
            optimizer.step_func(mean)
        else:
            optimizer.step()
        losses.append(float(mean))
    return losses


def weights(kind: str, model: nn.Module) -> list[torch.Tensor]:
    """The whole parameters."""
    if kind.startswith("fsdp1"):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return [p.detach().clone() for p in model.parameters()]
    return [whole(p.detach()).clone() for p in model.parameters()]


def framework(kind: str, name: str, **kwargs: Any) -> tuple[float, float, list[float]]:
    """Trains split and whole. Returns the worst differences of y, of x, and the norms where they are taken."""
    results = []
    for how in (kind, "single"):
        model = build(how, torch.float64)
        optimizer = cases.make(name, list(model.parameters()), **kwargs)
        optimizer.train()
        train(how, model, optimizer, range(4))
        optimizer.eval()
        x = weights(how, model)
        optimizer.train()
        train(how, model, optimizer, range(4, 8))
        norm = optimizer.grad_norm
        results.append((weights(how, model), x, None if norm is None else float(norm)))
    (y, x, norm), (single_y, single_x, single_norm) = results
    worst = [
        max(float((a - b).abs().max()) for a, b in zip(ours, single, strict=True))
        for ours, single in ((y, single_y), (x, single_x))
    ]
    return worst[0], worst[1], [] if norm is None else [norm, single_norm]


# ---- distributed checkpoints ---------------------------------------------------------------------------


def copy_model(kind: str, source: nn.Module, target: nn.Module) -> None:
    """The parameters of one model into another that is split alike."""
    with torch.no_grad():
        for p, q in zip(source.parameters(), target.parameters(), strict=True):
            q.copy_(p)


def snapshot(optimizer: Any) -> Any:
    """Everything that a step depends on."""
    return copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])


def move_beta(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        if "betas" in group:
            group["betas"] = (0.85, group["betas"][1])
        else:
            group["momentum"] = 0.85


def checkpoint(
    kind: str, name: str, flat: bool, mode: str, loader: str, through: str, moved: bool = False, **kwargs: Any
) -> tuple[float, Any, Any]:
    """Resumes and goes on beside the run that was saved, whose beta may have moved before its last step.

    Returns the largest difference at the end, and the groups of both.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = build(kind)
    optimizer = cases.make(name, list(model.parameters()), **kwargs)
    optimizer.train()
    train(kind, model, optimizer, range(6))
    if moved:
        move_beta(optimizer)
    train(kind, model, optimizer, range(6, 7))
    if mode == "eval":
        optimizer.eval()
    saved_model = copy_of_parameters(model)

    resumed_model = build(kind)
    resumed = cases.make(name, list(resumed_model.parameters()), **kwargs)
    if loader in ("train()ed", "trained", "trained, eval"):
        resumed.train()
    if loader.startswith("trained"):
        train(kind, resumed_model, resumed, range(20, 23))
    if loader == "trained, eval":
        resumed.eval()

    state = get_optimizer_state_dict(model, optimizer, options=options)
    if through == "disk":
        path = Path(shared_directory()) / "checkpoint"
        dcp.save({"optimizer": state}, checkpoint_id=path)
        state = get_optimizer_state_dict(resumed_model, resumed, options=options)
        wrapped = {"optimizer": state}
        dcp.load(wrapped, checkpoint_id=path)
        state = wrapped["optimizer"]
    with torch.no_grad():
        for p, q in zip(saved_model, resumed_model.parameters(), strict=True):
            q.copy_(p)
    set_optimizer_state_dict(resumed_model, resumed, copy.deepcopy(state), options=options)

    optimizer.train(), resumed.train()
    groups = snapshot(optimizer), snapshot(resumed)
    if through == "memory":
        train(kind, model, optimizer, range(7, 10)), train(kind, resumed_model, resumed, range(7, 10))
    pairs = list(zip(weights(kind, model), weights(kind, resumed_model), strict=True))
    return max(float((a - b).abs().max()) for a, b in pairs), *groups


def copy_of_parameters(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def shared_directory() -> str:
    """A new directory that both processes know."""
    box = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]


def reading_changes_nothing(kind: str, name: str, flat: bool, mode: str) -> tuple[float, list[int]]:
    """A get on a fresh optimizer: the difference that it makes later, and the counts after it."""
    finals, counts = [], []
    for read in (False, True):
        model = build(kind)
        optimizer = cases.make(name, list(model.parameters()))
        getattr(optimizer, mode)()
        if read:
            get_optimizer_state_dict(
                model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=flat)
            )
            counts = [cases.entry(group, "k") for group in optimizer.param_groups]
        optimizer.train()
        train(kind, model, optimizer, range(4))
        finals.append(weights(kind, model))
    return max(float((a - b).abs().max()) for a, b in zip(*finals, strict=True)), counts


def flat_keys(kind: str, name: str, mode: str) -> tuple[list[str], list[str]]:
    """Keys of flattened state dicts, ours and upstream's."""
    import schedulefree as upstream

    keys = []
    for package in (schedulefree, upstream):
        model = build(kind)
        optimizer = getattr(package, name)(model.parameters())
        optimizer.train()
        train(kind, model, optimizer, range(4))
        getattr(optimizer, mode)()
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        keys.append(sorted(get_optimizer_state_dict(model, optimizer, options=options)))
    return keys[0], keys[1]


# ---- ZeroRedundancyOptimizer ---------------------------------------------------------------------------


def zero(name: str, **kwargs: Any) -> tuple[float, float, list[list[bool]], list[torch.Tensor]]:
    """Trains with state in parts beside one process: differences of y and x, and flags after each switch."""
    from schedulefree_cpp.integrations import distributed as helpers
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model, single = build("ddp", torch.float64), build("single", torch.float64)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), getattr(schedulefree, name), **kwargs)
    alone = cases.make(name, list(single.parameters()), **kwargs)
    flags, finals = [], []
    for epoch in range(3):
        helpers.train(optimizer), alone.train()
        flags.append(
            [cases.entry(g, "train_mode") for g in (*optimizer.param_groups, *optimizer.optim.param_groups)]
        )
        steps = range(4 * epoch, 4 * epoch + 4)
        train("ddp", model, optimizer, steps), train("single", single, alone, steps)
        finals = [worst_of(model, single)]
        helpers.eval(optimizer), alone.eval()
        flags.append(
            [cases.entry(g, "train_mode") for g in (*optimizer.param_groups, *optimizer.optim.param_groups)]
        )
        finals.append(worst_of(model, single))
    return finals[0], finals[1], flags, weights("ddp", model)


def worst_of(model: nn.Module, single: nn.Module) -> float:
    pairs = zip(model.parameters(), single.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)
