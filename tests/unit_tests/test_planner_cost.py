"""The planner's clusters, traces and cost model, on debug models: what it counts is what a dry run counts."""

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.pipelining.schedules import ScheduleInterleaved1F1B

from benchmarks.block_bytes import our_block, using
from titan_video.config.job_config import JobConfig
from titan_video.models import get_spec
from titan_video.planner import cluster as clusters
from titan_video.planner.candidate import FULL, NONE, PARTS, Candidate, Checkpointing, Range
from titan_video.planner.cluster import AttentionSample, Group, load, parse, with_room
from titan_video.planner.cost.memory_model import Backward, backwards
from titan_video.planner.cost.model import CostModel
from titan_video.planner.cost.seconds import recomputed
from titan_video.planner.cost.step_model import bubble
from titan_video.planner.dry_run.run import dry_run
from titan_video.planner.dry_run.step_tracker import Axis, bytes_sent
from titan_video.planner.plan_file import to_tables
from titan_video.planner.trace.recorder import CLIPS, LENGTH, LOAD, decode, decode_received, monomials

FILES = sorted(clusters.FOLDER.glob("*.toml"))
ATTENTION = Checkpointing("selective", ("attention", "down"))
BANDWIDTHS = (
    ("gpu", "peak_tflops"),
    ("gpu", "hbm_gb_per_s"),
    ("links", "node_gb_per_s"),
    ("links", "network_gb_per_s"),
    ("links", "host_gb_per_s"),
)


def job(family="wan", flavor="debug", bucket=(17, 128, 128), **model):
    """A job on clips of so many frames and pixels."""
    c = JobConfig()
    return replace(
        c,
        model=replace(c.model, name=family, flavor=flavor, **model),
        data=replace(c.data, buckets=(bucket,)),
        encoder=replace(c.encoder, max_text_length=16),
        activation_checkpoint=replace(c.activation_checkpoint, save_min_kv=32),
    )


def configured(config, candidate, num_blocks):
    for section, values in to_tables(candidate, num_blocks).items():
        known = vars(getattr(config, section))
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        config = replace(config, **{section: replace(getattr(config, section), **values)})
    return config


@cache
def traced_model(family="wan", flavor="debug"):
    """A model on eight H100, whose traces the tests of a process share."""
    return CostModel(job(family, flavor), load("h100x8"))


# ---- clusters ----


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_shipped_clusters(path):
    cluster = load(path.stem)
    assert cluster.name == path.stem and cluster.gpus % cluster.gpus_per_node == 0
    assert cluster.links.network_gb_per_s <= cluster.links.node_gb_per_s


def test_every_value_of_a_cluster_has_its_source():
    for path in FILES:
        for line in path.read_text().splitlines():
            name = line.partition(" = ")[0]
            is_identity = (
                not line or line.startswith(("#", "[")) or name in ("name", "gpus", "gpus_per_node", "read_gb")
            )
            assert is_identity or "#" in line, f"{path}: {line}"


@pytest.mark.parametrize(
    "section, field, value, words",
    [
        ("gpu", "memory_gib", -1, "gpu.memory_gib: given -1; legal: a number > 0"),
        ("gpu", "memory", 80, "gpu.memory: no such field; legal: name, memory_gib"),
        ("efficiency", "product", 1.5, "efficiency.product: given 1.5; legal: a number > 0 and <= 1"),
        ("links", "host_gb_per_s", "fast", "links.host_gb_per_s: given 'fast'; legal: a number > 0"),
        ("efficiency", "model", 1.5, "efficiency.model: given 1.5; legal: a number >= 0 and <= 1"),
        ("host", "synchronous", 1, "host.synchronous: given 1; legal: true, false"),
        (None, "gpus", 12, "gpus_per_node: given 8, which does not divide gpus 12"),
        (None, "wires", {}, "wires: no field of a cluster"),
        (None, "send", [{"bytes": 1}], "send[0].seconds: missing"),
    ],
)
def test_a_wrong_value_is_named_with_its_fix(section, field, value, words):
    raw = clusters.tomllib.loads((clusters.FOLDER / "h100x8.toml").read_text())
    (raw[section] if section else raw)[field] = value
    with pytest.raises(ValueError, match="somewhere") as error:
        parse(raw, "somewhere")
    assert words in str(error.value)


