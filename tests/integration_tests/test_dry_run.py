"""The dry run against the closed forms, over layouts and modes, and on every shipped TOML at its real world size.

A block of the real models costs 0.3 s of fake compute. What is the same for all blocks is tested on a few of them,
and one test says that blocks add up equally; one model is run whole.
"""

import json
import re
import time
from dataclasses import replace

import pytest

from benchmarks.block_bytes import our_block, using
from tests.helpers import ROOT
from titan_video import kernels
from titan_video.config.manager import parse_args
from titan_video.distributed.activation_checkpoint import sections_by_block
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models import get_args, get_spec
from titan_video.planner.dry_run.describe import describe
from titan_video.planner.dry_run.memory import estimate, state
from titan_video.planner.dry_run.run import dry_run, main, num_clip_tokens
from titan_video.planner.dry_run.traffic import exchange_bytes

TOMLS = sorted((ROOT / "train_configs").glob("*.toml"))
SMALL = {
    "data.buckets": "[[17,128,128]]",
    "training.local_batch_size": 2,
    "activation_checkpoint.save_min_kv": 100,
    "model.kernels": "torch",
}
BFLOAT16 = {"training.mixed_precision_param": "bfloat16"}
BFLOAT16_WEIGHTS = {**BFLOAT16, "training.dtype": "bfloat16", "ema.enable": "true"}
IN_BACKWARD = {"optimizer.in_backward": "true", "training.max_norm": 0}
FULL = {"activation_checkpoint.mode": "full"}
SELECTIVE = {"activation_checkpoint.mode": "selective"}
RANGES = {
    **SELECTIVE,
    "activation_checkpoint.range": '[{layers = "0", mode = "full"}, {layers = "2", mode = "none"}]',
}
MATMUL = {**SELECTIVE, "activation_checkpoint.save": "attention,matmul"}
TRITON = {"model.kernels": "triton"}
COMPILED = {"compile.enable": "true"}
LORA = {"lora.enable": "true", "lora.rank": 4}
HSDP, TP = {"parallelism.data_parallel_replicate_degree": 2}, {"parallelism.tensor_parallel_degree": 2}
ULYSSES = {"parallelism.context_parallel_degree": 4}
RING = {**ULYSSES, "parallelism.context_parallel_method": "ring"}
UNIFIED = {
    **ULYSSES,
    "parallelism.context_parallel_method": "unified",
    "parallelism.context_parallel_ulysses_degree": 2,
}


def read(name, options=None):
    return parse_args(
        [
            "--job.config_file",
            str(ROOT / "train_configs" / f"{name}.toml"),
            *(f"--{k}={v}" for k, v in (options or {}).items()),
        ]
    )


def closed_form(config, world_size):
    """Activations among it for Wan's text-to-video only."""
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    dims = ParallelDims.of(config.parallelism, world_size)
    if config.model.name != "wan" or args.conditioning.num_cond_frames or config.lora.enable:
        return state(config, spec, args, dims)
    return estimate(config, spec, args, dims, max(num_clip_tokens(b, spec, args) for b in config.data.buckets))


def blocks(monkeypatch, flavor, number, name="wan", single=1):
    """`number` blocks; for HunyuanVideo `number` double blocks."""
    flavors = get_spec(name).flavors
    few = {"num_layers": number} if name == "wan" else {"num_double_layers": number, "num_single_layers": single}
    monkeypatch.setitem(flavors, flavor, replace(flavors[flavor], **few))


def compare(measured, expected):
    for kind, size in expected.items():
        assert measured[kind] == pytest.approx(size, rel=0.01), kind


MORE = (  # each a part of another case
    (1, FULL | BFLOAT16),
    (4, ULYSSES | BFLOAT16),
    (1, IN_BACKWARD),
    (1, TRITON),
    (8, TRITON | TP | {"parallelism.context_parallel_degree": 2} | BFLOAT16),
    (1, LORA | BFLOAT16),
)


