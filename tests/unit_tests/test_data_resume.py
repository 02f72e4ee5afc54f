"""Before anything is encoded: whether the clips are those of the checkpoints, how many are held out, what is cut."""

import errno
import importlib
import json
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.unit_tests.data_clips import captioned
from titan_video.config.job_config import Checkpoint, Data, Encoder, Job, JobConfig, Validation
from titan_video.config.manager import dump
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import by_bucket
from titan_video.distributed.utils import init_distributed
from titan_video.encoders.debug import DebugEncoders
from titan_video.ingest.__main__ import main
from titan_video.ingest.cache.cached_clips import cached_clips, split_holdout
from titan_video.ingest.cache.clip_table import clip_table
from titan_video.ingest.cache.encode import encode_missing
from titan_video.ingest.decode.video import UnusableClip
from titan_video.ingest.files import metadata
from titan_video.ingest.files.media import DEFAULT_LIMITS
from titan_video.ingest.plan.build import build_plan
from titan_video.ingest.plan.captions import cut_prompts, lost_words, with_cut_captions
from titan_video.ingest.plan.plan_table import write_plan_table
from titan_video.ingest.prepare import prepare_clips
from titan_video.ingest.resume import EarlierClips
from titan_video.models.wan import FLAVORS


class Folder:
    """A run's folder with clips, their plan, and a checkpoint of some of them."""

    def __init__(self, root):
        self.root, self.encoders = root, DebugEncoders(16)
        (root / "clips").mkdir()
        for k, name in enumerate("abcd"):
            captioned(root / "clips" / f"{name}.mp4", f"clip {name}", count=9 + k, fps=8)
        self.data = Data(path=str(root / "clips"), buckets=((5, 32, 32),), fps=8.0, num_workers=0)
        self.cache = LatentCache(root / "cache", self.encoders.video_id(), self.encoders.text_id())
        self.report = root / "data_plan.jsonl"

    def plan(self, **changes):
        return build_plan(replace(self.data, **changes), self.cache.folder, temporal_stride=4)

    def clips(self, plan=None):
        return cached_clips(plan or self.plan(), self.cache)

    def save(self, clips, step=4, identity=None):
        folder = self.root / "checkpoint" / f"step-{step}"
        folder.mkdir(parents=True)
        state = {
            "step": step,
            "counters": {"data": {"draws": [4], "fingerprint": identity or by_bucket(clips).identity}},
        }
        (folder / "state.json").write_text(json.dumps(state))

    def least(self, validation=None, section=None, **changes):
        earlier = EarlierClips.of(section or Checkpoint(), self.root, self.report)
        data = replace(self.data, **changes)
        entries = write_plan_table(self.root / "tables" / "plan.columns", self.plan(**changes), DEFAULT_LIMITS)
        clips = clip_table(entries, self.cache, drop_apart=False, folder=self.root / "tables")
        return earlier.matched(clips, self.cache, data, validation or Validation()).at_least

    def prepared(self):
        """The training clips, as train.py gets them."""
        config = JobConfig(Job(dump_folder=str(self.root)), encoder=Encoder(name="debug"), data=self.data)
        init_distributed(torch.device("cpu"), 60)
        try:
            return prepare_clips(config, FLAVORS["debug"], self.encoders, self.cache, None).training
        finally:
            dist.destroy_process_group()


@pytest.fixture
def folder(tmp_path):
    return Folder(tmp_path)


def test_the_same_clips_go_on(folder):
    assert folder.least() == 1  # no checkpoint
    folder.save(folder.clips())
    assert folder.least() == 1 and folder.least(num_workers=3, shuffle=False) == 1
    assert folder.least(path=str(folder.root / "clips" / "..") + "/clips") == 1  # names do not matter


