"""Many files of every kind: plan, loader and export agree about each of them, frame by frame."""

import bisect
import json
import math
import random
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, islice
from pathlib import Path

import numpy as np
import pytest

from tests.unit_tests.data_clips import colour, number_by_colour, write_clip, write_sound
from titan_video.config.manager import parse_args
from titan_video.data.batching import Batching, Work
from titan_video.data.latent_cache import LatentCache
from titan_video.data.loader import DrawPlan, EntryReader, LatentLoader
from titan_video.encoders.debug import DebugEncoders
from titan_video.ingest import __main__ as command
from titan_video.ingest.cache.cached_clips import cached_clips
from titan_video.ingest.plan.build import build_plan

SIZES = [
    (64, 48),
    (48, 64),
    (96, 54),
    (54, 96),
    (80, 80),
    (63, 47),
    (51, 77),
    (128, 72),
    (40, 30),
    (100, 36),
    (36, 100),
    (91, 51),
]
RATES = [Fraction(8), Fraction(12), Fraction(24), Fraction(25), Fraction(30000, 1001)]
LENGTHS = [1, 200, 2, 170, 5, 9, 12, 17, 24, 33, 40, 66, 7, 30, 50, 100, 21, 29, 45, 13, 80]
FPS = 12
BUCKETS = [[frames, *size] for frames in (5, 17, 33) for size in ((32, 64), (64, 32), (48, 48))]
FAULTS = {  # kind of bad file: how the reason in the plan starts
    "empty": "corrupt: the file is empty",
    "sound": "not a video: no video stream",
    "noise": "corrupt: ",
    "cut": "corrupt: ",
    "damaged": "corrupt: ",
    "wordless": "no caption: ",
}
ONLY_DECODING_TELLS = "damaged"


@dataclass(frozen=True)
class Made:
    """A file. times, end: of its frames and of the last, in seconds; is_steady: one rate. size: as shown."""

    path: Path
    fault: str = ""
    times: tuple[float, ...] = ()
    end: float = 0.0
    is_steady: bool = True
    size: tuple[int, int] = (0, 0)

    @property
    def shown(self):
        """Numbers of the frames that are on the screen every 1 / FPS seconds."""
        found = []
        while (t := len(found) / FPS) < self.end - 0.0005 or not found:
            found.append(bisect.bisect_right(self.times, t + 0.0005) - 1)
        return found


