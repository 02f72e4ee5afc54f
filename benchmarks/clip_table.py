"""What a start costs with many clips: memory of a rank's own, CPU seconds of each rank, listings of the cache's folder.

    python benchmarks/clip_table.py [--clips 1000000] [--clips-per-file 1] [--ranks 2] [--folder FOLDER] [--json FILE]

The clips are synthetic: links to one file, a row of metadata each with a caption of 45 words, probes as of 24 frames a
second or of times in milliseconds, and a cache whose index names all their entries. Then a run starts three times: the
plan is made, the plan is known, and with a tenth of the clips. Each is done by `--ranks` processes, which do what
train.py does up to its first batches, and draw from them. Memory is RssAnon: pages of files are shared and can be taken
back. A folder that was made is used again.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import environment, markdown, options, write_json  # noqa: E402
from titan_video.config.job_config import Data, Encoder, JobConfig, Metrics, Validation  # noqa: E402
from titan_video.data.batching import Batching, Work  # noqa: E402
from titan_video.data.latent_cache import LatentCache, content_hash  # noqa: E402
from titan_video.data.loader import DrawPlan  # noqa: E402
from titan_video.distributed.utils import init_distributed  # noqa: E402
from titan_video.encoders import build_encoders  # noqa: E402
from titan_video.ingest.cache.cache_keys import video_keys  # noqa: E402
from titan_video.ingest.cache.entry_index import make_index  # noqa: E402
from titan_video.ingest.decode.video import Probe  # noqa: E402
from titan_video.ingest.plan.build import Planner, Scan  # noqa: E402
from titan_video.ingest.plan.plan_table import PlanTable  # noqa: E402
from titan_video.ingest.plan.planned import Tables, plan_on_ranks  # noqa: E402
from titan_video.ingest.plan.probes import ProbeStore  # noqa: E402
from titan_video.ingest.prepare import open_cache, prepare_clips  # noqa: E402
from titan_video.models import get_args, get_spec  # noqa: E402

BUCKETS = ((81, 480, 832), (81, 832, 480), (49, 480, 832))
MAX_LINKS = 30_000  # of one file
ENTRIES_A_SHARD = 60  # of latents of 81 x 480 x 832
FPS, CLIP_SECONDS = 16.0, 81 / 16


def settings(folder: Path, clips_per_file: int) -> JobConfig:
    mode = "chunk" if clips_per_file > 1 else "head"
    data = Data(
        path=str(folder / "clips" / "rows.jsonl"),
        buckets=BUCKETS,
        fps=FPS,
        frame_extraction=mode,
        num_workers=0,
        cache_folder=str(folder / "cache"),
    )
    config = JobConfig(data=data, encoder=Encoder(name="debug"), validation=Validation(enable=True, num_videos=0))
    return replace(config, job=replace(config.job, dump_folder=str(folder / "run")), metrics=Metrics())


# ---- making clips ----


def make_files(folder: Path, num_files: int) -> None:
    clips = folder / "clips"
    clips.mkdir(parents=True)
    words = "camera slowly follows a red kite over grey hills while children run below it and wind moves the".split()
    rng = np.random.default_rng(0)
    with open(clips / "rows.jsonl", "w") as rows:
        for n in range(num_files):
            if n % MAX_LINKS == 0:
                first = folder / f"source-{n}.mp4"
                first.write_bytes(b"not opened")
            os.link(first, clips / f"clip_{n:09d}_of_a_data_set.mp4")
            caption = f"{n} " + " ".join(words[w] for w in rng.integers(0, len(words), 44))
            rows.write(json.dumps({"video": f"clip_{n:09d}_of_a_data_set.mp4", "caption": caption}) + "\n")


def make_probes(planner: Planner, clips_per_file: int) -> None:
    """A tenth has times in milliseconds, evenly spaced to within one."""
    scanned, store = Scan(planner), ProbeStore(planner.probes, planner.limits)
    count = round(24 * CLIP_SECONDS * clips_per_file) + 8
    even, odd = tuple(range(0, 512 * count, 512)), tuple(round(1000 * i / 24) for i in range(count))
    for n, (key, _) in enumerate(planner.missing(scanned, store)):
        sha256 = hashlib.sha256(str(n).encode()).hexdigest()
        size = (720, 1280) if n % 3 == 0 else (1280, 720)
        if n % 10:
            found = Probe(sha256, *size, "1/12288", even, 512 * count)
        else:
            found = Probe(sha256, *size, "1/1000", odd, round(1000 * count / 24))
        store.add(key, found)
    store.flush()
    store.merge()
    scanned.close()


def make_cache(cache: LatentCache, table: PlanTable) -> None:
    """A manifest of all entries, and empty shards: nothing is read from them."""
    (cache.folder / "shards").mkdir(parents=True, exist_ok=True)
    names: list[str] = [f"text/{cache.text_key('')}"]
    with open(cache.folder / "manifest.jsonl", "w") as manifest:

        def shard() -> None:
            name = f"{content_hash(names)[:32]}.safetensors"
            (cache.folder / "shards" / name).write_bytes(b"")
            manifest.write(json.dumps({"shard": name, "bytes": 0, "entries": names}) + "\n")
            names.clear()

        for e in table:
            names.extend(f"{kind}/{key}" for kind, key in video_keys(cache, e).items())
            if e.start == 0:
                names.extend(f"text/{cache.text_key(caption)}" for caption in e.captions)
            if len(names) >= ENTRIES_A_SHARD:
                shard()
        shard()


# ---- a start ----


def own_bytes() -> int:
    """Memory of this process that is no file's."""
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith("RssAnon"))


