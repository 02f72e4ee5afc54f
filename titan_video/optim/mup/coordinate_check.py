"""The coordinate check: a few steps of the same model at several widths. With muP activations keep their size.

Yang et al. 2022, appendix D. For every Linear and every block, the mean |activation| of one batch is recorded at the
start and after each step; for every table, which is added to activations, the mean |value|. Its logarithm is fitted
over that of the width: a slope of 0 per doubling is right, a slope above the bar, either way, means that a rule is
wrong. Muon's updates are small beside the initial values, so that the mean |change| since the start is looked at
instead, and its matrices get MUON_FACTOR times the rate of the others.

The rate is large on purpose: a few steps must move the activations, or nothing would be checked.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from titan_video.config.job_config import JobConfig, Optimizer
from titan_video.data.batch import Batch
from titan_video.distributed.sequence import whole_sequence
from titan_video.distributed.utils import initialise
from titan_video.flow.matching import FlowMatching
from titan_video.flow.noise import draw_noise
from titan_video.models import get_args, get_spec
from titan_video.models.spec import ModelSpec
from titan_video.optim.mup.parametrization import Parametrization, flat, width_class
from titan_video.optim.mup.widths import width_rules
from titan_video.optim.optimizer import build_optimizer
from titan_video.tasks.conditioning import COND_LATENTS
from titan_video.tasks.denoising import Denoising

BAR = 0.2  # |slope| per doubling of the width
MUON_FACTOR = 8.0
LATENT_FHW = (3, 4, 6)  # of the clips

Sizes = dict[str, list[float]]  # {layer: mean |activation|, at the start and after each step}


@dataclass(frozen=True)
class Probe:
    """What is run at each width.

    layers: blocks of each kind at most, as depth is not what is checked. lr: at the smallest width. clips: of the
    batch.
    """

    widths: tuple[int, ...]
    steps: int = 4
    seeds: int = 4
    layers: int = 2
    lr: float = 2.0**-7
    clips: int = 8


@dataclass(frozen=True)
class Finding:
    """What the check has found.

    measure: "activations" or "changes". sizes: {width: {layer: mean over the seeds}}.
    slopes: {layer: slope per doubling of the width, at the start and after each step; NaN: the layer is zero there,
        infinite: it has diverged}.
    """

    measure: str
    sizes: dict[int, Sizes]
    slopes: Sizes

    def worst(self) -> tuple[str, int, float]:
        """(layer, step, slope) of the largest |slope| after a step."""
        found = [
            (layer, step, slope)
            for layer, slopes in self.slopes.items()
            for step, slope in enumerate(slopes)
            if step > 0 and not math.isnan(slope)
        ]
        return max(found, key=lambda x: abs(x[2]))


def default_widths(head_dim: int) -> tuple[int, ...]:
    """Four widths, each twice the one before, from 64 or from one head."""
    smallest = head_dim * max(1, 64 // head_dim)
    return tuple(smallest * k for k in (1, 2, 4, 8))


def at_width(spec: ModelSpec, args: Any, dim: int, layers: int) -> Any:
    """A model's arguments at another width, with at most so many blocks of a kind.

    ValueError: `dim` is no number of its heads, or another size would be no integer.
    """
    growing = width_rules(spec).sizes
    sizes = {name: value for name, value in flat(args).items() if name in growing}
    if any(size * dim % args.dim for size in sizes.values()):
        shown = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(
            f"--widths: given {dim}, at which the model's sizes ({shown}) are no integers; give multiples of the width "
            f"of a head, {args.head_dim}"
        )
    depths = {f.name: min(getattr(args, f.name), layers) for f in fields(args) if f.name.endswith("layers")}
    for name, size in sizes.items():
        args = _with(args, name, size * dim // sizes["dim"])
    return replace(args, **depths)


def _with(args: Any, name: str, value: Any) -> Any:
    """Arguments with one value replaced, by its dotted name."""
    first, _, rest = name.partition(".")
    return replace(args, **{first: _with(getattr(args, first), rest, value) if rest else value})


def random_batch(spec: ModelSpec, args: Any, clips: int, seed: int) -> Batch:
    """Clips of normal noise with the conditioning that the model takes, the same at every width."""
    ids = torch.arange(clips)
    channels, conditioning = spec.geometry(args).channels, args.conditioning

    def draw(stream: int, *shape: int) -> Tensor:
        return draw_noise(1000 * seed + stream, ids, shape)

    cond = {}
    if conditioning.num_cond_frames:
        frames = LATENT_FHW[0] if conditioning.form == "mask_first" else 1
        cond[COND_LATENTS] = draw(1, channels, frames, *LATENT_FHW[1:])
    if conditioning.image_tokens:
        cond["image_BSD"] = draw(2, conditioning.image_tokens, args.image_dim)
    if conditioning.pooled_text:
        cond["pooled_text_BD"] = draw(3, args.pooled_dim)
    text = draw(4, args.text_len, args.text_dim)
    mask = torch.ones(clips, args.text_len, dtype=torch.bool)
    return Batch({"video": draw(5, channels, *LATENT_FHW)}, text, mask, ids, cond)


class Recorder:
    """Sizes of every table, and of the outputs of every Linear and every block, in each forward of a model.

    A Linear that is called again in a forward, or a second output, has a name of its own: "name (2)".
    differences: sizes of the differences to the first forward instead.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec, differences: bool):
        self.sizes: Sizes = {}
        self.first: dict[str, Tensor] = {}
        self.differences = differences
        self.calls: Counter[str] = Counter()
        rules, parameters = width_rules(spec), model.named_parameters()
        self.tables = {name: p for name, p in parameters if p.ndim > 1 and width_class(name, rules) == "vector"}
        model.register_forward_pre_hook(lambda _, args: self._begin())
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) or name.rpartition(".")[0] in spec.plan.blocks:
                module.register_forward_hook(lambda _, args, output, name=name: self._record(name, output))

    def _begin(self) -> None:
        self.calls.clear()
        for name, table in self.tables.items():
            self._record(name, table)

    def _record(self, name: str, output: Any) -> None:
        for y in output if isinstance(output, tuple) else (output,):
            self.calls[name] += 1
            key, y = f"{name} ({self.calls[name]})" if self.calls[name] > 1 else name, y.detach()
            if self.differences:
                y = y - self.first.setdefault(key, y.clone())
            self.sizes.setdefault(key, []).append(y.abs().mean().item())


