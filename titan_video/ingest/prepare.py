"""Planning the clips of a run and filling the latent cache with all ranks, for train.py and
`python -m titan_video.data encode`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from titan_video.config.job_config import JobConfig, Validation
from titan_video.data.latent_cache import CachedClip, LatentCache
from titan_video.data.loader import ClipsByBucket, LatentLoader
from titan_video.data.sampler import GlobalSampler
from titan_video.distributed.utils import broadcast_from_rank0, gather_objects
from titan_video.encoders.spec import Encoders
from titan_video.ingest.cache.cache_keys import remove_partial_shards
from titan_video.ingest.cache.clip_table import ClipTable, clip_table
from titan_video.ingest.cache.encode import encode_share, failed_clips, missing_jobs
from titan_video.ingest.cache.encode_table import encode_table, share_index
from titan_video.ingest.cache.entry_index import EntryIndex, NotListed, make_index
from titan_video.ingest.files.text import read_prompts
from titan_video.ingest.plan.build import Planner
from titan_video.ingest.plan.captions import cut_captions, cut_prompts
from titan_video.ingest.plan.entries import Plan
from titan_video.ingest.plan.plan_table import PlanTable
from titan_video.ingest.plan.planned import ALL, Part, Tables, plan_on_ranks, reported_plan, write_report
from titan_video.ingest.resume import EarlierClips
from titan_video.ingest.sampling_defaults import sampling_section
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.spec import LatentGeometry
from titan_video.tools.logging import logger
from titan_video.tools.parts import resolve
from titan_video.tools.signals import Stopped, stop_requested

LEFT_OUT = "left out: the checkpoints of this run are of clips without it; a new job.dump_folder takes it"


@dataclass(frozen=True)
class Clips:
    """The clips of a run: for training and for the held-out loss.

    prompts: what validation samples. of_prompts: the clips that these are captions of, or [].
    numbers: for the log: clips of the plan, those dropped by reason, and how fast they were encoded.
    sampling: [validation], with the model's own values where it leaves them to the model. scores: Validator.scores.
    """

    training: ClipsByBucket
    held_out: list[CachedClip]
    prompts: list[str]
    of_prompts: list[CachedClip]
    numbers: dict[str, float]
    sampling: Validation
    scores: Any = None


def open_run_cache(
    config: JobConfig, encoders: Encoders, conditioning: ConditioningSpec, group: dist.ProcessGroup | None
) -> LatentCache:
    """The cache of a run for its encoders, with what data.cache_url holds."""
    data, kind = config.data, LatentCache
    if data.cache_url:
        listed, remote = (
            resolve(f"titan_video.ingest.cache.remote_cache:{name}", "data.cache_url")
            for name in ("list_store", "RemoteCache")
        )
        shards = broadcast_from_rank0(lambda: listed(data.cache_url), group)
        kind = partial(remote, url=data.cache_url, max_gib=data.cache_url_gib, remote=shards)
    folder = Path(data.cache_folder or Path(config.job.dump_folder) / "cache")
    return open_cache(folder, encoders, conditioning, group, kind, spare=Path(config.job.dump_folder) / "tables")


def open_cache(
    folder: Path,
    encoders: Encoders,
    conditioning: ConditioningSpec,
    group: dist.ProcessGroup | None,
    kind: Callable[..., LatentCache] = LatentCache,
    spare: Path | None = None,
) -> LatentCache:
    """The cache for these encoders, with an index of its entries that the ranks share. kind: makes it. spare: the
    folder of the index where that of the cache cannot be written.

    The encoders' identities are hashes of the weights: gigabytes, which one rank reads.
    """

    def find() -> tuple[tuple[str, str, str], EntryIndex | None]:
        ids = encoders.video_id(), encoders.text_id(), encoders.image_id() if conditioning.image_tokens else ""
        path = make_index(kind(folder, *ids, conditioning, known=NotListed()), spare)
        return ids, EntryIndex(path) if path else None

    ids, known = broadcast_from_rank0(find, group)
    return kind(folder, *ids, conditioning, known)


def check_encoders(encoders: Encoders, args: Any, geometry: LatentGeometry, config: JobConfig) -> None:
    """ValueError unless the encoders give what the model takes; the two do not know each other.

    args, geometry: the model's (see ModelSpec).
    """
    flavor, encoder = f"model.flavor = {config.model.flavor!r}", f"encoder.name = {config.encoder.name!r}"
    conditioning = args.conditioning
    pairs = [("text", args.text_dim, encoders.text_dim)]
    if conditioning.pooled_text:
        pairs.append(("pooled text", args.pooled_dim, encoders.pooled_dim))
    if conditioning.image_tokens:
        pairs.append(("image tokens", args.image_dim, encoders.image_dim))
    for what, needed, found in pairs:
        if needed != found:
            raise ValueError(f"{flavor} takes {what} of width {needed}, {encoder} gives {found}: choose the two to fit")
    if encoders.channels != geometry.channels:
        raise ValueError(
            f"{flavor} takes {geometry.channels} latent channels, {encoder} gives {encoders.channels}: choose the two "
            f"to fit"
        )
    strides = encoders.stride_t, encoders.stride_s
    if strides != (geometry.temporal_stride, geometry.spatial_stride):
        raise ValueError(
            f"{flavor} takes latents of strides {geometry.temporal_stride} in time and {geometry.spatial_stride} in "
            f"space, {encoder} gives {strides[0]} and {strides[1]}: choose the two to fit"
        )
    if -1 < config.data.image_dropout < 0:
        raise ValueError(
            f"data.image_dropout: given {config.data.image_dropout:g}; legal: -1 (the model's own), or from 0 to 1"
        )
    if config.data.image_dropout > 0 and not conditioning.text_image_tokens:
        raise ValueError(
            f"data.image_dropout: given {config.data.image_dropout:g}, but the text of {flavor} has no image; leave it "
            f"at -1"
        )
    if conditioning.num_cond_frames and config.validation.num_scored:
        raise ValueError(
            f"validation.num_scored: {flavor} starts from an image; only text-to-video is scored; set it to 0"
        )
    if conditioning.num_cond_frames and config.validation.prompts_path:
        raise ValueError(
            f"validation.prompts_path: {flavor} starts from an image, which a prompt does not have; leave it empty"
        )


@dataclass(frozen=True)
class Preparation:
    """What planning and encoding the clips of a run need. args: the model's (see ModelSpec)."""

    config: JobConfig
    args: Any
    encoders: Encoders
    cache: LatentCache
    group: dist.ProcessGroup | None
    tables: Tables

    @classmethod
    def of(
        cls, config: JobConfig, args: Any, encoders: Encoders, cache: LatentCache, group: dist.ProcessGroup | None
    ) -> "Preparation":
        tables = Tables.of(cache.folder, Path(config.job.dump_folder))
        return cls(config, args, encoders, cache, group, tables)

    def plan(self, report: Path, path: str = "") -> "PlannedClips":
        """Plan the clips of [data], or those of another path for validation; log the plan and write its report.

        ValueError on all ranks when no clip is left, or when the run has checkpoints of other clips.
        """
        data = self.config.data
        stills = not self.args.conditioning.num_cond_frames
        planner = Planner.of(data, self.cache.folder, self.encoders.stride_t, path, stills)
        plan = plan_on_ranks(planner, data.num_workers, self.tables, self.group)

        def make() -> PlannedClips:
            plan.require_clips()
            planned = self.planned(plan, drop_apart=not path)
            if not path:
                planned = self.as_trained(planned, report)
            found = planned.plan()
            write_report(found, report, planned.clips.plan.key, others=bool(planned.left_out))
            logger.info(found.summary())
            return planned

        return broadcast_from_rank0(make, self.group)

    def as_trained(self, planned: "PlannedClips", report: Path) -> "PlannedClips":
        """The clips of the run's checkpoints; those planned where it has none. report: of the plan. On the first rank.

        ValueError: the clips are others.
        """
        config = self.config
        earlier = EarlierClips.of(config.checkpoint, Path(config.job.dump_folder), report)

        def before() -> ClipTable | None:
            entries = reported_plan(report, self.tables)
            return None if entries is None else self.clips(entries)

        clips, at_least, left_out = earlier.matched(planned.clips, self.cache, config.data, config.validation, before)
        planned = replace(planned, clips=clips, at_least=at_least, left_out=left_out)
        return replace(planned, counts=planned.plan().counts())

    def clips(self, entries: PlanTable, drop_apart: bool = True) -> ClipTable:
        """The kept clips of a plan. drop_apart: with data.image_dropout. On the first rank."""
        drop_apart = drop_apart and self.config.data.image_dropout != 0
        return self.tables.make(lambda folder: clip_table(entries, self.cache, drop_apart, folder))

    def planned(self, plan: Plan, drop_apart: bool = True) -> "PlannedClips":
        """The clips of a plan, with a remark about captions that are cut. drop_apart: as of `clips`."""
        clips = self.clips(plan.entries, drop_apart)
        what = f"cut captions {plan.entries.key} {self.cache.text_id} {self.encoders.max_text_length}"
        remark = self.tables.remembered(what, lambda: cut_captions(plan, self.encoders))
        return PlannedClips(clips, (*plan.remarks, *([remark] if remark else [])), plan.counts())

    def encode(self, planned: "PlannedClips", report: Path, prompts: Sequence[str], part: Part = ALL) -> "PlannedClips":
        """Encode what the cache lacks of planned clips, and of prompts; `counts` has numbers of that, too.

        Clips that turn out to be unusable are dropped, and the report is written anew. ValueError: no clip is left.
        """
        num_workers = self.config.data.num_workers
        failures, numbers = encode_table(
            planned.clips, self.encoders, self.cache, self.group, num_workers, prompts=prompts, part=part
        )
        if not failures:
            return replace(planned, counts=planned.counts | numbers)

        def drop() -> PlannedClips:
            plan = planned.plan().drop(failures)
            write_report(plan, report, planned.clips.plan.key, others=True)
            logger.info(plan.summary())
            plan.require_clips()
            return replace(planned, clips=planned.clips.without_paths(failures), counts=plan.counts() | numbers)

        return broadcast_from_rank0(drop, self.group)


