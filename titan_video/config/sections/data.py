"""[data] and [[data.source]]."""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.option import opt

DERIVED_MULTIPLE = 32  # pixels: a multiple of the VAE stride times the patch size of every model


@dataclass(frozen=True)
class Source:
    """One of several sources of clips, a table `[[data.source]]`."""

    path: str = opt("", "Clips of this source, in any form that data.path accepts.")
    num_repeats: int = opt(1, "How often each clip appears in an epoch.", ge=1)
    caption_prefix: str = opt("", "Text in front of each caption.")
    caption_column: str = opt(
        "",
        "Column of the metadata or table, or key of a tar's .json, that holds the captions. "
        "Empty: the first column with a known name.",
    )
    fps: float = opt(0.0, "Resample the clips to this rate instead of data.fps; 0: data.fps.", ge=0)
    source_fps: float = opt(
        0.0, "Frame rate of folders of frames, which do not record it. 0: such folders are dropped.", ge=0
    )
    frame_extraction: Literal["default", "head", "chunk", "slide", "uniform", "full"] = opt(
        "default", "Replaces data.frame_extraction for this source; `default`: no change."
    )
    trust_metadata: bool = opt(
        False,
        "Use the columns width, height, num_frames and fps of rows that have all of them; the plan then does not open "
        "the file. The decoder compares, and drops a clip that differs from its row.",
    )


@dataclass(frozen=True)
class Data:
    path: str = opt(
        "",
        "Folder of clips with .txt captions of the same name, a metadata .csv/.tsv/.json/.jsonl file, WebDataset tars "
        "(wildcards, braces, URLs), or .parquet/.arrow files. `embedded:shapes-N` generates N clips of moving shapes, "
        "`embedded:large-shapes-N` of large ones near the middle. Shorthand for a single data.source.",
    )
    source: tuple[Source, ...] = opt((), "Several sources, instead of path.")
    buckets: tuple[tuple[int, ...], ...] = opt(
        ((81, 480, 832),),
        "Training sizes [frames, height, width]; frames = 4k+1. Of the buckets with the most frames that a clip can "
        "fill, it goes to the one with the nearest aspect ratio.",
        ge=1,
    )
    resolutions: tuple[int, ...] = opt(
        (),
        "Derive the buckets; `buckets` must be empty. Each of frame_buckets is combined with each of these side "
        "lengths: num_ar_buckets sizes with about the area of that square, in multiples of 32.",
        ge=64,
    )
    frame_buckets: tuple[int, ...] = opt((1, 33, 81), "Frames of derived buckets; 4k+1.", ge=1)
    min_ar: float = opt(0.5, "Lowest aspect ratio (width / height) of derived buckets.", gt=0)
    max_ar: float = opt(2.0, "Highest aspect ratio of derived buckets.", gt=0)
    num_ar_buckets: int = opt(5, "Number of aspect ratios of derived buckets, in geometric steps.", ge=1, le=1000)
    frame_extraction: Literal["head", "chunk", "slide", "uniform", "full"] = opt(
        "head",
        "Clips of a file that is longer than its bucket. head: the first frames. chunk: all consecutive chunks. "
        "slide: a clip every slide_stride frames. uniform: uniform_clips evenly spaced clips. full: all frames, cut to "
        "4k+1 and to the frames of the longest bucket, as a bucket of its own.",
    )
    uniform_clips: int = opt(4, "For uniform: maximum number of clips of a file.", ge=1)
    slide_stride: int = opt(16, "For slide: frames, after resampling, between the starts of two clips.", ge=1)
    fps: float = opt(16.0, "Every clip is resampled to this frame rate.", gt=0)
    decoder: Literal["pyav", "torchcodec"] = opt(
        "pyav",
        "Video decoder. torchcodec must be installed; its pixels can differ slightly, so its clips have cache entries "
        "of their own.",
    )
    hdr: Literal["tonemap", "drop"] = opt("tonemap", "Video in PQ or HLG: converted to SDR (docs/data.md), or dropped.")
    bt709_lines: int = opt(720, "Untagged video is BT.709 if its shorter side has so many pixels; 0: never.", ge=0)
    video_as_image: bool = opt(False, "Video that fills no bucket but those of one frame: trained on as images.")
    media_rules: int = opt(
        2, "1: media are read as before these options; 2: with them. A resumed run keeps its own.", ge=1, le=2
    )
    max_decoded_pixels: int = opt(1 << 26, "Files whose frames have more pixels are dropped.", ge=1, le=1 << 30)
    max_frames: int = opt(500_000, "Files with more frames, also after resampling, are dropped.", ge=1)
    decode_timeout_seconds: float = opt(
        600.0, "A worker that takes longer for a clip is replaced; a clip of two such workers is dropped.", gt=0, le=1e6
    )
    decode_memory_gib: float = opt(4.0, "Clips that take more of a worker are dropped; 0: no limit.", ge=0, le=1e6)
    caption_dropout: float = opt(
        0.1, "Fraction of samples trained with the empty caption, for classifier-free guidance.", ge=0, le=1
    )
    image_dropout: float = opt(
        -1.0,
        "HunyuanVideo image-to-video: fraction of samples whose text sees a black image, apart from caption_dropout. "
        "-1: 0.1, as in its own code. 0: a dropped caption takes the image along, as before the option.",
        ge=-1,
        le=1,
    )
    tokens_per_microbatch: int = opt(
        0,
        "Instead of training.local_batch_size: a micro-batch has as many clips of a bucket as fit into this number of "
        "tokens, but at least one. 0: off.",
        ge=0,
    )
    global_micro_batches: int = opt(
        -1,
        "With tokens_per_microbatch: micro-batches per optimizer step over all ranks; a multiple of the data-parallel "
        "degree. -1: one per data-parallel rank.",
        ge=-1,
    )
    groups_per_step: int = opt(
        1,
        "The clips of a step are drawn in this number of groups. A group has one bucket or, with "
        "tokens_per_microbatch, buckets of equal cost. Divides the micro-batches of a rank.",
        ge=1,
    )
    shuffle: bool = opt(True, "Draw the clips in a new random order each epoch.")
    num_workers: int = opt(
        2, "Processes that decode clips, and threads that read cached latents, per rank; 0: the main one.", ge=0
    )
    prefetch_factor: int = opt(2, "Batches that each worker prefetches.", ge=1)
    cache_folder: str = opt("", "Latents and text embeddings, keyed by content. Empty: `cache` in job.dump_folder.")
    cache_url: str = opt("", "Copy of a cache folder, as s3://bucket/cache: what cache_folder lacks is read there.")
    cache_url_gib: float = opt(64.0, "What is read from cache_url is kept in cache_folder, up to this size.", ge=0)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.source or (Source(path=self.path),)

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The buckets [frames, height, width]: `buckets`, or those derived from `resolutions`."""
        if not self.resolutions:
            return self.buckets
        last = self.num_ar_buckets - 1
        ratios = [
            self.min_ar * (self.max_ar / self.min_ar) ** (i / last if last else 0.5) for i in range(self.num_ar_buckets)
        ]
        grid = [_size(side, ratio) for side in self.resolutions for ratio in ratios]
        return tuple(dict.fromkeys((frames, *size) for frames in self.frame_buckets for size in grid))


def _size(side: int, ratio: float) -> tuple[int, int]:
    """(height, width) with about the area of a square of this side, width / height about `ratio`."""
    height, width = (side * ratio**half / DERIVED_MULTIPLE for half in (-0.5, 0.5))
    return max(1, round(height)) * DERIVED_MULTIPLE, max(1, round(width)) * DERIVED_MULTIPLE
