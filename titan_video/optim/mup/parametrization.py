"""Initial values, learning rate, weight decay and eps of each class of parameters, as powers of m = width / base width.

Yang et al. 2022, "Tensor Programs V" (table 8, for Adam), which Zheng et al. 2025, "Scaling diffusion transformers
efficiently via muP", show to hold for diffusion transformers. Of the equivalent forms this is the one without factors
in forward, so weights, exports and sampling stay as they are:

    class    initial scale   rate of AdamW   rate of Muon   eps
    input    base            lr                             eps / m
    vector   base            lr                             eps / m
    hidden   base m^-1/2     lr / m          lr m^-1/2      eps / m
    output   base / m        lr / m                         eps

`base` is what the family's initialisation gives at the base width. Muon's update has a constant root mean square, so
its spectral norm grows like m^1/2, and m^-1/2 makes it constant. Weight decay is divided by what the rate is multiplied
by: their product, which is what shrinks a weight, is the same number for all classes. eps follows the gradients: behind
an output matrix of size 1/m they are of size 1/m, those of the output matrix itself are not.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from titan_video.config.job_config import JobConfig, Optimizer
from titan_video.models import get_args, get_spec
from titan_video.models.spec import ModelSpec
from titan_video.optim.mup.widths import WidthRules, width_rules
from titan_video.optim.optimizer import updated_by
from titan_video.tools.logging import logger


@dataclass(frozen=True)
class Powers:
    """Powers of m in the initial scale, the rate of AdamW (8-bit or not), the rate of Muon and eps."""

    init: float
    rate: float
    muon_rate: float
    eps: float


POWERS = {
    "input": Powers(init=0, rate=0, muon_rate=0, eps=-1),
    "vector": Powers(init=0, rate=0, muon_rate=0, eps=-1),
    "hidden": Powers(init=-0.5, rate=-1, muon_rate=-0.5, eps=-1),
    "output": Powers(init=-1, rate=-1, muon_rate=-1, eps=0),
}


def width_class(name: str, rules: WidthRules) -> str:
    """The class of a parameter by its clean name. ValueError: the family has not said it."""
    for pattern, found in rules.classes.items():
        if fnmatchcase(name, pattern):
            return found
    raise ValueError(f"{name} matches no pattern of the model family's WidthRules.classes; add one")


class Parametrization:
    """What muP gives each parameter of a model.

    spec: the family, as it is without muP. args, base: arguments of the model and of the base.
    """

    def __init__(self, spec: ModelSpec, args: Any, base: Any):
        self.spec, self.multiple = spec, args.dim / base.dim
        with torch.device("meta"):
            models = spec.build(args), spec.build(base)
        self.shapes, self.base_shapes = ({name: p.shape for name, p in m.named_parameters()} for m in models)
        self.classes = {name: width_class(name, width_rules(spec)) for name in self.shapes}

    def init_parameter(
        self, name: str, tensor: Tensor, generator: torch.Generator, shape: torch.Size | None = None
    ) -> None:
        """Fill one full parameter in place: what the family draws at the base's scale, times the class's power of m.

        shape: not used, the base's is.
        """
        self.spec.init_parameter(name, tensor, generator, self.base_shapes[name])
        tensor.mul_(self.multiple ** POWERS[self.classes[name]].init)

    def adjust_group(self, name: str, group: dict) -> dict:
        """Entries of the parameter's group: see `build_optimizer`. "width_class" keeps the classes apart."""
        powers = POWERS[self.classes[name]]
        scale = self.multiple ** (powers.muon_rate if group["kind"] == "Muon" else powers.rate)
        return {
            "lr_scale": scale,
            "weight_decay": group["weight_decay"] / scale,
            "eps": group["eps"] * self.multiple**powers.eps,
            "width_class": self.classes[name],
        }

    def table(self, section: Optimizer) -> Iterator[str]:
        """One line for each class and kind of update: peak rate, weight decay, eps, and how many tensors it has."""
        counts: dict[tuple[str, str], int] = defaultdict(int)
        groups = {}
        for name, shape in self.shapes.items():
            kind = updated_by(name, len(shape), section.name, self.spec.plan.blocks)
            group = {"kind": kind, "weight_decay": section.weight_decay, "eps": section.eps}
            groups[self.classes[name], kind] = self.adjust_group(name, group)
            counts[self.classes[name], kind] += 1
        for (found, kind), group in sorted(groups.items(), key=lambda item: list(POWERS).index(item[0][0])):
            scale, decay = group["lr_scale"], "none" if found == "vector" else f"{group['weight_decay']:.4g}"
            eps = "" if kind == "Muon" else f", eps {group['eps']:.3g}"
            number = f"{counts[found, kind]} tensors"
            yield f"{found}, {kind}: lr {section.lr * scale:.4g} ({scale:.4g} x), weight decay {decay}{eps}, {number}"


