"""Multi-rank tests on CPU: real gloo ranks from a fork server that has torch imported already (about 0.1 s a test)."""

import datetime
import multiprocessing
import os
import pickle
import queue
import signal
import socket
import subprocess
import tempfile
import time
import traceback
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PRELOAD = [
    "torch",
    "torch._dynamo",
    "torch._dynamo.backends.debugging",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "torch.distributed.checkpoint",
    "torch.distributed.checkpoint.state_dict",
    "torch.utils.tensorboard",
    "safetensors.torch",
    "pytest",
    "av",
    "train",
    "tests.helpers",
]
_context = None


def context():
    """The fork server, started once. It must not use threads of its own: OpenMP does not survive a fork."""
    global _context
    if _context is None:
        os.environ["OMP_NUM_THREADS"] = "1"
        _context = multiprocessing.get_context("forkserver")
        _context.set_forkserver_preload(PRELOAD)
    return _context


def _rank_main(fn, rank, world, store, results, init, env, timeout, args, kwargs):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(env)
    try:
        if init:
            dist.init_process_group(
                "gloo",
                rank=rank,
                world_size=world,
                store=dist.FileStore(store, world),
                timeout=datetime.timedelta(seconds=timeout),
            )
        value = fn(*args, **kwargs)
        if init:
            dist.barrier()
            dist.destroy_process_group()
        # As bytes: a queue would send a tensor as a handle to memory that goes with this process.
        results.put((rank, None, pickle.dumps(value)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
        results.close()
        results.join_thread()
        os._exit(1)


def start_ranks(fn, world, *args, init=True, env=None, group_timeout=60, **kwargs):
    """Start `fn(*args, **kwargs)` on `world` gloo ranks and return (processes, result queue) at once.

    group_timeout: seconds of a collective.
    """
    ctx = context()
    results = ctx.Queue()
    folder = tempfile.mkdtemp(prefix="titan_video_ranks_")
    processes = []
    for rank in range(world):
        rank_env = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), **(env or {})}
        processes.append(
            ctx.Process(
                target=_rank_main,
                args=(fn, rank, world, f"{folder}/store", results, init, rank_env, group_timeout, args, kwargs),
                daemon=False,
            )
        )
    for p in processes:
        p.start()
    return processes, results


def run_ranks(fn, world, *args, timeout=120, init=True, env=None, **kwargs):
    """Run `fn` (a module-level function) on `world` gloo ranks; return its results by rank, or raise with the failing
    ranks' tracebacks.
    """
    processes, results = start_ranks(
        fn, world, *args, init=init, env=env, group_timeout=timeout, **kwargs
    )  # ranks may compile at their own pace
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
                values[rank] = pickle.loads(value)
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


def whole_tensors(tensors):
    """{name: tensor} with every DTensor whole. All ranks call it: they send all their shards at once.

    `full_tensor()` needs a collective for each tensor, which is most of the time of a small model's test. As there, a
    rank takes its own shard from itself, not from a replica. Shards travel as bytes, since torch pickles each tensor as
    a file of its own.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    from titan_video.distributed.utils import gather_objects

    if not torch.distributed.is_initialized():
        return dict(tensors)
    full, mine = dict(tensors), {}
    for name, t in tensors.items():
        if isinstance(t, DTensor):
            assert not any(p.is_partial() for p in t.placements), name
            offset = compute_local_shape_and_global_offset(t.shape, t.device_mesh, t.placements)[1]
            shard = t.to_local().detach()
            mine[name] = offset, shard.shape, shard.reshape(-1).view(torch.uint8).numpy().tobytes()
            full[name] = torch.zeros(t.shape, dtype=t.dtype)
    for shards in (*gather_objects(mine), mine):
        for name in shards.keys() & mine.keys():
            offset, shape, data = shards[name]
            place = full[name][tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]
            if data:
                place.copy_(torch.frombuffer(bytearray(data), dtype=place.dtype).view(shape))
    return full


# ---- programs ----

_started = []


def start_program(words, **options):
    """A Popen in a session of its own. What still runs of it when its test is over is killed (`end_programs`)."""
    p = subprocess.Popen(words, start_new_session=True, **options)
    _started.append(p)
    return p


def end_programs():
    """Kill what a test has left running, as one does that has failed."""
    while _started:
        p = _started.pop()
        if isinstance(p, Program):
            p.kill()
        elif p.poll() is None:
            kill_with_children(p.pid)
            p.wait()


def kill_with_children(pid):
    """Also those that are sessions of their own. All are halted first, lest one starts another meanwhile."""
    found = []
    while (now := [pid, *children(pid)]) != found:
        found = now
        _send(signal.SIGSTOP, found)
    _send(signal.SIGKILL, found)


def _send(signum, pids):
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def children(*pids):
    """All processes below these."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, above = [], list(pids)
    while above:
        below = parents.get(above.pop(), [])
        found += below
        above += below
    return found


