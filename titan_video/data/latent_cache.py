"""Latents and text embeddings on disk, keyed by content, so that a change of clip, transform, encoder or code is another entry.

    <folder>/video/ab/cd/abcd....safetensors   latents_CFHW, float32
    <folder>/text/ef/01/ef01....safetensors    text_LD, the encoder's type, unpadded
    <folder>/pooled/                           the vector of the same text, under the same key
    <folder>/given/, <folder>/image/           latents and image tokens of a clip's given frames (encoders/given.py)

Which of the last three there are depends on what the model is given (flow/conditions.py).

An entry is written under a temporary name, synced and renamed: it is whole or not there, whatever is killed when. What it was made from
stands in its header, with a checksum that every read verifies.
"""

import hashlib
import json
import math
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from titan_video.data.bucket import Bucket
from titan_video.data.dataset import Plan, PlanEntry, read_frames
from titan_video.data.video import UnusableClip, read_image
from titan_video.encoders.given import encode_given, encode_images
from titan_video.encoders.spec import Encoders
from titan_video.flow.conditions import TEXT_ONLY, Conditions

CODE_VERSION = 2  # raise it when decoding, resizing or cropping gives other pixels
TEXTS_AT_ONCE = 8
LOG_EVERY = 15.0  # seconds
BLACK = (336, 336)  # the image of a text without one


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class LatentCache:
    """The cache in `folder` for encoders, given by their identities, and for what a model is given. Every key depends on what its entry does."""

    def __init__(self, folder: str | os.PathLike, video_id: str, text_id: str, image_id: str = "", conditions: Conditions = TEXT_ONLY):
        self.folder, self.video_id, self.text_id, self.image_id, self.conditions = Path(folder), video_id, text_id, image_id, conditions

    def video_key(self, content: str) -> str:
        """content: of a plan's entry."""
        return _hash("video", content, self.video_id, CODE_VERSION)

    def text_key(self, caption: str, given: str = "") -> str:
        """given: identity of the given frames (`given_frames`), for models whose text begins with image tokens; "": a black image."""
        if tokens := self.conditions.text_image_tokens:
            return _hash("text", caption, given, tokens, self.text_id, CODE_VERSION)
        return _hash("text", caption, self.text_id, CODE_VERSION)

    def given_frames(self, entry: PlanEntry) -> str:
        """Identity of a clip's given frames: what they are read from and their size."""
        return _hash("frames", entry.content, entry.image_sha256, CODE_VERSION)

    def video_keys(self, entry: PlanEntry) -> dict[str, str]:
        """{kind: key} of the entries that are made of a clip's frames."""
        keys, c = {"video": self.video_key(entry.content)}, self.conditions
        if c.num_given:
            keys["given"] = _hash("given", self.given_frames(entry), c.num_given, c.form, self.video_id)
        if c.image_tokens:
            keys["image"] = _hash("image", self.given_frames(entry), c.num_given, self.image_id)
        return keys

    def clip_text_key(self, entry: PlanEntry) -> str:
        return self.text_key(entry.caption, self.given_frames(entry) if self.conditions.text_image_tokens else "")

    @property
    def text_kinds(self) -> tuple[str, ...]:
        return ("text", "pooled") if self.conditions.pooled_text else ("text",)

    def path(self, kind: str, key: str) -> Path:
        return self.folder / kind / key[:2] / key[2:4] / f"{key}.safetensors"

    def has(self, kind: str, key: str) -> bool:
        return self.path(kind, key).is_file()

    def write(self, kind: str, key: str, tensor: Tensor, made_from: Mapping[str, str]) -> None:
        """Store one tensor of a kind. made_from: what a person should find in the header (source, caption)."""
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
        return {"video": self.video_id, "given": self.video_id, "text": self.text_id, "pooled": self.text_id, "image": self.image_id}[kind]


def _crc32(tensor: Tensor) -> str:
    return f"{zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy()):08x}"


@dataclass(frozen=True)
class CachedClip:
    """A clip whose latents and caption are in the cache. given_key, image_key: of what the model is given of it; "": nothing.
    repeats: how often an epoch holds it."""

    video_key: str
    text_key: str
    bucket: Bucket
    caption: str
    path: str
    given_key: str = ""
    image_key: str = ""
    repeats: int = 1


def cached_clips(plan: Plan, cache: LatentCache, failures: Mapping[str, str] | None = None) -> list[CachedClip]:
    """The kept clips without the failures {path: reason}, ordered by content: not by folder, file name or machine."""
    clips = []
    for e in plan.drop(failures or {}).kept:
        keys = cache.video_keys(e)
        text_key = cache.clip_text_key(e)
        clips.append(CachedClip(keys["video"], text_key, e.bucket, e.caption, e.path, keys.get("given", ""), keys.get("image", ""), e.repeats))
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


