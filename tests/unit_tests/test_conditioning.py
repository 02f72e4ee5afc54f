"""Conditioning inputs of the models: each tensor against the diffusers pipelines' own, with tiny random encoders."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import build_denoising, randomized_init
from tests.unit_tests.data_clips import captioned
from tests.unit_tests.test_encoder_wan import saved as wan_folder  # noqa: F401
from titan_video.config.job_config import Encoder
from titan_video.data.batch import Batch
from titan_video.data.latent_cache import LatentCache
from titan_video.distributed.sequence import whole_sequence
from titan_video.distributed.utils import initialise
from titan_video.encoders import build_encoders
from titan_video.encoders.debug import DebugEncoders
from titan_video.encoders.folders import digest, settings_files, weight_files
from titan_video.ingest.cache.cached_clips import cached_clips
from titan_video.ingest.cache.conditioning_frames import encode_cond_frames, encode_images
from titan_video.ingest.cache.encode import Decoder, draw_job, encode_job, encode_share, missing_jobs
from titan_video.ingest.plan.build import make_plan
from titan_video.models import get_spec
from titan_video.models.conditioning import ConditioningSpec
from titan_video.models.layers import patchify, token_shape, unpatchify
from titan_video.models.wan import SPEC as WAN
from titan_video.models.wan import WanArgs, WanModel
from titan_video.tasks.conditioning import FrameConditioning, guidance_kwargs

PATCH = (1, 2, 2)
FRAMES, HEIGHT, WIDTH = 9, 32, 64
LATENT = (3, 4, 8)
PROMPTS = ["a red circle moves left", "", "the blue square moves up " * 40]
LENGTH = 24


def get_conditioning(family, flavor):
    return get_spec(family).flavors[flavor].conditioning


def frame(seed):
    return torch.from_numpy(
        np.random.Generator(np.random.Philox(key=seed)).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    ).permute(2, 0, 1)


def picture(frame_CHW):
    from PIL import Image

    return Image.fromarray(frame_CHW.permute(1, 2, 0).numpy())


def close(ours, theirs):
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-5, atol=1e-5)
    assert theirs.float().abs().max() > 1e-3


def randomise(module, std=0.3):
    for p in module.parameters():
        torch.nn.init.normal_(p, std=std)
    return module.eval()


def clip_vision(root, image_size, patch_size, width=32):
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    size = {"shortest_edge": image_size}
    CLIPImageProcessor(size=size, crop_size={"height": image_size, "width": image_size}).save_pretrained(
        root / "image_processor"
    )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
    )


# ---- Wan ----


@pytest.fixture(scope="module")
def wan21(wan_folder, tmp_path_factory):  # noqa: F811
    from transformers import CLIPVisionModel

    root = tmp_path_factory.mktemp("conditions") / "wan21"
    shutil.copytree(wan_folder, root)
    torch.manual_seed(0)
    randomise(CLIPVisionModel(clip_vision(root, 224, 14)), 0.1).save_pretrained(root / "image_encoder")
    return root


@pytest.fixture(scope="module")
def wan22(wan_folder, tmp_path_factory):  # noqa: F811
    from diffusers import AutoencoderKLWan

    root = tmp_path_factory.mktemp("conditions") / "wan22"
    shutil.copytree(wan_folder, root)
    torch.manual_seed(0)
    numbers = {"latents_mean": torch.randn(48).tolist(), "latents_std": (1 + torch.rand(48)).tolist()}
    vae = AutoencoderKLWan(
        base_dim=4,
        decoder_base_dim=4,
        z_dim=48,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=16,
        scale_factor_temporal=4,
        **numbers,
    )
    vae.save_pretrained(root / "vae")
    return root


def wan_encoders(root, **options):
    return build_encoders(Encoder(name="wan", dtype="float32", max_text_length=LENGTH, **options), str(root), "cpu")


def wan_pipeline(root, expand_timesteps=False):
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline
    from transformers import CLIPImageProcessor, CLIPVisionModel

    has_images = (root / "image_encoder").is_dir()
    return WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan.from_pretrained(root / "vae"),
        scheduler=None,
        image_processor=CLIPImageProcessor.from_pretrained(root / "image_processor") if has_images else None,
        image_encoder=CLIPVisionModel.from_pretrained(root / "image_encoder").eval() if has_images else None,
        expand_timesteps=expand_timesteps,
    )


@torch.no_grad()
def prepared(pipeline, images, num_channels, latents):
    pixels = [pipeline.video_processor.preprocess(picture(i), height=HEIGHT, width=WIDTH) for i in images]
    return pipeline.prepare_latents(
        pixels[0], 1, num_channels, HEIGHT, WIDTH, FRAMES, torch.float32, "cpu", None, latents, *pixels[1:]
    )


@pytest.mark.parametrize("flavor", ["i2v-14B", "flf2v-14B", "i2v-A14B"])
@torch.no_grad()
def test_wan_channels_and_image_tokens(wan21, flavor):
    conditioning, pipeline = get_conditioning("wan", flavor), wan_pipeline(wan21)
    encoders = wan_encoders(wan21, clip_resize="crop")  # as diffusers does
    images = [frame(k) for k in range(conditioning.num_cond_frames)]
    latents = torch.randn(1, 16, *LATENT)
    _, expected = prepared(pipeline, images, 16, latents)
    cond_frames_CNHW = torch.stack(images, dim=1)
    cond_latents = encode_cond_frames(encoders, conditioning, cond_frames_CNHW, FRAMES)[None]
    channels = conditioning.channels(cond_latents, LATENT[0])
    assert channels.shape == (1, 20, *LATENT)
    close(channels, expected)
    assert torch.equal(channels[:, :4], expected[:, :4])
    x = FrameConditioning(conditioning, cond_latents, LATENT, PATCH, whole_sequence()).build_input(
        patchify(latents, PATCH)
    )
    close(x, patchify(torch.cat([latents, expected], dim=1), PATCH))
    if conditioning.image_tokens:
        tokens = encode_images(encoders, cond_frames_CNHW)
        theirs = pipeline.encode_image([picture(i) for i in images], "cpu")
        assert len(tokens) == conditioning.image_tokens
        close(tokens, theirs.flatten(0, 1))
    assert len(encoders.image_id()) == 64


def official_pixels(frames_BCHW, size, mean, std):
    """wan/modules/clip.py of Wan-Video/Wan2.1, `visual`: frames from -1 to 1, stretched to the square."""
    x = F.interpolate(frames_BCHW.float() / 127.5 - 1, size=(size, size), mode="bicubic", align_corners=False)
    return (x.mul(0.5).add(0.5) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("cls", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
@torch.no_grad()
def test_clip_sees_the_whole_frame_squeezed_under_both_published_classes(wan21, tmp_path, cls):
    import transformers

    root = shutil.copytree(wan21, tmp_path / "wan")
    shutil.rmtree(root / "image_encoder")
    torch.manual_seed(1)
    model = randomise(getattr(transformers, cls)(clip_vision(root, 224, 14)), 0.1)
    model.save_pretrained(root / "image_encoder")
    assert json.loads((root / "image_encoder" / "config.json").read_text())["architectures"] == [cls]
    squeezed, cropped = wan_encoders(root), wan_encoders(root, clip_resize="crop")
    frames = torch.stack([frame(0), frame(1)])  # twice as wide as high
    processor = squeezed.image_encoder[1]
    pixels = official_pixels(frames, 224, processor.image_mean, processor.image_std)
    expected = model(pixels, output_hidden_states=True).hidden_states[-2]
    close(squeezed.encode_images(frames), expected)
    assert not torch.allclose(cropped.encode_images(frames), expected, atol=1e-3)
    assert squeezed.image_id() != cropped.image_id()  # of the entries of images alone
    assert (squeezed.video_id(), squeezed.text_id()) == (cropped.video_id(), cropped.text_id())
    # Caches that were made before the option hold cropped images under this identity.
    files = weight_files(root / "image_encoder", "model") + settings_files(root / "image_processor")
    assert cropped.image_id() == digest(files, "")


@torch.no_grad()
def test_wan_clean_first_frame(wan22):
    conditioning, encoders, pipeline = (
        get_conditioning("wan", "ti2v-5B"),
        wan_encoders(wan22),
        wan_pipeline(wan22, expand_timesteps=True),
    )
    assert (encoders.channels, encoders.stride_s) == (48, 16)
    grid = 3, 2, 4
    latents, expected, mask = prepared(pipeline, [frame(0)], 48, torch.randn(1, 48, *grid))
    cond_latents = encode_cond_frames(encoders, conditioning, frame(0)[:, None], FRAMES)[None]
    close(cond_latents, expected)
    tokens = FrameConditioning(conditioning, cond_latents, grid, PATCH, whole_sequence())
    x = tokens.build_input(patchify(latents, PATCH))
    close(unpatchify(x, token_shape(grid, PATCH), PATCH), (1 - mask) * expected + mask * latents)
    times = torch.where(tokens.kwargs["cond_mask_BL"], 0, 700)
    assert torch.equal(times, (mask[0][0][:, ::2, ::2] * 700).flatten()[None].long())

    frames = torch.stack([frame(k) for k in range(FRAMES)], dim=1)[None]
    close(
        encoders.encode_video(frames)[:, :, :1], cond_latents
    )  # causal: a clip's first latent frame is that of its first frame
    z = pipeline.vae.encode(frames.float() / 127.5 - 1).latent_dist.mode()
    decoded = pipeline.vae.decode(z).sample
    assert (
        encoders.decode_video(encoders.encode_video(frames)).float() - ((decoded + 1) * 127.5).clamp(0, 255)
    ).abs().max() <= 0.51


# ---- HunyuanVideo ----


def tokenizer(root, name, special, template):
    """Byte-level words learned from the models' own templates."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from titan_video.encoders.hunyuan_video import IMAGE_TEMPLATE

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([IMAGE_TEMPLATE, *PROMPTS, "\n\n"] * 20, trainer)
    ends = [(s, words.token_to_id(s)) for s in template.split() if "<" in s]
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=special[0], padding_side="right", bos_token=special[1], eos_token=special[2]
    )
    fast.save_pretrained(root / name)
    return fast