def _program(argv, log, env, hook):
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(env)
    # A child of a fork server would start its data workers from another one, and these outlive a kill. Back to this
    # Python's default.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    import torch

    import train

    torch.set_num_threads(1)
    if hook:
        hook()
    train.main(argv)


class Program:
    """`train.py ARGV` on `world` ranks with their output in log0, log1, ...: as torchrun starts it, but from the fork
    server.

    hook: called on every rank before the program starts, to make something happen in it (`signal_at`).
    """

    def __init__(self, argv, folder, world=1, hook=None):
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared["TORCHELASTIC_RUN_ID"] = "test"
        envs = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]
        self.logs = [f"{folder}/log{rank}" for rank in range(world)]
        for log in self.logs:
            Path(log).unlink(missing_ok=True)
        self.ranks = [
            context().Process(target=_program, args=(argv, log, env, hook))
            for log, env in zip(self.logs, envs, strict=True)
        ]
        for p in self.ranks:
            p.start()
        _started.append(self)

    def kill(self):
        for p in self.ranks:
            p.kill()

    def wait(self, timeout=200):
        """The exit code: 0, or that of the first rank seen to fail; the others are then killed, as torchrun does."""
        deadline, code = time.monotonic() + timeout, None
        try:
            while code is None:
                codes = [p.exitcode for p in self.ranks]
                failed = [c for c in codes if c]
                if failed:
                    code = failed[0]
                elif all(c == 0 for c in codes):
                    code = 0
                assert code is not None or time.monotonic() < deadline, (
                    f"not done after {timeout} s:\n{Path(self.logs[0]).read_text()}"
                )
                time.sleep(0.005)
        finally:
            self.kill()
            for p in self.ranks:
                p.join()
        return code


def signal_at(step, signum, rank=0):
    """A hook: `rank` receives `signum` in the middle of optimizer step `step`."""
    import train

    run_step = train.Trainer.train_step

    def train_step(self, *args):
        if self.step == step and self.rank == rank:
            os.kill(os.getpid(), signum)
        run_step(self, *args)

    train.Trainer.train_step = train_step


def kill_in_save(step):
    """A hook: rank 0 is killed when the files of checkpoint `step` are written, but not committed."""
    from titan_video.checkpoint.manager import CheckpointManager

    commit = CheckpointManager._commit

    def _commit(self, now, *args):
        if now == step:
            os.kill(os.getpid(), signal.SIGKILL)
        commit(self, now, *args)

    CheckpointManager._commit = _commit


def diffusers_wan(args):
    """The oracle: diffusers' class of the same architecture, with random weights that leave nothing at zero."""
    import torch
    from diffusers import WanTransformer3DModel

    from titan_video.models.wan import args_to_hf

    torch.manual_seed(0)
    config = {k: v for k, v in args_to_hf(args).items() if not k.startswith("_")}
    model = WanTransformer3DModel(**config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(
                1 + 0.1 * torch.randn_like(p)
                if "norm" in name and name.endswith("weight")
                else torch.randn_like(p) * (0.5 * p[0].numel() ** -0.5)
            )
    return model


def build_denoising(spec, args, shard=None, seed=0, guidance_scale=1.0, device="cpu"):
    """The denoising task of a model's arguments; shard None: this process has all tokens."""
    import torch

    from titan_video.config.job_config import Flow
    from titan_video.distributed.sequence import whole_sequence
    from titan_video.flow.matching import FlowMatching
    from titan_video.tasks.denoising import Denoising

    shard = shard or whole_sequence()
    return Denoising(spec, args, FlowMatching(Flow()), shard, torch.device(device), seed, guidance_scale)


def randomized_init(init_parameter):
    """`init_parameter` with small random numbers added everywhere, adapters drawn at random.

    The public initialisations have a head of zeros, and adapters begin as zeros: no gradient would pass through these.
    """
    import torch

    from titan_video.models.layers import is_adapter

    def init(name, tensor, generator):
        if is_adapter(name):
            tensor.normal_(0, 0.1, generator=generator)
        else:
            init_parameter(name, tensor, generator)
            tensor.add_(torch.empty_like(tensor).normal_(0, 0.05, generator=generator))

    return init


def _public_names(names, spec):
    from titan_video.weights.formats import public_names

    return public_names(spec.hf_names, list(names))


def hf_state_dict(tensors, spec, args):
    """Whole tensors by our names -> by public names and forms."""
    table = _public_names(tensors, spec)
    return {
        public: (rule.to_public(tensors[ours], args) if rule.to_public else tensors[ours])
        for ours, (public, rule) in table.items()
    }


def load_from_hf_state_dict(model, spec, args, state):
    import torch

    table = _public_names(dict(model.named_parameters()), spec)
    assert {public for public, _ in table.values()} == set(state)
    with torch.no_grad():
        for ours, p in model.named_parameters():
            public, rule = table[ours]
            p.copy_(rule.to_ours(state[public], args) if rule.to_ours else state[public])
