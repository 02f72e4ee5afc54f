"""Public formats: round trips of every model, with diffusers' own converters as the oracle.

Also refusals, memory, pipeline folders, and what works without the optional part of the original layouts.
"""

import inspect
import io
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import ROOT, diffusers_wan, run_ranks
from tests.unit_tests import test_hunyuan_video as hunyuan
from tests.unit_tests import test_wan_variants as wan
from titan_video import convert
from titan_video.checkpoint.files import is_checkpoint
from titan_video.models import hunyuan_video as hunyuan_models
from titan_video.models import wan as wan_models
from titan_video.weights.export.pipeline_folder import complete_pipeline, export_path, is_exported
from titan_video.weights.export.save import save_hf
from titan_video.weights.formats import FORMAT_NAMES, get_format
from titan_video.weights.hf_storage import load_hf
from titan_video.weights.original import PREFIX

MODELS = {
    **{
        f"wan {name}": (wan_models, wan_models.WanModel, diffusers_wan, replace(args, text_len=30))
        for name, args in wan.VARIANTS.items()
    },
    **{
        f"hunyuan {name}": (hunyuan_models, hunyuan_models.HunyuanVideoModel, hunyuan.diffusers_model, args)
        for name, args in hunyuan.FORMS.items()
    },
}
MODELS = {
    name: (models.SPEC, build, oracle, replace(args, num_layers=2) if "wan" in name else args)
    for name, (models, build, oracle, args) in MODELS.items()
}

DENSE = tuple(name for name in FORMAT_NAMES if name != "stacked")  # that is of mixtures of experts


def read(path):
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [n for n in found if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])] == []


def diffusers_converted(name, state, args):
    """What diffusers' own single-file converter makes of a state dict of the public code.

    Two limits of it are lifted here: it knows the published width of HunyuanVideo only, and not the positions of Wan's
    first-and-last-frame model, which its conversion script knows.
    """
    from diffusers.loaders import single_file_utils

    if name.startswith("wan"):
        converted = single_file_utils.convert_wan_transformer_to_diffusers(dict(state))
        return {
            n.replace("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed"): t for n, t in converted.items()
        }
    source = inspect.getsource(single_file_utils.convert_hunyuan_video_transformer_to_diffusers)
    assert source.count("3072") == 1
    names = {"torch": torch}
    exec(source.replace("3072", str(args.dim)), names)
    return names["convert_hunyuan_video_transformer_to_diffusers"](dict(state))


@pytest.mark.parametrize("name", MODELS)
def test_round_trips_are_bitwise_and_agree_with_diffusers(name, tmp_path):
    """diffusers -> ours -> each format -> ours -> diffusers; diffusers' converter reads what lies between."""
    spec, build, oracle, args = MODELS[name]
    theirs = oracle(args)
    theirs.save_pretrained(tmp_path / "source" / "transformer")
    reference = {n: t.contiguous() for n, t in theirs.state_dict().items()}
    ours = build(args)
    load_hf(ours, tmp_path / "source", spec, args)
    for form in DENSE:
        kind = get_format(form)
        path = export_path(tmp_path / "first", form, "transformer")
        assert not is_exported(path, form, spec)
        save_hf(ours, path, spec, args, torch.float32, 60_000, format_name=form)
        assert is_exported(path, form, spec) and path.is_file() == kind.one_file
        stored = read(path)
        assert all(n.startswith(kind.prefix) for n in stored)
        if kind.layout == "original":
            assert_same(
                {
                    n: t.contiguous()
                    for n, t in diffusers_converted(
                        name, {n[len(kind.prefix) :]: t for n, t in stored.items()}, args
                    ).items()
                },
                reference,
            )
        again = build(args)
        load_hf(again, path, spec, args)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
        save_hf(again, tmp_path / "second" / form, spec, args, torch.float32)
        assert_same(read(tmp_path / "second" / form), reference)