def given_frames(e: PlanEntry, num_given: int, frames_CFHW: Tensor | None = None) -> Tensor:
    """The frames that a model is given of a clip, uint8 [3, N, H, W]: its first or its image, and its last. frames: the clip, if decoded already."""
    if frames_CFHW is None:
        frames_CFHW = read_frames(e, first_only=num_given == 1)
    first = read_image(e.image, e.bucket) if e.image else frames_CFHW[:, :1]
    return torch.cat([first, frames_CFHW[:, -1:]], dim=1) if num_given == 2 else first


class _Frames:
    """Decoded clips with their given frames, or the reason why one cannot be decoded, by index."""

    def __init__(self, entries: list[PlanEntry], num_given: int):
        self.entries, self.num_given = entries, num_given

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor | None] | str:
        e = self.entries[index]
        try:
            frames_CFHW = read_frames(e)
            return frames_CFHW, given_frames(e, self.num_given, frames_CFHW) if self.num_given else None
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
    failed = _encode_texts(plan, encoders, cache, rank, world_size, log, prompts)
    failed |= _encode_videos(plan, encoders, cache, rank, world_size, num_workers, log)
    return failed


def _missing(cache: LatentCache, kinds: Iterable[str], key: str) -> bool:
    return not all(cache.has(kind, key) for kind in kinds)


@torch.no_grad()
def _encode_texts(
    plan: Plan, encoders: Encoders, cache: LatentCache, rank: int, world_size: int, log: Callable[[str], None], prompts: Sequence[str]
) -> dict[str, str]:
    texts: dict[str, tuple[str, PlanEntry | None]] = {cache.text_key(text): (text, None) for text in ["", *prompts]}
    texts |= {cache.clip_text_key(e): (e.caption, e) for e in plan.kept}
    mine = [key for key in sorted(texts)[rank::world_size] if _missing(cache, cache.text_kinds, key)]
    batches = [mine[i : i + TEXTS_AT_ONCE] for i in range(0, len(mine), TEXTS_AT_ONCE)]
    failed: dict[str, str] = {}
    image_tokens = cache.conditions.text_image_tokens
    for keys in _progress(batches, f"batches of {TEXTS_AT_ONCE} captions", log):
        images: dict[str, Tensor] = {}
        for key in keys if image_tokens else ():
            entry = texts[key][1]
            try:
                images[key] = torch.zeros(3, *BLACK, dtype=torch.uint8) if entry is None else given_frames(entry, 1)[:, 0]
            except UnusableClip as error:
                failed[key] = str(error)
        keys = [key for key in keys if key not in failed]
        captions = [texts[key][0] for key in keys]
        options = {"images": [images[key] for key in keys], "image_tokens": image_tokens} if image_tokens else {}
        made = {"text": encoders.encode_text(captions, **options)}
        if cache.conditions.pooled_text:
            made["pooled"] = encoders.encode_pooled(captions)
        for kind, tensors in made.items():
            for key, caption, tensor in zip(keys, captions, tensors, strict=True):
                cache.write(kind, key, tensor, {"caption": caption})
    if mine:
        encoders.free()  # the text encoder is the larger half
    return {e.path: failed[key] for e in plan.kept if (key := cache.clip_text_key(e)) in failed}


@torch.no_grad()
def _encode_videos(
    plan: Plan, encoders: Encoders, cache: LatentCache, rank: int, world_size: int, num_workers: int, log: Callable[[str], None]
) -> dict[str, str]:
    clips = {tuple(cache.video_keys(e).items()): e for e in plan.kept}  # copies of a file share their keys
    jobs = [job for job in sorted(clips)[rank::world_size] if any(not cache.has(kind, key) for kind, key in job)]
    workers = {"num_workers": min(num_workers, len(jobs)), "worker_init_fn": leave_process_group}
    loader = DataLoader(_Frames([clips[job] for job in jobs], cache.conditions.num_given), batch_size=None, **workers)
    failed: dict[tuple, str] = {}
    frames = iter(loader)
    for job in _progress(jobs, "clips", log):
        decoded, entry = next(frames), clips[job]
        if isinstance(decoded, str):
            failed[job] = decoded
            continue
        frames_CFHW, given_CNHW = decoded
        make = {
            "video": lambda: encoders.encode_video(frames_CFHW[None])[0].float(),
            "given": lambda: encode_given(encoders, cache.conditions, given_CNHW, frames_CFHW.shape[1]),
            "image": lambda: encode_images(encoders, given_CNHW),
        }
        for kind, key in job:
            if cache.has(kind, key):
                continue
            tensor = make[kind]()
            if not tensor.isfinite().all():
                failed[job] = "not finite: the encoder gave NaN or infinity for this clip"
                break
            cache.write(kind, key, tensor, {"source": entry.path, "given": entry.image, "caption": entry.caption, "fps": str(entry.fps)})
    named = ((e.path, tuple(cache.video_keys(e).items())) for e in plan.kept)
    return {path: failed[job] for path, job in named if job in failed}
