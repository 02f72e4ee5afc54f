"""Context parallel against attention over the whole clip: values, gradients, and what is sent."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import run_ranks
from titan_video.distributed.context_parallel import apply_context_parallel
from titan_video.distributed.context_parallel.local_attention import _math, _math_backward, attend, attend_backward
from titan_video.distributed.context_parallel.ring import ring_attention
from titan_video.distributed.context_parallel.traffic import Traffic, exchange_bytes, ring_traffic, ulysses_traffic
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.models.layers import AttentionCore
from titan_video.models.spec import ParallelPlan

HEADS, WIDTH = 12, 8
PLAN = ParallelPlan(blocks=("blocks",), cores=("attn.core",))
ROTATIONS = ("alltoall", "allgather")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.core = AttentionCore()

    def forward(self, q, k, v, seq_len=None):
        return self.attn.core(q, k, v, seq_len)


def parallel_block(ring, ulysses, rotate):
    mesh = ParallelDims(ring=ring, ulysses=ulysses).build_mesh("cpu")
    model = nn.Module()
    model.blocks = nn.ModuleDict({"0": Block()})
    apply_context_parallel(model, PLAN, mesh.ring, mesh.ulysses, rotate)
    return model.blocks["0"], mesh.sequence


def whole_tensors(batch, seq_len, dtype, heads=HEADS):
    """q, k, v and the gradient of the output, of the whole clip: the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(batch, seq_len, heads, WIDTH, dtype=torch.float64, generator=generator).to(dtype) for _ in range(4)]


def slice_of(x, mesh, fill):
    """This rank's rows; those beyond the clip hold `fill`."""
    length = -(-x.shape[1] // mesh.size())
    padded = F.pad(x, (0, 0, 0, 0, 0, length * mesh.size() - x.shape[1]), value=fill)
    return padded[:, mesh.get_local_rank() * length :][:, :length].clone()


def run_slices(block, mesh, whole, seq_len):
    """(out, dq, dk, dv) of this rank's rows; what the padded rows hold must not matter."""
    q, k, v = (slice_of(x, mesh, 3.0).requires_grad_() for x in whole[:3])
    out = block(q, k, v, seq_len)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), slice_of(whole[3], mesh, 0.0))]


def reference(whole):
    q, k, v = (x.double().transpose(1, 2).requires_grad_() for x in whole[:3])
    out = F.scaled_dot_product_attention(q, k, v)
    return [x.detach().transpose(1, 2) for x in (out, *torch.autograd.grad(out, (q, k, v), whole[3].double().transpose(1, 2)))]


def largest_error(results, whole, mesh):
    rows = slice_of(torch.ones_like(whole[0]), mesh, 0.0)
    expected = [slice_of(x, mesh, 0.0) for x in reference(whole)]
    # Padded rows of the output are nobody's; their gradients must be zero.
    got = [results[0].double() * rows, *(x.double() for x in results[1:])]
    return max((a - b).abs().max().item() for a, b in zip(got, expected))


