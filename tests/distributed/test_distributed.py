"""Two processes equal one: DTensors, DDP, FSDP, tensor parallelism, ZeRO, distributed checkpoints."""

import cases
import distributed_worker as worker
import pytest
import torch

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
]

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Two processes add the halves of a gradient, one process adds all of it, both in float64.
ROUNDING = 1e-9


class Restarting:
    """The two processes, anew after a failure, which may leave one of them in a collective call."""

    def __init__(self):
        """Starts nothing yet."""
        self.ranks = None

    def __call__(self, *args, **kwargs):
        """Runs a function of the worker."""
        self.ranks = self.ranks or worker.Ranks()
        try:
            return self.ranks(*args, **kwargs)
        except BaseException:
            self.close()
            raise

    def close(self):
        """Ends them."""
        if self.ranks is not None:
            self.ranks.close()
        self.ranks = None


@pytest.fixture(scope="module")
def ranks():
    processes = Restarting()
    yield processes
    processes.close()


# ---- parameters in pieces ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.NATIVE)
def test_steps_in_pieces_are_those_of_whole_parameters(ranks, name, dtype):
    for found in ranks(worker.pieces_step, name, dtype):
        assert max(found) == 0


@pytest.mark.parametrize("name", cases.CLOSURE + cases.REFERENCE)
def test_relatives_take_pieces_too(ranks, name):
    for found in ranks(worker.pieces_step, name, torch.float32):
        assert max(found) == 0


@pytest.mark.parametrize("options", [{"partial": True}, {"plain": (0, 3)}, {"capturable": True}], ids=str)
def test_partial_gradients_and_plain_neighbours(ranks, options):
    for found in ranks(worker.pieces_step, "AdamWScheduleFree", torch.float32, **options):
        assert max(found) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_of_a_model_in_pieces(ranks, dtype):
    for worst, untouched in ranks(worker.pieces_average, "AdamWScheduleFree", dtype):
        assert worst == 0
        assert untouched


def test_a_model_in_the_other_mode_is_recognised_in_pieces(ranks):
    for message in ranks(worker.pieces_mixed_up, "AdamWScheduleFree"):
        assert "eval mode" in message


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_state_of_pieces_resumes(ranks, mode):
    assert ranks(worker.pieces_resume, "AdamWScheduleFree", mode) == [0, 0]


def test_pieces_are_taken_from_a_whole_state(ranks):
    assert ranks(worker.pieces_from_whole, "AdamWScheduleFree") == [0, 0]


def test_autograd_sees_that_pieces_are_written(ranks):
    assert ranks(worker.versions_rise) == [True, True]


# ---- sums over pieces ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"plain": (0, 3)}, {"capturable": True}], ids=str)
def test_norms_are_of_all_pieces_once(ranks, options):
    found = ranks(worker.pieces_norms, **options)
    assert found[0][1] == found[1][1]
    for whole, pieces, worst in found:
        assert pieces == pytest.approx(whole, rel=1e-14)
        assert worst < 1e-13


def test_replicas_are_counted_once(ranks):
    for found, expected in ranks(worker.replicated_norm):
        assert found == expected


@pytest.mark.parametrize("name", cases.PLUS)
def test_the_step_size_of_plus_is_of_all_pieces(ranks, name):
    for found in ranks(worker.pieces_step, name, torch.float64):
        assert max(found) < 1e-12


def test_a_first_step_at_lr_zero_counts_in_every_process(ranks):
    assert ranks(worker.warmup_from_zero, "AdamWScheduleFree") == [[1], [1]]


# ---- frameworks ----------------------------------------------------------------------------------------

FRAMEWORKS = ["ddp", "fsdp2", "fsdp1", "fsdp1 flat", "tp"]


