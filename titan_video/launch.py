"""`torchrun` for train.py: checks the configuration first, passes stop requests on, and watches over the ranks.

    python -m titan_video.launch [options of torchrun] --no-python [COMMAND ...] PYTHON .../train.py [its arguments]

One process does all this, so torch is imported once.

Configuration: torchrun would bury a mistake under the reports of its ranks. Here it ends the program with status 1 and
the message alone, before torchrun starts.

Signals: torchrun ends its ranks at SIGTERM and dies of SIGUSR2, and some schedulers send these to every process of a
job. So all stop signals are blocked in this process before torchrun starts, and a thread waits for them. Ranks are
started with them blocked, too: what arrives while Python starts there is held back by the system until the rank can
take it. At the first signal the ranks get SIGUSR1, which asks them to save and end, however often they get it; at a
second one, or SIGQUIT, they are killed. SIGUSR1 to this process asks for the same and never counts as a second one.

Output: torchrun shows the local ranks that LOG_RANK names, each line labelled with the global rank. Warnings of the
other ones are shown too (WarningRelay).

Ranks: a rank whose heartbeat (supervision/watch.py) has stopped for longer than its limit is killed and named, and so
is one that was stopped before its first beat. The exit code is 0 if the run finished, 85 if it was stopped and is to be
continued, else 1.
"""

import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from titan_video.supervision import watch
from titan_video.tools.signals import DIRECT, FORWARDED, GRACE, STOPPED

STOP_SIGNALS = {FORWARDED, signal.SIGQUIT, *DIRECT}
START_SECONDS = 60.0  # how long a stop request waits for ranks that have not been started yet
STATUS_SECONDS = 60.0  # until other machines see a file that was written on one
AGENT_SECONDS = 5.0  # a rank is silent for so long before a failure's report names it
LABEL = "[${role_name}${rank}]:"  # of torchrun's lines; its own default has the local rank
WARNING = re.compile(r"^\d\d-\d\d \d\d:\d\d:\d\d (?=(WARNING|ERROR|CRITICAL) )")  # of tools/logging.py


def check_run(argv: list[str], world_size: int) -> tuple[Path, float]:
    """The folder of the run, and its comm.init_timeout_seconds. Ends the program with status 1 and a message if
    train.py would refuse these arguments on `world_size` ranks.
    """
    from titan_video.config.check import check
    from titan_video.config.manager import main_guard, parse_args
    from titan_video.distributed.parallel_dims import check_layout
    from titan_video.models import get_args, get_spec

    with main_guard():
        config = parse_args(argv)
        check(config, world_size)
        spec, text_length = get_spec(config.model.name), config.encoder.max_text_length
        args = get_args(spec, config.model.flavor, config.model.hf_assets_path, text_length)
        check_layout(config.parallelism, args, config.encoder.num_training_ranks(world_size))
    return Path(config.job.dump_folder), config.comm.init_timeout_seconds


def child_processes() -> dict[int, str]:
    """{process: state} of this process's children that are alive: the ranks of this machine."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z":
            found[int(path.parent.name)] = state
    return found


def send(signum: int, pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signum)
        except ProcessLookupError:
            pass


def say(line: str, to: int = 2) -> None:
    """Write a line to this file descriptor. Where the disk of the log is full, the launcher goes on without it."""
    with suppress(OSError):
        os.write(to, f"{line}\n".encode())


def end(code: int, message: str) -> None:
    """Ends this process and its ranks at once."""
    say(message)
    send(signal.SIGKILL, child_processes())
    os._exit(code)


class StopRelay:
    """A thread that waits for stop signals. `requested`: whether one has come."""

    def __init__(self):
        # nohup ignores SIGHUP, and it stays so. It is blocked all the same, as torchrun sets a handler of its own.
        self.ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
        self.requested = False
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        threading.Thread(target=self._wait, name="stop signals", daemon=True).start()

    def _wait(self) -> None:
        first = None  # when the first direct signal came
        while True:
            signum = signal.sigwait(STOP_SIGNALS)
            if signum in self.ignored:
                continue
            now = time.monotonic()
            is_second = first is not None and signum != FORWARDED and now - first >= GRACE
            if signum == signal.SIGQUIT or is_second:
                end(128 + signum, f"{signal.Signals(signum).name}: stopping at once")
            if signum != FORWARDED:
                first = first or now
            if not self.requested:
                self.requested = True
                threading.Thread(target=self._tell_ranks, name="tell ranks", daemon=True).start()

    def _tell_ranks(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not (ranks := child_processes()):
            if time.monotonic() > deadline:
                end(STOPPED, "stopped before the ranks were started; the same command starts the run")
            time.sleep(0.05)
        send(FORWARDED, ranks)
        time.sleep(0.5)
        send(FORWARDED, child_processes())  # those that torchrun was just starting


class WarningRelay:
    """Prints the warnings of this machine's ranks whose output is not shown, from the files that torchrun writes.

    A warning that another rank gave in the same words is not repeated.
    """

    def __init__(self, logs: Path, shown: set[str]):
        self.logs, self.shown, self.lock = logs, shown, threading.Lock()
        self.seen: set[str] = set()
        self.offsets: dict[Path, int] = {}  # bytes that have been read

    def pass_on(self) -> None:
        with self.lock:
            paths = sorted(self.logs.glob("*/attempt_*/*/stdout.log"), key=lambda path: int(path.parent.name))
            for path in sorted(
                paths, key=lambda path: path.parent.name not in self.shown
            ):  # those that are shown first
                for line in self._new_lines(path):
                    if (match := WARNING.match(line)) and (text := line[match.end() :]) not in self.seen:
                        self.seen.add(text)
                        if path.parent.name not in self.shown:
                            say(f"{_rank_label(path.parent)}{line}", to=1)

    def _new_lines(self, path: Path) -> list[str]:
        try:
            with path.open("rb") as file:
                file.seek(self.offsets.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self.offsets[path] = self.offsets.get(path, 0) + len(whole + newline)
        return whole.decode(errors="replace").splitlines()


def _rank_label(folder: Path) -> str:
    """As torchrun's; the global rank is in the heartbeat."""
    try:
        return f"[rank{json.loads((folder / watch.NAME).read_text(encoding='utf-8'))['rank']}]:"
    except (OSError, ValueError, KeyError):
        return f"[local rank {folder.name}]:"


