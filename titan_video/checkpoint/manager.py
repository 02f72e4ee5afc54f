"""Checkpoints: what a run needs to continue bit for bit, in folders that are whole or are not loaded.

A save, in the background if `async_mode = "async"`:

    stage      copy this rank's shards to host memory (async only), counters to JSON text       training goes on from here
    write      DCP writes `step-N.partial`: one file of tensors per rank and an index
    hash       every rank hashes the files it wrote; rank 0 writes state.json, then manifest.json with every size and SHA-256
    commit     rename to `step-N`; then, and only then, older checkpoints beyond `keep_latest_k` are removed

A load takes the newest `step-N` whose manifest and content agree, reading every byte first (`checkpoint_io.verify`).
Tensors are named by the model's clean parameter names and saved in pieces of the whole tensor, so a checkpoint knows
nothing of ranks, layouts, wrappers or compilation. Ranks may hold different tensors (pipeline parallel), different
pieces, or the same ones: what is saved is
ones: what is saved is all that they hold, each piece once, and a rank that loads reads those pieces that overlap with
    its own.
"""

import datetime
import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor

from titan_video.checkpoint import files
from titan_video.checkpoint.files import InvalidCheckpoint
from titan_video.config.job_config import Checkpoint, JobConfig
from titan_video.distributed.utils import clean_name, zeros_like_sharded
from titan_video.optim.optimizer import SLOTS
from titan_video.tools.logging import logger

# Saving and hashing hundreds of gigabytes on a slow file system outlasts the time a collective of a training step is
# given.
_TIMEOUT = datetime.timedelta(hours=1)


# --- what is saved ---


class TensorState(Protocol):
    """Tensors under flat, stable names. `state_dict` returns the live tensors themselves:

    a save reads them, a load writes into them.
    """

    def state_dict(self) -> dict[str, Tensor]: ...


class Stateful(Protocol):
    """A small state that JSON carries exactly (no tuples, no NaN), equal on all ranks."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class ModelState:
    """Parameters and persistent buffers of a module, or those of which `which` says so by name."""

    def __init__(self, model: nn.Module, which: Callable[[str], bool] | None = None) -> None:
        self.model, self.which = model, which

    def state_dict(self) -> dict[str, Tensor]:
        state = get_model_state_dict(self.model)
        return state if self.which is None else {name: tensor for name, tensor in state.items() if self.which(name)}


class OptimizerState:
    """Moments and step counts, named `parameter.slot`. Learning rate, betas and the like come from the TOML and the
    scheduler.

    Build it once the optimizer has its parameters and before the first forward: FSDP may put gathered parameters in
        place of the shards later.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        # torch's get_optimizer_state_dict would take a dummy step where there is no state yet, and leave the step
        # counts at 1.
        self.param_group = {param: group for group in optimizer.param_groups for param in group["params"]}
        self.params = {clean_name(name): param for name, param in model.named_parameters() if param in self.param_group}
        assert len(self.params) == len(self.param_group), "the optimizer holds parameters that are not the model's"

    def state_dict(self) -> dict[str, Tensor]:
        return {
            f"{name}.{slot}": value
            for name, param in self.params.items()
            for slot, value in self.optimizer.state.get(param, {}).items()
        }

    def allocate(self, saved: dict[str, TensorStorageMetadata]) -> None:
        """Give the optimizer exactly the slots of `saved`, to be loaded into. A fresh optimizer has none before its
        first step.

        ValueError where these are not what this optimizer keeps.
        """
        self.optimizer.state.clear()
        for key, entry in saved.items():
            name, _, slot = key.rpartition(".")
            param = self.params.get(name)
            if param is None:
                continue  # another pipeline stage's, or reported by name when the checkpoint is compared with the run
            if slot == "step":
                # torch keeps the count beside the weights for the fused step, on the host otherwise.
                group = self.param_group[param]
                device = param.device if group.get("fused") or group.get("capturable") else "cpu"
                value = torch.zeros((), dtype=entry.properties.dtype, device=device)
            else:
                value = zeros_like_sharded(param, entry.size[-1], entry.properties.dtype)
            self.optimizer.state[param][slot] = value
        for name, param in self.params.items():
            slots, kept = set(self.optimizer.state.get(param, ())), SLOTS[self.param_group[param].get("kind", "AdamW")]
            if slots and slots != set(kept):
                raise ValueError(
                    f"the checkpoint has {', '.join(sorted(slots))} of {name}, and optimizer.name of this run "
                    f"keeps {', '.join(kept)}: "
                    "go on with the optimizer that wrote it, or start another run from its weights by "
                    "checkpoint.initial_load_path"
                )


# --- the ranks ---


