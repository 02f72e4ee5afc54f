"""Degrees and what a model's architecture asks of them."""

import pytest

from titan_video.config.job_config import Parallelism
from titan_video.distributed.parallel_dims import ParallelDims, check_layout
from titan_video.models.wan import SPEC

LARGE, SMALL = SPEC.flavors["t2v-14B"], SPEC.flavors["t2v-1.3B"]


def section(**degrees):
    short = {
        "pp": "pipeline_parallel_degree",
        "cp": "context_parallel_degree",
        "tp": "tensor_parallel_degree",
        "method": "context_parallel_method",
        "ulysses": "context_parallel_ulysses_degree",
        "schedule": "pipeline_parallel_schedule",
        "replicate": "data_parallel_replicate_degree",
    }
    return Parallelism(**{short[k]: v for k, v in degrees.items()})


def test_degrees_of_a_section():
    assert ParallelDims.of(Parallelism(), 6) == ParallelDims(dp_shard=6)
    assert ParallelDims.of(section(cp=4), 8) == ParallelDims(dp_shard=2, ulysses=4)
    assert ParallelDims.of(section(cp=4, method="ring"), 8) == ParallelDims(dp_shard=2, ring=4)
    dims = ParallelDims.of(section(cp=6, method="unified", ulysses=3, tp=2, pp=2, replicate=2), 96)
    assert dims == ParallelDims(pp=2, dp_replicate=2, dp_shard=2, ring=2, ulysses=3, tp=2)
    assert (dims.dp, dims.cp, dims.sequence) == (4, 6, 12)


@pytest.mark.parametrize(
    "args, degrees, world",
    [
        (LARGE, {"cp": 5}, 5),
        (LARGE, {"cp": 8}, 8),
        (LARGE, {"cp": 40}, 40),
        (SMALL, {"cp": 3}, 3),
        (SMALL, {"cp": 6}, 6),
        (LARGE, {"tp": 8, "cp": 5}, 40),
        (LARGE, {"cp": 7, "method": "ring"}, 7),
        (LARGE, {"cp": 16, "method": "unified", "ulysses": 8}, 16),
        (LARGE, {"pp": 40}, 40),
        (LARGE, {"pp": 20, "schedule": "Interleaved1F1B"}, 20),
    ],
)
def test_legal_layouts(args, degrees, world):
    check_layout(section(**degrees), args, world)


@pytest.mark.parametrize(
    "args, degrees, world, field, legal",
    [
        (SMALL, {"cp": 8}, 8, "context_parallel_degree: given 8", "legal: 1, 2, 3, 4, 6, 12;"),
        (LARGE, {"cp": 16}, 16, "context_parallel_degree: given 16", "legal: 1, 2, 4, 5, 8, 10, 20, 40;"),
        (
            LARGE,
            {"tp": 4, "cp": 8},
            32,
            "context_parallel_degree: given 8",
            "10 heads of each tensor-parallel rank; legal: 1, 2, 5, 10;",
        ),
        (
            SMALL,
            {"cp": 16, "method": "unified", "ulysses": 8},
            16,
            "context_parallel_ulysses_degree: given 8",
            "legal: 1, 2, 3, 4, 6, 12;",
        ),
        (
            SMALL,
            {"tp": 8},
            8,
            "tensor_parallel_degree: given 8",
            "12 heads and feed-forward width 8960; legal: 1, 2, 4",
        ),
        (SMALL, {"pp": 31}, 31, "pipeline_parallel_degree: given 31", "at most 30"),
        (
            SMALL,
            {"pp": 16, "schedule": "Interleaved1F1B"},
            16,
            "pipeline_parallel_degree: given 16",
            "32 stages of 30 blocks with pipeline_parallel_schedule Interleaved1F1B; legal: at most 15",
        ),
        (LARGE, {"cp": 3}, 8, "context_parallel_degree: given 3", "legal: 1, 2, 4, 8"),
    ],
)
def test_impossible_layouts_are_refused_with_the_legal_values(args, degrees, world, field, legal):
    with pytest.raises(ValueError) as error:
        check_layout(section(**degrees), args, world)
    assert f"parallelism.{field}" in str(error.value) and legal in str(error.value), error.value