@dataclass(frozen=True)
class PlannedClips:
    """clips: that are kept. remarks: of the plan. counts: of the plan and of encoding, for the log. at_least, left_out:
    see `resume.Matched`.
    """

    clips: ClipTable
    remarks: tuple[str, ...]
    counts: dict[str, float]
    at_least: int = 1
    left_out: frozenset[str] = frozenset()

    def plan(self) -> Plan:
        plan = replace(self.clips.plan.plan(), remarks=self.remarks)
        return plan.drop(dict.fromkeys(self.left_out, LEFT_OUT)) if self.left_out else plan


def prepare_clips(
    config: JobConfig, args: Any, encoders: Encoders, cache: LatentCache, group: dist.ProcessGroup | None
) -> Clips:
    """Plan the clips and hold some out. With encoder.placement "cached" encode all of them, else those that validation
    needs. args: the model's (see ModelSpec).

    Plans are logged and written to job.dump_folder. ValueError on all ranks when no clip is left, or when that folder
    holds checkpoints of other clips.
    """
    data, folder = config.data, Path(config.job.dump_folder)
    v, ready = sampling_section(config, args, data.sizes[0]), Preparation.of(config, args, encoders, cache, group)
    is_ahead = config.encoder.placement == "cached"
    prompts = broadcast_from_rank0(lambda: _read_prompts(v, encoders), group)
    texts, scores = prompts + sampled_negatives(v), None
    if v.enable and v.num_scored:
        geometry = LatentGeometry(encoders.channels, encoders.stride_t, encoders.stride_s)
        build = resolve("titan_video.ingest.shape_scores:ShapeScores", asked_by="validation.num_scored")
        scores = build(v.num_scored, cache, geometry.latent_shape(data.sizes[0]))
        texts += scores.captions

    def plan_clips(path: str, report: Path) -> PlannedClips:
        planned = ready.plan(report, path)
        return ready.encode(planned, report, texts) if is_ahead else planned

    planned, held_out = plan_clips("", folder / "data_plan.jsonl"), []
    clips = planned.clips
    if v.enable and v.path:
        held_out = plan_clips(v.path, folder / "validation_plan.jsonl").clips
    elif v.enable:
        clips, held_out = clips.split(v.holdout, planned.at_least)
        why = "" if held_out else f": {_why_none(v, len(clips))}; there is no held-out loss"
        logger.info(f"{len(held_out)} of {len(clips) + len(held_out)} clips are held out for validation{why}")
    held_out, shown = [held_out[i] for i in range(min(v.max_clips, len(held_out)))], []
    if v.enable:
        shown = list(_of_other_captions(held_out or clips, v.num_videos))
    failed, _ = encode_clips(held_out + shown if v.enable else [], encoders, cache, group, data.num_workers, texts)
    if failed:
        raise ValueError(
            "\n".join(f"{path}: {reason}; validation needs this clip: remove it" for path, reason in failed.items())
        )
    of_prompts = prompts[: v.num_videos] or [clip.caption for clip in shown]
    training = clips.by_bucket(broadcast_from_rank0(clips.identity, group))
    return Clips(training, held_out, of_prompts, shown, planned.counts, v, scores)


