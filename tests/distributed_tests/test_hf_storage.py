"""Weights in the diffusers layout into and out of shards.

Each rank reads only its slices, and the files do not depend on the layout.
"""

import pytest
import torch

from tests.helpers import run_ranks
from tests.unit_tests.test_hf_storage import ARGS, TOY, Toy, assert_holds, toy_model, toy_tensors, write_public
from titan_video.tools.files import StorageError
from titan_video.weights import safetensors_io
from titan_video.weights.export.save import save_hf
from titan_video.weights.formats import public_names
from titan_video.weights.hf_storage import load_hf


def sharded_model(layout):
    """The toy on the meta device, sharded, then allocated: parameters hold NaN until loaded."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    with torch.device("meta"):
        model = Toy(ARGS)
    world = torch.distributed.get_world_size()
    shard_on = None
    if layout == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    elif layout == "dim1":
        mesh = init_device_mesh("cpu", (world,))
        shard_on = lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % world == 0 else Shard(0)  # noqa: E731
    else:  # rows over two axes: tensor parallel first, FSDP within
        mesh_2d = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        mesh = mesh_2d["dp"]
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                placement = Shard(0) if p.shape[0] % world == 0 else Replicate()
                with torch.no_grad():
                    tensor = distribute_tensor(torch.empty(p.shape), mesh_2d["tp"], [placement], src_data_rank=None)
                module.register_parameter(name, torch.nn.Parameter(tensor))
    options = {
        "mesh": mesh,
        "shard_placement_fn": shard_on,
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    }
    for block in model.blocks.values():
        fully_shard(block, **options)
    fully_shard(model, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().fill_(float("nan"))
    return model


class Recorder:
    """Replaces safe_open and records how many elements of each tensor are read."""

    reads: dict = {}

    def __init__(self, *args, **kwargs):
        self.inner = real_open(*args, **kwargs)

    def __enter__(self):
        self.inner.__enter__()
        return self

    def __exit__(self, *exc):
        return self.inner.__exit__(*exc)

    def keys(self):
        return self.inner.keys()

    def get_tensor(self, name):
        return self.note(name, self.inner.get_tensor(name))

    def get_slice(self, name):
        recorder, part = self, self.inner.get_slice(name)

        class Slice:
            get_shape, get_dtype = part.get_shape, part.get_dtype

            def __getitem__(self, box):
                return recorder.note(name, part[box])

        return Slice()

    def note(self, name, tensor):
        Recorder.reads[name] = Recorder.reads.get(name, 0) + tensor.numel()
        return tensor


real_open = safetensors_io.safe_open
LAYOUTS = {2: ("fsdp", "dim1"), 4: ("fsdp", "hsdp", "tp")}


def load_rank(folder, layouts):
    """By layout and our name: elements read, elements owned, and whether the tensor changes its layout."""
    return {layout: load_one(folder, layout) for layout in layouts}


def load_one(folder, layout):
    model = sharded_model(layout)
    Recorder.reads = {}
    safetensors_io.safe_open = Recorder
    try:
        load_hf(model, folder, TOY, ARGS)
    finally:
        safetensors_io.safe_open = real_open
    if layout == "tp":
        assert "_StridedShard" in [type(x).__name__ for x in model.out.weight.placements]
    owned = {n: p.to_local().numel() for n, p in model.named_parameters()}
    loaded = {n: torch.equal(p.full_tensor(), toy_tensors()[n]) for n, p in model.named_parameters()}
    assert all(loaded.values()), (layout, loaded)
    table = public_names(TOY.hf_names, owned)
    return {
        ours: (Recorder.reads.get(public, 0), owned[ours], rule.to_ours is not None)
        for ours, (public, rule) in table.items()
    }


@pytest.mark.parametrize("world", [2, 4])
def test_each_rank_reads_its_own_slices(tmp_path, world):
    write_public(tmp_path / "m", shards=3)
    ranks = run_ranks(load_rank, world, tmp_path / "m", LAYOUTS[world])
    sizes = {n: t.numel() for n, t in toy_tensors().items()}
    for layout in LAYOUTS[world]:
        for reads in (rank[layout] for rank in ranks):
            for name, (read, owned, transformed) in reads.items():
                assert read == ((sizes[name] if owned else 0) if transformed else owned), (layout, name)
                assert owned < sizes[name]
        copies = 2 if layout == "hsdp" else 1
        if layout != "tp":
            assert all(sum(rank[layout][n][1] for rank in ranks) == copies * sizes[n] for n in sizes)
    if world == 4:
        assert [rank["fsdp"]["table.0"][1] for rank in ranks] == [8, 8, 0, 0]
        assert [rank["fsdp"]["patch.bias"][1] for rank in ranks] == [2, 2, 2, 1]


EXPORTS = (("f32", torch.float32, 300, 1), ("bf16", torch.bfloat16, 1 << 30, 1), ("doubled", torch.float32, 1 << 30, 2))


def save_rank(source, folder, layouts):
    for layout in layouts:
        model = sharded_model(layout)
        load_hf(model, source, TOY, ARGS)
        if layout == "fsdp":  # a forward without backward leaves the root unsharded, in bfloat16
            model.unshard()
            assert model.patch.weight.dtype == torch.bfloat16 and not hasattr(model.patch.weight, "placements")
        for name, dtype, max_shard_bytes, factor in EXPORTS:
            weights = None if factor == 1 else {n: factor * p.detach() for n, p in model.named_parameters()}
            save_hf(model, folder / layout / name, TOY, ARGS, dtype, max_shard_bytes, weights)
            assert (folder / layout / name / "config.json").is_file()


@pytest.mark.parametrize("world", [2, 4])
def test_files_do_not_depend_on_the_layout(tmp_path, world):
    write_public(tmp_path / "m", shards=1)
    run_ranks(save_rank, world, tmp_path / "m", tmp_path, LAYOUTS[world])
    for name, dtype, max_shard_bytes, factor in EXPORTS:
        expected = tmp_path / name
        save_hf(
            toy_model({n: factor * t for n, t in toy_tensors().items()}), expected, TOY, ARGS, dtype, max_shard_bytes
        )
        for layout in LAYOUTS[world]:
            saved = tmp_path / layout / name
            assert sorted(p.name for p in expected.iterdir()) == sorted(p.name for p in saved.iterdir())
            assert all(p.read_bytes() == (saved / p.name).read_bytes() for p in expected.iterdir())
    model = toy_model()
    load_hf(model, tmp_path / "fsdp/f32", TOY, ARGS)
    assert_holds(model, toy_tensors())


def fused_rank(folder):
    """Load HunyuanVideo in the original layout under tensor parallel and FSDP, and save it again.

    Returns, by public name: elements read, elements owned, and whether the tensor changes its layout.
    """
    from titan_video.distributed.fsdp import apply_fsdp
    from titan_video.distributed.parallel_dims import ParallelDims
    from titan_video.distributed.tensor_parallel import apply_tensor_parallel
    from titan_video.models.hunyuan_video import SPEC

    args = SPEC.flavors["debug"]
    with torch.device("meta"):
        model = SPEC.build(args)
    meshes = ParallelDims(tp=2, dp_shard=2).build_mesh("cpu")
    apply_tensor_parallel(model, SPEC.plan, meshes.tp, async_mode=False)
    apply_fsdp(model, SPEC.plan, meshes, torch.bfloat16, torch.float32, "default")
    model.to_empty(device="cpu")
    Recorder.reads = {}
    safetensors_io.safe_open = Recorder
    try:
        load_hf(model, folder / "in.safetensors", SPEC, args)
    finally:
        safetensors_io.safe_open = real_open
    save_hf(model, folder / "out.safetensors", SPEC, args, torch.float32, format_name="comfyui")
    owned = {n: p.to_local().numel() for n, p in model.named_parameters()}
    table = public_names(SPEC.hf_names, owned, "original")
    by_file = {}
    for ours, (public, rule) in table.items():
        entry = by_file.setdefault(
            public, [Recorder.reads.get(public, 0), 0, bool(rule.to_ours) or rule.scale_shift_swapped]
        )
        entry[1] += owned[ours]
    return by_file


def test_fused_tensors_are_read_in_parts(tmp_path):
    from safetensors.torch import load_file

    from titan_video.models.hunyuan_video import SPEC

    args = SPEC.flavors["debug"]
    model, g = SPEC.build(args), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(generator=g)
    save_hf(model, tmp_path / "in.safetensors", SPEC, args, torch.float32, format_name="single_file")
    expected = load_file(tmp_path / "in.safetensors")
    for by_file in run_ranks(fused_rank, 4, tmp_path):
        assert by_file.keys() == expected.keys()
        assert {n for n, (read, owned, changes) in by_file.items() if not changes and read != owned} == set()
        read, owned, _ = by_file["single_blocks.1.linear1.weight"]
        assert read == owned == expected["single_blocks.1.linear1.weight"].numel() // 4
    saved = {n.removeprefix("model.diffusion_model."): t for n, t in load_file(tmp_path / "out.safetensors").items()}
    assert saved.keys() == expected.keys() and all(torch.equal(saved[n], expected[n]) for n in expected)


def failing_rank(source, folder):
    model = sharded_model("fsdp")
    load_hf(model, source, TOY, ARGS)
    folder.write_text("a file in the way") if torch.distributed.get_rank() == 0 else None
    with pytest.raises(StorageError, match="could not be exported.*cannot write the export: File exists"):
        save_hf(model, folder, TOY, ARGS, torch.float32, 300)
    missing = source / "diffusion_pytorch_model.safetensors"
    torch.distributed.barrier()
    missing.unlink(missing_ok=True)
    torch.distributed.barrier()
    with pytest.raises(ValueError, match="holds no weights. Looked there"):
        load_hf(model, source, TOY, ARGS)


def test_a_failure_is_an_error_on_every_rank(tmp_path):
    write_public(tmp_path / "m", shards=1)
    run_ranks(failing_rank, 2, tmp_path / "m", tmp_path / "out", timeout=40)
