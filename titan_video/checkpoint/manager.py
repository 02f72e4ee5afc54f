"""Checkpoints: what a run needs to continue bit for bit. A folder is complete, or it is not loaded.

A save, in the background if `async_mode = "async"`:

    stage    copy this rank's shards to host memory (async only) and states to JSON text; then training continues
    write    DCP writes `step-N.partial`: one file of tensors per rank, and an index
    hash     each rank hashes the files that it wrote; rank 0 writes state.json and then manifest.json
    commit   rename to `step-N`; only then remove older checkpoints beyond `keep_latest_k`

A load takes the newest `step-N` that is valid: `files.verify` reads every byte before anything is loaded.

Tensors have the model's clean parameter names and are saved as chunks of the global tensor, so a checkpoint does not
depend on ranks, layouts, wrappers or compilation. Ranks may hold different tensors (pipeline parallel), different
shards or replicas. A save writes each chunk once. A load reads the chunks that overlap with this rank's shards.
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
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.stateful import Stateful

from titan_video.checkpoint import files
from titan_video.checkpoint.files import InvalidCheckpoint
from titan_video.checkpoint.state import (
    ModelState,
    OptimizerState,
    Ranks,
    TensorState,
    read_tensors,
    saved_under,
    saved_weights,
    to_exact_json,
)
from titan_video.checkpoint.triggers import SaveTriggers
from titan_video.config.job_config import Checkpoint, JobConfig
from titan_video.distributed.utils import to_local
from titan_video.tools.files import StorageError, atomic_write, sync, writing
from titan_video.tools.logging import logger

# Writing and hashing hundreds of gigabytes on a slow file system takes longer than a collective of a training step may.
_TIMEOUT = datetime.timedelta(hours=1)


def load_weights(
    folder: Path,
    model: nn.Module,
    source: str = "model",
    group: dist.ProcessGroup | None = None,
    which: Callable[[str], bool] | None = None,
) -> int:
    """Fill `model`, or only the parameters whose name `which` accepts, from a `step-N` folder; return its step.

    The folder is verified. Any run, in any layout and on any number of ranks, may have written it.

    source: "model", or "ema" for the EMA weights. Values are cast to the model's types.
    Collective over `group` (default: all ranks). ValueError: no such weights, or not those of the model.
    """
    if not folder.is_dir() or files.list_steps(folder):
        reason = f"it holds {_names(files.list_steps(folder))}" if folder.is_dir() else "there is no such folder"
        raise ValueError(f"{folder}: give a step-N folder of a checkpoint; {reason}")
    ranks = Ranks(group)
    step, metadata = ranks.verify(folder)
    (saved, full_names), live = saved_weights(metadata, source), ModelState(model, which).state_dict()
    if not saved:
        raise ValueError(f"{folder}: holds no `{source}` weights")
    ranks.check_same(folder, source, live, saved, same_dtype=False)
    read_tensors(folder, metadata, {full_names[name]: tensor for name, tensor in live.items()}, group)
    return step


class CheckpointManager:
    """Saves and loads the states of a run in `folder`. All ranks call every method.

    tensors: name -> state that is saved shard by shard ("model", "optimizer", "ema").
    states: name -> small state, equal on all ranks, exact as JSON (no tuples, no NaN). `is_optional`: may be missing.
    The manager makes a gloo group of its own: a save in the background does not mix with training's collectives.
    """

    def __init__(self, section: Checkpoint, folder: Path, tensors: dict[str, TensorState], states: dict[str, Stateful]):
        assert not any("." in name for name in tensors)
        self.section, self.folder = section, Path(folder)
        dump_folder = self.folder.parents[len(Path(section.folder).parts) - 1]
        self.triggers = SaveTriggers(dump_folder, section.interval_minutes)
        self.tensors, self.states = tensors, states
        group = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=_TIMEOUT, group_desc="checkpoint")
        self.ranks = Ranks(group)
        self.last_step = -1  # step of the checkpoint that was loaded or saved last
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: StorageError | RuntimeError | None = None

    # --- load ---

    def load(self) -> int:
        """Restore the newest valid checkpoint, or that of `load_step`, and return its step; 0 if there is none yet.

        ValueError: checkpoints exist but none is valid, or the one of `load_step` is not, or it does not fit this run.
        """
        if not self.section.enable:
            return 0
        steps, partial = self.ranks.call(
            "listing checkpoints", lambda: (files.list_steps(self.folder), files.list_partial(self.folder))
        )[0]
        wanted = self.section.load_step
        if wanted >= 0 and wanted not in steps:
            raise ValueError(
                f"checkpoint.load_step = {wanted}: {self.folder} has no step-{wanted}; it has {_names(steps)}."
            )
        if not steps:
            if partial:
                self._log(f"{self.folder} holds only {partial[0].name}, an unfinished save: starting from step 0")
            return 0
        if wanted < 0:
            return self._load_newest(steps, self.states)
        try:
            metadata = self._verify(wanted)
        except InvalidCheckpoint as error:
            valid = [n for n in steps if n != wanted and files.is_valid_fast(files.step_folder(self.folder, n))]
            raise ValueError(
                f"checkpoint.load_step = {wanted} is not valid: {error}. Other checkpoints, whose manifests and file "
                f"sizes are right: {_names(valid)}."
            ) from error
        self._restore(wanted, metadata, self.states)
        return wanted

    def roll_back(self) -> int:
        """Load the tensors, not the states, of this run's newest valid checkpoint, after a save under way; its step."""
        self.wait()
        steps = self.ranks.call("listing checkpoints", lambda: files.list_steps(self.folder))[0]
        return self._load_newest([n for n in steps if n <= self.last_step], {})  # newer: of an abandoned branch

    def _load_newest(self, steps: list[int], states: dict[str, Stateful]) -> int:
        problems = []
        for step in reversed(steps):
            try:
                self._restore(step, self._verify(step), states)
                return step
            except InvalidCheckpoint as error:
                problems.append(str(error))
                self._log(f"step-{step} is not valid and is skipped: {error}", logging.WARNING)
        raise ValueError(
            f"{self.folder} holds checkpoints, but none is valid; training does not restart from step 0 by itself:\n  "
            + "\n  ".join(problems)
            + "\nMove these folders away to start over, or give another job.dump_folder."
        )

    def _verify(self, step: int) -> Metadata:
        folder = files.step_folder(self.folder, step)
        written, metadata = self.ranks.verify(folder)
        if written != step:
            raise InvalidCheckpoint(f"{folder / files.MANIFEST}: written at step {written}; the folder was renamed")
        return metadata

    def _restore(self, step: int, metadata: Metadata, states: dict[str, Stateful]) -> None:
        folder = files.step_folder(self.folder, step)
        saved_states = files.read_counters(folder, step)
        states = {name: s for name, s in states.items() if name in saved_states or not getattr(s, "is_optional", False)}
        missing = [name for name in states if name not in saved_states]
        if missing:
            raise ValueError(f"{folder / files.STATE}: holds no state of `{missing[0]}`, which this run has")
        for name, owner in self.tensors.items():
            saved = saved_under(metadata, name)
            if isinstance(owner, OptimizerState):
                owner.allocate(saved)
                if step and (missing := [n for n, p in owner.params.items() if not owner.optimizer.state.get(p)]):
                    self._log(f"{folder} has no optimizer state of {len(missing)} tensors, as if new", logging.WARNING)
            self.ranks.check_same(folder, name, owner.state_dict(), saved, same_dtype=True)
        unused = sorted({name.partition(".")[0] for name in metadata.state_dict_metadata} - set(self.tensors))
        if unused:
            self._log(f"{folder} also holds {', '.join(unused)}, which this run does not use", logging.WARNING)
        read_tensors(folder, metadata, self._live_tensors(), self.ranks.group)
        for owner in (owner for owner in self.tensors.values() if isinstance(owner, OptimizerState)):
            owner.loaded()
        for name, owner in states.items():
            try:
                owner.load_state_dict(saved_states[name])
            except (TypeError, KeyError, AttributeError, OverflowError) as error:
                raise InvalidCheckpoint(f"{folder / files.STATE}: the state of `{name}` is none: {error!r}") from error
        self.last_step = step
        self._log(f"loaded {folder}")

    # --- save ---

    def save(self, step: int, last: bool = False, force: bool = False) -> bool:
        """Save after `step` steps if the interval, `last` or `force` says so; True if a save was made or started.

        First waits for the previous save. Its StorageError is raised, or with on_error = "continue" was a warning.
        Tensors may be changed as soon as this returns.
        """
        due = self.section.enable and (force or last or step % self.section.interval == 0)
        if not due or step == self.last_step:
            if due:
                self.triggers.saved()  # by the save of this step
            return False
        try:
            self.wait()
        except StorageError:
            if self.section.on_error == "stop":
                raise
        start, tensors = time.monotonic(), self._live_tensors()
        states = {name: to_exact_json(name, owner.state_dict()) for name, owner in self.states.items()}
        self.last_step = step
        if self.section.async_mode == "disabled":
            self._try_write(step, tensors, None, states, start)
            if self.section.on_error == "stop":
                self.wait()
            return self._error is None
        self._stage(tensors)
        # A daemon thread: a run that crashes must not wait until a collective of its unfinished save times out.
        arguments = step, tensors, self._staged, states, start
        name = f"checkpoint-{step}"
        self._thread = threading.Thread(target=self._write_beside, args=arguments, name=name, daemon=True)
        self._thread.start()
        return True

    def _write_beside(self, *arguments: Any) -> None:
        # One thread for the copies here: with an OpenMP team of their own, libgomp would count more threads than cores,
        # and put training's to sleep after each operator for the rest of the run: half the speed of a small model.
        torch.set_num_threads(1)
        self._try_write(*arguments)

    def _try_write(self, step: int, tensors: dict, staged: dict | None, states: dict[str, str], start: float) -> None:
        waited = "" if staged is None else f"; training waited {time.monotonic() - start:.1f} s"
        try:
            self._write(step, tensors, staged, states)
            self._log(f"saved step-{step} in {time.monotonic() - start:.1f} s{waited}")
            self.triggers.saved()
        except Exception as error:
            kind = StorageError if isinstance(error, StorageError) else RuntimeError
            self._error = kind(f"the checkpoint of step {step} could not be saved: {error}")
            self._error.__cause__ = error
            if self.ranks.rank == 0:  # all ranks have failed together, and none writes there any more
                shutil.rmtree(self.folder / f"step-{step}.partial", ignore_errors=True)
            self.triggers.failed()
            if kind is StorageError and self.section.on_error == "continue":
                self._log(f"{self._error}; training goes on, and the next save is tried", logging.WARNING)

    def wanted(self) -> bool:
        """Whether this rank asks all ranks for a save at the end of this step: they pass the answer as `force`."""
        return self.section.enable and self.ranks.rank == 0 and self.triggers.wanted()

    def wait(self) -> None:
        """Return when the save in the background is committed; raise the error of the last save if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            self.last_step = -1
            raise error

    def close(self) -> None:
        """Wait for the last save, and free the staging memory."""
        self.wait()
        self._staged = {}

    def _live_tensors(self) -> dict[str, Tensor]:
        live = {}
        for name, owner in self.tensors.items():
            live |= {f"{name}.{key}": value for key, value in owner.state_dict().items()}
        for name, value in live.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"{name} is a {type(value).__name__}: only tensors are saved here; other values belong in a state "
                    f"that is saved as JSON"
                )
        return live

    def _stage(self, tensors: dict[str, Tensor]) -> None:
        """Copy this rank's shards to host memory, which is reused by later saves because pinning it is slow."""
        cuda = False
        self._staged = {name: host for name, host in self._staged.items() if name in tensors}
        for name, tensor in tensors.items():
            shard = to_local(tensor).detach()
            host = self._staged.get(name)
            if host is None or host.shape != shard.shape or host.dtype != shard.dtype:
                host = self._staged[name] = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)
            host.copy_(shard, non_blocking=True)
            cuda |= shard.is_cuda
        if cuda:
            torch.cuda.current_stream().synchronize()

    def _write(
        self, step: int, tensors: dict[str, Tensor], staged: dict[str, Tensor] | None, states: dict[str, str]
    ) -> None:
        partial = self.folder / f"step-{step}.partial"
        action, rank = f"saving {partial}", self.ranks.rank
        keys = self.ranks.call(action, lambda: self._begin(partial, tensors))
        key = hashlib.sha256("".join(keys).encode()).hexdigest() if self.section.plan_caching else ""
        # DCP's copy-ahead is for tensors on a device. For staged ones it would only create a CUDA context on device 0
        # in this thread.
        options = {} if staged is None else {"per_thread_copy_ahead": 0}
        writer = files.TensorWriter(partial, **options)
        writer.size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        with files.plain_errors(action):
            dcp.save(
                tensors,
                storage_writer=writer,
                planner=files.TensorSavePlanner(staged, key),
                process_group=self.ranks.group,
                no_dist=self.ranks.world == 1,  # see utils.gather_objects
            )
        entries_by_rank = self.ranks.call(
            action, lambda: {path.name: files.manifest_entry(path) for path in partial.glob(f"__{rank}_*.distcp")}
        )
        digests = self.ranks.gather({name: hashlib.sha256(text.encode()).hexdigest() for name, text in states.items()})
        for name in states:
            if len({digest[name] for digest in digests}) > 1:
                raise RuntimeError(f"{action} failed: the state of `{name}` is not the same on all ranks")
        entries = {name: entry for entries in entries_by_rank for name, entry in entries.items()}
        self.ranks.call(action, lambda: self._commit(step, partial, entries, states) if rank == 0 else None)

    def _begin(self, partial: Path, tensors: dict[str, Tensor]) -> str:
        """Make the folder, on rank 0; the key of what this rank will write."""
        if self.ranks.rank == 0:
            with writing("checkpoint", partial):
                self.folder.mkdir(parents=True, exist_ok=True)
                for unfinished in files.list_partial(self.folder):
                    shutil.rmtree(unfinished)
                partial.mkdir()
        return files.layout_key(tensors)

    def _commit(self, step: int, partial: Path, entries: dict[str, dict[str, Any]], states: dict[str, str]) -> None:
        """On rank 0, when all tensor files are on disk: write state and manifest, rename, remove what is too old."""
        state = {"step": step, "counters": {name: json.loads(text) for name, text in states.items()}}
        atomic_write(partial / files.STATE, json.dumps(state, indent=1, sort_keys=True) + "\n", "checkpoint")
        entries = entries | {name: files.manifest_entry(partial / name) for name in (files.METADATA, files.STATE)}
        files.write_manifest(partial, step, self.ranks.world, entries)
        final = files.step_folder(self.folder, step)
        with writing("checkpoint", final):
            if final.exists():
                # It is invalid, or of an abandoned branch (load_step): this run stands on another, older checkpoint.
                files.remove(final)
            os.rename(partial, final)
            sync(self.folder)
        if self.section.keep_latest_k:
            self._remove_old(step)

    def _remove_old(self, step: int) -> None:
        # Newer steps belong to an abandoned branch. They do not count and are not removed.
        steps = [n for n in files.list_steps(self.folder) if n <= step]
        valid = [n for n in steps if files.is_valid_fast(files.step_folder(self.folder, n))]
        for old in valid[: -self.section.keep_latest_k]:
            try:
                files.remove(files.step_folder(self.folder, old))
            except OSError as error:
                logger.warning("could not remove the old checkpoint step-%d: %s", old, error)

    def _log(self, text: str, level: int = logging.INFO) -> None:
        if self.ranks.rank == 0:
            logger.log(level, text)


def _names(steps: list[int]) -> str:
    return ", ".join(f"step-{step}" for step in steps) or "none"


def rules(config: JobConfig, world_size: int) -> Iterator[str]:
    """Rules of the configuration about checkpoints, one line per mistake."""
    c = config.checkpoint
    if c.load_step >= 0 and not c.enable:
        yield (
            f"checkpoint.load_step: given {c.load_step}, but checkpoint.enable is false; enable it, or set load_step "
            f"to -1"
        )