def test_a_file_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match="--cluster: nowhere.toml .* one of a800x64"):
        load("nowhere.toml")


def test_measured_messages_replace_the_formula():
    cluster = load("h100x8")
    rows = [{"ranks": 8, "ranks_per_node": 8, "bytes": n, "seconds": n / 1e10 + 1e-4} for n in (1000, 10**6, 10**9)]
    raw = clusters.tomllib.loads((clusters.FOLDER / "h100x8.toml").read_text()) | {"all_gather": rows}
    measured, group = parse(raw, "x"), Group(8, 8)
    assert measured.gather_seconds(10**6, group) == pytest.approx(2e-4)
    assert measured.gather_seconds(5 * 10**8, group) == pytest.approx(0.0501, rel=1e-3)
    assert measured.gather_seconds(10**6, group, "reduce_scatter") == cluster.gather_seconds(10**6, group)


# ---- traces ----


@pytest.mark.parametrize(
    "pp, m, chunks, expected", [(1, 4, 1, 0), (4, 8, 1, 3), (4, 2, 1, 3), (4, 8, 2, 1.5), (4, 1, 2, 3), (4, 2, 2, 2.5)]
)
def test_the_bubble_is_that_of_stages_one_after_the_other(pp, m, chunks, expected):
    """Chunks of equal time in lock step: micro-batch i enters a chunk when the one before has left it."""
    assert bubble(pp, m, chunks) == expected
    rounds, ends = -(-m // pp), {}
    for r in range(rounds):
        for chunk in range(chunks):
            for i in range(r * pp, min(m, (r + 1) * pp)):
                for rank in range(pp):
                    before = ends.get((i, chunk, rank - 1)) if rank else ends.get((i, chunk - 1, pp - 1), 0)
                    start = max(before, ends.get(rank, 0))
                    ends[i, chunk, rank] = ends[rank] = start + 1 / chunks
    assert ends[pp - 1] == m + bubble(pp, m, chunks)


def test_room_is_taken_from_a_gpu():
    machine = load("h100x8")
    assert with_room(machine, 5).gpu.memory_gib == machine.gpu.memory_gib - 5 and with_room(machine, 0) == machine
    for gib in (-1.0, 79.1, 100.0, float("nan")):
        with pytest.raises(ValueError, match="--room: given"):
            with_room(machine, gib)


def test_attention_has_the_rate_of_its_backend():
    rows = [AttentionSample(name, 4096, 128, rate, rate) for name, rate in (("math", 10.0), ("cudnn", 500.0))]
    machine = replace(load("h100x8"), attention=tuple(rows))
    rates = {name: machine.attention_rate(4096, 128, False, name) / 1e12 for name in ("auto", "math", "flash")}
    assert rates == pytest.approx({"auto": 500, "math": 10, "flash": 500})


def test_decoded_numbers():
    for poly in ((3, 0, 5, 0, 0), (0, 7, 0, 11, 0), (0, 512, 0, 64, 4)):
        number = poly[0] + CLIPS * poly[1] + LENGTH * poly[2] + CLIPS * LENGTH * poly[3] + CLIPS * LENGTH**2 * poly[4]
        assert decode(number) == (*poly, 0)
    assert decode_received(LOAD * 7 * CLIPS * LENGTH) == (0, 0, 0, 0, 0, 7)
    assert monomials(2, 10, load=1.5) @ (0, 0, 0, 0, 0, 7) == 7 * 2 * 10 * 1.5


@pytest.mark.parametrize(
    "family, flavor, ep",
    [
        ("wan", "debug", 1),
        ("wan", "debug-i2v", 1),
        ("wan", "moe-debug", 1),
        ("wan", "moe-debug", 4),
        ("hunyuan_video", "debug", 1),
    ],
)
def test_traced_flops_are_the_model_s(family, flavor, ep):
    """Of experts, those that are active, wherever they are."""
    model = traced_model(family, flavor)
    tokens, clips = model.workload[0].tokens, 3
    blocks, ends = model.tracer.trace(1, 1, 1, ep)
    values = monomials(clips, tokens)
    forward = sum(
        model.layers.count(kind) * np.dot(op.flops, values)
        for kind, trace in blocks.items()
        for op in trace.ops
        if op.part == "forward"
    )
    assert forward == model.args.block_flops(tokens, clips)
    whole = sum(np.dot(op.flops, values) for op in ends.ops if "backward" not in op.part)
    assert whole == pytest.approx(model.args.flops(tokens, clips) - forward, rel=0.1)  # modulation is in blocks too


def test_a_block_keeps_what_is_counted_without_a_run():
    config = job(flavor="t2v-1.3B")
    config = replace(config, encoder=replace(config.encoder, max_text_length=512))
    model, tokens = CostModel(config, load("h100x8")), 1000
    log = model.tracer.trace(1, 1, 1)[0]["blocks"].log
    kept = sum(log.sizes[s] @ monomials(1, tokens) for s in log.kept)
    with using("triton"):
        counted = our_block(model.args, tokens)["saved"]
    modulation = 24 * model.args.dim  # which the other count takes for shared
    assert kept - modulation == pytest.approx(counted, abs=1)


# ---- what is sent ----


def sent_by_blocks(model, candidate, mode):
    """{(collective, axis): bytes} that one rank's blocks send in a micro-batch."""
    clock, found = model.clock, Counter()
    work, trace = model.workload[0], model.trace(candidate)[0]
    degrees = {axis: getattr(candidate, axis) for axis in ("ulysses", "ring", "tp", "ep")}
    values = monomials(candidate.local_batch_size, -(-work.tokens // (candidate.cp * candidate.tp)))
    for path in model.layers:
        for part in ("forward", "backward", "again"):
            clock.block_seconds(candidate, path, part, work, mode if part == "again" else NONE)
            chosen = mode if part == "again" else NONE
            layout = candidate.ring, candidate.ulysses, candidate.tp, candidate.ep
            key = (*layout, path, part, chosen.mode, chosen.save, True)
            for axis, kind, payload, times in clock._works[key].sent:
                ranks = degrees[axis]
                # A ring's exchange is a send to one rank: nothing of it stays.
                kind_sent = "send" if axis == "ring" else kind
                found[kind, axis] += times * bytes_sent(kind_sent, round(payload @ values), Axis(axis, ranks, 0))
    assert recomputed(trace[path], NONE, True) == []
    return found


@pytest.mark.parametrize(
    "family, candidate",
    [
        pytest.param("wan", Candidate(ulysses=4), marks=pytest.mark.slow),
        pytest.param("wan", Candidate(ring=4), marks=pytest.mark.slow),
        ("wan", Candidate(ring=3, ulysses=2)),
        ("wan", Candidate(tp=2, ulysses=2, local_batch_size=2)),
        ("moe", Candidate(ulysses=4, ep=4)),
        ("moe", Candidate(dp_shard=2, tp=2, ep=2)),
        pytest.param("moe", Candidate(ring=4, tp=2, ep=8), marks=pytest.mark.slow),
        pytest.param("moe", Candidate(ulysses=2, dp_shard=4), marks=pytest.mark.slow),
        ("hunyuan_video", Candidate(ulysses=4)),
        pytest.param("hunyuan_video", Candidate(tp=2, ring=2), marks=pytest.mark.slow),
    ],
    ids=lambda x: x if isinstance(x, str) else f"ring{x.ring}-ulysses{x.ulysses}-tp{x.tp}-ep{x.ep}",
)
def test_bytes_of_collectives_are_those_that_a_dry_run_counts(family, candidate):
    """Equal by kind, at degrees that were not traced. Of all-reduces, those of the blocks' own statistics: others, of a
    few vectors' gradients under tensor parallel, are left out of the prediction."""
    experts = family == "moe"
    model = traced_model("wan", "moe-debug") if experts else traced_model(family)
    candidate = replace(candidate, ranges=(Range(0, len(model.layers), ATTENTION),))
    config = configured(model.config, candidate, len(model.layers))
    counted, predicted = Counter(), Counter()
    for c in dry_run(config, candidate.num_training_ranks).collectives:
        counted[c.kind] += c.sent
    for (kind, _), sent in sent_by_blocks(model, candidate, ATTENTION).items():
        predicted[kind] += sent
    units, shards = model.units(candidate), candidate.dp_shard * candidate.cp
    ranks = shards * candidate.tp
    sharded = [(units.blocks[kind], shards, 2) for kind in model.layers]
    sharded += [(units.experts[kind], ranks // candidate.ep, 2) for kind in model.layers if kind in units.experts]
    ends = [*units.first.items(), *units.last.items()]
    sharded += [(unit, ranks, 2 if name and shards > 1 else 1) for name, unit in ends]
    sharded += [(units.per_block[kind], ranks, 1) for kind in model.layers]
    for unit, group, gathers in sharded:
        is_float32 = unit.gathered > 2 * unit.elements
        padded = unit.reduced if is_float32 else unit.reduced // 2  # shards are padded to equal rows
        predicted["all-gather"] += gathers * padded * (group - 1) // group
        predicted["reduce-scatter"] += unit.reduced * (group - 1) // group
    if experts:  # biases of routers are gathered, but have no gradients
        num = model.experts.num_experts
        predicted["all-gather"] += 3 * 4 * ranks * -(-num // ranks) * (ranks - 1) // ranks
    # Nothing reads the text that leaves HunyuanVideo's last block, so it has no gradient to send.
    text = candidate.local_batch_size * model.args.text_len * model.args.dim * 2 * (family == "hunyuan_video")
    assert predicted.pop("all-reduce", 0) <= counted.pop("all-reduce", 0) + 2 * text
    if text:
        for kind in ("reduce-scatter", "all-gather"):
            unused = predicted[kind] - counted.pop(kind)
            assert 0 <= unused < 2 * text
            del predicted[kind]
    assert predicted == counted


# ---- predictions ----


CANDIDATES = (
    Candidate(dp_shard=8),
    Candidate(dp_shard=2, ulysses=2, ring=2, microbatches=2),
    Candidate(pp=2, dp_shard=2, tp=2, microbatches=4, ranges=(Range(0, 2, FULL), Range(2, 4, ATTENTION))),
    Candidate(dp_replicate=2, dp_shard=2, ulysses=2, enable_cpu_offload=True, ranges=(Range(0, 4, FULL),)),
    Candidate(pp=2, ring=4, microbatches=4, schedule="Interleaved1F1B", ranges=(Range(0, 4, ATTENTION),)),
)


@pytest.fixture(scope="module")
def traced():
    return traced_model()


def on(model, cluster):
    """The same model on another cluster."""
    other = CostModel(model.config, cluster)
    other.tracer = model.tracer
    return other


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_parts_sum_to_the_step(candidate, traced):
    p = traced.predict(candidate)
    assert p.step_seconds == pytest.approx(sum(p.seconds.values())) and set(p.seconds) <= set(PARTS)
    assert all(value >= 0 for value in p.seconds.values())
    assert 0 < p.mfu < 1 and p.clips == candidate.dp * candidate.microbatches * candidate.local_batch_size
    assert len(p.memory) == candidate.pp and p.flops > p.model_flops / 2


@pytest.mark.parametrize("section, field", BANDWIDTHS)
def test_time_never_rises_with_a_bandwidth(section, field, traced):
    cluster = load("h100x8")
    usual = getattr(getattr(cluster, section), field)
    factors = (0.01, 0.1, 0.5, 1, 2, 10, 1000)
    models = [on(traced, changed(cluster, **{section: {field: usual * factor}})) for factor in factors]
    for candidate in CANDIDATES:
        last = float("inf")
        for factor, model in zip(factors, models, strict=True):
            seconds = model.predict(candidate).step_seconds
            assert seconds <= last * (1 + 1e-9), (candidate, field, factor)
            last = seconds


def test_what_fits_still_fits_with_more_memory(traced):
    cluster = load("h100x8")
    sizes = (0.5, 1.0, 1.5, 1.6, 1.7, 2, 4, 80)
    models = [on(traced, changed(cluster, gpu={"memory_gib": gib})) for gib in sizes]
    for candidate in CANDIDATES:
        fits = [model.fits(candidate) for model in models]
        assert fits == sorted(fits) and fits[-1] and not fits[0]


def changed(cluster, **sections):
    """The cluster with other values: section = {field: value}."""
    return replace(cluster, **{name: replace(getattr(cluster, name), **new) for name, new in sections.items()})


def test_checkpointing_saves_memory_and_costs_time(traced):
    def measure(mode):
        p = traced.predict(Candidate(dp_shard=8, ranges=(Range(0, 4, mode),)))
        return p.step_seconds, p.memory[0].total

    none, attention, full = map(measure, (NONE, ATTENTION, FULL))
    assert none[0] < attention[0] < full[0] and none[1] > attention[1] > full[1]


def test_the_search_adds_up_what_is_predicted(traced):
    """`layout` and `predict` agree on the step of one stage, and of two."""
    three = CANDIDATES[0], CANDIDATES[1], replace(CANDIDATES[2], ranges=(Range(0, 4, ATTENTION),))
    waits = {"wait_us": 100.0, "unit_wait_us": 300.0, "pipeline_slowdown": 1.5}
    cpu = on(traced, changed(load("h100x8"), host={"synchronous": True, "tensor_us": 10.0}, links=waits))
    moe = on(traced_model(flavor="moe-debug"), cpu.cluster)  # where launches hide nothing
    # With ep 1 the gradients of experts are first summed over tensor parallel.
    mixtures = [(moe, Candidate(dp_shard=4, tp=2)), (moe, Candidate(dp_shard=2, ulysses=2, tp=2, ep=4))]
    for model, candidate in [(m, c) for m in (traced, cpu) for c in three] + mixtures:
        layout = model.layout(candidate)
        mode = candidate.ranges[0].checkpointing if candidate.ranges else NONE
        choice = {kind: next(c for c in found if c.name == mode) for kind, found in layout.choices.items()}
        stages = [
            budget.seconds + sum(choice[model.layers[i]].seconds for i in blocks)
            for budget, blocks in zip(layout.stages, model.stages(candidate), strict=True)
        ]
        assert layout.step_seconds(stages) == pytest.approx(model.predict(candidate).step_seconds, rel=1e-6)


def test_what_is_not_planned_is_refused():
    config = job()
    with pytest.raises(ValueError, match="lora.enable"):
        CostModel(replace(config, lora=replace(config.lora, enable=True)), load("h100x8"))
    with pytest.raises(ValueError, match="moe-debug-expert-choice choose tokens"):
        CostModel(job(flavor="moe-debug-expert-choice"), load("h100x8"))
    with pytest.raises(ValueError, match="optimizer.name"):
        CostModel(replace(config, optimizer=replace(config.optimizer, name="torch.optim.RAdam")), load("h100x8"))


def test_nothing_of_a_trace_is_left_in_the_process(traced):
    import torch.distributed as dist

    traced.predict(CANDIDATES[0])
    assert not dist.is_initialized() and Path("train_configs").exists()
    assert get_spec("wan").flavors["debug"].num_layers == 4


@pytest.mark.parametrize("pp, microbatches", [(2, 2), (2, 4), (2, 8), (4, 4), (4, 8), (4, 16), (3, 6)])
@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_rank_holds_follows_from_torchs_order(pp, microbatches, rank):
    """Of each backward in torch's own list of a rank's actions; what holds less than another one is left out."""
    schedule = object.__new__(ScheduleInterleaved1F1B)
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = pp, 2, microbatches
    schedule.number_of_rounds = max(1, microbatches // pp)
    schedule.microbatches_per_round = microbatches // schedule.number_of_rounds
    in_flight, begun, seen = [0, 0], [False, False], []
    for action in filter(None, schedule._calculate_single_rank_operations(rank)):
        chunk = action.stage_index // pp
        if action.computation_type.name == "FORWARD":
            in_flight[chunk] += 1
        else:
            seen.append(Backward(chunk, tuple(in_flight), tuple(begun)))
            in_flight[chunk] -= 1
            begun[chunk] = True
    assert len(seen) == 2 * microbatches
    found = backwards(pp, microbatches, "Interleaved1F1B", rank)
    assert set(found) == {b for b in seen if not any(o.covers(b) and o != b for o in seen)}


@pytest.mark.parametrize(
    "schedule, microbatches, expected",
    [
        ("GPipe", 3, {((3,), (False,)), ((2,), (True,))}),
        ("1F1B", 2, {((2,), (False,)), ((1,), (True,))}),
        ("1F1B", 5, {((2,), (True,))}),
    ],
)
def test_gradients_are_there_from_the_second_backward_on(schedule, microbatches, expected):
    found = backwards(2, microbatches, schedule, 0)
    assert {(b.in_flight, b.has_gradients) for b in found} == expected
