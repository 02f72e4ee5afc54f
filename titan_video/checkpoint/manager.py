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
    Saved,
    TensorState,
    compare,
    read_tensors,
    saved_under,
    to_exact_json,
)
from titan_video.config.job_config import Checkpoint, JobConfig
from titan_video.distributed.utils import gather_objects, to_local
from titan_video.tools.files import atomic_write, sync
from titan_video.tools.logging import logger

# Writing and hashing hundreds of gigabytes on a slow file system takes longer than a collective of a training step may.
_TIMEOUT = datetime.timedelta(hours=1)


class _Ranks:
    """The ranks that save and load together: those of a process group, or this process alone."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.rank = dist.get_rank(group) if dist.is_initialized() else 0
        self.world = dist.get_world_size(group) if dist.is_initialized() else 1

    def gather(self, value: Any) -> list[Any]:
        return [value] if self.world == 1 else gather_objects(value, self.group)

    def call(self, action: str, function: Callable[[], Any]) -> list[Any]:
        """Call `function` on every rank and return all results. If it fails on one, RuntimeError is raised on all, so
        that no rank waits for another.
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
    ranks = _Ranks(group)
    step, metadata = ranks.verify(folder)
    saved, live = saved_under(metadata, source), ModelState(model, which).state_dict()
    if not saved:
        raise ValueError(f"{folder}: holds no `{source}` weights")
    ranks.check_same(folder, source, live, saved, same_dtype=False)
    read_tensors(folder, metadata, {f"{source}.{name}": tensor for name, tensor in live.items()}, group)
    return step


class CheckpointManager:
    """Saves and loads the states of a run in `folder`. All ranks call every method.

    tensors: name -> state that is saved shard by shard ("model", "optimizer", "ema").
    states: name -> small state, equal on all ranks, that JSON represents exactly (no tuples, no NaN).
    The manager makes a gloo group of its own: a save in the background does not mix with training's collectives.
    """

    def __init__(self, section: Checkpoint, folder: Path, tensors: dict[str, TensorState], states: dict[str, Stateful]):
        assert not any("." in name for name in tensors)
        self.section, self.folder = section, Path(folder)
        self.tensors, self.states = tensors, states
        group = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=_TIMEOUT, group_desc="checkpoint")
        self.ranks = _Ranks(group)
        self.last_step = -1  # step of the checkpoint that was loaded or saved last
        self._staged: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

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
        problems = []
        for step in [wanted] if wanted >= 0 else reversed(steps):
            try:
                metadata = self._verify(step)
            except InvalidCheckpoint as error:
                problems.append(str(error))
                self._log(f"step-{step} is not valid and is skipped: {error}", logging.WARNING)
                continue
            self._restore(step, metadata)
            return step
        if wanted >= 0:
            valid = [n for n in steps if n != wanted and files.is_valid_fast(files.step_folder(self.folder, n))]
            raise ValueError(
                f"checkpoint.load_step = {wanted} is not valid: {problems[0]}. Other checkpoints, whose manifests and "
                f"file sizes are right: {_names(valid)}."
            )
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

    def _restore(self, step: int, metadata: Metadata) -> None:
        folder = files.step_folder(self.folder, step)
        saved_states = files.read_state(folder)
        missing = [name for name in self.states if name not in saved_states]
        if missing:
            raise ValueError(f"{folder / files.STATE}: holds no state of `{missing[0]}`, which this run has")
        for name, owner in self.tensors.items():
            saved = saved_under(metadata, name)
            if isinstance(owner, OptimizerState):
                owner.allocate(saved)
            self.ranks.check_same(folder, name, owner.state_dict(), saved, same_dtype=True)
        unused = sorted({name.partition(".")[0] for name in metadata.state_dict_metadata} - set(self.tensors))
        if unused:
            self._log(f"{folder} also holds {', '.join(unused)}, which this run does not use", logging.WARNING)
        read_tensors(folder, metadata, self._live_tensors(), self.ranks.group)
        for name, owner in self.states.items():
            try:
                owner.load_state_dict(saved_states[name])
            except (TypeError, LookupError, AttributeError) as error:
                raise ValueError(f"{folder / files.STATE}: what it holds of `{name}` is no state of it") from error
        self.last_step = step
        self._log(f"loaded {folder}")

    # --- save ---

    def save(self, step: int, last: bool = False, force: bool = False) -> bool:
        """Save after `step` steps if the interval, `last` or `force` says so; True if a save was made or started.

        First waits for the previous save, and raises its error. Tensors may be changed as soon as this returns.
        """
        due = self.section.enable and (force or last or step % self.section.interval == 0)
        if not due or step == self.last_step:
            return False
        self.wait()
        start, tensors = time.monotonic(), self._live_tensors()
        states = {name: to_exact_json(name, owner.state_dict()) for name, owner in self.states.items()}
        if self.section.async_mode == "disabled":
            self._write(step, tensors, None, states)
            self.last_step = step
            self._log(f"saved step-{step} in {time.monotonic() - start:.1f} s")
            return True
        self._stage(tensors)
        blocked = time.monotonic() - start

        def background() -> None:
            try:
                self._write(step, tensors, self._staged, states)
                self._log(f"saved step-{step} in {time.monotonic() - start:.1f} s; training waited {blocked:.1f} s")
            except BaseException as error:
                self._error = error

        self.last_step = step
        # A daemon thread: a run that crashes must not wait until a collective of its unfinished save times out.
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
        self.ranks.call(action, lambda: self._make_partial(partial) if rank == 0 else None)
        # DCP's copy-ahead is for tensors on a device. For staged ones it would only create a CUDA context on device 0
        # in this thread.
        options = {} if staged is None else {"per_thread_copy_ahead": 0}
        with files.plain_errors(action):
            dcp.save(
                tensors,
                storage_writer=files.TensorWriter(partial, **options),
                planner=files.TensorSavePlanner(staged),
                process_group=self.ranks.group,
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

    def _make_partial(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for unfinished in files.list_partial(self.folder):
            shutil.rmtree(unfinished)
        partial.mkdir()

    def _commit(self, step: int, partial: Path, entries: dict[str, dict[str, Any]], states: dict[str, str]) -> None:
        """On rank 0, when all tensor files are on disk: write state and manifest, rename, remove what is too old."""
        state = {"step": step, "counters": {name: json.loads(text) for name, text in states.items()}}
        atomic_write(partial / files.STATE, json.dumps(state, indent=1, sort_keys=True) + "\n")
        entries = entries | {name: files.manifest_entry(partial / name) for name in (files.METADATA, files.STATE)}
        files.write_manifest(partial, step, self.ranks.world, entries)
        final = files.step_folder(self.folder, step)
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
