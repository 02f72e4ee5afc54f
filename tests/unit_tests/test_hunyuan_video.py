"""Every published HunyuanVideo against diffusers' class with the same weights: forward, gradients, names, counts."""

import copy
import inspect
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import build_denoising, hf_state_dict, load_from_hf_state_dict, run_ranks
from titan_video.data.batch import Batch
from titan_video.encoders.debug import DebugEncoders
from titan_video.models import get_args, get_spec
from titan_video.models.hunyuan_video import SPEC, HunyuanVideoArgs, HunyuanVideoModel, args_from_hf, args_to_hf
from titan_video.models.hunyuan_video.blocks import JointInnerAttention
from titan_video.models.layers import attention_flops, patchify, positions, token_shape, unpatchify
from titan_video.models.spec import StepLayout
from titan_video.weights.export.save import save_hf
from titan_video.weights.hf_storage import load_hf

T2V = HunyuanVideoArgs(
    dim=48,
    num_heads=4,
    num_double_layers=2,
    num_single_layers=2,
    ffn_dim=96,
    in_channels=5,
    out_channels=5,
    text_dim=20,
    text_len=11,
    pooled_dim=10,
    axes_dim=(2, 4, 6),
)
FORMS = {
    "t2v": T2V,
    "t2v without guidance": replace(T2V, guidance=False),
    "latent_concat": replace(T2V, in_channels=11, guidance=False, image_condition="latent_concat"),
    "token_replace": replace(T2V, image_condition="token_replace"),
}
GRID = (3, 6, 10)  # 3 x 3 x 5 tokens: odd
FIRST = 15  # tokens of the first latent frame


def relative(a, b):
    return ((a - b).double().norm() / b.double().norm()).item()


def wrong(grads, reference, limit):
    """Names of gradients that differ by more than limit, with the difference.

    A key's bias in the refiner, which has no norm behind it, adds the same to all scores of a query: its gradient is 0,
    and what is computed is rounding, which is measured against the value's.
    """
    assert grads.keys() == reference.keys()
    scale = {
        n: reference[n.replace("to_k.bias", "to_v.bias")] if "refiner_blocks" in n else reference[n] for n in grads
    }
    errors = {n: ((grads[n] - reference[n]).double().norm() / scale[n].double().norm()).item() for n in grads}
    return {n: e for n, e in errors.items() if not e <= limit}


def diffusers_model(args):
    """The oracle, with random weights that leave nothing at zero."""
    from diffusers import HunyuanVideoTransformer3DModel

    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(**{k: v for k, v in args_to_hf(args).items() if not k.startswith("_")})
    with torch.no_grad():
        for name, p in model.named_parameters():
            norm = "norm" in name and "linear" not in name and name.endswith("weight")
            p.copy_(1 + 0.1 * torch.randn_like(p) if norm else torch.randn_like(p) * (0.5 * p[0].numel() ** -0.5))
    return model


def make_inputs(args=T2V, seed=1):
    """Latents, time, text, its mask, what else the model takes, and a target; the two texts differ in length."""
    g = torch.Generator().manual_seed(seed)
    latents, target = (
        torch.randn(2, channels, *GRID, generator=g) for channels in (args.in_channels, args.out_channels)
    )
    text, pooled = (
        torch.randn(2, args.text_len, args.text_dim, generator=g),
        torch.randn(2, args.pooled_dim, generator=g),
    )
    mask = torch.arange(args.text_len) < torch.tensor([[args.text_len], [4]])
    cond = {"pooled_text_BD": pooled} | ({"guidance_B": torch.tensor([6000.0, 1000.0])} if args.guidance else {})
    return latents, torch.tensor([999.0, 3.25]), text, mask, cond, target


def run_ours(model, latents, t, text, mask, cond):
    args, shape = model.args, token_shape(latents.shape[2:], model.args.patch)
    pos = positions(shape)
    clean = {"cond_mask_BL": pos[..., 0] == 0} if args.clean_first_frame else {}
    return unpatchify(model(patchify(latents, args.patch), pos, t, text, mask, **cond, **clean), shape, args.patch)


def run_theirs(model, latents, t, text, mask, cond):
    return model(latents, t, text, mask, cond["pooled_text_BD"], cond.get("guidance_B"), return_dict=False)[0]


