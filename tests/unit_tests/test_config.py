"""The configuration:

nothing wrong is accepted, every message names the field, and what is written is read back the same.
"""

import random
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
import tomli_w

from tests.helpers import ROOT
from titan_video.config import ConfigError, JobConfig, dump, from_dict, load, main_guard, parse, parse_args
from titan_video.config.check import check
from titan_video.config.job_config import Data, Parallelism, Source, Training
from titan_video.config.values import get_limits, nearest, options, sections
from titan_video.data.batching import gradient_accumulation
from titan_video.distributed.parallel_dims import data_parallel_degrees

WORLD = 4
BASE = {"data": {"path": "embedded:shapes-8", "buckets": [[17, 64, 64]]}, "encoder": {"name": "debug"}}
LETTERS = "az09 _-./\\\"'#=[]{}\n\r\t\x01\x7fé漢🎬\u2028"


def draw(kind, limits, rng):
    """A legal value of a field, as TOML gives it."""
    if get_origin(kind) is tuple:
        return [draw(get_args(kind)[0], limits, rng) for _ in range(rng.randrange(4))]
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return {f.name: draw(kinds[f.name], get_limits(f), rng) for f in fields(kind) if rng.random() < 0.7}
    if get_origin(kind) is Literal:
        return rng.choice(get_args(kind))
    if kind is bool:
        return rng.random() < 0.5
    if "names" in limits:
        return rng.choice(limits["names"])
    if kind is str:
        return "".join(rng.choice(LETTERS) for _ in range(rng.randrange(12)))
    low, high = limits.get("ge", limits.get("gt", -(2**63))), limits.get("le", limits.get("lt", 2**63 - 1))
    if kind is int:
        return rng.choice([low, min(low + rng.randrange(100), high), rng.randint(low, high - ("lt" in limits))])
    inside = [
        x
        for x in (rng.uniform(low, min(high, low + 10)), low + 5e-324, low + 1e-7 * rng.random(), low + 0.1, 1e300, 3)
        if x <= high and (x < high or "lt" not in limits) and (x > low or "gt" not in limits)
    ]
    return rng.choice(inside)


def draw_config(rng):
    d = {section: {} for section in sections()}
    for full, (kind, f) in options().items():
        section, name = full.split(".")
        d[section][name] = draw(kind, get_limits(f), rng)
    return from_dict(d)


def test_what_is_dumped_is_parsed_back():
    rng = random.Random(0)
    for _ in range(100):
        config = draw_config(rng)
        text = dump(config)
        again = parse(text)
        assert again == config
        assert dump(again) == text
        for full in options():  # typed as declared
            section, name = full.split(".")
            assert type(getattr(getattr(again, section), name)) is type(getattr(getattr(JobConfig(), section), name)), (
                full
            )
    assert parse(dump(JobConfig())) == JobConfig() == parse("")
    assert dump(JobConfig()).count(" = ") == len(options())


# ---- mutated files ----


def get_message(text, world=WORLD):
    """The ConfigError of a TOML text. Anything else raised, or nothing, fails."""
    with pytest.raises(ConfigError) as caught:
        check(parse(text), world)
    return str(caught.value)


def with_values(values):
    """BASE with further {"section.field": value}, as the nested tables of a file."""
    tables = {section: dict(table) for section, table in BASE.items()}
    for full, value in values.items():
        section, name = full.split(".")
        tables.setdefault(section, {})[name] = value
    return tables


def typo(name, rng):
    """`name` with two letters swapped, one doubled or one lost; never itself."""
    i = rng.randrange(len(name) - 1)
    ways = [name[:i] + name[i + 1] + name[i] + name[i + 2 :], name[:i] + name[i] + name[i:], name[:i] + name[i + 1 :]]
    return rng.choice([w for w in ways if w != name and not w.startswith("_")])


