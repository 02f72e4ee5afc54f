"""Numbers that are wrong on one rank of a run: all ranks decide the same, nothing is touched, clips are named."""

import json
import math
import random
import re
import signal
from functools import partial
from pathlib import Path

import pytest

from tests.faults import NAN, events, flipped_bits, injected, noted
from tests.integration_tests.conftest import Run
from tests.integration_tests.test_optional_parts import hide
from tests.integration_tests.test_resume import assert_same_checkpoint

RANKS = 2
OPTIONS = {
    "training.steps": 12,
    "checkpoint.interval": 3,
    "ema.enable": "true",
    "ema.decay": 0.9,
    "fault_tolerance.max_rollbacks": 100,
}
# One of each kind on each rank.
FAULTS = {4: (0, "loss", NAN), 6: (1, "loss", NAN), 8: (0, "gradient", NAN), 11: (1, "gradient", NAN)}


def rows_of_faults(run, faults):
    """The rows of the steps with a fault, which are the same on all ranks but for the digests."""
    by_rank = [[row for row in noted(run, rank) if row["data_step"] in faults] for rank in range(RANKS)]
    plain = [[{k: v for k, v in row.items() if k not in ("before", "after")} for row in rows] for rows in by_rank]
    assert plain[0] == plain[1] and len(plain[0]) == len(faults)
    return by_rank


def assert_named(event, data_step, kind, rank):
    """Steps have four clips; each rank has two, in order, and its first one is wrong."""
    ids = list(range(4 * data_step - 4, 4 * data_step))
    named = {clip["sample_id"]: clip["path"] for clip in event["clips"]}
    assert set(named) == ({ids[2 * rank]} if kind == "loss" else set(ids)), (named, ids)
    assert all("shapes" in path for path in named.values())


def test_stop(front):
    """Here the run goes on after the error that would end it, so that one run shows all kinds."""
    run = front.run("run", OPTIONS, RANKS, partial(injected, FAULTS, go_on=True)).ok()
    for rows in rows_of_faults(run, FAULTS):
        for row in rows:
            assert row["before"] == row["after"] and row["goes_on_from"] == row["step"] == row["data_step"]
            assert re.match(rf"step {row['step']}: loss .* is not finite; the update was not applied", row["error"])
            assert "sample" in row["error"] and "titan_video.replay" in row["error"]
    assert len(run.records) == 12  # the bad steps are there, too
    for event, (step, (rank, kind, _)) in zip(events(run), FAULTS.items(), strict=True):
        assert event["action"] == "stop" and event["step"] == step
        assert_named(event, step, kind, rank)
    for step, (_, kind, _) in FAULTS.items():
        assert run.records[step - 1]["loss" if kind == "loss" else "grad_norm"] == "nan"


def test_stop_ends_the_run(front):
    run = front.run("run", OPTIONS, RANKS, partial(injected, {4: FAULTS[4]}))
    run.fails_with("step 4: loss nan", "optimizer.lr", "Clips whose loss is not finite", "sample 12,")
    assert len(run.records) == 4 and run.checkpoint(3).is_dir() and not run.checkpoint(4).exists()


def without_the_part(faults):
    """A hook."""
    hide("training.faults")
    injected(faults)


def test_stop_without_the_optional_part(front):
    run = front.run("run", OPTIONS, hook=partial(without_the_part, {4: FAULTS[4]}))
    run.fails_with("error: step 4: loss nan, gradient norm", "is not finite; the update was not applied")
    assert len(run.records) == 4 and run.records[3]["loss"] == "nan" and not (run.folder / "bad_steps").exists()


def test_skip(front):
    run = front.run("run", {**OPTIONS, "fault_tolerance.nonfinite": "skip"}, RANKS, partial(injected, FAULTS)).ok()
    for rows in rows_of_faults(run, FAULTS):
        assert all(row["before"] == row["after"] and row["goes_on_from"] == row["step"] for row in rows)
    good = [row for row in noted(run) if row["data_step"] not in FAULTS]
    assert len(good) == 8 and all(row["before"] != row["after"] for row in good)
    assert [event["action"] for event in events(run)] == ["skip"] * 4 and len(run.records) == 12
    for event, (step, (rank, kind, _)) in zip(events(run), FAULTS.items(), strict=True):
        assert_named(event, step, kind, rank)
    assert run.output.count("update skipped (1 of at most 10 in a row)") == 4


ROLLBACK = {**OPTIONS, "fault_tolerance.nonfinite": "rollback"}


