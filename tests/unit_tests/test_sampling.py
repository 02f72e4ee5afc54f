"""Sampling against diffusers' pipelines with the same tiny weights: solvers, negative prompts, two experts; and what is
left to the model.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers import diffusers_wan, load_from_hf_state_dict
from tests.unit_tests.test_hunyuan_video import diffusers_model as diffusers_hunyuan
from tests.unit_tests.test_wan import ARGS as WAN_ARGS
from titan_video.config.job_config import Encoder, JobConfig, Model, Validation
from titan_video.flow.noise import draw_noise
from titan_video.flow.unipc import unipc
from titan_video.ingest.sampling_defaults import HUNYUAN_NEGATIVE, WAN_NEGATIVE, sampling_defaults, sampling_section
from titan_video.models import get_spec
from titan_video.models.hunyuan_video import SPEC as HUNYUAN
from titan_video.models.hunyuan_video import HunyuanVideoArgs, HunyuanVideoModel
from titan_video.models.wan import SPEC as WAN
from titan_video.models.wan import WanArgs, WanModel
from titan_video.sample import Experts, find_guidance
from titan_video.tasks.conditioning import COND_LATENTS
from titan_video.tasks.sampling import Prompt, SamplerSettings, sample_latents

STEPS, SHIFT = 6, 3.0
LATENT = (16, 3, 4, 6)
SIZE = {"num_frames": 9, "height": 32, "width": 48}


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("shift", [1.0, 3.0, 16.0])
def test_unipc_is_that_of_diffusers(num_steps, shift):
    from diffusers import UniPCMultistepScheduler

    g = torch.Generator().manual_seed(0)
    noise, direction = torch.randn(2, 8, 3, generator=g), torch.randn(1, 8, 3, generator=g)

    def velocity(x, sigma_B):
        s = sigma_B.view(-1, 1, 1)
        return torch.tanh(1.3 * x + s * direction) + x * s

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(num_steps)
    scheduler.set_begin_index(0)
    x, times = noise, []
    for t in scheduler.timesteps:
        times.append(t.item())
        x = scheduler.step(velocity(x, (t / 1000).expand(2)), t, x, return_dict=False)[0]
    seen = []
    ours = unipc(lambda x, s: seen.append(1000 * s[0].item()) or velocity(x, s), noise, num_steps, shift)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)
    assert seen == pytest.approx(times, abs=1e-3)  # whole timesteps


def scheduler(solver):
    """As published Wan folders name it, or Euler steps on our grid, which is that of HunyuanVideo's pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    if solver == "unipc":
        return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT)

    class Euler(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_steps=None, device=None, sigmas=None):
            super().set_timesteps(sigmas=np.linspace(1, 0, (num_steps or len(sigmas)) + 1)[:-1], device=device)

    return Euler(shift=SHIFT)


def make_prompt(args, seed, lengths=(7, 5), pooled=0):
    g = torch.Generator().manual_seed(seed)
    mask = torch.arange(args.text_len) < torch.tensor(lengths)[:, None]
    text = torch.randn(len(lengths), args.text_len, args.text_dim, generator=g) * mask[..., None]
    cond = {"pooled_text_BD": torch.randn(len(lengths), pooled, generator=g)} if pooled else {}
    return Prompt(text, mask, cond)


def noise(ids):
    return draw_noise(0, torch.tensor(ids), LATENT, stream="sampling")


def wan_pair(seed, **kind):
    sizes = {"in_channels": 16, "out_channels": 16, "num_layers": 1, "text_len": 16}
    args = WanArgs(**{**vars(WAN_ARGS), **sizes, **kind})
    theirs, ours = diffusers_wan(args), WanModel(args)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    load_from_hf_state_dict(ours, WAN, args, theirs.state_dict())
    return args, ours, theirs


