"""What a user meets: `run_train.sh`, `python train.py`, their outputs, and their messages when something is wrong."""

import functools
import json
import math
import shutil
import sys

import av
import numpy as np
import pytest
import torch

from tests.helpers import ROOT, hf_state_dict, start_program
from tests.integration_tests.test_resume import iter_tensors
from tests.unit_tests.data_clips import captioned, write_clip
from titan_video.config.manager import dump, load

SHELL = [str(ROOT / "run_train.sh")]


def decode(path):
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def num_frames(gif):
    import io

    with av.open(io.BytesIO(gif)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_debug_config_learns_and_shows_it(front):
    """The default run with fewer clips and steps."""
    steps = 100
    options = {
        "training.steps": steps,
        "training.local_batch_size": 4,
        "data.path": "embedded:shapes-4",
        "optimizer.lr": 3e-3,
        "lr_scheduler.warmup_steps": 5,
        "lr_scheduler.decay_ratio": 0.3,
        "checkpoint.interval": 60,
        "metrics.enable_tensorboard": "true",
        "validation.enable": "true",
        "validation.freq": steps,
        "validation.num_videos": 2,
        "validation.num_scored": 26,
        "validation.sample_steps": 3,
        "validation.path": "embedded:shapes-12",
        "validation.max_clips": 3,
    }
    run = front.run("run", options).ok()
    folder = run.folder

    config = load(folder / "config.toml")
    assert (
        dump(config) == (folder / "config.toml").read_text()
        and config.training.steps == steps
        and config.job.description
    )

    losses = [row["loss"] for row in run.records]
    assert len(losses) == steps and sum(losses[-10:]) / 10 < losses[0] / 2
    assert all(math.isfinite(row["grad_norm"]) and row["samples"] == 4 * row["step"] for row in run.records)

    for step in (60, steps):
        manifest = json.loads((run.checkpoint(step) / "manifest.json").read_text())
        assert {path.name for path in run.checkpoint(step).iterdir()} == {"manifest.json", *manifest["files"]}

    scores = {"score_colour", "score_direction", "score_shape"}
    assert scores <= run.validations[steps].keys() and not scores & run.validations[0].keys()
    assert run.validations[steps]["score_colour"] >= 0.4, "a quarter of the colours would be right by chance"

    for step in (0, steps):
        clips = sorted((folder / "samples" / f"step-{step}").glob("*.mp4"))
        assert len(clips) == 2 and all(decode(clip).shape == (9, 64, 64, 3) for clip in clips)

    events = tensorboard(folder / "tb")
    scalars = {name: [e.step for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars.keys() >= {
        "loss_metrics/global_avg_loss",
        "loss_metrics/global_max_loss",
        "grad_norm",
        "lr",
        "throughput(tps)",
        "tflops",
        "time_metrics/end_to_end(s)",
        "time_metrics/data_loading(s)",
        "memory/max_reserved(GiB)",
    }
    assert scalars["loss_metrics/global_avg_loss"] == [1, *range(10, steps + 1, 10)] and scalars["validation/loss"] == [
        0,
        steps,
    ]
    tags = events.Tags()["images"]
    assert len(tags) == 2
    for tag in tags:
        images = events.Images(tag)
        assert [image.step for image in images] == [0, steps]
        assert all(
            (image.width, image.height, num_frames(image.encoded_image_string)) == (64, 64, 9) for image in images
        )


def clips_of_all_kinds(folder):
    folder.mkdir()
    for k, (width, height, fps, count) in enumerate(
        [(64, 64, 8, 17), (96, 64, 25, 60), (64, 112, 30, 70), (120, 90, 12, 40)]
    ):
        captioned(folder / f"good{k}.mp4", f"clip {k}", width=width, height=height, fps=fps, count=count)
    captioned(folder / "short.mp4", count=10, fps=25)
    captioned(folder / "truncated.mp4", count=60)
    whole = (folder / "truncated.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    write_clip(folder / "silent.mp4", count=40)
    return folder


def test_own_clips_on_two_ranks(front):
    """Clips of mixed size, rate and length; bad ones are reported with the reason, the others train."""
    clips = clips_of_all_kinds(front.root / "clips")
    options = {
        "data.path": clips,
        "data.num_workers": 1,
        "data.fps": 8,
        "data.buckets": "[[17, 64, 64], [17, 64, 96]]",
        "training.steps": 3,
        "job.print_config": "true",
        "job.description": "a trial of mine",
        "debug.deterministic": "true",
        "metrics.enable_tensorboard": "true",
    }
    run = front.command("run", options, NGPU="2").ok()
    assert len(run.records) == 3 and {row["bucket"] for row in run.records} == {"17x64x64", "17x64x96"}
    rows = {
        row["path"].rpartition("/")[2]: row
        for row in map(json.loads, (run.folder / "data_plan.jsonl").read_text().splitlines())
    }
    assert {name for name, row in rows.items() if row["kept"]} == {"good0.mp4", "good1.mp4", "good2.mp4", "good3.mp4"}
    for name in ("truncated.mp4", "silent.mp4", "short.mp4"):
        reason = rows[name]["reason"]
        assert reason and f"{name}:" in run.output and reason.partition(":")[0] in run.output
    assert run.output.count("7 found, 4 kept, 3 dropped") == 1

    records = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    (numbers,) = [row["data"] for row in records if "data" in row]
    counts = {
        "clips": 4,
        "dropped": 3,
        "dropped/corrupt": 1,
        "dropped/no caption": 1,
        "dropped/too short": 1,
        "encoded_clips": 4,
        "encoded_frames": 68,
    }
    assert {k: v for k, v in numbers.items() if k in counts} == counts
    assert (
        numbers.keys() - counts.keys() == {"encode_seconds", "decode_wait_seconds", "encoded_frames_per_second"}
        and min(numbers.values()) >= 0
    )
    assert 68 / numbers["encode_seconds"] <= numbers["encoded_frames_per_second"]
    first, *others = [row for row in records if "loss" in row]
    assert all(0.05 < row["resident_gib"] < 16 for row in (first, *others))
    assert "workers_resident_gib" not in first  # threads read a cache; processes decode only while clips are encoded
    events = tensorboard(run.folder / "tb")
    table = events.Tensors("data/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(row in table for row in ("| clips | 4 |", "| dropped | 3 |", "| dropped/corrupt | 1 |"))
    assert not [tag for tag in events.Tags()["scalars"] if tag.startswith("data/")]
    assert "resident_gib" in events.Tags()["scalars"]
    assert " a trial of mine\n" in run.output


def test_no_usable_clip(front):
    folder = front.root / "clips"
    folder.mkdir()
    write_clip(folder / "silent.mp4", count=40)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("text")
    run = front.run("run", {"data.path": folder}).fails_with("no usable clip", "silent.mp4", "broken.mp4", "data.path")
    assert not run.records


@pytest.mark.parametrize(
    "options, words",
    [
        ({"optimizer.lrr": 1}, ["optimizer.lrr", "optimizer.lr"]),
        ({"training.steps": "many"}, ["training.steps", "many"]),
        ({"optimizer.lr": -1}, ["optimizer.lr"]),
        ({"data.path": "/no/such/folder"}, ["data.path", "/no/such/folder"]),
        ({"data.buckets": "[[16, 64, 64]]"}, ["data.buckets", "13 or 17"]),
        ({"parallelism.data_parallel_replicate_degree": 2}, ["parallelism.data_parallel_replicate_degree"]),
        ({"training.global_batch_size": 3}, ["training.global_batch_size", "2 or 4"]),
        ({"encoder.name": "wan"}, ["model.hf_assets_path"]),
        ({"job.config_file": "no.toml"}, ["job.config_file", "no.toml"]),
    ],
)
def test_mistakes_in_the_configuration(front, options, words):
    """One line that names the field, before there is a process group, a folder or a model."""
    run = front.run("run", options, hook=forbid_process_group).fails_with(*words)
    assert run.output.startswith("config error: ") and run.output.count("\n") == 1
    assert not run.folder.exists()


def forbid_process_group():
    import torch.distributed as dist

    def refuse(*args, **kwargs):
        raise AssertionError("a process group was made")

    dist.init_process_group = refuse


@pytest.mark.parametrize(
    "options, words",
    [
        ({"model.flavor": "tiny"}, ["model.flavor", "tiny", "debug"]),
        ({"model.flavor": "t2v-1.3B"}, ["model.flavor", "encoder.name"]),
        ({"activation_checkpoint.mode": "selective"}, ["activation_checkpoint.save_min_kv", "at most 48"]),
    ],
)
def test_parts_that_do_not_fit(front, options, words):
    run = front.run("run", {"job.description": "", **options}).fails_with(*words)
    assert run.output.count("\n") == 1
    assert {path.name for path in run.folder.iterdir()} <= {"status.json", "run.lock"}, "nothing was begun"


CP = "parallelism.context_parallel_degree"
TP = "parallelism.tensor_parallel_degree"
PP = "parallelism.pipeline_parallel_degree"
METHOD = "parallelism.context_parallel_method"
LAYOUTS = {  # ranks, and options beside a global batch of 4 clips
    "one": (1, {"training.local_batch_size": 4}),
    "accumulated": (1, {"training.local_batch_size": 1}),
    "fsdp2": (2, {"training.local_batch_size": 2}),
    "tp2": (2, {"training.local_batch_size": 4, TP: 2}),
    "ulysses2": (
        2,
        {
            "training.local_batch_size": 4,
            CP: 2,
            "activation_checkpoint.mode": "selective",
            "activation_checkpoint.save_min_kv": 48,
        },
    ),
    "ring2": (2, {"training.local_batch_size": 2, CP: 2, METHOD: "ring", "activation_checkpoint.mode": "full"}),
    "pp2": (2, {"training.local_batch_size": 4, PP: 2, "parallelism.pipeline_parallel_microbatch_size": 2}),
    "fsdp4": (4, {"training.local_batch_size": 1}),
    "hsdp2x2": (
        4,
        {
            "training.local_batch_size": 1,
            "parallelism.data_parallel_replicate_degree": 2,
            "parallelism.data_parallel_shard_degree": 2,
        },
    ),
    "unified2x2": (
        4,
        {"training.local_batch_size": 4, CP: 4, METHOD: "unified", "parallelism.context_parallel_ulysses_degree": 2},
    ),
    "fsdp2 x ulysses2": (4, {"training.local_batch_size": 2, CP: 2}),
    "tp2 x ring2": (4, {"training.local_batch_size": 4, TP: 2, CP: 2, METHOD: "ring"}),
    "offload": (1, {"training.local_batch_size": 4, "training.enable_cpu_offload": "true"}),
}


def sample_ids_recorded():
    """A hook: each rank writes the sample ids of its steps beside the run's metrics."""
    import train

    run_step = train.Trainer.train_step

    def train_step(self, batches, *args):
        with open(self.folder / f"ids{self.rank}.jsonl", "a") as f:
            f.write(json.dumps(sorted(i for b in batches for i in b.sample_ids_B.tolist())) + "\n")
        run_step(self, batches, *args)

    train.Trainer.train_step = train_step


def ids_of_steps(run, world):
    steps = zip(*((run.folder / f"ids{rank}.jsonl").read_text().splitlines() for rank in range(world)), strict=True)
    return [sorted({i for text in step for i in json.loads(text)}) for step in steps]


@pytest.fixture(scope="module")
def one_rank(shared_front):
    """(steps) -> the run of one rank, made at first use."""
    return functools.cache(lambda steps: run_of_layout(shared_front, "one", steps))


def run_of_layout(front, name, steps):
    same = {
        "training.steps": steps,
        "training.global_batch_size": 4,
        "checkpoint.enable": "false",
        "validation.enable": "true",
        "validation.freq": 100,
        "validation.holdout": 0.2,
        "validation.num_videos": 1,
        "validation.sample_steps": 2,
        "validation.timesteps": "0.3, 0.8",
    }
    world, options = LAYOUTS[name]
    return front.run(f"{name.replace(' ', '')}-{steps}", {**same, **options}, world, hook=sample_ids_recorded).ok()


COVERED = ("fsdp2", "tp2", "fsdp4", "ring2", "fsdp2 x ulysses2")  # the other layouts contain every part of these


@pytest.mark.parametrize("steps", [6, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in COVERED else ()) for name in LAYOUTS if name != "one"]
)
def test_layouts_have_the_same_losses(front, one_rank, name, steps):
    run, first = run_of_layout(front, name, steps), one_rank(steps)
    one = first.records
    assert len(one) == steps and len({row["loss"] for row in one}) == steps
    assert ids_of_steps(run, LAYOUTS[name][0]) == ids_of_steps(first, 1)
    for row, expected in zip(run.records, one, strict=True):
        assert (row["samples"], row["tokens"], row["lr"]) == (expected["samples"], expected["tokens"], expected["lr"])
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert run.validations.keys() == first.validations.keys() == {0, steps}
    for step, losses in run.validations.items():
        assert losses == pytest.approx(first.validations[step], rel=1e-5)
        mine, theirs = (decode(next((r.folder / "samples" / f"step-{step}").glob("*.mp4"))) for r in (run, first))
        assert (
            mine.shape == theirs.shape and np.abs(mine.astype(float) - theirs).mean() < 0.5
        )  # of 255, after a lossy file


def test_a_run_moves_between_layouts(front):
    """One rank, then two, then one again, with optimizer state and EMA: the losses of a run on one rank."""
    options = {"training.global_batch_size": 4, "ema.enable": "true", "checkpoint.async_mode": "disabled"}
    stayed = front.run("stayed", {**options, "training.steps": 9}).ok().records
    for steps, world in ((3, 1), (6, 2), (9, 1)):
        moved = front.run("moved", {**options, "training.steps": steps}, world).ok().records
    assert [row["samples"] for row in moved] == [row["samples"] for row in stayed]
    assert [row["loss"] for row in moved] == pytest.approx([row["loss"] for row in stayed], rel=1e-5)
    assert [row["loss"] for row in moved[:3]] == [row["loss"] for row in stayed[:3]]


def test_a_loss_that_is_not_finite(front):
    options = {"optimizer.lr": 1e30, "checkpoint.interval": 1, "fault_tolerance.max_nonfinite_steps": 3}
    run = front.run("stop", options).fails_with("step 2:", "not finite", "optimizer.lr")
    assert len(run.records) == 2 and "saved step-1 " in run.output and run.checkpoint(1).is_dir()
    run = front.run("skip", {**options, "fault_tolerance.nonfinite": "skip"}).fails_with(
        "step 4:", "fault_tolerance.max_nonfinite_steps"
    )
    assert "update skipped (2 of at most 3 in a row)" in run.output and len(run.records) == 4
    assert not math.isfinite(float(run.records[-1]["loss"]))


@pytest.fixture(scope="module")
def exported(shared_front):
    """`python train.py` alone: three steps with EMA weights, exported."""
    options = {
        "training.steps": 3,
        "ema.enable": "true",
        "ema.decay": 0.5,
        "checkpoint.last_save_in_hf": "true",
        "checkpoint.export_dtype": "float32",
    }
    run = shared_front.command("exported", options, program=(sys.executable, str(ROOT / "train.py"))).ok()
    assert len(run.records) == 3 and "exported to" in run.output
    return run


def weights(tensors, source):
    return {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.partition(".")[0] == source}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys() and ours
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different, different


def test_export_is_what_diffusers_loads(exported, front):
    from diffusers import WanTransformer3DModel

    from titan_video.models import get_args, get_spec

    spec = get_spec("wan")
    args = get_args(spec, "debug", "", 16)
    ema_weights = weights(iter_tensors(exported.checkpoint(3)), "ema")
    public = hf_state_dict(ema_weights, spec, args)
    assert_equal(
        WanTransformer3DModel.from_pretrained(
            exported.folder / "hf" / "transformer", torch_dtype=torch.float32
        ).state_dict(),
        public,
    )

    # The export was cut short: the finished run makes it again, here as bfloat16.
    shutil.copytree(exported.folder, front.root / "copy")
    folder = front.root / "copy" / "hf" / "transformer"
    (folder / "config.json").unlink()
    again = front.run("copy", {"training.steps": 3, "ema.enable": "true", "checkpoint.last_save_in_hf": "true"}).ok()
    assert "already at step 3" in again.output and "training from" not in again.output
    loaded = WanTransformer3DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).state_dict()
    # diffusers keeps some in float32, whatever is asked.
    assert_equal({name: t.bfloat16() for name, t in loaded.items()}, {name: t.bfloat16() for name, t in public.items()})


@pytest.mark.parametrize("source", ["model", "ema"])
def test_start_from_the_weights_of_another_run(exported, front, source):
    """A step-N folder gives its weights; the exported diffusers folder has the EMA weights.

    A rate of almost nothing leaves them as they are.
    """
    form = (
        {"checkpoint.initial_load_in_hf": "true", "checkpoint.initial_load_path": exported.folder / "hf"}
        if source == "ema"
        else {"checkpoint.initial_load_path": exported.checkpoint(3)}
    )
    options = {"training.steps": 1, "optimizer.lr": 1e-30, "ema.enable": "true", "checkpoint.interval": 1, **form}
    run = front.run("run", options).ok()
    expected, now = weights(iter_tensors(exported.checkpoint(3)), source), iter_tensors(run.checkpoint(1))
    assert_equal(weights(now, "model"), expected)
    assert_equal(weights(now, "ema"), expected)
    assert run.records[0]["samples"] == 2 and run.records[0]["loss"] != exported.records[0]["loss"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_default_run(front):
    """As it is shipped: all its steps, and at the end its four clips and scores."""
    import os
    import subprocess

    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    p = subprocess.run(SHELL, cwd=front.root, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert p.returncode == 0, p.stdout + p.stderr
    rows = [json.loads(line) for line in (front.root / "outputs" / "shapes" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 800 and sum(losses[-10:]) / 10 < losses[0] / 2
    assert len(list((front.root / "outputs" / "shapes" / "samples").glob("step-800/*.mp4"))) == 4
    scores = [row["validation"] for row in rows if "score_shape" in row.get("validation", {})][-1]
    assert scores["score_colour"] >= 0.95 and scores["score_direction"] >= 0.9 and scores["score_shape"] >= 0.7
    assert f"score_shape {scores['score_shape']:.3f}" in p.stdout + p.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_signal_to_the_script(front, ranks):
    """From the shell's point of view: one signal to `run_train.sh`, exit code 0, a checkpoint; the same command goes
    on.
    """
    import os
    import signal
    import subprocess
    import time

    env = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "NGPU": ranks}
    log = front.root / "log"
    for _ in range(2):
        seen = len(log.read_text()) if log.exists() else 0
        with log.open("a") as output:
            p = start_program(
                [*SHELL, *front.argv("run", {"training.steps": 100000})],
                cwd=front.root,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            while "step: " not in log.read_text()[seen:]:
                assert p.poll() is None, log.read_text()
                time.sleep(0.1)
            p.send_signal(signal.SIGUSR2)
            assert p.wait(60) == 85, log.read_text()
    assert log.read_text().count("stopped by a signal after step") == 2 and log.read_text().count("loaded ") == 1