def _local_rank(pid: int) -> str:
    """Of a process that torchrun has started; "?" if it does not say."""
    try:
        words = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return "?"
    return next((word.partition("=")[2] for word in words if word.startswith("LOCAL_RANK=")), "?")


class RankWatch:
    """A thread that reads the heartbeats of this machine's ranks, and ends the job when one is frozen. It also passes
    warnings on.

    start_limit: seconds after which one that was stopped before its first beat is frozen.
    """

    def __init__(self, logs: Path, shown: set[str], start_limit: float):
        self.logs, self.warnings, self.start_limit = logs, WarningRelay(logs, shown), start_limit
        self.stopped: dict[int, float] = {}  # {rank's process that is stopped: since when}
        self.suspects: dict[int, str] = {}  # {process: what was said of it}; torchrun may end it before its limit
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def silent(self, longer_than: float | None = None) -> list[tuple[int, str]]:
        """(process, description) of the ranks without a beat for longer than their limit, or than so many seconds."""
        found, with_beat = [], set()
        for path in self.logs.rglob(watch.NAME):
            try:
                seconds = time.time() - path.stat().st_mtime
                beat = json.loads(path.read_text(encoding="utf-8"))
                process_exists = Path(f"/proc/{beat['pid']}").exists()
            except (OSError, ValueError):
                continue
            with_beat.add(beat["pid"])
            if seconds > (longer_than or beat["limit"]) and process_exists:
                where = f"local rank {path.parent.name} (host {os.uname().nodename}, pid {beat['pid']})"
                found.append((beat["pid"], f"{where} is frozen: no sign of life for {seconds:.0f} s; {beat['doing']}"))
        for pid, since in self.stopped.items():
            seconds = time.monotonic() - since
            if pid not in with_beat and seconds > (longer_than or self.start_limit):
                where = f"local rank {_local_rank(pid)} (host {os.uname().nodename}, pid {pid})"
                found.append((pid, f"{where} is frozen: stopped for {seconds:.0f} s, before it began"))
        return found

    def _watch(self) -> None:
        while True:
            ranks, now = child_processes(), time.monotonic()
            self.stopped = {pid: self.stopped.get(pid, now) for pid, state in ranks.items() if state in "Tt"}
            for pid, text in self.silent():
                say(f"error: {text}. {watch.FIX}")
                send(signal.SIGKILL, [pid])  # torchrun then ends the others
            self.suspects |= self.silent(longer_than=AGENT_SECONDS)
            self.warnings.pass_on()
            time.sleep(watch.SECONDS)


def exit_code(folder: Path, run_id: str, num_nodes: int) -> int:
    """From the status of the run, which its first rank wrote; on several machines it may take a while to be seen."""
    from titan_video.supervision.run_status import read_status

    deadline = time.monotonic() + (STATUS_SECONDS if num_nodes > 1 else 0)
    while True:
        status = read_status(folder)
        if status.get("run_id") == run_id and status.get("exit_code") is not None:
            return status["exit_code"]
        if time.monotonic() > deadline:
            say(f"warning: {folder}/status.json does not say how the run ended")
            return 0
        time.sleep(0.5)


def main(argv: list[str]) -> None:
    relay = StopRelay()  # before the imports below, which take seconds
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from titan_video.supervision.run_status import mark_failed

    options = torchrun.parse_args(argv)
    if relay.ignored and hasattr(options, "signals_to_handle"):  # older torch: the ranks do not ignore it
        handled = options.signals_to_handle.split(",")
        options.signals_to_handle = ",".join(name for name in handled if name not in {s.name for s in relay.ignored})
    names = [Path(word).name for word in options.training_script_args]
    train_args = options.training_script_args[names.index("train.py") + 1 :]
    num_nodes = int(options.nnodes)
    folder, start_limit = check_run(train_args, num_nodes * int(options.nproc_per_node))
    if relay.requested:
        end(STOPPED, "stopped before the ranks were started; the same command starts the run")
    rank_watch = RankWatch(Path(options.log_dir), set(options.local_ranks_filter.split(",")), start_limit)
    os.environ.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", LABEL)
    try:
        torchrun.run(options)
    except ChildFailedError as e:
        rank_watch.warnings.pass_on()
        for text in rank_watch.suspects.values():
            say(f"error: {text}")
        say(str(e))
        rank, failure = e.get_first_failure()
        try:
            mark_failed(folder, options.rdzv_id, f"rank {rank} ended with exit code {failure.exitcode}")
        except OSError as error:
            say(f"error: {error}")
        sys.exit(1)
    rank_watch.warnings.pass_on()
    sys.exit(exit_code(folder, options.rdzv_id, num_nodes))


if __name__ == "__main__":
    main(sys.argv[1:])
