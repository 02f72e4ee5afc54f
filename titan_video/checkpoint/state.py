"""What a checkpoint holds of a run (named tensors and JSON), the comparison with a run, the reading of tensors, and the
ranks that do this together.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from titan_video.checkpoint import files
from titan_video.checkpoint.files import InvalidCheckpoint, TensorLoadPlanner, TensorReader, plain_errors
from titan_video.distributed.utils import clean_name, gather_objects
from titan_video.optim.optimizer import SLOTS, new_slot

Saved = dict[str, TensorStorageMetadata]  # name -> entry of DCP's index: shape, dtype, chunks


class TensorState(Protocol):
    """`state_dict` returns the live tensors under flat, stable names: a save reads them, a load writes into them."""

    def state_dict(self) -> dict[str, Tensor]: ...


class ModelState:
    """Parameters and persistent buffers of a module; with `which`, only those whose name it accepts."""

    def __init__(self, model: nn.Module, which: Callable[[str], bool] | None = None):
        self.model, self.which = model, which

    def state_dict(self) -> dict[str, Tensor]:
        state = get_model_state_dict(self.model)
        return state if self.which is None else {name: tensor for name, tensor in state.items() if self.which(name)}


class OptimizerState:
    """State tensors of an optimizer, named `parameter.slot`. Learning rate, betas and the like come from the TOML.

    Construct it before the first forward: FSDP may replace the shards by gathered parameters later.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        # Not torch's get_optimizer_state_dict: without state it would take a step, and leave the step counts at 1.
        self.param_group = {param: group for group in optimizer.param_groups for param in group["params"]}
        self.params = {clean_name(name): param for name, param in model.named_parameters() if param in self.param_group}
        assert len(self.params) == len(self.param_group), "the optimizer holds parameters that are not the model's"
        # Of an optimizer of another package: optim.by_name.NamedState.
        self.named = optimizer.checkpoint_state(self.params) if hasattr(optimizer, "checkpoint_state") else None

    def state_dict(self) -> dict[str, Tensor]:
        if self.named:
            return self.named.state_dict()
        return {
            f"{name}.{slot}": value
            for name, param in self.params.items()
            for slot, value in self.optimizer.state.get(param, {}).items()
        }

    def allocate(self, saved: Saved) -> None:
        """Replace the optimizer's state by zeros for the entries of `saved`, to be loaded into: a new optimizer has no
        state before its first step. Shapes and types are those of this run.

        ValueError: another kind of optimizer wrote them.
        """
        if self.named:
            return self.named.allocate(saved)
        self.optimizer.state.clear()
        for key, entry in saved.items():
            name, _, slot = key.rpartition(".")
            if name not in self.params:
                continue  # of another pipeline stage, or not of this run: `compare` reports it
            self.optimizer.state[self.params[name]][slot] = self._empty(self.params[name], slot, entry.properties.dtype)
        for name, param in self.params.items():
            found = set(self.optimizer.state.get(param, ()))
            expected = SLOTS[self.param_group[param].get("kind", "AdamW")]
            if found and found != set(expected):
                raise ValueError(
                    f"the checkpoint has {', '.join(sorted(found))} of {name}, and optimizer.name of this run "
                    f"needs {', '.join(expected)}: resume with the optimizer that wrote it, or start another run from "
                    f"its weights by checkpoint.initial_load_path"
                )

    def loaded(self) -> None:
        """A load has filled the tensors of `state_dict`."""
        if self.named:
            self.named.loaded()

    def _empty(self, param: Tensor, slot: str, dtype: torch.dtype) -> Tensor:
        group = self.param_group[param]
        if slot != "step":
            return new_slot(param, group.get("kind", "AdamW"), slot)
        # torch keeps the step count on the weights' device for a fused or capturable step, else on the host.
        device = param.device if group.get("fused") or group.get("capturable") else "cpu"
        return torch.zeros((), dtype=dtype if dtype == torch.float64 else torch.float32, device=device)


