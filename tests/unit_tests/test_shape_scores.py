"""The scores of the embedded data set: the reader reads clips correctly."""

import numpy as np
import torch

from titan_video.encoders.debug import DebugEncoders
from titan_video.ingest.files.shapes import COMBINATIONS, combination, render
from titan_video.ingest.shape_scores import score, tally

CLIPS = range(COMBINATIONS)


def test_reader_reads_every_training_clip_correctly():
    assert [score(render(i)) for i in CLIPS] == [combination(i) for i in CLIPS]


def test_reader_reads_clips_after_the_codec():
    encoders = DebugEncoders(16)
    frames = torch.stack([torch.from_numpy(render(i)).permute(3, 0, 1, 2) for i in CLIPS])
    decoded = encoders.decode_video(encoders.encode_video(frames)).permute(0, 2, 3, 4, 1).numpy()
    shares = tally([score(c) for c in decoded], [combination(i) for i in CLIPS])
    assert shares["colour"] == shares["direction"] == 1.0 and shares["shape"] >= 0.95


def test_reader_is_not_fooled():
    """A reversed clip moves the other way, permuted channels are another colour, noise and an empty clip give None."""
    assert score(render(0)) == ("red", "circle", "left")
    assert score(render(0)[::-1]) == ("red", "circle", "right")
    assert score(render(0)[..., ::-1]) == ("blue", "circle", "left")
    assert score(render(0).swapaxes(1, 2)) == ("red", "circle", "up")
    assert score(np.full((17, 64, 64, 3), 64, np.uint8)) is None
    assert score(np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)) is None
    assert tally([None, ("red", "circle", "up")], [("red", "circle", "up")] * 2) == {
        "colour": 0.5,
        "shape": 0.5,
        "direction": 0.5,
    }