def hunyuan_folder(root, image_to_video):
    from diffusers import AutoencoderKLHunyuanVideo
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        LlamaConfig,
        LlamaModel,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=16
    )
    vae.save_pretrained(root / "vae")
    special = ["<pad>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<image>"]
    words = tokenizer(root, "tokenizer", special, "<|begin_of_text|> $A")
    text = LlamaConfig(
        vocab_size=len(words),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        pad_token_id=0,
    )
    if image_to_video:
        vision = clip_vision(root, 336, 14, width=16)
        config = LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=special.index("<image>"), pad_token_id=0
        )
        randomise(LlavaForConditionalGeneration(config), 0.1).save_pretrained(root / "text_encoder")
    else:
        randomise(LlamaModel(text), 0.1).save_pretrained(root / "text_encoder")
    clip = tokenizer(root, "tokenizer_2", ["<|endoftext|>", "<|startoftext|>", "<|end|>"], "<|startoftext|> $A <|end|>")
    config = CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=20,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=2,
        pad_token_id=0,
        bos_token_id=1,
    )
    randomise(CLIPTextModel(config), 0.1).save_pretrained(root / "text_encoder_2")
    return root


@pytest.fixture(scope="module")
def hunyuan_t2v(tmp_path_factory):
    return hunyuan_folder(tmp_path_factory.mktemp("hunyuan_t2v"), False)