def wan_pipeline(solver, name="WanPipeline", **parts):
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    pipeline = getattr(diffusers, name)(
        tokenizer=None, text_encoder=None, vae=vae, scheduler=scheduler(solver), **parts
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_wan_with_a_negative_prompt_is_diffusers_pipeline(solver):
    args, ours, theirs = wan_pair(0)
    prompt, negative = make_prompt(args, 1), make_prompt(args, 2, (9,))
    settings = SamplerSettings(num_steps=STEPS, guidance_scale=5.0, shift=SHIFT, solver=solver)
    latents = sample_latents(ours, args, prompt, negative, LATENT, [3, 4], settings)
    expected = wan_pipeline(solver, transformer=theirs)(
        prompt_embeds=prompt.text_BLD,
        negative_prompt_embeds=negative.text_BLD.expand_as(prompt.text_BLD),
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        latents=noise([3, 4]),
        output_type="latent",
        **SIZE,
    ).frames
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    empty = Prompt(torch.zeros_like(negative.text_BLD), torch.zeros_like(negative.mask_BL))
    assert (sample_latents(ours, args, prompt, empty, LATENT, [3, 4], settings) - expected).abs().max() > 1e-2


def latents_of(vae, video_BCFHW):
    """Normalised, as Wan's pipelines do."""
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std))
    with torch.no_grad():
        return (vae.encode(video_BCFHW).latent_dist.mode() - mean) / std


IMAGE_KINDS = {
    # diffusers takes the last 512 tokens for the text.
    "Wan 2.1": {"in_channels": 36, "image_dim": 24, "image_len": 5, "text_len": 512},
    "Wan 2.1, first and last frame": {
        "in_channels": 36,
        "image_dim": 24,
        "image_len": 10,
        "image_positions": True,
        "text_len": 512,
    },
    "Wan 2.2 A14B": {"in_channels": 36},
    "Wan 2.2 TI2V": {"clean_first_frame": True},
}


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_wan_from_an_image_with_a_negative_prompt_is_diffusers_pipeline(kind):
    args, ours, theirs = wan_pair(0, **IMAGE_KINDS[kind])
    g = torch.Generator().manual_seed(7)
    prompt, negative = make_prompt(args, 1, (7,)), make_prompt(args, 2, (args.text_len - 3,))
    images = [torch.rand(1, 3, SIZE["height"], SIZE["width"], generator=g) for _ in range(2)]
    tokens = torch.randn(1, args.image_len, args.image_dim, generator=g)
    is_clean, has_two = args.clean_first_frame, args.image_positions
    pipeline = wan_pipeline("euler", "WanImageToVideoPipeline", transformer=theirs, expand_timesteps=is_clean)
    pipeline.encode_image = lambda *_: tokens.reshape(1 + has_two, -1, args.image_dim)  # in place of CLIP

    video = torch.zeros(1, 3, SIZE["num_frames"], *images[0].shape[2:])
    video[:, :, 0] = 2 * images[0] - 1
    if has_two:
        video[:, :, -1] = 2 * images[1] - 1
    cond = {COND_LATENTS: latents_of(pipeline.vae, video[:, :, :1] if is_clean else video)}
    cond |= {"image_BSD": tokens} if args.image_len else {}
    settings = SamplerSettings(num_steps=STEPS, guidance_scale=5.0, shift=SHIFT)
    latents = sample_latents(ours, args, replace(prompt, cond=cond), negative, LATENT, [3], settings)
    expected = pipeline(
        image=images[0],
        last_image=images[1] if has_two else None,
        prompt_embeds=prompt.text_BLD,
        negative_prompt_embeds=negative.text_BLD,
        guidance_scale=5.0,
        num_inference_steps=STEPS,
        latents=noise([3]),
        output_type="latent",
        **SIZE,
    ).frames
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    empty = Prompt(torch.zeros_like(negative.text_BLD), torch.zeros_like(negative.mask_BL))
    other = sample_latents(ours, args, replace(prompt, cond=cond), empty, LATENT, [3], settings)
    assert (other - expected).abs().max() > 2e-3


