"""Context parallel against attention over the whole clip: values, gradients, and what is sent."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import run_ranks
from titan_video.distributed.context_parallel import apply_context_parallel
from titan_video.distributed.context_parallel.ring import RingAttention, ring_attention
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.utils import reduce_over
from titan_video.models.hunyuan_video.blocks import JointInnerAttention
from titan_video.models.layers import InnerAttention
from titan_video.models.spec import ParallelPlan, RankGroup, StepLayout
from titan_video.planner.dry_run.traffic import Traffic, exchange_bytes, ring_traffic, ulysses_traffic

HEADS, WIDTH = 12, 8
PLAN = ParallelPlan(blocks=("blocks",), inner_attention=("attn.inner_attention",))
ROTATIONS = ("alltoall", "allgather")


class Block(nn.Module):
    def __init__(self, inner_attention):
        super().__init__()
        self.attn = nn.Module()
        self.attn.inner_attention = inner_attention

    def forward(self, *args):
        return self.attn.inner_attention(*args)


def parallel_block(ring, ulysses, rotate, inner_attention=InnerAttention):
    mesh = ParallelDims(ring=ring, ulysses=ulysses).build_mesh("cpu")
    model = nn.Module()
    model.blocks = nn.ModuleDict({"0": Block(inner_attention())})
    apply_context_parallel(model, PLAN, mesh.ring, mesh.ulysses, rotate)
    return model.blocks["0"], mesh.sequence


def whole_tensors(batch, seq_len, dtype, heads=HEADS):
    """q, k, v and the gradient of the output, of the whole clip: the same on every rank."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(batch, seq_len, heads, WIDTH, dtype=torch.float64, generator=generator).to(dtype) for _ in range(4)
    ]


def get_slice_of(x, mesh, fill):
    """This rank's rows; those beyond the clip hold `fill`."""
    length = -(-x.shape[1] // mesh.size())
    padded = F.pad(x, (0, 0, 0, 0, 0, length * mesh.size() - x.shape[1]), value=fill)
    return padded[:, mesh.get_local_rank() * length :][:, :length].clone()


def run_slices(block, mesh, whole, seq_len):
    """(out, dq, dk, dv) of this rank's rows; what the padded rows hold must not matter."""
    q, k, v = (get_slice_of(x, mesh, 3.0).requires_grad_() for x in whole[:3])
    out = block(q, k, v, StepLayout(seq_len))
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), get_slice_of(whole[3], mesh, 0.0))]


def reference(whole):
    q, k, v = (x.double().transpose(1, 2).requires_grad_() for x in whole[:3])
    out = F.scaled_dot_product_attention(q, k, v)
    return [
        x.detach().transpose(1, 2)
        for x in (out, *torch.autograd.grad(out, (q, k, v), whole[3].double().transpose(1, 2)))
    ]


def largest_error(results, whole, mesh):
    rows = get_slice_of(torch.ones_like(whole[0]), mesh, 0.0)
    expected = [get_slice_of(x, mesh, 0.0) for x in reference(whole)]
    # Padded rows of the output are nobody's; their gradients must be zero.
    got = [results[0].double() * rows, *(x.double() for x in results[1:])]
    return max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))