def to_exact_json(name: str, state: dict[str, Any]) -> str:
    """JSON text of a state that reads back equal. ValueError for a tuple, NaN, a key that is not a string, ..."""
    try:
        text = json.dumps(state, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of `{name}` cannot be saved as JSON: {error}") from error
    if json.loads(text) != state:
        raise ValueError(
            f"the state of `{name}` would come back changed from JSON (a tuple, or a key that is not a string): {state}"
        )
    return text


def saved_under(metadata: Metadata, prefix: str) -> Saved:
    """The entries named `prefix.*`, without the prefix."""
    return {
        name[len(prefix) + 1 :]: entry
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(f"{prefix}.")
    }


def saved_weights(metadata: Metadata, source: str) -> tuple[Saved, dict[str, str]]:
    """({name: entry}, {name: its name in the checkpoint}) of the weights "model" or "ema"; both empty: there are none.

    Averages lack what is not trained, such as biases of routers: of that they have the model's.
    """
    saved = saved_under(metadata, source)
    rest = {name: entry for name, entry in saved_under(metadata, "model").items() if saved and name not in saved}
    return rest | saved, {name: f"{'model' if name in rest else source}.{name}" for name in rest | saved}


def compare(live: dict[str, Tensor], saved: Saved, same_dtype: bool) -> list[str]:
    """Differences in name, shape and dtype that this rank can see.

    DCP ignores saved tensors that the run lacks, and casts dtypes silently. Neither is accepted here.
    """
    problems = [f"the checkpoint lacks {name}" for name in live if name not in saved]
    for name in sorted(live.keys() & saved.keys()):
        tensor, entry = live[name], saved[name]
        if entry.size != tensor.size():
            problems.append(
                f"{name} has shape {list(entry.size)} in the checkpoint and {list(tensor.size())} in the run"
            )
        elif same_dtype and entry.properties.dtype != tensor.dtype:
            problems.append(f"{name} has type {entry.properties.dtype} in the checkpoint and {tensor.dtype} in the run")
    return problems


def read_tensors(
    folder: Path, metadata: Metadata, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None
) -> None:
    """Fill `tensors`, by the names in the checkpoint, from a verified folder. Collective over `group`.

    InvalidCheckpoint, on all ranks: the content of a file is not what the index says; some tensors may be filled.
    """
    with plain_errors(f"reading {folder}", InvalidCheckpoint):
        dcp.load(
            tensors,
            storage_reader=TensorReader(folder, metadata),
            planner=TensorLoadPlanner(flatten_state_dict=False),
            process_group=group,
            no_dist=not dist.is_initialized() or dist.get_world_size(group) == 1,  # see utils.gather_objects
        )


class Ranks:
    """The ranks that save and load together: those of a process group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1

    def gather(self, value: Any) -> list[Any]:
        return [value] if self.world == 1 else gather_objects(value, self.group)

    def call(self, action: str, function: Callable[[], Any]) -> list[Any]:
        """Call `function` on every rank and return all results. If it fails on one, `files.failure` is raised on all,
        so that no rank waits for another.
        """
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = files.failure(action, self.rank, caught)
        results = self.gather((value, error))
        for error in (error for _, error in results if error):
            raise error
        return [value for value, _ in results]

    def verify(self, folder: Path) -> tuple[int, Metadata]:
        """`files.verify`, its hashing shared by the ranks. InvalidCheckpoint is raised on all ranks or on none."""
        problem = result = None
        try:
            result = files.verify(folder, self.rank, self.world)
        except InvalidCheckpoint as error:
            problem = str(error)
        problems = [text for text in self.gather(problem) if text]
        if problems:
            raise InvalidCheckpoint(problems[0])
        assert result is not None
        return result

    def check_same(self, folder: Path, prefix: str, live: dict[str, Tensor], saved: Saved, same_dtype: bool) -> None:
        """ValueError, on all ranks, unless the tensors that the ranks hold together are those of the checkpoint. Under
        pipeline parallel each rank holds a part of them.
        """
        # A byte per saved name says whether this rank holds it. Names would make a large message: there are thousands,
        # from hundreds of ranks.
        held = bytes(name in live for name in saved)
        answers = self.gather((compare(live, saved, same_dtype), held))
        problems = dict.fromkeys(text for texts, _ in answers for text in texts)
        for name, *flags in zip(saved, *(flags for _, flags in answers), strict=True):
            if not any(flags):
                problems[f"the run lacks {name}"] = None
        if problems:
            more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise ValueError(
                f"{folder}: its `{prefix}` tensors are not those of this run: {'; '.join(list(problems)[:3])}{more}. "
                "Use the configuration that wrote it, or start in another job.dump_folder."
            )
