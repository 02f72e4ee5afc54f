"""Weights in the diffusers layout, one process: names, slices, refusals, atomic replacement, parity with diffusers."""

import json
import os
import shutil
from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.helpers import diffusers_wan, hf_state_dict
from titan_video.distributed.utils import clean_name
from titan_video.models.spec import LatentGeometry, ModelSpec, NameRule, ParallelPlan
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.tools.files import StorageError
from titan_video.weights.export import safetensors_file
from titan_video.weights.export.save import plan_shards, save_hf
from titan_video.weights.formats import public_names
from titan_video.weights.hf_storage import load_hf


@dataclass(frozen=True)
class ToyArgs:
    width: int = 7
    channels: int = 3
    heads: int = 1


class Toy(nn.Module):
    """Odd widths, so that few shards are even, and one parameter with fewer rows than ranks."""

    def __init__(self, args: ToyArgs):
        super().__init__()
        self.patch = nn.Linear(args.channels * 4, args.width)
        self.blocks = nn.ModuleDict({str(i): nn.Linear(args.width, args.width + 2 * i) for i in range(2)})
        self.table = nn.ParameterDict({str(i): nn.Parameter(torch.empty(2, 8)) for i in range(2)})
        self.out = nn.Linear(args.width, 12)


TOY = ModelSpec(
    name="toy",
    flavors={"debug": ToyArgs()},
    build=Toy,
    init_parameter=lambda name, tensor, generator: None,
    geometry=lambda args: LatentGeometry(channels=3, temporal_stride=4, spatial_stride=8),
    plan=ParallelPlan(blocks=("blocks",)),
    hf_names=(
        NameRule(
            "patch.weight",
            "embed.proj.weight",
            lambda t, a: t.reshape(a.width, a.channels, 1, 2, 2),
            lambda t, a: t.reshape(a.width, -1),
        ),
        NameRule("patch.bias", "embed.proj.bias"),
        NameRule("blocks.{}.weight", "layers.{}.w"),
        NameRule("blocks.{}.bias", "layers.{}.b"),
        NameRule("table.{}", "layers.{}.table"),
        NameRule("out.weight", "head.weight"),
        NameRule("out.bias", "head.bias"),
    ),
    args_from_hf=lambda config: ToyArgs(**{k: v for k, v in config.items() if not k.startswith("_")}),
    args_to_hf=lambda args: {"_class_name": "Toy", "width": args.width, "channels": args.channels, "heads": args.heads},
)
ARGS = ToyArgs()


def toy_tensors(seed=0):
    """Full random tensors by our names."""
    g = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Toy(ARGS).named_parameters()}
    return {n: torch.randn(shape, generator=g) for n, shape in shapes.items()}


def toy_model(tensors=None):
    model = Toy(ARGS)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(tensors[n]) if tensors else p.fill_(float("nan"))
    return model