@pytest.mark.parametrize("solver", ["euler", "unipc"])
def test_two_experts_have_a_guidance_scale_each(solver):
    args, high, their_high = wan_pair(0)
    _, low, their_low = wan_pair(5)
    prompt, negative = make_prompt(args, 1), make_prompt(args, 2, (9, 9))
    config = JobConfig(model=Model(flavor="t2v-A14B", expert="low", boundary=0.875))
    options = SimpleNamespace(guidance=4.0, low_guidance=None, size=(81, 480, 832))
    scale = find_guidance(options, config, WAN.flavors["t2v-A14B"])
    assert (scale(0.9), scale(0.875), scale(0.8)) == (4.0, 4.0, 3.0)  # 3.0: the low expert's own
    at = torch.tensor(0.9)  # in float32 below 0.9
    boundary = find_guidance(options, JobConfig(model=Model(flavor="i2v-A14B")), WAN.flavors["i2v-A14B"])
    assert boundary(at.item()) == 4.0 and Experts.is_high((1000 * at).item(), 0.9)
    settings = SamplerSettings(num_steps=STEPS, guidance_scale=scale, shift=SHIFT, solver=solver)
    model = Experts(high, low, 0.875)
    latents = sample_latents(model, args, prompt, negative, LATENT, [0, 1], settings)
    pipeline = wan_pipeline(solver, transformer=their_high, transformer_2=their_low, boundary_ratio=0.875)
    expected = pipeline(
        prompt_embeds=prompt.text_BLD,
        negative_prompt_embeds=negative.text_BLD,
        guidance_scale=4.0,
        guidance_scale_2=3.0,
        num_inference_steps=STEPS,
        latents=noise([0, 1]),
        output_type="latent",
        **SIZE,
    ).frames
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    options.low_guidance = 4.0
    assert find_guidance(options, config, WAN.flavors["t2v-A14B"]) == 4.0
    with pytest.raises(ValueError, match="--low-guidance"):
        find_guidance(options, None, WAN.flavors["t2v-14B"])


def hunyuan_pair(**kind):
    sizes = {"num_double_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "axes_dim": (2, 4, 6)}
    args = HunyuanVideoArgs(dim=48, num_heads=4, ffn_dim=96, text_dim=20, text_len=11, pooled_dim=10, **sizes, **kind)
    theirs, ours = diffusers_hunyuan(args), HunyuanVideoModel(args)
    load_from_hf_state_dict(ours, HUNYUAN, args, theirs.state_dict())
    return args, ours, theirs


def hunyuan_pipeline(name, **parts):
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=16
    )
    parts |= dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = getattr(diffusers, name)(vae=vae, scheduler=scheduler("euler"), **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("true_scale, embedded", [(3.0, 6.0), (1.0, 6.0)])
def test_hunyuan_with_a_negative_prompt_is_diffusers_pipeline(true_scale, embedded):
    args, ours, theirs = hunyuan_pair()
    prompt, negative = make_prompt(args, 1, pooled=10), make_prompt(args, 2, (9, 9), pooled=10)
    settings = SamplerSettings(STEPS, guidance_scale=true_scale, shift=SHIFT, embedded_guidance=embedded)
    latents = sample_latents(ours, args, prompt, negative, LATENT, [3, 4], settings)
    expected = hunyuan_pipeline("HunyuanVideoPipeline", transformer=theirs)(
        prompt_embeds=prompt.text_BLD,
        pooled_prompt_embeds=prompt.cond["pooled_text_BD"],
        prompt_attention_mask=prompt.mask_BL,
        negative_prompt_embeds=negative.text_BLD,
        negative_pooled_prompt_embeds=negative.cond["pooled_text_BD"],
        negative_prompt_attention_mask=negative.mask_BL,
        true_cfg_scale=true_scale,
        guidance_scale=embedded,
        num_inference_steps=STEPS,
        latents=noise([3, 4]),
        output_type="latent",
        **SIZE,
    ).frames
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["latent_concat", "token_replace"])
def test_hunyuan_from_an_image_with_a_negative_prompt_is_diffusers_pipeline(kind):
    is_concat = kind == "latent_concat"
    channels = {"in_channels": 33, "guidance": False} if is_concat else {}
    args, ours, theirs = hunyuan_pair(image_condition=kind, **channels)
    prompt, negative = make_prompt(args, 1, (7,), pooled=10), make_prompt(args, 2, (9,), pooled=10)
    image = torch.rand(1, 3, SIZE["height"], SIZE["width"], generator=torch.Generator().manual_seed(7))
    pipeline = hunyuan_pipeline("HunyuanVideoImageToVideoPipeline", transformer=theirs, image_processor=None)
    with torch.no_grad():
        cond_latents = pipeline.vae.encode(2 * image.unsqueeze(2) - 1).latent_dist.mode()
    cond = prompt.cond | {COND_LATENTS: cond_latents * pipeline.vae.config.scaling_factor}
    settings = SamplerSettings(STEPS, guidance_scale=3.0, shift=SHIFT, embedded_guidance=6.0)
    latents = sample_latents(ours, args, replace(prompt, cond=cond), negative, LATENT, [3], settings)
    expected = pipeline(
        image=image,
        prompt_embeds=prompt.text_BLD,
        pooled_prompt_embeds=prompt.cond["pooled_text_BD"],
        prompt_attention_mask=prompt.mask_BL,
        negative_prompt_embeds=negative.text_BLD,
        negative_pooled_prompt_embeds=negative.cond["pooled_text_BD"],
        negative_prompt_attention_mask=negative.mask_BL,
        true_cfg_scale=3.0,
        guidance_scale=6.0,
        num_inference_steps=STEPS,
        latents=noise([3]),
        output_type="latent",
        **SIZE,
    ).frames
    torch.testing.assert_close(latents[:, :, is_concat:], expected, rtol=1e-4, atol=1e-4)  # it cuts that frame off


