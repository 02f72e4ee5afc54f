"""Every debug flavor of both families trains, validates, samples and resumes on the embedded clips; on more ranks it
has the same losses.
"""

import json
import math

import numpy as np
import pytest

from tests.helpers import run_ranks
from tests.integration_tests.test_sample import decode, run_sample
from tests.unit_tests.data_clips import captioned, write_clip
from titan_video.models import get_spec

FLAVORS = [
    (family, flavor)
    for family in ("wan", "hunyuan_video")
    for flavor in get_spec(family).flavors
    if flavor.startswith("debug")
]
IMAGES = [
    (family, flavor) for family, flavor in FLAVORS if get_spec(family).flavors[flavor].conditioning.num_cond_frames
]
SHORT = {
    "data.path": "embedded:shapes-6",
    "data.buckets": "[[9, 32, 32]]",
    "training.steps": 3,
    "optimizer.lr": 1e-2,
    "checkpoint.interval": 2,
    "lr_scheduler.warmup_steps": 0,
    "validation.enable": "true",
    "validation.freq": 2,
    "validation.holdout": 0.4,
    "validation.timesteps": "[0.5]",
    "validation.num_videos": 1,
    "validation.sample_steps": 1,
    "ema.enable": "false",
    "metrics.log_freq": 1,
    "training.guidance": 2.0,
}


def get_options(family, flavor, **more):
    return {**SHORT, "model.name": family, "model.flavor": flavor, **{k.replace("__", "."): v for k, v in more.items()}}


def losses(run):
    return [row["loss"] for row in run.records]


@pytest.mark.slow
def test_captions_and_images_dropped_apart(front):
    """HunyuanVideo image-to-video: the same batches whether encoded ahead or during training; the old way resumes."""
    drops = {"data__caption_dropout": 0.5, "data__image_dropout": 0.5, "training__local_batch_size": 2}
    options = get_options("hunyuan_video", "debug-i2v-token-replace", training__steps=5, **drops)
    ahead = front.run("ahead", options).ok()
    online = {"encoder.placement": "colocated", "data.cache_folder": front.root / "another"}
    during = front.run("during", {**options, **online}).ok()
    assert losses(ahead) == losses(during)
    together = front.run("together", {**options, "data.image_dropout": 0}).ok()
    assert losses(ahead) != losses(together)
    front.run("old", {**options, "data.image_dropout": 0, "training.steps": 2}).ok()
    config = front.root / "old" / "config.toml"
    lines = [line for line in config.read_text().splitlines(keepends=True) if "image_dropout" not in line]
    config.write_text("".join(lines))  # as before the option
    old = front.run("old", {**options, "data.image_dropout": -1}).ok()
    assert "data.image_dropout stays 0.0" in old.output and losses(old) == losses(together)
    refused = front.run("text", {**get_options("hunyuan_video", "debug"), "data.image_dropout": 0.1})
    refused.fails_with("data.image_dropout: given 0.1")


RESUMED = [("wan", "debug-i2v"), ("hunyuan_video", "debug-i2v-token-replace")]


@pytest.mark.parametrize(
    "family, flavor", [pytest.param(*f, marks=pytest.mark.slow if f in RESUMED else ()) for f in FLAVORS]
)
def test_a_variant_trains_validates_and_samples(front, family, flavor):
    trains_validates_and_samples(front, family, flavor)


@pytest.mark.parametrize(
    "family, flavor", [pytest.param(*f, marks=() if f in RESUMED else pytest.mark.slow) for f in FLAVORS]
)
def test_a_variant_resumes(front, family, flavor):
    options = get_options(family, flavor)
    whole = trains_validates_and_samples(front, family, flavor)
    front.run("parts", {**options, "training.steps": 2}).ok()
    parts = front.run("parts", options).ok()
    assert losses(parts) == losses(whole) and parts.validations[3] == whole.validations[3]


def trains_validates_and_samples(front, family, flavor):
    options = get_options(family, flavor)
    whole = front.run("whole", options).ok()
    assert (
        np.isfinite(losses(whole)).all() and len(whole.records) == 3
    )  # of three steps at other noise levels the last need not be the lowest
    assert set(whole.validations) == {0, 2, 3} and all(
        np.isfinite(list(v.values())).all() for v in whole.validations.values()
    )
    assert whole.validations[0]["loss"] != whole.validations[3]["loss"]
    (clip,) = (whole.folder / "samples" / "step-3").glob("*.mp4")
    assert decode(clip).shape == (9, 32, 32, 3)
    return whole