def write_public(folder, tensors=None, shards=2, dtype=torch.float32):
    """What a public checkpoint looks like, written without the code under test."""
    folder.mkdir()
    public = {n: t.to(dtype) for n, t in hf_state_dict(tensors or toy_tensors(), TOY, ARGS).items()}
    (folder / "config.json").write_text(json.dumps(TOY.args_to_hf(ARGS)))
    if shards == 1:
        save_file(public, folder / "diffusion_pytorch_model.safetensors")
        return public
    names = [f"diffusion_pytorch_model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {n: names[i % shards] for i, n in enumerate(public)}
    for name in names:
        save_file({n: t.contiguous() for n, t in public.items() if weight_map[n] == name}, folder / name)
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return public


def assert_holds(model, tensors):
    for name, p in model.named_parameters():
        assert torch.equal(p, tensors[name]), name


@pytest.mark.parametrize("shards", [1, 3])
def test_load(tmp_path, shards):
    write_public(tmp_path / "m", shards=shards)
    model = toy_model()
    load_hf(model, tmp_path / "m", TOY, ARGS)
    assert_holds(model, toy_tensors())


def test_load_casts_to_the_parameter(tmp_path):
    write_public(tmp_path / "m", dtype=torch.bfloat16)
    model = toy_model()
    load_hf(model, tmp_path / "m", TOY, ARGS)
    assert_holds(model, {n: t.bfloat16().float() for n, t in toy_tensors().items()})


@pytest.mark.parametrize("max_shard_bytes", [1 << 20, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_writes_the_public_layout(tmp_path, max_shard_bytes, dtype):
    folder = tmp_path / "a" / "m"
    save_hf(toy_model(toy_tensors()), folder, TOY, ARGS, dtype, max_shard_bytes)
    files = sorted(p.name for p in folder.iterdir())
    stored = {}
    for name in files:
        if name.endswith(".safetensors"):
            part = load_file(folder / name)
            assert len(part) == 1 or sum(t.numel() * t.itemsize for t in part.values()) <= max_shard_bytes
            stored.update(part)
    expected = {n: t.to(dtype) for n, t in hf_state_dict(toy_tensors(), TOY, ARGS).items()}
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[n], expected[n]) and stored[n].dtype == dtype for n in expected)
    assert json.loads((folder / "config.json").read_text()) == TOY.args_to_hf(ARGS)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    if max_shard_bytes == 300:
        count = len(files) - 2
        assert count > 2 and files[1] == f"diffusion_pytorch_model-00001-of-{count:05d}.safetensors"
        content = json.loads(index.read_text())
        assert content["metadata"]["total_size"] == sum(t.numel() * t.itemsize for t in expected.values())
        assert (
            all(n in load_file(folder / f) for n, f in content["weight_map"].items())
            and content["weight_map"].keys() == expected.keys()
        )
    else:
        assert files == ["config.json", "diffusion_pytorch_model.safetensors"]
    model = toy_model()
    load_hf(model, folder, TOY, ARGS)
    assert_holds(model, {n: t.to(dtype).float() for n, t in toy_tensors().items()})


def test_weights_are_saved_in_place_of_the_parameters(tmp_path):
    other = toy_tensors(seed=1)
    save_hf(toy_model(toy_tensors()), tmp_path / "m", TOY, ARGS, torch.float32, weights=other)
    model = toy_model()
    load_hf(model, tmp_path / "m", TOY, ARGS)
    assert_holds(model, other)
    other["table.9"] = other.pop("table.1")
    with pytest.raises(ValueError, match=r"table\.1, table\.9"):
        save_hf(model, tmp_path / "m", TOY, ARGS, torch.float32, weights=other)


def test_wrapped_names_are_cleaned(tmp_path):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    write_public(tmp_path / "m")
    model = toy_model()
    for name, block in model.blocks.items():
        model.blocks[name] = nn.Module()  # torch.compile's wrapper names its one child so
        model.blocks[name]._orig_mod = checkpoint_wrapper(block)
    names = [n for n, _ in model.named_parameters()]
    assert "blocks.0._orig_mod._checkpoint_wrapped_module.weight" in names
    load_hf(model, tmp_path / "m", TOY, ARGS)
    for n, p in model.named_parameters():
        assert torch.equal(p, toy_tensors()[clean_name(n)])


def test_a_new_export_replaces_the_old_one_completely(tmp_path):
    folder = tmp_path / "m"
    save_hf(toy_model(toy_tensors()), folder, TOY, ARGS, torch.float32, 300)
    (folder / "diffusion_pytorch_model-00001-of-00009.safetensors.tmp").write_text("left by a killed run")
    (folder / "notes.txt").write_text("the user's")
    save_hf(toy_model(toy_tensors(1)), folder, TOY, ARGS, torch.float32)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "notes.txt",
    ]
    model = toy_model()
    load_hf(model, folder, TOY, ARGS)
    assert_holds(model, toy_tensors(1))