def make_pair(args):
    theirs, ours = diffusers_model(args), HunyuanVideoModel(args)
    load_from_hf_state_dict(ours, SPEC, args, theirs.state_dict())
    return ours, theirs


@pytest.fixture(scope="module")
def pair():
    return make_pair(T2V)


@pytest.mark.parametrize("form", FORMS)
def test_forward_and_every_gradient_equal_diffusers(form):
    args = FORMS[form]
    ours, theirs = make_pair(args)
    *inputs, target = make_inputs(args)
    out, ref = run_ours(ours, *inputs), run_theirs(theirs, *inputs)
    assert relative(out, ref) <= 1e-5
    ((out - target) ** 2).sum().backward()
    ((ref - target) ** 2).sum().backward()
    grads = hf_state_dict({n: p.grad for n, p in ours.named_parameters()}, SPEC, args)
    reference = {n: p.grad for n, p in theirs.named_parameters()}
    assert wrong(grads, reference, 1e-4) == {}


def test_a_mask_with_gaps_means_what_it_means_to_diffusers(pair):
    """The refiner leaves out the very tokens, the blocks as many at the end."""
    latents, t, text, mask, cond, _ = make_inputs()
    mask[1, 0], mask[1, 7] = False, True  # the first token is seen all the same
    with torch.no_grad():
        assert (
            relative(run_ours(pair[0], latents, t, text, mask, cond), run_theirs(pair[1], latents, t, text, mask, cond))
            <= 1e-5
        )


def test_padding_of_text_and_video_changes_nothing(pair):
    ours, _ = pair
    latents, t, text, mask, cond, _ = make_inputs()
    x, pos = patchify(latents, T2V.patch), positions(token_shape(GRID, T2V.patch))
    seq_len, mask = x.shape[1], mask & (torch.arange(T2V.text_len) < 9)
    layout = StepLayout(seq_len)
    with torch.no_grad():
        expected = ours(x, pos, t, text[:, :9], mask[:, :9], **cond)
        x, pos = F.pad(x, (0, 0, 0, 3), value=7.0), F.pad(pos, (0, 0, 0, 3))
        text = torch.where(mask.unsqueeze(-1), text, 1e3)
        torch.testing.assert_close(
            ours(x, pos, t, text, mask, layout, **cond)[:, :seq_len], expected, atol=1e-6, rtol=1e-5
        )
        whole = ours(x, pos, t, text[:, :4], None, layout, **cond)
        torch.testing.assert_close(whole, ours(x, pos, t, text[:, :4], mask[:, :4], layout, **cond))


def test_joint_attention_is_attention_to_the_keys_that_count():
    g = torch.Generator().manual_seed(0)
    video, text = torch.randn(3, 2, 6, 2, 4, generator=g).double(), torch.randn(3, 2, 5, 2, 4, generator=g).double()
    mask, seq_len = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool(), 4
    out, text_out = JointInnerAttention()(*video, *text, mask, StepLayout(seq_len))
    for b, num_text in enumerate((5, 2)):
        q = torch.cat([video[0, b], text[0, b]])
        k, v = (torch.cat([video[i, b, :seq_len], text[i, b, :num_text]]) for i in (1, 2))
        expected = torch.einsum("hqk,khc->qhc", (torch.einsum("qhc,khc->hqk", q, k) / 2).softmax(-1), v)
        torch.testing.assert_close(torch.cat([out[b], text_out[b]]), expected)


def test_clean_tokens_are_known_by_their_mark_alone():
    """A rank that has some of the tokens has some of the marks, or none at all."""
    ours, _ = make_pair(FORMS["token_replace"])
    latents, t, text, mask, cond, _ = make_inputs()
    x, pos = patchify(latents, T2V.patch), positions(token_shape(GRID, T2V.patch))
    with torch.no_grad():
        with_none, unmarked = (
            ours(x, pos, t, text, mask, **cond, cond_mask_BL=clean)
            for clean in (None, torch.zeros(1, x.shape[1], dtype=torch.bool))
        )
        torch.testing.assert_close(with_none, unmarked)
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(0))
        clean = pos[..., 0] == 0
        assert clean.sum() == FIRST
        out = ours(x, pos, t, text, mask, **cond, cond_mask_BL=clean)
        assert relative(out, with_none) > 1e-2
        shuffled = ours(x[:, order], pos[:, order], t, text, mask, **cond, cond_mask_BL=clean[:, order])
        torch.testing.assert_close(shuffled, out[:, order], atol=1e-5, rtol=1e-5)


