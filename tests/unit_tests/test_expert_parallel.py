"""Expert parallel without ranks: degrees that are refused, and the shards of stacked experts in closed form."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import expert_parallel as expert_traffic
from benchmarks import traffic
from tests.helpers import ROOT
from tests.unit_tests.config_cases import BASE
from titan_video.config import from_dict
from titan_video.config.check import check
from titan_video.config.job_config import Optimizer, Parallelism
from titan_video.config.manager import ConfigError
from titan_video.distributed.parallel_dims import ParallelDims, check_layout
from titan_video.kernels.grouped import grouped_linear
from titan_video.models.wan import SPEC
from titan_video.optim.optimizer import build_optimizer, updated_by
from titan_video.planner.dry_run.memory import get_unit, shard_shape

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
    ],
)
def test_what_cannot_run_is_refused(world, sections, words):
    text = message(world, **sections)
    assert "parallelism.expert_parallel_degree: given" in text and words in text, text


ZERO_BUBBLE = {"pipeline_parallel_schedule": "InterleavedZeroBubble"}


@pytest.mark.parametrize("sections", [{"lora": {"enable": True}}, {"parallelism": degrees(pipeline=2) | ZERO_BUBBLE}])
@pytest.mark.parametrize("expert", [1, 2])
@pytest.mark.parametrize("flavor", ["moe-debug", "hf"])
def test_a_rule_of_all_mixtures_is_said_once(tmp_path, sections, expert, flavor):
    """Whatever the degree. Of a folder, when the configuration asks for experts."""
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(SPEC.args_to_hf(MOE)))
    if flavor == "hf" and expert == 1:
        pytest.skip("no value of the configuration says that the model has experts: `build` refuses it")
    model = BASE.get("model", {}) | {"flavor": flavor, "hf_assets_path": str(tmp_path)}
    given = sections.get("parallelism", {}) | degrees(expert=expert)
    text = message(4, **sections | {"model": model, "parallelism": given})
    about = [line for line in text.splitlines() if "expert" in line]
    assert len(about) == 1 and ("lora.enable: true, but there are" in text) == ("lora" in sections), text
    assert ("InterleavedZeroBubble, but the backward of experts" in text) == ("lora" not in sections)


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
        (ParallelDims(dp_shard=4, tp=2), (2, 6, 5)),
        (ParallelDims(dp_shard=4, tp=2, ep=2), (1, 6, 5)),
        (ParallelDims(dp_shard=4, ep=2), (2, 6, 5)),
        (ParallelDims(dp_shard=8, tp=2, ep=8), (1, 3, 5)),
        (ParallelDims(dp_shard=12, tp=2), (1, 6, 5)),  # 12 ranks divide neither 8 nor 6
    ],
)
def test_closed_form_of_an_expert_shard(dims, shape):
    assert shard_shape("blocks.0.moe.experts.up", (8, 6, 5), PLAN, dims) == shape
    assert shard_shape("blocks.0.self_attn.q.weight", (8, 6), PLAN, dims)[0] == -(-8 // dims.tp // dims.dp_shard)
    unit = "blocks.0.moe.experts" if dims.ep > 1 else "blocks.0"
    assert get_unit("blocks.0.moe.experts.up", PLAN, dims.ep) == unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_experts_without_rows_have_gradients_of_zero(dtype):
    """Those of a rank whose experts no token has chosen: FSDP needs a gradient from every rank."""
    rows, counts = torch.empty(0, 16, dtype=dtype, requires_grad=True), torch.zeros(2, dtype=torch.int64)
    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 16, 24), (2, 24))]
    out = grouped_linear(rows, *weights, counts, 0)
    out.sum().backward()
    assert out.shape == (0, 24) and rows.grad.shape == rows.shape
    assert all(w.grad.shape == w.shape and not w.grad.any() for w in weights)


def updated(tensors, name):
    """The tensors, by name, after two steps."""
    model = nn.ModuleDict({"blocks": nn.ParameterDict({key: t.clone() for key, t in tensors.items()})})
    optimizer = build_optimizer(model, Optimizer(name=name, lr=0.1, weight_decay=0.1), ("blocks",), seed=3)
    for step in (1, 2):
        for key, p in model["blocks"].items():
            p.grad = (tensors[key] * step).cos()
        optimizer.step()
    return {key: p.detach() for key, p in model["blocks"].items()}


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_stacked_weights_are_rounded_like_a_matrix_of_all_rows(name):
    stacked = torch.randn(3, 8, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = updated({"w": stacked}, name)["w"]
    assert torch.equal(found.flatten(0, 1), updated({"w": stacked.flatten(0, 1)}, name)["w"])
    assert not torch.equal(found, stacked)


def test_muon_orthogonalizes_each_stacked_matrix():
    """There are more of them than rows or columns, which set the size of the update."""
    stacked = torch.randn(24, 8, 20, generator=torch.Generator().manual_seed(0))
    found = updated({"w": stacked}, "Muon")["w"]
    assert torch.equal(
        found, torch.stack(list(updated({f"w{i:02}": x for i, x in enumerate(stacked)}, "Muon").values()))
    )


def test_biases_of_experts_are_vectors():
    kinds = {
        (name, ndim): updated_by(f"blocks.0.moe.experts.{name}", ndim, "Muon", ("blocks",))
        for name, ndim in (("up", 3), ("up_bias", 2))
    }
    assert kinds == {("up", 3): "Muon", ("up_bias", 2): "AdamW"}
    assert updated_by("routers.0.weight", 2, "AdamW8bit", ("blocks",)) == "AdamW"


def test_the_page_has_the_table_that_the_script_prints():
    page = (ROOT / "docs" / "expert_parallel.md").read_text()
    assert page.split(traffic.MARKER)[1].strip() == expert_traffic.page("moe-14B-shared", 75600, ranks=64, cp=8)
