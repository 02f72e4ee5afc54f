"""The optimizer's kernels in Triton's interpreter; launches and bytes of a step of 14B; Muon's batches."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from benchmarks import optimizer as counted
from tests.helpers import ROOT, run_ranks
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.optim import muon
from titan_video.optim.muon import RoundRobinOwners, orthogonalize

HAS_TRITON = find_spec("triton") is not None
TRITON = tuple(int(n) for n in version("triton").split(".")[:2]) if HAS_TRITON else (0, 0)
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs the triton package")


@needs_triton
@pytest.mark.skipif(
    TRITON < (3, 7) and tuple(int(n) for n in np.__version__.split(".")[:2]) >= (2, 4),
    reason="Triton 3.6 interprets with NumPy before 2.4",
)
def test_kernels_equal_the_plain_updates_in_the_interpreter():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.optimizer_cases"]
    run = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.strip() == "6 cases"


@needs_triton
@pytest.mark.parametrize("name, ranks", [("AdamW8bit", 8), ("Muon", 8)])
def test_launches_and_bytes_of_a_step_of_14b(name, ranks):
    """On one rank of eight, counted by benchmarks/optimizer.py. In plain torch there are thousands of launches."""
    found = counted.count("t2v-14B", name, ranks)
    assert found["launches"] <= counted.BAR_LAUNCHES, found["by operator"]
    moved = found["bytes per element"]
    assert moved["AdamW8bit" if name == "AdamW8bit" else "muon_apply"] <= counted.BAR_BYTES, moved


def test_foreach_launches_follow_torchs_limits():
    assert counted.foreach_launches([1]) == 1 and counted.foreach_launches([]) == 0
    assert counted.foreach_launches([counted.CHUNK * counted.MAX_BLOCKS]) == 1
    assert counted.foreach_launches([counted.CHUNK * counted.MAX_BLOCKS + 1]) == 2
    assert counted.foreach_launches([1] * 64) == 1 and counted.foreach_launches([1] * 65) == 2


def test_a_batch_is_orthogonalized_as_its_matrices_are():
    x = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for batch in (x, x.mT.contiguous()):
        for one, matrix in zip(orthogonalize(batch), batch, strict=True):
            torch.testing.assert_close(one, orthogonalize(matrix), rtol=1e-10, atol=1e-12)


SHAPES = {"a": (24, 16), "b": (24, 16), "c": (16, 40), "d": (24, 16), "e": (10, 8), "f": (16, 40), "g": (24, 16)}


def in_batches(layout):
    """[(dtype, limit of a batch, largest error of any matrix, number of exchanges)] on these ranks."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dims = ParallelDims(dp_shard=2, tp=2) if layout == "columns" else ParallelDims(dp_shard=2)
    mesh = dims.build_mesh("cpu").world["dp_shard", "tp"] if layout == "columns" else dims.build_mesh("cpu").fsdp
    placements = [Shard(0), Shard(1)] if layout == "columns" else [Shard(0)] * mesh.ndim
    generator = torch.Generator().manual_seed(0)
    full = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    params = {
        torch.nn.Parameter(distribute_tensor(x, mesh, placements, src_data_rank=None)): name for name, x in full.items()
    }
    owners, exchange, found = RoundRobinOwners(params), muon._exchange, []
    for dtype in (torch.float32, torch.bfloat16):
        for limit in (1, 1 << 20):
            exchanges, errors = [], []
            muon.MAX_ELEMENTS = limit
            muon._exchange = lambda *lists, seen=exchanges: seen.append(1) or exchange(*lists)
            results = owners.orthogonalize({p: p.to_local().detach().to(dtype).clone() for p in params})
            for p, name in params.items():
                result = DTensor.from_local(
                    results[p], mesh, placements, run_check=False, shape=p.shape, stride=p.stride()
                )
                expected = orthogonalize(full[name].to(dtype))
                errors.append((result.full_tensor().float() - expected.float()).abs().max().item())
            found.append((dtype, limit, max(errors), len(exchanges)))
    return found


@pytest.mark.parametrize("layout, ranks", [("rows", 2), pytest.param("columns", 4, marks=pytest.mark.slow)])
def test_owners_take_several_matrices_at_a_time(layout, ranks):
    """One at a time or all at once: the same matrices, bit for bit in float32."""
    for found in run_ranks(in_batches, ranks, layout):
        for dtype, limit, error, exchanges in found:
            assert error <= (0.0 if dtype == torch.float32 else 0.03), (dtype, limit, error)
            assert exchanges == 2 * (-(-len(SHAPES) // ranks) if limit == 1 else 1)
