"""What encoding writes beside the entries: their keys, each of which depends on everything that its entry depends on,
and the manifest.
"""

import json
import time
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from itertools import chain, islice

from titan_video.data.latent_cache import (
    CODE_VERSION,
    DAMAGE_ERRORS,
    GIVEN,
    MANIFEST,
    LatentCache,
    content_hash,
    entry_names,
)
from titan_video.ingest.cache.entry_index import EntryIndex, listed_entries
from titan_video.ingest.plan.entries import PlanEntry
from titan_video.tools.files import atomic_path

PARTIAL_SECONDS = 600  # no write of a shard takes this long
SHARDS_EXPLAINED = 4096  # that are opened to say why entries are stale: all ranks wait meanwhile


def video_key(cache: LatentCache, content: str) -> str:
    """content: of a plan's entry."""
    return content_hash("video", content, cache.video_id, CODE_VERSION)


def cond_frames_id(entry: PlanEntry) -> str:
    """Identity of a clip's conditioning frames: what they are read from, and their size."""
    return content_hash("frames", entry.content, entry.image_sha256, CODE_VERSION)


def video_keys(cache: LatentCache, entry: PlanEntry) -> dict[str, str]:
    """{kind: key} of the entries that are made from a clip's frames."""
    keys, c = {"video": video_key(cache, entry.content)}, cache.conditioning
    frames_id = cond_frames_id(entry)
    if c.num_cond_frames:
        keys[GIVEN] = content_hash(GIVEN, frames_id, c.num_cond_frames, c.form, cache.video_id)
    if c.image_tokens:
        keys["image"] = content_hash("image", frames_id, c.num_cond_frames, cache.image_id)
    return keys


def text_keys(cache: LatentCache, entry: PlanEntry) -> tuple[str, ...]:
    """The text key of each of a clip's captions."""
    frames_id = cond_frames_id(entry) if cache.conditioning.text_image_tokens else ""
    return tuple(cache.text_key(caption, frames_id) for caption in entry.captions)


def imageless_keys(cache: LatentCache, entry: PlanEntry) -> tuple[str, ...]:
    """Text keys of a clip whose caption and image are dropped apart: of the empty caption with the clip's image, then
    of each caption with a black one.
    """
    captions = (cache.text_key(caption) for caption in entry.captions)
    return cache.text_key("", cond_frames_id(entry)), *captions


def write_manifest(cache: LatentCache) -> Counter[str]:
    """List the entries of each shard in manifest.jsonl; return the number of entries by kind.

    One process calls it, when all have written. What an index knows is taken from the manifest that is there.
    """
    index = cache.where if isinstance(cache.where, EntryIndex) else None
    named: dict[str, list[str]] = defaultdict(list)
    for name, shard in (index.fresh if index else cache.where).items():
        named[shard].append(name)
    known = index.shards if index else {}
    rows = chain(listed_entries(cache, known), ((s, named[s]) for s in sorted(cache.shards) if s not in known))
    with atomic_path(cache.folder / MANIFEST, "latent cache manifest") as temporary, open(temporary, "w") as out:
        for shard, names in rows:
            row = {"shard": shard, "bytes": cache.shards[shard], "entries": sorted(names)}
            out.write(json.dumps(row) + "\n")
        out.flush()  # before atomic_path syncs the file
    return index.counts() if index else Counter(name.partition("/")[0] for name in cache.where)


def remove_partial_shards(cache: LatentCache) -> None:
    """Delete the temporary files of writers that were killed. One process calls it, before encoding."""
    for path in cache.folder.glob("shards/.*.tmp"):
        with suppress(OSError):  # gone, or in a folder that cannot be written
            if time.time() - path.stat().st_mtime > PARTIAL_SECONDS:
                path.unlink()


def explain_stale(
    cache: LatentCache, missing: Iterable[tuple[str, Mapping[str, str]]], wanted: Container[str]
) -> Counter[str]:
    """{reason: count}: why existing entries of the same origin ("of" in made_from) cannot replace missing ones.

    Of a large cache the first shards are looked at.
    missing: (kind, made_from) of each. wanted: names of entries that this run reads, which are not stale.
    """
    missing = list(missing)
    origins = {(kind, made_from["of"]) for kind, made_from in missing}
    existing: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
    for shard in islice(cache.shards, SHARDS_EXPLAINED):
        header = cache.header(shard)[0]
        for name in entry_names(header):
            with suppress(*DAMAGE_ERRORS):  # of a damaged entry nothing is known
                made = json.loads(header["__metadata__"][name])
                origin = name.partition("/")[0], made.get("of", "")
                if origin in origins and name not in wanted:
                    existing[origin].append(made)
    reasons: Counter[str] = Counter()
    for kind, made_from in missing:
        now = {**made_from, "encoder": cache.encoder(kind), "code version": str(CODE_VERSION)}
        compared = [what for what in now if what not in ("of", "source", "captions", "given")]
        changes = [
            [f"{what} was {old.get(what)}, is {now[what]}" for what in compared if old.get(what) != now[what]]
            for old in existing.get((kind, made_from["of"]), ())
        ]
        if changes:
            reasons[f"{kind}: {', '.join(min(changes, key=len))}"] += 1
    return reasons