CHANGES = [
    {"buckets": ((9, 32, 32),)},
    {"buckets": ((5, 64, 64),)},
    {"fps": 4.0},
    {"frame_extraction": "chunk"},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_other_clips_are_refused(folder, changes):
    folder.save(folder.clips())
    (folder.root / "config.toml").write_text(dump(JobConfig(data=folder.data)))
    with pytest.raises(ValueError, match="the training clips .* are not those of the checkpoint") as error:
        folder.least(**changes)
    (name,) = changes
    assert f"What has changed: data.{name} was " in str(error.value)
    assert folder.least(section=Checkpoint(enable=False), **changes) == 1


def test_a_clip_or_caption_more_is_refused(folder):
    folder.save(folder.clips())
    (folder.root / "clips" / "a.txt").write_text("another caption")
    with pytest.raises(ValueError, match="restore them, or start a new run"):
        folder.least()
    (folder.root / "clips" / "a.txt").write_text("clip a")
    assert folder.least() == 1
    with pytest.raises(ValueError, match="are not those"):
        folder.least(Validation(enable=True, holdout=0.5))


def test_clips_that_could_not_be_encoded_are_left_out(folder):
    """The plan does not see them; the checkpoint is of the others."""
    plan = folder.plan()
    failed = {plan.kept[1].path: "corrupt: found in decoding"}
    folder.save(folder.clips(plan.drop(failed)))
    with pytest.raises(ValueError, match="are not those"):
        folder.least()
    plan.drop(failed).write_jsonl(folder.report)
    assert folder.least() == 1
    folder.report.unlink()
    encode_missing(plan.drop(failed), folder.encoders, folder.cache, log=lambda _: None)
    assert folder.least() == 1
    folder.report.write_text("no json")
    assert folder.least() == 1


def test_the_checkpoint_that_will_be_loaded_counts(folder):
    folder.save(folder.clips(), step=2)
    folder.save(folder.clips(folder.plan(fps=4.0)), step=4)
    with pytest.raises(ValueError, match="are not those"):
        folder.least()
    assert folder.least(section=Checkpoint(load_step=2)) == 1
    (folder.root / "checkpoint" / "step-4" / "state.json").write_text("{")  # loading passes it over, too
    assert folder.least() == 1


# ---- files that cannot be read for a while ----


STALE = OSError(errno.ESTALE, os.strerror(errno.ESTALE))


def names(training):
    return sorted(os.path.basename(clip.path) for bucket in training.buckets for clip in bucket)


def failing(monkeypatch, where, name, error=STALE):
    """Reading `name` fails in a function, as on a share that is away for a moment."""
    module, _, function = where.rpartition(".")
    module = importlib.import_module(f"titan_video.ingest.{module}")
    real = getattr(module, function)

    def fail(path, *args):
        if getattr(path, "path", path).endswith(name):
            raise error
        return real(path, *args)

    monkeypatch.setattr(module, function, fail)


@pytest.mark.parametrize(
    "where", ["files.media.sha256", "plan.build.probe_key", "decode.video.cut_matroska", "files.sources.not_a_clip"]
)
def test_a_run_goes_on_without_a_clip_that_failed_at_its_start(folder, monkeypatch, where):
    """It is read at the next start. The checkpoint is of the others, and so are the clips that the loader compares."""
    if where == "files.sources.not_a_clip":
        monkeypatch.setattr("titan_video.ingest.files.sources.not_a_clip", unreachable(metadata.not_a_clip, "a.mp4"))
    else:
        failing(monkeypatch, where, "a.mp4")
    started = folder.prepared()
    assert names(started) == ["b.mp4", "c.mp4", "d.mp4"]
    assert '"reason": "unreadable: Stale file handle"' in folder.report.read_text()
    folder.save(None, identity=started.identity)
    monkeypatch.undo()
    for _ in range(3):
        again = folder.prepared()
        assert again.identity == started.identity and names(again) == names(started)
        assert "left out: the checkpoints of this run" in folder.report.read_text()
    (folder.root / "checkpoint").rename(folder.root / "others")  # another run takes it
    assert names(folder.prepared()) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]


def unreachable(real, name):
    def not_a_clip(path, *args):
        with pytest.MonkeyPatch.context() as patch:
            if path.endswith(name):
                patch.setattr(os, "stat", lambda *_, **__: (_ for _ in ()).throw(STALE))
            return real(path, *args)

    return not_a_clip


def test_a_run_goes_on_with_a_clip_that_fails_at_a_resume(folder, monkeypatch, caplog):
    """The cache has it, and the plan of the run says what it is."""
    started = folder.prepared()
    folder.save(None, identity=started.identity)
    failing(monkeypatch, "plan.build.probe_key", "a.mp4")
    for _ in range(2):
        again = folder.prepared()
        assert again.identity == started.identity and names(again) == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
        assert "a.mp4 (unreadable: Stale file handle); all clips are taken as this run has planned" in caplog.text
    (folder.root / "clips" / "b.txt").write_text("another caption")  # which is another clip
    with pytest.raises(ValueError, match="are not those .*a.mp4 .unreadable: Stale.* start again when they can be"):
        folder.prepared()
    (folder.root / "clips" / "b.txt").write_text("clip b")
    (folder.root / "clips" / "a.txt").write_text("another caption")  # of the one that fails
    with pytest.raises(ValueError, match="are not those"):
        folder.prepared()
    (folder.root / "clips" / "a.txt").write_text("clip a")
    assert folder.prepared().identity == started.identity
    folder.report.with_name(".data_plan.jsonl.key").unlink()
    with pytest.raises(ValueError, match="start again when they can be read"):
        folder.prepared()
    monkeypatch.undo()
    assert folder.prepared().identity == started.identity


