"""What the planner writes: tables, the page, time lines, plan.toml; on the small cost model of planner_model.py."""

import csv
import io
import json
import re
from dataclasses import fields, replace

import pytest

from tests.helpers import ROOT
from tests.planner_model import ATTENTION, SmallModel
from titan_video.config import manager
from titan_video.config.check import check
from titan_video.config.job_config import (
    ActivationCheckpoint,
    CheckpointRange,
    Data,
    JobConfig,
    Model,
    Optimizer,
    Parallelism,
    Training,
)
from titan_video.config.values import tomllib
from titan_video.planner import __main__ as program
from titan_video.planner import cluster
from titan_video.planner.candidate import FULL, NONE, PARTS, Candidate, Checkpointing, Range
from titan_video.planner.cost import timeline
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.plan import Job, as_it_is, make_plan, smallest_change
from titan_video.planner.plan_file import merged, plan_tables, to_candidate, write_toml
from titan_video.planner.report import files as report
from titan_video.planner.report.page import build_page, pareto, read_data
from titan_video.planner.search.explain import name_of, rejections, why_not
from titan_video.planner.search.space import parse_fixed, refusals

TOML = ROOT / "train_configs" / "wan2.1_t2v_14b_720p_64gpu.toml"
H100, ONE_NODE = (cluster.load(ROOT / "train_configs" / "clusters" / f"h100x{n}.toml") for n in (64, 8))
LAYERS = 40


def build(config, machine, shares, saved=40.0, weights=60.0):
    usable = (machine.gpu.memory_gib - 1.6) / 1.05 * GIB
    tokens = max(bucket[0] for bucket in config.data.sizes) / 81
    return SmallModel(
        ("blocks",) * LAYERS, usable, {"blocks": 1.5}, {"blocks": saved * tokens * GIB}, weights=weights * GIB
    )


def job(**values):
    values = {"build": build, "cluster": H100, **values}
    return Job(manager.load(TOML), **values)


@pytest.fixture(scope="module")
def planned():
    return make_plan(job())


@pytest.fixture(scope="module")
def pipelined():
    return make_plan(job(fixed={"pp": 4}))


def source():
    return report.Source("job.toml", manager.read_file(TOML))


# ---- the page ----


@pytest.mark.parametrize("name", ["planned", "pipelined"])
def test_bars_of_the_page_sum_to_the_predicted_totals(name, request):
    plan = request.getfixturevalue(name)
    data = read_data(build_page(report.page_data(plan, source())))
    p = plan.result.chosen.prediction
    assert sum(data["parts"].values()) == pytest.approx(p.step_seconds) == pytest.approx(data["step_seconds"])
    assert list(data["parts"]) == list(PARTS)
    assert len(data["memory"]) == len(p.memory)
    for bar, stage in zip(data["memory"], p.memory, strict=True):
        assert sum(bar["kinds"].values()) == pytest.approx(bar["total"]) == pytest.approx(stage.total)
        assert bar["total"] <= bar["usable"] < bar["capacity"]
    ranks = [list(map(int, re.findall(r"\d+", bar["ranks"])))[:2] for bar in data["memory"]]
    assert ranks[0][0] == 0 and ranks[-1][1] == 63
    assert all(a[1] + 1 == b[0] for a, b in zip(ranks, ranks[1:], strict=False))


def test_the_page_stands_alone(planned):
    page = build_page(report.page_data(planned, source()))
    assert page.count("<svg") == 5
    links = set(re.findall(r"(?:src|href)\s*=\s*\"([^#\"][^\"]*)\"", page))
    assert not links, links
    assert "url(" not in re.sub(r"url\(#[\w.-]+\)", "", page)
    data = read_data(page)
    assert sum(plan["chosen"] for plan in data["plans"]) == 1
    assert {plan["name"] for plan in data["plans"]} >= {"dp_shard 8, ring 2, ulysses 2, tp 2; " + first_ranges(planned)}


def first_ranges(planned):
    from titan_video.planner.search.explain import saved_by

    return saved_by(planned.result.chosen.candidate)


def test_the_curve_trades_memory_for_time(planned):
    points = [(plan.prediction.fullest.total, plan.seconds) for plan in report.curve(planned)]
    chosen = planned.result.chosen
    assert len(points) >= 3
    assert all(size < chosen.prediction.fullest.total and seconds > chosen.seconds for size, seconds in points)
    front = pareto(report.page_data(planned, source())["plans"])
    assert all(a["bytes"] < b["bytes"] and a["seconds"] > b["seconds"] for a, b in zip(front, front[1:], strict=False))