def assert_same_losses(one, other):
    """Two runs of three steps under different layouts: the same losses, validations and clips."""
    for a, b in zip(one.records, other.records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and a["grad_norm"] == pytest.approx(
            b["grad_norm"], rel=1e-4
        )
    assert one.validations.keys() == other.validations.keys()
    for step, values in one.validations.items():
        assert values == pytest.approx(other.validations[step], rel=1e-5)
    clips = [decode(next((run.folder / "samples" / "step-3").glob("*.mp4"))) for run in (one, other)]
    assert np.abs(clips[0].astype(int) - clips[1]).max() <= 8


@pytest.mark.parametrize(
    "family, flavor, world, layout",
    [
        ("wan", "debug-ti2v", 2, {"parallelism.context_parallel_degree": 2}),
        ("wan", "debug-flf2v", 2, {"parallelism.pipeline_parallel_degree": 2}),
        pytest.param(
            "hunyuan_video",
            "debug-i2v-token-replace",
            4,
            {"parallelism.context_parallel_degree": 2, "parallelism.tensor_parallel_degree": 2},
            marks=pytest.mark.slow,
        ),
        ("hunyuan_video", "debug-i2v-latent-concat", 2, {}),
    ],
)
def test_ranks_have_the_losses_of_one(front, family, flavor, world, layout):
    """27 tokens a clip; 9 of them may belong to a conditioning frame. The slices have unequal lengths."""
    options = {
        **get_options(family, flavor),
        "data.buckets": "[[9, 48, 48]]",
        "checkpoint.enable": "false",
        "training.global_batch_size": 2,
    }
    degree = math.prod(layout.values())
    one = front.start("one", {**options, "training.local_batch_size": 2})
    more = front.run("more", {**options, **layout, "training.local_batch_size": 2 * degree // world}, world=world).ok()
    assert_same_losses(front.finish("one", one).ok(), more)


@pytest.mark.slow
@pytest.mark.parametrize("family, flavor", FLAVORS)
def test_the_launcher_on_one_rank_and_on_four(front, family, flavor):
    """The run on four ranks stops after two steps and resumes."""
    options = {**get_options(family, flavor), "training.global_batch_size": 4}
    one = front.command("one", {**options, "training.local_batch_size": 4}, NGPU="1").ok()
    options["training.local_batch_size"] = 1
    front.command("four", {**options, "training.steps": 2}, NGPU="4").ok()
    assert_same_losses(one, front.command("four", options, NGPU="4").ok())


def picture(path, seed):
    from PIL import Image

    noise = np.random.Generator(np.random.Philox(key=seed)).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((96, 64)).save(path)
    return path


def test_sampling_starts_from_an_image(front, tmp_path):
    run = front.run("run", {**get_options("wan", "debug-flf2v"), "validation.enable": "false"}).ok()
    first, last = picture(tmp_path / "first.png", 1), picture(tmp_path / "last.png", 2)
    base = [run.folder, "--prompt", "a red circle moves left", "--out", tmp_path / "x.mp4"]
    seen = []
    for images in (
        ["--image", first, "--last-image", last],
        ["--image", last, "--last-image", last],
        ["--image", first, "--last-image", first],
    ):
        run_ranks(run_sample, 1, [*base, *images], init=False)
        seen.append(decode(tmp_path / "x.mp4"))
    assert seen[0].shape == (9, 32, 32, 3) and not any(np.array_equal(seen[0], clip) for clip in seen[1:])
    missing = ["--image", tmp_path / "none.png", "--last-image", last]
    for images, words in (([], "--image"), (["--image", first], "--last-image"), (missing, "none.png")):
        with pytest.raises(AssertionError, match=f"SystemExit: error: .*{words}"):
            run_ranks(run_sample, 1, [*base, *images], init=False)


@pytest.mark.parametrize("flavor", ["debug-i2v-token-replace", "debug-i2v-latent-concat"])
def test_a_hunyuan_clip_begins_with_its_image(front, tmp_path, flavor):
    """For token replacement the first frame is the image itself."""
    run = front.run("run", {**get_options("hunyuan_video", flavor), "validation.enable": "false"}).ok()
    image = picture(tmp_path / "first.png", 1)
    base = [run.folder, "--prompt", "a red circle moves left", "--out", tmp_path / "x.mp4", "--image", image]
    seen = []
    for more in ([], ["--guidance", 1], ["--embedded-guidance", 900]):
        run_ranks(run_sample, 1, [*base, *more], init=False)
        seen.append(decode(tmp_path / "x.mp4"))
    from titan_video.ingest.decode.video import read_image

    expected = read_image(str(image), (9, 32, 32))[:, 0].permute(1, 2, 0).numpy()
    error = [np.abs(clip[k].astype(int) - expected).mean() for clip in seen[:1] for k in (0, -1)]
    if flavor == "debug-i2v-token-replace":
        assert error[0] < 20 < error[1]
    assert not np.array_equal(seen[0], seen[1])
    ignores_guidance = flavor == "debug-i2v-latent-concat"  # the only one without the guidance scale as an input
    assert np.array_equal(seen[0], seen[2]) == ignores_guidance


def test_experts_train_their_levels_and_sample_together(front, tmp_path):
    options = {**get_options("wan", "debug-i2v-A14B"), "model.boundary": 0.6}
    started = {expert: front.start(expert, {**options, "model.expert": expert}) for expert in ("high", "low")}
    high, low = (front.finish(expert, program).ok() for expert, program in started.items())
    assert "loss_t0.8" in high.validations[3] and "loss_t0.3" in low.validations[3]
    image = picture(tmp_path / "first.png", 1)
    base = ["--prompt", "a red circle moves left", "--out", tmp_path / "x.mp4", "--image", image, "--steps", 4]
    seen = []
    for argv in ([high.folder], [low.folder], [high.folder, "--low", low.folder]):
        run_ranks(run_sample, 1, [*argv, *base], init=False)
        seen.append(decode(tmp_path / "x.mp4"))
    assert not any(np.array_equal(a, b) for a, b in ((seen[0], seen[2]), (seen[1], seen[2])))
    with pytest.raises(AssertionError, match="SystemExit: error: --low: .*model.expert are high and low"):
        run_ranks(run_sample, 1, [low.folder, "--low", high.folder, *base], init=False)
    front.run("none", {**get_options("wan", "debug"), "model.expert": "low"}).fails_with(
        "model.expert", "model.boundary"
    )
    front.run("both", {**options, "model.expert": "low", "flow.max_t": 0.5}).fails_with("model.expert", "flow.max_t")


def test_images_of_a_column_and_single_frame_clips(front):
    """A column names the conditioning image. Single-frame clips are dropped by name; a run with no other clip ends."""
    clips = front.root / "clips"
    clips.mkdir()
    rows = []
    for k in range(3):
        write_clip(clips / f"clip{k}.mp4", count=40, fps=8)
        rows.append({"file": f"clip{k}.mp4", "caption": f"clip {k}", "image": picture(clips / f"image{k}.png", k).name})
    write_clip(clips / "image.mp4", count=1, fps=8)
    rows += [
        {"file": "image.mp4", "caption": "an image"},
        {"file": "clip0.mp4", "caption": "again", "image": "nothing.png"},
    ]
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        **get_options("wan", "debug-ti2v"),
        "data.path": clips,
        "data.buckets": "[[9, 32, 32], [1, 32, 32]]",
        "data.fps": 8,
        "training.local_batch_size": 3,
        "data.num_workers": 1,
        "validation.enable": "false",
        "checkpoint.enable": "false",
    }
    run = front.run("run", options).ok()
    planned = {
        "".join(row["captions"]) or row["reason"]: row
        for row in map(json.loads, (run.folder / "data_plan.jsonl").read_text().splitlines())
    }
    assert planned["an image"]["reason"].startswith("single frame") and "image.mp4: image-to-video" in run.output
    assert "missing image" in run.output and "nothing.png" in run.output
    assert planned["clip 0"]["image"].endswith("image0.png")

    for row in rows:
        row.pop("image", None)
    (clips / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    own = front.run("own", options).ok()
    assert losses(own) != losses(run)
    # Text-to-video ignores the image and accepts single frames.
    text = front.run("text", {**options, "model.flavor": "debug", "data.path": clips}).ok()
    assert len(text.records) == 3

    alone = front.root / "alone"
    alone.mkdir()
    captioned(alone / "image.mp4", "an image", count=1, fps=8)
    front.run("alone", {**options, "data.path": alone}).fails_with("image.mp4", "image-to-video")
