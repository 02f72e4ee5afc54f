"""Data set TOMLs of diffusion-pipe and musubi-tuner, as ours. Each of their keys is mapped, or named with what becomes
of it.

Both repeat a clip at each of several sizes; here a clip goes to one bucket. So the lines that come back beside the TOML
are to be read.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w

from titan_video.config.check import check
from titan_video.config.job_config import Data, Source
from titan_video.config.manager import ConfigError, parse, read_file
from titan_video.ingest.bucketing import DEFAULT_GEOMETRY, SPATIAL_MULTIPLE, whole_latents
from titan_video.ingest.files.sources import CAPTION_SUFFIXES

CHOICES = {
    "single_beginning": ("head", 4),
    "single_middle": ("uniform", 1),
    "multiple_overlapping": ("chunk", 4),
}  # and data.uniform_clips
FRAMEPACK = "it belongs to FramePack, which is not among the models"
CONTROL = (
    "control clips are inputs of models that are not here; a first frame is taken from the clip itself, or from "
    "a column `image`"
)
UNSUPPORTED = {
    "mask_path": "the loss counts every pixel",
    "default_mask_file": "the loss counts every pixel",
    "control_path": CONTROL,
    "control_directory": CONTROL,
    "control_resolution": CONTROL,
    "no_resize_control": CONTROL,
    "flux_kontext_no_resize_control": CONTROL,
    "qwen_image_edit_no_resize_control": CONTROL,
    "qwen_image_edit_control_resolution": CONTROL,
    "cache_shuffle_num": "tags are not shuffled; give several captions of a clip as a list in a metadata file",
    "cache_shuffle_delimiter": "tags are not shuffled",
    "shuffle_tags": "tags are not shuffled",
    "online_captions": "captions.json is not read; make it a metadata.jsonl, with a list of captions a row",
    "shuffle_metadata": "the order is drawn anew each epoch; data.shuffle",
    "subsample_ratio": "a run takes as many clips as training.steps says",
    "image_micro_batch_size_per_gpu": "micro-batches of all buckets have one size; "
    "data.tokens_per_microbatch makes them equal in cost",
    "cache_directory": "one cache, by content, serves all sources; data.cache_folder",
    "skip_corrupted_cache": "a damaged entry is named; delete it",
    "bucket_no_upscale": "a clip smaller than its bucket is enlarged, and the plan counts these; give smaller buckets",
    "multiple_target": "layered images are for models that are not here",
    "debug_dataset": "`python -m titan_video.data plan CONFIG --export N`",
    "fp_latent_window_size": FRAMEPACK,
    "fp_1f_clean_indices": FRAMEPACK,
    "fp_1f_target_index": FRAMEPACK,
    "fp_1f_no_post": FRAMEPACK,
}


class _Table:
    """A table of the file, whose missing keys are looked up in another. It remembers which have been asked for."""

    def __init__(self, name: str, values: Mapping[str, Any], defaults: "_Table | None" = None):
        if not isinstance(values, Mapping):
            raise ValueError(f"{name}: given {values!r}; it must be a table")
        self.name, self.values, self.defaults, self.asked = name, values, defaults, set()

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def get(self, key: str, default: Any = None, kinds: tuple[type, ...] = ()) -> Any:
        self.asked.add(key)
        above = self.defaults.get(key, default, kinds) if self.defaults else default
        value = self.values.get(key, above)
        if (
            key in self.values
            and kinds
            and (not isinstance(value, kinds) or isinstance(value, bool) and bool not in kinds)
        ):
            raise ValueError(
                f"{self.name}: {key}: given {value!r}; it must be {' or '.join(kind.__name__ for kind in kinds)}"
            )
        return value

    def left(self, apart: Iterable[str] = ()) -> list[str]:
        """A line for each key that has not been asked for."""
        keys = [key for key in self.values if key not in self.asked and key not in apart]
        return [
            f"{self.name}: {key}: {'not supported: ' + UNSUPPORTED[key] if key in UNSUPPORTED else 'an unknown key'}"
            for key in keys
        ]


class _Import:
    """What becomes of a file: values of [data], its sources, and lines for what is different."""

    def __init__(self):
        self.sizings: list[Data] = []
        self.sources: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.batch_sizes: set[int] = set()
        self.data: dict[str, Any] = {}

    def note(self, where: str, text: str) -> None:
        self.lines.append(f"{where}: {text}")

    def frames(self, where: str, counts: Iterable[int]) -> tuple[int, ...]:
        """Whole latents of the default VAE (4k+1), ascending."""
        stride = DEFAULT_GEOMETRY.temporal_stride
        cut = {n: whole_latents(n, stride) for n in counts}
        if changed := {n: m for n, m in cut.items() if n != m}:
            self.note(where, f"frames are {stride}k+1: {', '.join(f'{n} becomes {m}' for n, m in changed.items())}")
        return tuple(sorted(set(cut.values())))

    def sides(self, where: str, width: int, height: int) -> tuple[int, int]:
        """(height, width), multiples of 16."""
        sides = tuple(max(1, round(side / SPATIAL_MULTIPLE)) * SPATIAL_MULTIPLE for side in (height, width))
        if sides != (height, width):
            self.note(
                where, f"sides are multiples of {SPATIAL_MULTIPLE}: {width} x {height} becomes {sides[1]} x {sides[0]}"
            )
        return sides

    def one_for_all(self, where: str, name: str, value: Any) -> None:
        """A value of [data] that a source cannot have for itself."""
        if self.data.setdefault(name, value) != value:
            self.note(
                where, f"not supported: data.{name} is one for all sources, here {self.data[name]} and not {value}"
            )

    def finish(self) -> tuple[str, list[str]]:
        if not all(source["path"] for source in self.sources) or not self.sources:
            raise ValueError("it has a table without a path, or none")
        if all(sizing == self.sizings[0] for sizing in self.sizings):
            sizing = self.sizings[0]
        else:
            sizing = Data(buckets=tuple(dict.fromkeys(size for s in self.sizings for size in s.sizes)))
            self.note("buckets", "each source had its own; here a clip goes to the nearest of all")
        if len({size[1:] for size in sizing.sizes}) > 1 and len(sizing.resolutions) > 1:
            self.note(
                "resolutions", "a clip is trained at one of them, the largest that is nearest to its shape, not at each"
            )
        default, plain = asdict(Data()), asdict(Source())
        chosen = {
            key: value for key, value in asdict(sizing).items() if value != default[key] or (key == "buckets" and value)
        }
        sources = [{key: value for key, value in source.items() if value != plain[key]} for source in self.sources]
        config: dict[str, Any] = {"data": {**chosen, **self.data, "source": sources}}
        if len(self.batch_sizes) > 1:
            self.note(
                "batch_size",
                f"one for all sources, here {min(self.batch_sizes)}; data.tokens_per_microbatch makes it fit "
                f"each bucket",
            )
        if min(self.batch_sizes, default=1) > 1:
            config["training"] = {"local_batch_size": min(self.batch_sizes)}
        text = toml_text(config)
        check(parse(text, "the import"), 1, files=False)
        return text, self.lines


def toml_text(config: Mapping[str, Mapping[str, Any]]) -> str:
    """Sections as TOML, an array on one line, and an array of tables as `[[section.name]]`."""
    lines: list[str] = []
    for section, values in config.items():
        tables = {name: rows for name, rows in values.items() if rows and isinstance(rows, list | tuple)}
        tables = {name: rows for name, rows in tables.items() if isinstance(rows[0], Mapping)}
        lines += [f"[{section}]", *(f"{k} = {_value(v)}" for k, v in values.items() if k not in tables), ""]
        for name, rows in tables.items():
            for row in rows:
                lines += [f"[[{section}.{name}]]", *(f"{k} = {_value(v)}" for k, v in row.items()), ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return tomli_w.dumps({"x": value}).removeprefix("x = ").rstrip("\n")


def import_file(path: str | os.PathLike) -> tuple[str, list[str]]:
    """(TOML of [data], a line for each key that could not be mapped or means something else).

    Raises ValueError that names the file and key.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path}: no such file")
    try:
        values = read_file(path)
        if "directory" in values:
            return _diffusion_pipe(values)
        if "datasets" in values:
            return _musubi_tuner(values)
        hint = f"; it names one: {values['dataset']}" if isinstance(values.get("dataset"), str) else ""
        raise ValueError(f"is no data set TOML of diffusion-pipe ([[directory]]) or musubi-tuner ([[datasets]]){hint}")
    except ConfigError:
        raise
    except (ValueError, TypeError, ArithmeticError) as e:
        raise ValueError(f"{path}: {e}") from e


