"""Latents and text embeddings on disk, keyed by content, so that a change of clip, transform, encoder or code is another entry.

    <folder>/video/ab/cd/abcd....safetensors   latents_CFHW, float32
    <folder>/text/ef/01/ef01....safetensors    text_LD, the encoder's type, unpadded

An entry is written under a temporary name, synced and renamed: it is whole or not there, whatever is killed when. What it was made from
stands in its header, with a checksum that every read verifies.
"""

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from titan_video.data.bucket import Bucket
from titan_video.data.dataset import Plan, PlanEntry
from titan_video.data.video import UnusableClip, decode
from titan_video.encoders.spec import Encoders

CODE_VERSION = 1  # raise it when decoding, resizing or cropping gives other pixels
CLIP_MODE = "head"
TEXTS_AT_ONCE = 8
LOG_EVERY = 15.0  # seconds


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class LatentCache:
    """The cache in `folder` for one pair of encoders, given by their identities."""

    def __init__(self, folder: str | os.PathLike, video_id: str, text_id: str):
        self.folder, self.video_id, self.text_id = Path(folder), video_id, text_id

    def video_key(self, file_sha256: str, bucket: Bucket, fps: float) -> str:
        return _hash("video", file_sha256, float(fps), list(bucket), CLIP_MODE, self.video_id, CODE_VERSION)

    def text_key(self, caption: str) -> str:
        return _hash("text", caption, self.text_id, CODE_VERSION)

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / key[2:4] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        return self.path(kind, key).is_file()

    def write(self, kind: str, key: str, tensor: Tensor, made_from: Mapping[str, str]) -> None:
        """Store one tensor of `kind` "video" or "text". made_from: what a person should find in the header (source, caption)."""
        from safetensors.torch import save

        data = tensor.detach().cpu().contiguous()
        identity = {"format": "titan-video cache 1", "kind": kind, "key": key, "encoder": self._encoder(kind), "code_version": str(CODE_VERSION)}
        header = {**made_from, **identity, "shape": json.dumps(list(data.shape)), "crc32": _crc32(data)}
        path = self.path(kind, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as f:
                f.write(save({kind: data}, metadata=header))
                f.flush()
                os.fsync(f.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def read(self, kind: str, key: str) -> Tensor:
        """The tensor of an entry. Raises ValueError, naming the file, when it is missing, damaged or not what its name says."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path(kind, key)
        try:
            raw = path.read_bytes()
        except OSError as e:
            raise ValueError(f"{path}: cannot be read ({e.strerror}); start again with the same data.path to encode it anew") from e
        try:
            header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
            tensor = load(raw)[kind]
            stated = (header["kind"], header["key"], header["encoder"], header["shape"], header["crc32"])
        except (ValueError, KeyError, TypeError, OverflowError, SafetensorError) as e:
            raise ValueError(f"{path}: damaged cache entry ({type(e).__name__}); delete this file and start again") from e
        if stated != (kind, key, self._encoder(kind), json.dumps(list(tensor.shape)), _crc32(tensor)):
            raise ValueError(f"{path}: the content of this cache entry does not match its header; delete this file and start again")
        return tensor

    def _encoder(self, kind: str) -> str:
        return self.video_id if kind == "video" else self.text_id


def _crc32(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy()):08x}"


@dataclass(frozen=True)
class CachedClip:
    """A clip whose latents and caption are in the cache."""

    video_key: str
    text_key: str
    bucket: Bucket
    caption: str
    path: str


def cached_clips(plan: Plan, cache: LatentCache, failures: Mapping[str, str] | None = None) -> list[CachedClip]:
    """The kept clips without the failures {path: reason}, ordered by content: not by folder, file name or machine."""
    clips = [CachedClip(cache.video_key(e.sha256, e.bucket, plan.fps), cache.text_key(e.caption), e.bucket, e.caption, e.path)
             for e in plan.drop(failures or {}).kept]  # fmt: skip
    return sorted(clips, key=lambda c: (c.video_key, c.text_key, c.path))


def split_holdout(clips: Sequence[CachedClip], share: float) -> tuple[list[CachedClip], list[CachedClip]]:
    """(train, held out): floor(share x clips) are held out, chosen by a hash of their content, both in the order given."""
    count = math.floor(share * len(clips) + 1e-9)
    by_hash = sorted(range(len(clips)), key=lambda i: (_hash("holdout", clips[i].video_key), i))
    held = set(by_hash[:count])
    return [c for i, c in enumerate(clips) if i not in held], [c for i, c in enumerate(clips) if i in held]


# ---- filling the cache ----


def leave_process_group(worker: int) -> None:
    """For DataLoader workers. Schedulers signal whole process groups; a worker that died of it would take down the trainer before it could save."""
    os.setpgid(0, 0)


class _Frames:
    """Decoded clips, or the reason why one cannot be decoded, by index."""

    def __init__(self, entries: list[PlanEntry]):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Tensor | str:
        e = self.entries[index]
        try:
            return decode(e.path, e.pts, e.width, e.height, e.bucket)
        except UnusableClip as error:
            return str(error)


def _progress(items: Sequence, what: str, log: Callable[[str], None]) -> Iterator:
    started = last = time.monotonic()
    for done, item in enumerate(items):
        yield item
        if time.monotonic() - last > LOG_EVERY:
            last = time.monotonic()
            log(f"encoded {done + 1} of {len(items)} {what}, {(last - started) / (done + 1) * (len(items) - done - 1):.0f} s to go")
    if len(items):
        log(f"encoded {len(items)} {what} in {time.monotonic() - started:.1f} s")


def encode_missing(
    plan: Plan, encoders: Encoders, cache: LatentCache, rank: int = 0, world_size: int = 1, num_workers: int = 0, log: Callable[[str], None] = print,
    prompts: Sequence[str] = (),
) -> dict[str, str]:  # fmt: skip
    """Encode this rank's share of what the cache lacks, captions (with the empty one and `prompts`) and clips; return its failures {path: reason}.

    A share depends on the plan alone, so ranks never meet. Killed and started again, it goes on where it stopped.
    """
    captions = {cache.text_key(text): text for text in ["", *prompts, *(e.caption for e in plan.kept)]}
    mine = [key for key in sorted(captions)[rank::world_size] if not cache.has("text", key)]
    batches = [mine[i : i + TEXTS_AT_ONCE] for i in range(0, len(mine), TEXTS_AT_ONCE)]
    with torch.no_grad():
        for keys in _progress(batches, f"batches of {TEXTS_AT_ONCE} captions", log):
            for key, text_LD in zip(keys, encoders.encode_text([captions[k] for k in keys]), strict=True):
                cache.write("text", key, text_LD, {"caption": captions[key]})
        if mine:
            encoders.free()  # the text encoder is the larger half
        failures = _encode_videos(plan, encoders, cache, rank, world_size, num_workers, log)
    return failures


def _encode_videos(
    plan: Plan, encoders: Encoders, cache: LatentCache, rank: int, world_size: int, num_workers: int, log: Callable[[str], None]
) -> dict[str, str]:
    clips = {cache.video_key(e.sha256, e.bucket, plan.fps): e for e in plan.kept}
    keys = [key for key in sorted(clips)[rank::world_size] if not cache.has("video", key)]
    workers = {"num_workers": min(num_workers, len(keys)), "worker_init_fn": leave_process_group}
    loader = DataLoader(_Frames([clips[k] for k in keys]), batch_size=None, **workers)
    failed: dict[str, str] = {}
    frames = iter(loader)
    for key in _progress(keys, "clips", log):
        frames_CFHW, entry = next(frames), clips[key]
        if isinstance(frames_CFHW, str):
            failed[key] = frames_CFHW
            continue
        latents_CFHW = encoders.encode_video(frames_CFHW[None])[0].float()
        if not latents_CFHW.isfinite().all():
            failed[key] = "not finite: the encoder gave NaN or infinity for this clip"
            continue
        cache.write("video", key, latents_CFHW, {"source": entry.path, "caption": entry.caption, "fps": str(plan.fps)})
    named = ((e.path, cache.video_key(e.sha256, e.bucket, plan.fps)) for e in plan.kept)  # copies of a file share a key
    return {path: failed[key] for path, key in named if key in failed}
