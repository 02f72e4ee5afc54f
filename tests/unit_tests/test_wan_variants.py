"""The image-to-video forms of Wan against diffusers' class with the same weights; sizes and FLOPs of every flavor."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import diffusers_wan, hf_state_dict, load_from_hf_state_dict
from titan_video.models.layers import attention_flops, patchify, positions, token_shape, unpatchify
from titan_video.models.wan import SPEC, WanArgs, WanModel, args_from_hf
from titan_video.weights.export.save import save_hf
from titan_video.weights.hf_storage import load_hf

GRID = (3, 6, 10)  # 3 x 3 x 5 tokens: odd
SHAPE = token_shape(GRID, (1, 2, 2))
T2V = WanArgs(
    dim=48, num_heads=4, num_layers=2, ffn_dim=80, text_dim=20, text_len=512, freq_dim=32, in_channels=5, out_channels=5
)
IMAGE = {"in_channels": 11, "image_dim": 28, "image_len": 257}
VARIANTS = {
    "t2v": T2V,
    "i2v": replace(T2V, **IMAGE),
    "flf2v": replace(T2V, **IMAGE | {"image_len": 514, "image_positions": True}),
    "i2v-A14B": replace(T2V, in_channels=11),
    "ti2v": replace(T2V, text_len=30, clean_first_frame=True),
}


def relative(a, b):
    return ((a - b).double().norm() / b.double().norm()).item()


def make_inputs(args, batch=2, seed=1):
    """x with its condition's channels, times, text, image tokens or None, clean tokens or None, target."""
    g = torch.Generator().manual_seed(seed)
    x, target = (torch.randn(batch, c, *GRID, generator=g) for c in (args.in_channels, args.out_channels))
    text = 4 * torch.randn(
        batch, args.text_len, args.text_dim, generator=g
    )  # where attention is flat, gradients of keys are rounding only
    text[0, args.text_len * 3 // 5 :] = 0
    # Small, so that the epsilon of the image's norm is seen.
    image = 0.03 * torch.randn(batch, args.image_len, args.image_dim, generator=g) if args.image_dim else None
    clean = positions(SHAPE)[..., 0] == 0 if args.clean_first_frame else None
    return x, torch.tensor([999.0, 3.25])[:batch], text, image, clean, target


def ours_forward(model, x, t, text, image, clean):
    tokens = model(patchify(x, model.args.patch), positions(SHAPE), t, text, image_BSD=image, cond_mask_BL=clean)
    return unpatchify(tokens, SHAPE, model.args.patch)


def theirs_forward(model, x, t, text, image, clean):
    """diffusers takes a time per token, and two images as two rows of the batch."""
    times = t if clean is None else torch.where(clean, 0, t[:, None])
    if model.config.pos_embed_seq_len:
        image = image.reshape(-1, model.config.pos_embed_seq_len // 2, image.shape[-1])
    return model(x, times, text, encoder_hidden_states_image=image, return_dict=False)[0]


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request):
    args = VARIANTS[request.param]
    theirs, ours = diffusers_wan(args), WanModel(args)
    load_from_hf_state_dict(ours, SPEC, args, theirs.state_dict())
    return ours, theirs


def test_forward_and_every_gradient_equal_diffusers(pair):
    ours, theirs = pair
    *inputs, target = make_inputs(ours.args)
    out, ref = ours_forward(ours, *inputs), theirs_forward(theirs, *inputs)
    assert relative(out, ref) <= 1e-5
    ((out - target) ** 2).sum().backward()
    ((ref - target) ** 2).sum().backward()
    assert [n for n, p in ours.named_parameters() if p.grad is None or not p.grad.any()] == []
    grads = hf_state_dict({n: p.grad for n, p in ours.named_parameters()}, SPEC, ours.args)
    reference = {n: p.grad for n, p in theirs.named_parameters()}
    assert grads.keys() == reference.keys()
    assert {n: e for n in grads if (e := relative(grads[n], reference[n])) > 1e-4} == {}
    ours.zero_grad(), theirs.zero_grad()


def test_bfloat16_is_no_further_from_float32_than_diffusers(pair):
    """Averaged over inputs: single errors of the two scatter by some percent around each other, their mean ratio by
    half a percent.
    """
    ours, theirs = pair
    low, their_low = WanModel(ours.args), diffusers_wan(ours.args)
    for copy, model, keep in ((low, ours, SPEC.plan.fp32), (their_low, theirs, their_low._keep_in_fp32_modules)):
        copy.load_state_dict(model.state_dict())
        for name, p in copy.named_parameters():
            p.data = p.data if any(k in name for k in keep) else p.data.bfloat16()
    our_error, their_error = 0.0, 0.0
    for seed in range(10):
        x, t, text, image, clean, _ = make_inputs(ours.args, seed=seed)
        with torch.no_grad():
            ref = theirs_forward(theirs, x, t, text, image, clean)
            our_error += relative(ours_forward(low, x, t, text, image, clean), ref)
            rounded = None if image is None else image.bfloat16()
            their_error += relative(theirs_forward(their_low, x.bfloat16(), t, text.bfloat16(), rounded, clean), ref)
    assert 0 < our_error <= 1.01 * their_error < 1


def count_flops(model, *inputs):
    def count_sdpa(q, k, v, *args, **kwargs):
        (B, H, L, K), S = q, k[2]
        return attention_flops(B, L, S, H * K)

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={op: count_sdpa}) as counter, torch.no_grad():
        ours_forward(model, *inputs)
    return counter.get_total_flops()