def _tables(values: Mapping[str, Any], name: str, defaults: _Table) -> list[_Table]:
    rows = values[name] if isinstance(values[name], list) else [values[name]]
    return [_Table(f"[[{name}]] {i}", row, defaults) for i, row in enumerate(rows, 1)]


# ---- diffusion-pipe ----


def _diffusion_pipe(values: Mapping[str, Any]) -> tuple[str, list[str]]:
    top, made = _Table("top level", values), _Import()
    tables = _tables(values, "directory", top)
    for table in tables:
        folder = table.get("path", "", (str,))
        repeats = table.get("num_repeats", 1, (int, float))
        if repeats != int(repeats) or repeats < 1:
            made.note(table.name, f"num_repeats: whole numbers from 1 on: {repeats} becomes {max(1, round(repeats))}")
        made.sources.append(
            {
                "path": folder,
                "num_repeats": max(1, round(repeats)),
                "caption_prefix": table.get("caption_prefix", "", (str,)),
            }
        )
        if not table.get("skip_empty_caption", True, (bool,)):
            made.note(
                table.name,
                "skip_empty_caption: not supported: a clip without a caption is dropped, with the reason; "
                "data.caption_dropout "
                "is the share trained without",
            )
        if (Path(folder) / "captions.json").is_file():
            made.note(table.name, f"path: {folder} holds captions.json: {UNSUPPORTED['online_captions']}")
        made.sizings.append(_areas(table, made))
    if "micro_batch_size_per_gpu" in top:
        made.batch_sizes.add(top.get("micro_batch_size_per_gpu", 1, (int,)))
    if "video_clip_mode" in top:
        _clip_mode(top, made)
    made.lines += [line for table in (top, *tables) for line in table.left(["directory"])]
    return made.finish()