def low_precision(model, keep):
    """The model as mixed precision computes it: bfloat16, but for what stays in float32."""
    copy = type(model)(model.args) if isinstance(model, HunyuanVideoModel) else type(model).from_config(model.config)
    copy.load_state_dict(model.state_dict())
    for name, p in copy.named_parameters():
        p.data = p.data if name.split(".")[0] in keep else p.data.bfloat16()
    return copy


@pytest.mark.parametrize("form", ["t2v", "token_replace"])
def test_bfloat16_is_no_further_from_float32_than_diffusers(form):
    """Summed over inputs: single errors of the two scatter by some percent around each other.

    The parts in float32 are worth their bytes.
    """
    ours, theirs = make_pair(FORMS[form])
    low, all_low, their_low = low_precision(ours, SPEC.plan.fp32), low_precision(ours, ()), low_precision(theirs, ())
    our_error = all_low_error = their_error = 0.0
    for seed in range(12):
        latents, t, text, mask, cond, _ = make_inputs(FORMS[form], seed)
        their_cond = cond | {"pooled_text_BD": cond["pooled_text_BD"].bfloat16()}
        with torch.no_grad():
            ref = run_theirs(theirs, latents, t, text, mask, cond)
            our_error += relative(run_ours(low, latents, t, text, mask, cond), ref)
            all_low_error += relative(run_ours(all_low, latents, t, text, mask, cond), ref)
            their_error += relative(
                run_theirs(their_low, latents.bfloat16(), t, text.bfloat16(), mask, their_cond), ref
            )
    assert 0 < our_error < 0.95 * all_low_error and all_low_error <= their_error < 2


def test_float64_goes_through():
    ours, _ = make_pair(FORMS["token_replace"])
    latents, t, text, mask, cond, _ = make_inputs()
    with torch.no_grad():
        out = run_ours(ours, latents, t, text, mask, cond)
        wide_cond = cond | {"pooled_text_BD": cond["pooled_text_BD"].double()}
        out64 = run_ours(ours.double(), latents.double(), t, text.double(), mask, wide_cond)
    assert out64.dtype == torch.float64 and relative(out, out64) < 1e-5
    assert not torch.equal(out64, out64.float().double())


COUNTS = {"t2v-13B": 12_821_012_544, "i2v-13B-latent-concat": 12_810_991_680, "i2v-13B-token-replace": 12_821_012_544}


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_parameter_counts_are_exact():
    with torch.device("meta"):
        models = {flavor: HunyuanVideoModel(SPEC.flavors[flavor]) for flavor in COUNTS}
        both = HunyuanVideoModel(replace(SPEC.flavors["i2v-13B-latent-concat"], guidance=True))
    assert {flavor: num_parameters(model) for flavor, model in models.items()} == COUNTS
    assert num_parameters(both) == 12_821_221_440
    model = models["t2v-13B"]
    assert (
        num_parameters(model.double_blocks["0"]) == 339_831_296
        and num_parameters(model.single_blocks["0"]) == 141_591_808
    )
    assert num_parameters(model.text_refiner) + num_parameters(model.text_condition) == 309_175_296


@pytest.mark.parametrize("form", FORMS)
def test_flops_equal_a_counted_forward(form):
    args = replace(FORMS[form], num_single_layers=3)  # unequal numbers, to distinguish them
    ours = HunyuanVideoModel(args)
    *inputs, _ = make_inputs(args)

    def count_sdpa(q, k, v, *rest, **kwargs):
        (B, H, L, K), S = q, k[2]
        return attention_flops(B, L, S, H * K)

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={op: count_sdpa}) as counter, torch.no_grad():
        run_ours(ours, *inputs)
    num_tokens = token_shape(GRID, args.patch).num_tokens
    assert counter.get_total_flops() == args.flops(num_tokens, batch=2)
    in_blocks = sum(
        sum(counts.values())
        for name, counts in counter.get_flop_counts().items()
        if name.count(".") == 2 and "_blocks." in name
    )
    assert in_blocks == args.block_flops(num_tokens, batch=2)


