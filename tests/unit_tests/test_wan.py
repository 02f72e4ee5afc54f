"""Wan text-to-video against diffusers' class with the same weights: forward, every gradient, configuration.

Other variants: test_wan_variants.py.
"""

from dataclasses import replace

import pytest
import torch

from tests.helpers import diffusers_wan, hf_state_dict, load_from_hf_state_dict
from titan_video.models import get_args, get_spec
from titan_video.models.layers import patchify, positions, token_shape, unpatchify
from titan_video.models.wan import SPEC, WanArgs, WanModel, args_from_hf, args_to_hf

ARGS = WanArgs(
    dim=48, num_heads=4, num_layers=3, ffn_dim=80, text_dim=20, text_len=512, freq_dim=32, in_channels=6, out_channels=5
)
GRID = (3, 6, 10)  # 3 x 3 x 5 tokens: odd


def relative(a, b):
    return ((a - b).double().norm() / b.double().norm()).item()


def make_inputs(args=ARGS, batch=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(batch, args.in_channels, *GRID, generator=g)
    text = torch.randn(batch, args.text_len, args.text_dim, generator=g)
    text[0, 300:] = 0
    return latents, torch.tensor([999.0, 3.25])[:batch], text, torch.randn(batch, args.out_channels, *GRID, generator=g)


def ours_forward(model, latents, t, text):
    shape = token_shape(latents.shape[2:], model.args.patch)
    tokens = model(patchify(latents, model.args.patch), positions(shape), t, text)
    return unpatchify(tokens, shape, model.args.patch)


@pytest.fixture(scope="module")
def pair():
    theirs = diffusers_wan(ARGS)
    ours = WanModel(ARGS)
    load_from_hf_state_dict(ours, SPEC, ARGS, theirs.state_dict())
    return ours, theirs


def test_forward_and_every_gradient_equal_diffusers(pair):
    ours, theirs = pair
    latents, t, text, target = make_inputs()
    out, ref = ours_forward(ours, latents, t, text), theirs(latents, t, text, return_dict=False)[0]
    assert relative(out, ref) <= 1e-5
    ((out - target) ** 2).sum().backward()
    ((ref - target) ** 2).sum().backward()
    grads = hf_state_dict({n: p.grad for n, p in ours.named_parameters()}, SPEC, ARGS)
    reference = {n: p.grad for n, p in theirs.named_parameters()}
    assert grads.keys() == reference.keys()
    assert {n: e for n in grads if (e := relative(grads[n], reference[n])) > 1e-4} == {}
    ours.zero_grad(), theirs.zero_grad()


def test_bfloat16_is_no_further_from_float32_than_diffusers(pair):
    """Averaged over inputs: single errors of the two scatter by some percent around each other."""
    ours, theirs = pair
    low, their_low = WanModel(ARGS), diffusers_wan(ARGS)
    for copy, model, keep in ((low, ours, SPEC.plan.fp32), (their_low, theirs, their_low._keep_in_fp32_modules)):
        copy.load_state_dict(model.state_dict())
        for name, p in copy.named_parameters():
            p.data = p.data if any(k in name for k in keep) else p.data.bfloat16()
    our_error, their_error = 0.0, 0.0
    for seed in range(24):
        latents, t, text, _ = make_inputs(seed=seed)
        with torch.no_grad():
            ref = theirs(latents, t, text, return_dict=False)[0]
            our_error += relative(ours_forward(low, latents, t, text), ref)
            their_error += relative(their_low(latents.bfloat16(), t, text.bfloat16(), return_dict=False)[0], ref)
    assert 0 < our_error <= their_error < 1


def test_patchify_round_trip_and_refusal():
    x = torch.randn(2, 3, 2, 4, 6)
    shape = token_shape((2, 4, 6), (1, 2, 2))
    tokens = patchify(x, (1, 2, 2))
    assert tokens.shape == (2, shape.num_tokens, 12)
    assert torch.equal(unpatchify(tokens, shape, (1, 2, 2)), x)
    with pytest.raises(ValueError, match="not divisible"):
        patchify(torch.randn(1, 3, 2, 5, 6), (1, 2, 2))


def test_hf_config_round_trip_and_refusals(tmp_path):
    for args in (*SPEC.flavors.values(), ARGS):
        read = args_from_hf(args_to_hf(args))
        read = replace(read, text_len=args.text_len, boundary=args.boundary)  # which that file does not hold
        # Nor does it say whether the first frame may be clean: 48 channels are taken for the 5B model, which does.
        assert read == replace(args, clean_first_frame=args.in_channels == 48)
    with pytest.raises(ValueError, match="added_kv_proj_dim = None does not go with image_dim = 1280"):
        args_from_hf(args_to_hf(ARGS) | {"image_dim": 1280})
    with pytest.raises(ValueError, match="added_kv_proj_dim = 48 does not go with image_dim = None"):
        args_from_hf(args_to_hf(ARGS) | {"added_kv_proj_dim": 48})
    with pytest.raises(ValueError, match="pos_embed_seq_len = 514 needs image tokens"):
        args_from_hf(args_to_hf(ARGS) | {"pos_embed_seq_len": 514})
    with pytest.raises(ValueError, match="qk_norm"):
        args_from_hf(args_to_hf(ARGS) | {"qk_norm": "rms_norm"})
    with pytest.raises(ValueError, match="num_layers"):
        args_from_hf({k: v for k, v in args_to_hf(ARGS).items() if k != "num_layers"})
    with pytest.raises(ValueError, match="does not exist"):
        get_args(get_spec("wan"), "hf", str(tmp_path), 512)
    with pytest.raises(ValueError, match="t2v-1.3B"):
        get_args(get_spec("wan"), "t2v-1.3b", "", 512)


def test_wrong_text_length_is_refused(pair):
    latents, t, text, _ = make_inputs()
    with pytest.raises(ValueError, match="max_text_length"):
        ours_forward(pair[0], latents, t, text[:, :100])
