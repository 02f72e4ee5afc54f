"""The Wan encoders against diffusers' own computation, on tiny random weights in the diffusers layout."""

import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from titan_video.encoders.wan import WanEncoders, clean_prompt

PROMPTS = ["a red  circle moves left", "", "the &amp;amp; blue square\n moves up " * 9, "â€œgreenâ€\x9d triangle"]
LENGTH = 24


def spiece_model() -> bytes:
    import sentencepiece

    words = "a the red blue green circle square triangle moves left right up down".split()
    lines = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(8)) for i in range(100)]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return out.getvalue()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    from diffusers import AutoencoderKLWan
    from transformers import UMT5Config, UMT5EncoderModel

    root = tmp_path_factory.mktemp("wan")
    torch.manual_seed(0)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(root / "vae")
    config = UMT5Config(
        vocab_size=64, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, pad_token_id=0, eos_token_id=1
    )
    text_encoder = UMT5EncoderModel(config)
    for p in text_encoder.parameters():
        torch.nn.init.normal_(p, std=0.5)
    text_encoder.save_pretrained(root / "text_encoder", max_shard_size="5KB")
    # As published: one table of embeddings in the file, yet a config that says it is not shared.
    published = root / "text_encoder" / "config.json"
    published.write_text(json.dumps({**json.loads(published.read_text()), "tie_word_embeddings": False}))
    (root / "tokenizer").mkdir()
    (root / "tokenizer/spiece.model").write_bytes(spiece_model())
    settings = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": 0,
    }
    (root / "tokenizer/tokenizer_config.json").write_text(json.dumps(settings))
    return root


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "wan")


def make(root, dtype=torch.float32, length=LENGTH, tiling=False):
    return WanEncoders(str(root), dtype, length, tiling, torch.device("cpu"))