def test_flops_equal_a_counted_forward(pair):
    args = pair[0].args
    assert count_flops(pair[0], *make_inputs(args)[:-1]) == args.flops(SHAPE.num_tokens, batch=2)


def test_weights_round_trip_through_a_diffusers_folder(pair, tmp_path):
    """diffusers -> ours -> diffusers: the same names, bitwise the same tensors, the same configuration."""
    args, (_, theirs) = pair[0].args, pair
    theirs.save_pretrained(tmp_path / "theirs")
    ours = WanModel(args)
    load_hf(ours, tmp_path / "theirs", SPEC, args)
    save_hf(ours, tmp_path / "ours", SPEC, args, torch.float32)
    before, after = (load_file(tmp_path / side / "diffusion_pytorch_model.safetensors") for side in ("theirs", "ours"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    back = type(theirs).from_pretrained(tmp_path / "ours")
    assert {k: v for k, v in back.config.items() if k[0] != "_"} == {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }
    read = args_from_hf(dict(back.config))
    assert replace(read, text_len=args.text_len, clean_first_frame=args.clean_first_frame) == args


def test_the_unused_norm_of_published_folders_is_passed_over_and_nothing_else(pair, tmp_path):
    args = pair[0].args
    pair[1].save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors, loaded = load_file(path), WanModel(args)
    save_file(tensors | {"blocks.0.attn2.norm_added_q.weight": torch.ones(args.dim)}, path)
    load_hf(loaded, tmp_path, SPEC, args)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), pair[0].parameters(), strict=True))
    save_file(tensors | {"blocks.0.attn1.norm_added_q.weight": torch.ones(args.dim)}, path)
    with pytest.raises(ValueError, match="1 extra: blocks.0.attn1.norm_added_q.weight"):
        load_hf(loaded, tmp_path, SPEC, args)


COUNTS = {
    "t2v-1.3B": 1_418_996_800,
    "t2v-14B": 14_288_491_584,
    "i2v-14B": 16_394_878_784,
    "flf2v-14B": 16_395_536_704,
    "t2v-A14B": 14_288_491_584,
    "i2v-A14B": 14_288_901_184,
    "ti2v-5B": 4_999_787_712,
    "t2v-5B": 4_999_787_712,
}
PROXIES = {"proxy-debug", "proxy-t2v-1.3B", "proxy-t2v-14B", "proxy-ti2v-5B", "proxy-t2v-5B"}


@pytest.mark.parametrize("flavor", COUNTS)
def test_parameter_counts_are_exact(flavor):
    with torch.device("meta"):
        model = WanModel(SPEC.flavors[flavor])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[flavor]


def test_every_flavor_is_counted_or_for_debugging_or_narrow():
    debug = {"debug", "debug-i2v", "debug-flf2v", "debug-i2v-A14B", "debug-ti2v"}
    mixtures = {name for name, args in SPEC.flavors.items() if args.experts}
    assert SPEC.flavors.keys() - COUNTS.keys() == debug | PROXIES | mixtures
    assert mixtures == {"moe-debug", "moe-debug-expert-choice", "moe-1.3B", "moe-14B-shared", "moe-14B-copies"}


def test_the_5B_is_one_model_for_both_tasks():
    both, text = SPEC.flavors["ti2v-5B"], SPEC.flavors["t2v-5B"]
    assert both.conditioning.num_cond_frames == 1 and text.conditioning.num_cond_frames == 0
    assert SPEC.args_to_hf(both) == SPEC.args_to_hf(text) and SPEC.args_to_original(both) == SPEC.args_to_original(text)
    assert SPEC.args_to_original(both)["model_type"] == "ti2v"


@pytest.mark.parametrize(
    "flavor, num_tokens, teraflops",
    [
        ("t2v-1.3B", 32760, 283.0),
        ("t2v-14B", 32760, 1678.4),
        ("i2v-14B", 32760, 1686.4),
        ("i2v-14B", 75600, 6540.5),
        ("ti2v-5B", 27280, 517.0),
    ],
)
def test_published_flops(flavor, num_tokens, teraflops):
    """81 frames of 480 x 832 and 720 x 1280; 121 of 704 x 1280 for the 5B."""
    assert SPEC.flavors[flavor].flops(num_tokens) == pytest.approx(teraflops * 1e12, rel=1e-4)


