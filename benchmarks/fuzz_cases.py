"""The cases of benchmarks/fuzz.py: damaged and hostile media files, configurations, checkpoints and weights.

A case is a function of (seed, number) alone, so that one can be run again. It is run in a folder of its own and returns
"accepted" or "refused"; any exception that a user would see as a traceback is left to the runner.
"""

import json
import os
import pickle
import random
import shutil
import socket
import struct
import tarfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import ROOT
from tests.unit_tests.data_clips import write_clip
from tests.unit_tests.test_checkpoint import Counter, Weights, manager, reseal, save_steps
from titan_video.config.check import check
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import ConfigError, dump, parse, parse_args
from titan_video.ingest.decode.images import UnusableClip
from titan_video.ingest.files.media import DecodeLimits
from titan_video.ingest.plan.build import make_plan
from titan_video.ingest.plan.entries import read_frames
from titan_video.models import get_args
from titan_video.models.wan import SPEC
from titan_video.weights.export.pipeline_folder import complete_pipeline
from titan_video.weights.export.save import save_hf
from titan_video.weights.hf_storage import load_hf

ARGS = SPEC.flavors["debug"]
BUCKETS = [(5, 32, 32), (1, 32, 32)]
LIMITS = DecodeLimits(max_pixels=1 << 22, max_frames=20_000)


@dataclass(frozen=True)
class Case:
    """rng: of this case alone. folder: its own, empty. outside: a file of somebody else, which nothing may touch."""

    number: int
    rng: random.Random
    folder: Path
    seeds: Path
    outside: Path


# ---- bytes ----