def _clip_mode(top: _Table, made: _Import) -> None:
    mode = top.get("video_clip_mode", "", (str,))
    if mode not in CHOICES:
        raise ValueError(f"video_clip_mode: given {mode!r}; it must be {' or '.join(CHOICES)}")
    made.data["frame_extraction"], clips = CHOICES[mode]
    if made.data["frame_extraction"] == "uniform":
        made.data["uniform_clips"] = clips
    if mode == "multiple_overlapping":
        made.note(top.name, "video_clip_mode: chunks do not overlap, and what is left at the end is not used")


def _areas(table: _Table, made: _Import) -> Data:
    """The buckets of a directory."""
    sizes, frames = table.get("size_buckets", None, (list,)), table.get("frame_buckets", [1], (list,))
    resolutions, ratios = table.get("resolutions", None, (list,)), table.get("ar_buckets", None, (list,))
    spread = (
        table.get("min_ar", 0.5, (int, float)),
        table.get("max_ar", 2.0, (int, float)),
        table.get("num_ar_buckets", 7, (int,)),
    )
    by_shape = table.get("enable_ar_bucket", False, (bool,))
    if sizes:
        frames = made.frames(f"{table.name}: size_buckets", [size[2] for size in sizes])
        rounded = [
            (max(f for f in frames if f <= n), *made.sides(f"{table.name}: size_buckets", w, h)) for w, h, n in sizes
        ]
        return Data(buckets=tuple(dict.fromkeys(rounded)))
    if not resolutions:
        raise ValueError(f"{table.name}: it has neither resolutions nor size_buckets")
    if len(frames) > 1:
        made.note(
            f"{table.name}: frame_buckets",
            "a clip too short for the others is trained as one frame, where 1 is among them",
        )
    sides = tuple(round(math.sqrt(r[0] * r[1])) if isinstance(r, list) else round(r) for r in resolutions)
    derived = {
        "buckets": (),
        "resolutions": sides,
        "frame_buckets": made.frames(f"{table.name}: frame_buckets", {1, *frames}),
    }
    if by_shape and ratios:
        ratios = [r[0] / r[1] if isinstance(r, list) else r for r in ratios]
        each = (Data(**derived, min_ar=r, max_ar=r, num_ar_buckets=1).sizes for r in ratios)
        return Data(buckets=tuple(dict.fromkeys(size for sizes in each for size in sizes)))
    low, high, count = spread if by_shape else (1.0, 1.0, 1)
    return Data(**derived, min_ar=float(low), max_ar=float(high), num_ar_buckets=count)