@pytest.fixture(scope="module")
def rolled_back(shared_front):
    return shared_front.run("whole", ROLLBACK, RANKS, partial(injected, FAULTS)).ok()


def test_rollback(rolled_back):
    run = rolled_back
    for rank, rows in enumerate(rows_of_faults(run, FAULTS)):
        after_step = {}
        for row in noted(run, rank):
            if row in rows:
                # The state is that of the checkpoint, the data go on.
                assert row["goes_on_from"] == (row["step"] - 1) // 3 * 3
                assert row["after"] == after_step[row["goes_on_from"]]
            after_step[row["goes_on_from"]] = row["after"]
    assert [row["data_step"] for row in noted(run)] == list(range(1, len(noted(run)) + 1))
    assert [event["action"] for event in events(run)] == ["rollback"] * 4
    for event, (data_step, (rank, kind, _)) in zip(events(run), FAULTS.items(), strict=True):
        assert_named(event, data_step, kind, rank)
    assert len(run.records) == 12 and "nan" not in {str(row["loss"]) for row in run.records}
    samples = [row["samples"] for row in run.records]
    assert samples == sorted(set(samples)) and samples[-1] == 4 * noted(run)[-1]["data_step"]


def test_a_kill_after_a_rollback_repeats_the_decisions(rolled_back, front):
    """The kill comes after the rollback of step 6 of the data, before the next save."""
    killed = front.run("killed", ROLLBACK, RANKS, partial(injected, FAULTS, kill_at=7))
    assert killed.code == -signal.SIGKILL and len(events(killed)) == 2, killed.output
    run = front.run("killed", ROLLBACK, RANKS, partial(injected, FAULTS)).ok()
    assert run.records == rolled_back.records and events(run) == [
        {**event, "kept": event["kept"].replace(str(rolled_back.folder), str(run.folder))}
        for event in events(rolled_back)
    ]
    assert_same_checkpoint(run.checkpoint(12), rolled_back.checkpoint(12))


def test_a_save_before_the_step_of_the_fault_keeps_its_record(front):
    """The fault of step 6 takes the run back to step 3; a signal then saves step 4."""
    options = {**ROLLBACK, "training.steps": 7}
    hook = partial(injected, {6: (0, "loss", NAN)}, kill_at=7, signum=signal.SIGTERM)
    stopped = front.run("run", options, hook=hook).stopped()
    assert stopped.checkpoint(4).is_dir() and len(stopped.records) == 4, stopped.output
    run = front.run("run", options).ok()
    assert len(run.records) == 7 and [event["step"] for event in events(run)] == [6]


def test_rollback_is_bounded(front):
    options = {**ROLLBACK, "fault_tolerance.max_rollbacks": 1}
    run = front.run("run", options, hook=partial(injected, {4: (0, "loss", NAN), 6: (0, "gradient", NAN)}))
    run.fails_with("fault_tolerance.max_rollbacks is reached", "rolled back (1 of at most 1", "to step 3")


def test_without_a_checkpoint_rollback_stops(front):
    run = front.run("run", {**ROLLBACK, "checkpoint.interval": 10}, hook=partial(injected, {4: FAULTS[4]}))
    run.fails_with("step 4: loss nan", "there is no checkpoint yet to roll back to")


@pytest.mark.parametrize(
    "options",
    [
        {"training.mixed_precision_param": "bfloat16", "checkpoint.async_mode": "disabled", "validation.enable": "true"}
        | {"validation.freq": 3, "validation.holdout": 0.2, "validation.num_videos": 0, "data.num_workers": 1},
        {"optimizer.in_backward": "true", "training.max_norm": 0},
        {"encoder.placement": "colocated"},
    ],
    ids=["bfloat16", "in_backward", "colocated"],
)
def test_rollback_with(options, front):
    """On one rank; updates in backward are repaired by the checkpoint."""
    fault = {5: (0, "loss", NAN)}
    run = front.run("run", {**ROLLBACK, **options, "training.steps": 7}, hook=partial(injected, fault)).ok()
    rows = noted(run)
    assert rows[4]["goes_on_from"] == 3 and rows[4]["after"] == rows[2]["after"]
    assert len(run.records) == 7 and len(rows) == 9
    assert not options.get("validation.enable") or set(run.validations) == {0, 3, 6, 7}


def test_rollback_of_a_pipeline(front):
    """Losses are on the last stage alone; the clips are those of both ranks."""
    options = {**ROLLBACK, "parallelism.pipeline_parallel_degree": 2, "training.steps": 6}
    run = front.run("run", options, RANKS, partial(injected, {5: (1, "loss", NAN)})).ok()
    (event,) = events(run)
    assert event["action"] == "rollback" and [clip["sample_id"] for clip in event["clips"]] == [8, 9]