def mutate(data: bytes, rng: random.Random, others: list[bytes]) -> bytes:
    """Bits flipped, bytes set, cut, doubled, moved, numbers made extreme, a piece of another file put in."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        at, size = rng.randrange(len(data) or 1), rng.choice([1, 4, 16, 256, 4096])
        # Headers are small and matter more than pixels.
        at = min(at, rng.choice([64, 512, 4096, len(data)]))
        way = rng.randrange(8)
        if way == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif way == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 2:
            del data[at : at + size]
        elif way == 3:
            data[at:at] = data[at : at + size]
        elif way == 4:
            value = rng.choice(
                [0, 1, 0x7F, 0x80, 0xFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFF, rng.getrandbits(32)]
            )
            data[at : at + 4] = struct.pack(rng.choice(["<I", ">I"]), value)
        elif way == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) or 1)
            data[at : at + size] = other[start : start + size]
        elif way == 6:
            data[at : at + size] = rng.randbytes(size)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


# ---- media ----

SEED_CLIPS: dict[str, dict[str, Any]] = {
    "h264.mp4": {},
    "rotated.mp4": {"rotation": 90},
    "sound.mp4": {"audio": True},
    "times.mkv": {"times": [0, 40, 200, 230, 500, 510, 900, 1000]},
    "vp8.webm": {"codec": "libvpx"},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mpeg4.avi": {"codec": "mpeg4"},
    "mjpeg.mov": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
}


def make_media_seeds(folder: Path) -> None:
    from PIL import Image

    for name, kwargs in SEED_CLIPS.items():
        options = {"count": 8, "fps": 10, "width": 48, "height": 32, **kwargs}
        try:
            write_clip(folder / name, **options)
        except Exception:  # this build of libav lacks the encoder
            (folder / name).unlink(missing_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), dtype=np.uint8)
    for suffix in ("png", "jpg", "webp", "bmp"):
        Image.fromarray(pixels).save(folder / f"image.{suffix}")


def run_media(case: Case) -> str:
    """A folder with one clip and its caption: planned, and each frame of the plan decoded."""
    clips = case.folder / "clips"
    clips.mkdir()
    if case.number < len(SPECIAL_MEDIA):
        SPECIAL_MEDIA[case.number](case, clips)
    else:
        seeds = sorted(case.seeds.iterdir())
        seed = case.rng.choice(seeds)
        suffix = case.rng.choice(seeds).suffix if case.rng.random() < 0.1 else seed.suffix
        data = seed.read_bytes()
        changed = data
        while changed == data:
            changed = mutate(data, case.rng, [s.read_bytes() for s in seeds])
        (clips / f"a{suffix}").write_bytes(changed)
        (clips / "a.txt").write_text("a clip")
    return _plan(clips, case.folder / "cache")


def _plan(clips: Path, cache: Path) -> str:
    try:
        plan = make_plan(clips, BUCKETS, 8, 0, cache, limits=LIMITS)
    except ValueError as e:
        if isinstance(e, UnicodeError) or "\n" in str(e).strip() and "no usable clip" not in str(e):
            raise
        return "refused"
    plan.write_jsonl(cache / "plan.jsonl")
    for entry in plan.kept:
        try:
            read_frames(entry)
        except UnusableClip:
            return "refused"
    return "accepted"


def _clip(name: str, data: bytes) -> Callable[[Case, Path], None]:
    def make(case: Case, clips: Path) -> None:
        (clips / name).write_bytes(data.replace(b"OUTSIDE", bytes(case.outside)))
        (clips / name).with_suffix(".txt").write_text("a clip")

    return make


def _far(case: Case, clips: Path) -> None:
    write_clip(clips / "a.mkv", count=3, width=48, height=32, times=[0, 40, 1_900_000_000])
    (clips / "a.txt").write_text("a timestamp 22 days later")


def _fifo(case: Case, clips: Path) -> None:
    os.mkfifo(clips / "a.mp4")
    (clips / "a.txt").write_text("a clip")


def _fifo_caption(case: Case, clips: Path) -> None:
    shutil.copy(case.seeds / "h264.mp4", clips / "a.mp4")
    os.mkfifo(clips / "a.txt")


def _fifo_frame(case: Case, clips: Path) -> None:
    (clips / "a").mkdir()
    os.mkfifo(clips / "a" / "0.png")
    (clips / "a.txt").write_text("a folder of frames")


def _socket(case: Case, clips: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(clips / "a.mp4"))
    (clips / "a.txt").write_text("a clip")


def _link(target: str) -> Callable[[Case, Path], None]:
    def make(case: Case, clips: Path) -> None:
        (clips / "a.mp4").symlink_to(target)
        (clips / "a.txt").write_text("a clip")
        shutil.copy(case.seeds / "h264.mp4", clips / "b.mp4")
        (clips / "b.txt").symlink_to(target)

    return make


def _rows(name: str, text: str | bytes) -> Callable[[Case, Path], None]:
    def make(case: Case, clips: Path) -> None:
        shutil.copy(case.seeds / "h264.mp4", clips / "a.mp4")
        (clips / name).write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))

    return make


def _tar(change: Callable[[bytearray], None]) -> Callable[[Case, Path], None]:
    def make(case: Case, clips: Path) -> None:
        (clips / "t.txt").write_text("a clip")
        with tarfile.open(clips / "a.tar", "w") as tar:
            tar.add(case.seeds / "h264.mp4", "a.mp4")
            tar.add(clips / "t.txt", "a.txt")
        (clips / "t.txt").unlink()
        data = bytearray((clips / "a.tar").read_bytes())
        change(data)
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
        (clips / "a.tar").write_bytes(data)

    return make


def _set(at: int, value: bytes) -> Callable[[bytearray], None]:
    def change(data: bytearray) -> None:
        data[at : at + len(value)] = value

    return change


def _png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(b"\0" * 1000, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(OUTSIDE) (w) file closefile\n%%EOF\n"
PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:OUTSIDE\n#EXT-X-ENDLIST\n"
DEEP = "[" * 100_000
GIF = b"GIF89a\xff\xff\xff\xff\xf0\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
SPECIAL_MEDIA: list[Callable[[Case, Path], None]] = [
    _far,
    _fifo,
    _fifo_caption,
    _fifo_frame,
    _socket,
    _link("/dev/zero"),
    _link("a.mp4"),
    _link("/"),
    _clip("a.png", _png(13000, 13000)),
    _clip("a.png", _png(2**31 - 1, 2**31 - 1)),
    _clip("a.gif", GIF),
    _clip("a.png", EPS),
    _clip("a.jpg", EPS),
    _clip("a.mp4", PLAYLIST),
    _clip("a.mp4", b"ffconcat version 1.0\nfile OUTSIDE\n"),
    _clip("a.mp4", b"<?xml version='1.0'?><MPD><BaseURL>file:OUTSIDE</BaseURL></MPD>"),
    _clip("a.mp4", b""),
    _clip("a%03d.mp4", b"\0" * 100),
    _rows("metadata.jsonl", '{"file_name": "a.mp4", "text": "\\ud800"}\n'),
    _rows(
        "metadata.jsonl", '{"file_name": "\\ud800.mp4", "text": "x"}\n' + '{"file_name": "a\\u0000.mp4", "text": "x"}'
    ),
    _rows("metadata.jsonl", '{"file_name": "a.mp4", "text": ' + DEEP + "}\n" + '{"text": "' + "x" * (3 << 20) + '"}'),
    _rows("metadata.jsonl", '{"file_name": "' + ".tar!" * 100_000 + '", "text": "x"}'),
    _rows("metadata.jsonl", '{"file_name": "a.mp4", "text": "x", "width": 1e400, "height": NaN, "num_frames": -1}'),
    _rows("metadata.json", DEEP),
    _rows("metadata.csv", ",".join(f"c{i}" for i in range(200_000)) + "\n" + "x\n" * 2000),
    _rows("metadata.csv", "file_name,text\na.mp4," + "x" * 200_000 + "\n"),
    _rows("metadata.csv", b"file_name,text\n\0\xff"),
    _tar(_set(124, b"\x80" + b"\xff" * 11)),
    _tar(_set(124, b"\xff" * 12)),
    _tar(_set(124, b"77777777777\0")),
    _tar(_set(156, b"L")),
    _tar(_set(156, b"x")),
    _tar(_set(156, b"S")),
]


# ---- configurations ----

VALUES = (
    "0 1 -1 2 7 1.5 1e308 -1e308 nan inf -inf true 9223372036854775807 -9223372036854775808 99999999999999999999 [] "
    "[[]] [1] [-1] [1e9] [[1,2,3]] [[5,64,64]] '' 'x' '/dev/zero' '../../x' 'embedded:shapes-999999999999' {} {a=1} "
    "1979-05-27 1000000 4611686018427387904 2147483647 0x7fffffff '\\u0000' 0.1 1e-300 [[5,64,64],[4,1,1]]"
).split()
MILLION = 1_000_000


def toml_seeds() -> list[str]:
    texts = [path.read_text() for path in sorted((ROOT / "train_configs").glob("*.toml"))]
    return [*texts, dump(JobConfig())]


def import_rules(folder: Path) -> None:
    """The first check imports what it needs, which takes seconds; that is done before children are forked."""
    with suppress(ConfigError):
        check(JobConfig(), world_size=1)


def run_toml(case: Case) -> str:
    """A TOML or a command line, read and checked for some number of ranks; what is accepted is written, read again."""
    rng = case.rng
    if case.number < len(SPECIAL_TOMLS):
        text: str | list[str] = SPECIAL_TOMLS[case.number]()
    elif rng.random() < 0.4:
        text = mutated_arguments(rng)
    else:
        text = mutated_toml(rng)
    try:
        config = parse(text) if isinstance(text, str) else parse_args(text)
        check(config, world_size=rng.choice([1, 2, 3, 8, 64]), files=rng.random() < 0.5)
    except ConfigError as e:
        if len(str(e)) > 60_000 or max(map(len, str(e).splitlines() or [""])) > 3000:
            raise AssertionError(f"a message of {len(str(e))} characters") from e
        return "refused"
    if len(config.data.sizes) == 0 or parse(dump(config)) != config:
        raise AssertionError("what was written is not what was read")
    return "accepted"


def _options() -> list[tuple[str, str]]:
    config = JobConfig()
    return [(f.name, g.name) for f in fields(config) for g in fields(getattr(config, f.name))]


OPTIONS = _options()


def mutated_toml(rng: random.Random) -> str:
    seeds = toml_seeds()
    lines = rng.choice(seeds).splitlines()
    for _ in range(rng.choice([1, 1, 2, 4])):
        way, at = rng.randrange(7), rng.randrange(len(lines) or 1)
        section, name = rng.choice(OPTIONS)
        if way == 0:
            lines[at : at + 1] = []
        elif way == 1:
            lines.insert(at, rng.choice(lines or [""]))
        elif way == 2 and lines and "=" in lines[at]:
            lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(VALUES)}"
        elif way == 3:
            lines.append(f"{section}.{name} = {rng.choice(VALUES)}")
        elif way == 4:
            lines = [f"[{section}]", f"{name} = {rng.choice(VALUES)}"]
        elif way == 5:
            lines.insert(at, f"[[{section}.{name}]]\n{rng.choice(OPTIONS)[1]} = {rng.choice(VALUES)}")
        else:
            raw = mutate("\n".join(lines).encode(), rng, [s.encode() for s in seeds])
            lines = raw.decode("utf-8", "replace").splitlines()
    return "\n".join(lines)


def mutated_arguments(rng: random.Random) -> list[str]:
    words = []
    for _ in range(rng.choice([1, 2, 3, 8])):
        section, name = rng.choice(OPTIONS)
        value = rng.choice(VALUES).strip("'")
        way = rng.randrange(8)
        full = f"--{section}.{name}"
        if way == 0:
            full = full[: rng.randrange(len(full))] + rng.choice(["", "x", "=", "--", " ", "\udcff", "é"])
        words += [f"{full}={value}"] if way < 4 else [full, value] if way < 7 else [full]
    return words


SPECIAL_TOMLS: list[Callable[[], str | list[str]]] = [
    lambda: "k" * MILLION + " = 1",
    lambda: "optimizer.l" + "r" * MILLION + " = 1",
    lambda: "[" + "k" * MILLION + "]",
    lambda: "[training]\n" + "k" * MILLION + " = 1",
    lambda: "a." * (MILLION // 2) + "b = 1",
    lambda: "[" + "a." * (MILLION // 2) + "b]",
    lambda: "x = {" + "a." * (MILLION // 2) + "b = 1}",
    lambda: "x = " + "[" * MILLION,
    lambda: "x = " + "[" * 400 + "]" * 400,
    lambda: "[data]\npath = " + "[" * 300 + "]" * 300,
    lambda: "a." * 900 + "b = 1",
    lambda: "[training]\nsteps." + "a." * 900 + "b = 1",
    lambda: "x = " + "{a=" * 300 + "1" + "}" * 300,
    lambda: "\n".join(f"k{i} = 1" for i in range(100_000)),
    lambda: "[training]\n" + "\n".join(f"k{i} = 1" for i in range(100_000)),
    lambda: "[training]\nsteps = 1" + "0" * MILLION,
    lambda: "[training]\nsteps = 0x" + "f" * MILLION,
    lambda: "[job]\ndescription = '" + "x" * MILLION + "'",
    lambda: "[data]\npath = '" + "x" * MILLION + "'",
    lambda: "[data]\npath = 'x{0..999999999999}.tar'",
    lambda: "[data]\nbuckets = [" + "[5, 64, 64], " * 20_000 + "]",
    lambda: "[training]\nsteps = '''" + "\n" * MILLION,
    lambda: ["--" + "k" * MILLION],
    lambda: ["--optimizer.lr" + "r" * MILLION, "1"],
    lambda: ["k" * MILLION],
    lambda: ["x"] * 200_000,
    lambda: ["--training.steps", "1" * MILLION],
    lambda: ["--data.buckets", "[" * MILLION],
    lambda: ["--data.buckets", "[{" + "a." * (MILLION // 2) + "b=1}]"],
    lambda: ["--data.buckets=" + "1," * MILLION],
    lambda: ["--data.path=\udcff\udcfe"],
    lambda: ["--job.config_file", "/dev/zero"],
    lambda: ["--job.config_file", "/"],
    lambda: ["--job.config_file", "a\0b"],
]


# ---- checkpoints ----


class Payload:
    """A pickle that makes a folder: the sign that something in a file was executed."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def make_checkpoint_seeds(folder: Path) -> None:
    save_steps(folder, [1, 2])


