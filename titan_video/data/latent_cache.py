"""Latents and text embeddings on disk. Entries are keyed by content: another clip, transform, encoder or code version
is another entry.

    <folder>/shards/*.safetensors    many entries each, under the names kind/key:
        video     latents_CFHW, float32
        text      text_LD, in the encoder's dtype, unpadded
        pooled    the pooled vector of the same text, under the same key
        given     latents of a clip's conditioning frames (ingest/cache/conditioning_frames.py)
        image     their image tokens
    <folder>/manifest.jsonl          one line a shard with its entries, so that a start need not open every shard

Which of the last three kinds exist depends on the model's conditioning (models/conditioning.py).

Entries wait in memory until a shard is full or a minute old. A shard is written atomically and never changed: a writer
that is killed leaves whole shards and loses at most the entries in memory. The shards are the truth, the manifest is a
copy of their names. The header of a shard says what each entry was made from, with a checksum that every read verifies.
"""

import hashlib
import json
import os
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from titan_video.data.batching import Bucket
from titan_video.models.conditioning import TEXT_ONLY, ConditioningSpec
from titan_video.tools import heartbeat
from titan_video.tools.bounded import open_regular
from titan_video.tools.files import atomic_path

CODE_VERSION = 2  # raise it when decoding, resizing or cropping gives other pixels
FORMAT = "titan-video cache 2"
GIVEN = "given"  # kind of the latents of conditioning frames: part of names and keys in caches on disk, never to change
SHARD_BYTES, SHARD_ENTRIES, SHARD_SECONDS = 256 << 20, 4096, 60.0
HEADERS_KEPT, MANIFEST = 64, "manifest.jsonl"
SHARDS_A_FLUSH = 8  # that are listed for each one written
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What reading a damaged file can raise.
DAMAGE_ERRORS = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError)


