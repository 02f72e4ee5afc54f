"""`python -m titan_video.data plan`: what it prints and writes is what is trained."""

import json

import numpy as np
import pytest

from tests.unit_tests.data_clips import captioned, number, write_clip
from titan_video.data.batching import Batching, Work
from titan_video.ingest import __main__ as command
from titan_video.ingest.decode.colour import MediaPolicy
from titan_video.ingest.decode.video import decode, probe
from titan_video.ingest.plan.build import make_plan
from titan_video.ingest.plan.entries import read_frames
from titan_video.ingest.plan.report import decode_all, export, report

BUCKETS = [[1, 32, 32], [5, 32, 64], [5, 64, 32], [9, 64, 64]]


def work(bucket):
    tokens = ((bucket[0] - 1) // 4 + 1) * bucket[1] * bucket[2] // 256
    return Work(tokens, 1e9 * tokens**2)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    (folder / "clips").mkdir()
    for k, (count, width, height) in enumerate(
        [(40, 64, 48), (8, 64, 32), (7, 32, 64), (6, 30, 60), (3, 48, 48), (2, 90, 90)]
    ):
        captioned(folder / "clips" / f"{k}.mp4", f"clip {k}", count=count, width=width, height=height, fps=10)
    return make_plan(folder / "clips", BUCKETS, 10, 0, folder / "cache", policy=MediaPolicy(video_as_image=True))


def test_table(plan):
    text = report(
        plan, Batching(4, token_budget=40), 2, work, lambda b: (16, (b[0] - 1) // 4 + 1, b[1] // 8, b[2] // 8), 100
    )
    lines = {line.split()[0]: line.split() for line in text.splitlines()}
    # bucket, clips, from, [and n more], kept, latent, tokens, clips, tokens, FLOPs of forward and backward, of the
    # budget
    assert lines["9x64x64"] == ["9x64x64", "1", "48x64", "75%", "3x8x8", "48", "1", "48", "6.91", "120%"]
    assert lines["1x32x32"] == [
        "1x32x32",
        "2",
        "48x48",
        "and",
        "1",
        "more",
        "100%",
        "1x4x4",
        "4",
        "1",
        "4",
        "0.048",
        "10%",
    ]
    assert lines["5x64x32"][:5] == ["5x64x32", "2", "64x32", "and", "1"]
    assert "epoch: 6 samples, about 1.5 steps of 4 micro-batches" in text and "2 data-parallel ranks, 200 steps" in text
    assert "assigned by equal cost: cost differs by 0.0% on average, ranks idle 0.0%" in text
    num_bytes = 4 * 16 * (3 * 64 + 3 * 2 * 4 * 8 + 2 * 16)
    assert f"cache: {num_bytes / 1024:.3g} KiB of latents, at most 600 B of captions" in text


def test_what_equal_cost_saves(plan):
    text = report(plan, Batching(8, clips=1), 8, work, lambda b: (16, 1, 1, 1), 1)
    shared, alone = (float(line.split("idle ")[1].split("%")[0]) for line in text.splitlines() if "ranks idle" in line)
    assert shared == 0 and alone > 50


def test_export_writes_what_is_trained(plan, tmp_path):
    paths = export(plan, 5, tmp_path / "out")
    assert len(paths) == 5 and [p.name[4:].split("_")[0] for p in paths] == [
        "1x32x32",
        "5x32x64",
        "5x64x32",
        "9x64x64",
        "1x32x32",
    ]
    entry = next(e for e in plan.kept if e.bucket == (9, 64, 64))
    found = probe(str(paths[3]))
    assert (found.width, found.height, len(found.pts), found.fps) == (64, 64, 9, 10)
    frames = decode(str(paths[3]), found.pts, 64, 64, (9, 64, 64)).int()
    assert abs(frames - read_frames(entry).int()).float().mean() < 3
    assert [number(f) for f in frames.permute(1, 2, 3, 0).numpy()] == list(range(9))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_decoding_finds_what_packets_do_not_tell(tmp_path, num_workers):
    for name in ("good", "bad"):
        captioned(
            tmp_path / f"{name}.mp4",
            name,
            frames=np.random.default_rng(0).integers(0, 255, (20, 48, 64, 3), dtype=np.uint8),
            fps=10,
        )
    data = bytearray((tmp_path / "bad.mp4").read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = b"\xff" * 3000
    (tmp_path / "bad.mp4").write_bytes(data)
    plan = make_plan(tmp_path, [[17, 32, 64]], 10, 0, tmp_path / "cache")
    assert len(plan.kept) == 2
    after = decode_all(plan, num_workers)
    assert [e.caption for e in after.kept] == ["good"] and "dropped, corrupt: 1" in after.summary()


def test_the_command(tmp_path, capsys):
    captioned(tmp_path / "clips.mp4", "one", count=40, fps=10)
    write_clip(tmp_path / "wordless.mp4")
    file = tmp_path / "run.toml"
    file.write_text(
        f'[job]\ndump_folder = "{tmp_path}/out"\n[encoder]\nname = "debug"\n[data]\npath = "{tmp_path}"\nbuckets '
        f"= [[9, 32, 64]]\nfps = 10\n"
        'num_workers = 0\nframe_extraction = "chunk"\ntokens_per_microbatch = 100\n'
    )
    command.main(
        [
            "plan",
            str(file),
            "--export",
            "2",
            "--ranks",
            "4",
            "--decode",
            "--data.frame_extraction",
            "uniform",
            "--data.uniform_clips",
            "3",
        ]
    )
    out = capsys.readouterr().out
    assert "3 kept, 1 dropped" in out and "4 data-parallel ranks" in out and "9x32x64" in out
    rows = [json.loads(line) for line in (tmp_path / "out" / "data_plan.jsonl").read_text().splitlines()]
    assert [(r["status"], r["start"]) for r in rows] == [("split", 0), ("split", 16), ("split", 31), ("dropped", 0)]
    assert rows[0]["resize"] == [64, 48] and rows[0]["crop"] == [0, 8, 64, 32] and rows[0]["num_frames"] == 40
    assert len(list((tmp_path / "out" / "plan_clips").glob("*.mp4"))) == 2
    with pytest.raises(SystemExit, match="data.global_micro_batches"):
        command.main(["plan", str(file), "--ranks", "4", "--data.global_micro_batches", "6"])