def run_checkpoint(case: Case) -> str:
    """A checkpoint with one or several of its files altered. It must not load."""
    step, rng = case.folder / "step-1", case.rng
    original = {p.name: p.read_bytes() for p in sorted((case.seeds / "step-1").iterdir())}
    other = {p.name: p.read_bytes() for p in sorted((case.seeds / "step-2").iterdir())}
    changed = dict(original)
    while changed == original:
        for _ in range(rng.choice([1, 1, 2])):
            _damage(changed, other, rng, case.outside.parent / "executed")
    _write(step, changed)
    return _load(case.folder)


def run_forged(case: Case) -> str:
    """A checkpoint whose index or state is altered and whose manifest fits, as an attacker can make it. What loads must
    be the tensors that the files hold; what does not ends in one plain line.
    """
    step, rng = case.folder / "step-1", case.rng
    shutil.copytree(case.seeds / "step-1", step)
    name = rng.choice([".metadata", "state.json", "__0_0.distcp"])
    data = (step / name).read_bytes()
    way = rng.randrange(4)
    if way == 0:
        values = [
            b"",
            b"{}",
            b"[]",
            b"null",
            DEEP.encode(),
            b'{"counters": 1}',
            b'{"counters": {"train": []}}',
            b"\xff",
        ]
        (step / name).write_bytes(rng.choice(values))
    elif way == 1 and name == ".metadata":
        (step / name).write_bytes(pickle.dumps(_forge(pickle.loads(data), rng)))
    elif way == 2:
        payload = Payload(case.outside.parent / "executed")
        (step / name).write_bytes(pickle.dumps(payload))
        if name.endswith("distcp"):
            torch.save(payload, step / name)
    else:
        (step / name).write_bytes(mutate(data, rng, [data]))
    reseal(step, 1)
    return _load(case.folder)


