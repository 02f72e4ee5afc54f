"""Which clips a run goes on with: those of its checkpoints. Asked when they are planned, before anything is encoded."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titan_video.checkpoint.files import InvalidCheckpoint, list_steps, read_counters, step_folder
from titan_video.config.job_config import Checkpoint, Data, Validation
from titan_video.config.manager import ConfigError, load
from titan_video.config.values import show
from titan_video.data.latent_cache import LatentCache
from titan_video.data.sampler import OTHER_CLIPS
from titan_video.ingest.cache.clip_table import ClipTable
from titan_video.ingest.plan.plan_table import TEXTS, PlanTable
from titan_video.ingest.plan.probes import PASSING
from titan_video.tools.logging import logger

# Fields of [data] that change no clip.
NEUTRAL = """shuffle num_workers prefetch_factor cache_folder cache_url cache_url_gib caption_dropout
tokens_per_microbatch global_micro_batches groups_per_step decode_timeout_seconds decode_memory_gib""".split()


Before = Callable[[], ClipTable | None]


class Matched(NamedTuple):
    """clips: that train and are held out. at_least: how many are held out at least: 1, and 0 where the checkpoints are
    of a run that held out none. left_out: paths of the plan's other clips.
    """

    clips: ClipTable
    at_least: int = 1
    left_out: frozenset[str] = frozenset()


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

    def matched(
        self, clips: ClipTable, cache: LatentCache, data: Data, validation: Validation, before: Before = lambda: None
    ) -> "Matched":
        """The clips of the checkpoints; those of the plan where there is no checkpoint.

        clips: of the plan. Those of the checkpoints are the same but for some that could not be read or encoded then,
        or cannot be read now, as shares and networks fail in passing. Which these are, the plan that was written then
        says, and the cache, which lacks them. before: makes the clips of that plan, if it is there.
        ValueError: the clips of the plan are others; the message names the options that have changed.
        """
        if not self.fingerprint:
            return Matched(clips)
        share = validation.holdout if validation.enable and not validation.path else 0.0
        for some, left_out in self._candidates(clips, cache, before):
            for at_least in (1, 0):
                if some.split(share, at_least)[0].identity() == self.fingerprint:
                    return Matched(some, at_least, left_out)
        changed = "; ".join(self._changed(data, validation))
        lines = [f"What has changed: {changed}"] if changed else []
        if failing := _failing(clips.plan):
            lines.append(f"{_first(failing)}, which may pass: start again when they can be read")
        raise ValueError(". ".join([OTHER_CLIPS, *lines]))

    def _candidates(
        self, clips: ClipTable, cache: LatentCache, before: Before
    ) -> Iterator[tuple[ClipTable, frozenset[str]]]:
        """Clips, and the paths of those of the plan that are left out. A file has all its clips or none."""
        yield clips, frozenset()
        yield self._without_dropped(clips)
        cache.refresh()
        yield _without(clips, clips.selected()[~clips.cached(cache)])
        failing = _failing(clips.plan)
        if failing and (earlier := before()) is not None and _are_those_before(clips, failing, earlier):
            logger.warning(f"{_first(failing)}; all clips are taken as this run has planned them")
            yield earlier, frozenset()
            yield self._without_dropped(earlier)

    def _without_dropped(self, clips: ClipTable) -> tuple[ClipTable, frozenset[str]]:
        dropped, rows = self._dropped(), clips.selected()
        return _without(clips, rows[[clips.path(int(row)) in dropped for row in rows]] if dropped else rows[:0])

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


def _without(clips: ClipTable, rows: np.ndarray) -> tuple[ClipTable, frozenset[str]]:
    """Without the files of these rows."""
    left_out = frozenset(clips.path(int(row)) for row in rows)
    return clips.without_paths(left_out), left_out


class _Failing(NamedTuple):
    """A clip that the plan has dropped for a reason which may pass. captions: none where these cannot be read."""

    path: str
    captions: tuple[str, ...]
    reason: str


def _failing(plan: PlanTable) -> list[_Failing]:
    dropped = (dict(zip(TEXTS, plan.texts(int(row)), strict=True)) for row in np.flatnonzero(~plan.columns["kept"]))
    return [
        _Failing(row["path"], tuple(row["captions"]), row["reason"])
        for row in dropped
        if row["reason"].startswith(PASSING)
    ]


def _are_those_before(clips: ClipTable, failing: Sequence[_Failing], earlier: ClipTable) -> bool:
    """Whether an earlier plan has these clips, and of the files that fail now clips of the same captions."""
    captions: dict[str, set[tuple[str, ...]]] = {found.path: set() for found in failing}
    for row in earlier.columns["entry"].tolist():
        texts = dict(zip(TEXTS, earlier.plan.texts(row), strict=True))
        if texts["path"] in captions:
            captions[texts["path"]].add(tuple(texts["captions"]))
    had = all(captions[f.path] and (not f.captions or f.captions in captions[f.path]) for f in failing)
    return had and earlier.without_paths(captions).identity() == clips.identity()


def _first(failing: Sequence[_Failing]) -> str:
    return f"{len(failing)} clips cannot be looked at now, such as {failing[0].path} ({failing[0].reason})"