@pytest.fixture(scope="module")
def hunyuan_i2v(tmp_path_factory):
    return hunyuan_folder(tmp_path_factory.mktemp("hunyuan_i2v"), True)


def hunyuan_encoders(root, **options):
    section = Encoder(name="hunyuan_video", dtype="float32", max_text_length=LENGTH, **options)
    return build_encoders(section, str(root), "cpu")


def hunyuan_pipeline(root, cls, text_class, **more):
    from diffusers import AutoencoderKLHunyuanVideo
    from transformers import AutoTokenizer, CLIPTextModel

    return cls(
        text_encoder=text_class.from_pretrained(root / "text_encoder").eval(),
        tokenizer=AutoTokenizer.from_pretrained(root / "tokenizer"),
        transformer=None,
        vae=AutoencoderKLHunyuanVideo.from_pretrained(root / "vae"),
        scheduler=None,
        text_encoder_2=CLIPTextModel.from_pretrained(root / "text_encoder_2").eval(),
        tokenizer_2=AutoTokenizer.from_pretrained(root / "tokenizer_2"),
        **more,
    )


@torch.no_grad()
def test_hunyuan_text(hunyuan_t2v):
    from diffusers import HunyuanVideoPipeline
    from transformers import LlamaModel

    encoders, pipeline = hunyuan_encoders(hunyuan_t2v), hunyuan_pipeline(hunyuan_t2v, HunyuanVideoPipeline, LlamaModel)
    assert (encoders.text_dim, encoders.pooled_dim) == (24, 20)
    texts, pooled = encoders.encode_text(PROMPTS), encoders.encode_pooled(PROMPTS)
    for prompt, text, vector in zip(PROMPTS, texts, pooled, strict=True):
        expected, theirs, mask = pipeline.encode_prompt(prompt, device="cpu", max_sequence_length=LENGTH)
        assert mask.sum() == len(text) and mask[0, : len(text)].all()
        close(text, expected[0, : len(text)])
        close(vector, theirs[0])
    assert len(texts[2]) == LENGTH > len(texts[0]) > len(texts[1]) > 0
    counts = hunyuan_encoders(hunyuan_t2v).num_tokens(PROMPTS)
    assert counts[:2] == [len(text) - len(texts[1]) for text in texts[:2]] and counts[2] > LENGTH
    with pytest.raises(ValueError, match="text_encoder.*text-to-video"):
        encoders.encode_text(["a"], images=[frame(0)], image_tokens=144)


