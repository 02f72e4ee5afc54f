"""Checkpointing on several ranks: under FSDP2, compiled or not, and around the attention of context parallel."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import build_denoising, randomized_init, run_ranks, whole_tensors
from tests.unit_tests.test_activation_checkpoint import ARGS, FULL, MATMUL, NONE, SELECTIVE
from titan_video.config.job_config import Compile, Parallelism, Training
from titan_video.data.batch import Batch
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.sequence import SequenceShard
from titan_video.distributed.utils import clean_name, initialise
from titan_video.flow.noise import draw_noise
from titan_video.models.wan import SPEC, WanModel

LOCAL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
TWO_BLOCKS = replace(ARGS, num_layers=2)


class Executed(TorchDispatchMode):
    """Counts attention to the 16 video tokens, all-to-alls and ring steps beneath all other modes."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if func is LOCAL and args[1].shape[-2] == 16:
            self.count["attention"] += 1
        for op in ("all_to_all_single", "titan_video::ring_attention"):
            if op in name and "backward" not in name:
                self.count[op.removeprefix("titan_video::")] += 1
        return func(*args, **(kwargs or {}))


def step(section, compiled, dims, args=TWO_BLOCKS):
    mesh = dims.build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(args)
    compilation = Compile(enable=compiled, backend="aot_eager")
    parallelize(model, SPEC.plan, mesh, Parallelism(), Training(mixed_precision_param="float32"), section, compilation)
    model.to_empty(device="cpu")
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    ids = torch.tensor([0, 1])
    batch = Batch(
        {"video": draw_noise(2, ids, (16, 1, 8, 8))},
        draw_noise(1, ids, (args.text_len, args.text_dim)),
        torch.ones(2, args.text_len, dtype=torch.bool),
        ids,
    )
    noise = draw_noise(0, ids, (16, 1, 8, 8))
    task = build_denoising(SPEC, args, SequenceShard.from_meshes(mesh))
    inputs = task.add_noise(batch, noise, sigma_B=torch.tensor([0.3, 0.6]))
    with nullcontext() if compiled else Executed() as executed:
        task.loss(model(**inputs.kwargs), inputs).sum().backward()
    grads = whole_tensors({clean_name(n): p.grad for n, p in model.named_parameters()})
    return grads, dict(executed.count) if executed else None


def fsdp(compiled_modes):
    sections = {
        "none": NONE,
        "full": replace(FULL, offload=True),
        "selective": replace(MATMUL, save_min_kv=16, offload=True),
    }
    torch._dynamo.reset()
    return {
        (name, compiled): step(s, compiled, ParallelDims(dp_shard=2))[0]
        for name, s in sections.items()
        for compiled in (False, True)[: 1 + (name in compiled_modes)]
    }


@pytest.mark.parametrize(
    "compiled_modes", [("selective",), pytest.param(("none", "full"), marks=pytest.mark.slow)], ids=" ".join
)
def test_gradients_under_fsdp_are_equal(compiled_modes):
    for results in run_ranks(fsdp, 2, compiled_modes):
        reference = results["none", False]
        for (mode, compiled), grads in results.items():
            # The compiler's forms of some operators round differently.
            errors = {n: ((grads[n] - reference[n]).norm() / reference[n].norm()).item() for n in reference}
            assert (mode, compiled, {n: e for n, e in errors.items() if not e <= (2e-5 if compiled else 0)}) == (
                mode,
                compiled,
                {},
            )


def context_parallel(dims):
    selective = replace(SELECTIVE, save_min_kv=16)
    modes = {"none": NONE, "full": FULL, "selective": selective}
    if dims.ulysses == 2:
        modes["exchange"] = replace(selective, save=("attention", "exchange"))
        modes["exchange, offload"] = replace(modes["exchange"], offload=True)
    return {name: step(section, False, dims) for name, section in modes.items()}


@pytest.mark.parametrize("dims", [ParallelDims(ulysses=2), ParallelDims(ring=2)], ids=["ulysses", "ring"])
def test_attention_of_context_parallel_runs_once(dims):
    kind = "attention" if dims.ulysses == 2 else "ring_attention"
    for results in run_ranks(context_parallel, 2, dims):
        runs = {mode: count.get(kind) for mode, (_, count) in results.items()}
        once = {mode: 2 for mode in results}  # in two blocks
        assert runs == once | {"full": 4}
        exchanges = {mode: count.get("all_to_all_single", 0) for mode, (_, count) in results.items()}
        recomputed = {"selective": 12, "full": 12}
        assert exchanges == (
            {mode: 8 for mode in results} | recomputed if dims.ulysses == 2 else dict.fromkeys(results, 0)
        )
        reference = results["full"][0]
        for mode, (grads, _) in results.items():
            assert (mode, [n for n in grads if not torch.equal(grads[n], reference[n])]) == (mode, [])


def compiled_selection(dims, save):
    one, selective = replace(ARGS, num_layers=1), replace(SELECTIVE, save_min_kv=16, save=save)
    return [step(section, compiled, dims, one)[0] for section, compiled in ((NONE, False), (selective, True))]


@pytest.mark.parametrize(
    "dims, save",
    [
        pytest.param(ParallelDims(tp=2), SELECTIVE.save, marks=pytest.mark.slow),
        (ParallelDims(ulysses=2), ("attention", "exchange")),
    ],
    ids=["tensor parallel", "ulysses"],
)
def test_compiled_selection_beside_collectives(dims, save):
    for reference, grads in run_ranks(compiled_selection, 2, dims, save):
        errors = {n: ((grads[n] - reference[n]).norm() / reference[n].norm()).item() for n in reference}
        assert {n: e for n, e in errors.items() if not e <= 2e-5} == {}