@pytest.mark.parametrize(
    "world_size, options",
    [
        (1, {}),
        (4, HSDP | BFLOAT16),
        (4, ULYSSES | SELECTIVE | BFLOAT16),
        (4, RING | MATMUL | BFLOAT16),
        (4, UNIFIED | FULL | {"activation_checkpoint.layers": "0,2"} | BFLOAT16),
        (4, UNIFIED | RANGES | BFLOAT16),
        (2, TP),
        (4, HSDP | BFLOAT16_WEIGHTS | {"optimizer.name": "AdamW8bit"}),
        (2, TP | BFLOAT16_WEIGHTS | {"optimizer.name": "Muon"}),
        (4, BFLOAT16 | IN_BACKWARD),
        (1, BFLOAT16_WEIGHTS | IN_BACKWARD | {"optimizer.name": "AdamW8bit"}),
        (8, TP | {"parallelism.context_parallel_degree": 2} | FULL | BFLOAT16),
        (4, TRITON | HSDP | SELECTIVE | BFLOAT16),
        (4, TRITON | RING | MATMUL | BFLOAT16),
        (1, TRITON | COMPILED | BFLOAT16),
        (1, LORA | BFLOAT16 | IN_BACKWARD | {"lora.base_dtype": "int8", "training.swap_blocks": 3}),
        (4, LORA | BFLOAT16 | HSDP | {"lora.base_dtype": "float8"}),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE),
    ],
    ids=lambda x: "-".join(str(v) for v in x.values()) if isinstance(x, dict) else str(x),
)
def test_memory_equals_the_closed_form(world_size, options, monkeypatch):
    blocks(monkeypatch, "debug", 3)
    config = read("debug", SMALL | options)
    compare(dry_run(config, world_size).largest, closed_form(config, world_size))


def test_fused_kernels_keep_what_is_counted_without_a_run(monkeypatch):
    """A block's share is that of benchmarks/block_bytes.py, to the byte but for the modulation, which there all blocks
    share.
    """
    kept = []
    for n in (2, 3):
        blocks(monkeypatch, "debug", n)
        config = read("debug", SMALL | BFLOAT16 | TRITON | {"training.local_batch_size": 1})
        kept.append(dry_run(config, 1).largest["activations"])
    with using("triton"):
        alone = our_block(get_spec("wan").flavors["debug"], 320)["saved"]
    assert kept[1] - kept[0] == alone + 24 * 128
    assert kernels.current_backend() == "torch"


def test_blocks_add_up_equally(monkeypatch):
    numbers = []
    for n in (3, 4, 5):
        blocks(monkeypatch, "debug", n)
        report = dry_run(read("debug", SMALL | UNIFIED | SELECTIVE | BFLOAT16 | {"training.global_batch_size": 4}), 4)
        counts = {
            (c.phase, c.kind, c.axis, what): getattr(c, what) for c in report.collectives for what in ("count", "sent")
        }
        numbers.append({**report.largest, **report.flops, **counts, "total": report.total})
        assert {"ring", "ulysses", "fsdp"} == {axis for _, _, axis, _ in counts}
    few, more, most = numbers
    assert {name: more[name] - few[name] for name in more} == {name: most[name] - more[name] for name in more}


def test_collectives_of_context_parallel(monkeypatch):
    """Two exchanges forward and two backward in each block, recomputation sends once more, and the bytes are those of
    the formula.
    """
    blocks(monkeypatch, "debug", 2)
    report = dry_run(read("debug", SMALL | UNIFIED | FULL | BFLOAT16), 4, rank=3)
    calls, sent = {}, {}
    for c in report.collectives:
        if c.axis in ("ulysses", "ring"):
            calls[c.axis, c.phase] = c.count
            sent[c.phase] = sent.get(c.phase, 0) + c.sent
    exchanges = {("ulysses", phase): 4 for phase in ("forward", "recompute", "backward")}
    assert calls == exchanges | {("ring", "forward"): 2, ("ring", "recompute"): 2, ("ring", "backward"): 4}
    forward, backward = exchange_bytes(q_elements=2 * 80 * 128, ring=2, ulysses=2, itemsize=2)
    assert sent == {"forward": 2 * forward, "recompute": 2 * forward, "backward": 2 * backward}