SPIKES = {
    **OPTIONS,
    "training.steps": 16,
    "fault_tolerance.spike_deviations": 20,
    "fault_tolerance.spike_window": 8,
    "optimizer.lr": 1e-4,
}
SPIKE_FAULTS = {10: (1, "loss", 1000.0), 12: (0, "gradient", 1e6), 14: (0, "loss", 1000.0)}


def test_spikes(front):
    run = front.run("run", SPIKES, RANKS, partial(injected, SPIKE_FAULTS)).ok()
    for rows in rows_of_faults(run, SPIKE_FAULTS):
        assert all(row["before"] == row["after"] for row in rows)
    good = [row for row in noted(run) if row["data_step"] not in SPIKE_FAULTS]
    assert all(row["before"] != row["after"] for row in good) and len(run.records) == 16
    found = events(run)
    assert [(event["step"], event["action"]) for event in found] == [(10, "skip"), (12, "skip"), (14, "skip")]
    assert found[0]["clips"][0]["sample_id"] == 38 and found[2]["clips"][0]["sample_id"] == 52
    assert "gradient norm" in found[1]["fault"] and "loss" not in found[1]["fault"]

    # A run that is killed and resumed has the same history and skips the same steps.
    killed = front.run("killed", SPIKES, RANKS, partial(injected, SPIKE_FAULTS, kill_at=11))
    assert killed.code == -signal.SIGKILL
    again = front.run("killed", SPIKES, RANKS, partial(injected, SPIKE_FAULTS)).ok()
    assert again.records == run.records and len(events(again)) == 3
    assert_same_checkpoint(again.checkpoint(16), run.checkpoint(16))


def test_without_the_guard_a_spike_is_trained_on(front):
    options = {**SPIKES, "training.steps": 11, "fault_tolerance.spike_deviations": 0}
    run = front.run("run", options, hook=partial(injected, {10: (0, "loss", 1000.0)})).ok()
    assert not events(run) and all(row["before"] != row["after"] for row in noted(run))


# ---- the check of gradients ----

VERIFY = {"debug.deterministic": "true", "debug.verify_every": 1, "training.steps": 6, "checkpoint.enable": "false"}


def errors_of_flips(run, ranks=RANKS):
    """{step of the data: the error}; the same on all ranks."""
    by_rank = [(run.folder / f"flips{rank}.jsonl").read_text().splitlines() for rank in range(ranks)]
    assert all(rows == by_rank[0] for rows in by_rank)
    return {row["data_step"]: row["error"] for row in map(json.loads, by_rank[0])}


def check_flips(run, flips):
    """flips: {step: rank}. Each is found, with its rank and parameter, and nothing is in other steps."""
    flipped = [json.loads(line) for line in (run.folder / "flipped.jsonl").read_text().splitlines()]
    assert {row["data_step"]: row["rank"] for row in flipped} == flips
    errors = errors_of_flips(run)
    for row in flipped:
        error = errors[row["data_step"]]
        assert f"rank {row['rank']} ({row['parameter']})" in error and f"rank {1 - row['rank']}" not in error
    assert [step for step, error in errors.items() if error] == sorted(flips)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"training.mixed_precision_param": "bfloat16", "activation_checkpoint.mode": "full"}
        | {"training.global_batch_size": 8, "parallelism.data_parallel_replicate_degree": 2},
        {"parallelism.pipeline_parallel_degree": 2},
    ],
    ids=["float32", "bfloat16", "pipeline"],
)
def test_a_flipped_bit_is_found_and_its_rank_named(front, options):
    flips = {2: 0, 3: 1, 5: 1, 6: 0}
    run = front.run("run", {**VERIFY, **options}, RANKS, partial(flipped_bits, flips)).ok()
    check_flips(run, flips)


def test_verify_every_third_step_and_the_same_losses(front):
    plain = front.run("plain", {**VERIFY, "debug.verify_every": 0}, RANKS).ok()
    run = front.run("run", {**VERIFY, "debug.verify_every": 3}, RANKS, partial(flipped_bits, {4: 0, 6: 1})).ok()
    errors = errors_of_flips(run)
    assert [step for step, error in errors.items() if error] == [6] and "rank 1" in errors[6]
    assert run.records[:3] == plain.records[:3] and '"data_step": 4' in (run.folder / "flipped.jsonl").read_text()