# ---- musubi-tuner ----


def _musubi_tuner(values: Mapping[str, Any]) -> tuple[str, list[str]]:
    general, made = _Table("[general]", values.get("general", {})), _Import()
    tables = _tables(values, "datasets", general)
    for table in tables:
        kinds = [
            key
            for key in ("video_directory", "video_jsonl_file", "image_directory", "image_jsonl_file")
            if key in table
        ]
        if len(kinds) != 1:
            raise ValueError(
                f"{table.name}: it names {' and '.join(kinds) or 'no clips'}; it must have one of "
                f"video_directory, video_jsonl_file, "
                "image_directory and image_jsonl_file"
            )
        source = {"path": table.get(kinds[0], "", (str,)), "num_repeats": table.get("num_repeats", 1, (int,))}
        if (suffix := table.get("caption_extension", ".txt", (str,))) not in CAPTION_SUFFIXES:
            made.note(
                table.name,
                f"caption_extension: not supported: captions are {' or '.join(CAPTION_SUFFIXES)}, not {suffix}; rename "
                f"them, or give a metadata file",
            )
        made.batch_sizes.add(table.get("batch_size", 1, (int,)))
        frames = _frames(table, made, source) if kinds[0].startswith("video") else (1,)
        made.sources.append(source)
        size = table.get("resolution", [960, 544], (int, list))
        width, height = size if isinstance(size, list) else (size, size)
        if table.get("enable_bucket", False, (bool,)):
            made.sizings.append(
                Data(
                    buckets=(),
                    resolutions=(round(math.sqrt(width * height)),),
                    frame_buckets=frames,
                    min_ar=0.25,
                    max_ar=4.0,
                    num_ar_buckets=9,
                )
            )
        else:
            sides = made.sides(f"{table.name}: resolution", width, height)
            made.sizings.append(Data(buckets=tuple((n, *sides) for n in frames)))
        if kinds[0].endswith("jsonl_file"):
            made.note(
                table.name, f"{kinds[0]}: relative paths in it are relative to the file, not to the current folder"
            )
    unknown = _Table("top level", values)
    made.lines += [line for table in (general, *tables) for line in table.left()] + unknown.left(
        ["general", "datasets"]
    )
    return made.finish()


def _frames(table: _Table, made: _Import, source: dict[str, Any]) -> tuple[int, ...]:
    """Frames of a data set's buckets; which clips of a file it takes goes to `source`."""
    choice, frames = table.get("frame_extraction", "head", (str,)), table.get("target_frames", [1], (list,))
    stride, sample, most = (
        table.get(key, default, (int,))
        for key, default in (("frame_stride", 1), ("frame_sample", 1), ("max_frames", 129))
    )
    rate = table.get("source_fps", 0.0, (float, int))
    if choice not in ("head", "chunk", "slide", "uniform", "full"):
        raise ValueError(
            f"{table.name}: frame_extraction: given {choice!r}; it must be head, chunk, slide, uniform or full"
        )
    source["frame_extraction"] = choice
    if rate:
        source["source_fps"] = float(rate)
        made.note(table.name, "source_fps: video files state their own rate; this one is for folders of frames")
    else:
        made.note(
            table.name,
            "source_fps: there is none, and every frame was taken; here clips are resampled to data.fps, "
            "or to `fps` of their source",
        )
    if choice == "slide":
        made.one_for_all(f"{table.name}: frame_stride", "slide_stride", stride)
    if choice == "uniform":
        made.one_for_all(f"{table.name}: frame_sample", "uniform_clips", sample)
    if choice == "full":
        return made.frames(f"{table.name}: max_frames", {1, most})  # any length between is a size of its own
    if len(frames) > 1:
        made.note(
            table.name, "target_frames: a file gives clips of the most frames of these that it can fill, not of each"
        )
    return made.frames(f"{table.name}: target_frames", frames)
