"""Latents and text embeddings on disk, keyed by content, so that a change of clip, transform, encoder or code is
another entry.

    <folder>/shards/*.safetensors    many entries each, under the names kind/key:
        video     latents_CFHW, float32
        text      text_LD, the encoder's type, unpadded
        pooled    the vector of the same text, under the same key
        given     latents of a clip's given frames, image: their image tokens (ingest/conditioning_frames.py)
    <folder>/manifest.jsonl          a line for each shard with what it holds, so that a start need not open them all

Which of the last three kinds there are depends on what the model is given (models/conditioning.py).

What is written waits in memory until a shard is full or a minute old. A shard is written under a temporary name,
synced, renamed and never
changed: killed at any moment, a writer leaves whole entries and loses at most those that waited. The shards are the
truth, the manifest a copy of their names. What an entry was made from stands in its shard's header, with a checksum
that every read verifies.
"""

import hashlib
import json
import os
import time
import zlib
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.models.conditioning import TEXT_ONLY, ConditioningSpec

CODE_VERSION = 2  # raise it when decoding, resizing or cropping gives other pixels
FORMAT = "titan-video cache 2"
SHARD_BYTES, SHARD_ENTRIES, SHARD_SECONDS = 256 << 20, 4096, 60.0
HEADERS_KEPT = 64
LEFTOVER_SECONDS = 600  # no write of a shard takes so long
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
DAMAGES = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RuntimeError,
)  # what a damaged file makes of its reader


def content_hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class ClipContent(Protocol):
    """What keys are made of: the identity of a clip's pixels and of its own first frame ("": none), and its captions."""

    content: str
    image_sha256: str
    captions: tuple[str, ...]