def _forge(metadata: Any, rng: random.Random) -> Any:
    """Sizes, places and types of tensors that are not those in the files."""
    index, info = rng.choice(list(metadata.storage_data.items()))
    number = rng.choice([-1, 0, 1, 7, 2**31, 2**40, 2**62, -(2**62)])
    way = rng.randrange(5)
    if way == 0:
        metadata.storage_data[index] = replace(info, offset=number)
    elif way == 1:
        metadata.storage_data[index] = replace(info, length=number)
    elif way == 2:
        name = rng.choice(list(metadata.state_dict_metadata))
        metadata.state_dict_metadata[name].size = torch.Size([max(0, number)])
    elif way == 3:
        name = rng.choice(list(metadata.state_dict_metadata))
        metadata.state_dict_metadata[name].chunks = rng.choice([[], None, 5])
    else:
        del metadata.storage_data[index]
    return metadata


def _damage(files: dict[str, bytes], other: dict[str, bytes], rng: random.Random, marker: Path) -> None:
    name = rng.choice(sorted(files) or ["manifest.json"])
    data, way = files.get(name, b""), rng.randrange(7)
    if way == 0:
        files.pop(name, None)
    elif way == 1:
        files[name] = data[: rng.randrange(len(data) + 1)]
    elif way == 2:
        files[name] = other.get(name, b"")
    elif way == 3:
        files[name] = pickle.dumps(Payload(marker))
    elif way == 4:
        files[f"__{rng.randrange(1, 9)}_0.distcp"] = data
    elif way == 5 and len(files) > 1:
        second = rng.choice(sorted(files))
        files[name], files[second] = files[second], files[name]
    else:
        files[name] = mutate(data, rng, [other.get(name, data)])


