"""Swapped blocks: gradients bit for bit those without, how many weights are on the device, and where they are read.

On a CPU the slots are filled at the moment a copy is asked for, so a block whose turn is not announced computes with
another block's weights.
"""

import re
from dataclasses import replace

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers import randomized_init
from titan_video.config.job_config import ActivationCheckpoint, Compile, JobConfig, Lora, Parallelism, Training
from titan_video.distributed.block_swap import NUM_SLOTS, SwappedBlock, rules
from titan_video.distributed.fsdp import reshard
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.utils import clean_name, initialise
from titan_video.lora.adapters import add_adapters
from titan_video.lora.quantized_base import fill_quantized, quantize_base
from titan_video.models.layers import is_adapter
from titan_video.models.wan import SPEC, WanArgs, WanModel

ARGS = WanArgs(dim=48, num_heads=2, num_layers=5, ffn_dim=96, text_dim=16, text_len=8, freq_dim=32)
LORA = Lora(enable=True, rank=4)
TOKENS = 24
MODES = {
    "none": ActivationCheckpoint(),
    "full": ActivationCheckpoint(mode="full"),
    "selective": ActivationCheckpoint(mode="selective", save=("attention", "matmul"), save_min_kv=0),
    "some": ActivationCheckpoint(mode="full", layers=(1, 2, 4)),
    "offload": ActivationCheckpoint(mode="full", offload=True),
    "selective, offload": ActivationCheckpoint(mode="selective", save_min_kv=0, offload=True),
}


@pytest.fixture(scope="module")
def meshes():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield ParallelDims().build_mesh("cpu")
    torch.distributed.destroy_process_group()


def fill(model, which):
    initialise(model, randomized_init(SPEC.init_parameter), 0, which)


def build(meshes, number, mode="none", kind="", dtype="float32", compiled=False):
    with torch.device("meta"):
        model = WanModel(ARGS)
    add_adapters(model, SPEC, LORA, getattr(torch, dtype))
    if kind:
        quantize_base(model, SPEC.plan, kind)
    training = Training(mixed_precision_param=dtype, swap_blocks=number)
    compilation = Compile(enable=compiled, backend="aot_eager")
    parallelize(model, SPEC.plan, meshes, Parallelism(), training, MODES[mode], compilation)
    model.to_empty(device="cpu")
    fill_quantized(model, fill) if kind else fill(model, lambda name: not is_adapter(name))
    initialise(model, randomized_init(SPEC.init_parameter), 0, is_adapter)
    return model


def forward(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, text = torch.randn(2, TOKENS, 64, generator=g), torch.randn(2, 8, 16, generator=g)
    positions = torch.arange(3 * TOKENS).view(1, TOKENS, 3)
    return model(x_BLP=x, pos_BL3=positions, t_B=torch.tensor([100.0, 700.0]), text_BSD=text)


def gradients(model):
    """Of two micro-batches, with a forward without gradients between them."""
    for seed in (0, 1):
        forward(model, seed).float().square().sum().backward()
        with torch.no_grad():
            forward(model, seed)
    return {clean_name(name): p.grad for name, p in model.named_parameters() if p.requires_grad}


def assert_same(model, reference):
    grads = gradients(model)
    assert grads.keys() == reference.keys() and all(grad.abs().sum() > 0 for grad in grads.values())
    assert [name for name, grad in grads.items() if not torch.equal(grad, reference[name])] == []


KINDS = {"": ("float32", 3), "int8": ("bfloat16", 4), "float8": ("float32", 5)}  # types, swapped blocks
IN_CI = [("none", ""), ("none", "int8"), ("full", "float8"), ("selective", ""), ("selective", "int8")]
IN_CI += [("some", "float8"), ("offload", "int8"), ("selective, offload", ""), ("selective, offload", "float8")]
OTHERS = [(mode, kind) for mode in MODES for kind in KINDS if (mode, kind) not in IN_CI]


@pytest.mark.parametrize("mode, kind", [*IN_CI, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)])
def test_gradients_are_bitwise_equal(mode, kind, meshes):
    dtype, number = KINDS[kind]
    reference = gradients(build(meshes, 0, mode, kind, dtype))
    assert_same(build(meshes, number, mode, kind, dtype), reference)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
def test_compiled(mode, meshes):
    for kind in ("", "float8"):
        torch._dynamo.reset()
        reference = gradients(build(meshes, 0, mode, kind, compiled=True))
        torch._dynamo.reset()
        assert_same(build(meshes, 5, mode, kind, compiled=True), reference)


def storages(tensors):
    """{address: bytes} of different storages."""
    return {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}


@pytest.mark.parametrize("mode", MODES)
def test_weights_on_the_device(mode, meshes):
    """Two slots, and the blocks that stay; nothing that autograd saves is another block's weights, or the host's."""
    number, model = 4, build(meshes, 4, mode)
    hosted = [block for block in model.blocks.values() if isinstance(block, SwappedBlock)]
    assert [key for key, b in model.blocks.items() if isinstance(b, SwappedBlock)] == ["0", "1", "3", "4"]
    size, host = hosted[0].host.nbytes, storages(block.host for block in hosted)
    assert list(host.values()) == [size] * number
    saved = []
    with saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        forward(model).square().sum().backward()
    frozen = storages(p for p in model.blocks.parameters() if not p.requires_grad)
    stay = sum(p.nbytes for p in model.blocks["2"].parameters() if not p.requires_grad)
    assert sum(frozen.values()) == NUM_SLOTS * size + stay and not frozen.keys() & host.keys()
    assert not storages(saved).keys() & host.keys()


def test_read_and_changed_where_the_host_has_them(meshes):
    """As export, merge and a loader do; the next forward computes with what they wrote."""
    model, plain = build(meshes, 4), build(meshes, 0)
    with torch.no_grad():
        before = forward(model)
        for m in (model, plain):
            reshard(m)
            for name, p in m.named_parameters():
                if clean_name(name) == "blocks.4.ffn.up.weight":
                    p.mul_(1.5)
        assert torch.equal(forward(model), forward(plain)) and not torch.equal(forward(model), before)
    reshard(model)
    weights = {clean_name(name): p for name, p in model.named_parameters()}
    assert all(torch.equal(weights[name], p) for name, p in plain.named_parameters())
    host = storages(b.host for b in model.blocks.values() if isinstance(b, SwappedBlock))
    assert len(storages(weights.values()).keys() & host.keys()) == 4


def test_what_it_refuses(meshes):
    with pytest.raises(ValueError, match="training.swap_blocks: given 6; legal: 0, or 3 to 5"):
        build(meshes, 6)
    config = JobConfig(training=Training(swap_blocks=4), lora=LORA)
    assert not list(rules(config, 1)) and not list(rules(JobConfig(), 8))
    for changed, world_size, words in (
        (replace(config, training=Training(swap_blocks=2)), 1, "given 2.*nothing is saved"),
        (replace(config, lora=Lora()), 1, "set lora.enable"),
        (config, 2, "for one rank"),
        (replace(config, training=Training(swap_blocks=4, enable_cpu_offload=True)), 1, "enable_cpu_offload"),
    ):
        (line,) = rules(changed, world_size)
        assert line.startswith("training.swap_blocks: ") and re.search(words, line)