@pytest.mark.parametrize("name", ["wan i2v", "hunyuan token_replace"])
def test_the_command_round_trips(name, tmp_path, capsys):
    spec, _, oracle, args = MODELS[name]
    theirs = oracle(args).bfloat16()
    # published folders mix types
    theirs.condition_embedder.float() if "wan" in name else theirs.time_text_embed.float()
    theirs.save_pretrained(tmp_path / "a")
    reference = {n: t.contiguous() for n, t in theirs.state_dict().items()}
    config = tmp_path / "a" / "config.json"
    for form in DENSE:
        kind = get_format(form)
        middle, back = tmp_path / (f"{form}.safetensors" if kind.one_file else form), tmp_path / f"{form}-back"
        convert.main([str(tmp_path / "a"), str(middle), "--format", form, "--max-shard-gib", "1e-4"])
        assert kind.one_file or len(list(middle.rglob("*-of-*.safetensors"))) > 2
        convert.main([str(middle), str(back), "--format", "diffusers", "--config", str(config)])
        assert_same(read(back / "transformer"), reference)
        assert json.loads((back / "transformer/config.json").read_text()) == spec.args_to_hf(args)
    convert.main(
        [str(middle), str(tmp_path / "f16"), "--format", "diffusers", "--config", str(config), "--dtype", "float16"]
    )
    assert_same(read(tmp_path / "f16" / "transformer"), {n: t.half() for n, t in reference.items()})
    if "wan" in name:
        stored = json.loads((tmp_path / "original/config.json").read_text())
        assert (stored["_class_name"], stored["model_type"], stored["in_dim"]) == ("WanModel", "i2v", args.in_channels)
        stored["num_heads"] = 8
        (tmp_path / "original/config.json").write_text(json.dumps(stored))
        with pytest.raises(SystemExit, match=r"num_heads = 8 \(the model has 4\)"):
            convert.main(
                [str(tmp_path / "original"), str(tmp_path / "n"), "--format", "diffusers", "--config", str(config)]
            )


def test_a_pickled_state_dict_is_read_as_hunyuan_is_published(tmp_path):
    spec, build, oracle, args = MODELS["hunyuan t2v"]
    ours = build(args)
    hunyuan.load_from_hf_state_dict(ours, spec, args, oracle(args).state_dict())
    save_hf(ours, tmp_path / "x.safetensors", spec, args, torch.float32, format_name="single_file")
    (tmp_path / "published/transformers").mkdir(parents=True)
    file = tmp_path / "published/transformers/mp_rank_00_model_states.pt"
    torch.save({"module": read(tmp_path / "x.safetensors")}, file)
    for path in (tmp_path / "published", file):
        again = build(args)
        load_hf(again, path, spec, args)
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))
    torch.save({"module": {"x": Evil()}}, file)
    with pytest.raises(
        ValueError, match="mp_rank_00_model_states.pt is no state dict of tensors: it asks for posix.system"
    ):
        load_hf(again, file, spec, args)


class Evil:
    def __reduce__(self):
        return os.system, ("echo this must not run > evil",)


@pytest.fixture(scope="module")
def debug_file(tmp_path_factory):
    """HunyuanVideo's latent-concat debug flavor in ComfyUI's format. No other flavor has its shapes."""
    spec, path = hunyuan_models.SPEC, tmp_path_factory.mktemp("debug") / "x.safetensors"
    args = spec.flavors["debug-i2v-latent-concat"]
    model = spec.build(args)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=g)
    save_hf(model, path, spec, args, torch.bfloat16, format_name="comfyui")
    return path


def test_the_model_is_detected_from_names_and_shapes(debug_file, tmp_path):
    convert.main([str(debug_file), str(tmp_path / "d"), "--format", "diffusers"])
    config = json.loads((tmp_path / "d/transformer/config.json").read_text())
    assert (
        config["_class_name"] == "HunyuanVideoTransformer3DModel" and config["image_condition_type"] == "latent_concat"
    )
    convert.main([str(tmp_path / "d"), str(tmp_path / "back.safetensors"), "--format", "comfyui"])
    assert_same(read(tmp_path / "back.safetensors"), read(debug_file))

    args = replace(hunyuan_models.SPEC.flavors["debug"])
    save_hf(
        hunyuan_models.SPEC.build(args),
        tmp_path / "t2v.safetensors",
        hunyuan_models.SPEC,
        args,
        torch.bfloat16,
        format_name="single_file",
    )
    with pytest.raises(
        SystemExit, match="several flavors of hunyuan_video: give one with --flavor: debug, debug-i2v-token-replace"
    ):
        convert.main([str(tmp_path / "t2v.safetensors"), str(tmp_path / "n"), "--format", "diffusers"])
    convert.main(
        [
            str(tmp_path / "t2v.safetensors"),
            str(tmp_path / "n"),
            "--format",
            "diffusers",
            "--flavor",
            "debug-i2v-token-replace",
        ]
    )
    assert json.loads((tmp_path / "n/transformer/config.json").read_text())["image_condition_type"] == "token_replace"


