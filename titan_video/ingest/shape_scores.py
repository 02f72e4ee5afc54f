"""Scores of the embedded data set: sample clips of its captions and read colour, shape and direction from their pixels.

The reader sees pixels only. It knows the palette and the outlines of the data set, and nothing of the model.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.utils import gather_objects
from titan_video.ingest.files.shapes import COLORS, COMBINATIONS, SHAPES, caption, combination
from titan_video.tasks.sampling import Prompt
from titan_video.tasks.validation import Validator, shard_indices

BATCH = 24  # clips sampled at once
FIRST_ID = 1_000_000  # of their noise; the clips that validation shows begin at 0


def coverage(frames_FHW3: np.ndarray) -> np.ndarray:
    """How much of each pixel the shape covers, [F, H, W] in [0, 1].

    This is the pixel's distance from the clip's median colour, relative to the largest distance.
    """
    frames = frames_FHW3.astype(np.float64)
    distance = np.linalg.norm(frames - np.median(frames.reshape(-1, 3), axis=0), axis=-1)
    return np.clip((distance - 25) / max(np.quantile(distance, 0.995) - 25, 1), 0, 1)


def read_color(frames_FHW3: np.ndarray, cover: np.ndarray) -> str:
    """The colour of the palette with the same direction from the background as the covered pixels."""
    frames = frames_FHW3.astype(np.float64)
    background = np.median(frames.reshape(-1, 3), axis=0)
    mean = (frames[cover > 0.6] - background).mean(axis=0)
    offsets = {name: np.array(rgb) - background for name, rgb in COLORS.items()}
    return max(offsets, key=lambda name: mean @ offsets[name] / np.linalg.norm(offsets[name]))


def centres(cover: np.ndarray) -> np.ndarray:
    """Centre of the covered area in each frame, [F, (x, y)] in pixels."""
    _, height, width = cover.shape
    weight = np.where(cover > 0.3, cover, 0)
    total = np.maximum(weight.sum((1, 2)), 1e-9)
    return np.stack(
        [(weight * np.arange(width)).sum((1, 2)) / total, (weight * np.arange(height)[:, None]).sum((1, 2)) / total],
        axis=1,
    )


def read_direction(cover: np.ndarray) -> str:
    """The direction from the centre in the first quarter of the frames to the centre in the last quarter."""
    c, quarter = centres(cover), max(len(cover) // 4, 1)
    x, y = c[-quarter:].mean(0) - c[:quarter].mean(0)
    return ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")


def read_shape(cover: np.ndarray) -> str:
    """The outline, of the same area and centre, that agrees best with the covered pixels over all frames."""
    _, height, width = cover.shape
    centre_F2, area_F = centres(cover), (cover > 0.5).sum((1, 2)).astype(float)
    x = np.arange(width) - centre_F2[:, 0, None, None]
    y = np.arange(height)[:, None] - centre_F2[:, 1, None, None]
    area = area_F[:, None, None]
    r, half, leg = np.sqrt(area / np.pi), np.sqrt(area) / 2, np.sqrt(area / 2)
    outlines = {
        "circle": np.hypot(x, y) < r,
        "square": np.maximum(abs(x), abs(y)) < half,
        "triangle": (y < leg * 2 / 3)
        & (y > 2 * abs(x) - leg * 4 / 3),  # base and height 2 x leg, centre a third above the base
    }
    return min(SHAPES, key=lambda name: abs(outlines[name] - cover).sum())


def score(frames_FHW3: np.ndarray) -> tuple[str, str, str] | None:
    """(colour, shape, direction) of a clip; None if almost nothing differs from the background."""
    cover = coverage(frames_FHW3)
    if (cover > 0.5).sum((1, 2)).mean() < 20 or (cover > 0.5).mean() > 0.5:
        return None
    return read_color(frames_FHW3, cover), read_shape(cover), read_direction(cover)


def tally(read: Sequence[tuple[str, str, str] | None], wanted: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Share of the clips with the right colour, shape and direction."""
    shares = [np.mean([r is not None and r[i] == w[i] for r, w in zip(read, wanted, strict=True)]) for i in range(3)]
    return dict(zip(("colour", "shape", "direction"), map(float, shares), strict=True))


class ShapeScores:
    """`Validator.scores`: samples clips, each caption of the data set as often, and reads them."""

    def __init__(self, num_clips: int, cache: LatentCache, latent_CFHW: tuple[int, ...]):
        self.wanted = [combination(i) for i in range(num_clips)]
        self.captions = [caption(i) for i in range(min(num_clips, COMBINATIONS))]
        self.keys = [cache.text_key(caption(i)) for i in range(num_clips)]
        self.null_key, self.latent_CFHW = cache.text_key(""), latent_CFHW

    def __call__(self, validator: Validator) -> dict[str, float]:
        """Shares of the clips that show the colour, shape and direction of their caption, on rank 0.

        A clip in which nothing is seen counts as wrong. Collective over all ranks.
        """
        mesh, num, found = validator.batch_mesh, len(self.keys), []
        batches = [range(i, min(i + BATCH, num)) for i in range(0, num, BATCH)]
        for index, is_counted in shard_indices(len(batches), mesh.get_local_rank(), mesh.size()):
            latents = self._sample(validator, batches[index])
            if is_counted and validator.writes:
                frames = validator.output.decode(latents).permute(0, 2, 3, 4, 1).cpu().numpy()
                found += zip(batches[index], map(score, frames), strict=True)
        read = dict(pair for pairs in gather_objects(found, mesh.get_group()) for pair in pairs)
        if len(read) < num:  # a rank that writes nothing
            return {}
        shares = tally([read[i] for i in range(num)], self.wanted)
        return {f"score_{name}": share for name, share in shares.items()}

    def _sample(self, validator: Validator, clips: range) -> Tensor:
        prompt, null = (self._prompt(validator, keys) for keys in ([self.keys[i] for i in clips], [self.null_key]))
        return validator.sample_latents(prompt, null, self.latent_CFHW, [FIRST_ID + i for i in clips])

    def _prompt(self, validator: Validator, keys: Sequence[str]) -> Prompt:
        text_BLD, mask_BL = validator.reader.text(keys)
        return Prompt(text_BLD, mask_BL, validator.reader.pooled(keys))