@pytest.mark.parametrize("kind", FRAMEWORKS)
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree", "RAdamScheduleFree"])
def test_two_processes_equal_one(ranks, kind, name):
    for y, x, _ in ranks(worker.framework, kind, name, lr=0.05):
        assert y < ROUNDING
        assert x < ROUNDING


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_two_processes_clip_as_one(ranks, kind):
    found = ranks(worker.framework, kind, "AdamWScheduleFree", lr=0.05, max_grad_norm=0.3)
    assert found[0][2][0] == found[1][2][0]
    for y, x, (norm, single) in found:
        assert max(y, x) < ROUNDING
        assert norm == pytest.approx(single, rel=1e-9)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_plus_in_two_processes_equals_one(ranks, kind):
    for y, x, _ in ranks(worker.framework, kind, "AdamCScheduleFreePlus", lr=0.1):
        assert max(y, x) < ROUNDING


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "tp"])
def test_matrices_in_pieces_are_orthogonalized_whole(ranks, kind):
    kwargs = {"lr": 0.05, "weight_decay": 0.1, "normalize_rows": kind == "fsdp2"}
    for y, x, _ in ranks(worker.framework, kind, "MuonScheduleFree", **kwargs):
        assert max(y, x) < ROUNDING


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_a_checkpoint_of_matrices_in_pieces_resumes_exactly(ranks, flat):
    case = "fsdp2", "MuonScheduleFree", flat, "eval", "fresh", "memory", False
    for worst, saved, resumed in ranks(worker.checkpoint, *case, normalize_rows=True):
        assert worst == 0
        assert resumed == saved


# ---- distributed checkpoints ---------------------------------------------------------------------------

SPLITS = ["ddp", "fsdp1", "fsdp2"]


@pytest.mark.parametrize("loader", ["fresh", "train()ed", "trained"])
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("kind", SPLITS)
def test_checkpoints_resume_exactly(ranks, kind, flat, mode, loader):
    if kind == "fsdp1" and flat and loader == "trained":
        kind = "fsdp1 flat"  # torch ends the process otherwise, with torch.optim.AdamW too
    for moved in (False, True):
        for worst, saved, resumed in ranks(
            worker.checkpoint, kind, "AdamWScheduleFree", flat, mode, loader, "memory", moved
        ):
            assert worst == 0
            assert resumed == saved


# With torch.optim.AdamW too, FSDP1 misses a key of a nested state dict from disk, and ends the process for a
# flattened one and an optimizer that has state.
ON_DISK = [
    (kind, flat, loader)
    for kind in SPLITS
    for flat in (False, True)
    for loader in ("fresh", "train()ed", "trained", "trained, eval")
    if kind != "fsdp1" or (flat and not loader.startswith("trained"))
]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(("kind", "flat", "loader"), ON_DISK)
def test_checkpoints_on_disk_resume_exactly(ranks, kind, flat, mode, loader):
    for worst, saved, resumed in ranks(
        worker.checkpoint, kind, "AdamWScheduleFree", flat, mode, loader, "disk", True
    ):
        assert worst == 0
        assert resumed == saved


@pytest.mark.parametrize("kind", SPLITS)
@pytest.mark.parametrize("name", ["SGDScheduleFree", "RAdamScheduleFree", "AdamWScheduleFree"])
def test_other_classes_resume_too(ranks, name, kind):
    kwargs = {"inner_momentum": 0.8} if name == "AdamWScheduleFree" else {}
    for worst, _, _ in ranks(worker.checkpoint, kind, name, True, "eval", "fresh", "memory", **kwargs):
        assert worst == 0


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("kind", SPLITS)
def test_reading_a_fresh_optimizer_changes_nothing(ranks, kind, flat, mode):
    for worst, counts in ranks(worker.reading_changes_nothing, kind, "AdamWScheduleFree", flat, mode):
        assert worst == 0
        assert counts == [0]


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree"])
def test_flattened_keys_are_upstreams(ranks, name, mode):
    for ours, upstreams in ranks(worker.flat_keys, "ddp", name, mode):
        assert ours == upstreams


# ---- ZeroRedundancyOptimizer ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree"])
def test_zero_switches_modes_everywhere(ranks, name):
    found = ranks(worker.zero, name, lr=0.05)
    for y, x, flags, _ in found:
        assert max(y, x) < ROUNDING
        assert flags == 3 * [[True, True], [False, False]]
    cases.assert_same(*(parameters for _, _, _, parameters in found))