def start(rank: int, world: int, port: int, folder: Path, clips_per_file: int) -> None:
    """What one rank of a run does. Its figures go to a file."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    init_distributed(torch.device("cpu"), timeout_seconds=7200)
    group, config = dist.new_group(backend="gloo"), settings(folder, clips_per_file)
    args = get_args(get_spec("wan"), "debug", "", 512)
    encoders = build_encoders(config.encoder, "", torch.device("cpu"))
    dist.barrier()
    before, cpu, seconds = own_bytes(), time.process_time(), time.perf_counter()
    cache = open_cache(folder / "cache", encoders, args.conditioning, group)
    clips = prepare_clips(config, args, encoders, cache, group)
    draw_plan = DrawPlan(clips.training, cache.text_key(""), Batching(64), lambda b: Work(b[0], 1.0), seed=1)
    next(draw_plan.sampler)
    cpu, seconds = time.process_time() - cpu, time.perf_counter() - seconds
    own = own_bytes() - before
    drawn = time.process_time()
    specs = [draw_plan.spec(m) for _ in range(10) for m in next(draw_plan.sampler)[rank::world]]
    drawn = (time.process_time() - drawn) / sum(map(len, specs))
    found = {
        "cpu": cpu,
        "seconds": seconds,
        "own": own,
        "clips": sum(map(len, draw_plan.buckets)),
        "draw": drawn,
        "identity": draw_plan.sampler.fingerprint,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(folder: Path, world: int, clips_per_file: int) -> list[dict[str, Any]]:
    context = torch.multiprocessing.get_context("spawn")
    port = 20_000 + os.getpid() % 20_000
    ranks = [context.Process(target=start, args=(r, world, port, folder, clips_per_file)) for r in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            raise SystemExit(f"a rank ended with {process.exitcode}")
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(world)]


def prepare(folder: Path, num_files: int, clips_per_file: int) -> dict[str, float]:
    """CPU seconds of the parts that are done once."""
    if (folder / "made").exists():
        return json.loads((folder / "made").read_text())
    config, spent = settings(folder, clips_per_file), {}
    encoders = build_encoders(config.encoder, "", torch.device("cpu"))
    cache = LatentCache(folder / "cache", encoders.video_id(), encoders.text_id())
    make_files(folder, num_files)
    planner = Planner.of(config.data, cache.folder, encoders.stride_t)
    make_probes(planner, clips_per_file)
    init_distributed(torch.device("cpu"), timeout_seconds=7200)
    cpu = time.process_time()
    plan = plan_on_ranks(planner, 0, Tables.of(cache.folder, folder / "run"))
    spent["plan"] = time.process_time() - cpu
    dist.destroy_process_group()
    make_cache(cache, plan.entries)
    cpu = time.process_time()
    make_index(cache)
    spent["index"] = time.process_time() - cpu
    (folder / "made").write_text(json.dumps(spent))
    return spent


def measure(folder: Path, num_clips: int, clips_per_file: int, world: int) -> dict[str, Any]:
    once = prepare(folder, num_clips // clips_per_file, clips_per_file)
    first = run(folder, world, clips_per_file)  # makes the table of clips
    known = run(folder, world, clips_per_file)
    assert len({rank["identity"] for rank in first + known}) == 1
    tables = sum(p.stat().st_size for p in (folder / "cache").rglob("*.columns"))
    return {"clips": known[0]["clips"], "once": once, "first": first, "known": known, "tables": tables}


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        for name, ranks in (("tables of clips made", r["first"]), ("all known", r["known"])):
            others = ranks[1:] or ranks
            most = max(x["own"] for x in others) / r["clips"]
            rows.append(
                [
                    f"{r['clips']:,}",
                    name,
                    ranks[0]["cpu"],
                    max(x["cpu"] for x in others),
                    sum(x["cpu"] for x in ranks),
                    ranks[0]["own"] / r["clips"],
                    most,
                    1e6 * ranks[0]["draw"],
                ]
            )
    head = ["clips", "start", "first rank, CPU s", "others, CPU s each", "all, CPU s"]
    head += ["first rank, own B a clip", "others, own B a clip", "a draw, us"]
    small, large = min(results, key=lambda r: r["clips"]), max(results, key=lambda r: r["clips"])
    lines = [markdown(head, rows)]
    if small is not large:
        for number in range(len(large["known"])):
            grown = large["known"][number]["own"] - small["known"][number]["own"]
            per_clip = grown / (large["clips"] - small["clips"])
            lines.append(f"rank {number}: own memory grows by {per_clip:.1f} B a clip")
    for r in results:
        lines.append(
            f"{r['clips']:,} clips: made once: plan {r['once']['plan']:.1f} CPU s, index {r['once']['index']:.1f};"
            f" tables and index {r['tables'] / r['clips']:.0f} B a clip on disk"
        )
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = options(__doc__)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--clips-per-file", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the clips are made, and stay")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    given = parse(argv)
    clips = 2000 if given.toy else given.clips
    folder = given.folder or Path(tempfile.mkdtemp(prefix="clip_table_"))
    counts = (clips // 10, clips)
    results = [measure(folder / f"{n}", n, given.clips_per_file, given.ranks) for n in counts]
    print(table(results))
    if given.json:
        busy = {"cores": os.cpu_count(), "load average": round(os.getloadavg()[0], 1)}
        write_json(given.json, "clip_table", given, environment(torch.device("cpu")) | busy, {"starts": results})
    if not given.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
