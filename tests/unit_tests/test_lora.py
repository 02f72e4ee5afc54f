"""Adapters: what is trained and in which types, files that diffusers loads, ComfyUI's format by the rule of its loader,
merged weights, and loading them again.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import diffusers_wan, load_from_hf_state_dict
from tests.unit_tests import test_hunyuan_video as hunyuan
from tests.unit_tests import test_wan as wan
from titan_video.checkpoint.state import ModelState, OptimizerState
from titan_video.config.job_config import Ema, Lora, Optimizer
from titan_video.distributed.utils import initialise
from titan_video.lora.adapters import add_adapters, init_adapter
from titan_video.lora.files import ADAPTER_FORMATS, MergedWeights, load_lora, save_lora
from titan_video.models import get_spec
from titan_video.models.layers import is_adapter
from titan_video.optim.ema import EmaWeights
from titan_video.optim.optimizer import build_optimizer
from titan_video.weights.export.save import save_hf
from titan_video.weights.hf_storage import load_hf

WAN_ARGS = replace(wan.ARGS, text_len=16, num_layers=2)
ARGS = {"wan": WAN_ARGS, "hunyuan_video": hunyuan.T2V}
LORA = Lora(enable=True, rank=4, alpha=6.0)


def oracle(family):
    return diffusers_wan(WAN_ARGS) if family == "wan" else hunyuan.diffusers_model(hunyuan.T2V)


def forwards(family):
    """(ours, theirs): model -> output, for the same input."""
    if family == "wan":
        latents, t, text, _ = wan.make_inputs(replace(WAN_ARGS, text_len=16))
        return lambda m: wan.ours_forward(m, latents, t, text), lambda m: m(latents, t, text, return_dict=False)[0]
    *inputs, _ = hunyuan.make_inputs()
    return lambda m: hunyuan.run_ours(m, *inputs), lambda m: hunyuan.run_theirs(m, *inputs)


def build(family, lora=LORA, dtype=torch.float32, state=None):
    spec = get_spec(family)
    model = spec.build(ARGS[family])
    if state is not None:
        load_from_hf_state_dict(model, spec, ARGS[family], state)
    add_adapters(model, spec, lora, dtype)
    initialise(model, init_adapter, 0, is_adapter)
    return model


@pytest.fixture(scope="module", params=ARGS)
def trained(request):
    """(family, model after three steps, its output, diffusers' base model, its output). Tests change neither model."""
    family, theirs = request.param, oracle(request.param)
    model = build(family, state=theirs.state_dict())
    ours, reference = forwards(family)
    with torch.no_grad():
        base = reference(theirs)
        assert wan.relative(ours(model), base) <= 1e-5  # `up` is zero: the frozen model
    before = {n: p.clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, Optimizer(lr=0.02, implementation="foreach"))
    for _ in range(3):
        ours(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[n]) != is_adapter(n) for n, p in model.named_parameters())
    with torch.no_grad():
        out = ours(model)
    assert wan.relative(out, base) > 0.05
    return family, model, out, theirs, base


def test_what_is_trained_and_what_it_costs():
    for family, dtype in (("wan", torch.bfloat16), ("hunyuan_video", torch.bfloat16), ("wan", torch.float32)):
        spec, model = get_spec(family), build(family, dtype=dtype)
        for name, p in model.named_parameters():
            kept = name.partition(".")[0] in spec.plan.fp32
            assert p.requires_grad == is_adapter(name)
            assert p.dtype == (torch.float32 if is_adapter(name) or kept else dtype), name
        optimizer = build_optimizer(model, Optimizer())
        adapters = {n for n, _ in model.named_parameters() if is_adapter(n)}
        assert set(OptimizerState(model, optimizer).params) == EmaWeights(model, Ema()).state_dict().keys() == adapters
        assert ModelState(model, is_adapter).state_dict().keys() == adapters
        names = {n.split(".", 2)[2].removesuffix(".adapter.up") for n in adapters if n.endswith("up")}
        assert names == set(spec.lora_targets)


def test_targets():
    model = build("wan", replace(LORA, target_modules=("self_attn.q", "blocks.1.ffn.up")))
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert names == [
        f"blocks.{m}.adapter.{end}" for m in ("0.self_attn.q", "1.self_attn.q", "1.ffn.up") for end in ("down", "up")
    ]
    for unknown in ("attn.q", "self_attn", "text_embedder.up"):
        with pytest.raises(
            ValueError, match=f"lora.target_modules: '{unknown}' is the end of no name.*self_attn.q, self_attn.k"
        ):
            build("wan", replace(LORA, target_modules=("ffn.up", unknown)))


