"""Damaged and hostile files: how many end the program in any other way than with a reason.

    python benchmarks/fuzz.py [--kinds media toml checkpoint forged weights] [--count N] [--seed S] [--only NUMBER]
                              [--processes N] [--json benchmarks/results/fuzz.json] [--write docs/reliability.md]

Each case runs in a child process that serves many of them and is replaced when it dies or hangs. What is counted:

    accepted, refused   how a case ended; a mutated checkpoint must never be accepted
    crashes             the child died
    tracebacks          an exception that the program does not turn into a reason or a message
    hangs               a case took more than 5 s of the processor, or did nothing for 5 s
    executions          a program was started, or a payload in a pickle ran
    writes outside      something outside the folder of the case was opened for writing, made, renamed or removed
"""

import argparse
import hashlib
import multiprocessing
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

from benchmarks import fuzz_cases as cases  # noqa: E402
from benchmarks.common import environment, markdown, write_json  # noqa: E402

KINDS: dict[str, tuple[int, Callable[[cases.Case], str], Callable[[Path], None]]] = {
    "media": (1000, cases.run_media, cases.make_media_seeds),
    "toml": (2000, cases.run_toml, cases.import_rules),
    "checkpoint": (1000, cases.run_checkpoint, cases.make_checkpoint_seeds),
    "forged": (1000, cases.run_forged, cases.make_checkpoint_seeds),
    "weights": (300, cases.run_weights, cases.make_weights_seeds),
}
COLUMNS = ("cases", "accepted", "refused", "crashes", "tracebacks", "hangs", "executions", "writes outside")
HANG = 5.0  # seconds
MEMORY = 4 << 30  # of a child, beside what it starts with, as data.decode_memory_gib limits a worker
STARTS = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn")
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")
COMPILER_CACHE = f"{tempfile.gettempdir()}/torchinductor_"  # torch makes it when a backend of the compiler is looked up
HARMLESS = ("/dev/null", "/dev/shm/", "/proc/self/", COMPILER_CACHE)


