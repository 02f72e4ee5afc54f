"""Adapters in the files of other trainers, whose names are written out here: what is read adds the same to the weights,
and what cannot be read is named.
"""

import json
import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.unit_tests.test_hunyuan_video import T2V
from tests.unit_tests.test_lora import ARGS, build, forwards, oracle
from tests.unit_tests.test_wan import relative
from titan_video import convert
from titan_video.config.job_config import Lora
from titan_video.lora.adapters import add_adapters
from titan_video.lora.files import MergedWeights, load_lora, save_lora, section_of
from titan_video.lora.matrices import public_matrices
from titan_video.lora.names import flat
from titan_video.models import get_spec
from titan_video.weights.export.save import save_hf

RANK, ALPHA = 4, 8.0
SECTION = Lora(enable=True, rank=RANK, alpha=3.0)
WAN = {  # ours -> (public code, diffusers)
    **{f"self_attn.{x}": (f"self_attn.{x}", f"attn1.to_{x}") for x in "qkv"},
    **{f"cross_attn.{x}": (f"cross_attn.{x}", f"attn2.to_{x}") for x in "qkv"},
    "self_attn.o": ("self_attn.o", "attn1.to_out.0"),
    "cross_attn.o": ("cross_attn.o", "attn2.to_out.0"),
    "ffn.up": ("ffn.0", "ffn.net.0.proj"),
    "ffn.down": ("ffn.2", "ffn.net.2"),
}
IMAGE = {"cross_attn.k_image": ("cross_attn.k_img", "attn2.add_k_proj")}


def draw(model, modules, ranks=(RANK,)):
    """{our module: (down, up)} of adapters of scale ALPHA / rank, for the Linears of a model."""
    g, weights, found = torch.Generator().manual_seed(0), dict(model.named_parameters()), {}
    for i, module in enumerate(modules):
        rank, (outputs, inputs) = ranks[i % len(ranks)], weights[f"{module}.weight"].shape
        found[module] = torch.randn(rank, inputs, generator=g), torch.randn(outputs, rank, generator=g)
    return found


def deltas(model):
    """{our module: what its adapter adds to the weight}."""
    modules = {name: m for name, m in model.named_modules() if name.endswith(".adapter")}
    return {name.removesuffix(".adapter"): (m.scale * m.up @ m.down).detach() for name, m in modules.items()}


def assert_adds(model, drawn, scale=None, rtol=1e-5):
    found = deltas(model)
    assert found.keys() == drawn.keys()
    for name, (down, up) in drawn.items():
        expected = (ALPHA / len(down) if scale is None else scale) * up @ down
        torch.testing.assert_close(found[name], expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def stem(module, column):
    """The name of one of our modules of Wan in the public code (0) or in diffusers (1)."""
    _, block, end = module.split(".", 2)
    return f"blocks.{block}.{(WAN | IMAGE)[end][column]}"


def kohya(module):
    return f"lora_unet_{stem(module, 0).replace('.', '_')}"


DOWN_UP, A_B, NAMED = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    "lora_{}.default.weight",
)
FORMS = {  # name -> (stem of a module, ends of down and up, is alpha stored)
    "musubi": (kohya, DOWN_UP, True),
    "musubi without alpha": (kohya, DOWN_UP, False),
    "diffusion-pipe": (lambda m: f"diffusion_model.{stem(m, 0)}", A_B, False),
    "comfyui": (lambda m: f"diffusion_model.{stem(m, 0)}", DOWN_UP, True),
    "diffsynth": (lambda m: stem(m, 0), (NAMED.format("A"), NAMED.format("B")), False),
    "diffsynth whole": (lambda m: f"pipe.dit.{stem(m, 0)}", (NAMED.format("A"), NAMED.format("B")), False),
    "diffusers": (lambda m: f"transformer.{stem(m, 1)}", A_B, False),
    "diffusers, older": (lambda m: f"transformer.{stem(m, 1)}", ("lora.down.weight", "lora.up.weight"), False),
    "peft": (lambda m: f"base_model.model.{stem(m, 1)}", A_B, False),
    "peft of the public code": (lambda m: f"base_model.model.{stem(m, 0)}", A_B, False),
}


def write(path, drawn, form, dtype=torch.float32, metadata=None):
    """A file of that form: without alpha the scale is 1. Returns its tensors."""
    name, (down_end, up_end), has_alpha = FORMS[form]
    tensors = {}
    for module, (down, up) in drawn.items():
        tensors[f"{name(module)}.{down_end}"] = down.to(dtype)
        tensors[f"{name(module)}.{up_end}"] = up.to(dtype)
        if has_alpha:
            tensors[f"{name(module)}.alpha"] = torch.tensor(int(ALPHA))  # an integer, as musubi-tuner converts
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, metadata)
    return tensors