def wrong_types(kind):
    if get_origin(kind) is tuple:
        inner = [[v] for v in wrong_types(get_args(kind)[0])]
        return [1, "1", True, {"a": 1}, *inner]
    if is_dataclass(kind):
        kinds = get_type_hints(kind)
        return [
            1,
            "a",
            True,
            [1],
            *(
                {f.name: v}
                for f in fields(kind)
                for v in wrong_types(kinds[f.name]) + out_of_range(kinds[f.name], get_limits(f))
            ),
        ]
    if get_origin(kind) is Literal:
        return ["none of these", 1, True, [get_args(kind)[0]], get_args(kind)[0].swapcase()]
    return {
        bool: ["true", 1, 0.0, [True]],
        int: ["3", 3.0, True, [3], 2**63, -(2**63) - 1, float("inf")],
        str: [3, 1.5, False, ["a"], "a\0b"],
        float: ["1e-4", True, [1.0], {"x": 1.0}, float("nan"), float("inf"), -float("inf"), 10**400],
    }[kind]


def out_of_range(kind, limits):
    """Values on the wrong side of each limit: the limit itself, where it is excluded, and beyond."""
    if get_origin(kind) is tuple:
        return [[v] for v in out_of_range(get_args(kind)[0], limits)]
    if is_dataclass(kind):
        return []
    if "names" in limits:
        return ["none of these", limits["names"][0].swapcase()]
    step = {int: 1, float: 1e-6}.get(kind)
    beyond = {
        "ge": lambda x: [x - step, x - 999],
        "le": lambda x: [x + step, x + 999],
        "gt": lambda x: [x, x - step],
        "lt": lambda x: [x, x + step],
    }
    return [kind(v) for name, limit in limits.items() for v in beyond[name](limit)]


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
    (
        {
            "parallelism.pipeline_parallel_degree": 2,
            "parallelism.pipeline_parallel_schedule": "InterleavedZeroBubble",
            "compile.enable": True,
        },
        "parallelism.pipeline_parallel_schedule",
        "Interleaved1F1B",
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
    ({"lr_scheduler.warmup_steps": 10001}, "lr_scheduler.warmup_steps", "at most 10000"),
    (
        {"lr_scheduler.warmup_steps": 60, "lr_scheduler.decay_ratio": 0.5, "training.steps": 100},
        "lr_scheduler.warmup_steps",
        "at most 50",
    ),
    ({"lr_scheduler.decay_ratio": 1.0}, "lr_scheduler.warmup_steps", "at most 0"),
    ({"flow.min_t": 0.5, "flow.max_t": 0.5}, "flow.min_t", "flow.max_t"),
    ({"flow.min_t": 1.0}, "flow.min_t", "flow.max_t"),
    ({"flow.max_t": 0.0}, "flow.min_t", "flow.max_t"),
    ({"validation.path": "/no/such/folder"}, "validation.path", "does not exist"),
    ({"validation.path": "embedded:shapes-x"}, "validation.path", "embedded:shapes-N"),
    ({"validation.prompts_path": "/no/such/file"}, "validation.prompts_path", "one prompt a line"),
    ({"validation.prompts_path": str(ROOT)}, "validation.prompts_path", "one prompt a line"),
    ({"validation.timesteps": []}, "validation.timesteps", "at least one"),
    ({"validation.timesteps": [0.5, 0.5]}, "validation.timesteps", "twice"),
    (
        {"validation.enable": True, "validation.holdout": 0.0, "validation.num_videos": 0},
        "validation.enable",
        "validation.holdout",
    ),
    ({"model.hf_assets_path": "/no/such/folder"}, "model.hf_assets_path", "/no/such/folder"),
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


def test_mutated_files_are_refused_by_name():
    rng = random.Random(1)
    check(parse(tomli_w.dumps(BASE)), WORLD)  # what follows is wrong for its mutation alone
    count = 0
    for full, (kind, f) in options().items():
        section, name = full.split(".")
        legal = asdict(JobConfig())[section][name]
        legal = [list(v) if isinstance(v, tuple) else v for v in legal] if isinstance(legal, tuple) else legal
        wrong = typo(name, rng)
        message = get_message(tomli_w.dumps(with_values({f"{section}.{wrong}": legal})))
        assert f"{section}.{wrong}: unknown" in message and f"nearest known name: {full}" in message.splitlines()[0], (
            message
        )
        count += 1
        for value in wrong_types(kind) + out_of_range(kind, get_limits(f)):
            message = get_message(tomli_w.dumps(with_values({full: value})))
            assert message.startswith(f"{full}: ") and "legal: " in message and len(message.splitlines()) == 1, message
            count += 1
    for section in sections():
        wrong = typo(section, rng)
        first = next(iter(asdict(JobConfig())[section]))
        assert f"{wrong}.{first}: unknown section {wrong}; nearest known name: {section}." in get_message(
            f"[{wrong}]\n{first} = 1\n"
        )
        assert get_message(f"{section} = 1").startswith(f"{section}: ")
        count += 2
    for values, name, fix in COMBINATIONS:
        message = get_message(tomli_w.dumps(with_values(values)))
        assert f"{name}: " in message and fix in message, message
        count += 1
    assert count >= 300, count


def test_random_damage_to_a_file_is_an_error_or_a_legal_file():
    rng, good, refused = random.Random(1), dump(from_dict(BASE)), 0
    for _ in range(300):
        text = list(good)
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(["", "\0", "=", '"', "[", "9", "x", "\n", "é"])
        try:
            config = parse("".join(text))
            check(config, WORLD)
        except ConfigError:
            refused += 1
        else:
            assert parse(dump(config)) == config
    assert refused > 150


def test_all_mistakes_are_reported_at_once():
    lines = get_message(
        "[training]\nsteps = 0\nlr = 1e-4\n[optimizer]\nlr = -1.0\n[emma]\nenable = true\n[[flow]]\nshift = 1\n"
    ).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "training.steps",
        "training.lr",
        "optimizer.lr",
        "emma.enable",
        "flow",
    ]
    lines = get_message('[data]\nbuckets = [[80, 470, 832]]\n[encoder]\nname = "wan"\n[flow]\nmin_t = 1\n').splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "data.buckets",
        "data.buckets",
        "flow.min_t",
        "data.path",
        "model.hf_assets_path",
    ]


