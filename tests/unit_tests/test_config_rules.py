"""Rules across fields (config/check.py and the `rules` it collects), and the command that checks a run."""

import runpy
import sys
from dataclasses import replace

import pytest
import tomli_w

from tests.helpers import ROOT
from tests.unit_tests.config_cases import WORLD, get_message, with_values
from titan_video.config import ConfigError, JobConfig, from_dict
from titan_video.config.check import FILE_RULES, PART_RULES, RULES, check
from titan_video.config.job_config import Data, Parallelism, Training
from titan_video.config.parts import PARTS
from titan_video.data.batching import gradient_accumulation
from titan_video.distributed import fsdp
from titan_video.distributed.parallel_dims import data_parallel_degrees
from titan_video.tools.parts import resolve

COMBINATIONS = [  # (what is set, fields the message names, a piece of the fix)
    ({"data.path": ""}, "data.path", "embedded:shapes-N"),
    ({"data.path": "embedded:shapes-0"}, "data.path", "embedded:shapes-N"),
    ({"data.path": "embedded:shapes-100001"}, "data.path", "100000"),
    ({"data.path": "embedded:shapes-"}, "data.path", "embedded:shapes-N"),
    ({"data.path": "embedded:shape-5"}, "data.path", "embedded:shapes-N"),
    ({"data.path": "embedded:shapes-5x"}, "data.path", "embedded:shapes-N"),
    ({"data.path": "/no/such/folder"}, "data.path", "does not exist"),
    ({"data.path": __file__}, "data.path", ".jsonl"),
    ({"data.path": "clips/*.mp4"}, "data.path", ".tar"),
    ({"data.path": "s3://bucket/clips"}, "data.path", ".tar"),
    ({"data.source": [{"path": "embedded:shapes-8"}]}, "data.path", "data.source"),
    (
        {"data.path": "", "data.source": [{"path": "embedded:shapes-8"}, {"path": "/no/such"}]},
        "data.source: item 1: path",
        "does not exist",
    ),
    ({"data.path": "", "data.source": [{"num_repeats": 2}]}, "data.source: item 0: path", "empty"),
    ({"data.source": [{"num_repeat": 2}]}, "data.source", "nearest known name: num_repeats"),
    ({"data.resolutions": [512]}, "data.resolutions", "set buckets to []"),
    ({"data.buckets": [], "data.resolutions": [512], "data.frame_buckets": []}, "data.frame_buckets", "[81]"),
    ({"data.frame_buckets": [1, 32]}, "data.frame_buckets", "29 or 33"),
    ({"data.min_ar": 3.0}, "data.min_ar", "data.max_ar"),
    ({"data.cache_folder": __file__}, "data.cache_folder", "folder"),
    ({"data.buckets": []}, "data.buckets", "at least one"),
    ({"data.buckets": [[]]}, "data.buckets", "[frames, height, width]"),
    ({"data.buckets": [[17, 64]]}, "data.buckets", "[frames, height, width]"),
    ({"data.buckets": [[17, 64, 64, 3]]}, "data.buckets", "[frames, height, width]"),
    ({"data.buckets": [[16, 64, 64]]}, "data.buckets", "13 or 17"),
    ({"data.buckets": [[17, 72, 64]]}, "data.buckets", "64 or 80"),
    ({"data.buckets": [[17, 64, 8]]}, "data.buckets", "nearest: 16"),
    ({"data.buckets": [[17, 64, 64], [1, 64, 64], [17, 64, 64]]}, "data.buckets", "twice"),
    ({"parallelism.data_parallel_replicate_degree": 3}, "parallelism.data_parallel_replicate_degree", "1, 2, 4"),
    ({"parallelism.data_parallel_replicate_degree": 8}, "parallelism.data_parallel_replicate_degree", "1, 2, 4"),
    ({"parallelism.data_parallel_shard_degree": 0}, "parallelism.data_parallel_shard_degree", "legal: 4"),
    ({"parallelism.data_parallel_shard_degree": 2}, "parallelism.data_parallel_shard_degree", "legal: 4"),
    ({"parallelism.data_parallel_shard_degree": 8}, "parallelism.data_parallel_shard_degree", "legal: 4"),
    (
        {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 4},
        "parallelism.data_parallel_shard_degree",
        "legal: 2",
    ),
    ({"parallelism.tensor_parallel_degree": 3}, "parallelism.tensor_parallel_degree", "legal: 1, 2, 4"),
    ({"parallelism.pipeline_parallel_degree": 8}, "parallelism.pipeline_parallel_degree", "legal: 1, 2, 4"),
    (
        {"parallelism.tensor_parallel_degree": 2, "parallelism.context_parallel_degree": 4},
        "parallelism.context_parallel_degree",
        "the 2 ranks that tensor_parallel_degree 2 leaves; legal: 1, 2",
    ),
    (
        {
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.tensor_parallel_degree": 2,
            "parallelism.context_parallel_degree": 2,
        },
        "parallelism.context_parallel_degree",
        "legal: 1",
    ),
    (
        {"parallelism.context_parallel_degree": 2, "parallelism.data_parallel_shard_degree": 4},
        "parallelism.data_parallel_shard_degree",
        "legal: 2",
    ),
    (
        {"parallelism.context_parallel_degree": 4, "training.global_batch_size": 6, "training.local_batch_size": 4},
        "training.global_batch_size",
        "4 or 8",
    ),
    (
        {"parallelism.enable_async_tensor_parallel": True, "parallelism.tensor_parallel_degree": 2},
        "parallelism.enable_async_tensor_parallel",
        "set compile.enable",
    ),
    (
        {"parallelism.enable_async_tensor_parallel": True, "compile.enable": True},
        "parallelism.enable_async_tensor_parallel",
        "parallelism.tensor_parallel_degree",
    ),
    (
        {
            "parallelism.context_parallel_degree": 4,
            "parallelism.context_parallel_method": "unified",
            "parallelism.context_parallel_ulysses_degree": 3,
        },
        "parallelism.context_parallel_ulysses_degree",
        "legal: 1, 2, 4",
    ),
    (
        {"parallelism.context_parallel_degree": 4, "parallelism.context_parallel_ulysses_degree": 2},
        "parallelism.context_parallel_ulysses_degree",
        "unified",
    ),
    (
        {
            "parallelism.pipeline_parallel_degree": 2,
            "training.local_batch_size": 4,
            "parallelism.pipeline_parallel_microbatch_size": 3,
        },
        "parallelism.pipeline_parallel_microbatch_size",
        "legal: 1, 2, 4",
    ),
    ({"parallelism.pipeline_parallel_split": [0, 1]}, "parallelism.pipeline_parallel_split", "degree is 1"),
    (
        {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_split": [0, 1, 2]},
        "parallelism.pipeline_parallel_split",
        "2 on 2 ranks; legal: 2 numbers",
    ),
    *(
        (
            {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_split": split},
            "parallelism.pipeline_parallel_split",
            "begin with 0 and rise",
        )
        for split in ([1, 2], [0, 0])
    ),
    *(
        ({"activation_checkpoint.range": ranges} | more, f"activation_checkpoint.{field}", fix)
        for ranges, more, field, fix in (
            ([{"layers": "2-1"}], {}, "range: item 0: layers", "such as 0-9, or one number"),
            ([{"layers": ""}], {}, "range: item 0: layers", "such as 0-9, or one number"),
            ([{"layers": "0-2"}, {"layers": "2"}], {}, "range: item 1: layers", "block 2 is in item 0 too"),
            ([{"layers": "0", "mode": "half"}], {}, "range", "one of none, selective, full"),
            ([{"layers": "0", "mode": "full", "save": ["down"]}], {}, "range: item 0: save", "choose selective"),
            ([{"layers": "0", "mode": "selective", "save": ["exchange"]}], {}, "range: item 0: save", "take it out"),
            ([{"layers": "0", "mode": "none", "offload": True}], {}, "range: item 0: offload", "choose full"),
            ([{"layers": "0"}], {"activation_checkpoint.layers": [3]}, "layers", "leave it empty"),
            (
                [{"layers": "0"}],
                {"activation_checkpoint.mode": "memory_budget", "compile.enable": True},
                "range",
                "applies to all blocks",
            ),
        )
    ),
    (
        {
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble",
            "compile.enable": True,
        },
        "parallelism.pipeline_parallel_schedule",
        "Interleaved1F1B",
    ),
    (
        {"optimizer.in_backward": True, "training.max_norm": 0.0, "training.read_late": True},
        "optimizer.in_backward",
        "training.read_late",
    ),
    ({"activation_checkpoint.mode": "memory_budget"}, "activation_checkpoint.mode", "compile.enable"),
    (
        {"activation_checkpoint.mode": "memory_budget", "compile.enable": True, "activation_checkpoint.layers": [0]},
        "activation_checkpoint.layers",
        "leave it empty",
    ),
    (
        {"activation_checkpoint.mode": "selective", "activation_checkpoint.save": []},
        "activation_checkpoint.save",
        "at least one",
    ),
    (
        {"activation_checkpoint.mode": "selective", "activation_checkpoint.save": ["attention", "exchange"]},
        "activation_checkpoint.save",
        "Ulysses",
    ),
    ({"activation_checkpoint.save": ["attention", "attention"]}, "activation_checkpoint.save", "twice"),
    ({"activation_checkpoint.layers": [1, 1]}, "activation_checkpoint.layers", "twice"),
    ({"activation_checkpoint.offload": True}, "activation_checkpoint.offload", "choose full"),
    ({"training.global_batch_size": 0}, "training.global_batch_size", "nearest 4,"),
    ({"training.global_batch_size": 2}, "training.global_batch_size", "nearest 4,"),
    ({"training.global_batch_size": 6}, "training.global_batch_size", "4 or 8"),
    ({"training.global_batch_size": 12, "training.local_batch_size": 2}, "training.global_batch_size", "8 or 16"),
    (
        {"data.tokens_per_microbatch": 99, "training.local_batch_size": 2},
        "training.local_batch_size",
        "data.tokens_per_microbatch",
    ),
    (
        {"data.tokens_per_microbatch": 99, "training.global_batch_size": 4},
        "training.global_batch_size",
        "data.global_micro_batches",
    ),
    ({"data.tokens_per_microbatch": 99, "data.global_micro_batches": 6}, "data.global_micro_batches", "4 or 8"),
    ({"data.global_micro_batches": 4}, "data.global_micro_batches", "data.tokens_per_microbatch"),
    ({"data.groups_per_step": 2}, "data.groups_per_step", "legal: 1"),
    ({"data.groups_per_step": 2, "training.global_batch_size": 12}, "data.groups_per_step", "legal: 1, 3"),
    (
        {"data.groups_per_step": 2, "training.global_batch_size": 4, "parallelism.pipeline_parallel_degree": 2},
        "data.groups_per_step",
        "pipeline",
    ),
    ({"training.epochs": 3, "training.steps": 100}, "training.epochs", "training.steps"),
    ({"training.huber_c": 0.2}, "training.huber_c", "training.loss"),
    ({"optimizer.name": "Adam"}, "optimizer.name", "package.module.Class"),
    ({"flow.min_t": 0.5, "flow.max_t": 0.5}, "flow.min_t", "flow.max_t"),
    ({"flow.min_t": 1.0}, "flow.min_t", "flow.max_t"),
    ({"flow.max_t": 0.0}, "flow.min_t", "flow.max_t"),
    ({"validation.path": "/no/such/folder"}, "validation.path", "does not exist"),
    ({"validation.path": "embedded:shapes-x"}, "validation.path", "embedded:shapes-N"),
    ({"validation.prompts_path": "/no/such/file"}, "validation.prompts_path", "one prompt a line"),
    ({"validation.prompts_path": str(ROOT)}, "validation.prompts_path", "one prompt a line"),
    ({"validation.enable": True, "validation.timesteps": []}, "validation.timesteps", "at least one"),
    ({"validation.enable": True, "validation.guidance_scale": 0.5}, "validation.guidance_scale", "1 (off) and above"),
    ({"validation.enable": True, "validation.timesteps": [0.5, 0.5]}, "validation.timesteps", "twice"),
    (
        {"validation.enable": True, "validation.holdout": 0.0, "validation.num_videos": 0},
        "validation.enable",
        "validation.holdout",
    ),
    ({"model.hf_assets_path": "/no/such/folder"}, "model.hf_assets_path", "/no/such/folder"),
    ({"lora.enable": True, "model.flavor": "t2v-1.3B"}, "lora.enable", "checkpoint.initial_load_in_hf true"),
    (
        {"lora.enable": True, "model.flavor": "t2v-1.3B", "model.hf_assets_path": str(ROOT)},
        "lora.enable",
        "drawn at random",
    ),
    (
        {"validation.enable": True, "validation.num_scored": 8, "data.path": str(ROOT)},
        "validation.num_scored",
        "embedded:shapes",
    ),
    ({"model.hf_assets_path": "a/b"}, "model.hf_assets_path", "python -m titan_video.download a/b --revision main"),
    ({"checkpoint.initial_load_path": "a/b"}, "checkpoint.initial_load_path", "python -m titan_video.download a/b"),
    ({"checkpoint.keep_exports": 2}, "checkpoint.keep_exports", "checkpoint.export_every"),
    (
        {"checkpoint.export_every": 5, "checkpoint.export_format": "stacked"},
        "checkpoint.export_format",
        "with model.flavor debug: the model is no mixture of experts; choose one of diffusers, original",
    ),
    (
        {"checkpoint.last_save_in_hf": True, "job.dump_folder": "a", "model.hf_assets_path": "b/../a/hf"},
        "model.hf_assets_path",
        "into which checkpoint.last_save_in_hf exports; give another job.dump_folder",
    ),
    (
        {"lora.enable": True, "lora.export": [], "checkpoint.export_every": 5},
        "lora.export",
        "checkpoint.export_every is 5; give at least one",
    ),
    ({"encoder.name": "wan"}, "model.hf_assets_path", "encoder.name"),
    ({"model.flavor": "hf"}, "model.hf_assets_path", "model.flavor"),
    ({"model.flavor": "hf", "model.hf_assets_path": str(ROOT)}, "model.hf_assets_path", "transformer/config.json"),
    ({"checkpoint.initial_load_path": "/no/such/folder"}, "checkpoint.initial_load_path", "/no/such/folder"),
    ({"checkpoint.initial_load_in_hf": True}, "checkpoint.initial_load_in_hf", "model.hf_assets_path"),
    ({"checkpoint.load_step": 0, "checkpoint.enable": False}, "checkpoint.load_step", "checkpoint.enable"),
    ({"checkpoint.folder": ""}, "checkpoint.folder", "relative"),
    ({"checkpoint.folder": "."}, "checkpoint.folder", "relative"),
    ({"checkpoint.folder": "/checkpoint"}, "checkpoint.folder", "relative"),
    ({"checkpoint.folder": "../checkpoint"}, "checkpoint.folder", "relative"),
    ({"metrics.save_tb_folder": "a/../../b"}, "metrics.save_tb_folder", "relative"),
    ({"metrics.save_tb_folder": ""}, "metrics.save_tb_folder", "relative"),
    ({"metrics.save_tb_folder": "./checkpoint/"}, "metrics.save_tb_folder", "checkpoint.folder"),
    ({"optimizer.name": "Muon", "lora.enable": True}, "optimizer.name", "lora.enable"),
    ({"optimizer.name": "Muon", "optimizer.in_backward": True}, "optimizer.in_backward", "optimizer.name"),
    ({"optimizer.in_backward": True}, "optimizer.in_backward", "training.max_norm"),
    (
        {"optimizer.in_backward": True, "training.global_batch_size": 64},
        "optimizer.in_backward",
        "training.global_batch_size",
    ),
    (
        {"optimizer.in_backward": True, "parallelism.pipeline_parallel_degree": 2},
        "optimizer.in_backward",
        "pipeline_parallel_degree",
    ),
    (
        {"optimizer.in_backward": True, "parallelism.data_parallel_replicate_degree": 2},
        "optimizer.in_backward",
        "data_parallel_replicate_degree",
    ),
    (
        {"optimizer.in_backward": True, "training.enable_cpu_offload": True},
        "optimizer.in_backward",
        "training.enable_cpu_offload",
    ),
    (
        {"optimizer.in_backward": True, "fault_tolerance.nonfinite": "skip"},
        "optimizer.in_backward",
        "fault_tolerance.nonfinite",
    ),
    (
        {"optimizer.in_backward": True, "fault_tolerance.spike_deviations": 10.0},
        "optimizer.in_backward",
        "fault_tolerance.spike_deviations",
    ),
    (
        {"fault_tolerance.nonfinite": "rollback", "checkpoint.enable": False},
        "fault_tolerance.nonfinite",
        "checkpoint.enable",
    ),
    (
        {"fault_tolerance.nonfinite": "rollback", "encoder.placement": "separate", "encoder.num_ranks": 1},
        "fault_tolerance.nonfinite",
        "encoder.placement",
    ),
    ({"debug.verify_every": 1}, "debug.verify_every", "debug.deterministic"),
    (
        {"debug.verify_every": 1, "debug.deterministic": True, "optimizer.in_backward": True, "training.max_norm": 0.0},
        "debug.verify_every",
        "optimizer.in_backward",
    ),
    (
        {
            "debug.verify_every": 1,
            "debug.deterministic": True,
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble",
        },
        "debug.verify_every",
        "Interleaved1F1B",
    ),
    (
        {"training.dtype": "bfloat16", "training.mixed_precision_param": "float32"},
        "training.dtype",
        "training.mixed_precision_param",
    ),
    ({"training.dtype": "bfloat16", "lora.enable": True}, "training.dtype", "lora.enable"),
    ({"float8.enable": True, "training.mixed_precision_param": "float32"}, "float8.enable", "float8.emulate"),
    (
        {"float8.enable": True, "parallelism.enable_async_tensor_parallel": True},
        "float8.enable",
        "enable_async_tensor_parallel",
    ),
    (
        {
            "float8.enable": True,
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble",
        },
        "parallelism.pipeline_parallel_schedule",
        "float8.enable",
    ),
    ({"job.dump_folder": ""}, "job.dump_folder", "./outputs"),
    ({"job.dump_folder": __file__}, "job.dump_folder", "folder"),
]


@pytest.mark.parametrize("values, name, fix", COMBINATIONS)
def test_a_combination_is_refused(values, name, fix):
    message = get_message(tomli_w.dumps(with_values(values)))
    assert f"{name}: " in message and fix in message, message


def test_every_rule_that_is_named_exists():
    targets = [*RULES, *PART_RULES.values(), *FILE_RULES]
    assert all(callable(resolve(target, "test")) for target in targets)
    assert set(PART_RULES) <= {part for _, _, part in PARTS}
    assert all(rules.startswith(part) for part, rules in PART_RULES.items())


def test_legal_combinations_pass(tmp_path):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text("{}")
    (tmp_path / "clips.JSONL").write_text("")
    (tmp_path / "prompts.txt").write_text("a red circle")
    for values in [
        {"data.path": str(tmp_path)},
        {"data.path": str(tmp_path / "clips.JSONL")},
        {"data.path": "embedded:shapes-100000"},
        {"data.buckets": [[1, 16, 16], [1, 16, 32]]},
        {
            "model.flavor": "hf",
            "encoder.name": "wan",
            "model.hf_assets_path": str(tmp_path),
            "checkpoint.initial_load_in_hf": True,
        },
        {"checkpoint.initial_load_path": str(tmp_path), "checkpoint.initial_load_in_hf": True},
        {"lora.enable": True, "model.flavor": "t2v-1.3B", "checkpoint.initial_load_path": str(tmp_path)},
        {
            "lora.enable": True,
            "model.flavor": "t2v-1.3B",
            "model.hf_assets_path": str(tmp_path),
            "checkpoint.initial_load_in_hf": True,
        },
        {"lora.enable": True, "model.flavor": "debug-i2v"},
        {"validation.prompts_path": str(tmp_path / "prompts.txt")},
        {
            "validation.path": "embedded:shapes-3",
            "validation.enable": True,
            "validation.holdout": 0,
            "validation.num_videos": 0,
        },
        {"validation.enable": True, "validation.holdout": 0, "validation.num_videos": 1},
        {"validation.enable": True, "validation.num_videos": 0},
        {"checkpoint.load_step": 3},
        {"flow.min_t": 0.4, "flow.max_t": 0.5},
        {"parallelism.data_parallel_replicate_degree": 2, "parallelism.data_parallel_shard_degree": 2},
        {"parallelism.data_parallel_replicate_degree": 4},
        {"training.global_batch_size": 12, "training.local_batch_size": 3},
        {"training.global_batch_size": 2, "parallelism.tensor_parallel_degree": 2},
        {
            "parallelism.context_parallel_degree": 4,
            "parallelism.context_parallel_method": "unified",
            "parallelism.context_parallel_ulysses_degree": 2,
        },
        {
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.tensor_parallel_degree": 2,
            "training.local_batch_size": 4,
            "parallelism.pipeline_parallel_microbatch_size": 2,
        },
        {
            "parallelism.enable_async_tensor_parallel": True,
            "parallelism.tensor_parallel_degree": 2,
            "compile.enable": True,
        },
        {"activation_checkpoint.mode": "memory_budget", "compile.enable": True},
        {"training.mixed_precision_reduce": "bfloat16", "checkpoint.plan_caching": True},
        {"data.tokens_per_microbatch": 99, "data.global_micro_batches": 24, "data.groups_per_step": 3},
        {
            "data.tokens_per_microbatch": 99,
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.pipeline_parallel_microbatch_size": 2,
        },
        {
            "data.path": "",
            "data.source": [{"path": "embedded:shapes-8", "num_repeats": 2}, {"path": "s3://bucket/{00..12}.tar"}],
        },
        {"data.buckets": [], "data.resolutions": [256, 512], "data.frame_buckets": [1, 17]},
        {"data.path": str(tmp_path / "*.tar")},
        {"training.steps": 100, "lr_scheduler.warmup_steps": 50, "lr_scheduler.decay_ratio": 0.5},
        {"fault_tolerance.nonfinite": "rollback", "optimizer.in_backward": True, "training.max_norm": 0.0},
        {"debug.verify_every": 1, "debug.deterministic": True},
        {"checkpoint.folder": "a/b", "metrics.save_tb_folder": "a/c"},
        {"job.dump_folder": str(tmp_path / "new")},
    ]:
        check(from_dict(with_values(values)), WORLD)


def test_degrees_and_accumulation():
    assert data_parallel_degrees(Parallelism(), 6) == (1, 6)
    assert data_parallel_degrees(Parallelism(data_parallel_replicate_degree=2), 6) == (2, 3)
    assert data_parallel_degrees(Parallelism(data_parallel_replicate_degree=6, data_parallel_shard_degree=1), 6) == (
        6,
        1,
    )
    assert data_parallel_degrees(
        Parallelism(tensor_parallel_degree=2, context_parallel_degree=3, pipeline_parallel_degree=2), 24
    ) == (1, 2)
    assert gradient_accumulation(JobConfig(), 5) == 1
    assert gradient_accumulation(JobConfig(training=Training(local_batch_size=2, global_batch_size=24)), 4) == 3
    budget = Data(tokens_per_microbatch=1000, global_micro_batches=24, groups_per_step=3)
    assert (
        gradient_accumulation(JobConfig(data=budget), 4) == 6
        and gradient_accumulation(JobConfig(data=Data(tokens_per_microbatch=9)), 4) == 1
    )
    with pytest.raises(ConfigError, match="legal: 1, 2, 3, 6"):
        data_parallel_degrees(Parallelism(data_parallel_replicate_degree=4), 6)
    with pytest.raises(ConfigError, match="nearest 16 or 24"):
        gradient_accumulation(JobConfig(training=Training(local_batch_size=2, global_batch_size=20)), 4)
    for data, words in (
        (replace(budget, global_micro_batches=6), "data.global_micro_batches: given 6; legal: a multiple of 4"),
        (replace(budget, groups_per_step=4), "data.groups_per_step: given 4; a rank has 6 .* legal: 1, 2, 3, 6"),
    ):
        with pytest.raises(ConfigError, match=words):
            gradient_accumulation(JobConfig(data=data), 4)


def test_fsdps_communication_needs_other_ranks_and_a_torch_that_has_it(monkeypatch):
    reduction = from_dict(with_values({"training.mixed_precision_reduce": "bfloat16"}))
    symmetric = from_dict(with_values({"parallelism.enable_fsdp_symm_mem": True}))
    for config, ranks in ((reduction, 2), (symmetric, 2)):
        assert not list(fsdp.rules(config, ranks))
    assert "mixed_precision_reduce: bfloat16, but there is no other rank" in " ".join(fsdp.rules(reduction, 1))
    assert "enable_fsdp_symm_mem: true, but there is no other rank" in " ".join(fsdp.rules(symmetric, 1))
    monkeypatch.setattr(fsdp, "FSDPModule", type("FSDPModule", (), {}))
    assert "lacks; leave it false" in " ".join(fsdp.rules(symmetric, 2))


def test_state_of_replicas_on_the_host_needs_a_torch_that_keeps_gradients(monkeypatch):
    replicas = {"parallelism.data_parallel_replicate_degree": 2}
    alone, both = {"training.enable_cpu_offload": True}, {"training.enable_cpu_offload": True, **replicas}
    monkeypatch.setattr(fsdp, "CAN_OFFLOAD_REPLICAS", True)
    assert not list(fsdp.rules(from_dict(with_values(both)), 2))
    monkeypatch.setattr(fsdp, "CAN_OFFLOAD_REPLICAS", False)
    assert [len(list(fsdp.rules(from_dict(with_values(values)), 2))) for values in (replicas, alone, both)] == [0, 0, 1]


TOML = str(ROOT / "train_configs" / "debug.toml")


@pytest.mark.parametrize(
    "world_size, argv, words",
    [
        (2, ["--training.stepz", "3"], ["config error: training.stepz", "training.steps"]),
        (2, ["--parallelism.data_parallel_shard_degree", "3"], ["data_parallel_shard_degree", "legal: 2"]),
        (
            3,
            ["--parallelism.tensor_parallel_degree", "3"],
            ["error: parallelism.tensor_parallel_degree", "4 heads and feed-forward width 512; legal: 1, 2, 4"],
        ),
    ],
)
def test_check_command_refuses_without_a_traceback(monkeypatch, world_size, argv, words):
    monkeypatch.setattr(sys, "argv", ["config", "check", str(world_size), "--job.config_file", TOML, *argv])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("titan_video.config", run_name="__main__")
    assert isinstance(caught.value.code, str) and all(word in caught.value.code for word in words), caught.value.code


def test_check_command_accepts(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["config", "check", "2", "--job.config_file", TOML])
    runpy.run_module("titan_video.config", run_name="__main__")
    assert capsys.readouterr().out == ""