# ---- what is left to the model ----


def section(family, flavor, size=(81, 480, 832), encoder="", expert="all", **validation):
    model = Model(name=family, flavor=flavor, expert=expert)
    config = JobConfig(
        model=model, encoder=Encoder(name=encoder or family), validation=Validation(enable=True, **validation)
    )
    return sampling_section(config, get_spec(family).flavors[flavor], size)


def test_shift_guidance_and_negative_prompt_are_the_models_own():
    cases = {
        ("wan", "t2v-1.3B", 480): (3, 5),
        ("wan", "t2v-14B", 720): (5, 5),
        ("wan", "i2v-14B", 480): (3, 5),
        ("wan", "i2v-14B", 720): (5, 5),
        ("wan", "flf2v-14B", 720): (16, 5),
        ("wan", "t2v-A14B", 720): (12, 4),
        ("wan", "i2v-A14B", 480): (5, 3.5),
        ("wan", "ti2v-5B", 480): (5, 5),
        ("wan", "t2v-5B", 720): (5, 5),
        ("hunyuan_video", "t2v-13B", 720): (7, 1),
        ("hunyuan_video", "i2v-13B-token-replace", 720): (7, 1),
        ("hunyuan_video", "i2v-13B-latent-concat", 480): (7, 1),
    }
    sizes = {480: (81, 480, 832), 720: (81, 720, 1280)}
    for (family, flavor, size), expected in cases.items():
        found = section(family, flavor, sizes[size])
        assert (found.sample_shift, found.guidance_scale) == expected, flavor
    flavors = {(f, name) for f in ("wan", "hunyuan_video") for name in get_spec(f).flavors}
    published = {(f, name) for f, name in flavors if not name.startswith(("debug", "proxy", "moe"))}
    assert {case[:2] for case in cases} == published
    assert section("wan", "t2v-A14B", expert="low").guidance_scale == 3
    assert section("wan", "t2v-14B", (81, 832, 480)).sample_shift == 3  # upright
    given = section("wan", "flf2v-14B", sample_shift=7.5, guidance_scale=2.0, negative_prompt="blurred")
    assert (given.sample_shift, given.guidance_scale, given.negative_prompt) == (7.5, 2.0, "blurred")


def test_negative_prompts_are_official_and_can_be_replaced():
    assert section("wan", "t2v-14B").negative_prompt == WAN_NEGATIVE
    assert section("wan", "i2v-14B").negative_prompt == "镜头晃动，" + WAN_NEGATIVE
    assert section("wan", "flf2v-14B").negative_prompt == "镜头切换，镜头晃动，" + WAN_NEGATIVE
    assert section("wan", "i2v-A14B").negative_prompt == WAN_NEGATIVE
    assert section("wan", "t2v-14B", negative_prompt="").negative_prompt == ""
    assert section("wan", "debug", encoder="debug").negative_prompt == ""
    assert section("hunyuan_video", "t2v-13B").negative_prompt == ""  # without guidance it is not used
    assert section("hunyuan_video", "t2v-13B", guidance_scale=3.0).negative_prompt == HUNYUAN_NEGATIVE
    own = sampling_defaults(JobConfig(model=Model(name="another")), None, (81, 480, 832))
    assert (own.shift, own.guidance_scale, own.negative_prompt) == (3.0, 5.0, "")


@pytest.mark.parametrize("flavor", ["debug", "debug-i2v", "debug-flf2v", "debug-i2v-A14B", "debug-ti2v"])
def test_debug_runs_of_wan_sample_as_before(flavor):
    found = section("wan", flavor, (9, 64, 64), encoder="debug", guidance_scale=3.0, sample_shift=3.0)
    assert (found.guidance_scale, found.sample_shift, found.negative_prompt) == (3.0, 3.0, "")
