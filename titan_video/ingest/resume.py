"""Whether the clips of a run are those of its checkpoints: asked when they are planned, before anything is encoded."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from titan_video.checkpoint.files import InvalidCheckpoint, list_steps, read_counters, step_folder
from titan_video.config.job_config import Checkpoint, Data, Validation
from titan_video.config.manager import ConfigError, load
from titan_video.config.values import show
from titan_video.data.latent_cache import LatentCache
from titan_video.data.sampler import OTHER_CLIPS
from titan_video.ingest.clip_table import ClipTable

# Fields of [data] that change no clip.
NEUTRAL = """shuffle num_workers prefetch_factor cache_folder cache_url cache_url_gib caption_dropout
tokens_per_microbatch global_micro_batches groups_per_step decode_timeout_seconds decode_memory_gib""".split()


@dataclass(frozen=True)
class EarlierClips:
    """What this run's folder says about the clips of its checkpoints, or an empty `fingerprint`.

    report: the plan that was written then.
    """

    fingerprint: str
    folder: Path
    report: Path

    @classmethod
    def of(cls, section: Checkpoint | None, folder: Path, report: Path) -> "EarlierClips":
        return cls(_fingerprint(section, folder) if section and section.enable else "", folder, report)

    def least_held_out(self, clips: ClipTable, cache: LatentCache, data: Data, validation: Validation) -> int:
        """How many clips are held out at least: 1, and 0 where the checkpoints are of a run that held out none.

        clips: of the plan. Those of the checkpoints are the same but for some that could not be encoded. Which these
        are, the plan that was written says, and the cache, which lacks them.
        ValueError: the clips of the plan are others; the message names the options that have changed.
        """
        share = validation.holdout if validation.enable and not validation.path else 0.0
        if self.fingerprint:
            for some in self._candidates(clips, cache):
                for at_least in (1, 0):
                    if some.split(share, at_least)[0].identity() == self.fingerprint:
                        return at_least
            changed = "; ".join(self._changed(data, validation))
            raise ValueError(OTHER_CLIPS + (f". What has changed: {changed}" if changed else ""))
        return 1

    def _candidates(self, clips: ClipTable, cache: LatentCache) -> Iterator[ClipTable]:
        yield clips
        yield clips.without_paths(self._dropped())
        cache.refresh()
        yield clips.where(clips.cached(cache))

    def _dropped(self) -> set[str]:
        try:
            with open(self.report, encoding="utf-8", errors="replace") as f:
                return {row["path"] for row in map(json.loads, f) if row["reason"]}
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def _changed(self, data: Data, validation: Validation) -> Iterator[str]:
        """The options that differ from those in the folder's resolved TOML."""
        try:
            earlier = load(self.folder / "config.toml")
        except ConfigError:
            return
        names = [("data", name) for name in vars(data) if name not in NEUTRAL]
        for section, name in (*names, ("validation", "enable"), ("validation", "path"), ("validation", "holdout")):
            was, now = getattr(getattr(earlier, section), name), getattr({"data": data}.get(section, validation), name)
            if was != now:
                yield f"{section}.{name} was {show(was)}, is {show(now)}"


def _fingerprint(section: Checkpoint, folder: Path) -> str:
    """Of the clips of the newest checkpoint that says it, or of that of load_step; "" without one."""
    root = folder / section.folder
    for step in [section.load_step] if section.load_step >= 0 else reversed(list_steps(root)):
        try:
            return str(read_counters(step_folder(root, step), step)["data"]["fingerprint"])
        except (InvalidCheckpoint, KeyError, TypeError):  # of which loading says more
            continue
    return ""
