"""The closed forms of memory by hand-counted sizes; against the dry run they are held in
tests/integration_tests/test_dry_run.py.
"""

import math

import pytest

from titan_video.config.job_config import ActivationCheckpoint, JobConfig, Optimizer, Training
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models.wan import FLAVORS, SPEC
from titan_video.planner.dry_run.memory import estimate, get_unit, shard_shape, state, wan_activations

ARGS = FLAVORS["t2v-14B"]


@pytest.mark.parametrize(
    "name, shape, dims, expected",
    [
        ("blocks.0.ffn.up.weight", (13824, 5120), ParallelDims(), 13824 * 5120),
        ("blocks.0.ffn.up.weight", (13824, 5120), ParallelDims(dp_shard=8), 13824 * 5120 // 8),
        (
            "blocks.0.ffn.up.weight",
            (13824, 5120),
            ParallelDims(dp_replicate=4, dp_shard=2, ulysses=4),
            13824 * 5120 // 8,
        ),
        ("blocks.0.ffn.up.weight", (13824, 5120), ParallelDims(dp_shard=2, tp=4), 13824 * 5120 // 8),
        ("blocks.0.ffn.down.weight", (5120, 13824), ParallelDims(dp_shard=2, tp=4), 5120 * 13824 // 8),
        (
            "blocks.0.ffn.down.bias",
            (5120,),
            ParallelDims(dp_shard=2, tp=4),
            5120 // 2,
        ),  # whole on each tensor-parallel rank
        ("blocks.0.self_attn.norm_q", (5120,), ParallelDims(tp=4), 5120 // 4),
        ("blocks.0.norm_weight", (5120,), ParallelDims(tp=4), 5120),
        ("proj_out.weight", (64, 5120), ParallelDims(dp_shard=2, tp=4), 64 * 5120 // 8),  # outside the blocks
        ("modulation.7", (6, 5120), ParallelDims(dp_shard=512), 5120),  # a row at least
    ],
)
def test_largest_shard(name, shape, dims, expected):
    assert math.prod(shard_shape(name, shape, SPEC.plan, dims)) == expected


def test_state_of_14b_on_eight_ranks():
    """14.29 G parameters, 16 bytes of each between the four kinds."""
    sizes = estimate(JobConfig(), SPEC, ARGS, ParallelDims(dp_shard=8), 32760)
    assert (
        sizes["parameters"]
        == sizes["gradients"]
        == sizes["optimizer"] // 2
        == pytest.approx(4 * 14.289e9 / 8, rel=1e-3)
    )


def test_state_of_14b_on_one_gpu():
    """All of it trains on 141 GB with bfloat16 weights, 8-bit moments and the gradients of one unit at a time.

    The root is the largest unit.
    """
    training = Training(dtype="bfloat16", max_norm=0.0)
    sizes = state(
        JobConfig(training=training, optimizer=Optimizer(name="AdamW8bit", in_backward=True)),
        SPEC,
        ARGS,
        ParallelDims(),
    )
    assert sizes["parameters"] == pytest.approx(2 * 14.289e9, rel=0.02)  # time_proj, 157 M of them, is float32
    assert sizes["optimizer"] == pytest.approx((2 + 8 / 64) * 14.289e9, rel=1e-2)
    assert sizes["gradients"] == pytest.approx(4 * 186.1e6, rel=1e-2)
    muon = state(JobConfig(training=training, optimizer=Optimizer(name="Muon")), SPEC, ARGS, ParallelDims(dp_shard=8))
    assert muon["optimizer"] == pytest.approx((4 * 14.06e9 + 8 * 0.229e9) / 8, rel=1e-2)


def test_units_of_fsdp():
    names = (
        "blocks.11.ffn.up.weight",
        "patch_embedding.weight",
        "text_embedder.up.bias",
        "time_proj.weight",
        "modulation.3",
        "head_modulation",
    )
    assert [get_unit(name, SPEC.plan) for name in names] == [
        "blocks.11",
        "patch_embedding",
        "text_embedder",
        "",
        "",
        "",
    ]


def test_activations_follow_the_mode():
    dims, tokens = ParallelDims(ulysses=8), 75600
    sizes = {
        mode: wan_activations(ARGS, ActivationCheckpoint(mode=mode), dims, tokens, 1, 2)
        for mode in ("none", "selective", "full")
    }
    rows, attention = tokens // 8, (2 * ARGS.dim + 4 * ARGS.num_heads) * tokens // 8
    # Output and log-sum-exp of every block, of which those of the block that is recomputed are in both; and the result
    # of every feed-forward, which is no input of backward otherwise.
    down = 2 * ARGS.dim * rows
    assert sizes["selective"] - sizes["full"] == (ARGS.num_layers - 1) * attention + ARGS.num_layers * down
    block = (60 * ARGS.dim + 4 * ARGS.ffn_dim) * rows  # in bfloat16, but for a few numbers a row and the text
    assert sizes["none"] == pytest.approx(ARGS.num_layers * block, rel=0.02)
    inputs = 2 * ARGS.dim * rows * ARGS.num_layers
    assert sizes["full"] == pytest.approx(inputs + block, rel=0.03)


def test_what_has_no_closed_form_is_refused():
    for args, section, named in (
        (FLAVORS["i2v-14B"], ActivationCheckpoint(), "closed form"),
        (ARGS, ActivationCheckpoint(mode="full", offload=True), "offload"),
        (ARGS, ActivationCheckpoint(mode="memory_budget"), "memory_budget"),
    ):
        with pytest.raises(ValueError, match=named):
            wan_activations(args, section, ParallelDims(), 100, 1, 2)
    with pytest.raises(ValueError, match="pipeline"):
        estimate(JobConfig(training=Training()), SPEC, ARGS, ParallelDims(pp=2), 100)