def test_a_failed_export_leaves_the_old_one(tmp_path, monkeypatch):
    folder, calls = tmp_path / "m", []
    save_hf(toy_model(toy_tensors()), folder, TOY, ARGS, torch.float32)
    put = safetensors_file.SafetensorsFile._put

    def full_disk(file, data):
        calls.append(data)
        if len(calls) == 12:
            raise OSError(28, "No space left on device")
        put(file, data)

    def flipped(file, data):
        put(file, data)
        if file.file.tell() == file.size:
            file.file.seek(file.size - 5)
            file.file.write(b"\xab")

    def short(file, data):
        put(file, data)
        if file.file.tell() == file.size:
            file.file.truncate(file.size - 4)

    for damage, kind, message in (
        (full_disk, StorageError, "No space left"),
        (flipped, RuntimeError, "does not hold what was written to it: bytes 0 to"),
        (short, RuntimeError, "bytes 0 to"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_file.SafetensorsFile, "_put", damage)
            with pytest.raises(kind, match=message):
                save_hf(toy_model(toy_tensors(1)), folder, TOY, ARGS, torch.float32, 300)
    model = toy_model()
    load_hf(model, folder, TOY, ARGS)
    assert_holds(model, toy_tensors())


def test_long_files_are_read_back_while_they_grow(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr(safetensors_file, "CHECK_EVERY", 100)
    real = safetensors_file.SafetensorsFile._read_back
    monkeypatch.setattr(
        safetensors_file.SafetensorsFile, "_read_back", lambda file: (reads.append(file.checked), real(file))
    )
    save_hf(toy_model(toy_tensors()), tmp_path / "m", TOY, ARGS, torch.float32)
    assert len(reads) > 4 and reads == sorted(set(reads)) and reads[0] == 0
    model = toy_model()
    load_hf(model, tmp_path / "m", TOY, ARGS)
    assert_holds(model, toy_tensors())


def test_config_is_written_last(tmp_path, monkeypatch):
    order, real = [], os.rename

    def patch(move):
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, move)

    patch(lambda a, b: (order.append(b.name), real(a, b)))
    save_hf(toy_model(toy_tensors()), tmp_path / "m", TOY, ARGS, torch.float32, 300)
    assert order[-2:] == ["diffusion_pytorch_model.safetensors.index.json", "config.json"] and len(order) > 4
    patch(lambda a, b: real(a, b) if b.name != "config.json" else 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        save_hf(toy_model(toy_tensors()), tmp_path / "m", TOY, ARGS, torch.float32, 300)
    with pytest.raises(ValueError, match="config.json"):
        load_hf(toy_model(), tmp_path / "m", TOY, ARGS)


def test_shards_are_planned_in_order_and_within_the_limit():
    stem = "diffusion_pytorch_model"
    assert plan_shards({"a": 6, "b": 4, "c": 1, "d": 30, "e": 10}, 10) == {
        f"{stem}-00001-of-00004.safetensors": ["a", "b"],
        f"{stem}-00002-of-00004.safetensors": ["c"],
        f"{stem}-00003-of-00004.safetensors": ["d"],
        f"{stem}-00004-of-00004.safetensors": ["e"],
    }
    assert plan_shards({"a": 6, "b": 4}, 10) == {f"{stem}.safetensors": ["a", "b"]}


def test_the_table_of_names_is_exact():
    rules = (NameRule("blocks.{}.w", "layers.{}.weight"), NameRule("out", "head"))
    table = public_names(rules, ["blocks.0.w", "blocks.11.w", "out"])
    assert {n: public for n, (public, _) in table.items()} == {
        "blocks.0.w": "layers.0.weight",
        "blocks.11.w": "layers.11.weight",
        "out": "head",
    }
    assert table["out"][1] is rules[1]
    for names, message in (
        (["blocks.0.w", "out", "blocks.x.w"], r"blocks\.x\.w has 0 rules"),
        (["blocks.0.w", "out", "blocks.0.ww"], r"blocks\.0\.ww has 0 rules"),
        (["blocksx0.w", "out"], r"blocksx0\.w has 0 rules"),
        (["out"], r"fit no parameter: blocks\.\{\}\.w"),
    ):
        with pytest.raises(ValueError, match=message):
            public_names(rules, names)
    with pytest.raises(ValueError, match="out has 2 rules"):
        public_names((*rules, NameRule("out", "tail")), ["blocks.0.w", "out"])
    with pytest.raises(ValueError, match="one public name"):
        public_names((NameRule("a", "x"), NameRule("b", "x")), ["a", "b"])


def test_wrong_tensors_are_refused_with_counts_and_names(tmp_path):
    tensors = write_public(tmp_path / "m", shards=1)
    path = tmp_path / "m/diffusion_pytorch_model.safetensors"
    model = toy_model()
    kept = {n: t for n, t in tensors.items() if not n.startswith("layers.")}
    kept |= {f"new.{i}": torch.ones(1) for i in range(7)} | {
        "head.weight": torch.ones(12, 8),
        "head.bias": torch.ones(12, dtype=torch.int32),
    }
    save_file(kept, path)
    with pytest.raises(ValueError) as e:
        load_hf(model, tmp_path / "m", TOY, ARGS)
    text = str(e.value)
    assert "6 missing: layers.0.b, layers.0.table, layers.0.w, layers.1.b, layers.1.table, ..." in text
    assert (
        "7 extra: new.0, new.1, new.2, new.3, new.4, ..." in text
        and "1 of another shape: head.weight (12, 8) instead of (12, 7)" in text
    )
    assert "head.bias I32" in text and str(tmp_path / "m") in text
    save_file({**tensors, "embed.proj.weight": tensors["embed.proj.weight"].flatten(1)}, path)
    with pytest.raises(ValueError, match=r"embed.proj.weight \(7, 12\) instead of \(7, 3, 1, 2, 2\)"):
        load_hf(model, tmp_path / "m", TOY, ARGS)
    assert all(p.isnan().all() for p in model.parameters())


def test_damaged_folders_are_refused_by_file(tmp_path):
    write_public(tmp_path / "good", shards=3)
    folder, index_name = tmp_path / "m", "diffusion_pytorch_model.safetensors.index.json"
    second = "diffusion_pytorch_model-00002-of-00003.safetensors"

    def refused(damage, message):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        damage()
        model = toy_model()
        with pytest.raises(ValueError, match=message):
            load_hf(model, folder, TOY, ARGS)
        assert all(p.isnan().all() for p in model.parameters())

    def change_index(change):
        content = json.loads((folder / index_name).read_text())
        change(content["weight_map"])
        (folder / index_name).write_text(json.dumps(content))

    def change_config(**values):
        (folder / "config.json").write_text(json.dumps({**TOY.args_to_hf(ARGS), **values}))

    refused(lambda: (folder / second).unlink(), second)
    refused(lambda: (folder / second).write_bytes((folder / second).read_bytes()[:-1]), second)
    refused(lambda: (folder / second).write_bytes(b"\xff" * 64), second)
    refused(lambda: (folder / second).write_bytes(b""), second)
    refused(
        lambda: (folder / index_name).unlink(),
        r"3 files \*.safetensors and no diffusion_pytorch_model.safetensors.index.json",
    )
    refused(lambda: (folder / index_name).write_text("{"), index_name)
    refused(lambda: (folder / index_name).write_text("[]"), index_name)
    exchanged = {"head.bias": "head.weight", "head.weight": "head.bias"}
    refused(
        lambda: change_index(lambda m: m.update({a: m[b] for a, b in exchanged.items()})),
        "disagree about its tensors: head",
    )
    refused(lambda: change_index(lambda m: m.update({"head.bias": f"../good/{second}"})), "outside its folder")
    refused(lambda: (folder / "config.json").unlink(), "config.json")
    refused(lambda: change_config(heads=7), r"heads = 7 \(the model has 1\)")
    refused(lambda: change_config(_class_name="Other"), "_class_name = 'Other'")


def test_scalars_and_unknown_types(tmp_path):
    def build(args):
        model = nn.Module()
        model.scale = nn.Parameter(torch.tensor(3.0))
        return model

    model = build(ARGS)
    spec = replace(TOY, build=build, hf_names=(NameRule("scale", "scale"),))
    save_hf(model, tmp_path / "m", spec, ARGS, torch.float16)
    with torch.no_grad():
        model.scale.zero_()
    load_hf(model, tmp_path / "m", spec, ARGS)
    assert model.scale.item() == 3.0
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        save_hf(model, tmp_path / "m", spec, ARGS, torch.float8_e4m3fn)


WAN_ARGS = WanArgs(
    dim=48, num_heads=4, num_layers=3, ffn_dim=80, text_dim=20, freq_dim=32, in_channels=6, out_channels=5
)


def test_diffusers_writes_and_we_read(tmp_path):
    theirs = diffusers_wan(WAN_ARGS)
    theirs.save_pretrained(tmp_path / "m", max_shard_size="60KB")
    assert len(list((tmp_path / "m").glob("*-of-*.safetensors"))) > 2
    ours = WanModel(WAN_ARGS)
    load_hf(ours, tmp_path / "m", SPEC, WAN_ARGS)
    state, reference = hf_state_dict(dict(ours.named_parameters()), SPEC, WAN_ARGS), theirs.state_dict()
    assert state.keys() == reference.keys() and all(torch.equal(state[n], reference[n]) for n in state)
    with pytest.raises(ValueError, match=r"num_attention_heads = 4 \(the model has 6\).*attention_head_dim"):
        load_hf(ours, tmp_path / "m", SPEC, replace(WAN_ARGS, num_heads=6))
    with pytest.raises(ValueError, match="not those of the architecture WanArgs.*blocks.0.ffn.up.weight"):
        save_hf(ours, tmp_path / "n", SPEC, replace(WAN_ARGS, ffn_dim=81), torch.float32)
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 60_000])
def test_we_write_and_diffusers_reads(tmp_path, max_shard_bytes):
    from diffusers import WanTransformer3DModel

    ours = WanModel(WAN_ARGS)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ours.parameters():
            p.normal_(generator=g)
    save_hf(ours, tmp_path / "m", SPEC, WAN_ARGS, torch.float32, max_shard_bytes)
    theirs = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(tmp_path / "m"))
    state = hf_state_dict(dict(ours.named_parameters()), SPEC, WAN_ARGS)
    stored = {n: t for path in (tmp_path / "m").glob("*.safetensors") for n, t in load_file(path).items()}
    theirs.load_state_dict(stored, strict=True)
    assert all(torch.equal(t, state[n]) for n, t in theirs.state_dict().items())

    pytest.importorskip("accelerate", reason="diffusers' from_pretrained of this class needs accelerate")
    theirs, info = WanTransformer3DModel.from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(torch.equal(t, state[n]) for n, t in theirs.state_dict().items())