def test_published_flops():
    assert SPEC.flavors["t2v-13B"].flops(118_800) == pytest.approx(12068.6e12, rel=1e-3)
    assert SPEC.flavors["t2v-13B"].flops(34_320) == pytest.approx(1351.4e12, rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_round_trip_with_diffusers_is_bitwise(form, tmp_path):
    from diffusers import HunyuanVideoTransformer3DModel

    args, theirs = FORMS[form], diffusers_model(FORMS[form])
    theirs.save_pretrained(tmp_path / "theirs" / "transformer")
    read = get_args(get_spec("hunyuan_video"), "hf", str(tmp_path / "theirs"), args.text_len)
    assert replace(read, text_len=args.text_len) == args
    read = args
    ours = HunyuanVideoModel(read)
    load_hf(ours, tmp_path / "theirs" / "transformer", SPEC, read)
    assert (
        relative(*(run(m, *make_inputs(args)[:-1]).detach() for run, m in ((run_ours, ours), (run_theirs, theirs))))
        <= 1e-5
    )
    save_hf(ours, tmp_path / "ours", SPEC, read, torch.float32, max_shard_bytes=100_000)
    back, problems = HunyuanVideoTransformer3DModel.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(problems.values())
    assert all(back.config[key] == value for key, value in theirs.config.items() if not key.startswith("_"))
    state = back.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


def test_the_full_size_is_that_of_the_published_class():
    """diffusers' defaults are the published text-to-video model."""
    from diffusers import HunyuanVideoTransformer3DModel

    published = {
        name: p.default
        for name, p in inspect.signature(HunyuanVideoTransformer3DModel.__init__).parameters.items()
        if name != "self"
    }
    ours = {
        k: tuple(v) if isinstance(v, list) else v
        for k, v in args_to_hf(SPEC.flavors["t2v-13B"]).items()
        if not k.startswith("_")
    }
    assert ours == published


def test_hf_config_refusals():
    for args in SPEC.flavors.values():
        assert replace(args_from_hf(args_to_hf(args)), text_len=args.text_len) == args
    without = {k: v for k, v in args_to_hf(T2V).items() if k != "image_condition_type"}
    assert args_from_hf(without).image_condition == ""
    for change, reason in (
        ({"_class_name": "WanTransformer3DModel"}, "WanTransformer3DModel"),
        ({"qk_norm": None}, "qk_norm"),
        ({"image_condition_type": "other"}, "image_condition_type = 'other'"),
    ):
        with pytest.raises(ValueError, match=reason):
            args_from_hf(args_to_hf(T2V) | change)
    with pytest.raises(ValueError, match="num_single_layers"):
        args_from_hf({k: v for k, v in args_to_hf(T2V).items() if k != "num_single_layers"})
    with pytest.raises(ValueError, match="does not fit RoPE over"):
        HunyuanVideoModel(replace(T2V, axes_dim=(4, 4, 6)))
    with pytest.raises(ValueError, match="98"):
        HunyuanVideoModel(replace(T2V, ffn_dim=98))


def test_inputs_that_do_not_fit_are_refused(pair):
    latents, t, text, mask, cond, _ = make_inputs()
    for change, name in (
        ({"pooled_text_BD": None}, "pooled_text_BD"),
        ({"guidance_B": None}, "takes the guidance"),
        ({"cond_mask_BL": mask}, "cond_mask_BL"),
    ):
        with pytest.raises(ValueError, match=name):
            run_ours(pair[0], latents, t, text, mask, cond | change)
    with pytest.raises(ValueError, match="no guidance input"):
        run_ours(HunyuanVideoModel(FORMS["t2v without guidance"]), latents, t, text, mask, cond)


def debug_batch():
    encoders = DebugEncoders(max_text_length=16)
    frames = torch.zeros(2, 3, 5, 32, 32, dtype=torch.uint8)
    frames[0, 0], frames[1, 2, :, 8:24] = 255, 200
    texts = encoders.encode_text(["a red picture", "a blue bar in the dark"])
    mask = torch.arange(16) < torch.tensor([[len(text)] for text in texts])
    text = torch.stack([F.pad(text, (0, 0, 0, 16 - len(text))) for text in texts])
    cond = {"pooled_text_BD": text.sum(1)}
    return Batch({"video": encoders.encode_video(frames)}, text, mask, torch.arange(2), cond)


def initialised(args):
    model = HunyuanVideoModel(args)
    with torch.no_grad():
        for name, p in model.named_parameters():
            SPEC.init_parameter(name, p, torch.Generator().manual_seed(len(name)))
    return model


def test_the_debug_flavor_learns_two_clips():
    model, batch, g = initialised(SPEC.flavors["debug"]), debug_batch(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    task = build_denoising(SPEC, model.args)
    losses = []
    for _ in range(40):
        noise, s = torch.randn(batch.streams["video"].shape, generator=g), torch.rand(2, generator=g)
        inputs = task.add_noise(batch, noise, sigma_B=s)
        loss = task.loss(model(**inputs.kwargs), inputs).sum() / task.num_loss_elements(batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


def sharded_runs(weights):
    """On each of two ranks: output and gradients under FSDP, the loss halved as both have it, in both types; and loss
    and gradients under tensor parallel, in float64."""
    from titan_video.distributed.fsdp import apply_fsdp
    from titan_video.distributed.parallel_dims import ParallelDims
    from titan_video.distributed.sequence import SequenceShard
    from titan_video.distributed.tensor_parallel import apply_tensor_parallel

    def build():
        model = HunyuanVideoModel(FORMS["token_replace"])
        model.load_state_dict(pickle.loads(weights))
        return model

    results = []
    for dtype in (torch.float32, torch.bfloat16):
        model = build()
        apply_fsdp(model, SPEC.plan, ParallelDims(dp_shard=2).build_mesh("cpu"), dtype, torch.float32, "default")
        out, loss = squared_error(model)
        (loss / 2).backward()
        results.append((out.detach(), whole_grads(model)))
    model, meshes = build().double(), ParallelDims(tp=2).build_mesh("cpu")
    apply_tensor_parallel(model, SPEC.plan, meshes.tp, async_mode=False)
    apply_fsdp(model, SPEC.plan, meshes, torch.float64, torch.float64, "default")
    _, loss = squared_error(model, SequenceShard.from_meshes(meshes))
    loss.backward()
    return *results, (loss.detach(), whole_grads(model))


def whole_grads(model):
    grads = {n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()}
    return hf_state_dict(grads, SPEC, model.args)


def squared_error(model, shard=None):
    """Output on this rank's tokens, and their squared error, summed."""
    args, dtype = FORMS["token_replace"], torch.promote_types(next(model.parameters()).dtype, torch.float32)
    latents, t, text, mask, cond, target = (
        x if isinstance(x, dict) or not x.is_floating_point() else x.to(dtype) for x in make_inputs(args)
    )
    x, target, pos = (
        patchify(latents, args.patch),
        patchify(target, args.patch),
        positions(token_shape(GRID, args.patch)),
    )
    clean, layout, num_valid = pos[..., 0] == 0, None, x.shape[1]
    if shard is not None:
        layout, num_valid = shard.layout(x.shape[1]), shard.num_valid(x.shape[1])
        x, target, clean, pos = shard.slice(x), shard.slice(target), shard.slice(clean), shard.slice_for_attention(pos)
    out = model(x, pos, t.float(), text, mask, layout, **cond, cond_mask_BL=clean)
    return out, (out - target)[:, :num_valid].square().sum()


def test_sharded_and_split_equal_one_process():
    """FSDP with parts in float32, and tensor parallel with an odd number of tokens, the clean ones on one rank only."""
    ours, _ = make_pair(FORMS["token_replace"])
    *sharded, split = zip(*run_ranks(sharded_runs, 2, pickle.dumps(ours.state_dict())), strict=True)
    for (out, grads), model, limit in zip(
        (ranks[0] for ranks in sharded), (ours, low_precision(ours, SPEC.plan.fp32)), (1e-5, 2e-2), strict=True
    ):
        expected, loss = squared_error(model)
        loss.backward()
        assert out.dtype == model.proj_out.weight.dtype and torch.equal(out, expected)
        assert wrong(grads, whole_grads(model), limit) == {}
    upcast = copy.deepcopy(ours).double()
    upcast.zero_grad()
    _, loss = squared_error(upcast)
    loss.backward()
    assert sum(loss for loss, _ in split).item() == pytest.approx(loss.item(), rel=1e-10)
    assert wrong(split[0][1], whole_grads(upcast), 1e-10) == {}