class _Ranks:
    """The ranks that save and load together: those of a process group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1

    def gather(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, action: str, function: Callable[[], Any]) -> list[Any]:
        """Call `function` on every rank and return all results; if it fails anywhere, fail everywhere, so that no rank
        waits for another.
        """
        value, error = None, None
        try:
            value = function()
        except Exception as caught:
            error = caught
        results = self.gather((value, f"{type(error).__name__}: {error}" if error else None))
        for rank, (_, text) in enumerate(results):
            if text:
                raise RuntimeError(f"{action} failed on rank {rank}: {text}") from error
        return [value for value, _ in results]

    def verify(self, folder: Path) -> tuple[int, Metadata]:
        """`checkpoint_io.verify` with the reading shared, and one verdict."""
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


# --- loading tensors ---


def _saved_under(metadata: Metadata, prefix: str) -> dict[str, TensorStorageMetadata]:
    return {
        name[len(prefix) + 1 :]: entry
        for name, entry in metadata.state_dict_metadata.items()
        if name.startswith(f"{prefix}.")
    }


def _compare(
    ranks: _Ranks,
    folder: Path,
    prefix: str,
    live: dict[str, Tensor],
    saved: dict[str, TensorStorageMetadata],
    same_dtype: bool,
) -> None:
    """Raise, on all ranks, unless the tensors that the ranks hold between them are those of the checkpoint in name,
    shape and type.

    Under pipeline parallel each rank holds a part. DCP ignores tensors that the run lacks and casts types in silence.
    We do not.
    """
    mine = [f"the checkpoint lacks {name}" for name in live if name not in saved]
    for name in sorted(live.keys() & saved.keys()):
        if saved[name].size != live[name].size():
            mine.append(
                f"{name} has shape {list(saved[name].size)} in the checkpoint and {list(live[name].size())} in the run"
            )
        elif same_dtype and saved[name].properties.dtype != live[name].dtype:
            mine.append(
                f"{name} has type {saved[name].properties.dtype} in the checkpoint and {live[name].dtype} in the run"
            )
    # A byte for each saved name says whether this rank holds it: the names of a large model, from hundreds of ranks,
    # would be a large message.
    answers = ranks.gather((mine, bytes(name in live for name in saved)))
    problems = dict.fromkeys(text for texts, _ in answers for text in texts)
    problems.update(
        (f"the run lacks {name}", None)
        for name, *held in zip(saved, *(held for _, held in answers), strict=True)
        if not any(held)
    )
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{folder}: its `{prefix}` tensors are not those of this run: {'; '.join(list(problems)[:3])}{more}. "
            "Use the configuration that wrote it, or start in another job.dump_folder."
        )


def _read_tensors(
    folder: Path, metadata: Metadata, tensors: dict[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    reader, planner = files.TensorReader(folder, metadata), files.TensorLoadPlanner(flatten_state_dict=False)
    with files.plain_errors(f"reading {folder}"):
        dcp.load(tensors, storage_reader=reader, planner=planner, process_group=group)


def load_weights(
    folder: Path,
    model: nn.Module,
    source: str = "model",
    group: dist.ProcessGroup | None = None,
    which: Callable[[str], bool] | None = None,
) -> int:
    """Fill `model`, or those of its parameters of which `which` says so by name, from a verified `step-N` folder,
    whatever run, layout or number of ranks wrote it; return its step.

    `source` is "model", or "ema" for the averaged weights. Values are cast to the model's types.
    All ranks of `group` (default: all there are) call it.
    """
    if not folder.is_dir() or files.list_steps(folder):
        names = ", ".join(f"step-{step}" for step in files.list_steps(folder))
        raise ValueError(
            f"{folder}: give a step-N folder of a checkpoint"
            + (f"; it holds {names}" if names else "; there is no such folder")
        )
    ranks = _Ranks(group)
    step, metadata = ranks.verify(folder)
    saved, live = _saved_under(metadata, source), ModelState(model, which).state_dict()
    if not saved:
        raise ValueError(f"{folder}: holds no `{source}` weights")
    _compare(ranks, folder, source, live, saved, same_dtype=False)
    _read_tensors(folder, metadata, {f"{source}.{name}": tensor for name, tensor in live.items()}, group)
    return step


# --- the manager ---


class CheckpointManager:
    """Saves and loads the states of a run in `folder`. Every method is called by all ranks.

    `tensors` are saved shard by shard ("model", "optimizer", "ema"); `counters` as JSON. The current process group, if
    the manager makes a gloo group of its own, so that a save in the background does not meet the collectives of
    training.
    """

    def __init__(
        self, section: Checkpoint, folder: Path, tensors: dict[str, TensorState], counters: dict[str, Stateful]
    ) -> None:
        assert not any("." in name for name in tensors)
        self.section, self.folder = section, Path(folder)
        self.tensors, self.counters = tensors, counters
        self.ranks = _Ranks(
            dist.new_group(backend="gloo", timeout=_TIMEOUT, group_desc="checkpoint") if dist.is_initialized() else None
        )
        self.last_step = -1  # the step on disk that this run stands on
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    # --- load ---

    def load(self) -> int:
        """Restore the newest valid checkpoint, or that of `load_step`, and return its step; 0 if there is none yet.

        Raises `ValueError` if checkpoints exist but none is valid, or if the one asked for is not, or does not fit this
        run.
        """
        if not self.section.enable:
            return 0
        steps, leftovers = self.ranks.agree(
            "listing checkpoints", lambda: (files.list_steps(self.folder), files.list_leftovers(self.folder))
        )[0]
        wanted = self.section.load_step
        if wanted >= 0 and wanted not in steps:
            raise ValueError(
                f"checkpoint.load_step = {wanted}: {self.folder} has no step-{wanted}; it has {_names(steps)}."
            )
        if not steps:
            if leftovers:
                self._log(
                    f"{self.folder} holds only {leftovers[0].name}, of a save that was cut short: starting from step 0"
                )
            return 0
        problems = []
        for step in [wanted] if wanted >= 0 else reversed(steps):
            folder = files.step_folder(self.folder, step)
            try:
                written, metadata = self.ranks.verify(folder)
                if written != step:
                    raise InvalidCheckpoint(
                        f"{folder / files.MANIFEST}: written at step {written}; the folder was renamed"
                    )
            except InvalidCheckpoint as error:
                problems.append(str(error))
                self._log(f"step-{step} is not valid and is passed over: {error}", logging.WARNING)
                continue
            self._restore(folder, metadata)
            self.last_step = step
            self._log(f"loaded {folder}")
            return step
        if wanted >= 0:
            others = [
                step for step in steps if step != wanted and files.is_valid_fast(files.step_folder(self.folder, step))
            ]
            raise ValueError(
                f"checkpoint.load_step = {wanted} is not valid: {problems[0]}. With whole manifests: {_names(others)}."
            )
        raise ValueError(
            f"{self.folder} holds checkpoints, but none is valid; training does not restart from step 0 unasked:\n  "
            + "\n  ".join(problems)
            + "\nMove these folders away to start over, or give another job.dump_folder."
        )

    def _restore(self, folder: Path, metadata: Metadata) -> None:
        state = json.loads((folder / files.STATE).read_text(encoding="utf-8"))
        missing = [name for name in self.counters if name not in state["counters"]]
        if missing:
            raise ValueError(f"{folder / files.STATE}: holds no state of `{missing[0]}`, which this run has")
        for name, owner in self.tensors.items():
            saved = _saved_under(metadata, name)
            if isinstance(owner, OptimizerState):
                owner.allocate(saved)
            _compare(self.ranks, folder, name, owner.state_dict(), saved, same_dtype=True)
        unused = sorted({name.partition(".")[0] for name in metadata.state_dict_metadata} - set(self.tensors))
        if unused:
            self._log(f"{folder} also holds {', '.join(unused)}, which this run does not use", logging.WARNING)
        _read_tensors(folder, metadata, self._live_tensors(), self.ranks.group)
        for name, owner in self.counters.items():
            owner.load_state_dict(state["counters"][name])

    # --- save ---

    def save(self, step: int, last: bool = False, force: bool = False) -> bool:
        """Save after `step` steps if the interval, `last` or `force` says so; True if a save was made or begun.

        Waits for the save before it and raises that one's error. Tensors may be changed as soon as this returns.
        """
        due = self.section.enable and (force or last or step % self.section.interval == 0)
        if not due or step == self.last_step:
            return False
        self.wait()
        start, tensors = time.monotonic(), self._live_tensors()
        counters = {name: _exact_json(name, owner.state_dict()) for name, owner in self.counters.items()}
        if self.section.async_mode == "disabled":
            self._write(step, tensors, None, counters)
            self.last_step = step
            self._log(f"saved step-{step} in {time.monotonic() - start:.1f} s")
            return True
        self._stage(tensors)
        blocked = time.monotonic() - start

        def background() -> None:
            try:
                self._write(step, tensors, self._staged, counters)
                self._log(
                    f"saved step-{step} in {time.monotonic() - start:.1f} s, {blocked:.1f} s of them before "
                    f"training went on"
                )
            except BaseException as error:
                self._error = error

        self.last_step = step
        # A daemon: a run that dies must not linger until a collective of its unfinished save times out.
        self._thread = threading.Thread(target=background, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()
        return True

    def wait(self) -> None:
        """Return when the save in the background is committed; raise its error if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            step, self.last_step = self.last_step, -1
            raise RuntimeError(f"the checkpoint of step {step} could not be saved: {error}") from error

    def close(self) -> None:
        """Wait for the last save, and give the staging memory back."""
        self.wait()
        self._staged = {}

    def _live_tensors(self) -> dict[str, Tensor]:
        live = {
            f"{name}.{key}": value for name, owner in self.tensors.items() for key, value in owner.state_dict().items()
        }
        for name, value in live.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} is a {type(value).__name__}: only tensors are saved here, other values belong to a "
                    f"counter state"
                )
        return live

    def _stage(self, tensors: dict[str, Tensor]) -> None:
        """Copy this rank's parts to host memory, kept from save to save because pinning it is slow."""
        cuda = False
        self._staged = {name: host for name, host in self._staged.items() if name in tensors}
        for name, tensor in tensors.items():
            local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
            host = self._staged.get(name)
            if host is None or host.shape != local.shape or host.dtype != local.dtype:
                host = self._staged[name] = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            host.copy_(local, non_blocking=True)
            cuda |= local.is_cuda
        if cuda:
            torch.cuda.current_stream().synchronize()

    def _write(
        self, step: int, tensors: dict[str, Tensor], staged: dict[str, Tensor] | None, counters: dict[str, str]
    ) -> None:
        partial = self.folder / f"step-{step}.partial"
        action, rank = f"saving {partial}", self.ranks.rank
        self.ranks.agree(action, lambda: self._clear(partial) if rank == 0 else None)
        # Copying ahead from the device is for live tensors; for staged ones it would only open a context on device 0 in
        # this thread.
        writer = files.TensorWriter(partial, **({} if staged is None else {"per_thread_copy_ahead": 0}))
        with files.plain_errors(action):
            dcp.save(
                tensors, storage_writer=writer, planner=files.TensorSavePlanner(staged), process_group=self.ranks.group
            )
        mine = self.ranks.agree(
            action, lambda: {path.name: files.describe(path) for path in partial.glob(f"__{rank}_*.distcp")}
        )
        digests = self.ranks.gather(
            {name: hashlib.sha256(text.encode()).hexdigest() for name, text in counters.items()}
        )
        for name in counters:
            if len({digest[name] for digest in digests}) > 1:
                raise RuntimeError(f"{action} failed: the state of `{name}` is not the same on all ranks")
        entries = {name: entry for part in mine for name, entry in part.items()}
        self.ranks.agree(action, lambda: self._commit(step, partial, entries, counters) if rank == 0 else None)

    def _clear(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in files.list_leftovers(self.folder):
            shutil.rmtree(leftover)
        partial.mkdir()

    def _commit(self, step: int, partial: Path, entries: dict[str, dict[str, Any]], counters: dict[str, str]) -> None:
        """Rank 0, all tensor files being on the disk: seal the folder, give it its name, remove what is too old."""
        state = {"step": step, "counters": {name: json.loads(text) for name, text in counters.items()}}
        files.write_text(partial / files.STATE, json.dumps(state, indent=1, sort_keys=True) + "\n")
        entries = {**entries, **{name: files.describe(partial / name) for name in (files.METADATA, files.STATE)}}
        files.write_manifest(partial, step, self.ranks.world, entries)
        files.fsync_path(partial)
        final = files.step_folder(self.folder, step)
        if final.exists():
            # An invalid one, or one of an abandoned branch (load_step): this run stands on another, older checkpoint.
            files.discard(final)
        os.rename(partial, final)
        files.fsync_path(self.folder)
        if self.section.keep_latest_k:
            # Newer steps are of an abandoned branch; they neither count nor are they ours to remove.
            valid = [
                n
                for n in files.list_steps(self.folder)
                if n <= step and files.is_valid_fast(files.step_folder(self.folder, n))
            ]
            for old in valid[: -self.section.keep_latest_k]:
                try:
                    files.discard(files.step_folder(self.folder, old))
                except OSError as error:
                    logger.warning("could not remove the old checkpoint step-%d: %s", old, error)

    def _log(self, text: str, level: int = logging.INFO) -> None:
        if self.ranks.rank == 0:
            logger.log(level, text)


def _names(steps: list[int]) -> str:
    return ", ".join(f"step-{step}" for step in steps) or "none"


def _exact_json(name: str, state: dict[str, Any]) -> str:
    try:
        text = json.dumps(state, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the state of `{name}` cannot be saved as JSON: {error}") from error
    if json.loads(text) != state:
        raise ValueError(
            f"the state of `{name}` would come back changed from JSON (a tuple, or a key that is not a string): {state}"
        )
    return text


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about checkpoints, one line per mistake."""
    c = config.checkpoint
    if c.load_step >= 0 and not c.enable:
        yield (
            f"checkpoint.load_step: given {c.load_step}, but checkpoint.enable is false; enable it, or set load_step "
            f"to -1"
        )
