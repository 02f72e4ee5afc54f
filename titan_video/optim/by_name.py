"""An optimizer of an installed package: optimizer.name = "package.module.Class".

The class is a subclass of torch.optim.Optimizer, and its module a file of an installed distribution: what lies in the
working folder is never imported. Rate, schedule, clipping and groups are those of every run; [optimizer.args] are
further arguments of its constructor.

Checkpoints hold its state as it makes it itself. Under FSDP weights are DTensors, and what an optimizer derives from
them (zeros_like, sums over rows) is a DTensor too, which is saved and sharded anew like a weight. Numbers that it keeps
for a weight or for a group, such as a step count, are saved for each weight: groups differ between layouts. What cannot
be saved so is refused before the first step.
"""

import inspect
import os
import sys
from collections.abc import Iterator
from dataclasses import fields
from difflib import get_close_matches
from functools import cache, partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_video.config.job_config import JobConfig, Optimizer
from titan_video.tools.logging import logger
from titan_video.tools.parts import find_module

OURS = ("params", "lr", "weight_decay", "kind", "lr_scale")  # entries of a group that the run itself sets
USED = ("name", "args", "lr", "weight_decay", "in_backward")  # fields of [optimizer] that hold for every optimizer
DTYPES = {bool: torch.bool, int: torch.int64, float: torch.float64}


@cache
def find_class(name: str) -> type[torch.optim.Optimizer]:
    """The class `package.module.Class`. ValueError: there is none that may be used; the message says why."""
    module, _, last = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"given {name!r}; legal: AdamW, AdamW8bit, Muon, or package.module.Class")
    _check_installed(module)
    try:
        found = getattr(import_module(module), last, None)
    except Exception as e:  # whatever the package raises
        raise ValueError(f"given {name}, but {module} cannot be imported: {type(e).__name__}: {e}") from None
    if found is None:
        near = get_close_matches(last, dir(sys.modules[module]), n=1)
        raise ValueError(f"given {name}, but {module} has no {last}" + (f"; do you mean {near[0]}?" if near else ""))
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ValueError(f"given {name}, which is no subclass of torch.optim.Optimizer")
    return found


def _check_installed(module: str) -> None:
    """ValueError unless the module is a file of an installed distribution. Nothing of it is imported."""
    top = module.partition(".")[0]
    names = sorted(set(metadata.packages_distributions().get(top, [])))
    if not names:
        raise ValueError(f"given a class of {module}, but no installed package has {top}; install it with pip")
    spec = find_module(module)
    if spec is None or not spec.origin:
        raise ValueError(f"given a class of {module}, but {', '.join(names)} has no such module")
    origin, not_installed = os.path.abspath(spec.origin), (Path.cwd(), Path(sys.argv[0]).resolve().parent)
    for distribution in map(metadata.distribution, names):
        folder = os.path.abspath(str(distribution.locate_file("")))
        files = {os.path.join(folder, *file.parts) for file in distribution.files or ()}
        if origin in files and Path(folder) not in not_installed:
            return
    raise ValueError(
        f"given a class of {module}, which is {origin}: that is no file of the installed {', '.join(names)}; what "
        f"lies in a working folder is not imported, and `pip install -e` leaves a package there"
    )