def test_a_difference_ends_the_run(front):
    run = front.run("run", VERIFY, hook=partial(inconsistent, 4)).fails_with("step 4: computed twice", "rank 0 (")
    assert len(run.records) == 3


# ---- replay ----


def poisoned(step):
    """A hook: the latents of rank 1's second clip of a step are not numbers."""
    from titan_video.data.prefetch import Prefetch

    fetch = Prefetch._fetch

    def _fetch(self):
        fetched = fetch(self)
        if fetched and sum(fetched[0]["draws"]) == 4 * step and self.loader.dp_rank == 1:
            fetched[1][0].streams["video"][1] = NAN
        return fetched

    Prefetch._fetch = _fetch


def replay(folder, capsys):
    """The lines of the program."""
    import torch.distributed as dist

    from titan_video import replay

    try:
        replay.main([str(folder)])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("interval", [2, 100])
def test_replay_finds_the_clip_and_the_module(front, capsys, interval):
    options = {**OPTIONS, "checkpoint.interval": interval, "training.steps": 3, "data.num_workers": 1}
    run = front.run("run", options, RANKS, partial(poisoned, 3)).fails_with("step 3: loss nan", "sample 11, loss nan")
    (kept,) = (run.folder / "bad_steps").iterdir()
    assert str(kept) in run.output and kept.name == "step-3-sample-8"
    clips = json.loads((kept / "step.json").read_text())["clips"]
    assert [clip["sample_id"] for clip in clips] == [11] and clips[0]["path"] in run.output
    lines = [re.sub(r"^(\[titan\] )?[\d-]+ [\d:]+ ", "", line) for line in replay(kept, capsys)]
    weights = "first ones" if interval == 100 else str(run.checkpoint(2))
    assert any(line.startswith("weights: ") and weights in line for line in lines), lines
    samples = {int(m[1]): float(m[2]) for line in lines if (m := re.match(r"  sample (\d+): loss (\S+)", line))}
    assert list(samples) == [8, 9, 10, 11] and [i for i, loss in samples.items() if loss != loss] == [11]
    first, second = (
        next(i for i, line in enumerate(lines) if line.startswith(f"data-parallel rank-{r}")) for r in (0, 1)
    )
    assert "  all is finite with these weights" in lines[first:second]
    assert "  inputs of the model that are not finite: x_BLP" in lines[second:]
    assert any("first module whose output is not finite: patch_embedding" in line for line in lines[second:]), lines
    assert any("gradient norm nan; not finite in" in line for line in lines[second:])
    # The losses are those of the run, which had other weights after the first step.
    if interval == 2:
        assert run.records[2]["loss"] == "nan" and 1 < samples[8] < 5


def test_replay_has_the_losses_of_the_run(front, capsys):
    """Weights of the step before, as after each step saved; adapters and bfloat16."""
    for name, options in {
        "plain": {},
        "bfloat16": {"training.mixed_precision_param": "bfloat16"},
        "lora": {"lora.enable": "true", "lora.rank": 4},
    }.items():
        options = {**OPTIONS, "checkpoint.interval": 1, "training.steps": 3, "ema.enable": "false", **options}
        run = front.run(name, options, hook=partial(injected, {3: (0, "gradient", NAN)})).fails_with("step 3:")
        (kept,) = (run.folder / "bad_steps").iterdir()
        run.checkpoint(1).rename(run.checkpoint(9))  # later than the step: of another branch
        lines = replay(kept, capsys)
        losses = [float(m[1]) for line in lines if (m := re.search(r"sample \d+: loss (\S+)", line))]
        assert sum(losses) / 2 == pytest.approx(run.records[2]["loss"], rel=1e-3)
        assert "gradient norm" in lines[-2] and "all is finite" in lines[-1]


def test_replay_refuses_another_folder(tmp_path):
    from titan_video import replay

    with pytest.raises(SystemExit, match="error: .*step.json"):
        replay.main([str(tmp_path)])
    (tmp_path / "step.json").write_text("{}")
    with pytest.raises(SystemExit, match="error: .*config.toml"):
        replay.main([str(tmp_path)])


# ---- long forms, whose figures are in docs/reliability.md; -s shows them ----

NUM_FAULTS = {"stop": 68, "skip": 66, "rollback": 66}