@pytest.fixture(scope="module")
def drawn():
    model = build("wan", SECTION)
    return draw(model, deltas(model))


@pytest.mark.parametrize("form", FORMS)
def test_every_form_adds_the_same(form, drawn, tmp_path):
    model, file = build("wan", SECTION), tmp_path / "x" / "any_name.safetensors"
    for dtype, rtol in ((torch.float32, 1e-5), (torch.bfloat16, 0.03), (torch.float16, 0.005)):
        write(file, drawn, form, dtype)
        load_lora(model, file, get_spec("wan"), ARGS["wan"], SECTION)
        assert_adds(model, drawn, None if FORMS[form][2] else 1.0, rtol)
    load_lora(model, file.parent, get_spec("wan"), ARGS["wan"], SECTION)  # the folder of it


def test_the_scale_that_peft_and_diffusers_say(drawn, tmp_path):
    spec, args, folder = get_spec("wan"), ARGS["wan"], tmp_path / "x"
    for config, scale in (
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 8, "rank_pattern": {"attn1.to_q": 4, "blocks.0": 4}, "lora_alpha": 1}, None),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"ffn.net.2": 12}}, "pattern"),
    ):
        write(folder / "adapter_model.safetensors", drawn, "peft")
        (folder / "adapter_config.json").write_text(json.dumps(config))
        model = build("wan", SECTION)
        if scale is None:
            with pytest.raises(ValueError, match="adapter_config.json has r = 8 for .*, whose adapter has rank 4"):
                load_lora(model, folder, spec, args, SECTION)
            continue
        load_lora(model, folder, spec, args, SECTION)
        others = {n: pair for n, pair in drawn.items() if scale != "pattern" or not n.endswith("ffn.down")}
        found = deltas(model)
        for name, (down, up) in drawn.items():
            expected = (scale if scale != "pattern" else 2.0 if name in others else 3.0) * up @ down
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-4)
    for config, words in (
        ({"r": 4, "lora_alpha": 8, "use_dora": True}, "use_dora = True"),
        ({"r": 4, "alpha_pattern": {"a.*b": 1}, "lora_alpha": 1}, "legal: a table of names"),
        ({"r": 0, "lora_alpha": 1}, "has r = 0 for"),
        ([], "is no table"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=words):
            load_lora(build("wan", SECTION), folder, spec, args, SECTION)


def test_peft_without_its_configuration_says_what_is_assumed(drawn, tmp_path, caplog):
    write(tmp_path / "x.safetensors", drawn, "peft")
    model = build("wan", SECTION)
    with caplog.at_level(logging.WARNING):
        load_lora(model, tmp_path / "x.safetensors", get_spec("wan"), ARGS["wan"], SECTION)
    assert (
        "is of PEFT, whose adapter_config.json is not beside it: lora_alpha is taken to equal the rank" in caplog.text
    )
    assert_adds(model, drawn, 1.0)


def test_lower_ranks_are_filled_up_and_can_be_trained(tmp_path):
    spec, args, section = get_spec("wan"), ARGS["wan"], replace(SECTION, rank=6)
    model = build("wan", section)
    drawn = draw(model, deltas(model), ranks=(1, 4, 6))
    write(tmp_path / "x.safetensors", drawn, "musubi")
    load_lora(model, tmp_path / "x.safetensors", spec, args, section)
    assert_adds(model, drawn)
    downs = [p for n, p in model.named_parameters() if n.endswith("adapter.down")]
    assert all(row.any() for p in downs for row in p)
    with pytest.raises(ValueError, match="has rank 6, in this run 4: set lora.rank .*highest rank in the file is 6"):
        load_lora(build("wan", SECTION), tmp_path / "x.safetensors", spec, args, SECTION)
    assert section_of(tmp_path / "x.safetensors", spec, args).rank == 6


def test_image_tokens_and_targets(tmp_path):
    """Adapters of fewer or of other Linears: the message says which targets the file has."""
    spec, args = get_spec("wan"), replace(ARGS["wan"], in_channels=36, image_dim=64, image_len=5)
    lora = replace(SECTION, target_modules=("self_attn.q", "cross_attn.k_image"))
    model, file = spec.build(args), tmp_path / "x.safetensors"
    add_adapters(model, spec, lora, torch.float32)
    drawn = draw(model, [m.removesuffix(".adapter") for m, _ in model.named_modules() if m.endswith(".adapter")])
    write(file, drawn, "musubi")
    load_lora(model, file, spec, args, lora)
    assert_adds(model, drawn)
    for targets in ((), ("self_attn.q",)):
        with pytest.raises(ValueError, match="lora.target_modules = cross_attn.k_image,self_attn.q"):
            load_lora(model, file, spec, args, replace(lora, target_modules=targets))
    save_file(load_file(file) | {"lora_unet_head_head.lora_down.weight": torch.ones(2, 8)}, file)
    with pytest.raises(ValueError, match="or other tensors: head_head .one matrix without the other"):
        load_lora(model, file, spec, args, lora)
    save_file(load_file(file) | {"lora_unet_head_head.lora_up.weight": torch.ones(64, 2)}, file)
    with pytest.raises(ValueError, match="or other tensors: head_head.* only Linears of blocks have adapters"):
        load_lora(model, file, spec, args, lora)


Q = "diffusion_model.blocks.0.self_attn.q"


@pytest.mark.parametrize(
    "name, kind",
    [
        (f"{Q}.dora_scale", "DoRA"),
        ("base_model.model.blocks.0.attn1.to_q.lora_magnitude_vector.weight", "DoRA"),
        (f"{Q}.lokr_w1", "LoKr"),
        (f"{Q}.hada_w1_a", "LoHa"),
        (f"{Q}.oft_blocks", "OFT"),
        (f"{Q}.lora_mid.weight", "convolutions"),
        ("lora_unet_blocks_0_self_attn_q.lora_down.0.weight", "in several parts"),
        ("diffusion_model.blocks.0.norm3.diff", "a change of a whole weight or bias .diff, diff_b."),
        (f"{Q}.diff_b", "a change of a whole weight or bias .diff, diff_b."),
        ("transformer.blocks.0.attn1.to_q.lora_B.bias", "an adapter with a bias"),
        ("base_model.model.proj_out.modules_to_save.default.weight", "a whole module"),
    ],
)
def test_other_kinds_are_refused_by_name(name, kind, drawn, tmp_path):
    tensors, file = write(tmp_path / "x.safetensors", drawn, "comfyui"), tmp_path / "x.safetensors"
    model, arguments = build("wan", SECTION), (get_spec("wan"), ARGS["wan"], SECTION)
    save_file(tensors | {name: torch.ones(3)}, file)
    with pytest.raises(ValueError, match=f"x.safetensors holds {kind}|x.safetensors holds .*{kind}"):
        load_lora(model, file, *arguments)
    save_file(tensors | {name: torch.zeros(3)}, file)  # changes nothing
    load_lora(model, file, *arguments)
    assert_adds(model, drawn)


def test_what_a_file_may_not_hold(drawn, tmp_path, caplog):
    tensors, file = write(tmp_path / "x.safetensors", drawn, "comfyui"), tmp_path / "x.safetensors"
    model, arguments = build("wan", SECTION), (get_spec("wan"), ARGS["wan"], SECTION)
    down, up = tensors[f"{Q}.lora_down.weight"], tensors[f"{Q}.lora_up.weight"]
    for more, words in (
        ({f"{Q}.alpha": torch.tensor(0.0)}, "alpha is 0.0; legal: one number above 0"),
        ({f"{Q}.alpha": torch.tensor(float("nan"))}, "alpha is nan"),
        ({f"{Q}.alpha": torch.ones(2)}, "alpha is 0; legal"),
        ({f"{Q}.lora_down.weight": down[:2].clone()}, "impossible shapes"),
        ({f"{Q}.lora_up.weight": up.to(torch.int32)}, "no plain floating point"),
        ({f"{Q}.lora_up.weight": up[:5].clone()}, "and 5 outputs, the matrix of wan"),
        ({"diffusion_model.blocks.0.extra": up}, "or other tensors: diffusion_model.blocks.0.extra"),
        ({f"{Q[16:]}.lora_down.weight": down, f"{Q[16:]}.lora_up.weight": up}, "two adapters of blocks.0.self_attn.q"),
        ({"x.lora_A.second.weight": down}, "adapters of several names"),
    ):
        save_file(tensors | {name: tensor.clone() for name, tensor in more.items()}, file)
        with pytest.raises(ValueError, match=words):
            load_lora(model, file, *arguments)
    names = ("lora_te_text_model_q.lora_down.weight", "lora_te1_x.alpha", "text_encoder.layers.0.q.lora_A.weight")
    save_file(tensors | {name: down.clone() for name in names}, file)
    with caplog.at_level(logging.WARNING):
        load_lora(model, file, *arguments)
    assert "3 tensors are of a text encoder, which is not trained here: left out" in caplog.text
    assert_adds(model, drawn)
    other = {f"double_blocks.0.img_attn_proj.{end}": torch.ones(4, 4) for end in A_B}
    save_file(other, file)
    with pytest.raises(ValueError, match="holds adapters of another model than wan: double_blocks.0.img_attn_proj"):
        load_lora(model, file, *arguments)


def test_names_of_modules_are_unique_without_their_dots():
    for family in ARGS:
        spec = get_spec(family)
        for layout in ("diffusers", "original"):
            names = [matrix.name for matrix in public_matrices(spec, ARGS[family], layout)]
            assert len({flat(name) for name in names}) == len(names) > 10


# --- HunyuanVideo: adapters of matrices that are several of ours ---


def fused(prefix="lora_unet_", ends=DOWN_UP, joined=True, native=False):
    """Tensors of adapters of the public code's matrices, as musubi-tuner makes them: {matrix: (down, up)}, file."""
    g, found, tensors = torch.Generator().manual_seed(1), {}, {}
    D, H = T2V.dim, T2V.ffn_dim
    shapes = {"double_blocks.0.img_attn_qkv": (3 * D, D), "double_blocks.1.txt_mlp.fc1": (H, D)}
    shapes |= {"single_blocks.0.linear1": (3 * D + H, D), "single_blocks.1.linear2": (D, D + H)}
    for name, (outputs, inputs) in shapes.items():
        down, up = torch.randn(RANK, inputs, generator=g), torch.randn(outputs, RANK, generator=g)
        found[name] = down, up
        name = name.replace("attn_qkv", "attn.qkv").replace("mlp.fc1", "mlp.0") if native else name
        name = prefix + (name.replace(".", "_") if joined else name)
        tensors |= {f"{name}.{ends[0]}": down, f"{name}.{ends[1]}": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return found, tensors


FUSED = {
    "musubi": {},
    "diffusion-pipe": {"prefix": "transformer.", "ends": A_B, "joined": False},
    "ComfyUI's own": {"prefix": "diffusion_model.", "joined": False, "native": True},
}


@pytest.mark.parametrize("form", FUSED)
def test_one_adapter_of_several_of_our_matrices(form, tmp_path):
    spec, args, file = get_spec("hunyuan_video"), T2V, tmp_path / "x.safetensors"
    found, tensors = fused(**FUSED[form])
    save_file(tensors, file)
    section = section_of(file, spec, args)
    assert (section.rank, len(section.target_modules)) == (RANK, 3 + 1 + 4 + 1)
    model = build("hunyuan_video", section, state=oracle("hunyuan_video").state_dict())
    load_lora(model, file, spec, args, section)
    for name, weights in (("base", None), ("merged", MergedWeights(model))):
        path = tmp_path / f"{name}.safetensors"
        save_hf(model, path, spec, args, torch.float32, weights=weights, format_name="single_file")
    base, merged = load_file(tmp_path / "base.safetensors"), load_file(tmp_path / "merged.safetensors")
    changed = {name.removesuffix(".weight") for name in base if not base[name].equal(merged[name])}
    assert changed == found.keys()
    for name, (down, up) in found.items():
        expected = base[f"{name}.weight"] + ALPHA / RANK * up @ down
        torch.testing.assert_close(merged[f"{name}.weight"], expected, rtol=1e-5, atol=1e-4)


def test_diffusers_does_not_read_the_comfyui_form_of_hunyuan_video(tmp_path):
    """As docs/lora.md says. Its converter knows lora_A and lora_B alone, and splits every tensor of a fused matrix."""
    from diffusers.loaders import lora_conversion_utils

    lora = Lora(enable=True, rank=2, alpha=2, target_modules=tuple(f"double_blocks.0.attn.{x}" for x in "qkv"))
    model, spec = build("hunyuan_video", lora), get_spec("hunyuan_video")
    save_lora(model, tmp_path / "x.safetensors", spec, T2V, lora, "comfyui", torch.float32)
    with pytest.raises(RuntimeError, match="chunk"):
        lora_conversion_utils._convert_hunyuan_video_lora_to_diffusers(load_file(tmp_path / "x.safetensors"))


# --- convert ---


def to(source, target, form, *more):
    convert.main([str(source), str(target), "--format", form, *more])
    return target


@pytest.mark.parametrize("family", ARGS)
def test_convert_there_and_back(family, tmp_path, monkeypatch):
    """Through every form; diffusers and PEFT load theirs, and compute what our model does."""
    peft = pytest.importorskip("peft")
    spec, args = get_spec(family), ARGS[family]
    monkeypatch.setitem(spec.flavors, "tiny", args)
    theirs = oracle(family)
    model = build(family, replace(SECTION, rank=3), state=theirs.state_dict())
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(0, 0.1) if name.endswith("adapter.up") else None
        expected = forwards(family)[0](model)
    first = tmp_path / "first.safetensors"
    save_lora(model, first, spec, args, replace(SECTION, rank=3), "comfyui", torch.float32)
    forms = ("diffusers", "musubi", *(["diffsynth"] if family == "wan" else []), "peft", "comfyui")
    source = first
    for form in forms:
        source = to(source, tmp_path / form, form)
        assert [p.suffix for p in source.iterdir()].count(".safetensors") == 1
    last, start = load_file(tmp_path / "comfyui" / "comfyui.safetensors"), load_file(first)
    assert last.keys() == start.keys()
    for name in start:
        if name.endswith("up.weight"):
            stem = name.removesuffix(".lora_up.weight")
            before, after = (
                t[name] @ t[f"{stem}.lora_down.weight"] * t[f"{stem}.alpha"] / t[name].shape[1] for t in (start, last)
            )
            torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    peft_model = peft.PeftModel.from_pretrained(theirs, tmp_path / "peft")
    with torch.no_grad():
        assert relative(forwards(family)[1](peft_model), expected) <= 1e-5
    if family == "wan":  # musubi's form is read by diffusers, too
        from diffusers import WanPipeline

        theirs = oracle(family)
        pipeline = WanPipeline(**dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler")), transformer=theirs)
        pipeline.load_lora_weights(tmp_path / "musubi", weight_name="musubi.safetensors")
        with torch.no_grad():
            assert relative(forwards(family)[1](theirs), expected) <= 1e-5


def test_convert_a_fused_adapter_to_diffusers_and_back(tmp_path, monkeypatch):
    monkeypatch.setitem(get_spec("hunyuan_video").flavors, "tiny", T2V)
    _, tensors = fused()
    save_file(tensors, tmp_path / "x.safetensors")
    to(tmp_path / "x.safetensors", tmp_path / "y.safetensors", "diffusers")
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight" in load_file(tmp_path / "y.safetensors")
    back = load_file(to(tmp_path / "y.safetensors", tmp_path / "z.safetensors", "musubi"))
    assert back.keys() == tensors.keys()  # one adapter of each matrix, with the scale in lora_up
    for name in back:
        expected = tensors[name] * ALPHA / RANK if name.endswith("lora_up.weight") else tensors[name]
        torch.testing.assert_close(back[name], torch.tensor(4.0) if name.endswith("alpha") else expected)


def test_convert_says_what_it_does_not_take(drawn, tmp_path, capsys):
    file = tmp_path / "x.safetensors"
    tensors = write(file, drawn, "musubi")

    def fails(*argv):
        with pytest.raises(SystemExit) as caught:
            convert.main([str(a) for a in argv])
        return str(caught.value)

    assert "holds adapters: --format is one of diffusers, comfyui, musubi" in fails(
        file, tmp_path / "y.safetensors", "--format", "original"
    )
    assert "fit no known model" in fails(file, tmp_path / "y.safetensors", "--format", "comfyui")
    save_file({"lora_unet_nothing.lora_down.weight": torch.ones(1, 1), "x": torch.ones(1)}, file)
    assert "holds no adapters. Names of adapters: " in fails(file, tmp_path / "y", "--format", "comfyui")
    save_file({"blocks.0.self_attn.q.weight": torch.ones(1)}, file)
    assert "--format musubi is of adapters, and SRC" in fails(file, tmp_path / "y", "--format", "musubi")
    save_file(tensors, file)
    assert "makes a folder" in fails(
        file, tmp_path / "y.safetensors", "--format", "peft", "--config", write_config(tmp_path), "--model", "wan"
    )


def write_config(folder):
    path = folder / "config.json"
    path.write_text(json.dumps(get_spec("wan").args_to_hf(ARGS["wan"])))
    return path


def test_the_metadata_says_for_whom_a_file_is(tmp_path):
    from safetensors import safe_open

    model = build("wan", SECTION)
    for form, words in (
        ("diffusers", "ComfyUI wants the other form: python -m titan_video.convert"),
        ("comfyui", "of ComfyUI"),
    ):
        save_lora(model, tmp_path / form, get_spec("wan"), ARGS["wan"], SECTION, form, torch.float32)
        with safe_open(tmp_path / form, "pt") as file:
            assert words in file.metadata()["adapters"]