def _of_other_captions(clips: Sequence[CachedClip], count: int) -> Iterator[CachedClip]:
    """The first `count` clips, each of another caption."""
    seen: set[str] = set()
    for clip in clips if count else ():
        if clip.caption not in seen:
            seen.add(clip.caption)
            yield clip
        if len(seen) == count:
            return


def _read_prompts(v: Validation, encoders: Encoders) -> list[str]:
    prompts = read_prompts(v.prompts_path, "validation.prompts_path") if v.enable and v.prompts_path else []
    if remark := cut_prompts(prompts, encoders):
        logger.info(f"{v.prompts_path}: {remark}")
    return prompts


def _why_none(v: Validation, count: int) -> str:
    if v.holdout == 0:
        return "validation.holdout is 0"
    if count == 1:
        return "there is one clip, which is trained; give more, or validation.path"
    return (
        "the checkpoints of this run are of one that held out none, and it goes on so; a new job.dump_folder holds out"
    )


def sampled_negatives(v: Validation) -> list[str]:
    """The negative prompt, where validation samples with one."""
    return [v.negative_prompt] if v.enable and v.num_videos and v.guidance_scale != 1 and v.negative_prompt else []


def encode_clips(
    clips: Sequence[CachedClip],
    encoders: Encoders,
    cache: LatentCache,
    group: dist.ProcessGroup | None,
    num_workers: int,
    prompts: Sequence[str] = (),
) -> tuple[dict[str, str], dict[str, float]]:
    """Encode what the cache lacks of these few clips, prompts and the empty prompt, on all ranks.

    Returns all ranks' failures, {path: reason}, and numbers for the log: what was encoded and how fast. Both are
    {} when nothing was missing.
    """

    def find():
        remove_partial_shards(cache)
        return missing_jobs(clips, cache, prompts, logger.info)

    jobs = broadcast_from_rank0(find, group)
    if not any(jobs):
        return {}, {}
    spent: dict[str, float] = {}
    start = time.perf_counter()
    mine = encode_share(jobs, encoders, cache, dist.get_rank(), dist.get_world_size(), num_workers, logger.info, spent)
    gathered = gather_objects((mine, spent, stop_requested()), group)
    failed = {keys: reason for part, _, _ in gathered for keys, reason in part.items()}
    if any(stopping for _, _, stopping in gathered):
        raise Stopped("stopped while encoding; the same command goes on from there")
    share_index(cache, group)
    numbers = {
        "encode_seconds": time.perf_counter() - start,
        "decode_wait_seconds": max(s["decode_wait"] for _, s, _ in gathered),
    }
    done = [job for job in jobs[1] if job.keys not in failed]
    numbers |= {"encoded_clips": len(done), "encoded_frames": sum(job.entry.bucket[0] for job in done)}
    numbers["encoded_frames_per_second"] = numbers["encoded_frames"] / max(1e-9, *(s["clips"] for _, s, _ in gathered))
    return failed_clips(clips, cache, failed), numbers