class Watch:
    """Sees, by Python's audit events, what a case starts and what it writes to. What libraries in C do is seen by
    comparing the files outside afterwards.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.starts: list[str] = []
        self.writes: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, args: tuple) -> None:
        if self.folder is None:
            return
        if event in STARTS:
            self.starts.append(f"{event} {str(args)[:200]}")
        elif event in CHANGES:
            paths = args[1:2] if event in ("os.symlink", "os.link") else args[:2]
            self.writes += [str(p) for p in paths if isinstance(p, str | bytes | os.PathLike) and self._outside(p)]
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            _, mode, flags = args
            is_write = (
                flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) if mode is None else set(mode) & set("wax+")
            )
            if is_write and self._outside(args[0]):
                self.writes.append(str(args[0]))

    def _outside(self, path: Any) -> bool:
        text = os.path.abspath(os.fsdecode(path))
        return not text.startswith((f"{self.folder}/", *HARMLESS)) and "__pycache__" not in text


def serve(connection: Any, kind: str, seed: int, root: Path) -> None:
    """The child: a number comes, an outcome goes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in C write there
    with open("/proc/self/status") as f:
        start = next(int(line.split()[1]) << 10 for line in f if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (start + MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    watch = Watch()
    while True:
        number = connection.recv()
        folder = root / "cases" / str(number)
        folder.mkdir(parents=True)
        case = cases.Case(
            number, random.Random(f"{kind} {seed} {number}"), folder, root / "seeds", root / "outside/file"
        )
        watch.folder, watch.starts, watch.writes = folder, [], []
        detail = ""
        try:
            outcome = KINDS[kind][1](case)
        except BaseException:
            outcome, detail = "tracebacks", traceback.format_exc()
        watch.folder = None
        shutil.rmtree(folder, ignore_errors=True)
        connection.send((outcome, detail, watch.starts, watch.writes))


class Child:
    def __init__(self, kind: str, seed: int, root: Path):
        self.connection, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("fork")
        self.process = context.Process(target=serve, args=(theirs, kind, seed, root), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, number: int) -> tuple[str, str, list[str], list[str]]:
        self.connection.send(number)
        start = last = self._cpu_seconds()
        while not self.connection.poll(HANG):
            now, state = self._cpu_seconds(), self._state()
            if now - start > HANG or (now == last and state != "R"):  # else the machine is busy
                return "hangs", f"{now - start:.1f} s of the processor, now in state {state}", [], []
            last = now
        try:
            return self.connection.recv()
        except EOFError:
            self.process.join()
            return "crashes", f"exit code {self.process.exitcode}", [], []

    def _stat(self) -> list[str]:
        return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()

    def _state(self) -> str:
        return self._stat()[0]

    def _cpu_seconds(self) -> float:
        return sum(map(int, self._stat()[11:13])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def fingerprint(folder: Path) -> str:
    """Of the names and contents of all files outside the cases."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def run(kind: str, count: int, seed: int, first: int = 0) -> dict[str, Any]:
    """The counts of `count` cases of a kind, and the details of what should not have been."""
    counts, findings, start = Counter(dict.fromkeys(COLUMNS, 0)), [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder)
        for name in ("seeds", "outside", "cases"):
            (root / name).mkdir()
        (root / "outside/file").write_text("somebody else's")
        KINDS[kind][2](root / "seeds")
        before = fingerprint(root / "outside"), fingerprint(root / "seeds")
        child = Child(kind, seed, root)
        for number in range(first, first + count):
            outcome, detail, starts, writes = child.run(number)
            if outcome in ("hangs", "crashes"):
                child.end()
                shutil.rmtree(root / "cases" / str(number), ignore_errors=True)
                child = Child(kind, seed, root)
            counts["cases"] += 1
            counts[outcome] += 1
            counts["executions"] += bool(starts)
            counts["writes outside"] += bool(writes)
            if detail or starts or writes or (outcome == "accepted" and kind == "checkpoint"):
                findings.append({"number": number, "outcome": outcome, "detail": detail, "seen": [*starts, *writes]})
        child.end()
        if before != (fingerprint(root / "outside"), fingerprint(root / "seeds")):
            counts["writes outside"] += 1
            findings.append({"number": None, "outcome": "writes outside", "detail": "files outside have changed"})
        counts["executions"] += (root / "outside/executed").exists()
    return {"kind": kind, "seed": seed, **counts, "seconds": round(time.monotonic() - start, 1), "findings": findings}


def run_in_parts(kind: str, count: int, seed: int, processes: int) -> dict[str, Any]:
    """`run`, its cases shared among processes."""
    firsts = [count * i // processes for i in range(processes + 1)]
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        parts = [pool.submit(run, kind, b - a, seed, a) for a, b in zip(firsts, firsts[1:], strict=False)]
        results = [part.result() for part in parts]
    total = {name: sum(r[name] for r in results) for name in COLUMNS}
    seconds = max(r["seconds"] for r in results)
    return {
        "kind": kind,
        "seed": seed,
        **total,
        "seconds": seconds,
        "findings": [f for r in results for f in r["findings"]],
    }


def write_table(page: Path, results: list[dict[str, Any]]) -> None:
    """Replace the table of a page that begins with the columns."""
    header = re.escape(table([]).splitlines()[0])
    page.write_text(re.sub(rf"{header}\n(\|.*\n)*", lambda _: f"{table(results)}\n", page.read_text(), count=1))


def is_clean(result: dict[str, Any]) -> bool:
    bad = COLUMNS[3:] if result["kind"] != "checkpoint" else ("accepted", *COLUMNS[3:])
    return not any(result[name] for name in bad)


def table(results: list[dict[str, Any]]) -> str:
    rows = [[r["kind"], *(f"{r[name]:,}" for name in COLUMNS)] for r in results]
    return markdown(["kind", *COLUMNS], rows)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument(
        "--count", type=int, default=0, help="cases of each kind; 0: " + str({k: v[0] for k, v in KINDS.items()})
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, default=-1, help="run this case alone, and print all that is found")
    parser.add_argument("--processes", type=int, default=1, help="the cases are shared among these")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--write", type=Path, help="page whose table of figures is rewritten")
    cli = parser.parse_args(argv)
    results = []
    for kind in cli.kinds:
        count, first = (1, cli.only) if cli.only >= 0 else (cli.count or KINDS[kind][0], 0)
        if cli.processes > 1 and cli.only < 0:
            results.append(run_in_parts(kind, count, cli.seed, cli.processes))
        else:
            results.append(run(kind, count, cli.seed, first))
        for finding in results[-1]["findings"][: 1000 if cli.only >= 0 else 20]:
            print(
                f"{kind} {finding['number']}: {finding['outcome']} {finding['detail'][-1500:]} {finding.get('seen')}",
                flush=True,
            )
    print(table(results))
    if cli.json:
        write_json(cli.json, "fuzz", cli, environment(torch.device("cpu")), results)
    if cli.write:
        write_table(cli.write, results)
    return 0 if all(is_clean(r) for r in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