def arguments(cls: type, section: Optimizer) -> dict[str, Any]:
    """The arguments of the constructor besides the groups. TOML's lists become tuples.

    ValueError: it does not take these, or needs others.
    """
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in section.args.items()}
    given |= {"lr": section.lr}
    accepted = inspect.signature(cls).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    named = [n for n, p in accepted.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if "weight_decay" in named or takes_any:
        given["weight_decay"] = section.weight_decay
    elif section.weight_decay:
        raise ValueError(
            f"optimizer.weight_decay: given {section.weight_decay}, but {section.name} has no weight_decay; set it to 0"
        )
    for name in section.args:
        if name in OURS:
            where = f"set optimizer.{name}" if name in ("lr", "weight_decay") else "the run sets it"
            raise ValueError(f"optimizer.args.{name}: not for this table; {where}")
    if unknown := [name for name in given if name not in named and not takes_any]:
        legal = ", ".join(name for name in named if name not in OURS) or "none"
        raise ValueError(f"optimizer.args.{unknown[0]}: {section.name} has no such argument; legal: {legal}")
    needed = [n for n in named if accepted[n].default is inspect.Parameter.empty and n not in given]
    if missing := needed[1:]:  # the first is the groups
        raise ValueError(f"optimizer.args: {section.name} needs {', '.join(missing)} too; add it to [optimizer.args]")
    return given


def build(groups: list[dict], section: Optimizer) -> torch.optim.Optimizer:
    """The optimizer of these groups, which brings what checkpoints hold of it. ValueError: see `find_class` and
    `arguments`.
    """
    names = [f.name for f in fields(section) if f.name not in USED and getattr(section, f.name) != f.default]
    if names:
        logger.info(
            f"optimizer.name = {section.name}: {', '.join(f'optimizer.{name}' for name in names)} of the TOML is for "
            f"AdamW and Muon, and not read; arguments of this class are in [optimizer.args]"
        )
    return _make(groups, section)


def _make(groups: list[dict], section: Optimizer) -> torch.optim.Optimizer:
    cls = find_class(section.name)
    try:
        optimizer = cls(groups, **arguments(cls, section))
        optimizer.checkpoint_state = partial(NamedState, optimizer)
        return optimizer
    except (TypeError, AssertionError) as e:
        raise ValueError(f"optimizer.args: {section.name} does not take these: {e}") from None


class NamedState:
    """What checkpoints hold of such an optimizer, by `parameter.slot`; see checkpoint.state.OptimizerState.

    params: {clean name: parameter}. Construct it on all ranks together, before the first step.
    ValueError: its state cannot be saved.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, params: dict[str, Tensor]):
        self.optimizer, self.params = optimizer, params
        self.tensors: dict[str, Tensor] = {}  # of numbers, which a save reads and a load fills
        hyperparameters = inspect.signature(type(optimizer)).parameters
        self.counted = [  # numbers of a group that the optimizer itself changes
            [k for k, v in g.items() if k not in hyperparameters and k not in OURS and _is_number(v)]
            for g in optimizer.param_groups
        ]
        # What the constructor made. Most make their state in the first step.
        self.groups = [{k: g[k] for k in keys} for g, keys in zip(optimizer.param_groups, self.counted, strict=True)]
        self.state = {p: {k: _copy(v) for k, v in s.items()} for p, s in optimizer.state.items()}
        self._try_step()
        self._check()
        self._reset()

    def _reset(self) -> None:
        """As the constructor left it."""
        self.optimizer.state.clear()
        for p, slots in self.state.items():
            self.optimizer.state[p] = {k: _copy(v) for k, v in slots.items()}
        for group, numbers, keys in zip(self.optimizer.param_groups, self.groups, self.counted, strict=True):
            for key in [k for k in keys if k not in numbers]:
                group.pop(key, None)
            group |= {k: _copy(v) for k, v in numbers.items()}

    def _try_step(self) -> None:
        """A step with gradients of zero at a rate of zero, for the form of the state."""
        groups, before = self.optimizer.param_groups, [dict(g) for g in self.optimizer.param_groups]
        for group in groups:
            group |= {"lr": 0.0, "weight_decay": 0.0} if "weight_decay" in group else {"lr": 0.0}
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        attributes = {k: v for k, v in vars(self.optimizer).items() if _is_number(v)}
        try:
            with torch.random.fork_rng(devices=[]):
                self.optimizer.step()
        except Exception as e:  # whatever the package raises
            raise ValueError(f"optimizer.name: {self.name} cannot make a step here: {_line(e)}") from None
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        for group, old, keys in zip(groups, before, self.counted, strict=True):
            group |= {k: old[k] for k in ("lr", "weight_decay") if k in old}
            keys += [k for k, v in group.items() if k not in old and _is_number(v)]
        changed = [k for k, v in attributes.items() if _differ(v, getattr(self.optimizer, k))]
        if changed:
            raise ValueError(
                f"optimizer.name: {self.name} keeps {', '.join(changed)} in itself, where no checkpoint finds it; "
                f"choose another"
            )

    @property
    def name(self) -> str:
        return self.optimizer.param_groups[0]["kind"]

    def _check(self) -> None:
        for key, p, value in self._slots():
            problem = ""
            if isinstance(value, Tensor) and value.numel() > 1:
                if not value.is_floating_point():
                    problem = f"{value.dtype}, which belongs to quantized state"
                elif isinstance(p, DTensor) and not isinstance(value, DTensor):
                    problem = "of this rank's shard alone, so that no other number of ranks could load it"
            elif not isinstance(value, Tensor) and type(value) not in DTYPES:
                problem = f"a {type(value).__name__}"
            if problem:
                raise ValueError(
                    f"optimizer.name: the state of {self.name} cannot be saved: {key} is {problem}; choose another "
                    f"optimizer"
                )

    def _slots(self) -> Iterator[tuple[str, Tensor, Any]]:
        """(name in the checkpoint, parameter, value) of each slot; a slot of None holds nothing."""
        for name, p in self.params.items():
            for slot, value in self.optimizer.state.get(p, {}).items():
                if value is not None:
                    yield f"{name}.{slot}", p, value
            if p in self.optimizer.state:
                yield from ((f"{name}.group:{key}", p, self._group(p)[0][key]) for key in self._group(p)[1])

    def _group(self, p: Tensor) -> tuple[dict, list[str]]:
        """The group of a parameter, and the names of its numbers."""
        pairs = zip(self.optimizer.param_groups, self.counted, strict=True)
        return next((g, keys) for g, keys in pairs if any(p is q for q in g["params"]))

    def state_dict(self) -> dict[str, Tensor]:
        self.tensors = {
            key: torch.tensor(value, dtype=DTYPES[type(value)])
            for key, _, value in self._slots()
            if not isinstance(value, Tensor)
        }
        return {key: value if isinstance(value, Tensor) else self.tensors[key] for key, _, value in self._slots()}

    def allocate(self, saved: dict[str, Any]) -> None:
        """State to be loaded into, in the form that the optimizer makes. Collective."""
        self._reset()
        self._try_step()
        for name, p in self.params.items():
            if not any(key.startswith(f"{name}.") for key in saved):
                self.optimizer.state.pop(p, None)

    def loaded(self) -> None:
        """Take the numbers back that a load has written into the tensors of `state_dict`."""
        for key, tensor in self.tensors.items():
            name, _, slot = key.rpartition(".")
            p = self.params[name]
            kind, _, of_group = slot.partition(":")
            if kind == "group" and of_group:
                self._group(p)[0][of_group] = tensor.item()
            else:
                self.optimizer.state[p][slot] = tensor.item()


def _is_number(value: Any) -> bool:
    return type(value) in DTYPES or (isinstance(value, Tensor) and value.numel() == 1)


def _differ(a: Any, b: Any) -> bool:
    return not _is_number(b) or bool(a != b)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def try_class(section: Optimizer) -> None:
    """Make the optimizer for two small tensors, and let it step. ValueError: it fails, or its state cannot be saved."""
    params = {"matrix": nn.Parameter(torch.ones(4, 6)), "vector": nn.Parameter(torch.ones(6))}
    kinds = {"kind": section.name, "lr_scale": 1.0, "weight_decay": section.weight_decay, "lr": section.lr}
    try:
        optimizer = _make([{"params": [p], **kinds} for p in params.values()], section)
    except ValueError as e:
        raise e if str(e).startswith("optimizer.") else ValueError(f"optimizer.args: {section.name}: {e}") from None
    except Exception as e:  # whatever the package raises
        raise ValueError(f"optimizer.name: {section.name} cannot be made: {_line(e)}") from None
    NamedState(optimizer, params)


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about an optimizer of another package, one line per mistake."""
    o, found = config.optimizer, None
    if o.in_backward:
        yield f"optimizer.in_backward: true, which needs an optimizer of ours, but optimizer.name is {o.name}"
    if config.training.dtype == "bfloat16":
        yield (
            f"training.dtype: bfloat16, whose updates are rounded stochastically, which {o.name} does not do; choose "
            f"AdamW, AdamW8bit or Muon, or float32"
        )
    try:
        found = find_class(o.name)
    except ValueError as e:
        yield f"optimizer.name: {e}"
    if found:
        try:
            try_class(o)
        except ValueError as e:
            yield str(e)