@pytest.mark.parametrize(
    "name, flavor",
    [
        *(("wan", flavor) for flavor in ("debug-i2v", "debug-flf2v", "debug-i2v-A14B", "debug-ti2v")),
        *(("hunyuan_video", flavor) for flavor in ("debug", "debug-i2v-latent-concat", "debug-i2v-token-replace")),
    ],
)
def test_every_model(name, flavor, monkeypatch):
    """It gets the inputs that its arguments ask for, and its shards follow its parallel plan."""
    blocks(monkeypatch, flavor, 1, name)
    one_rank = {"model.name": name, "model.flavor": flavor, "training.local_batch_size": 2}
    config = read("debug", one_rank)
    args = get_args(get_spec(name), flavor, "", config.encoder.max_text_length)
    report = dry_run(config, 1)
    assert report.flops["forward"] == args.flops(report.tokens // 2, 2)
    split = read("debug", one_rank | BFLOAT16 | FULL | TP | {"parallelism.context_parallel_degree": 2})
    compare(dry_run(split, 4).largest, closed_form(split, 4))


def test_pipeline(monkeypatch):
    """Four stages of one block: the ranks partition the model, send and receive states, and save what 1F1B saves."""
    blocks(monkeypatch, "debug", 4)
    ranks, microbatches, D, itemsize = 4, 4, 128, 4
    options = SMALL | {"training.local_batch_size": microbatches, "ema.enable": "false"}
    config = read("debug", options | {"parallelism.pipeline_parallel_degree": ranks})
    reports = [dry_run(config, ranks, rank) for rank in range(ranks)]
    assert [r.stages for r in reports] == [{rank: 1} for rank in range(ranks)]
    assert [r.microbatches for r in reports] == [microbatches] * ranks

    alone = read("debug", options)
    whole = state(alone, get_spec("wan"), get_args(get_spec("wan"), "debug", "", 16), ParallelDims())
    compare({kind: sum(r.largest[kind] for r in reports) for kind in whole}, whole)

    boundary = (320 + 16) * D * itemsize + 7 * D * 4  # tokens and text; time and its projection, in float32
    neighbours = [1, 2, 2, 1]
    for report, n in zip(reports, neighbours, strict=True):
        sends = [c for c in report.collectives if c.kind == "send"]
        assert [(c.axis, c.sent) for c in sends] == [("pp", n * microbatches * boundary)]
        assert report.largest["pipeline buffers"] == pytest.approx(n * microbatches * boundary, abs=100)
    kept = [r.largest["activations"] for r in reports]
    assert kept[1] / kept[2] == pytest.approx(3 / 2, rel=0.01) and kept[0] > kept[1]
    uneven = read(
        "debug", options | {"parallelism.pipeline_parallel_degree": 2, "parallelism.pipeline_parallel_split": "0,3"}
    )
    assert [dry_run(uneven, 2, rank).stages for rank in range(2)] == [{0: 3}, {1: 1}]
    beyond = replace(uneven, parallelism=replace(uneven.parallelism, pipeline_parallel_split=(0, 4)))
    with pytest.raises(ValueError, match=r"pipeline_parallel_split: given \[0, 4\], but the last .* is 3"):
        dry_run(beyond, 2)
    gpipe = read(
        "debug",
        options | {"parallelism.pipeline_parallel_degree": ranks, "parallelism.pipeline_parallel_schedule": "GPipe"},
    )
    assert dry_run(gpipe, ranks, 2).largest["activations"] / kept[2] == pytest.approx(microbatches / 2, rel=0.05)


@pytest.mark.parametrize("schedule", ["Interleaved1F1B", "InterleavedZeroBubble"])
def test_interleaved_pipeline(schedule, monkeypatch):
    blocks(monkeypatch, "debug", 4)
    options = {
        "parallelism.pipeline_parallel_degree": 2,
        "parallelism.pipeline_parallel_schedule": schedule,
        "training.local_batch_size": 2,
    }
    report = dry_run(read("debug", SMALL | options), 2, rank=1)
    assert report.stages == {1: 1, 3: 1} and report.microbatches == 2


@pytest.mark.parametrize("mode, tensors", [(FULL, 1), (SELECTIVE, 3)], ids=["full", "selective"])
def test_offload(mode, tensors, monkeypatch):
    """Of each block its input, and with selective also the outputs of attention and feed-forward, are on the host; on
    the device what the last two keep.
    """
    blocks(monkeypatch, "debug", 3)
    here, there = (
        dry_run(read("debug", SMALL | BFLOAT16 | mode | {"activation_checkpoint.offload": o}), 1)
        for o in ("false", "true")
    )
    kept = tensors * 2 * 320 * 128 * 2
    assert here.on_host == 0 and there.on_host == there.largest["offloaded activations"] == 3 * kept
    assert here.largest["activations"] - there.largest["activations"] == kept
    assert (
        there.total
        == sum(size for kind, size in there.at_peak.items() if kind != "offloaded activations")
        <= here.total
    )


def test_state_on_the_host(monkeypatch):
    blocks(monkeypatch, "debug", 2)
    here, there = (
        dry_run(read("debug", SMALL | BFLOAT16 | FULL | {"training.enable_cpu_offload": o}), 1)
        for o in ("false", "true")
    )
    assert there.on_host == sum(here.largest[kind] for kind in ("parameters", "gradients", "optimizer", "ema"))
    assert there.total < here.total - here.largest["optimizer"] - here.largest["parameters"]


@pytest.mark.parametrize("path", TOMLS, ids=lambda p: p.stem)
def test_toml_at_its_world_size(path, monkeypatch, tmp_path, capsys):
    """By its command line, with 3 blocks. The figures of its comment, of the whole model, are those of the closed
    forms; where there is none, they follow from dry runs of few blocks, as blocks add up equally."""
    text = path.read_text()
    world_size = int(re.match(r"# world size: (\d+)\n", text)[1])
    config, prose = read(path.stem), text.replace("\n# ", " ")
    figures = {
        kind: float(gib)
        for kind, gib in re.findall(r"(parameters|gradients|optimizer|activations) (\d+\.\d+) GiB", prose)
    }
    assert path.stem in ("debug", "shapes") or len(figures) == 4
    whole = closed_form(config, world_size)
    if figures and "activations" not in whole:
        whole["activations"] = extrapolated(monkeypatch, config, world_size)
    for kind, gib in figures.items():
        assert gib == pytest.approx(whole[kind] / 2**30, rel=0.05 if kind == "activations" else 0.01, abs=0.006), kind

    blocks(monkeypatch, config.model.flavor, 3, config.model.name)
    few = {"training.swap_blocks": min(config.training.swap_blocks, 3)}
    if config.activation_checkpoint.range:  # its blocks are beyond the third
        r = config.activation_checkpoint.range[0]
        few["activation_checkpoint.range"] = f'[{{layers = "0-1", mode = "{r.mode}", save = {list(r.save)}}}]'
    config, options = read(path.stem, few), [f"--{name}={value}" for name, value in few.items()]
    main([str(path), "--world-size", str(world_size), "--json", str(tmp_path / "numbers.json"), *options])
    numbers = json.loads((tmp_path / "numbers.json").read_text())
    compare(numbers["largest"], closed_form(config, world_size))
    printed = capsys.readouterr().out
    assert "Fits a GPU (its GiB): 24 GB (23.5) yes" in printed and numbers["fits"]["24"]
    assert (
        f"rank 0 of {world_size}" in printed
        and f"{numbers['tokens']:,} tokens" in printed
        and "reduce-scatter" in printed
        or world_size == 1
    )


def extrapolated(monkeypatch, config, world_size):
    """Activations of all blocks, from few. Checkpointed, HunyuanVideo's double blocks keep what single ones do.
    Recomputed they have more, but
    the most is at the last block, a single one: so single ones alone. Offloaded, three of them wait on the device."""
    name, flavor = config.model.name, config.model.flavor
    args, total = get_spec(name).flavors[flavor], 0
    config = replace(config, training=replace(config.training, swap_blocks=0))
    sections = sections_by_block(config.activation_checkpoint, args.num_layers)
    for section in dict.fromkeys(sections):
        fewest, measured = 4 if section.offload else 1, []
        for number in (fewest, fewest + 1):
            with monkeypatch.context() as patch:
                blocks(patch, flavor, number if name == "wan" else 0, name, single=number)
                measured.append(dry_run(replace(config, activation_checkpoint=section), world_size))
        first, second = (report.largest["activations"] for report in measured)
        total += sections.count(section) * (second - first)
        if section == sections[-1]:  # at the peak, what the last blocks recompute is there too
            total += first - fewest * (second - first)
    return total


@pytest.mark.slow
def test_one_small_gpu():
    """Wan 14B by the whole model: what is swapped is not on the device, and the job fits 24 GB with a margin."""
    report = dry_run(read("wan2.1_t2v_14b_lora_24gb"), 1)
    assert report.tokens == 32760 and report.total <= 21.5 * 2**30 and report.needed < 23.5
    assert report.on_host == report.largest["swapped weights"] + report.largest["offloaded activations"]
    assert report.fits == {24: True, 48: True, 80: True, 141: True}
    block = report.largest["swapped weights"] / 24
    assert report.largest["parameters"] == pytest.approx(18 * block, rel=0.3) and block == pytest.approx(
        361e6, rel=0.02
    )


def test_which_gpus_a_job_fits():
    report = dry_run(read("debug", SMALL), 1)
    for gib, world_size, expected in (
        (21.7, 1, [24, 48, 80, 141]),  # 22.8 and the CUDA context's 0.6: 23.4
        (21.7, 8, [48, 80, 141]),  # NCCL's 1.0 more
        (43, 1, [80, 141]),
        (74, 8, [141]),
        (140, 1, []),
    ):
        changed = replace(report, total=int(gib * 2**30), world_size=world_size)
        assert [size for size, fits in changed.fits.items() if fits] == expected
        assert f"141 GB (139.7) {'yes' if 141 in expected else 'no'}" in describe(changed, state_on_host=False)


def test_auto_is_counted_as_on_a_gpu(monkeypatch):
    blocks(monkeypatch, "debug", 2)
    sizes = {
        kernels: dry_run(read("debug", SMALL | {"model.kernels": kernels}), 1).total
        for kernels in ("auto", "triton", "torch")
    }
    assert sizes["auto"] == sizes["triton"] < sizes["torch"]


@pytest.mark.slow
def test_14b_on_512_ranks_in_under_a_minute():
    config = read("wan2.1_t2v_14b_720p", {"training.global_batch_size": -1})
    start = time.process_time()
    report = dry_run(config, 512, rank=511)
    assert time.process_time() - start < 60  # of this process: the machine may have others
    compare(report.largest, closed_form(config, 512))
    exchanges = {(c.phase, c.axis): c.count for c in report.collectives if c.kind == "all-to-all"}
    assert exchanges == {("forward", "ulysses"): 80, ("recompute", "ulysses"): 80, ("backward", "ulysses"): 80}


@pytest.mark.parametrize(
    "options, words",
    [
        (["--world-size", "6", "--parallelism.context_parallel_degree", "4"], "context_parallel_degree"),
        (["--world-size", "8", "--parallelism.context_parallel_degree", "8"], "legal: 1, 2, 4"),
        (["--world-size", "0"], "--world-size"),
        (["--world-size", "2", "--rank", "2"], "--rank: given 2; legal: 0 to 1"),
        (
            ["--world-size", "2", "--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "1"],
            "legal: 2 or more",
        ),
        (["--world-size", "1", "--compile.enable", "--activation_checkpoint.mode", "memory_budget"], "memory_budget"),
        (["--world-size", "1", "--activation_checkpoint.offload"], "choose full or selective"),
        (["--world-size", "1", "--training.stepz", "3"], "training.steps"),
    ],
)
def test_what_it_refuses(options, words):
    with pytest.raises(SystemExit, match=re.escape(words)):
        main([str(ROOT / "train_configs" / "debug.toml"), *options])