def check_layouts(layouts, shapes, dtypes, heads=HEADS):
    errors = {}
    for ring, ulysses, rotate in layouts:
        block, mesh = parallel_block(ring, ulysses, rotate)
        for batch, seq_len in shapes:
            for dtype in dtypes:
                whole = whole_tensors(batch, seq_len, dtype, heads)
                errors[ring, ulysses, rotate, batch, seq_len, dtype] = largest_error(
                    run_slices(block, mesh, whole, seq_len), whole, mesh
                )
    return errors


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 3e-2}
LAYOUTS = {
    2: ([(1, 2, "alltoall"), (2, 1, "alltoall"), (2, 1, "allgather")], [(1, 16), (2, 13), (1, 1)], TOLERANCE),
    3: ([(1, 3, "alltoall"), (3, 1, "alltoall"), (3, 1, "allgather")], [(2, 12), (1, 14), (2, 4)], TOLERANCE),
    4: (
        [(1, 4, "alltoall"), *((4, 1, r) for r in ROTATIONS), *((2, 2, r) for r in ROTATIONS)],
        [(1, 16), (2, 17), (1, 5)],
        TOLERANCE,
    ),
    8: ([(2, 4, "alltoall"), (4, 2, "allgather")], [(1, 17)], [torch.float64]),
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_values_and_gradients_equal_attention_over_the_whole_clip(world):
    for rank, errors in enumerate(run_ranks(check_layouts, world, *LAYOUTS[world])):
        for case, error in errors.items():
            assert error <= TOLERANCE[case[-1]], (rank, case, error)


# ---- video and text jointly ----

TEXT = 5


def whole_text(batch, dtype, heads=HEADS):
    """q, k, v and the gradient of the output, of the text, and its mask: two of five tokens of the first clip count."""
    generator = torch.Generator().manual_seed(11)
    tensors = [
        torch.randn(batch, TEXT, heads, WIDTH, dtype=torch.float64, generator=generator).to(dtype) for _ in range(4)
    ]
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[0, 2:] = False
    return tensors, mask


def joint_reference(whole, text, mask):
    """(out, text_out, gradients of q, k, v, text q, k, v), written out."""
    leaves = [x.double().requires_grad_() for x in (*whole[:3], *text[:3])]
    q, k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in zip(leaves[:3], leaves[3:], strict=True))
    scores = q @ k.mT * WIDTH**-0.5
    if mask is not None:
        scores = scores.masked_fill(~F.pad(mask, (whole[0].shape[1], 0), value=True)[:, None, None], -torch.inf)
    out = (scores.softmax(-1) @ v).transpose(1, 2)
    grads = torch.autograd.grad(out, leaves, torch.cat([whole[3], text[3]], dim=1).double())
    return [*out.detach().split([whole[0].shape[1], TEXT], dim=1), *grads]


def run_joint(block, mesh, whole, text, mask, seq_len):
    """This rank's results. The text's gradients are partial on each rank and summed over the ranks here."""
    leaves = [get_slice_of(x, mesh, 3.0) for x in whole[:3]] + [x.clone() for x in text[:3]]
    for leaf in leaves:
        leaf.requires_grad_()
    out, text_out = block(*leaves, mask, StepLayout(seq_len))
    # The whole gradient of the text's output is a sum of parts, too, here very unequal ones.
    share = 2.0 * mesh.get_local_rank() + 1
    part = text[3] * (share / mesh.size() ** 2)
    grads = torch.autograd.grad((out, text_out), leaves, (get_slice_of(whole[3], mesh, 0.0), part))
    return [out.detach(), text_out.detach(), *grads[:3], *(reduce_over(mesh, g, "sum") for g in grads[3:])]


def check_joint(layouts, shapes, dtypes, heads=HEADS):
    errors = {}
    for ring, ulysses, rotate in layouts:
        block, mesh = parallel_block(ring, ulysses, rotate, JointInnerAttention)
        for batch, seq_len in shapes:
            for dtype in dtypes:
                whole, (text, mask) = whole_tensors(batch, seq_len, dtype, heads), whole_text(batch, dtype, heads)
                for text_mask in (mask, None):
                    got, expected = (
                        run_joint(block, mesh, whole, text, text_mask, seq_len),
                        joint_reference(whole, text, text_mask),
                    )
                    rows = get_slice_of(torch.ones_like(whole[0]), mesh, 0.0)
                    got[0] = got[0] * rows
                    for i in (0, 2, 3, 4):  # those of the video
                        expected[i] = get_slice_of(expected[i], mesh, 0.0)
                    error = max((x.double() - y).abs().max().item() for x, y in zip(got, expected, strict=True))
                    errors[ring, ulysses, rotate, batch, seq_len, text_mask is None, dtype] = error
    return errors


@pytest.mark.parametrize("world", [2, 3, 4])
def test_joint_attention_equals_that_of_one_rank(world):
    layouts, shapes, _ = LAYOUTS[world]
    for rank, errors in enumerate(run_ranks(check_joint, world, layouts, shapes, [torch.float64, torch.float32])):
        for case, error in errors.items():
            assert error <= 2 * TOLERANCE[case[-1]], (rank, case, error)


# ---- what is sent ----