def check_layouts(layouts, shapes, dtypes, heads=HEADS):
    errors = {}
    for ring, ulysses, rotate in layouts:
        block, mesh = parallel_block(ring, ulysses, rotate)
        for batch, seq_len in shapes:
            for dtype in dtypes:
                whole = whole_tensors(batch, seq_len, dtype, heads)
                errors[ring, ulysses, rotate, batch, seq_len, dtype] = largest_error(run_slices(block, mesh, whole, seq_len), whole, mesh)
    return errors


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
LAYOUTS = {
    2: ([(1, 2, "alltoall"), (2, 1, "alltoall"), (2, 1, "allgather")], [(1, 16), (2, 13), (1, 1)], TOLERANCE),
    3: ([(1, 3, "alltoall"), (3, 1, "alltoall"), (3, 1, "allgather")], [(2, 12), (1, 14), (2, 4)], TOLERANCE),
    4: ([(1, 4, "alltoall"), *((4, 1, r) for r in ROTATIONS), *((2, 2, r) for r in ROTATIONS)], [(1, 16), (2, 17), (1, 5)], TOLERANCE),
    8: ([(2, 4, "alltoall"), (4, 2, "allgather")], [(1, 17)], [torch.float64]),
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_values_and_gradients_equal_attention_over_the_whole_clip(world):
    for rank, errors in enumerate(run_ranks(check_layouts, world, *LAYOUTS[world])):
        for case, error in errors.items():
            assert error <= TOLERANCE[case[-1]], (rank, case, error)


# ---- what is sent ----


def events(function):
    """(its result, every operator that ran meanwhile, on any thread, inside other operators too: name, shapes, types, plain arguments)."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        result = function()
    recorded = profiler.profiler.kineto_results.events()
    return result, [(e.name(), e.shapes(), e.dtypes(), e.concrete_inputs()) for e in recorded]


def sent(recorded):
    """Collectives and bytes that left this rank, by kind, as `Traffic`s."""
    itemsizes = {"double": 8, "float": 4, "c10::BFloat16": 2}
    total = {}
    for name, shapes, dtypes, plain in recorded:
        if not name.startswith("c10d::"):
            continue
        out, sent_buffer = (itemsizes[dtypes[i]] * torch.Size(shapes[i]).numel() for i in (0, 1))
        if name == "c10d::alltoall_base_":
            splits = plain[4]
            # Equal parts, of which one stays here; or all to one other rank.
            size = sent_buffer * (len(splits) - 1) // len(splits) if len(set(splits)) == 1 else sent_buffer
            kind = "all_to_all"
        else:
            kind, size = {"c10d::_allgather_base_": ("all_gather", out - sent_buffer), "c10d::_reduce_scatter_base_": ("reduce_scatter", sent_buffer - out)}[name]
        calls, so_far = total.get(kind, (0, 0))
        total[kind] = calls + 1, so_far + size
    return [Traffic(kind, *total[kind]) for kind in sorted(total)]


def count_traffic(layouts, batch, seq_len, dtype):
    counts = {}
    for ring, ulysses, rotate in layouts:
        block, mesh = parallel_block(ring, ulysses, rotate)
        q, k, v = (slice_of(x, mesh, 0.0).requires_grad_() for x in whole_tensors(batch, seq_len, dtype)[:3])
        out, forward = events(lambda: block(q, k, v, seq_len))
        _, backward = events(lambda: out.sum().backward())
        counts[ring, ulysses, rotate] = sent(forward), sent(backward)
    return counts


def added(*parts):
    total = {}
    for part in parts:
        for traffic in part:
            calls, size = total.get(traffic.collective, (0, 0))
            total[traffic.collective] = calls + traffic.calls, size + traffic.sent
    return [Traffic(kind, *total[kind]) for kind in sorted(total)]


@pytest.mark.parametrize("world, dtype", [(2, torch.bfloat16), (4, torch.float32)])
def test_what_is_sent_equals_the_closed_forms(world, dtype):
    layouts, batch, seq_len = LAYOUTS[world][0], 2, 18
    elements, item = batch * -(-seq_len // world) * HEADS * WIDTH, dtype.itemsize
    for counts in run_ranks(count_traffic, world, layouts, batch, seq_len, dtype):
        for (ring, ulysses, rotate), directions in counts.items():
            exchange = ulysses_traffic(elements, ulysses, item) if ulysses > 1 else ([], [])
            rounds = ring_traffic(elements, ring, item, rotate) if ring > 1 else ([], [])
            for counted, a, b in zip(directions, exchange, rounds):
                assert counted == added(a, b), (ring, ulysses, rotate)
            assert tuple(sum(t.sent for t in d) for d in directions) == exchange_bytes(elements, ring, ulysses, item, rotate)
            if ring == 1:
                assert [[(t.collective, t.calls) for t in d] for d in directions] == [[("all_to_all", 2)]] * 2


# ---- compile and checkpointing ----


def run_compiled(layouts, shapes, backend, checkpointed):
    """Largest difference from eager, and graphs built, over shapes that one graph serves."""
    worst, graphs = 0.0, []
    for ring, ulysses, rotate in layouts:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        block, mesh = parallel_block(ring, ulysses, rotate)
        compiled = parallel_block(ring, ulysses, rotate)[0]
        if checkpointed:
            compiled = checkpoint_wrapper(compiled, preserve_rng_state=False)
        compiled.compile(backend=backend, fullgraph=True, dynamic=True)
        for batch, seq_len in shapes:
            whole = whole_tensors(batch, seq_len, torch.float64)
            eager, result = run_slices(block, mesh, whole, seq_len), run_slices(compiled, mesh, whole, seq_len)
            worst = max(worst, *((a - b).abs().max().item() for a, b in zip(eager, result)))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return worst, graphs


def check_compiled(world, *args):
    for worst, graphs in run_ranks(run_compiled, world, *args, timeout=400):
        assert worst < 1e-12 and set(graphs) == {1}


def test_compiled_and_checkpointed_equals_eager():
    check_compiled(4, [(2, 2, "alltoall")], [(2, 17), (2, 22), (2, 29)], "aot_eager", True)


@pytest.mark.slow
@pytest.mark.parametrize("backend, checkpointed", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_every_method_compiled_equals_eager(backend, checkpointed):
    check_compiled(2, [(2, 1, "alltoall"), (2, 1, "allgather"), (1, 2, "alltoall")], [(2, 13), (2, 18)], backend, checkpointed)


def selective(ops):
    def policy(ctx, func, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if func in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def count_attention_runs(ways):
    """How often the forward of the ring op runs in forward and backward, seen by its two local kernels, and the gradients, by way of checkpointing."""
    result = {}
    save = {torch.ops.titan_video.ring_attention.default}
    for way in ways:
        block, mesh = parallel_block(2, 1, "alltoall")
        if way == "full":
            block = checkpoint_wrapper(block, preserve_rng_state=False)
        elif way == "selective":
            block = checkpoint_wrapper(block, preserve_rng_state=False, context_fn=lambda: selective(save))
        whole = whole_tensors(1, 13, torch.float32)
        grads, recorded = events(lambda: run_slices(block, mesh, whole, 13))
        result[way] = sum(name == "aten::_scaled_dot_product_flash_attention_for_cpu" for name, *_ in recorded) / 2, grads
    return result


def test_checkpointing_can_keep_the_attention():
    for result in run_ranks(count_attention_runs, 2, ("none", "full", "selective")):
        assert {way: runs for way, (runs, _) in result.items()} == {"none": 1, "full": 2, "selective": 1}
        for _, grads in result.values():
            assert all(torch.equal(a, b) for a, b in zip(grads, result["none"][1]))


# ---- parts ----


def check_op():
    import torch.distributed as dist

    group = dist.group.WORLD.group_name
    q, k, v = (x.requires_grad_() for x in whole_tensors(2, 6, torch.float64)[:3])
    for rotate in ROTATIONS:
        torch.library.opcheck(ring_attention, (q, k, v, 5, group, rotate))
    with FlopCounterMode(display=False) as counter:
        out = ring_attention(q, k, v, 5, group, "alltoall")[0]
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_ring_op_is_a_well_formed_operator_and_counts_its_flops():
    pairs = 2 * HEADS * 6 * 5
    assert run_ranks(check_op, 1) == [(4 * pairs * WIDTH, 10 * pairs * WIDTH)]


def test_math_kernel_equals_the_fused_one():
    q, k, v, grad = whole_tensors(2, 7, torch.float64)
    k, v = k[:, :5], v[:, :5]
    out, lse = attend(q, k, v)
    heads_first = [x.transpose(1, 2) for x in (grad, q, k, v, out)]
    plain_out, plain_lse = _math(*heads_first[1:4])
    torch.testing.assert_close(plain_out.transpose(1, 2), out, rtol=0, atol=1e-14)
    torch.testing.assert_close(plain_lse, lse, rtol=0, atol=1e-14)
    for fused, plain in zip(attend_backward(grad, q, k, v, out, lse), _math_backward(*heads_first, lse)):
        torch.testing.assert_close(plain.transpose(1, 2), fused, rtol=0, atol=1e-13)


def test_unknown_rotation_is_refused():
    with pytest.raises(ValueError, match="context_parallel_rotate_method"):
        from titan_video.distributed.context_parallel.ring import RingCore

        RingCore(None, "sideways")