def test_wrong_tensors_are_refused_by_name(debug_file, tmp_path):
    good, flavor = load_file(debug_file), "debug-i2v-latent-concat"
    qkv = f"{PREFIX}double_blocks.0.img_attn_qkv.weight"

    def refused(tensors, *messages):
        save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(SystemExit) as e:
            convert.main(
                [str(tmp_path / "x.safetensors"), str(tmp_path / "out"), "--format", "diffusers", "--flavor", flavor]
            )
        assert all(message in str(e.value) for message in messages), str(e.value)
        assert not (tmp_path / "out").exists()

    refused({n: t for n, t in good.items() if n != qkv}, f"1 missing: {qkv}")
    lost = sorted(n for n in good if "single_blocks" in n)
    refused({n: t for n, t in good.items() if n not in lost}, f"{len(lost)} missing: {', '.join(lost[:5])}, ...")
    refused({**good, "vae.x": torch.ones(1), f"{PREFIX}y": torch.ones(1)}, f"2 extra: {PREFIX}y, vae.x")
    refused({**good, qkv: good[qkv][:-1].clone()}, f"1 of another shape: {qkv} (383, 128) instead of (384, 128)")
    refused({**good, qkv: good[qkv].to(torch.float8_e4m3fn)}, f"no plain floating point: {qkv} F8_E4M3")
    refused(
        {f"n.{i}": torch.ones(1) for i in range(7)},
        "holds no tensor of a",
        "diffusers (proj_out.bias) or original",
        PREFIX,
        "n.0, n.1, n.2, n.3, n.4, ...",
    )


@pytest.fixture
def without_original(monkeypatch):
    """The program without titan_video/weights/original.py."""
    monkeypatch.setitem(sys.modules, "titan_video.weights.original", None)


def test_diffusers_folders_need_no_optional_part(tmp_path, without_original):
    spec, build, oracle, args = MODELS["wan t2v"]
    theirs = oracle(args)
    theirs.save_pretrained(tmp_path / "source" / "transformer")
    ours = build(args)
    load_hf(ours, tmp_path / "source", spec, args)
    save_hf(ours, tmp_path / "saved", spec, args, torch.float32)
    assert_same(read(tmp_path / "saved"), {n: t.contiguous() for n, t in theirs.state_dict().items()})
    convert.main([str(tmp_path / "source"), str(tmp_path / "converted"), "--format", "diffusers"])
    assert_same(read(tmp_path / "converted" / "transformer"), read(tmp_path / "saved"))


def test_the_optional_part_of_the_original_layouts_is_named(debug_file, tmp_path, without_original):
    spec = hunyuan_models.SPEC
    args = spec.flavors["debug-i2v-latent-concat"]
    model = spec.build(args)
    part = "needs the optional part titan_video/weights/original"
    with pytest.raises(ValueError, match=f"x.safetensors: not all names .*{part}"):
        load_hf(model, debug_file, spec, args)
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=f"x.pt, a pickled state dict: {part}"):
        load_hf(model, tmp_path / "x.pt", spec, args)
    for name in DENSE[1:]:
        with pytest.raises(ValueError, match=f"weights in the format {name}: {part}"):
            save_hf(model, tmp_path / "out.safetensors", spec, args, torch.float32, format_name=name)
    assert not (tmp_path / "out.safetensors").exists()