def clip(num_frames=9, height=24, width=16, batch=2):
    return torch.randint(
        0, 256, (batch, 3, num_frames, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def test_latents_and_frames_equal_diffusers(saved):
    from diffusers import AutoencoderKLWan

    encoders, vae, frames = make(saved, torch.bfloat16), AutoencoderKLWan.from_pretrained(saved / "vae").eval(), clip()
    latents = encoders.encode_video(frames)
    assert latents.shape == (2, 16, 3, 3, 2) and latents.dtype == torch.float32 and not latents.requires_grad
    mean, std = (torch.tensor(vae.config[f"latents_{s}"]).view(1, 16, 1, 1, 1) for s in ("mean", "std"))
    with torch.no_grad():
        mu = vae.encode(frames.float() / 255 * 2 - 1).latent_dist.mean
        torch.testing.assert_close(latents, (mu - mean) / std, rtol=1e-5, atol=1e-5)
        x = vae.decode(mu).sample
    assert (latents * std + mean - mu).abs().max() < 1e-5
    decoded = encoders.decode_video(latents)
    assert decoded.shape == frames.shape and decoded.dtype == torch.uint8
    assert (decoded.float() - (x + 1) / 2 * 255).abs().max() <= 0.51
    assert encoders.decode_video(
        100 * torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    ).shape == (1, 3, 1, 16, 16)


def test_first_latent_depends_on_the_first_frame_alone(saved):
    encoders, frames = make(saved), clip()
    other = torch.cat([frames[:, :, :1], 255 - frames[:, :, 1:]], dim=2)
    a, b, first = encoders.encode_video(frames), encoders.encode_video(other), encoders.encode_video(frames[:, :, :1])
    assert torch.equal(a[:, :, 0], b[:, :, 0]) and not torch.equal(a[:, :, 1], b[:, :, 1])
    torch.testing.assert_close(a[:, :, :1], first, rtol=1e-5, atol=1e-5)
    assert torch.equal(a[1:], encoders.encode_video(frames[1:]))


def test_tokens_are_counted_before_they_are_cut(saved):
    short = make(saved, length=4)
    counts = short.num_tokens(PROMPTS)
    long = make(saved, length=max(counts) + 1)
    assert counts == [len(text_LD) for text_LD in long.encode_text(PROMPTS)] == long.num_tokens(PROMPTS)
    assert [len(text_LD) for text_LD in short.encode_text(PROMPTS)] == [min(4, n) for n in counts]
    fresh = make(saved)
    fresh.num_tokens(PROMPTS)
    assert fresh._text_encoder is None  # no weights


def test_the_embeddings_are_those_of_the_file(saved):
    """transformers 5.0 left them at zero, where config.json is as published."""
    encoders = make(saved)
    encoders.encode_text(PROMPTS[:1])
    index = json.loads((saved / "text_encoder" / "model.safetensors.index.json").read_text())["weight_map"]
    table = load_file(saved / "text_encoder" / index["shared.weight"])["shared.weight"]
    assert "encoder.embed_tokens.weight" not in index
    assert torch.equal(encoders._text_encoder.encoder.embed_tokens.weight, table)


def test_tiling_encodes_large_frames_in_tiles(saved):
    frames = clip(1, 264, 264, batch=1)
    plain, tiled = make(saved), make(saved, tiling=True)
    a, b = plain.encode_video(frames), tiled.encode_video(frames)
    assert a.shape == b.shape == (1, 16, 1, 33, 33) and not torch.equal(a, b)
    assert plain.video_id() != tiled.video_id()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_equals_the_pipeline(saved, dtype):
    from diffusers import WanPipeline
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(saved / "tokenizer")
    text_encoder = UMT5EncoderModel.from_pretrained(saved / "text_encoder", dtype=dtype).eval()
    pipeline = WanPipeline(tokenizer=tokenizer, text_encoder=text_encoder, vae=None, scheduler=None)
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    encoders = make(saved, dtype)
    texts = encoders.encode_text(PROMPTS)
    assert [len(t) for t in texts][:3] == [6, 1, LENGTH] and {t.dtype for t in texts} == {dtype}
    for text, reference in zip(texts, expected, strict=True):
        assert text.shape[1] == encoders.text_dim and text.abs().max() > 0.1
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(text, reference[: len(text)], rtol=tolerance, atol=tolerance)
        assert reference[len(text) :].abs().max() == 0 if len(text) < LENGTH else True
    assert encoders.encode_text([]) == []
    assert torch.equal(encoders.encode_text(PROMPTS[:1])[0], texts[0])


def test_tokens_are_those_of_sentencepiece(saved):
    import sentencepiece

    encoders = make(saved)
    assert encoders.text_encoder is not None
    reference = sentencepiece.SentencePieceProcessor(model_file=str(saved / "tokenizer/spiece.model"))
    for prompt in ("a red circle moves left", "green squares, unseen", ""):
        assert encoders._tokenizer(clean_prompt(prompt)).input_ids == [*reference.encode(prompt), reference.eos_id()]


def test_prompts_are_cleaned_as_in_the_pipeline():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    prompts = [*PROMPTS, "<b> &amp;amp; &lt;i&gt;", " \t tab\u00a0and\u3000wide\n", "ﬁne “quotes” &#39;"]
    assert [clean_prompt(p) for p in prompts] == [prompt_clean(p) for p in prompts]
    assert clean_prompt(PROMPTS[3]) == '"green" triangle' and clean_prompt("<b> &amp;amp;") == "<b> &"


def test_a_tokenizer_json_does_as_well(folder):
    expected = make(folder).encode_text(PROMPTS)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    shutil.rmtree(folder / "tokenizer")
    tokenizer.save_pretrained(folder / "tokenizer")
    assert not (folder / "tokenizer/spiece.model").exists()
    assert all(torch.equal(a, b) for a, b in zip(make(folder).encode_text(PROMPTS), expected, strict=True))


def test_halves_load_at_first_use_and_are_freed(saved):
    encoders = make(saved)
    assert encoders._vae is None and encoders._text_encoder is None
    encoders.encode_text(["a"])
    assert encoders._vae is None and encoders._text_encoder is not None
    latents = encoders.encode_video(clip(1))
    encoders.free()
    assert encoders._vae is None and encoders._text_encoder is None
    assert torch.equal(encoders.encode_video(clip(1)), latents)


def flip_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ids_follow_the_content(folder, tmp_path):
    video, text = make(folder).video_id(), make(folder).text_id()
    copy = shutil.copytree(folder, tmp_path / "elsewhere")
    assert (make(copy).video_id(), make(copy).text_id()) == (video, text)
    assert make(folder, torch.bfloat16).video_id() == video and make(folder, torch.bfloat16).text_id() != text
    assert make(folder, length=LENGTH - 1).text_id() != text
    flip_last_byte(folder / "vae/diffusion_pytorch_model.safetensors")
    assert make(folder).video_id() != video and make(folder).text_id() == text
    shards = sorted((folder / "text_encoder").glob("model-*.safetensors"))
    assert len(shards) > 1
    flip_last_byte(shards[-1])
    changed = make(folder).text_id()
    assert changed != text
    flip_last_byte(folder / "tokenizer/spiece.model")
    assert make(folder).text_id() not in (text, changed)
    remembered = make(copy)
    assert remembered.video_id() == video
    shutil.rmtree(copy)
    assert remembered.video_id() == video


def test_bad_folders_are_refused_by_name(folder, saved):
    def change(path, **values):
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    with pytest.raises(ValueError, match="hf_assets_path"):
        make("")
    with pytest.raises(ValueError, match=r"4k\+1"):
        make(saved).encode_video(clip(8))
    mismatches = (
        {"z_dim": 48},
        {"patch_size": 2},
        {"is_residual": True},
        {"temperal_downsample": [True] * 3},
        {"dim_mult": [1]},
        {"latents_mean": []},
    )
    for values in mismatches:
        change(folder / "vae/config.json", **values)
        with pytest.raises(ValueError, match=r"vae/config.json.*Wan 2\.1"):
            make(folder)
        shutil.copy(saved / "vae/config.json", folder / "vae/config.json")

    weights = folder / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="wan/vae cannot be loaded"):
        make(folder).encode_video(clip(1))
    weights.unlink()
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is missing"):
        make(folder).encode_video(clip(1))
    change(folder / "text_encoder/config.json", num_layers=3)
    with pytest.raises(ValueError, match="text_encoder: .* missing"):
        make(folder).encode_text(["a"])
    shard = sorted((folder / "text_encoder").glob("model-*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        make(folder).text_id()
    (folder / "tokenizer/spiece.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="tokenizer holds no tokenizer"):
        make(folder).encode_text(["a"])
    for name, half in (
        ("tokenizer", "tokenizer"),
        ("text_encoder", "text_encoder/config.json"),
        ("vae", "vae/config.json"),
    ):
        shutil.rmtree(folder / name)
        with pytest.raises(ValueError, match=half):
            make(folder)