def with_steps(config: JobConfig, loader: LatentLoader) -> JobConfig:
    """The configuration with training.epochs as training.steps; the same if it has none."""
    if not (epochs := config.training.epochs):
        return config
    sampler = loader.draw_plan.sampler
    steps = num_steps(sampler, epochs)
    logger.info(f"training.epochs: {epochs} epochs of {sum(sampler.sizes)} clips = {steps} steps")
    return replace(config, training=replace(config.training, epochs=0, steps=steps))


def num_steps(sampler: GlobalSampler, epochs: int) -> int:
    """The fewest steps that draw as many clips as `epochs` epochs have; each bucket has then had its share of them to
    within one group.
    """
    classes = sampler.classes
    per_group = [c.clips * sampler.micro_batches for c in classes]
    total = epochs * sum(sampler.sizes)
    if min(per_group) == max(per_group):
        return -(-total // (per_group[0] * sampler.groups_per_step))
    counter, steps = copy(sampler), 0
    counter.draws = [0] * len(sampler.sizes)
    while sum(counter.draws) < total:
        for _ in range(sampler.groups_per_step):
            turn = counter.next_turn([c.buckets for c in classes], per_group)
            counter.draws[classes[turn].buckets[0]] += per_group[turn]  # turns depend on the sum over a class
        steps += 1
    return steps
