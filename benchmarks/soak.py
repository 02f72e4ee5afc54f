"""A run on several ranks that meets faults at random moments, again and again, and ends as the run without faults.

    python benchmarks/soak.py [--faults 60] [--ranks 2] [--kinds signal,kill,...] [--seed 0] [--json FILE]

Each start of `run_train.sh` meets one fault, at a moment drawn from its first line to beyond its end, and must end
within a limit, without a traceback, with an exit code that the fault allows. The same command is then started again. A
run that finishes is compared with one that met no fault: every loss, and every tensor of the last checkpoint, bit for
bit. Kinds:

    signal   SIGTERM, SIGINT, SIGUSR2 or SIGHUP to the script, its launcher, a rank, or all of them; exit code 0 or 85
    twice    two direct signals to the script, 0.3 s apart: it ends at once
    kill     SIGKILL to one of these, or to a data worker
    stop     SIGSTOP to a rank: the others end within the timeout, and the rank is named
    disk     the disk is full from this moment on (in a small tmpfs; left out where no mount namespace can be made)
    damage   a byte of the newest checkpoint is flipped before the start
    start    a second start on the same folder: one of the two is refused
    host     the same, the second under another host name and in a network of its own, as on a second machine
    reader   SIGSTOP or SIGKILL to processes that decode clips, several in one start; this kind goes alone, as clips are
             decoded during training for it: the run goes on, or ends by the clip's name after a second loss

A fault that met nothing, because the start had ended, is not counted.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

KINDS = ("signal", "twice", "kill", "stop", "disk", "damage", "start", "host")
READER = "reader"
READERS_A_START = 5
OTHER_HOST = ("unshare", "--map-root-user", "--user", "--uts", "--net", "sh", "-c")
OTHER_HOST += ('hostname node7; ip link set lo up; exec "$@"', "sh")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
TIMEOUT = 10  # comm.train_timeout_seconds
LIMIT = 150  # seconds for a start to end: Python's own start on a busy machine, and torchrun's 30 s for a frozen rank
TMPFS_MIB = 256
OPTIONS = {
    "job.config_file": ROOT / "train_configs" / "debug.toml",
    "data.path": "embedded:shapes-12",
    "data.num_workers": 1,
    "training.local_batch_size": 1,
    "lr_scheduler.warmup_steps": 2,
    "lr_scheduler.decay_ratio": 0,
    "validation.enable": "true",
    "validation.freq": 20,
    "validation.holdout": 0.2,
    "validation.sample_steps": 2,
    "validation.num_videos": 1,
    "metrics.enable_tensorboard": "false",
    "checkpoint.interval": 10,
    "checkpoint.keep_latest_k": 2,
    "checkpoint.last_save_in_hf": "true",
    "comm.init_timeout_seconds": 60,
    "comm.train_timeout_seconds": TIMEOUT,
}

READER_OPTIONS = {
    "encoder.placement": "colocated",
    "data.decode_timeout_seconds": 1,
    "validation.enable": "false",
    "comm.train_timeout_seconds": 60,  # a stopped process is replaced after 11 s
}


def processes_below(pid: int) -> list[int]:
    """All processes that descend from one."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                parents.setdefault(int(parent), []).append(int(stat.parent.name))
    found, above = [], [pid]
    while above:
        below = parents.get(above.pop(), [])
        found += below
        above += below
    return found


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@dataclass
class Soak:
    folder: Path
    num_ranks: int
    num_steps: int
    kinds: tuple[str, ...]
    rng: random.Random
    seconds: float  # a fault comes within so many
    options: dict = field(default_factory=lambda: dict(OPTIONS))
    lap: int = 0
    refused: int = 0
    starts: int = 0
    counts: Counter = field(default_factory=Counter)
    codes: Counter = field(default_factory=Counter)
    slowest: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / f"lap{self.lap}"

    def start(self, dump: Path, log: str = "", before: tuple[str, ...] = ()) -> subprocess.Popen:
        options = self.options | {"job.dump_folder": dump, "data.cache_folder": self.folder / "cache"}
        options["training.steps"] = self.num_steps
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        env = {**os.environ, "NGPU": str(self.num_ranks), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
        env |= {"CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(self.folder.parent)}
        output = open(dump.with_suffix(log or ".log"), "w")
        return subprocess.Popen(
            [*before, str(ROOT / "run_train.sh"), *words],
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def targets(self, p: subprocess.Popen) -> dict[str, list[int]]:
        """The processes of a start, by what they are."""
        below = processes_below(p.pid)
        lines = {pid: command_line(pid) for pid in below}
        launcher = [pid for pid in below if "titan_video.launch" in lines[pid]]
        ranks = [pid for pid in below if "train.py" in lines[pid] and pid not in launcher]
        parents = {pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in ranks}
        workers = [pid for pid in ranks if parents[pid] in ranks]
        ranks = [pid for pid in ranks if pid not in workers]
        return {"script": [p.pid], "launcher": launcher, "rank": ranks, "worker": workers, "all": [p.pid, *below]}

    def send(self, p: subprocess.Popen, signum: int, names: tuple[str, ...]) -> str:
        targets, deadline = {}, time.monotonic() + LIMIT
        while not targets and p.poll() is None and time.monotonic() < deadline:  # ranks come later than the script
            with suppress(OSError):  # a process may end meanwhile
                targets = {name: pids for name, pids in self.targets(p).items() if pids and name in names}
            time.sleep(0 if targets else 0.05)
        if p.poll() is not None or not targets:
            return "nothing"
        name = self.rng.choice(sorted(targets))
        pids = targets[name] if name == "all" else [self.rng.choice(targets[name])]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        return f"{signal.Signals(signum).name} to {name}"

    def one_fault(self) -> bool:
        """Start, meet one fault, and wait for the end. True: the run finished."""
        kind, seconds = self.rng.choice(self.kinds), self.seconds
        if kind == READER:
            return self.lose_readers()
        what, at, ballast = kind, self.rng.uniform(0, seconds), self.folder / "ballast"
        if kind == "damage":
            at, what = 0.0, self.damage()
            if what == "nothing" and len(self.kinds) > 1:
                return self.one_fault()  # of another kind
        p = self.start(self.run)
        begun = time.monotonic()
        while time.monotonic() - begun < at and p.poll() is None:
            time.sleep(0.02)
        met = time.monotonic()
        everyone = ("script", "launcher", "rank")
        other = None
        if kind != "damage" and p.poll() is not None:
            what = "nothing"
        elif kind == "signal":
            what = self.send(p, self.rng.choice(SIGNALS), (*everyone, "all"))
        elif kind == "twice":
            what = "twice " + self.send(p, signal.SIGTERM, ("script",))
            time.sleep(0.3)
            with suppress(ProcessLookupError):
                os.kill(p.pid, signal.SIGTERM)
        elif kind == "kill":
            what = self.send(p, signal.SIGKILL, (*everyone, "worker"))
        elif kind == "stop":
            what = self.send(p, signal.SIGSTOP, ("rank",))
        elif kind == "disk":
            fill(ballast)
        elif kind in ("start", "host"):
            other = self.start(self.run, ".second.log", OTHER_HOST if kind == "host" else ())
        code = self.wait(p, what)
        met = time.monotonic() - met
        if other:
            second = self.wait(other, "second start")
            refused = self.run.with_suffix(".log" if code else ".second.log").read_text(errors="replace")
            # Where the first has ended before the second is at the lock, none is refused.
            is_right = sorted((code, second)) in ([0, 0], [0, 1])
            self.check(is_right, f"two starts: {code}, {second}\n{refused[-2000:]}")
            self.check((code, second) == (0, 0) or "another run uses this folder" in refused, refused[-2000:])
            self.refused += (code, second) != (0, 0)
            code = min(code, second)
        ballast.unlink(missing_ok=True)
        log = self.run.with_suffix(".log").read_text(errors="replace")
        status = self.run / "status.json"
        step = json.loads(status.read_text())["step"] if status.exists() else "-"
        print(
            f"{self.starts + 1:3} {at:5.1f} s  {what:22} -> {code:4} after {met:5.1f} s, step {step}",
            flush=True,
        )
        allowed = {"signal": (0, 85), "damage": (0,), "disk": (0, 1), "stop": (0, 1), "start": (0,), "host": (0,)}
        self.check(
            kind not in allowed or code in allowed[kind] or what == "nothing",
            f"{what}: exit code {code}\n{log[-3000:]}",
        )
        self.check("Traceback" not in log, f"{what}: a traceback\n{log[-5000:]}")
        self.check(kind != "twice" or what == "nothing" or met < 10, f"{what}: {met:.1f} s to the end")
        if kind == "stop" and what != "nothing" and code == 1:
            self.check("is frozen" in log, f"{what}: the frozen rank is not named\n{log[-3000:]}")
        self.starts += 1
        self.counts[kind] += what != "nothing"
        self.codes[code] += 1
        self.slowest[kind] = max(self.slowest.get(kind, 0.0), met)
        self.end_all(what)
        if code == 0 and kind not in ("disk", "stop", "start", "host"):
            self.seconds = time.monotonic() - begun  # what a start takes when it meets no end
        return code == 0

    def end_all(self, what: str) -> None:
        """Nothing of a start is left behind: what a killed process takes with it ends within seconds."""
        deadline = time.monotonic() + 5
        while left := [pid for pid in processes_with(str(self.run)) if pid != os.getpid()]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        self.check(not left, f"{what}: processes left: {[command_line(pid)[:80] for pid in left]}")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def lose_readers(self) -> bool:
        """Start, stop or kill processes that decode, and wait for the end. True: the run finished."""
        p = self.start(self.run)
        begun, sent = time.monotonic(), []
        while p.poll() is None and len(sent) < READERS_A_START and time.monotonic() - begun < LIMIT:
            time.sleep(self.rng.uniform(0.2, 0.1 * self.seconds))
            what = self.send(p, self.rng.choice((signal.SIGSTOP, signal.SIGKILL)), ("worker",))
            sent += [what] if what != "nothing" else []
        code = self.wait(p, "readers")
        log = self.run.with_suffix(".log").read_text(errors="replace")
        replaced = [line for line in log.splitlines() if "decoding process" in line]
        print(f"{len(sent)} readers: {', '.join(sent)} -> {code}, {len(replaced)} named", flush=True)
        self.check(code == 0 or (code == 1 and "decoding process" in log), f"readers: exit code {code}\n{log[-3000:]}")
        self.check("Traceback" not in log, f"readers: a traceback\n{log[-5000:]}")
        self.check(all(".mp4" in line for line in replaced), f"readers: a file is not named\n{replaced}")
        self.starts += 1
        self.counts[READER] += len(sent)
        self.codes[code] += 1
        self.slowest[READER] = max(self.slowest.get(READER, 0.0), time.monotonic() - begun)
        self.end_all("readers")
        return code == 0

    def wait(self, p: subprocess.Popen, what: str) -> int:
        try:
            return p.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.check(False, f"{what}: no end within {LIMIT} s")
            for pid in [*processes_below(p.pid), p.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return p.wait()

    def check(self, is_right: bool, problem: str) -> None:
        if not is_right:
            self.problems.append(problem)
            print(f"PROBLEM {problem}", flush=True)

    def damage(self) -> str:
        """Flip a byte of one file of the newest checkpoint. "nothing": there is no older one to fall back to."""
        folders = sorted((self.run / "checkpoint").glob("step-*[0-9]"), key=lambda f: int(f.name[5:]))
        if len(folders) < 2:
            return "nothing"
        path = self.rng.choice(sorted(f for f in folders[-1].iterdir() if f.stat().st_size))
        content = bytearray(path.read_bytes())
        content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        path.write_bytes(content)
        return f"a byte of {path.name}"

    def compare(self, whole: dict) -> None:
        found = outcome(self.run, self.num_steps)
        for name in whole:
            self.check(found[name] == whole[name], f"lap {self.lap}: {name} differ from the run without faults")
        shutil.rmtree(self.run)
        self.lap += 1


def processes_with(text: str) -> list[int]:
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if text in command_line(pid) and "benchmarks/soak.py" not in command_line(pid)]


def fill(ballast: Path) -> None:
    with suppress(OSError), open(ballast, "wb") as f:
        while True:
            f.write(bytes(1 << 20))
            f.flush()


def outcome(run: Path, num_steps: int) -> dict:
    """What a finished run is compared by: losses of every step, tensors and counters at the end, the export."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = {row["step"]: (row["loss"], row["grad_norm"], row["samples"]) for row in rows if "loss" in row}
    last = run / "checkpoint" / f"step-{num_steps}"
    metadata = dcp.FileSystemReader(last).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.load(tensors, checkpoint_id=last, no_dist=True)
    hashes = {name: hashlib.sha256(x.numpy().tobytes()).hexdigest() for name, x in tensors.items()}
    counters = json.loads((last / "state.json").read_text())
    exported = {str(f.relative_to(run)): f.read_bytes() for f in (run / "hf").rglob("*.safetensors")}
    return {
        "losses": steps,
        "number of rows": len([r for r in rows if "loss" in r]),
        "tensors": hashes,
        "counters": counters,
        "export": exported,
    }


def in_tmpfs(argv: list[str]) -> bool:
    """Start this script again in a mount namespace of its own; False: there can be none here."""
    words = ["unshare", "--map-root-user", "--mount", "--user"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        return False
    os.execvp(words[0], [*words, sys.executable, __file__, *argv, "--mount"])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=0.0, help="a fault comes within so many (0: as a start takes)")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="/tmp/titan_video_soak")
    parser.add_argument("--json", default="")
    parser.add_argument("--mount", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    kinds = tuple(args.kinds.split(","))
    if not set(kinds) <= {*KINDS, READER} or (READER in kinds and len(kinds) > 1):
        parser.error(f"--kinds: of {','.join(KINDS)}, or {READER} alone")
    # A shell's background job ignores SIGINT, and so would all starts: bash cannot trap what was ignored before it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if "disk" in kinds and not args.mount and not in_tmpfs(argv):
        print("no mount namespace here: without full disks")
        kinds = tuple(kind for kind in kinds if kind != "disk")
    if args.mount:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_MIB}m", "tmpfs", str(folder)], check=True)
    if "host" in kinds and subprocess.run([*OTHER_HOST, "true"], capture_output=True).returncode:
        print("no other host name here: without second machines")
        kinds = tuple(kind for kind in kinds if kind != "host")
    folder = folder / f"soak-{os.getpid()}"
    folder.mkdir()
    soak = Soak(folder, args.ranks, args.steps, kinds, random.Random(args.seed), args.seconds)
    if READER in kinds:
        soak.options |= READER_OPTIONS
    begun = time.monotonic()
    code = soak.start(folder / "whole").wait()
    assert code == 0, (folder / "whole.log").read_text()
    soak.seconds = args.seconds or time.monotonic() - begun
    print(f"the run without faults: {args.steps} steps, {time.monotonic() - begun:.0f} s", flush=True)
    whole = outcome(folder / "whole", args.steps)
    while sum(soak.counts.values()) < args.faults and soak.starts < 3 * args.faults + 3:
        if soak.one_fault():
            soak.compare(whole)
    if soak.run.exists():
        code = soak.wait(soak.start(soak.run), "the end")
        soak.check(code == 0, f"the last start ends with {code}")
        soak.compare(whole)
    report = {
        "seed": args.seed,
        "ranks": args.ranks,
        "starts": soak.starts,
        "faults": dict(sorted(soak.counts.items())),
        "exit_codes": {str(code): n for code, n in sorted(soak.codes.items())},
        "seconds_to_the_end": {kind: round(s, 1) for kind, s in sorted(soak.slowest.items())},
        "second_starts_refused": soak.refused,
        "finished_runs_compared": soak.lap,
        "problems": len(soak.problems),
    }
    print(json.dumps(report, indent=1))
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(bool(soak.problems))


if __name__ == "__main__":
    main(sys.argv[1:])