@pytest.mark.parametrize("flavor", ["i2v-13B-latent-concat", "i2v-13B-token-replace"])
@torch.no_grad()
def test_hunyuan_image(hunyuan_i2v, flavor):
    from diffusers import HunyuanVideoImageToVideoPipeline
    from transformers import CLIPImageProcessor, LlavaForConditionalGeneration

    processor = {"image_processor": CLIPImageProcessor.from_pretrained(hunyuan_i2v / "image_processor")}
    encoders = hunyuan_encoders(hunyuan_i2v)
    pipeline = hunyuan_pipeline(
        hunyuan_i2v, HunyuanVideoImageToVideoPipeline, LlavaForConditionalGeneration, **processor
    )
    conditioning, form = get_conditioning("hunyuan_video", flavor), flavor.removeprefix("i2v-13B-").replace("-", "_")
    images = [frame(k) for k in range(len(PROMPTS))]
    texts = encoders.encode_text(PROMPTS, images, conditioning.text_image_tokens)
    assert [n > LENGTH for n in encoders.num_tokens(PROMPTS)] == [False, False, True]
    for prompt, image, text in zip(PROMPTS, images, texts, strict=True):
        stride = {"latent_concat": 2, "token_replace": 4}[form]
        expected, _, mask = pipeline.encode_prompt(
            picture(image), prompt, device="cpu", max_sequence_length=LENGTH, image_embed_interleave=stride
        )
        assert mask.sum() == len(text) and mask[0, : len(text)].all()
        close(text, expected[0, : len(text)])
    assert not torch.allclose(
        texts[0], encoders.encode_text(PROMPTS[:1], images[1:2], conditioning.text_image_tokens)[0]
    )

    pixels, latents = (
        pipeline.video_processor.preprocess(picture(images[0]), HEIGHT, WIDTH),
        torch.randn(1, 16, *LATENT),
    )
    start, expected = pipeline.prepare_latents(
        pixels, 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, "cpu", None, latents, form
    )
    cond_latents = encode_cond_frames(encoders, conditioning, images[0][:, None], FRAMES)[None]
    close(cond_latents, expected[:, :, :1])
    close(conditioning.initial_latents(latents, cond_latents) - latents, start - latents)
    if form == "latent_concat":  # as the pipeline's __call__ goes on
        mask = torch.zeros(1, 1, *LATENT)
        mask[:, :, 0], expected[:, :, 1:] = 1, 0
        expected = torch.cat([latents, expected, mask], dim=1)
    else:
        expected = torch.cat([expected, latents[:, :, 1:]], dim=2)
    x = FrameConditioning(conditioning, cond_latents, LATENT, PATCH, whole_sequence()).build_input(
        patchify(latents, PATCH)
    )
    close(unpatchify(x, token_shape(LATENT, PATCH), PATCH), expected)
    assert guidance_kwargs(conditioning, 6.0, torch.zeros(2)) == {} or guidance_kwargs(
        conditioning, 6.0, torch.zeros(2)
    )["guidance_B"].tolist() == [6000.0, 6000.0]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_guidance_scale_is_rounded_in_the_models_dtype_as_in_public_code(dtype):
    conditioning = ConditioningSpec(guidance=True)
    for scale in (1.0, 3.5, 6.0, 7.3):
        theirs = torch.tensor([scale] * 2, dtype=getattr(torch, dtype)) * 1000.0
        ours = guidance_kwargs(conditioning, scale, torch.zeros(2), dtype)["guidance_B"]
        assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())
    assert guidance_kwargs(conditioning, 6.0, torch.zeros(1), "bfloat16")["guidance_B"].item() == 6016
    assert guidance_kwargs(conditioning, 1.0, torch.zeros(1), "bfloat16")["guidance_B"].item() == 1000
    task = task_of(conditioning, guidance_scale=6.0)
    task.param_dtype = dtype
    given = task.prepare(make_batch(None)).kwargs["guidance_B"]
    assert given.tolist() == [{"bfloat16": 6016.0, "float32": 6000.0}[dtype]] * 2