def test_one_clip_that_failed_at_the_start_and_another_one_now(folder, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, "cache.encode.read_frames", "b.mp4", UnusableClip("corrupt: found in decoding"))
        started = folder.prepared()
    assert names(started) == ["a.mp4", "c.mp4", "d.mp4"]
    folder.save(None, identity=started.identity)
    assert folder.prepared().identity == started.identity
    failing(monkeypatch, "plan.build.probe_key", "a.mp4")
    for _ in range(2):
        again = folder.prepared()
        assert again.identity == started.identity and names(again) == names(started)


def test_a_file_whose_later_clip_failed_is_left_out_whole(folder):
    """Of three clips of a file the cache may have two: the run has dropped the file."""
    folder.data = replace(folder.data, frame_extraction="chunk")
    plan = folder.plan()
    file = next(e.path for e in plan.kept if e.num_clips > 1)
    others = plan.drop({file: "corrupt: found in decoding"})
    folder.save(folder.clips(others))
    first = next(e for e in plan.kept if e.path == file)
    encoded = replace(plan, entries=(*others.entries, first))
    encode_missing(encoded, folder.encoders, folder.cache, log=lambda _: None)
    assert names(folder.prepared()) == sorted(os.path.basename(e.path) for e in others.kept)


# ---- held-out clips ----


def test_a_small_set_holds_one_out(folder):
    clips = folder.clips()
    for share, count in ((0.05, 1), (0.5, 2), (0.0, 0), (0.99, 3)):
        train, held = split_holdout(clips, share)
        assert (len(train), len(held)) == (4 - count, count)
    assert split_holdout(clips[:1], 0.5) == (clips[:1], [])
    assert split_holdout(clips, 0.05, at_least=0) == (clips, [])


def test_a_run_that_held_out_none_goes_on_so(folder):
    folder.save(folder.clips())
    assert folder.least(Validation(enable=True, holdout=0.05)) == 0
    assert folder.least(Validation(enable=True, holdout=0.05, path="other")) == 1


# ---- captions that are cut ----


def test_captions_that_are_cut_are_named_once(folder):
    texts = {"a": "word " * 15, "b": "word " * 16, "c": "w " * 2000, "d": "x" * 5000}  # and a token to begin with
    for name, text in texts.items():
        (folder.root / "clips" / f"{name}.txt").write_text(text)
    (line,) = with_cut_captions(folder.plan(), folder.encoders).remarks
    b, c = (str(folder.root / "clips" / f"{name}.mp4") for name in "bc")
    assert line == f"2 captions are cut to encoder.max_text_length = 16: {b} (17 tokens), {c} (2001 tokens)"
    assert with_cut_captions(folder.plan(), DebugEncoders(3000)).remarks == ()
    assert cut_prompts(["short", "one two " * 9], folder.encoders).startswith(
        "1 prompts are cut to encoder.max_text_length = 16: 'one two one two "
    )
    assert cut_prompts([], folder.encoders) == ""


def test_words_that_are_not_read_are_named():
    class Letters(DebugEncoders):
        """A token for each letter and one at the end, as of a script without spaces."""

        def num_tokens(self, prompts):
            return [1 + len(prompt.replace(" ", "")) for prompt in prompts]

    text = "a red  circle moves left, slowly"
    assert lost_words(["fits", text, text, "a red circle moves"], DebugEncoders(4)) == [
        f"'{text}' has 7 tokens and is cut to encoder.max_text_length = 4; not read: 'moves left, slowly'",
        "'a red circle moves' has 5 tokens and is cut to encoder.max_text_length = 4; not read: 'moves'",
    ]
    (whole,), (letters,) = lost_words([text], DebugEncoders(1)), lost_words(["abcdefghijkl"], Letters(5))
    assert whole.endswith(f"not read: '{text}'") and letters.endswith("not read: 'efghijkl'")
    assert lost_words(["ab cd efg hijkl"], Letters(6))[0].endswith("not read: 'efg hijkl'")
    assert lost_words([text, ""], DebugEncoders(7)) == []


def test_the_command_says_what_is_cut(folder, capsys):
    (folder.root / "clips" / "a.txt").write_text("word " * 99)
    (folder.root / "run.toml").write_text(dump(JobConfig(data=folder.data)))
    argv = ["plan", str(folder.root / "run.toml"), "--job.dump_folder", str(folder.root)]
    main([*argv, "--encoder.name=debug", "--encoder.max_text_length=16"])
    assert "note: 1 captions are cut to encoder.max_text_length = 16" in capsys.readouterr().out
    main(argv)  # without the folder of the encoders
    assert 'note: the length of captions is not checked: model.hf_assets_path = ""' in capsys.readouterr().out
