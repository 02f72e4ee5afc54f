"""Fused operators with sharding, selective checkpointing and compile: gradients equal plain torch in one process."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed_tests.test_tensor_parallel import ARGS, forward_backward, sharded
from tests.distributed_tests.test_tensor_parallel import gradients as gradients_of
from tests.helpers import randomized_init, run_ranks
from titan_video import kernels
from titan_video.config.job_config import ActivationCheckpoint, Compile
from titan_video.distributed.utils import initialise
from titan_video.models.wan import SPEC, WanModel

ONE = replace(ARGS, num_layers=1)
SELECTIVE = {"checkpointing": ActivationCheckpoint(mode="selective", save_min_kv=16)}
COMPILED = {**SELECTIVE, "compilation": Compile(enable=True, backend="aot_eager")}  # as full graphs
RUNS = {
    "fsdp": ({"dp_shard": 2}, SELECTIVE),
    "tp": ({"tp": 2}, SELECTIVE),
    "ulysses": ({"ulysses": 2}, SELECTIVE),
    "tp, compiled": ({"tp": 2}, COMPILED),
}
CASE, CLIPS = (2, (1, 6, 6)), [0, 1]  # 9 tokens of each clip: one rank of two has 4 and padding


class Operators(TorchDispatchMode):
    """Counts how often each of our operators runs."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "titan_video":
            self.count[func._opname] += 1
        return func(*args, **(kwargs or {}))


def gradients(model, clips, shard=None):
    forward_backward(model, ONE, CASE, clips, shard)
    return gradients_of(model)


def rank():
    kernels.set_backend("triton")
    results = {}
    for name, (dims, options) in RUNS.items():
        model, meshes, shard = sharded(ONE, dims, **options)
        clips = [CLIPS[meshes.batch.get_local_rank()]] if name == "fsdp" else CLIPS
        with (
            nullcontext() if options is COMPILED else Operators() as operators
        ):  # dispatch modes do not work with compile
            grads = gradients(model, clips, shard)
        results[name] = grads, dict(operators.count) if operators else None
    return results


def test_sharded_models_compute_the_same_with_fused_operators():
    plain = WanModel(ONE)
    initialise(plain, randomized_init(SPEC.init_parameter), 0)
    expected = gradients(plain, CLIPS)
    for results in run_ranks(rank, 2):
        for name, (found, count) in results.items():
            errors = {n: ((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected}
            assert (name, {n: e for n, e in errors.items() if not e <= 2e-5}) == (name, {})
            if count is None:
                continue
            # The block's forward runs twice, the head's once.
            # Under tensor parallel a rank has a part of what the norms of q and k run over.
            q_and_k = {"rms_norm": 8, "rms_norm_backward": 4} if name == "tp" else {"rms_norm_pair": 4}
            assert {name: n for name, n in count.items() if "norm" in name or "gated" in name} == q_and_k | {
                "norm": 3,
                "norm_backward": 2,
                "residual_norm": 4,
                "residual_norm_backward": 2,
                "gated_residual": 2,
                "gated_residual_backward": 1,
            }, name