def _write(step: Path, files: dict[str, bytes]) -> None:
    step.mkdir()
    for name, data in files.items():
        (step / name).write_bytes(data)


def _load(folder: Path) -> str:
    weights, counter = Weights(), Counter()
    try:
        loaded = manager(folder, weights, counter).load()
    except (ValueError, RuntimeError) as e:
        if "weights_only" in str(e) or "Traceback" in str(e) or len(str(e)) > 2000:
            raise AssertionError(f"not a plain message: {str(e)[:300]}") from e
        return "refused"
    return "accepted" if loaded else "refused"


# ---- public weights ----

NUMBERS = (0, -1, 1.5, 1e9, 2**31, 2**62, float("nan"), float("inf"), True, None, "x", [], {}, [1], "../../x", "/etc")


def make_weights_seeds(folder: Path) -> None:
    """A diffusers folder of the debug model in two shards, with a VAE, as an export or a download is."""
    model = SPEC.build(ARGS)
    save_hf(model, folder / "transformer", SPEC, ARGS, torch.float32, max_shard_bytes=1 << 16)
    (folder / "vae").mkdir()
    (folder / "vae" / "config.json").write_text("{}")
    parts = {"_class_name": "WanPipeline", "transformer": ["diffusers", "T"], "vae": ["diffusers", "V"]}
    (folder / "model_index.json").write_text(json.dumps(parts))