def parametrize(spec: ModelSpec, config: JobConfig) -> ModelSpec:
    """The family with the initialisation and the groups of muP. Logs the rates by class.

    ValueError: optimizer.base_flavor does not fit (see `rules`).
    """
    length, section = config.encoder.max_text_length, config.optimizer
    args = get_args(spec, config.model.flavor, config.model.hf_assets_path, length)
    base = get_args(spec, section.base_flavor, "", length)
    if problem := base_problem(spec, args, base):
        raise ValueError(f"optimizer.base_flavor: given {section.base_flavor}, but {problem}")
    found = Parametrization(spec, args, base)
    logger.info(
        f"muP: width {args.dim} is {found.multiple:.4g} x the {base.dim} of {section.base_flavor}\n  "
        + "\n  ".join(found.table(section))
    )
    return replace(spec, init_parameter=found.init_parameter, adjust_group=found.adjust_group)


def base_problem(spec: ModelSpec, args: Any, base: Any) -> str:
    """Why a model cannot have this base; "" if it can."""
    try:
        sizes = width_rules(spec).sizes
    except ValueError as e:
        return str(e)
    wrong, model, narrow = [], flat(args), flat(base)
    if (width := args.dim // args.num_heads) != (other := base.dim // base.num_heads):
        wrong.append(f"the width of a head is {width} in model.flavor and {other} in it")
    for name in model | narrow:
        ours, theirs = model.get(name), narrow.get(name)
        if name not in sizes or ours is None or theirs is None:
            if ours != theirs:
                wrong.append(f"{name} is {ours} in model.flavor and {theirs} in it")
        elif name != "num_heads" and ours * base.dim != theirs * args.dim:
            wrong.append(f"{name} is {ours} in model.flavor and {theirs} in it, which is not in proportion to dim")
    return "; ".join(wrong)


def flat(args: Any) -> dict[str, Any]:
    """{name: value} of a model's arguments; those of arguments in arguments have dotted names."""
    found = {}
    for f in fields(args):
        value = getattr(args, f.name)
        inner = flat(value).items() if is_dataclass(value) else ()
        found |= {f"{f.name}.{name}": x for name, x in inner} if inner else {f.name: value}
    return found


def fitting_flavors(spec: ModelSpec, args: Any) -> list[str]:
    """Names of the flavors that a model can have as its base, narrowest first."""
    flavors = {name: replace(base, text_len=args.text_len) for name, base in spec.flavors.items()}
    return sorted(
        (n for n, base in flavors.items() if not base_problem(spec, args, base)), key=lambda n: flavors[n].dim
    )


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about muP, one line per mistake."""
    o, c = config.optimizer, config.checkpoint
    if o.parametrization == "standard":
        for name in ("base_flavor", "mup_finetune"):
            if value := getattr(o, name):
                shown = str(value).replace("True", "true")
                yield (
                    f"optimizer.{name}: given {shown}, without effect with optimizer.parametrization standard; set "
                    f"that to mup, or leave this at its default"
                )
        return
    where = "optimizer.parametrization: mup, but"
    if "." in o.name:
        yield f"{where} no rule is known for {o.name}, which optimizer.name gives; choose AdamW, AdamW8bit or Muon"
    if config.lora.enable:
        yield f"{where} lora.enable trains adapters, whose width is lora.rank; set one of them to its default"
    source = "checkpoint.initial_load_path" if c.initial_load_path else ""
    source = source or ("checkpoint.initial_load_in_hf" if c.initial_load_in_hf else "")
    if source and not o.mup_finetune:
        yield (
            f"{where} {source} gives the initial weights, which mup has not drawn; remove that, or say that only the "
            f"rates matter: optimizer.mup_finetune = true"
        )
    if o.mup_finetune and not source:
        yield (
            "optimizer.mup_finetune: true, but the weights are drawn; give checkpoint.initial_load_path, or set this "
            "to false"
        )
    yield from _base_rules(config)


def _base_rules(config: JobConfig) -> Iterator[str]:
    m, flavor, length = config.model, config.optimizer.base_flavor, config.encoder.max_text_length
    try:
        spec = get_spec(m.name)
        args = get_args(spec, m.flavor, m.hf_assets_path, length)
    except (ValueError, OSError):  # the program itself names the mistake
        return
    legal = f"legal for this model: {', '.join(fitting_flavors(spec, args)) or 'none yet; add a narrow flavor'}"
    if flavor not in spec.flavors:
        yield f"optimizer.base_flavor: given {flavor!r}, which is no flavor of {m.name}; {legal}"
    elif problem := base_problem(spec, args, get_args(spec, flavor, "", length)):
        yield f"optimizer.base_flavor: given {flavor}, but {problem}; {legal}"
