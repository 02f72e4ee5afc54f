"""The debug encoders that keep outlines apart from colours: geometry, fidelity, statistics."""

import pytest
import torch

from titan_video.config.job_config import Encoder
from titan_video.encoders import build_encoders
from titan_video.encoders.debug_outlines import HUE
from titan_video.ingest.files.shapes import BACKGROUND, COMBINATIONS, combination, render
from titan_video.ingest.shape_scores import score, tally


@pytest.fixture(scope="module")
def encoders():
    return build_encoders(Encoder(name="debug_outlines", max_text_length=8), "", "cpu")


def clips(is_large=True):
    """Of each combination, as the default run takes them: every second frame."""
    frames = [torch.from_numpy(render(i, is_large=is_large)[::2]) for i in range(COMBINATIONS)]
    return torch.stack(frames).permute(0, 4, 1, 2, 3)


def read(encoders, latents):
    frames = encoders.decode_video(latents).permute(0, 2, 3, 4, 1).numpy()
    return tally([score(clip) for clip in frames], [combination(i) for i in range(COMBINATIONS)])


@pytest.mark.parametrize("is_large", [True, False])
def test_a_reader_reads_noisy_latents(encoders, is_large):
    latents = encoders.encode_video(clips(is_large))
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    assert set(read(encoders, latents).values()) == set(read(encoders, latents + 0.3 * noise).values()) == {1.0}


def test_outlines_do_not_depend_on_the_colour(encoders):
    """Of one moving shape in two colours the coefficients, less the mean of nothing, are in one ratio."""
    frames = clips()[:1].float()
    cover = (frames - BACKGROUND).norm(dim=1, keepdim=True) / (frames - BACKGROUND).norm(dim=1).max()
    colours = torch.tensor([[200.0, 10.0, 64.0], [64.0, 64.0, 164.0]]).view(2, 3, 1, 1, 1)
    frames = (BACKGROUND + cover * (colours - BACKGROUND)) / 127.5 - 1
    empty = encoders.encode_video(torch.full_like(frames[:1], BACKGROUND / 127.5 - 1))
    red, blue = encoders.encode_video(frames) - empty
    ratio = (colours - BACKGROUND).flatten(1).norm(dim=1)
    torch.testing.assert_close(red[HUE:] / ratio[0], blue[HUE:] / ratio[1], rtol=1e-3, atol=1e-5)
    assert (red[:HUE] - blue[:HUE]).abs().max() > 1


def test_geometry(encoders):
    frames = torch.randint(0, 256, (2, 3, 13, 24, 40), dtype=torch.uint8)
    latents = encoders.encode_video(frames)
    assert latents.shape == (2, encoders.channels, 4, 3, 5) and latents.dtype == torch.float32
    again = encoders.decode_video(latents)
    assert again.shape == frames.shape and again.dtype == torch.uint8
    # Products of other numbers of rows are rounded in another way on some CPUs.
    torch.testing.assert_close(encoders.encode_video(frames[:, :, :1]), latents[:, :, :1], rtol=1e-5, atol=1e-5)
    other = frames.clone()
    other[:, :, 5:9] = 255 - other[:, :, 5:9]
    assert (encoders.encode_video(other) != latents).any(dim=(0, 1, 3, 4)).tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match="4k\\+1"):
        encoders.encode_video(frames[:, :, :12])
    with pytest.raises(ValueError, match="latents must be"):
        encoders.decode_video(latents[:, :15])


def test_latents_have_about_unit_variance(encoders):
    latents = encoders.encode_video(clips())
    for part in (latents[:, :, :1], latents[:, :, 1:]):
        std, mean = part.std(dim=(0, 2, 3, 4)), part.mean(dim=(0, 2, 3, 4))
        assert std.min() > 0.8 and std.max() < 1.25 and mean.abs().max() < 0.1


def test_what_the_cache_is_keyed_by(encoders):
    debug = build_encoders(Encoder(name="debug", max_text_length=8), "", "cpu")
    assert encoders.video_id() != debug.video_id() and encoders.text_id() == debug.text_id()