def test_wrong_paths_are_refused(debug_file, tmp_path):
    for source, target, form, message in (
        (tmp_path / "none", tmp_path / "o", "diffusers", "SRC .*none does not exist"),
        (
            tmp_path,
            tmp_path / "o",
            "diffusers",
            r"holds no weights. Looked there, in its transformer/ .* for "
            r"diffusion_pytorch_model.safetensors.index.json",
        ),
        (debug_file, tmp_path / "o", "comfyui", r"should end in .safetensors"),
        (debug_file, debug_file, "comfyui", "exists; give a new path"),
        (ROOT / "pyproject.toml", tmp_path / "o", "original", "no file of weights"),
    ):
        with pytest.raises(SystemExit, match=message):
            convert.main([str(source), str(target), "--format", form])
    assert not (tmp_path / "o").exists()


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def peaks(folder, jobs):
    """By how much each conversion raises the memory of its process."""
    found = []
    for source, target, form in jobs:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before, config = peak(), str(folder / "shards/config.json")
        options = ["--format", form, "--max-shard-gib", str(2**-8), "--config", config]
        with redirect_stdout(io.StringIO()):
            convert.main([str(folder / source), str(folder / target), *options])
        found.append(peak() - before)
    return found


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="peak memory is read from Linux's /proc")
def test_memory_is_a_shard_whatever_the_model(tmp_path):
    """A model of 25 shards, from shards to one file and back. The peak is that of the process, with the pages of mapped
    files; a first conversion, which loads Python modules, is not counted."""
    spec, shard = wan_models.SPEC, 2**22
    args = wan_models.WanArgs(dim=512, num_heads=4, num_layers=12, ffn_dim=2048, text_dim=64, text_len=16, freq_dim=64)
    with torch.device("meta"):
        model = spec.build(args)
    save_hf(model.bfloat16().to_empty(device="cpu"), tmp_path / "shards", spec, args, torch.bfloat16, shard)
    jobs = [
        ("shards", "warm.safetensors", "comfyui"),
        ("shards", "one.safetensors", "comfyui"),
        ("one.safetensors", "back", "diffusers"),
    ]
    (found,) = run_ranks(peaks, 1, tmp_path, jobs, init=False)
    assert max(found[1:]) < 2 * shard, found
    assert (tmp_path / "one.safetensors").stat().st_size > 20 * shard
    assert len(list((tmp_path / "back/transformer").glob("*-of-*"))) > 20


def test_a_pipeline_is_completed(tmp_path, monkeypatch, caplog):
    spec, build, oracle, args = MODELS["wan t2v"]
    repository = tmp_path / "models--org--name"  # as the hub's cache has it
    source = repository / "snapshots" / "0"
    oracle(args).save_pretrained(source / "transformer")
    index = {
        "_class_name": "WanPipeline",
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "image_encoder": [None, None],
        "boundary_ratio": None,
    }
    (source / "model_index.json").write_text(json.dumps(index))
    (source / "tokenizer").mkdir()
    (source / "tokenizer/spiece.model").write_bytes(b"words")

    complete_pipeline(source, tmp_path / "partial", "transformer")
    assert not (tmp_path / "partial").exists()  # the source has no vae

    (source / "vae").mkdir()
    (repository / "blobs").mkdir()
    (repository / "blobs/b").write_bytes(b"weights")
    (source / "vae/x.safetensors").symlink_to("../../../blobs/b")
    for target, linked in ((tmp_path / "linked", True), (tmp_path / "copied", False)):
        if not linked:
            monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError("another file system")))
        for _ in range(2):
            complete_pipeline(source, target, "transformer")
        assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == [
            "model_index.json",
            "tokenizer/spiece.model",
            "vae/x.safetensors",
        ]
        weights = target / "vae/x.safetensors"
        assert (
            weights.read_bytes() == b"weights"
            and not weights.is_symlink()
            and weights.samefile(repository / "blobs/b") == linked
        )
    with pytest.raises(ValueError, match="is the source itself"):
        complete_pipeline(source, source, "transformer")

    convert.main([str(source), str(tmp_path / "full"), "--format", "diffusers", "--dtype", "bfloat16"])
    assert (tmp_path / "full/vae/x.safetensors").is_file() and json.loads(
        (tmp_path / "full/model_index.json").read_text()
    ) == index
    convert.main([str(source), str(tmp_path / "low"), "--format", "diffusers", "--subfolder", "transformer"])
    assert_same(read(tmp_path / "low/transformer"), read(source / "transformer"))


def test_checkpoints_are_told_from_weights(tmp_path):
    (tmp_path / "run/step-3").mkdir(parents=True)
    assert is_checkpoint(tmp_path / "run") and not is_checkpoint(tmp_path)
    (tmp_path / "run/step-3/manifest.json").write_text("{}")
    assert is_checkpoint(tmp_path / "run/step-3")
    with pytest.raises(SystemExit, match="holds step-3: give one of them"):
        convert.main([str(tmp_path / "run"), str(tmp_path / "o"), "--format", "original"])
    with pytest.raises(SystemExit, match="no config.toml above it"):
        convert.main([str(tmp_path / "run/step-3"), str(tmp_path / "o"), "--format", "original"])