def test_debug_flavors_fit_the_debug_encoders_and_cover_each_kind():
    for flavor, args in SPEC.flavors.items():
        if flavor.startswith("debug"):
            assert (args.out_channels, args.text_dim, args.in_channels - args.out_channels in (0, 20)) == (16, 64, True)
    kinds = {
        n: (a.in_channels - a.out_channels, a.image_len, a.image_positions, a.clean_first_frame)
        for n, a in SPEC.flavors.items()
    }
    assert set(kinds.values()) == {kind for n, kind in kinds.items() if n.startswith("debug")}


# ---- clean tokens ----


@pytest.fixture(scope="module")
def ti2v():
    torch.manual_seed(0)
    args = VARIANTS["ti2v"]
    model = WanModel(args)
    load_from_hf_state_dict(model, SPEC, args, diffusers_wan(args).state_dict())
    return model


def test_no_clean_token_and_a_mask_without_any_are_the_same(ti2v):
    x, t, text, image, clean, _ = make_inputs(ti2v.args)
    with torch.no_grad():
        assert torch.equal(
            ours_forward(ti2v, x, t, text, image, None), ours_forward(ti2v, x, t, text, image, clean & False)
        )


def test_a_mask_may_differ_between_clips(ti2v):
    x, t, text, image, clean, _ = make_inputs(ti2v.args)
    with torch.no_grad():
        both = ours_forward(ti2v, x, t, text, image, torch.cat([clean, clean & False]))
        torch.testing.assert_close(both[:1], ours_forward(ti2v, x, t, text, image, clean)[:1])
        torch.testing.assert_close(both[1:], ours_forward(ti2v, x, t, text, image, None)[1:])


def test_time_is_projected_once_per_distinct_time(ti2v):
    """The time's share of a pipeline stage's state and of the FLOPs does not grow with the clip."""
    x, t, text, image, clean, _ = make_inputs(ti2v.args)
    _, time_BTD, time_BTE, _ = ti2v.embed(patchify(x, ti2v.args.patch), t, text)
    assert (time_BTD.shape, time_BTE.shape) == ((2, 2, 48), (2, 2, 6 * 48))


def test_a_slice_of_the_tokens_gives_the_slice_of_the_embedding_and_head(ti2v):
    """What sequence parallelism relies on: outside attention each token, with its own element of the mask, is for
    itself.
    """
    x, t, text, image, clean, _ = make_inputs(ti2v.args)
    tokens = patchify(x, ti2v.args.patch)
    with torch.no_grad():
        state = ti2v.embed(tokens, t, text)
        part = ti2v.embed(tokens[:, 4:9], t, text)
        torch.testing.assert_close(ti2v.head(*part, clean[:, 4:9]), ti2v.head(*state, clean)[:, 4:9])


def test_wrong_image_tokens_are_refused():
    for variant, num_image_tokens in (("i2v", None), ("i2v", 514), ("t2v", 257), ("flf2v", 257)):
        args = VARIANTS[variant]
        with torch.device("meta"):
            model = WanModel(args)
        x, t, text, *_ = make_inputs(args)
        image = None if num_image_tokens is None else torch.zeros(2, num_image_tokens, 28)
        with pytest.raises(
            ValueError, match=f"{args.image_len} image tokens, got {num_image_tokens or 0}: choose model.flavor"
        ):
            model.embed(patchify(x, args.patch), t, text, image)


def test_initial_weights_of_the_image_branch():
    with torch.device("meta"):
        names = dict(WanModel(VARIANTS["flf2v"]).named_parameters())
    g = torch.Generator().manual_seed(0)
    filled = {}
    for name, p in names.items():
        filled[name] = torch.full(p.shape, float("nan"))
        SPEC.init_parameter(name, filled[name], g)
    assert not any(t.isnan().any() for t in filled.values())
    ones = {n for n, t in filled.items() if (t == 1).all()}
    zeros = {n for n, t in filled.items() if not t.any()}
    assert {
        "image_embedder.norm_in_weight",
        "image_embedder.norm_out_weight",
        "blocks.0.cross_attn.norm_k_image",
    } <= ones
    assert {
        "image_embedder.positions",
        "image_embedder.norm_in_bias",
        "image_embedder.norm_out_bias",
        "blocks.0.cross_attn.k_image.bias",
    } <= zeros
    assert not {"image_embedder.up.weight", "image_embedder.down.weight", "blocks.0.cross_attn.v_image.weight"} & (
        ones | zeros
    )
