"""What model families declare: the geometry of their latent spaces."""

from dataclasses import replace

import pytest

from titan_video.models import FAMILIES, get_spec
from titan_video.models.spec import LatentGeometry

FLAVORS = [(family, flavor) for family in FAMILIES for flavor in get_spec(family).flavors]


@pytest.mark.parametrize("family, flavor", FLAVORS)
def test_shapes_of_latents_and_pixels_are_inverse(family, flavor):
    spec = get_spec(family)
    args = spec.flavors[flavor]
    geometry = spec.geometry(args)
    channels, *latent_FHW = geometry.latent_shape((81, 480, 832))
    assert channels == args.out_channels
    assert geometry.pixel_shape(latent_FHW) == (81, 480, 832)
    for grid in ((1, 2, 4), (2, 6, 2), (21, 30, 52)):
        assert geometry.latent_shape(geometry.pixel_shape(grid)) == (channels, *grid)


def test_published_geometries():
    wan, hunyuan = get_spec("wan"), get_spec("hunyuan_video")
    in_16_channels = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=8)
    in_48_channels = LatentGeometry(channels=48, temporal_stride=4, spatial_stride=16)
    assert in_16_channels.latent_shape((81, 480, 832)) == (16, 21, 60, 104)
    assert in_48_channels.latent_shape((121, 704, 1280)) == (48, 31, 44, 80)
    for flavor in ("debug", "t2v-1.3B", "i2v-14B", "flf2v-14B", "i2v-A14B"):
        assert wan.geometry(wan.flavors[flavor]) == in_16_channels
    for flavor in ("ti2v-5B", "t2v-5B"):
        assert wan.geometry(wan.flavors[flavor]) == in_48_channels
    for flavor in hunyuan.flavors:
        assert hunyuan.geometry(hunyuan.flavors[flavor]) == in_16_channels


def test_channels_of_no_known_vae_are_refused():
    wan = get_spec("wan")
    with pytest.raises(ValueError, match=r"model.flavor: the model has 32 latent channels; Wan VAEs have \[16, 48\]"):
        wan.geometry(replace(wan.flavors["debug"], in_channels=32, out_channels=32))