def draw_faults(count, distance, factors, seed):
    """{step of the data: (rank, kind, factor)}, `distance` or one more step from one to the next."""
    rng, step, faults = random.Random(seed), 10, {}
    for number in range(count):
        kind, factor = factors[number // RANKS % len(factors)]
        faults[step] = (number % RANKS, kind, factor)
        step += distance + rng.randrange(2)
    return faults


def last_step(faults, interval):
    """A step of the optimizer that the run reaches after the last of the faults, each of which rolls it back."""
    steps = [0]
    for data_step in range(1, max(faults) + 1):
        steps.append(steps[-1] // interval * interval if data_step in faults else steps[-1] + 1)
    return max(steps) + 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("action", NUM_FAULTS)
def test_two_hundred_faults(front, action):
    """On either rank, in loss or gradient, NaN or infinite."""
    kinds = [("loss", NAN), ("gradient", NAN), ("loss", math.inf), ("gradient", math.inf)]
    faults, interval = draw_faults(NUM_FAULTS[action], 3, kinds, action), 3
    steps = last_step(faults, interval) if action == "rollback" else max(faults) + 2
    options = {
        **OPTIONS,
        "training.steps": steps,
        "optimizer.lr": 1e-4,
        "checkpoint.interval": interval if action == "rollback" else 1000,
        "fault_tolerance.nonfinite": action,
    }
    run = finish(front, "run", options, partial(injected, faults, go_on=action == "stop"))
    for rank, rows in enumerate(rows_of_faults(run, faults)):
        after = {0: noted(run, rank)[0]["before"]}
        for row in noted(run, rank):
            if row in rows:
                is_back = action == "rollback"
                assert row["goes_on_from"] == ((row["step"] - 1) // interval * interval if is_back else row["step"])
                assert row["after"] == (after[row["goes_on_from"]] if is_back else row["before"])
            after[row["goes_on_from"]] = row["after"]
    found = events(run)
    assert [event["action"] for event in found] == [action] * len(faults)
    for event, (data_step, (rank, kind, _)) in zip(found, faults.items(), strict=True):
        assert_named(event, data_step, kind, rank)
    print(
        f"{action}: {len(faults)} faults in {len(noted(run))} steps on {RANKS} ranks: the same decision on all ranks,"
    )
    print(f"    parameters touched 0 times, clips named {len(found)} times")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sixty_spikes(front):
    faults = draw_faults(60, 3, [("loss", 1000.0), ("gradient", 1e6)], "spikes")
    steps = max(faults) + 3
    run = finish(front, "run", {**SPIKES, "training.steps": steps}, partial(injected, faults))
    for rows in rows_of_faults(run, faults):
        assert all(row["before"] == row["after"] for row in rows)
    assert [event["step"] for event in events(run)] == list(faults)
    print(f"spikes: {len(faults)} in {steps} steps on {RANKS} ranks: {len(events(run))} skipped, 0 other steps")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("clips", [4, 32])
def test_no_spike_in_the_debug_run(front, clips):
    """As it is shipped, with 32 clips a step, and with 4, whose numbers vary more."""
    options = {
        "data.path": "embedded:shapes-240",
        "training.local_batch_size": clips,
        "training.steps": 500,
        "lr_scheduler.warmup_steps": 50,
        "lr_scheduler.decay_ratio": 0.4,
        "checkpoint.enable": "false",
        "fault_tolerance.spike_deviations": 10,
    }
    run = finish(front, "run", options, None, world=1)
    assert len(run.records) == 500 and not events(run)
    print(f"no injection: 500 steps of the debug run with {clips} clips a step, 0 skipped")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_flipped_bits(front):
    rng = random.Random("flips")
    flips = {step: rng.randrange(RANKS) for step in range(2, 102)}
    run = finish(front, "run", {**VERIFY, "training.steps": 102}, partial(flipped_bits, flips, seed=7))
    check_flips(run, flips)
    print(f"flipped bits: {len(flips)} of {len(flips)} found and the rank named, 0 in other steps")


def finish(front, name, options, hook, world=RANKS):
    """A run that takes longer than other tests allow."""
    program = front.start(name, options, world, hook)
    code = program.wait(3000)
    assert code == 0, Path(program.logs[0]).read_text()[-3000:]
    return Run(code, Path(program.logs[0]).read_text(), front.root / name)


def inconsistent(step):
    """A hook: the loss of one run of a step is larger."""
    import train

    run_backward, seen = train.Trainer.forward_backward, []

    def forward_backward(self, batches, num_elements):
        seen.append(self.step)
        return run_backward(self, batches, num_elements + (seen.count(self.step) == 1 and self.step == step))

    train.Trainer.forward_backward = forward_backward