def test_nearest_names():
    wanted = {
        "training.lr": "optimizer.lr",
        "training.seed": "debug.seed",
        "training.stepz": "training.steps",
        "trainig.steps": "training.steps",
        "steps": "training.steps",
        "training.warmup_steps": "lr_scheduler.warmup_steps",
        "checkpoint.export_type": "checkpoint.export_dtype",
        "parallelism.dp_shard_degree": "parallelism.data_parallel_shard_degree",
        "training.batch_size": "training.local_batch_size",
        "ema.enabled": "ema.enable",
        "metrics.tb_folder": "metrics.save_tb_folder",
    }
    assert {given: nearest(given, options()) for given in wanted} == wanted
    assert get_message("[trainig]").endswith("nearest known name: training")


def test_integers_become_floats():
    config = parse("[optimizer]\nlr = 1\n[validation]\ntimesteps = [1, 0.5]\n")
    assert (
        type(config.optimizer.lr) is float
        and config.validation.timesteps == (1.0, 0.5)
        and type(config.validation.timesteps[0]) is float
    )


# ---- files ----


def test_files_that_cannot_be_read(tmp_path):
    def message(content):
        path = tmp_path / "run.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "line 3" in message(b"[training]\nsteps = 3\nsteps = \n")
    assert "line 2" in message(b"[training]\nsteps =")
    assert "line 3" in message(b"[training]\nsteps = 3\nsteps = 4\n")
    assert "UTF-8" in message(b"\xff\xfe[")
    assert "nested" in message(b"x = " + b"[" * 100_000) or "not valid TOML" in message(b"x = " + b"[" * 100_000)
    message(b"[training]\nsteps = " + b"9" * 5000)
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="job.config_file: cannot read") as caught:
            load(path)
        assert str(path) in str(caught.value)
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert load(tmp_path / "windows.toml").training.steps == 3


def test_shipped_files_are_legal():
    for path in sorted((ROOT / "train_configs").glob("*.toml")):
        config = load(path)
        assert parse(dump(config)) == config, path


