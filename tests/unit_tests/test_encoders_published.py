"""Folders as they are published: of every family and task a tiny one, saved by diffusers and transformers under the
published class names, is read whole: architecture, weights, encoders, tokenizers.
"""

import json
import shutil
from dataclasses import dataclass, replace

import pytest
import torch

from tests.unit_tests.test_conditioning import clip_vision, frame, hunyuan_i2v, hunyuan_t2v, randomise  # noqa: F401
from tests.unit_tests.test_conditioning import wan22 as wan22_folder  # noqa: F401
from tests.unit_tests.test_encoder_wan import saved as wan_folder  # noqa: F401
from titan_video.config.job_config import Encoder, JobConfig, Model
from titan_video.encoders import build_encoders
from titan_video.ingest.prepare import check_encoders
from titan_video.ingest.sampling_defaults import sampling_section
from titan_video.models import get_args, get_spec
from titan_video.weights.hf_storage import load_hf

LENGTH = 24
SIZE_480P, SIZE_720P = (81, 480, 832), (81, 720, 1280)


@dataclass(frozen=True)
class Published:
    """A published folder: the flavor whose kind it is, the fixture with its encoders, and what its parts are called.

    shifts: of sampling at 480p and 720p. model_index: what it says beside the parts.
    """

    family: str
    flavor: str
    encoders: str
    text_encoder: str
    tokenizer: str
    shifts: tuple[float, float]
    image_encoder: str = ""
    model_index: tuple[tuple[str, object], ...] = ()


T5 = {"text_encoder": "UMT5EncoderModel", "tokenizer": "T5TokenizerFast"}
LLAMA = {"text_encoder": "LlamaModel", "tokenizer": "LlamaTokenizerFast"}
LLAVA = {"text_encoder": "LlavaForConditionalGeneration", "tokenizer": "LlamaTokenizerFast"}
FOLDERS = {
    "Wan2.1-T2V": Published("wan", "t2v-14B", "wan_folder", **T5, shifts=(3, 5)),
    "Wan2.1-I2V": Published(
        "wan", "i2v-14B", "wan_folder", **T5, shifts=(3, 5), image_encoder="CLIPVisionModelWithProjection"
    ),
    "Wan2.1-I2V, CLIP alone": Published(
        "wan", "i2v-14B", "wan_folder", **T5, shifts=(3, 5), image_encoder="CLIPVisionModel"
    ),
    "Wan2.1-FLF2V": Published(
        "wan", "flf2v-14B", "wan_folder", **T5, shifts=(16, 16), image_encoder="CLIPVisionModelWithProjection"
    ),
    "Wan2.2-T2V-A14B": Published(
        "wan", "t2v-A14B", "wan_folder", **T5, shifts=(12, 12), model_index=(("boundary_ratio", 0.875),)
    ),
    "Wan2.2-I2V-A14B": Published(
        "wan", "i2v-A14B", "wan_folder", **T5, shifts=(5, 5), model_index=(("boundary_ratio", 0.9),)
    ),
    "Wan2.2-TI2V-5B": Published(
        "wan", "ti2v-5B", "wan22_folder", **T5, shifts=(5, 5), model_index=(("expand_timesteps", True),)
    ),
    "HunyuanVideo": Published("hunyuan_video", "t2v-13B", "hunyuan_t2v", **LLAMA, shifts=(7, 7)),
    "HunyuanVideo-I2V, 33 channels": Published(
        "hunyuan_video", "i2v-13B-latent-concat", "hunyuan_i2v", **LLAVA, shifts=(7, 7)
    ),
    "HunyuanVideo-I2V": Published("hunyuan_video", "i2v-13B-token-replace", "hunyuan_i2v", **LLAVA, shifts=(7, 7)),
}