def test_diffusers_loads_the_adapters(trained, tmp_path):
    pytest.importorskip("peft")
    from diffusers import HunyuanVideoPipeline, WanPipeline

    family, model, out, theirs, base = trained
    spec, (_, reference) = get_spec(family), forwards(family)
    # diffusers' reader of HunyuanVideo files in ComfyUI's format assumes the published sizes.
    forms = ["diffusers", "comfyui"] if family == "wan" else ["diffusers"]
    for form in forms:
        file = tmp_path / ADAPTER_FORMATS[form].file
        save_lora(model, file, spec, ARGS[family], LORA, form, torch.float32)
        parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
        pipeline = (
            WanPipeline(**parts, transformer=theirs)
            if family == "wan"
            else HunyuanVideoPipeline(**parts, tokenizer_2=None, text_encoder_2=None, transformer=theirs)
        )
        pipeline.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="a")
        with torch.no_grad():
            assert wan.relative(reference(theirs), out) <= 1e-5
            pipeline.set_adapters("a", 0.0)
            assert torch.equal(reference(theirs), base)
        pipeline.unload_lora_weights()
    with torch.no_grad():
        assert torch.equal(reference(theirs), base)


def test_comfyui_format_adds_up_to_the_merged_weights(trained, tmp_path):
    """ComfyUI's loader adds alpha / rank * up @ down to the tensor of that name, which may stack several of ours."""
    family, model, _, _, _ = trained
    spec, args = get_spec(family), ARGS[family]
    lora = (
        replace(LORA, target_modules=("attn.q", "attn.v", "attn.out", "attn.text_o"))
        if family == "hunyuan_video"
        else LORA
    )
    model = model if lora is LORA else build(family, lora, state=hunyuan.diffusers_model(args).state_dict())
    if lora is not LORA:
        for name, p in model.named_parameters():
            p.data.normal_(0, 0.1) if is_adapter(name) else None
    save_lora(model, tmp_path / "lora.safetensors", spec, args, lora, "comfyui", torch.float32)
    save_hf(model, tmp_path / "base.safetensors", spec, args, torch.float32, format_name="single_file")
    save_hf(
        model,
        tmp_path / "merged.safetensors",
        spec,
        args,
        torch.float32,
        weights=MergedWeights(model),
        format_name="single_file",
    )
    adapters, base, merged = (load_file(tmp_path / f"{name}.safetensors") for name in ("lora", "base", "merged"))
    stems = {
        name.removesuffix(".alpha").removeprefix("diffusion_model.") for name in adapters if name.endswith(".alpha")
    }
    assert len(adapters) == 3 * len(stems)
    for name, weight in base.items():
        stem = name.removesuffix(".weight")
        if stem in stems and name.endswith(".weight"):
            down, up, alpha = (
                adapters[f"diffusion_model.{stem}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha")
            )
            weight = weight + alpha / len(down) * (up @ down)
            assert not torch.equal(weight, base[name])
            stems.remove(stem)
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=1e-6)
    assert not stems


def test_merged_weights_are_a_diffusers_folder(trained, tmp_path):
    family, model, out, _, _ = trained
    spec, (_, reference) = get_spec(family), forwards(family)
    save_hf(model, tmp_path / "transformer", spec, ARGS[family], torch.float32, weights=MergedWeights(model))
    theirs = type(oracle(family)).from_pretrained(tmp_path / "transformer")
    with torch.no_grad():
        assert wan.relative(reference(theirs), out) <= 1e-5
    other = build(family)
    load_hf(other, tmp_path, spec, ARGS[family])  # frozen weights only; adapters stay as they are
    with torch.no_grad():
        assert wan.relative(forwards(family)[0](other), out) <= 1e-5


@pytest.mark.parametrize("form", ADAPTER_FORMATS)
def test_load_again(trained, form, tmp_path):
    family, model, out, theirs, _ = trained
    spec, args, (ours, _) = get_spec(family), ARGS[family], forwards(family)
    save_lora(model, tmp_path / "x.safetensors", spec, args, LORA, form, torch.float32)
    same = build(family, state=theirs.state_dict())
    load_lora(same, tmp_path / "x.safetensors", spec, args, LORA)
    for (name, a), b in zip(model.named_parameters(), same.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0, msg=name)
    lora = replace(LORA, alpha=1.0)  # another alpha: other adapters, the same model
    other = build(family, lora, state=theirs.state_dict())
    load_lora(other, tmp_path / "x.safetensors", spec, args, lora)
    with torch.no_grad():
        assert wan.relative(ours(other), out) <= 1e-5