def test_reference_page_is_current():
    page = subprocess.run(
        [sys.executable, "-m", "titan_video.config"], cwd=ROOT, capture_output=True, check=True
    ).stdout.decode()
    assert (ROOT / "docs" / "config.md").read_text() == page, "run: python -m titan_video.config > docs/config.md"
    assert all(f"| {full.split('.')[1]} |" in page for full in options())


# ---- the command line ----


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[training]\nsteps = 7\nlocal_batch_size = 2\n[job]\ndescription = "from the file"\n')
    for form in (["--job.config_file", str(path)], [f"--job.config_file={path}"]):
        config = parse_args([*form, "--training.steps", "9"])
        assert (config.training.steps, config.training.local_batch_size, config.job.description) == (
            9,
            2,
            "from the file",
        )
        assert parse_args(["--training.steps", "9", *form]) == config
    assert parse_args([]) == JobConfig()
    assert parse_args(["--training.steps", "3", "--training.steps=4"]).training.steps == 4


def test_command_line_forms():
    c = parse_args(
        [
            "--compile.enable",
            "--data.shuffle",
            "false",
            "--ema.enable=true",
            "--checkpoint.load_step",
            "-1",
            "--optimizer.lr",
            "3e-4",
            "--optimizer.eps=.5",
            "--data.buckets",
            "[[17,64,64], [1, 128, 64]]",
            "--validation.timesteps",
            "0.1, 1",
            "--job.print_config",
            "--job.description",
            'a "b" = [c] 007',
            "--job.dump_folder=--x=y",
            "--data.path=",
        ]
    )
    assert (c.compile.enable, c.data.shuffle, c.ema.enable, c.job.print_config) == (True, False, True, True)
    assert (c.checkpoint.load_step, c.optimizer.lr, c.optimizer.eps) == (-1, 3e-4, 0.5)
    assert c.data.buckets == ((17, 64, 64), (1, 128, 64)) and c.validation.timesteps == (0.1, 1.0)
    assert (c.job.description, c.job.dump_folder, c.data.path) == ('a "b" = [c] 007', "--x=y", "")
    assert parse_args(["--validation.timesteps", "[0.25]"]).validation.timesteps == (0.25,)
    assert parse_args(["--validation.timesteps="]).validation.timesteps == ()


def test_sources_are_tables():
    text = '[data]\nfps = 8\n[[data.source]]\npath = "a"\nfps = 24\n[[data.source]]\npath = "b"\nnum_repeats = 3\n'
    config = parse(text)
    assert (
        config.data.source == (Source("a", fps=24.0), Source("b", num_repeats=3)) == config.data.sources
        and parse(dump(config)) == config
    )
    assert dump(config).count("[[data.source]]") == 2 and JobConfig(data=Data(path="c")).data.sources == (Source("c"),)
    assert (
        parse_args(["--data.fps", "8", "--data.source", '[{path = "a", fps = 24}, {path = "b", num_repeats = 3}]'])
        == config
    )
    for value, words in (
        ("[{path = 3}]", "item 0: path: given 3; legal: a string"),
        ("a", "legal: a list of tables of path, num_repeats"),
        ('[{path = "a"}, {fps = -1}]', "item 1: fps: given -1; legal: a number >= 0"),
    ):
        with pytest.raises(ConfigError, match=f"data.source: .*{words}"):
            parse_args(["--data.source", value])


def test_derived_buckets():
    data = Data(buckets=(), resolutions=(512,), frame_buckets=(1, 33), min_ar=0.5, max_ar=2.0, num_ar_buckets=3)
    assert data.sizes == ((1, 736, 352), (1, 512, 512), (1, 352, 736), (33, 736, 352), (33, 512, 512), (33, 352, 736))
    assert Data().sizes == Data().buckets
    for side in (256, 480, 720):
        sizes = replace(data, resolutions=(side,), num_ar_buckets=9).sizes
        assert all(h % 32 == w % 32 == 0 and 0.85 < h * w / side**2 < 1.15 for _, h, w in sizes)
    assert replace(data, num_ar_buckets=1).sizes == ((1, 512, 512), (33, 512, 512))


