"""How much longer stages of a pipeline take than their order makes them, on ranks that wake each other. For machine.py.

A stage waits for a message, computes, and sends one. Where the host computes, a scheduler that wakes a rank on the core
of the one that sent, or not at once, makes stages take turns that could run at the same time.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from titan_video.planner.cost.step_model import bubble
from titan_video.planner.profile.stopwatch import Stopwatch, random_tensor


class _Computing(torch.autograd.Function):
    """What is received, after `count` products in forward, and after twice as many in backward."""

    @staticmethod
    def forward(ctx, x: Tensor, a: Tensor, b: Tensor, count: int) -> Tensor:
        ctx.work = a, b, count
        _compute(a, b, count)
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        a, b, count = ctx.work
        _compute(a, b, 2 * count)
        return grad.clone(), None, None, None


class _Stage(nn.Module):
    def __init__(self, a: Tensor, b: Tensor, count: int):
        super().__init__()
        self.a, self.b, self.count = a, b, count
        self.scale = nn.Parameter(torch.ones((), device=a.device))

    def forward(self, x: Tensor) -> Tensor:
        return _Computing.apply(x * self.scale, self.a, self.b, self.count)


def _compute(a: Tensor, b: Tensor, count: int) -> None:
    for _ in range(count):
        a @ b


def pipeline_slowdown(watch: Stopwatch, seconds: float, num_bytes: int, send: float, dtype: torch.dtype) -> float:
    """Of 1F1B over all ranks of the default group: seconds of a step without its sends / those of its stages and its
    bubble; 1 or more.

    seconds: of a stage's forward and backward of one micro-batch. num_bytes: that pass from stage to stage, in `send`
    seconds.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    number = 2 * world
    a, b = (random_tensor(256, 256, dtype=dtype, device=watch.device) for _ in range(2))
    count = max(1, round(seconds / 3 / watch.compute_seconds(lambda: a @ b)))
    x = torch.zeros(1, max(1, num_bytes // dtype.itemsize), dtype=dtype, device=watch.device)
    like = x.clone().requires_grad_()
    stage = PipelineStage(_Stage(a, b, count), rank, world, watch.device, input_args=(like,), output_args=(like,))
    schedule = Schedule1F1B(stage, number, loss_fn=lambda out, target: out.mean(), scale_grads=False)
    inputs, targets = x.repeat(number, 1), torch.zeros(number, 1)

    def step() -> None:
        given = (inputs,) if rank == 0 else ()
        schedule.step(*given, **({"target": targets} if rank == world - 1 else {}), return_outputs=False)

    of_stage = watch.compute_seconds(lambda: _compute(a, b, 3 * count))
    sends = 2 * (number + world - 1) * send  # as step_model.step_parts
    return max(1.0, (watch.seconds(step) - sends) / (of_stage * (number + bubble(world, number, 1))))
