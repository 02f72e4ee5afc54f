"""Training has the same losses from a folder, WebDataset tars and a table of the same clips."""

import csv
import tarfile

import pytest

from tests.integration_tests.conftest import Front
from tests.unit_tests.data_clips import captioned

OPTIONS = {
    "data.fps": 8,
    "data.buckets": "[[5, 64, 64], [17, 64, 96]]",
    "data.frame_extraction": "chunk",
    "training.steps": 3,
}
KINDS = [(64, 64, 8, 17), (96, 64, 25, 110), (120, 90, 12, 40), (64, 112, 30, 31)]


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """{form: path} of the same clips."""
    root = tmp_path_factory.mktemp("forms")
    folder = root / "clips"
    folder.mkdir()
    for k, (width, height, fps, count) in enumerate(KINDS):
        captioned(folder / f"{k}.mp4", f"clip {k}", width=width, height=height, fps=fps, count=count)
    return {"folder": folder, "tars": as_tars(folder, root), "csv": as_csv(folder, root / "rows.csv")}


def as_tars(clips, folder):
    """Two shards of them; the path with braces."""
    for n in (0, 1):
        with tarfile.open(folder / f"shard-{n:02d}.tar", "w") as tar:
            for clip in sorted(clips.glob("*.mp4"))[n::2]:
                tar.add(clip, clip.name)
                tar.add(clip.with_suffix(".txt"), clip.with_suffix(".txt").name)
    return f"{folder}/shard-{{00..01}}.tar"


def as_csv(clips, file):
    with open(file, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["video_path", "caption"])
        rows.writerows([clip, clip.with_suffix(".txt").read_text()] for clip in sorted(clips.glob("*.mp4")))
    return file


def check(runs):
    """The forms share a cache by content, so all had the same batches."""
    assert all(run.records == runs["folder"].records for run in runs.values()) and len(runs["folder"].records) == 3
    assert {name: "encoded" in run.output for name, run in runs.items()} == {
        "folder": True,
        "tars": False,
        "csv": False,
    }


def test_forms_train_alike(forms, tmp_path):
    front = Front(tmp_path, tmp_path / "cache")
    check({name: front.run(name, {**OPTIONS, "data.path": path}).ok() for name, path in forms.items()})


@pytest.mark.slow
def test_forms_train_through_the_script(forms, tmp_path):
    front = Front(tmp_path, tmp_path / "cache")
    check({name: front.command(name, {**OPTIONS, "data.path": path}).ok() for name, path in forms.items()})


def test_other_clips_are_refused_before_anything_is_encoded(front):
    options = {
        "data.path": "embedded:shapes-4",
        "training.steps": 2,
        "validation.enable": "true",
        "validation.num_videos": 0,
        "validation.timesteps": "0.5",
    }
    first = front.run("run", options).ok()
    assert "1 of 4 clips are held out for validation" in first.output
    assert "weights: drawn at random with debug.seed 0" in first.output
    made = {path: path.read_bytes() for path in [first.folder / "data_plan.jsonl", *(front.cache / "shards").iterdir()]}
    other = {**options, "training.steps": 4, "data.buckets": "[[5, 64, 64]]"}
    refused = front.run("run", other).fails_with("are not those of the checkpoint", "data.buckets was [[9, 64, 64]")
    assert "encoded" not in refused.output and made == {path: path.read_bytes() for path in made}
    assert set(made) >= set((front.cache / "shards").iterdir())


def test_prompts_that_are_no_text(front, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"a red circle\ncaf\xe9\n")
    options = {"validation.enable": "true", "validation.prompts_path": tmp_path / "prompts.txt"}
    front.run("run", options).fails_with("validation.prompts_path", "prompts.txt is not UTF-8 (line 2, byte 3 is 0xE9)")


def half_listed():
    """A hook: of the cache's shards only one is there when its index is made, as while another run encodes."""
    from titan_video.data.latent_cache import LatentCache

    list_shards, calls = LatentCache.list_shards, []

    def listed(cache):
        calls.append(cache)
        return set(sorted(list_shards(cache))[: 1 if len(calls) == 1 else None])

    LatentCache.list_shards = listed


def test_all_ranks_see_what_another_run_has_just_encoded(front):
    steps = {"training.steps": 2}
    one = front.run("one", steps).ok()
    next(front.cache.glob("index-*.columns")).unlink()
    two = front.run("two", {**steps, "training.local_batch_size": 1}, 2, half_listed).ok()
    assert [r["loss"] for r in two.records] == pytest.approx([r["loss"] for r in one.records], rel=1e-5)