@torch.no_grad()
def test_hunyuan_clips_are_encoded_whole_or_in_chunks(hunyuan_t2v):
    from diffusers import AutoencoderKLHunyuanVideo

    vae = AutoencoderKLHunyuanVideo.from_pretrained(hunyuan_t2v / "vae").eval()
    frames = torch.stack([frame(k) for k in range(21)], dim=1)[None]  # diffusers' chunks have 16 frames
    pixels = frames.float() / 127.5 - 1
    chunks = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    whole = vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)[0] * vae.config.scaling_factor
    encoders, tiled = hunyuan_encoders(hunyuan_t2v), hunyuan_encoders(hunyuan_t2v, vae_temporal_tiling=True)
    close(encoders.encode_video(frames), whole)
    close(tiled.encode_video(frames), chunks)
    assert (whole - chunks).abs().max() > 1e-3
    assert torch.equal(encoders.decode_video(whole), tiled.decode_video(whole))  # as sampling does, in both
    assert encoders.video_id() != tiled.video_id() and encoders.text_id() == tiled.text_id()
    assert tiled.video_id() == digest(weight_files(hunyuan_t2v / "vae", "diffusion_pytorch_model"), "tiling=False")


def test_texts_without_their_image_or_caption_are_encoded(tmp_path):
    """The entries of a clip whose caption and image are dropped apart, before and during training."""
    (tmp_path / "clips").mkdir()
    captioned(tmp_path / "clips" / "0.mp4", "a red circle", width=64, height=32)
    plan = make_plan(tmp_path / "clips", [[5, 32, 64]], 8, 0, tmp_path / "cache")
    conditioning, encoders = get_conditioning("hunyuan_video", "debug-i2v-token-replace"), DebugEncoders(6)
    cache = LatentCache(tmp_path / "cache", encoders.video_id(), encoders.text_id(), conditioning=conditioning)
    (together,), (clip,) = cached_clips(plan, cache), cached_clips(plan, cache, drop_apart=True)
    assert together == replace(clip, imageless_keys=()) and len(clip.imageless_keys) == 2
    alone, black = clip.imageless_keys
    assert len({clip.text_key, alone, black, cache.text_key("")}) == 4 and black == cache.text_key("a red circle")
    texts = [key for job in missing_jobs([clip], cache)[0] for kind, key in job.keys if kind == "text"]
    assert sorted(texts) == sorted({clip.text_key, alone, black, cache.text_key("")})
    assert encode_share(missing_jobs([clip], cache, log=lambda _: None), encoders, cache, log=lambda _: None) == {}
    read = {key: cache.read("text", key) for key in texts}
    tokens = conditioning.text_image_tokens
    image, none = read[clip.text_key][:tokens], read[cache.text_key("")][:tokens]
    assert not torch.equal(image, none)
    assert torch.equal(read[alone][:tokens], image) and torch.equal(
        read[alone][tokens:], read[cache.text_key("")][tokens:]
    )
    assert torch.equal(read[black][:tokens], none) and torch.equal(read[black][tokens:], read[clip.text_key][tokens:])
    for key, caption, is_imageless in (
        (clip.text_key, "a red circle", False),
        (alone, "", False),
        (black, "a red circle", True),
    ):
        job = draw_job(cache, clip, key)
        assert (job.caption, job.is_imageless) == (caption, is_imageless) and ("video", clip.video_key) in job.keys
        (decoded,) = Decoder(conditioning)[[job]]
        assert torch.equal(encode_job(encoders, conditioning, job, decoded)["text", key], read[key])