class LatentCache:
    """The cache in `folder` for encoders, given by their identities, and for what a model is given.

    Every key depends on what its entry does.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        video_id: str,
        text_id: str,
        image_id: str = "",
        conditioning: ConditioningSpec = TEXT_ONLY,
    ):
        self.folder, self.video_id, self.text_id, self.image_id, self.conditioning = (
            Path(folder),
            video_id,
            text_id,
            image_id,
            conditioning,
        )
        self.shards: dict[str, int] = {}  # size in bytes
        self.where: dict[str, str] = {}  # entry -> shard
        self.waiting: dict[str, tuple[Tensor, dict[str, str]]] = {}
        self.oldest = 0.0
        self._headers: OrderedDict[str, tuple[dict[str, Any], int]] = OrderedDict()
        self.refresh()

    @property
    def identity(self) -> tuple:
        """Arguments that make this cache."""
        return self.folder, self.video_id, self.text_id, self.image_id, self.conditioning

    # ---- keys ----

    def video_key(self, content: str) -> str:
        """content: of a plan's entry."""
        return content_hash("video", content, self.video_id, CODE_VERSION)

    def text_key(self, caption: str, given: str = "") -> str:
        """given: identity of the given frames (`given_frames`), for models whose text begins with image tokens; "":

        a black image.
        """
        if tokens := self.conditioning.text_image_tokens:
            return content_hash("text", caption, given, tokens, self.text_id, CODE_VERSION)
        return content_hash("text", caption, self.text_id, CODE_VERSION)

    def given_frames(self, entry: ClipContent) -> str:
        """Identity of a clip's given frames: what they are read from and their size."""
        return content_hash("frames", entry.content, entry.image_sha256, CODE_VERSION)

    def video_keys(self, entry: ClipContent) -> dict[str, str]:
        """{kind: key} of the entries that are made of a clip's frames."""
        keys, c = {"video": self.video_key(entry.content)}, self.conditioning
        if c.num_cond_frames:
            keys["given"] = content_hash("given", self.given_frames(entry), c.num_cond_frames, c.form, self.video_id)
        if c.image_tokens:
            keys["image"] = content_hash("image", self.given_frames(entry), c.num_cond_frames, self.image_id)
        return keys

    def clip_text_keys(self, entry: ClipContent) -> tuple[str, ...]:
        """Of each of a clip's captions."""
        given = self.given_frames(entry) if self.conditioning.text_image_tokens else ""
        return tuple(self.text_key(caption, given) for caption in entry.captions)

    @property
    def text_kinds(self) -> tuple[str, ...]:
        return ("text", "pooled") if self.conditioning.pooled_text else ("text",)

    def encoder(self, kind: str) -> str:
        """Identity of the encoder that makes entries of a kind."""
        return {
            "video": self.video_id,
            "given": self.video_id,
            "text": self.text_id,
            "pooled": self.text_id,
            "image": self.image_id,
        }[kind]

    # ---- entries ----

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry was there at the last `refresh`, or was written since by this object."""
        name = f"{kind}/{key}"
        return name in self.where or name in self.waiting

    def refresh(self) -> None:
        """Find what others have written."""
        listed = {} if self.shards else self._read_manifest()
        for path in sorted((self.folder / "shards").glob("*.safetensors")):
            if path.name in self.shards:
                continue
            size = path.stat().st_size
            names = listed.get((path.name, size)) or [
                name for name in self._header(path.name)[0] if name != "__metadata__"
            ]
            self.shards[path.name] = size
            for name in names:
                self.where.setdefault(name, path.name)

    def write(self, kind: str, key: str, tensor: Tensor, made_from: Mapping[str, str]) -> None:
        """Store one tensor of a kind; `flush` makes it last. made_from:

        what a person should find in the header, and `explain` compares.
        """
        data = tensor.detach().cpu().contiguous()
        self.oldest = self.oldest if self.waiting else time.monotonic()
        made = {**made_from, "encoder": self.encoder(kind), "code version": str(CODE_VERSION), "crc32": _crc32(data)}
        self.waiting[f"{kind}/{key}"] = data, made
        is_full = len(self.waiting) >= SHARD_ENTRIES or sum(t.nbytes for t, _ in self.waiting.values()) >= SHARD_BYTES
        if is_full or time.monotonic() - self.oldest > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write the shard of what waits, but for what another process has written meanwhile."""
        from safetensors.torch import save

        if not self.waiting:
            return
        self.refresh()
        fresh = {name: self.waiting[name] for name in sorted(self.waiting) if name not in self.where}
        self.waiting = {}
        if not fresh:
            return
        path = self.folder / "shards" / f"{content_hash(list(fresh))[:32]}.safetensors"
        header = {name: json.dumps(made, ensure_ascii=False, sort_keys=True) for name, (_, made) in fresh.items()}
        _write_whole(
            path, save({name: tensor for name, (tensor, _) in fresh.items()}, metadata={"format": FORMAT, **header})
        )
        self.shards[path.name] = path.stat().st_size
        self.where.update(dict.fromkeys(fresh, path.name))

    def read(self, kind: str, key: str) -> Tensor:
        """The tensor of an entry.

        Raises ValueError, naming the file, when it is missing, damaged, stale or not what its name says.
        """
        name = f"{kind}/{key}"
        if name in self.waiting:
            return self.waiting[name][0]
        if name not in self.where:
            raise ValueError(f"{self.folder}: the cache holds no {name}; start again with the same [data] to encode it")
        path = self.folder / "shards" / self.where[name]
        try:
            header, start = self._header(path.name)
            first, last = header[name]["data_offsets"]
            with open(path, "rb") as f:
                f.seek(start + first)
                raw = f.read(last - first)
            tensor = torch.frombuffer(bytearray(raw), dtype=DTYPES[header[name]["dtype"]]).view(header[name]["shape"])
            made = json.loads(header["__metadata__"][name])
            declared = {what: made[what] for what in ("encoder", "code version", "crc32")}
        except OSError as e:
            raise ValueError(
                f"{path}: cannot be read ({e.strerror}); start again with the same [data] to encode what it held"
            ) from e
        except DAMAGES as e:
            raise ValueError(f"{path}: {name} is damaged ({type(e).__name__}); delete this file and start again") from e
        if declared["crc32"] != _crc32(tensor):
            raise ValueError(f"{path}: {name} is damaged (its checksum differs); delete this file and start again")
        for what, now in (("encoder", self.encoder(kind)), ("code version", str(CODE_VERSION))):
            if declared[what] != now:
                raise ValueError(
                    f"{path}: {name} is stale: its {what} was {declared[what]}, is {now}; delete this file and "
                    f"start again"
                )
        return tensor

    def _header(self, shard: str) -> tuple[dict[str, Any], int]:
        """A shard's safetensors header, and where its data begins.

        Raises ValueError for a damaged file, OSError for none.
        """
        if shard not in self._headers:
            path = self.folder / "shards" / shard
            try:
                with open(path, "rb") as f:
                    length = int.from_bytes(f.read(8), "little")
                    if length > path.stat().st_size:
                        raise ValueError("its header is longer than the file")
                    header = json.loads(f.read(length))
                if header["__metadata__"]["format"] != FORMAT:
                    raise ValueError("it has another format")
            except DAMAGES as e:
                raise ValueError(
                    f"{path}: is no shard of a cache ({type(e).__name__}: {e}); delete this file and start again"
                ) from e
            self._headers[shard] = header, 8 + length
            if len(self._headers) > HEADERS_KEPT:
                self._headers.popitem(last=False)
        return self._headers[shard]

    # ---- manifest, leftovers, what is stale ----

    def write_manifest(self) -> Counter[str]:
        """Write what each shard holds; return the number of entries by kind. For one process, when all have written."""
        names: dict[str, list[str]] = defaultdict(list)
        for name, shard in self.where.items():
            names[shard].append(name)
        rows = [
            {"shard": shard, "bytes": self.shards[shard], "entries": sorted(names[shard])}
            for shard in sorted(self.shards)
        ]
        _write_whole(self.folder / "manifest.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        return Counter(name.partition("/")[0] for name in self.where)

    def _read_manifest(self) -> dict[tuple[str, int], list[str]]:
        try:
            rows = [json.loads(line) for line in (self.folder / "manifest.jsonl").read_text().splitlines()]
            return {(row["shard"], row["bytes"]): row["entries"] for row in rows}
        except (OSError, *DAMAGES):  # none, or not ours: the shards tell the same
            return {}

    def remove_leftovers(self) -> None:
        """Delete what writers that were killed have left. For one process, before encoding."""
        for path in self.folder.glob("shards/.*.tmp"):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink(missing_ok=True)

    def explain(self, missing: Iterable[tuple[str, Mapping[str, str]]], wanted: Container[str]) -> Counter[str]:
        """Why what is there of the same origin ("of" in made_from) cannot serve for these, (kind, made_from): {reason:
        how many}.

        wanted: entries that are in use, so not stale.
        """
        there: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        for shard in self.shards:
            header = self._header(shard)[0]
            for name in (name for name in header if name != "__metadata__" and name not in wanted):
                made = json.loads(header["__metadata__"][name])
                there[name.partition("/")[0], made.get("of", "")].append(made)
        reasons: Counter[str] = Counter()
        for kind, made_from in missing:
            now = {**made_from, "encoder": self.encoder(kind), "code version": str(CODE_VERSION)}
            compared = [what for what in now if what not in ("of", "source", "captions", "given")]
            changes = [
                [f"{what} was {old.get(what)}, is {now[what]}" for what in compared if old.get(what) != now[what]]
                for old in there.get((kind, made_from["of"]), ())
            ]
            if changes:
                reasons[f"{kind}: {', '.join(min(changes, key=len))}"] += 1
        return reasons


def _crc32(tensor: Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return f"{zlib.crc32(data, zlib.crc32(f'{tensor.dtype} {list(tensor.shape)}'.encode())):08x}"


def _write_whole(path: Path, data: bytes) -> None:
    """The file appears whole, and lasts, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


# ---- clips, by their keys ----


@dataclass(frozen=True)
class CachedClip:
    """A clip by the keys of its entries. given_key, image_key: of what the model is given of it; "": nothing.
    text_keys: of `captions`.
    repeats: how often an epoch holds it. entry: what it is made of."""

    video_key: str
    text_keys: tuple[str, ...]
    bucket: Bucket
    captions: tuple[str, ...]
    path: str
    given_key: str = ""
    image_key: str = ""
    repeats: int = 1
    entry: Any = field(default=None, compare=False, repr=False)

    @property
    def text_key(self) -> str:
        return self.text_keys[0]

    @property
    def caption(self) -> str:
        return self.captions[0]