def events(function):
    """(its result, every operator that ran meanwhile, on any thread, inside other operators too: name, shapes, types,
    plain arguments).
    """
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
        library, _, op = name.partition("::")
        # A functional gather reaches c10d as a list of tensors without recorded shapes; it is read one level up.
        if (library, op) not in {
            ("c10d", "alltoall_base_"),
            ("c10d", "_allgather_base_"),
            ("c10d", "_reduce_scatter_base_"),
            ("_c10d_functional", "all_gather_into_tensor"),
            ("_c10d_functional", "reduce_scatter_tensor"),
        }:
            assert library != "c10d" or op.endswith("_coalesced_"), name
            continue
        first, second = (itemsizes.get(dtypes[i], 0) * torch.Size(shapes[i]).numel() for i in (0, 1))
        kind, size = {
            # Equal parts, one of them for this rank; or everything to one other rank.
            "alltoall_base_": lambda: (
                "all_to_all",
                second - second // len(plain[4]) if len(set(plain[4])) == 1 else second,
            ),
            "_allgather_base_": lambda: ("all_gather", first - second),
            "_reduce_scatter_base_": lambda: ("reduce_scatter", second - first),
            "all_gather_into_tensor": lambda: ("all_gather", first * (plain[1] - 1)),
            "reduce_scatter_tensor": lambda: ("reduce_scatter", first - first // plain[2]),
        }[op]()
        calls, so_far = total.get(kind, (0, 0))
        total[kind] = calls + 1, so_far + size
    return [Traffic(kind, *total[kind]) for kind in sorted(total)]


def count_traffic(layouts, batch, seq_len, dtype, joint):
    counts = {}
    for ring, ulysses, rotate in layouts:
        block, mesh = parallel_block(ring, ulysses, rotate, JointInnerAttention if joint else InnerAttention)
        args = [get_slice_of(x, mesh, 0.0).requires_grad_() for x in whole_tensors(batch, seq_len, dtype)[:3]]
        if joint:
            text, mask = whole_text(batch, dtype)
            args += [*(x.requires_grad_() for x in text[:3]), mask]
        out, forward = events(lambda: block(*args, StepLayout(seq_len)))
        total = sum(x.sum() for x in out) if joint else out.sum()
        _, backward = events(lambda: total.backward())
        counts[ring, ulysses, rotate] = sent(forward), sent(backward)
    return counts


def added(*parts):
    total = {}
    for part in parts:
        for traffic in part:
            calls, size = total.get(traffic.collective, (0, 0))
            total[traffic.collective] = calls + traffic.calls, size + traffic.sent
    return [Traffic(kind, *total[kind]) for kind in sorted(total)]


@pytest.mark.parametrize(
    "world, dtype, joint", [(2, torch.bfloat16, False), (4, torch.float32, False), (4, torch.bfloat16, True)]
)
def test_what_is_sent_equals_the_closed_forms(world, dtype, joint):
    layouts, batch, seq_len = LAYOUTS[world][0], 2, 18
    elements, item = batch * -(-seq_len // world) * HEADS * WIDTH, dtype.itemsize
    text = batch * TEXT * HEADS * WIDTH if joint else 0
    for counts in run_ranks(count_traffic, world, layouts, batch, seq_len, dtype, joint):
        for (ring, ulysses, rotate), directions in counts.items():
            exchange = ulysses_traffic(elements, ulysses, item, text) if ulysses > 1 else ([], [])
            rounds = ring_traffic(elements, ring, item, rotate) if ring > 1 else ([], [])
            for measured, a, b in zip(directions, exchange, rounds, strict=True):
                assert measured == added(a, b), (ring, ulysses, rotate)
            assert tuple(sum(t.sent for t in d) for d in directions) == exchange_bytes(
                elements, ring, ulysses, item, rotate, text
            )
            if ring == 1:
                assert [[t.calls for t in d if t.collective == "all_to_all"] for d in directions] == [[2], [2]]


# ---- compile and checkpointing ----


class Attentions(nn.Module):
    """Several inner attentions over the same rows, so that one compilation sees them all."""

    def __init__(self, layouts, joint):
        super().__init__()
        blocks = [parallel_block(*layout) for layout in layouts]
        self.blocks, self.mesh = nn.ModuleList(block for block, _ in blocks), blocks[0][1]
        self.joint = nn.ModuleList(parallel_block(*layout, JointInnerAttention)[0] for layout in layouts if joint)

    def forward(self, q, k, v, layout):
        text, mask = q[:, :2], torch.ones_like(q[:, :2, 0, 0], dtype=torch.bool)
        out = sum(block(q, k, v, layout) for block in self.blocks)
        for block in self.joint:
            video, text = block(q, k, v, text, text, text, mask, layout)
            out = out + video + text.mean()
        return out


def run_compiled(layouts, joint, shapes, backend, checkpointed):
    """Largest difference from eager over several lengths, and the number of graphs built for them."""
    eager, worst = Attentions(layouts, joint), 0.0
    compiled = Attentions(layouts, joint)
    if checkpointed:
        compiled = checkpoint_wrapper(compiled, preserve_rng_state=False)
    compiled.compile(backend=backend, fullgraph=True, dynamic=len(shapes) > 1)
    torch._dynamo.utils.counters.clear()
    for batch, seq_len in shapes:
        whole = whole_tensors(batch, seq_len, torch.float64)
        expected, result = (
            run_slices(eager, eager.mesh, whole, seq_len),
            run_slices(compiled, eager.mesh, whole, seq_len),
        )
        worst = max(worst, *((a - b).abs().max().item() for a, b in zip(expected, result, strict=True)))
    return worst, torch._dynamo.utils.counters["stats"]["unique_graphs"]


def check_compiled(world, *args):
    for worst, graphs in run_ranks(run_compiled, world, *args, timeout=280):
        assert worst < 1e-12 and graphs == 1


def test_compiled_and_checkpointed_equals_eager():
    check_compiled(2, [(2, 1, "alltoall"), (1, 2, "alltoall")], True, [(1, 13)], "aot_eager", True)


def test_one_graph_of_the_ring_serves_all_lengths():
    check_compiled(2, [(2, 1, "allgather")], False, [(2, 13), (2, 18), (2, 23)], "aot_eager", False)


@pytest.mark.slow
def test_unified_compiled_and_checkpointed_equals_eager():
    check_compiled(4, [(2, 2, "alltoall"), (2, 2, "allgather")], True, [(2, 17), (2, 22)], "aot_eager", True)


@pytest.mark.slow
def test_inductor_equals_eager():
    check_compiled(2, [(2, 1, "alltoall"), (1, 2, "alltoall")], False, [(1, 13)], "inductor", False)


def selective(ops):
    def policy(ctx, func, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if func in ops else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def count_attention_runs(modes):
    """How often the forward of the ring op runs in forward and backward, seen by its two kernels, and the gradients."""
    result = {}
    save = {torch.ops.titan_video.ring_attention.default}
    for mode in modes:
        block, mesh = parallel_block(2, 1, "alltoall")
        if mode == "full":
            block = checkpoint_wrapper(block, preserve_rng_state=False)
        elif mode == "selective":
            block = checkpoint_wrapper(block, preserve_rng_state=False, context_fn=lambda: selective(save))
        whole = whole_tensors(1, 13, torch.float32)
        grads, recorded = events(lambda: run_slices(block, mesh, whole, 13))
        result[mode] = (
            sum(name == "aten::_scaled_dot_product_flash_attention_for_cpu" for name, *_ in recorded) / 2,
            grads,
        )
    return result


def test_checkpointing_can_keep_the_attention():
    for result in run_ranks(count_attention_runs, 2, ("none", "full", "selective")):
        assert {mode: runs for mode, (runs, _) in result.items()} == {"none": 1, "full": 2, "selective": 1}
        for _, grads in result.values():
            assert all(torch.equal(a, b) for a, b in zip(grads, result["none"][1], strict=True))


# ---- parts ----


def check_op():
    group = dist.group.WORLD.group_name
    q, k, v = (x.requires_grad_() for x in whole_tensors(2, 6, torch.float64)[:3])
    text, mask = whole_text(2, torch.float64)
    local = text[1].requires_grad_(), text[2].requires_grad_(), mask
    torch.library.opcheck(ring_attention, (q, k, v, 5, group, "alltoall"))
    torch.library.opcheck(ring_attention, (q, k, v, 5, group, "allgather", *local))
    flops = []
    for more in ((), local):
        with FlopCounterMode(display=False) as counter:
            out = ring_attention(q, k, v, 5, group, "alltoall", *more)[0]
            flops.append(counter.get_total_flops())
            out.sum().backward()
        flops.append(counter.get_total_flops() - flops[-1])
    return flops


def test_ring_op_is_a_well_formed_operator_and_counts_its_flops():
    queries = 2 * HEADS * 6
    keys = [5, 5, 5 + TEXT, 5 + TEXT]
    assert run_ranks(check_op, 1) == [
        [matmuls * queries * n * WIDTH for matmuls, n in zip((4, 10, 4, 10), keys, strict=True)]
    ]


def test_unknown_rotation_is_refused():
    with pytest.raises(ValueError, match="context_parallel_rotate_method"):
        RingAttention(RankGroup("", rank=0, size=2), "sideways")