@torch.no_grad()
def test_hunyuan_video_latents(hunyuan_t2v):
    from diffusers import AutoencoderKLHunyuanVideo

    encoders, vae = hunyuan_encoders(hunyuan_t2v), AutoencoderKLHunyuanVideo.from_pretrained(hunyuan_t2v / "vae").eval()
    frames = torch.stack([frame(k) for k in range(FRAMES)], dim=1)[None]
    z = vae.encode(frames.float() / 127.5 - 1).latent_dist.mode()
    latents = encoders.encode_video(frames)
    close(latents, z * vae.config.scaling_factor)
    assert (
        encoders.decode_video(latents).float() - ((vae.decode(z).sample + 1) * 127.5).clamp(0, 255)
    ).abs().max() <= 0.51
    assert encoders.video_id() != encoders.text_id()


def test_unfit_hunyuan_folders_are_refused_by_name(hunyuan_t2v, tmp_path):
    for name, words in (
        ("text_encoder_2", "text_encoder_2/config.json"),
        ("tokenizer", "tokenizer is missing"),
        ("vae", "vae/config.json"),
    ):
        root = shutil.copytree(hunyuan_t2v, tmp_path / name)
        shutil.rmtree(root / name)
        with pytest.raises(ValueError, match=words):
            hunyuan_encoders(root)
    config = tmp_path / "vae2" / "vae" / "config.json"
    shutil.copytree(hunyuan_t2v, tmp_path / "vae2")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"spatial_compression_ratio": 16}))
    with pytest.raises(ValueError, match="vae/config.json.*strides"):
        hunyuan_encoders(tmp_path / "vae2")
    with pytest.raises(ValueError, match="hf_assets_path"):
        hunyuan_encoders("")


# ---- the objective ----


def make_batch(cond_latents):
    cond = {} if cond_latents is None else {"cond_latents_BCFHW": cond_latents}
    return Batch(
        {"video": torch.randn(2, 16, *LATENT)},
        torch.zeros(2, 5, 8),
        torch.ones(2, 5, dtype=torch.bool),
        torch.arange(2),
        cond,
    )


def task_of(conditioning, guidance_scale=1.0):
    """A denoising task of a model that declares `conditioning`."""
    args = SimpleNamespace(conditioning=conditioning, patch=PATCH)
    return build_denoising(None, args, guidance_scale=guidance_scale)