def tiny(spec, flavor, text_dim, image_dim, pooled_dim):
    """Arguments of the flavor's kind, small, for encoders of these widths."""
    args = replace(spec.flavors[flavor], dim=48, num_heads=2, ffn_dim=64, text_dim=text_dim, text_len=LENGTH)
    if spec.name == "wan":
        return replace(args, num_layers=1, freq_dim=16, image_dim=image_dim if args.image_dim else 0)
    sizes = {"num_double_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "axes_dim": (8, 8, 8)}
    return replace(args, pooled_dim=pooled_dim, **sizes)


def publish(case, source, root):
    """A complete pipeline folder at `root`: encoders of `source`, a transformer, and the names that hubs have."""
    import diffusers
    import transformers

    shutil.copytree(source, root)
    spec = get_spec(case.family)
    if case.image_encoder:
        model = getattr(transformers, case.image_encoder)(clip_vision(root, 224, 14))
        randomise(model, 0.1).save_pretrained(root / "image_encoder")
    encoders = build_encoders(Encoder(name=case.family, max_text_length=LENGTH), str(root), "cpu")
    args = tiny(spec, case.flavor, encoders.text_dim, encoders.image_dim, encoders.pooled_dim)
    config = spec.args_to_hf(args)
    model = getattr(diffusers, config["_class_name"])(**{k: v for k, v in config.items() if k[0] != "_"})
    model.save_pretrained(root / "transformer", max_shard_size="100KB")
    settings = root / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": case.tokenizer}))
    parts = {"transformer": ["diffusers", config["_class_name"]], "vae": ["diffusers", "AutoencoderKL"]}
    (root / "model_index.json").write_text(json.dumps({**parts, **dict(case.model_index)}))
    return spec, args, model


@pytest.mark.parametrize("name", FOLDERS)
@torch.no_grad()
def test_every_published_folder_is_read(name, request, tmp_path):
    case, root = FOLDERS[name], tmp_path / "published"
    spec, expected, theirs = publish(case, request.getfixturevalue(case.encoders), root)
    named = json.loads((root / "text_encoder" / "config.json").read_text())["architectures"]
    assert named == [case.text_encoder] and len(list((root / "transformer").glob("*.safetensors"))) > 1  # an index

    model = Model(name=case.family, flavor="hf", hf_assets_path=str(root))
    config = JobConfig(model=model, encoder=Encoder(name=case.family, dtype="float32", max_text_length=LENGTH))
    args = get_args(spec, "hf", str(root), LENGTH)
    assert args.conditioning == replace(expected, text_len=args.text_len).conditioning
    assert args.boundary == spec.flavors[case.flavor].boundary
    ours = spec.build(args)
    load_hf(ours, root, spec, args)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())

    encoders = build_encoders(config.encoder, str(root), "cpu")
    check_encoders(encoders, args, spec.geometry(args), config)
    conditioning, images = args.conditioning, {}
    if conditioning.text_image_tokens:
        images = {"images": [frame(0)], "image_tokens": conditioning.text_image_tokens}
    (text,) = encoders.encode_text(["a red circle moves left"], **images)
    assert text.shape[1] == args.text_dim and text.isfinite().all()
    if conditioning.pooled_text:
        assert encoders.encode_pooled(["a"])[0].shape == (args.pooled_dim,)
    if conditioning.image_tokens:
        assert encoders.encode_images(frame(0)[None]).shape == (1, 257, args.image_dim)
    frames = torch.stack([frame(k) for k in range(5)], dim=1)[None]
    assert encoders.encode_video(frames).shape[1:] == spec.geometry(args).latent_shape((5, *frames.shape[3:]))
    shifts = [sampling_section(config, args, size).sample_shift for size in (SIZE_480P, SIZE_720P)]
    assert tuple(shifts) == case.shifts


@pytest.mark.parametrize("index, words", [('{"boundary_ratio": "x"}', "boundary"), ("[", "model_index.json")])
def test_an_unreadable_boundary_is_named(tmp_path, index, words):
    spec = get_spec("wan")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(spec.args_to_hf(spec.flavors["t2v-A14B"])))
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=words):
        get_args(spec, "hf", str(tmp_path), LENGTH)
    (tmp_path / "model_index.json").write_text("[]")
    assert get_args(spec, "hf", str(tmp_path), LENGTH).boundary == 0


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
@pytest.mark.parametrize("is_sharded", [False, True])
@torch.no_grad()
def test_variants_of_file_names(wan_folder, tmp_path, variant, is_sharded):  # noqa: F811
    """As `save_pretrained(variant=...)` writes them. Files without a variant come first."""
    from diffusers import AutoencoderKLWan
    from transformers import UMT5EncoderModel

    root = shutil.copytree(wan_folder, tmp_path / "wan")
    size = "5KB" if is_sharded else "1GB"
    for part, cls in (("vae", AutoencoderKLWan), ("text_encoder", UMT5EncoderModel)):
        model = cls.from_pretrained(root / part)
        shutil.rmtree(root / part)
        model.save_pretrained(root / part, variant=variant, max_shard_size=size)
    names = [path.name for path in (root / "text_encoder").iterdir()]
    assert all(f".{variant}" in name for name in names if name.endswith((".safetensors", ".index.json")))
    frames = torch.stack([frame(k) for k in range(5)], dim=1)[None]
    section = Encoder(name="wan", dtype="float32", max_text_length=LENGTH)
    plain, named = (build_encoders(section, str(folder), "cpu") for folder in (wan_folder, root))
    assert torch.equal(plain.encode_video(frames), named.encode_video(frames))
    assert torch.equal(plain.encode_text(["a"])[0], named.encode_text(["a"])[0])
    assert plain.text_id() != named.text_id() and len(named.video_id()) == 64


def test_a_transformer_with_a_variant_loads(tmp_path):
    from diffusers import WanTransformer3DModel

    spec = get_spec("wan")
    args = tiny(spec, "t2v-14B", 24, 0, 0)
    config = {k: v for k, v in spec.args_to_hf(args).items() if k[0] != "_"}
    for size in ("1GB", "50KB"):
        root = tmp_path / size
        WanTransformer3DModel(**config).save_pretrained(root / "transformer", variant="fp16", max_shard_size=size)
        load_hf(spec.build(args), root, spec, args)


def test_a_byte_level_tokenizer_keeps_its_splitting_under_the_name_of_llama(hunyuan_t2v, tmp_path):  # noqa: F811
    from tokenizers import Tokenizer

    from titan_video.encoders.folders import load_tokenizer
    from titan_video.encoders.hunyuan_video import TEMPLATE

    folder = shutil.copytree(hunyuan_t2v / "tokenizer", tmp_path / "tokenizer")
    text = TEMPLATE.format("a red circle  moves left")
    expected = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    settings = folder / "tokenizer_config.json"
    for name in ("LlamaTokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast"):
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": name}))
        assert load_tokenizer(folder)(text).input_ids == expected


def test_clips_tokenizer_is_read_from_its_vocabulary_and_merges(tmp_path):
    """HunyuanVideo's tokenizer_2 has no tokenizer.json."""
    from titan_video.encoders.folders import load_tokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "unk_token": "<|endoftext|>", **names}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ids = load_tokenizer(tmp_path)("a Red", padding="max_length", max_length=6, truncation=True).input_ids
    assert [words[i] for i in ids] == ["<|startoftext|>", "a</w>", "red</w>", *["<|endoftext|>"] * 3]