def test_diffusers_own_file(trained, tmp_path):
    """Its metadata holds alpha, and lora_B is not scaled."""
    family, model, out, theirs, _ = trained
    spec, args = get_spec(family), ARGS[family]
    save_lora(model, tmp_path / "x.safetensors", spec, args, replace(LORA, alpha=4.0), "diffusers", torch.float32)
    note = {"format": "pt", "lora_adapter_metadata": json.dumps({"transformer.r": 4, "transformer.lora_alpha": 6.0})}
    save_file(load_file(tmp_path / "x.safetensors"), tmp_path / "y.safetensors", note)
    other = build(family, state=theirs.state_dict())
    load_lora(other, tmp_path / "y.safetensors", spec, args, LORA)
    with torch.no_grad():
        assert wan.relative(forwards(family)[0](other), out) <= 1e-5


def test_refused_files(trained, tmp_path):
    family, model, _, _, _ = trained
    spec, args, file = get_spec(family), ARGS[family], tmp_path / "x.safetensors"
    for form in ADAPTER_FORMATS:
        save_lora(model, file, spec, args, LORA, form, torch.bfloat16)
        tensors = load_file(file)
        first = next(name for name in tensors if name.endswith(ADAPTER_FORMATS[form].up))
        with pytest.raises(ValueError, match="set lora.rank and model.flavor to fit"):
            load_lora(build(family, replace(LORA, rank=2)), file, spec, args, replace(LORA, rank=2))
        save_file({n: t for n, t in tensors.items() if n != first}, file)
        with pytest.raises(ValueError, match="x.safetensors has no adapter of .*lora.target_modules"):
            load_lora(model, file, spec, args, LORA)
        save_file(
            tensors | {f"{ADAPTER_FORMATS[form].prefix}elsewhere.{ADAPTER_FORMATS[form].up}": torch.zeros(2)}, file
        )
        with pytest.raises(ValueError, match="does not ask for.*elsewhere"):
            load_lora(model, file, spec, args, LORA)
        save_file({"model.x": torch.zeros(1)}, file)
        with pytest.raises(ValueError, match=r"holds no adapters.*lora_unet_.*kohya.*found model.x"):
            load_lora(model, file, spec, args, LORA)


def test_one_adapter_over_several_of_our_matrices_is_split(tmp_path):
    family, file = "hunyuan_video", tmp_path / "x.safetensors"
    targets = tuple(f"double_blocks.0.attn.{x}" for x in "qkv")
    spec, args, lora = get_spec(family), ARGS[family], replace(LORA, target_modules=targets)
    save_lora(build(family, lora), file, spec, args, lora, "comfyui", torch.float32)
    tensors = load_file(file)
    tensors = {name: t if name.endswith("alpha") else torch.randn(t.shape) for name, t in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(ValueError, match="has rank 12, in this run 4: set lora.rank"):
        load_lora(build(family, lora), file, spec, args, lora)
    lora = replace(lora, rank=12)
    model = build(family, lora)
    load_lora(model, file, spec, args, lora)
    linear = model.double_blocks["0"].attn
    delta = torch.cat([x.adapter.scale * x.adapter.up @ x.adapter.down for x in (linear.q, linear.k, linear.v)])
    stem = "diffusion_model.double_blocks.0.img_attn_qkv"
    down, up, alpha = (tensors[f"{stem}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
    torch.testing.assert_close(delta.detach(), alpha / 12 * up @ down)
    save_lora(model, tmp_path / "y.safetensors", spec, args, lora, "comfyui", torch.float32)
    assert load_file(tmp_path / "y.safetensors")[f"{stem}.lora_down.weight"].equal(down)  # one adapter again


def test_layouts_of_block_weights_change_inputs_only():
    """An adapter applies a weight's layout transform to `down` alone. That holds if the transform permutes inputs."""
    for family in ARGS:
        spec, args = get_spec(family), ARGS[family]
        shapes = {name: p.shape for name, p in spec.build(args).named_parameters()}
        for rule in spec.hf_names:
            name = rule.ours.replace("{}", "0")
            if (
                rule.to_public
                and name in shapes
                and len(shapes[name]) == 2
                and rule.ours.split(".")[0] in spec.plan.blocks
            ):
                up, down = torch.randn(shapes[name][0], 3), torch.randn(3, shapes[name][1])
                torch.testing.assert_close(rule.to_public(up @ down, args), up @ rule.to_public(down, args))
