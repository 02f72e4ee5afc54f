"""From a plan to the clips that training takes from the cache, and which of them are held out: as lists, for few clips.
`clip_table` has the same as a table.
"""

import math
from collections.abc import Mapping, Sequence

from titan_video.data.latent_cache import GIVEN, CachedClip, LatentCache, content_hash
from titan_video.ingest.cache.cache_keys import imageless_keys, text_keys, video_keys
from titan_video.ingest.plan.entries import Plan


def cached_clips(
    plan: Plan, cache: LatentCache, failures: Mapping[str, str] | None = None, drop_apart: bool = False
) -> list[CachedClip]:
    """The kept clips without the failures {path: reason}. Their order depends on content alone.

    drop_apart: captions and images in the text, where the model has them, are dropped independently of each other.
    """
    clips, drop_apart = [], drop_apart and cache.conditioning.text_image_tokens > 0
    for e in plan.drop(failures or {}).kept:
        keys, texts = video_keys(cache, e), text_keys(cache, e)
        clips.append(
            CachedClip(
                video_key=keys["video"],
                text_keys=texts,
                bucket=e.bucket,
                captions=e.captions,
                path=e.path,
                cond_key=keys.get(GIVEN, ""),
                image_key=keys.get("image", ""),
                repeats=e.repeats,
                entry=e,
                imageless_keys=imageless_keys(cache, e) if drop_apart else (),
            )
        )
    return sorted(clips, key=lambda c: (c.video_key, c.text_keys, c.path))


def split_holdout(
    clips: Sequence[CachedClip], share: float, at_least: int = 1
) -> tuple[list[CachedClip], list[CachedClip]]:
    """(train, held out). floor(share x clips) clips are held out, chosen by a hash of their content; with a share above
    0 no fewer than `at_least`, as long as one remains for training. Both lists keep the order of `clips`.
    """
    count = math.floor(share * len(clips) + 1e-9)
    if share > 0:
        count = max(count, min(at_least, len(clips) - 1))
    by_hash = sorted(range(len(clips)), key=lambda i: (content_hash("holdout", clips[i].video_key), i))
    held = set(by_hash[:count])
    return [c for i, c in enumerate(clips) if i not in held], [c for i, c in enumerate(clips) if i in held]