def test_a_page_without_matplotlib_is_refused(planned, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib.*--no-page"):
        build_page(report.page_data(planned, source()))


# ---- time lines ----


def test_lanes_do_not_overlap_and_end_with_the_step(planned, pipelined):
    for plan in (planned, pipelined):
        data = report.page_data(plan, source())
        for events in (data["layer"], data["step"]):
            for lane in {event["lane"] for event in events}:
                own = sorted((e["start"], e["start"] + e["seconds"]) for e in events if e["lane"] == lane)
                assert all(b[0] >= a[1] - 1e-9 for a, b in zip(own, own[1:], strict=False)), lane
        end = max(event["start"] + event["seconds"] for event in data["step"])
        assert end == pytest.approx(data["step_seconds"], rel=1e-6 if plan is planned else 0.1)


@pytest.mark.parametrize("schedule, stages", [("1F1B", 3), ("Interleaved1F1B", 4)])
def test_every_micro_batch_passes_every_stage_in_order(schedule, stages):
    times = timeline.StepTimes([1.0] * stages, [2.0] * stages, microbatches=4, schedule=schedule)
    ends = {(e["lane"], e["name"]): e["start"] + e["seconds"] for e in timeline.step_events(times)}
    begins = {(e["lane"], e["name"]): e["start"] for e in timeline.step_events(times)}
    assert len(ends) == 2 * stages * 4
    for i in range(4):
        for s in range(stages):
            lane, after = f"stage {s:>2}", f"stage {s + 1:>2}"
            assert begins[lane, f"B{i}"] >= ends[lane, f"F{i}"] - 1e-9
            if s + 1 < stages:
                assert begins[after, f"F{i}"] >= ends[lane, f"F{i}"] - 1e-9
                assert begins[lane, f"B{i}"] >= ends[after, f"B{i}"] - 1e-9
    if schedule == "1F1B":
        assert max(ends.values()) == pytest.approx((4 + stages - 1) * 3)


def test_the_chrome_trace_has_all_events(planned):
    data = report.page_data(planned, source())
    trace = json.loads(timeline.chrome_trace({"block": data["layer"], "step": data["step"]}))["traceEvents"]
    spans = [row for row in trace if row["ph"] == "X"]
    assert len(spans) == len(data["layer"]) + len(data["step"])
    assert sum(row["dur"] for row in spans) == pytest.approx(
        1e6 * sum(e["seconds"] for e in data["layer"] + data["step"])
    )


# ---- plan.toml ----

CANDIDATES = [
    Candidate(dp_shard=64, microbatches=1, local_batch_size=1),
    Candidate(dp_replicate=2, dp_shard=4, ring=2, ulysses=2, tp=2, reshard=False, ranges=(Range(0, LAYERS, FULL),)),
    Candidate(dp_shard=4, ulysses=8, tp=2, local_batch_size=2, ranges=(Range(0, LAYERS, ATTENTION),)),
    Candidate(
        pp=4,
        dp_shard=2,
        ring=8,
        microbatches=8,
        split=(0, 9, 20, 31),
        ranges=(
            Range(0, 7, FULL),
            Range(7, 8, Checkpointing("selective", ("attention", "down", "exchange"), offload=False)),
            Range(8, 30, Checkpointing("selective", ("attention",), offload=True)),
            Range(30, LAYERS, NONE),
        ),
    ),
    Candidate(dp_shard=32, ring=2, tokens_per_microbatch=151200, local_batch_size=2, microbatches=2),
    Candidate(dp_shard=60, microbatches=2, placement="separate", encoder_ranks=4, optimizer="AdamW8bit"),
    Candidate(
        pp=2, dp_shard=32, microbatches=4, local_batch_size=2, schedule="Interleaved1F1B", enable_cpu_offload=True
    ),
]


@pytest.mark.parametrize("candidate", CANDIDATES, ids=name_of)
def test_a_plan_survives_its_toml(candidate, tmp_path):
    """What is written is read back as the same candidate, by the trainer's own parser."""
    candidate = replace(candidate, ranges=candidate.ranges or (Range(0, LAYERS, NONE),))
    path = tmp_path / "plan.toml"
    path.write_text(write_toml(plan_tables(manager.read_file(TOML), candidate, LAYERS), ["world size: 64", "", "  x"]))
    config = manager.load(path)
    clips = candidate.local_batch_size if candidate.tokens_per_microbatch else 0
    assert to_candidate(config, 64, LAYERS, clips) == candidate
    assert path.read_text().startswith("# world size: 64\n#\n#   x\n")


def test_all_kinds_of_overrides_are_in_the_plan(tmp_path):
    data = tmp_path / "data.toml"
    data.write_text('[data]\npath = "embedded:shapes-64"\nbuckets = [[81, 480, 832]]\n')
    words = ["--data.file", str(data), "--encoder.idle=free", "--encoder.placement", "colocated", "--ema.enable"]
    config = manager.parse_args(["--job.config_file", str(TOML), *words])
    raw = {**manager.read_file(TOML), "encoder": {"idle": "offload"}}
    tables = report.Source("job.toml", raw, words).with_overrides(config)
    path = tmp_path / "plan.toml"
    path.write_text(write_toml(tables, []))
    found = manager.load(path)
    assert replace(found, job=config.job) == config and found.data.path == "embedded:shapes-64"


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": Optimizer(in_backward=True), "training": Training(global_batch_size=8, max_norm=0.0)},
        {"model": Model(attention="flex", flavor="t2v-14B")},
        {"training": Training(global_batch_size=1, mixed_precision_reduce="bfloat16")},
        {"parallelism": Parallelism(enable_async_tensor_parallel=True, tensor_parallel_degree=2)},
        {"data": Data(groups_per_step=4, buckets=((81, 720, 1280),))},
    ],
    ids=lambda options: next(iter(options)),
)
def test_the_trainer_takes_what_is_planned_beside_options_that_stay(options, tmp_path):
    config = replace(manager.load(TOML), **options)
    of_plan = job(cluster=ONE_NODE)
    of_plan = replace(of_plan, config=config)
    space = of_plan.space(of_plan.build(config, ONE_NODE, None))
    candidates = list(space)
    assert candidates
    for candidate in candidates[:: max(1, len(candidates) // 20)]:
        tables = plan_tables(tomllib.loads(manager.dump(config)), candidate, LAYERS)
        check(manager.from_dict(tables), ONE_NODE.gpus, files=False)


def test_a_block_that_the_model_does_not_have_is_named():
    section = ActivationCheckpoint(range=(CheckpointRange(layers="38-40", mode="full"),))
    config = replace(manager.load(TOML), activation_checkpoint=section)
    with pytest.raises(ValueError, match="the last of the model's blocks is 39"):
        to_candidate(config, 64, LAYERS)
    assert "the last of the model's blocks is 39" in as_it_is(replace(job(), config=config), make_plan(job()).model)


def test_a_toml_that_cannot_run_as_it_is_says_why(planned):
    parallelism = Parallelism(pipeline_parallel_degree=64)
    config = replace(planned.job.config, parallelism=parallelism)
    assert "legal: at most 40" in as_it_is(replace(planned.job, config=config), planned.model)


def test_a_pipeline_s_micro_batches_have_their_share_of_a_token_budget():
    data = Data(tokens_per_microbatch=4 * 75600, global_micro_batches=32)
    parallelism = Parallelism(pipeline_parallel_degree=2, pipeline_parallel_microbatch_size=2)
    config = replace(manager.load(TOML), data=data, training=Training(), parallelism=parallelism)
    found = to_candidate(config, 64, LAYERS, clips=4)
    assert (found.local_batch_size, found.tokens_per_microbatch, found.microbatches) == (2, 2 * 75600, 2)


def test_what_belongs_to_another_placement_is_left_out(tmp_path):
    raw = {"encoder": {"placement": "separate", "num_ranks": 4, "queue_depth": 8, "write_cache": True}}
    tables = plan_tables(raw, Candidate(dp_shard=8, placement="colocated"), 4)
    assert tables["encoder"] == {"placement": "colocated", "write_cache": True}
    raw = {"encoder": {"placement": "colocated", "offload_policy": "free"}}
    tables = plan_tables(raw, Candidate(dp_shard=6, placement="separate", encoder_ranks=2), 4)
    assert tables["encoder"] == {"placement": "separate", "num_ranks": 2}


def test_the_rest_of_the_toml_stays(tmp_path, planned):
    paths = report.write(planned, replace(source(), overrides=("--training.steps=7", "--data.fps", "12")), tmp_path)
    assert {path.name for path in paths} == {
        "plan.toml",
        "plan.html",
        "plan.json",
        "plans.md",
        "plans.csv",
        "timeline.json",
    }
    old, new = manager.load(TOML), manager.load(tmp_path / "plan.toml")
    chosen = {"parallelism", "training", "activation_checkpoint"}
    for f in fields(JobConfig):
        if f.name not in chosen | {"data"}:
            assert getattr(new, f.name) == getattr(old, f.name), f.name
    assert replace(new.data, fps=old.data.fps) == old.data
    assert new.training.lr if hasattr(new.training, "lr") else new.optimizer.lr == old.optimizer.lr
    check(new, 64, files=False)


def test_the_comment_says_what_is_predicted(tmp_path, planned):
    report.write(planned, source(), tmp_path, page=False)
    comment = [line[2:] for line in (tmp_path / "plan.toml").read_text().splitlines() if line.startswith("# ")]
    text, p = " ".join(comment), planned.result.chosen.prediction
    assert comment[0] == "world size: 64" and f"{p.step_seconds:.3f} s a step, MFU {p.mfu:.1%}" in text
    for stage in p.memory:
        assert all(f"{kind} {size / GIB:.2f}" in text for kind, size in stage.by_kind.items())
    assert f"Hash of the assumptions: {report.assumption_hash(planned)}" in text
    assert "H100 SXM5 80 GB" in text and max(map(len, comment)) <= 118
    assert not (tmp_path / "plan.html").exists()
    other = replace(planned, job=replace(planned.job, cluster=replace(H100, gpus=32)))
    assert report.assumption_hash(other) != report.assumption_hash(planned)


# ---- tables ----


def test_tables_are_ranked_and_complete(tmp_path, planned):
    report.write(planned, source(), tmp_path, page=False)
    rows = list(csv.DictReader(io.StringIO((tmp_path / "plans.csv").read_text())))
    assert len(rows) == len(planned.result.plans)
    seconds = [float(row["step_seconds"]) for row in rows]
    assert seconds == sorted(seconds) and [row["chosen"] for row in rows].count("True") == 1
    for row, value in zip(rows, seconds, strict=True):
        assert sum(float(row[f"seconds: {part}"]) for part in PARTS) == pytest.approx(value)
        assert row["binding"]
    page = (tmp_path / "plans.md").read_text()
    assert page.count("\n| *") == 1 and planned.result.chosen.binding in page


# ---- why, and what if ----


def test_why_a_layout_is_not_the_plan(planned):
    def why(text):
        return "\n".join(why_not(planned.model, planned.space, planned.result, parse_fixed(text, "--explain")))

    assert "tp = 3 does not divide" not in why("tp=2") and "it is the plan" in why("tp=2")
    assert "tp = 16 does not divide the model's 40 heads" in why("tp=16")
    assert "crosses nodes of 8 GPUs" in why("tp=16")
    assert "ulysses = 16 does not divide the 40 heads" in why("ulysses=16")
    assert "multiply to 63" in why("ring=7,dp_shard=9")
    assert "dp = 64 does not divide the 8 clips" in why("dp_shard=64")
    assert "pp = 16 needs as many micro-batches, but a data-parallel rank has 8" in why("pp=16")
    slower = why("tp=1,cp=8")
    assert re.search(r"[\d.]+ s a step, [\d.]+% slower than the chosen", slower) and "products +" in slower
    lacks = why("dp_replicate=8,tp=8")
    assert re.search(r"does not fit\n.*lacks [\d.]+ GiB", lacks), lacks


def test_what_became_of_all_candidates(planned):
    lines = rejections(planned.space, planned.result)
    numbers = [int(re.match(r"([\d,]+)", line)[1].replace(",", "")) for line in lines if line[0].isdigit()]
    assert numbers[0] == planned.result.num_candidates == len(list(planned.space))
    assert sum(numbers[1:4]) == numbers[0]
    assert any("memory, even if every block saves the least" in line for line in lines)


def test_rules_that_exclude_layouts_are_named():
    config = manager.load(TOML)
    config = replace(
        config, model=replace(config.model, attention="flex"), data=replace(config.data, groups_per_step=2)
    )
    planned = make_plan(replace(job(cluster=ONE_NODE), config=config))
    lines = "\n".join(rejections(planned.space, planned.result))
    every, legal = list(planned.space.every()), list(planned.space)
    assert 0 < len(legal) < len(every) and not any(c.ring > 1 or c.pp > 1 for c in legal)
    rings, pipelines = (sum(getattr(c, name) > 1 for c in every) for name in ("ring", "pp"))
    assert f"{rings:,} are not run with this job's model.attention: flex" in lines
    assert f"{pipelines:,} are not run with this job's data.groups_per_step" in lines

    def why(text):
        return why_not(planned.model, planned.space, planned.result, parse_fixed(text, "--explain"))

    assert why("pp=2")[0] == "pp=2: not legal here" and "data.groups_per_step" in why("pp=2")[1]
    assert any("model.attention: flex, which no ring runs" in line for line in why("cp=4"))
    assert not any("not run" in line for line in why("tp=2,pp=1,ring=1"))


def test_options_that_exclude_layouts():
    """Each option that excludes layouts, on one that it excludes and on one that it does not."""
    c = manager.load(TOML)
    cases = (
        (
            replace(c, optimizer=replace(c.optimizer, in_backward=True)),
            Candidate(dp_replicate=2),
            Candidate(dp_shard=2),
        ),
        (replace(c, optimizer=replace(c.optimizer, in_backward=True)), Candidate(microbatches=2), Candidate(ulysses=2)),
        (replace(c, compile=replace(c.compile, enable=True)), Candidate(dp_shard=2, ep=2), Candidate(dp_shard=2)),
        (replace(c, training=replace(c.training, mixed_precision_reduce="bfloat16")), Candidate(), Candidate(tp=2)),
        (replace(c, parallelism=replace(c.parallelism, enable_fsdp_symm_mem=True)), Candidate(pp=2), Candidate(ring=2)),
    )
    for config, excluded, legal in cases:
        assert list(refusals(config, excluded)) and not list(refusals(config, legal)), (excluded, legal)


def test_what_if(planned):
    text = "\n".join(program.what_if(planned, "tp=8"))
    assert text.startswith("with tp=8:\n  ") and "tp 8" in text and "% slower than the chosen" in text
    assert "not legal" in "\n".join(program.what_if(planned, "tp=16"))


def test_what_if_keeps_what_is_fixed(pipelined):
    assert program.what_if(pipelined, "tp=2")[1].startswith("  pp 4, ")
    (line, *_) = program.explained(pipelined, "dp_shard=16,pp=4")
    assert "pp=4" in line


@pytest.mark.parametrize(
    "text, message",
    [("tq=8", "nearest: tp"), ("tp", "not NAME=VALUE"), ("tp=0", "at least 1"), ("reshard=maybe", "true or false")],
)
def test_values_that_cannot_be(text, message):
    with pytest.raises(ValueError, match=f"--fix.*{message}"):
        parse_fixed(text, "--fix")


# ---- what does not fit ----


def test_what_is_needed_is_used_and_named():
    def heavy(config, machine, shares):
        model = build(config, machine, shares, weights=110.0)
        return LightOptimizer(**{f.name: getattr(model, f.name) for f in fields(model)})

    planned = make_plan(job(build=heavy, cluster=ONE_NODE))
    assert planned.needed == ("8bit",)
    assert planned.result.chosen.candidate.optimizer == "AdamW8bit"
    assert "Without 8bit nothing fits." in report.comment(planned, source())


class LightOptimizer(SmallModel):
    """8-bit moments need less."""

    def held_bytes(self, c, blocks):
        return super().held_bytes(c, blocks) * (0.5 if c.optimizer == "AdamW8bit" else 1)


def test_the_smallest_change_that_fits():
    def long(config, machine, shares):
        return build(config, machine, shares, saved=500.0)

    planned = make_plan(job(build=long, cluster=ONE_NODE))
    assert planned.result.chosen is None
    lines = smallest_change(planned)
    assert re.search(r"no plan fits h100x8: the nearest, .* lacks [\d.]+ GiB", lines[0])
    frames = int(re.search(r"clips of (\d+) frames instead of 81", "\n".join(lines))[1])
    assert frames % 4 == 1

    def fits(n):
        data = replace(planned.job.config.data, buckets=((n, 720, 1280),))
        return make_plan(replace(planned.job, config=replace(planned.job.config, data=data))).result.chosen

    assert fits(frames) and not fits(frames + 4)


@pytest.mark.parametrize(
    "shares, message", [("81x720=x", "FRAMESxHEIGHTxWIDTH"), ("81x720x1280=0.5", "sum to 0.5"), ("a=1", "FRAMES")]
)
def test_shares_that_cannot_be(shares, message):
    with pytest.raises(ValueError, match=message):
        program.parse_shares(shares)


def test_neighbours_become_one_range():
    assert merged([Range(0, 1, FULL), Range(1, 3, FULL), Range(3, 4, NONE)]) == (Range(0, 3, FULL), Range(3, 4, NONE))