def make(folder, number):
    """Kinds, sizes, rates, lengths, containers, rotations and steadiness, each at its own pace."""
    fault = list(FAULTS)[number // 5 % len(FAULTS)] if number % 5 == 4 else ""
    (width, height), rate, count = SIZES[number % 12], RATES[number // 3 % 5], LENGTHS[number % 21]
    suffix = ".mp4" if fault == "damaged" else (".mp4", ".mkv", ".mov")[number % 3]
    path = folder / f"{number:03d}{suffix}"
    if fault != "wordless":
        path.with_suffix(".txt").write_text(f"clip {number:03d}")
    if fault == "empty":
        path.write_bytes(b"")
    elif fault == "sound":
        write_sound(path)
    elif fault:
        return _bad(path, fault, rate, width, height)
    if fault:
        return Made(path, fault)
    rotation = 90 * (number // 7 % 4) if suffix != ".mkv" else 0
    is_steady = number % 4 != 3
    gaps = [random.Random(number).choice([21, 40, 97, 230]) for _ in range(count)]
    milliseconds = [0, *accumulate(gaps)]
    write_clip(
        path,
        fps=rate,
        width=width,
        height=height,
        times=None if is_steady else milliseconds[:count],
        rotation=rotation,
        frames=[np.full((height, width, 3), colour(k), np.uint8) for k in range(count)],
        audio=number % 11 == 3,
        pix_fmt="yuv444p" if width % 2 or height % 2 else "yuv420p",
    )
    times = [k / rate if is_steady else Fraction(milliseconds[k], 1000) for k in range(count + 1)]
    times = (
        [Fraction(math.floor(1000 * t + Fraction(1, 2)), 1000) for t in times] if suffix == ".mkv" else times
    )  # this one keeps milliseconds
    return Made(
        path,
        "",
        tuple(map(float, times[:-1])),
        float(times[-1]),
        is_steady,
        (height, width) if rotation % 180 else (width, height),
    )


def _bad(path, fault, rate, width, height):
    pixels = np.random.default_rng(0).integers(0, 255, (40, height, width, 3), dtype=np.uint8)
    write_clip(
        path,
        fps=rate,
        width=width,
        height=height,
        frames=pixels,
        pix_fmt="yuv444p" if width % 2 or height % 2 else "yuv420p",
    )
    data = bytearray(path.read_bytes())
    if fault == "noise":
        data[:] = random.Random(0).randbytes(len(data))
    elif fault == "cut":
        del data[len(data) * 3 // 5 :]
    elif fault == "damaged":
        data[len(data) // 2 : len(data) // 2 + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    return Made(path, fault)


def all_numbers(path):
    """{time in ticks: number} of every frame, and the numbers in order, by a plain loop."""
    import av

    with av.open(str(path)) as container:
        found = {frame.pts: number_by_colour(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)}
    return found, [found[t] for t in sorted(found)]


def expected(made, num_frames):
    """(reason, bucket) of a file of `num_frames` frames after resampling: the documentation implemented again."""
    fitting = [b for b in BUCKETS if b[0] <= num_frames]
    if not fitting:
        count, fix = f"{num_frames} frame{'s' * (num_frames > 1)}", "; a bucket of one frame would take it"
        return f"too short: {count} at {FPS} fps, the shortest bucket takes 5{fix * (len(made.times) == 1)}", None
    width, height = made.size
    ratio = {
        tuple(b): max(width * b[1] / (height * b[2]), height * b[2] / (width * b[1]))
        for b in fitting
        if b[0] == fitting[-1][0]
    }
    return "", min(ratio, key=ratio.get)


@pytest.mark.parametrize("num_files", [30, pytest.param(210, marks=pytest.mark.slow)])
def test_plan_loader_and_export_agree(tmp_path, capsys, monkeypatch, num_files):
    (tmp_path / "clips").mkdir()
    files = [make(tmp_path / "clips", number) for number in range(num_files)]
    by_path = {str(made.path): made for made in files}
    file = tmp_path / "run.toml"
    file.write_text(
        f'[job]\ndump_folder = "{tmp_path}/planned"\n[encoder]\nname = "debug"\nmax_text_length = '
        f'4\n[data]\npath = "{tmp_path}/clips"\n'
        f'buckets = {BUCKETS}\nfps = {FPS}.0\nframe_extraction = "chunk"\nnum_workers = 0\ncache_folder = '
        f'"{tmp_path}/cache"\n'
    )

    # The plan: every file, and its reason.
    config = parse_args(["--job.config_file", str(file)])
    plan = build_plan(config.data, tmp_path / "cache", temporal_stride=4)
    assert {e.path for e in plan.entries} == set(by_path)
    for entry in plan.entries:
        made = by_path[entry.path]
        if made.fault == ONLY_DECODING_TELLS:
            assert entry.kept, entry
        elif made.fault:
            assert entry.reason.startswith(FAULTS[made.fault]), entry
        else:  # containers do not agree on how long the last of uneven frames lasts
            assert abs(entry.num_frames - len(made.shown)) <= (0 if made.is_steady else 4), entry
            reason, bucket = expected(made, entry.num_frames)
            assert (entry.reason, entry.bucket, entry.width, entry.height) == (reason, bucket, *made.size), entry
            assert entry.num_clips == (entry.num_frames // bucket[0] if bucket else 1)
    assert len({e.bucket for e in plan.kept}) == len(BUCKETS) or num_files < 100

    # The frames that it says, by their colours.
    said = {}
    for entry in plan.kept:
        made = by_path[entry.path]
        if made.fault:
            continue
        by_time, in_order = all_numbers(entry.path)
        assert in_order == list(range(len(made.times)))
        said[entry.path, entry.start] = [by_time[t] for t in entry.pts]
        shown = made.shown + 4 * [len(made.times) - 1]
        assert said[entry.path, entry.start] == shown[entry.start : entry.start + entry.bucket[0]], entry.path

    # The export, after decoding: only files that decoding finds to be damaged go, by name.
    command.main(["plan", str(file), "--decode", "--export", "10000", "--data.num_workers", "2"])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "planned" / "data_plan.jsonl").read_text().splitlines()]
    damaged = {str(made.path) for made in files if made.fault == ONLY_DECODING_TELLS}
    assert {r["path"] for r in rows if not r["kept"]} == {e.path for e in plan.entries if not e.kept} | damaged
    by_bucket = {}
    for row in rows:
        if row["kept"]:
            by_bucket.setdefault(tuple(row["bucket"]), []).append((row["path"], row["start"]))
        elif row["reason"].startswith("corrupt") and num_files < 100:  # on the screen are the first 20
            assert (
                f"{row['path']}: {row['reason'].partition(': ')[2]}" in printed.split("after decoding every clip, ")[1]
            )
    exported = sorted((tmp_path / "planned" / "plan_clips").glob("*.mp4"))
    assert len(exported) == sum(r["kept"] for r in rows) == len(said)
    turns = [clip for i in range(len(rows)) for b in sorted(by_bucket) for clip in by_bucket[b][i : i + 1]]
    for path, clip in zip(exported, turns, strict=True):
        assert all_numbers(path)[1] == said[clip], path

    # Encoding: the same files, for the same reasons; what the encoder was given is written down by what it gave.
    get_numbers = {}
    encode_video = DebugEncoders.encode_video

    def noted(self, frames_BCFHW):
        latents = encode_video(self, frames_BCFHW)
        get_numbers[latents[0].numpy().tobytes()] = [
            number_by_colour(image) for image in frames_BCFHW[0].permute(1, 2, 3, 0).numpy()
        ]
        return latents

    monkeypatch.setattr(DebugEncoders, "encode_video", noted)
    command.main(["encode", str(file), "--job.dump_folder", f"{tmp_path}/encoded"])
    assert [json.loads(line) for line in (tmp_path / "encoded" / "data_plan.jsonl").read_text().splitlines()] == rows

    # The loader: an epoch has each clip once, with its caption and its frames.
    encoders = DebugEncoders(4)
    cache = LatentCache(tmp_path / "cache", encoders.video_id(), encoders.text_id())
    dropped = plan.drop({r["path"]: r["reason"] for r in rows if not r["kept"]})
    clips = cached_clips(dropped, cache)
    get_caption = {
        encoders.encode_text([made.path.with_suffix(".txt").read_text()])[0].numpy().tobytes(): str(made.path)
        for made in files
        if made.fault != "wordless"
    }
    draw_plan = DrawPlan(clips, cache.text_key(""), Batching(1), lambda b: Work(1, 1.0))
    loader = LatentLoader(draw_plan, EntryReader(cache, max_text_length=4, text_dim=64, keep=True))
    trained = []
    for (batch,) in islice(loader, len(clips)):
        text = batch.text_BLD[0][batch.text_mask_BL[0]].numpy().tobytes()
        trained.append((get_caption[text], get_numbers[batch.streams["video"][0].numpy().tobytes()]))
    assert sorted(trained) == sorted((path, numbers) for (path, _), numbers in said.items())
