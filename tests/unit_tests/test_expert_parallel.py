"""Expert parallel without ranks: degrees that are refused, and the shards of stacked experts in closed form."""

from dataclasses import replace

import pytest

from tests.unit_tests.config_cases import BASE
from titan_video.config import from_dict
from titan_video.config.check import check
from titan_video.config.job_config import Parallelism
from titan_video.config.manager import ConfigError
from titan_video.distributed.parallel_dims import ParallelDims, check_layout
from titan_video.models.wan import SPEC
from titan_video.planner.memory import get_unit, shard_shape

PLAN, DENSE, MOE = SPEC.plan, SPEC.flavors["debug"], SPEC.flavors["moe-debug"]


def message(world, **sections):
    with pytest.raises(ConfigError) as error:
        check(from_dict(BASE | sections), world, files=False)
    return str(error.value)


def degrees(**short):
    return {f"{name}_parallel_degree": degree for name, degree in short.items()}


def test_the_degree_is_one_of_the_mesh():
    assert ParallelDims.of(Parallelism(**degrees(expert=4, context=2)), 8) == ParallelDims(dp_shard=4, ulysses=2, ep=4)
    check(from_dict(BASE | {"parallelism": degrees(expert=4, context=2, tensor=2)}), 8, files=False)


@pytest.mark.parametrize(
    "world, sections, words",
    [
        (6, {"parallelism": degrees(expert=4)}, "given 4, which does not divide the 6 ranks of a model's copy"),
        (8, {"parallelism": degrees(expert=8, pipeline=2)}, "the 4 ranks of a model's copy"),
        (8, {"parallelism": degrees(expert=8) | {"data_parallel_replicate_degree": 2}}, "legal: 1, 2, 4"),
        (4, {"parallelism": degrees(expert=2), "compile": {"enable": True}}, "set compile.enable to false"),
        (4, {"parallelism": degrees(expert=2), "lora": {"enable": True}}, "lora.enable trains no experts"),
        (
            4,
            {
                "parallelism": degrees(expert=2, pipeline=2) | {"pipeline_parallel_schedule": "InterleavedZeroBubble"},
            },
            "choose Interleaved1F1B",
        ),
    ],
)
def test_what_cannot_run_is_refused(world, sections, words):
    text = message(world, **sections)
    assert "parallelism.expert_parallel_degree: given" in text and words in text, text


@pytest.mark.parametrize(
    "args, degree, words",
    [
        (DENSE, 2, "the model has no experts"),
        (
            replace(MOE, experts=replace(MOE.experts, num_experts=6)),
            4,
            "which does not divide the model's 6 experts; legal: 1, 2",
        ),
    ],
)
def test_the_model_must_have_the_experts(args, degree, words):
    with pytest.raises(ValueError, match=words):
        check_layout(Parallelism(**degrees(expert=degree)), args, 8)


@pytest.mark.parametrize(
    "dims, shape",
    [
        (ParallelDims(dp_shard=4), (2, 6, 5)),
        (ParallelDims(dp_shard=4, tp=2), (1, 6, 5)),
        (ParallelDims(dp_shard=4, ep=2), (2, 6, 5)),
        (ParallelDims(dp_shard=8, tp=2, ep=8), (1, 3, 5)),
        (ParallelDims(dp_shard=12, tp=2), (1, 6, 5)),  # 24 ranks divide neither 8 nor 6
    ],
)
def test_closed_form_of_an_expert_shard(dims, shape):
    assert shard_shape("blocks.0.moe.experts.up", (8, 6, 5), PLAN, dims) == shape
    assert shard_shape("blocks.0.self_attn.q.weight", (8, 6), PLAN, dims)[0] == -(-8 // dims.tp // dims.dp_shard)
    assert get_unit("blocks.0.moe.experts.up", PLAN) == "blocks.0.moe.experts"