def test_conditioning_tokens_hold_no_noise_and_no_loss():
    task = task_of(ConditioningSpec(num_cond_frames=1, form="clean", guidance=True), guidance_scale=3.0)
    batch, noise = make_batch(torch.randn(2, 16, 1, 4, 8)), torch.randn(2, 16, *LATENT)
    s = torch.tensor([0.25, 0.75])
    inputs = task.add_noise(batch, noise, sigma_B=s)
    loss = task.loss(torch.zeros_like(inputs.target_BLP), inputs)
    torch.testing.assert_close(loss, (noise - batch.streams["video"])[:, :, 1:].square().flatten(1).sum(1))
    assert task.num_loss_elements(batch) == batch.streams["video"][:, :, 1:].numel()
    assert inputs.kwargs["guidance_B"].tolist() == [3000.0, 3000.0]
    first = inputs.kwargs["cond_mask_BL"][0]
    assert first.sum() == 8 and first[:8].all()
    x = unpatchify(inputs.kwargs["x_BLP"], token_shape(LATENT, PATCH), PATCH)
    assert torch.equal(x[:, :, :1], batch.cond["cond_latents_BCFHW"])
    torch.testing.assert_close(x[0, :, 1:], (0.75 * batch.streams["video"] + 0.25 * noise)[0, :, 1:])
    assert "cond_latents_BCFHW" in batch.cond  # the batch is not used up

    task = task_of(ConditioningSpec(num_cond_frames=1, form="mask_last"))
    inputs = task.add_noise(batch, noise, sigma_B=s)
    model_kwargs = {"x_BLP", "pos_BL3", "t_B", "text_BSD", "text_mask_BS", "layout"}
    assert inputs.kwargs.keys() == model_kwargs and inputs.cond_mask_BL is None
    assert task.num_loss_elements(batch) == noise.numel()
    tail = unpatchify(inputs.kwargs["x_BLP"][..., 64:], token_shape(LATENT, PATCH), PATCH)
    expected = F.pad(
        torch.cat([batch.cond["cond_latents_BCFHW"], torch.ones(2, 1, 1, 4, 8)], dim=1), [0, 0, 0, 0, 0, 2]
    )
    assert torch.equal(tail, expected)
    for form in ("mask_first", "mask_last"):
        with pytest.raises(ValueError, match="model.flavor.*conditioning frame of each clip.*image-to-video"):
            task_of(ConditioningSpec(num_cond_frames=1, form=form)).add_noise(make_batch(None), noise, sigma_B=s)


def ti2v_and_its_text_to_video():
    """Tasks of one architecture with and without a clean first frame, and two models with the same weights."""
    args = WanArgs(
        dim=24, num_heads=2, num_layers=2, ffn_dim=32, text_dim=8, text_len=5, freq_dim=16, clean_first_frame=True
    )
    text_args = replace(args, clean_first_frame=False)
    model, text_model = WanModel(args), WanModel(text_args)
    initialise(model, randomized_init(WAN.init_parameter), 0)
    text_model.load_state_dict(model.state_dict())
    return (build_denoising(WAN, args), model), (build_denoising(WAN, text_args), text_model)


def loss_and_gradients(task, model, batches):
    """Of one step of micro-batches."""
    model.zero_grad()
    num_elements = sum(task.num_loss_elements(batch) for batch in batches)
    total = 0.0
    for batch in batches:
        inputs = task.prepare(batch)
        loss = task.loss(model(**inputs.kwargs), inputs).sum() / num_elements
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same_step(step, expected):
    assert step[0] == pytest.approx(expected[0], rel=1e-6)
    for name, grad in step[1].items():
        torch.testing.assert_close(grad, expected[1][name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_clean_first_frame_is_a_property_of_the_micro_batch():
    """One model: without conditioning frames it trains as the text-to-video model, and one step can mix both."""
    (task, model), (text_task, text_model) = ti2v_and_its_text_to_video()
    batch = make_batch(None)
    conditioned = replace(make_batch(torch.randn(2, 16, 1, 4, 8)), sample_ids_B=torch.arange(2) + 5)
    text_only = loss_and_gradients(task, model, [batch])
    assert task.num_loss_elements(batch) == batch.streams["video"].numel()
    assert task.num_loss_elements(conditioned) == conditioned.streams["video"][:, :, 1:].numel()
    assert_same_step(text_only, loss_and_gradients(text_task, text_model, [batch]))

    clean = loss_and_gradients(task, model, [conditioned])
    assert clean[0] != pytest.approx(loss_and_gradients(task, model, [without_frames(conditioned)])[0], rel=1e-3)
    # The mixed step is the mean of both, weighted by the elements that count: 3 frames of one, 2 of the other.
    gradients = {n: 0.6 * text_only[1][n] + 0.4 * clean[1][n] for n in clean[1]}
    expected = 0.6 * text_only[0] + 0.4 * clean[0], gradients
    assert_same_step(loss_and_gradients(task, model, [batch, conditioned]), expected)


def without_frames(batch):
    return replace(batch, cond={})


def test_batches_are_split_and_moved_with_their_conditions():
    batch = make_batch(torch.arange(2.0).view(2, 1, 1, 1, 1))
    parts = [part.cond["cond_latents_BCFHW"].item() for part in batch.split(1)]
    assert parts == [0.0, 1.0] and batch.to("meta").cond["cond_latents_BCFHW"].is_meta