def run_weights(case: Case) -> str:
    """A folder of weights of which one file is altered: its architecture read, its weights loaded, its other parts put
    beside an export.
    """
    rng, source = case.rng, case.folder / "source"
    shutil.copytree(case.seeds, source)
    path = rng.choice(sorted(p for p in source.rglob("*") if p.is_file() and p.parent.name != "vae"))
    data = path.read_bytes()
    if rng.random() < 0.2:
        (source / "vae" / "link").symlink_to(rng.choice([case.outside, case.outside.parent, "/", "link", "/dev/zero"]))
    elif path.suffix == ".json":
        path.write_bytes(_json(data, rng) if rng.random() < 0.7 else mutate(data, rng, [data]))
    elif rng.random() < 0.6:
        length = int.from_bytes(data[:8], "little")
        text = _json(data[8 : 8 + length], rng)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    else:
        path.write_bytes(mutate(data, rng, [data]))
    try:
        complete_pipeline(source, case.folder / "out" / "hf", "transformer")
        args = get_args(SPEC, "hf", str(source), ARGS.text_len)
        load_hf(SPEC.build(ARGS), source, SPEC, args)
    except ValueError as e:
        if len(str(e)) > 3000:
            raise AssertionError(f"a message of {len(str(e))} characters") from e
        return "refused"
    return "accepted"


def _json(data: bytes, rng: random.Random) -> bytes:
    """JSON of which one value or key, at any depth, is another; or which is nested deeply."""
    if rng.random() < 0.05:
        return DEEP.encode()
    root = json.loads(data)
    value = root
    while True:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if not isinstance(value[key], dict | list) or not value[key] or rng.random() < 0.3:
            break
        value = value[key]
    way = rng.randrange(4)
    if way == 0 and isinstance(value, dict):
        value[rng.choice(["../x", "", "k" * 10_000, "num_layers", "__metadata__"])] = value.pop(key)
    elif way == 1:
        del value[key]
    else:
        value[key] = rng.choice(NUMBERS)
    return json.dumps(root).encode()
