"""Results do not depend on the instruction set or the number of threads."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import schedulefree_cpp
import torch

# Every operator over every format, special values included, with 1, 2 and 7 threads; prints what ran.
PROGRAM = """
import sys
import torch
import cases, test_ops
from schedulefree_cpp import _C, ops

def special(dtype):
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny, -info.tiny / 2, info.max, info.min, torch.inf, -torch.inf, torch.nan, 1.0, 1e-6]
    grid = torch.tensor(values, dtype=torch.float64).to(dtype)
    return [grid.repeat(11), grid.repeat_interleave(11)]

results = []
for threads in (1, 2, 7):
    torch.set_num_threads(threads)
    out = []
    for format in cases.FORMATS.values():
        shapes = [*cases.SHAPES, cases.LARGE, *[(5,)] * 700]
        lists = cases.lists_of(format, shapes)
        edge, state = special(format.dtype), special(torch.float64 if format.dtype == torch.float64 else torch.float32)
        values = {"y": edge[0], "grad": edge[1], "z": state[0], "exp_avg_sq": state[1].abs(), "exp_avg": state[0]}
        for name, value in values.items():
            first = lists[name][0]
            lists[name].append(value.to(first.dtype, copy=True) if first.is_floating_point() else torch.arange(len(value)).to(first))
        for name in ("y_lo", "z_lo"):
            if lists[name]:
                lists[name].append(torch.arange(len(edge[0])).sub(60).to(lists[name][0]))
        if lists["exp_avg_sq_scale"]:
            lists["exp_avg_sq_scale"].append(torch.ones(1))
        kw = {**test_ops.ADAM, "weight_decay": 0.1}
        for stochastic in (0.0, 1.0):
            more = {"k": 3 + stochastic, "stochastic": stochastic}
            cases.call(ops, "adamw_step_", lists, ops.coefs(**kw, **more))
            cases.call(ops, "adamw_step_", lists, ops.coefs(**kw, **more, inner_momentum=0.9), decay_at=1)
        cases.call(ops, "sgd_step_", lists, ops.coefs(lr=0.1, w=0.7, a=-0.05, weight_decay=0.1, beta=0.95))
        cases.call(ops, "sgd_step_", lists, ops.coefs(lr=0.1, w=0.2, a=-0.05, beta=0.6))
        cases.call(ops, "y_to_x_", lists, beta=0.9)
        cases.call(ops, "x_to_y_", lists, beta=0.95)
        if format in cases.LENT.values():
            for exchange in {False, format in cases.EXCHANGED.values()}:
                for decay, w in ((0.1, 0.3), (0.0, 1.0), (0.0, 0.0)):
                    coefs = ops.coefs(lr=0.1, weight_decay=decay, w=w, beta=0.8)
                    cases.call(ops, "before_base_step_", lists, coefs, beta=0.95, exchange=exchange)
                    cases.call(ops, "after_base_step_", lists, coefs, exchange=exchange)
        finite = {name: tensors[:-1] for name, tensors in lists.items()}
        out.append(cases.call(ops, "polyak_sums", finite))
        out.append(ops.grad_norm(finite["grad"]))
        out += [t for name, tensors in lists.items() for t in tensors]
    results.append(out)
for other in results[1:]:
    for a, b in zip(results[0], other, strict=True):
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0)) if a.is_floating_point() else torch.equal(a, b)
torch.save(results[0], sys.argv[1])
print(_C.cpu_isa())
"""


def run(isa: str, path: Path) -> subprocess.CompletedProcess[str]:
    path_of_modules = os.pathsep.join(
        [*map(str, Path(__file__).parents[:2]), os.environ.get("PYTHONPATH", "")]
    )
    environment = {**os.environ, "SCHEDULEFREE_CPU_ISA": isa, "PYTHONPATH": path_of_modules}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], env=environment, capture_output=True, text=True
    )


def available() -> list[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    known = {"AVX512": ["baseline", "avx2", "avx512"], "AVX2": ["baseline", "avx2"]}
    return known.get(capability, ["baseline"])


def test_all_isas_and_thread_counts_agree_bit_for_bit(tmp_path):
    results = {}
    for isa in available():
        done = run(isa, tmp_path / isa)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == isa
        results[isa] = torch.load(tmp_path / isa)
    for isa, tensors in results.items():
        for a, b in zip(tensors, results["baseline"], strict=True):
            assert torch.equal(a.isnan(), b.isnan()), isa
            numbers = [t.nan_to_num(123.0) if t.is_floating_point() else t for t in (a, b)]
            assert torch.equal(*numbers), isa


@pytest.mark.parametrize("isa", ["avx1024", "AVX2"])
def test_an_unknown_isa_is_refused_by_name(isa, tmp_path):
    done = run(isa, tmp_path / "out")
    assert done.returncode != 0
    assert f"SCHEDULEFREE_CPU_ISA: expected one of {', '.join(reversed(available()))}" in done.stderr
    assert f"got '{isa}'" in done.stderr


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is missing")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="kernels of x86-64")
def test_the_loops_of_adamw_are_vectorised():
    """A loop that a compiler leaves in scalars gives the same bits, three times as slowly."""
    library = Path(schedulefree_cpp.__file__).parent / "libschedulefree_cpp.so"
    code = subprocess.run(["objdump", "-d", library], check=True, capture_output=True, text=True).stdout
    loops = 3 * 2  # decay at y, at z or nowhere; with inner momentum or without
    for root in ("vsqrtps", "vsqrtpd"):
        for register in ("ymm", "zmm"):
            assert len(re.findall(rf"{root} +%{register}|{root} +.*,%{register}", code)) >= loops, (
                root,
                register,
            )