def run_width(
    spec: ModelSpec, args: Any, base: Any, section: Optimizer, probe: Probe, seed: int, differences: bool
) -> Sizes:
    """Train one model for a few steps on one batch. base: arguments of the narrowest model."""
    init_parameter, adjust_group = spec.init_parameter, None
    if section.parametrization == "mup":
        mup = Parametrization(spec, args, base)
        init_parameter, adjust_group = mup.init_parameter, mup.adjust_group
    model = spec.build(args)
    initialise(model, init_parameter, seed)
    optimizer = build_optimizer(model, section, spec.plan.blocks, seed, adjust_group)
    for group in optimizer.param_groups:
        group["lr"] *= MUON_FACTOR if group["kind"] == "Muon" else 1.0
    task = Denoising(spec, args, FlowMatching(JobConfig().flow), whole_sequence(), torch.device("cpu"), seed)
    batch, recorder = random_batch(spec, args, probe.clips, seed), Recorder(model, spec, differences)
    inputs = task.prepare(batch)
    for _ in range(probe.steps):
        (task.loss(model(**inputs.kwargs), inputs).sum() / task.num_loss_elements(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        model(**inputs.kwargs)
    return recorder.sizes


def coordinate_check(config: JobConfig, probe: Probe) -> Finding:
    """Run the model of `config` at the widths of `probe`, with its optimizer and parametrization, in float32 on a CPU.

    The base is the narrowest of these widths: what holds for it holds for any other one.
    """
    spec = get_spec(config.model.name)
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, config.encoder.max_text_length)
    widths = sorted(probe.widths or default_widths(args.head_dim))
    models = {width: at_width(spec, args, width, probe.layers) for width in widths}
    section = replace(config.optimizer, lr=probe.lr, implementation="foreach")
    differences, sizes = section.name == "Muon", {}
    for width, model_args in models.items():
        runs = [
            run_width(spec, model_args, models[widths[0]], section, probe, seed, differences)
            for seed in range(probe.seeds)
        ]
        sizes[width] = {
            layer: [sum(values) / len(runs) for values in zip(*(run[layer] for run in runs), strict=True)]
            for layer in runs[0]
        }
    slopes = {layer: list(_slopes(sizes, layer)) for layer in sizes[widths[0]]}
    return Finding("changes" if differences else "activations", sizes, slopes)


def _slopes(sizes: dict[int, Sizes], layer: str) -> Iterator[float]:
    """The least-squares slope of log2(size) over log2(width), at the start and after each step."""
    x = torch.tensor([math.log2(width) for width in sizes], dtype=torch.float64)
    for values in zip(*(sizes[width][layer] for width in sizes), strict=True):
        if not all(map(math.isfinite, values)):
            yield math.inf
            continue
        y = torch.tensor(values, dtype=torch.float64).log2()
        slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
        yield slope.item() if min(values) > 0 else math.nan