def content_hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class LatentCache:
    """The cache in `folder` for encoders, by their identities, and for a model's conditioning. known: see `use`.

    Every key depends on everything that its entry depends on. Reading is safe in several threads.
    """

    header_guess = 8  # bytes at the beginning of a shard that are read together

    def __init__(
        self,
        folder: str | os.PathLike,
        video_id: str,
        text_id: str,
        image_id: str = "",
        conditioning: ConditioningSpec = TEXT_ONLY,
        known: Any = None,
    ):
        self.folder = Path(folder)
        self.video_id = video_id
        self.text_id = text_id
        self.image_id = image_id
        self.conditioning = conditioning
        self.shards: dict[str, int] = {}  # size in bytes
        self.where: dict[str, str] = {}  # entry -> shard
        self.waiting: dict[str, tuple[Tensor, dict[str, str]]] = {}
        self.oldest = 0.0
        self.is_shared = True  # another process may write the same entries
        self.flushes = 0  # since the folder was listed
        self._headers: OrderedDict[str, tuple[dict[str, Any], int]] = OrderedDict()
        self._headers_lock = threading.Lock()
        self.use(known)

    @property
    def identity(self) -> tuple:
        """Arguments that make this cache, in another process too."""
        return self.folder, self.video_id, self.text_id, self.image_id, self.conditioning, self.known

    # ---- keys ----

    def text_key(self, caption: str, cond_frames_id: str = "") -> str:
        """cond_frames_id: of the clip, for models whose text begins with image tokens; "": a black image."""
        if tokens := self.conditioning.text_image_tokens:
            return content_hash("text", caption, cond_frames_id, tokens, self.text_id, CODE_VERSION)
        return content_hash("text", caption, self.text_id, CODE_VERSION)

    @property
    def text_kinds(self) -> tuple[str, ...]:
        return ("text", "pooled") if self.conditioning.pooled_text else ("text",)

    def encoder(self, kind: str) -> str:
        """Identity of the encoder that makes entries of a kind."""
        if kind in ("text", "pooled"):
            return self.text_id
        return self.image_id if kind == "image" else self.video_id

    # ---- entries ----

    def has(self, kind: str, key: str) -> bool:
        """Whether the entry was there at the last `refresh`, or was written since by this object."""
        name = f"{kind}/{key}"
        return name in self.where or name in self.waiting

    def use(self, known: Any) -> None:
        """Take what is known of the folder, a mutable {entry: shard} with `shards`, {name: bytes}; None: list it."""
        self.known = known
        if known is None:
            return self.refresh()
        self.where, self.shards = known, dict(known.shards)

    def refresh(self) -> None:
        """Find what other processes have written."""
        self.flushes = 0
        listed = {} if self.shards else self._read_manifest()
        for shard in sorted(self.list_shards() - self.shards.keys()):
            size = self.shard_bytes(shard)
            names = listed.get((shard, size)) or entry_names(self.header(shard)[0])
            self.shards[shard] = size
            for name in names:
                self.where.setdefault(name, shard)

    def list_shards(self) -> set[str]:
        return {path.name for path in (self.folder / "shards").glob("*.safetensors")}

    def shard_bytes(self, shard: str) -> int:
        return (self.folder / "shards" / shard).stat().st_size

    def read_bytes(self, shard: str, first: int, last: int) -> bytearray:
        """Bytes of a shard, fewer where it ends before. OSError: it cannot be read."""
        path, data = self.folder / "shards" / shard, bytearray(last - first)
        with heartbeat.reading(path), open_regular(path) as f:
            f.seek(first)
            del data[f.readinto(data) :]
        return data

    def write(self, kind: str, key: str, tensor: Tensor, made_from: Mapping[str, str]) -> None:
        """Store one tensor of a kind. It is on disk after the next `flush`.

        made_from: what a person should find in the header, and ingest.cache.cache_keys.explain_stale compares.
        """
        data = tensor.detach().cpu().contiguous()
        self.oldest = self.oldest if self.waiting else time.monotonic()
        made = {**made_from, "encoder": self.encoder(kind), "code version": str(CODE_VERSION), "crc32": _crc32(data)}
        self.waiting[f"{kind}/{key}"] = data, made
        is_full = len(self.waiting) >= SHARD_ENTRIES or sum(t.nbytes for t, _ in self.waiting.values()) >= SHARD_BYTES
        if is_full or time.monotonic() - self.oldest > SHARD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write a shard of the waiting entries, without those that another process is known to have written.

        The folder is listed again when that costs little beside what was written since: in all, linear in the shards.
        """
        from safetensors.torch import save_file

        if not self.waiting:
            return
        self.flushes += 1
        if self.is_shared and self.flushes * SHARDS_A_FLUSH >= len(self.shards):
            self.refresh()
        fresh = {name: self.waiting[name] for name in sorted(self.waiting) if name not in self.where}
        self.waiting = {}
        if not fresh:
            return
        path = self.folder / "shards" / f"{content_hash(list(fresh))[:32]}.safetensors"
        header = {name: json.dumps(made, ensure_ascii=False, sort_keys=True) for name, (_, made) in fresh.items()}
        tensors = {name: tensor for name, (tensor, _) in fresh.items()}
        with atomic_path(path, "latent cache shard", sum(t.nbytes for t in tensors.values())) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, **header})
        self.shards[path.name] = path.stat().st_size
        self.where.update(dict.fromkeys(fresh, path.name))

    def read(self, kind: str, key: str) -> Tensor:
        """The tensor of an entry.

        ValueError: it is missing, damaged, stale or not what its name says; the message names the file.
        """
        name = f"{kind}/{key}"
        if name in self.waiting:
            return self.waiting[name][0]
        if name not in self.where:
            raise ValueError(f"{self.folder}: the cache holds no {name}; start again with the same [data] to encode it")
        path = self.folder / "shards" / self.where[name]
        try:
            header, start = self.header(path.name)
            first, last = header[name]["data_offsets"]
            if not 0 <= first <= last <= self.shards[path.name]:  # before as much memory is taken
                raise ValueError("the file is too short")
            data = self.read_bytes(path.name, start + first, start + last)
            if len(data) < last - first:
                raise ValueError("the file is too short")
            tensor = torch.frombuffer(data, dtype=DTYPES[header[name]["dtype"]]).view(header[name]["shape"])
            made = json.loads(header["__metadata__"][name])
            declared = {what: made[what] for what in ("encoder", "code version", "crc32")}
        except OSError as e:
            raise ValueError(
                f"{path}: cannot be read ({e.strerror}); start again with the same [data] to encode what it held"
            ) from e
        except DAMAGE_ERRORS as e:
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

    def header(self, shard: str) -> tuple[dict[str, Any], int]:
        """A shard's safetensors header, and the offset of its data.

        Not by `safetensors.safe_open`: it maps the file, so a file that is truncated later kills the process (SIGBUS)
        where we raise; and opening a full shard for each read costs 14 ms against 0.2 ms with a header in memory.

        ValueError: the file is damaged. OSError: there is none.
        """
        with self._headers_lock:
            if shard in self._headers:
                return self._headers[shard]
        found = self._read_header(shard)
        with self._headers_lock:
            self._headers[shard] = found
            if len(self._headers) > HEADERS_KEPT:
                self._headers.popitem(last=False)
        return found

    def _read_header(self, shard: str) -> tuple[dict[str, Any], int]:
        try:
            data = self.read_bytes(shard, 0, self.header_guess)
            length = int.from_bytes(data[:8], "little")
            if length > self.shard_bytes(shard):
                raise ValueError("its header is longer than the file")
            if len(data) < 8 + length:
                data += self.read_bytes(shard, len(data), 8 + length)
            header = json.loads(data[8 : 8 + length])
            if header["__metadata__"]["format"] != FORMAT:
                raise ValueError("it has another format")
        except DAMAGE_ERRORS as e:
            raise ValueError(
                f"{self.folder}/shards/{shard}: is no shard of a cache ({type(e).__name__}: {e}); delete this file and "
                f"start again"
            ) from e
        return header, 8 + length

    # ---- manifest ----

    def manifest_lines(self) -> Iterator[str]:
        """Raises OSError."""
        with open(self.folder / MANIFEST, encoding="utf-8") as f:
            yield from f

    def _read_manifest(self) -> dict[tuple[str, int], list[str]]:
        try:
            rows = [json.loads(line) for line in self.manifest_lines()]
            return {(row["shard"], row["bytes"]): list(map(str.strip, row["entries"])) for row in rows}
        except (OSError, *DAMAGE_ERRORS):  # missing or not ours: the shards hold the same
            return {}


def entry_names(header: Mapping[str, Any]) -> list[str]:
    return [name for name in header if name != "__metadata__"]


def _crc32(tensor: Tensor) -> str:
    data = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return f"{zlib.crc32(data, zlib.crc32(f'{tensor.dtype} {list(tensor.shape)}'.encode())):08x}"


# ---- clips, by their keys ----


@dataclass(frozen=True)
class CachedClip:
    """A clip by the keys of its entries.

    text_keys: of `captions`, with the clip's image where the text sees one. cond_key, image_key: of its conditioning
    frames and image tokens; "": none. imageless_keys: of the empty caption with the clip's image, then of `captions`
    with a black one; (): caption and image are not dropped apart.
    repeats: how often an epoch holds it. entry: the plan's entry it is made from.
    """

    video_key: str
    text_keys: tuple[str, ...]
    bucket: Bucket
    captions: tuple[str, ...]
    path: str
    cond_key: str = ""
    image_key: str = ""
    repeats: int = 1
    entry: Any = field(default=None, compare=False, repr=False)
    imageless_keys: tuple[str, ...] = ()

    @property
    def text_key(self) -> str:
        return self.text_keys[0]

    @property
    def caption(self) -> str:
        return self.captions[0]