def test_command_line_mistakes_name_the_option():
    wrong = {
        "training.steps": ["3.0", "1e3", " 3", "", "٣", "0", "-1", "9" * 5000],
        "optimizer.lr": ["nan", "inf", "-inf", "1e999", "1_0", "0x1p3", "0"],
        "compile.enable": ["yes", "", "1", "True"],
        "flow.shift": ["constat", "Constant", ""],
        "job.description": ["a\udcff", "a\0"],
        "data.buckets": ["17,64,64", "[17,64,64]", "[[17,64", "[1]\ny = 2", "[[17,64,64.0]]"],
        "validation.timesteps": ["0.1,,0.2", "0.1,2", "0.1 0.2", "[0.1,true]", "nan"],
    }
    for argv, start in [
        *(([f"--{name}={value}"], f"{name}: ") for name, values in wrong.items() for value in values),
        (["--training.steps", "3.0"], "training.steps: "),
        (["--compile.enable", "yes"], "compile.enable: "),
        (["--training.steps"], "training.steps: given no value"),
        (["--training.steps", "--compile.enable"], "training.steps: given no value"),
        (["--trainig.steps", "3"], "trainig.steps: unknown option"),
        (["--training.stepz", "3"], "training.stepz: unknown option"),
        (["--steps", "3"], "steps: unknown option"),
        (["--config", "x"], "config: unknown option"),
        (["--"], "--: stray"),
        (["steps=3"], "steps=3: stray"),
        (["-x"], "-x: stray"),
        (["--job.config_file"], "job.config_file: given no value"),
        (["--job.config_file", "/no/such.toml"], "job.config_file: cannot read /no/such.toml"),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse_args(argv)
        assert str(caught.value).startswith(start) and len(str(caught.value).splitlines()) == 1, (
            argv,
            str(caught.value),
        )
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", "x", "--training.lr=1", "--training.steps=0", "--job.config_file=/no/such.toml"])
    assert (
        len(str(caught.value).splitlines()) == 4
        and "name: job.config_file" in str(caught.value)
        and "name: optimizer.lr" in str(caught.value)
    )


def test_help_lists_everything(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--training.steps", "x", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for full, (_, f) in options().items():
        assert f"--{full}  (" in text and f.metadata["help"] in text


def test_main_guard_ends_without_a_traceback():
    code = (
        "import sys\nfrom titan_video.config import main_guard, parse_args\nwith main_guard():\n    "
        "parse_args(sys.argv[1:])\nprint('ran')"
    )
    bad = subprocess.run(
        [sys.executable, "-c", code, "--training.stepz", "3"], cwd=ROOT, capture_output=True, text=True
    )
    assert bad.stderr == "config error: training.stepz: unknown option; nearest known name: training.steps\n"
    assert bad.returncode == 1 and not bad.stdout
    with main_guard():
        parse_args(["--training.steps", "3"])
    with pytest.raises(ZeroDivisionError), main_guard():
        raise ZeroDivisionError


# ---- rules across sections ----


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


def test_check_command_refuses_without_a_traceback():
    def run(*argv):
        return subprocess.run(
            [sys.executable, "-m", "titan_video.config", "check", *argv], capture_output=True, text=True, cwd=ROOT
        )

    toml = str(ROOT / "train_configs" / "debug.toml")
    assert run("2", "--job.config_file", toml).returncode == 0
    refusals = [
        ("2", ["--training.stepz", "3"], "training.steps", ""),
        ("2", ["--parallelism.data_parallel_shard_degree", "3"], "parallelism.data_parallel_shard_degree", "legal: 2"),
        (
            "3",
            ["--parallelism.tensor_parallel_degree", "3"],
            "parallelism.tensor_parallel_degree",
            "4 heads and feed-forward width 512; legal: 1, 2, 4",
        ),
    ]
    for world_size, argv, field, legal in refusals:
        refused = run(world_size, "--job.config_file", toml, *argv)
        assert (
            refused.returncode == 1
            and field in refused.stderr
            and legal in refused.stderr
            and "Traceback" not in refused.stderr
        )
