"""Balances the experts of a mixture without an auxiliary loss, and reports their load.

    step       zero the counts; forward and backward, in which each router counts its tokens; sum over ranks
    update     bias += rate x sign(mean load - load), minus its mean, with the optimizer's update or not at all

(Wang et al. 2024, "Auxiliary-loss-free load balancing strategy for mixture-of-experts".) Counts are sums over all
micro-batches and ranks of a step, integers, so the biases are the same bit for bit under every layout. An auxiliary
loss over a rank's own tokens would depend on it.

What is reported, over all levels of noise and for each: the load of the busiest expert over the mean, of the layer
where that is highest; and the entropy of the load over that of a uniform one, a mean over layers. In a video model the
load depends strongly on the noise level: a good total can hide an expert that one level alone uses.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_video.config.job_config import JobConfig
from titan_video.config.values import divisors
from titan_video.distributed.parallel_dims import Meshes
from titan_video.distributed.utils import reduce_over
from titan_video.models import get_args, get_spec
from titan_video.models.experts import NUM_LEVELS, Router
from titan_video.training.metrics import MetricsLogger

Run = Callable[[int, Callable[[], Tensor]], Tensor]  # (step, its forward and backward) -> the loss


class ExpertBalance:
    """Runs a step's forward and backward, and sets the routers' biases when the optimizer updates the weights.

    run: what runs forward and backward (training/parts.build_gradient_check).
    """

    def __init__(
        self,
        config: JobConfig,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        meshes: Meshes,
        metrics: MetricsLogger,
        run: Run,
    ):
        self.routers = [module for module in model.modules() if isinstance(module, Router)]
        self.rate, self.log_freq = config.experts.balance_rate, config.metrics.log_freq
        self.meshes, self.metrics, self.run = meshes, metrics, run
        self.num_steps = config.training.steps
        self.load_RSE: Tensor | None = None  # of a step whose update is still to come
        optimizer.register_step_post_hook(self._update)

    def __call__(self, step: int, forward_backward: Callable[[], Tensor]) -> Tensor:
        """The loss of optimizer step `step`."""
        self.load_RSE = None
        for router in self.routers:
            router.zero_load()
        loss = self.run(step, forward_backward)
        loads = [router.load_SE for router in self.routers]
        if loads:
            over_sequence = reduce_over(self.meshes.sequence, torch.stack(loads), "sum")
            self.load_RSE = reduce_over(self.meshes.batch, over_sequence, "sum")
        if step == 1 or step % self.log_freq == 0 or step == self.num_steps:
            self.metrics.log_scalars(step, describe(self.load_RSE, self.meshes), "experts")
        return loss

    @torch.no_grad()
    def _update(self, optimizer: torch.optim.Optimizer, *args: Any) -> None:
        """After an update, which the optimizer itself leaves out on the device where `found_inf` says so."""
        if self.load_RSE is None:  # the optimizer stepped during backward, or for its own purposes
            return
        rate = self.rate * (1 - getattr(optimizer, "found_inf", 0.0))
        for router, load_SE in zip(self.routers, self.load_RSE, strict=True):
            router.bias += like(router.bias, rate * direction(load_SE.sum(0)))
        self.load_RSE = None


def direction(load_E: Tensor) -> Tensor:
    """What the bias of each expert should be changed by: about 1 for a load below the mean, -1 above. Its mean is 0."""
    # Exact for integers, unlike a comparison with their mean.
    sign_E = (load_E.sum() - load_E * load_E.numel()).sign().float()
    return sign_E - sign_E.mean()


def like(parameter: Tensor, full: Tensor) -> Tensor:
    """A full tensor, of which every rank has all, as a parameter is stored."""
    full = full.to(parameter.device, parameter.dtype)
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)


def describe(load_RSE: Tensor | None, meshes: Meshes) -> dict[str, float]:
    """Numbers of a step by name, over the layers of all pipeline stages. load: of this stage; None: it has no experts.

    The host waits for the device.
    """
    highest = torch.zeros(NUM_LEVELS + 1, dtype=torch.float64, device=meshes.world.device_type)
    sums = torch.zeros(2, NUM_LEVELS + 1, dtype=torch.float64, device=meshes.world.device_type)  # of entropies, layers
    if load_RSE is not None:
        load_RSE = torch.cat([load_RSE.sum(1, keepdim=True), load_RSE], dim=1)
        share_RSE = load_RSE.double() / load_RSE.sum(2, keepdim=True).clamp(min=1)
        num_experts = share_RSE.new_tensor(load_RSE.shape[2])
        entropy_RS = torch.special.entr(share_RSE).sum(2) / num_experts.log()
        highest = share_RSE.amax((0, 2)) * num_experts
        sums = torch.stack([entropy_RS.sum(0), (load_RSE.sum(2) > 0).double().sum(0)])
    highest, (entropies, layers) = reduce_over(meshes.pp, highest, "max"), reduce_over(meshes.pp, sums, "sum")
    bounds = [i / NUM_LEVELS for i in range(NUM_LEVELS + 1)]
    names = ["", *(f"_sigma_{low:g}_to_{high:g}" for low, high in zip(bounds, bounds[1:], strict=False))]
    rows = zip(names, highest.tolist(), entropies.tolist(), layers.tolist(), strict=True)
    return {
        key: value
        for name, most, entropy, num in rows
        if num  # a step may have no token of some level
        for key, value in ((f"load_max_over_mean{name}", most), (f"load_entropy{name}", entropy / num))
    }


def build(config: JobConfig, args: Any, **trained: Any) -> ExpertBalance:
    """ValueError: the run cannot train this mixture. args: the model's. trained: as of ExpertBalance."""
    if problems := list(refusals(config, args)):
        raise ValueError("\n".join(problems))
    return ExpertBalance(config, **trained)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about mixtures of experts, one line per mistake."""
    m = config.model
    try:
        args = get_args(get_spec(m.name), m.flavor, m.hf_assets_path, config.encoder.max_text_length)
    except (ValueError, OSError):  # the program itself names the mistake
        return
    yield from refusals(config, args)


def refusals(config: JobConfig, args: Any) -> Iterator[str]:
    """What does not go with the model's arguments. `build` asks again: that a model of flavor hf has experts, no value
    of the configuration says.
    """
    flavor, p = f"model.flavor {config.model.flavor}", config.parallelism
    experts = getattr(args, "experts", None)
    if experts is None:
        if config.experts != type(config.experts)():
            yield f"experts: given, but {flavor} has no experts; remove the section"
        return
    if experts.expert_choice and config.experts != type(config.experts)():
        yield f"experts.balance_rate: has no effect, as the experts of {flavor} choose equally many tokens; remove it"
    if experts.expert_choice and config.compile.enable:
        yield (
            f"compile.enable: true, but the experts of {flavor} choose as many tokens of a rank as they like, and a "
            f"compiled block needs that number; set it to false, or choose a flavor of token choice"
        )
    if config.lora.enable:
        yield f"lora.enable: true, but there are no adapters of experts, which {flavor} has; train all weights"
    if config.activation_checkpoint.mode == "memory_budget":
        yield (
            f"activation_checkpoint.mode: memory_budget, but the compiler might recompute what the router of {flavor} "
            f"decided; choose full or selective, which save it"
        )
    if experts.shared_dim % p.tensor_parallel_degree:
        yield (
            f"parallelism.tensor_parallel_degree: given {p.tensor_parallel_degree}, which does not divide the width "
            f"{experts.shared_dim} of the expert of all tokens of {flavor}; legal: {divisors(experts.shared_dim)}"
        )
    if p.pipeline_parallel_degree > 1 and p.pipeline_parallel_schedule == "InterleavedZeroBubble":
        yield (
            f"parallelism.pipeline_parallel_schedule: InterleavedZeroBubble, but the backward of experts ({flavor}) is "
            f"one operator for inputs and weights; choose Interleaved1F1B"
        )
