"""Multi-rank tests on CPU: real gloo ranks from a fork server that has torch imported already (about 0.1 s a test)."""

import datetime
import multiprocessing
import os
import queue
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = ["torch", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.checkpoint.state_dict",
           "torch.utils.tensorboard", "safetensors.torch", "av", "train", "tests.helpers"]
_context = None


def context():
    """The fork server, started once. It must not use threads of its own: OpenMP does not survive a fork."""
    global _context
    if _context is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
    return _context


def _rank_main(fn, rank, world, store, results, init, env, args, kwargs):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(env)
    try:
        if init:
            dist.init_process_group("gloo", rank=rank, world_size=world, store=dist.FileStore(store, world), timeout=datetime.timedelta(seconds=60))
        value = fn(*args, **kwargs)
        if init:
            dist.barrier()
            dist.destroy_process_group()
        results.put((rank, None, value))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        results.close()
        results.join_thread()
        os._exit(1)


def start_ranks(fn, world, *args, init=True, env=None, **kwargs):
    """Start `fn(*args, **kwargs)` on `world` gloo ranks and return (processes, result queue) at once."""
    ctx = context()
    results = ctx.Queue()
    folder = tempfile.mkdtemp(prefix="titan_video_ranks_")
    processes = []
    for rank in range(world):
        rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **(env or {})}
        processes.append(ctx.Process(target=_rank_main, args=(fn, rank, world, f"{folder}/store", results, init, rank_env, args, kwargs), daemon=False))
    for p in processes:
        p.start()
    return processes, results


def run_ranks(fn, world, *args, timeout=120, init=True, env=None, **kwargs):
    """Run `fn` (a module-level function) on `world` gloo ranks; return its results by rank, or raise with the failing ranks' tracebacks."""
    processes, results = start_ranks(fn, world, *args, init=init, env=env, **kwargs)
    values, errors, deadline = {}, {}, time.monotonic() + timeout
    try:
        while len(values) < world and not errors:
            try:
                rank, error, value = results.get(timeout=1)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in values]
                if dead:
                    errors[dead[0]] = f"exit code {processes[dead[0]].exitcode}"
                elif time.monotonic() > deadline:
                    errors[-1] = f"no result after {timeout} s"
                continue
            if error is None:
                values[rank] = value
            else:
                errors[rank] = error
    finally:
        for p in processes:
            p.join(0.05 if errors else 20)
            if p.is_alive():
                p.kill()
                p.join()
    if errors:
        raise AssertionError("\n".join(f"[rank {rank}]\n{text}" for rank, text in errors.items()))
    return [values[rank] for rank in range(world)]
