"""The launch scripts, run for real in a copy of the repository with a stand-in train.py and requirements.txt."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.helpers import ROOT, children, start_program

SCRIPTS = (
    "run_train.sh",
    "run_tests.sh",
    "ensure_env.sh",
    "multinode_trainer.slurm",
    ".ci/run",
    "titan_video/launch.py",
    "titan_video/run_status.py",
    "titan_video/supervision/watch.py",
    "titan_video/tools/heartbeat.py",
    "titan_video/tools/signals.py",
)

PIPES = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

# Each rank writes down its arguments and environment, then waits for a stop request, "saves" for a moment, and ends.
TRAIN = """
import json, os, pathlib, sys, time
here = pathlib.Path(__file__).parent
sys.path.insert(0, str(here))
from titan_video.supervision import watch
from titan_video.tools import signals
signals.install()
rank, run_id = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RUN_ID", "")
if "--freeze" in sys.argv:
    watch.start(1.0)
elif "--freeze-early" in sys.argv and rank == "0":
    watch.start(60.0)
elif "--slow-end" in sys.argv and rank == str(int(os.environ.get("WORLD_SIZE", "1")) - 1):
    watch.start(1.0)
    class Slow:
        def __del__(self, begin=(here / "ending").touch, sleep=time.sleep):  # while Python ends: no thread runs
            begin()
            sleep(4.0)
    slow = Slow()
def status(code):
    status = {"status": "x", "exit_code": code, "run_id": run_id, "idle_starts": int(os.environ.get("IDLE", "0"))}
    (here / "status.json").write_text(json.dumps(status))
print("hello from", rank, flush=True)
threads, spin = os.environ.get("OMP_NUM_THREADS"), os.environ.get("GOMP_SPINCOUNT")
facts = {"pid": os.getpid(), "args": sys.argv[1:], "cwd": os.getcwd(), "python": sys.executable}
facts |= {"omp": threads, "spin": spin}
(here / f"started{rank}.tmp").write_text(json.dumps(facts))
(here / f"started{rank}.tmp").rename(here / f"started{rank}")
if "--fail" in sys.argv and rank == "1":
    sys.exit("error: clip 3 is broken\\n  give another")
if "--end" in sys.argv:
    status(int(sys.argv[-1]))
    sys.exit(int(sys.argv[-1]))
while not signals.stop_requested():
    time.sleep(0.02)
time.sleep(float(os.environ.get("SAVE_SECONDS", "0.3")))
(here / f"saved{rank}").write_text("saved")
status(85)
sys.exit(0 if run_id else 85)
"""

# What titan_video/launch.py imports. The configuration is the list of arguments.
CHECKS = {
    "titan_video/config/manager.py": """
import contextlib, sys
main_guard = contextlib.nullcontext
class parse_args(list):
    dump_folder = "."
    init_timeout_seconds = 2.0
    def __getattr__(self, name):
        return self
    def num_training_ranks(self, world_size):
        return world_size
""",
    "titan_video/config/check.py": """
import sys
def check(argv, world_size):
    if "--refuse" in argv:
        sys.exit(f"refused for {world_size} ranks: {argv}")
""",
    "titan_video/distributed/parallel_dims.py": "def check_layout(*args): pass\n",
    "titan_video/models/__init__.py": "def get_spec(*args): pass\n\nget_args = get_spec\n",
    "titan_video/supervision/run_status.py": """
import json, pathlib
HERE = pathlib.Path(__file__).parent.parent.parent
def read_status(folder):
    path = HERE / "status.json"
    return json.loads(path.read_text()) if path.exists() else {}
def mark_failed(folder, run_id, message):
    (HERE / "failed").write_text(message)
""",
}


@pytest.fixture
def repo(tmp_path):
    root = tmp_path / "a repo"  # a space: every path in the scripts is quoted
    for name in SCRIPTS:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "train_configs").mkdir()
    (root / "train_configs" / "shapes.toml").touch()
    (root / "train.py").write_text(TRAIN)
    (root / "requirements.txt").write_text("pip\n")
    (root / "constraints.txt").write_text("")
    for name, text in CHECKS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def environment(**values):
    env = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHON", "NGPU", "CONFIG_FILE", "LOG_RANK", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    }
    return {**env, "PATH": f"{Path(sys.executable).parent}:{env['PATH']}", "CUDA_VISIBLE_DEVICES": "", **values}


def start(repo, *args, cwd=None, before=(), **env):
    env = environment(PYTHON=sys.executable, **env)
    return start_program(
        [*before, str(repo / "run_train.sh"), *args],
        cwd=cwd or repo,
        env=env,
        stdin=subprocess.DEVNULL,
        **PIPES,
    )


def wait_for(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def facts(repo, rank=0):
    wait_for((repo / f"started{rank}").exists)
    return json.loads((repo / f"started{rank}").read_text())


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_scripts_parse_and_are_executable():
    for name in (name for name in SCRIPTS if not name.endswith(".py")):
        subprocess.run(["bash", "-n", str(ROOT / name)], check=True)
    assert all(os.access(ROOT / name, os.X_OK) for name in ("run_train.sh", "run_tests.sh", ".ci/run"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP])
def test_one_process_saves_on_a_signal(repo, tmp_path, signum):
    p = start(repo, "--job.description", "two words", cwd=tmp_path)
    seen = facts(repo)
    # Run from another folder: the default configuration is found, and relative paths stay the user's.
    assert seen["args"] == ["--job.config_file", f"{repo}/train_configs/shapes.toml", "--job.description", "two words"]
    assert seen["cwd"] == str(tmp_path)
    assert seen["omp"] is None and seen["spin"] == "10000"
    p.send_signal(signum)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == 85 and (repo / "saved0").exists(), output
    assert "Traceback" not in output and output.count("a second signal stops at once") == 1


def test_the_error_of_a_hidden_rank_is_shown(repo, tmp_path):
    p = start(repo, "--fail", NGPU="2", TMPDIR=str(tmp_path))
    output = p.communicate(timeout=60)[0]
    assert p.returncode != 0 and "[rank1]: error: clip 3 is broken\n[rank1]:   give another\n" in output, output
    logs = output.partition("The output of all ranks is in ")[2].strip()
    assert list(Path(logs).rglob("stderr.log"))
    shutil.rmtree(logs)
    p = start(repo, "--end", "0", NGPU="2", TMPDIR=str(tmp_path))
    assert p.communicate(timeout=60)[0] and p.returncode == 0 and not list(tmp_path.glob("titan_video.*"))


FULL_DISK = """
def mark_failed(folder, run_id, message):
    raise OSError("status.json: cannot write the file: No space left on device")
"""


@pytest.mark.parametrize("log_too", [False, True])
def test_a_launcher_whose_disk_is_full_ends_with_one_line(repo, log_too):
    """log_too: its own output cannot be written either."""
    status = repo / "titan_video" / "supervision" / "run_status.py"
    status.write_text(status.read_text() + FULL_DISK)
    if not log_too:
        output, code = (p := start(repo, "--fail", NGPU="2")).communicate(timeout=60)[0], p.returncode
        assert "Traceback" not in output
        assert "error: status.json: cannot write the file: No space left on device\n" in output
    else:
        env = environment(PYTHON=sys.executable, NGPU="2")
        with open("/dev/full", "w") as full:
            streams = dict(stdin=subprocess.DEVNULL, stdout=full, stderr=full)
            code = subprocess.run([str(repo / "run_train.sh"), "--fail"], cwd=repo, env=env, **streams).returncode
    assert code == 1


@pytest.mark.parametrize(
    "signum, whole_group", [(signal.SIGTERM, True), pytest.param(signal.SIGUSR2, False, marks=pytest.mark.slow)]
)
def test_all_ranks_save_on_a_signal(repo, signum, whole_group):
    """Slurm signals the process group, `kill` one process. Each rank must get the signal once; a second stops it."""
    p = start(repo, NGPU="2", LOG_RANK="1", SAVE_SECONDS="1")
    assert facts(repo, 0)["omp"] == facts(repo, 1)["omp"] == str(max(1, len(os.sched_getaffinity(0)) // 2))
    (os.killpg if whole_group else os.kill)(p.pid, signum)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == 85, output
    assert (repo / "saved0").exists() and (repo / "saved1").exists()
    assert "hello from 1" in output and "hello from 0" not in output


def test_nohup_is_respected_by_launcher_and_ranks(repo):
    """torchrun replaces the disposition that nohup has set, and would end the run when the terminal closes."""
    p = start(repo, NGPU="2", before=("nohup",))
    pids = [facts(repo, rank)["pid"] for rank in (0, 1)]
    for _ in range(2):
        os.killpg(p.pid, signal.SIGHUP)
        time.sleep(0.3)
    assert p.poll() is None and all(map(running, pids)) and not (repo / "saved0").exists()
    p.send_signal(signal.SIGTERM)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == 85 and (repo / "saved0").exists() and (repo / "saved1").exists(), output


def test_a_second_signal_stops_at_once(repo):
    p = start(repo, NGPU="2", SAVE_SECONDS="60")
    pids = [facts(repo, rank)["pid"] for rank in (0, 1)]
    p.send_signal(signal.SIGUSR2)
    time.sleep(0.3)
    p.send_signal(signal.SIGTERM)
    p.communicate(timeout=20)
    assert p.returncode != 0 and not any(map(running, pids)) and not (repo / "saved0").exists()


def test_ranks_die_with_a_killed_launcher(repo):
    if subprocess.run(["setpriv", "--pdeathsig", "KILL", "true"], capture_output=True).returncode:
        pytest.skip("no setpriv --pdeathsig here")
    p = start(repo, NGPU="2")
    pids = [facts(repo, rank)["pid"] for rank in (0, 1)]
    p.kill()
    p.communicate(timeout=10)
    wait_for(lambda: not any(map(running, pids)), timeout=5)


@pytest.mark.parametrize("signum", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGUSR2])
def test_a_scheduler_signals_every_process(repo, signum):
    """Slurm's proctrack/linuxproc does, to this script, torchrun and the ranks, and srun may pass it on once more."""
    p = start(repo, NGPU="2", SAVE_SECONDS="1")
    for rank in (0, 1):
        facts(repo, rank)
    everyone = [p.pid, *children(p.pid)]
    for _ in range(2):
        for pid in everyone:
            os.kill(pid, signum)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == 85 and (repo / "saved0").exists() and (repo / "saved1").exists(), output


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("delay", [0.0, 0.1, 0.3, 1.0])
def test_a_signal_before_the_ranks_are_ready(repo, ranks, delay):
    """It ends the run cleanly at any moment, or the ranks get it when they can take it."""
    p = start(repo, NGPU=ranks)
    time.sleep(delay)
    p.send_signal(signal.SIGTERM)
    output, _ = p.communicate(timeout=60)
    # The first line of the script may not have been reached, on a busy machine: then nothing has begun.
    nothing_begun = delay <= 0.1 and not output and not (repo / "started0").exists()
    assert p.returncode == 85 or nothing_begun and p.returncode == -signal.SIGTERM, output
    assert "Traceback" not in output and "Terminated" not in output and "User defined" not in output


def test_a_frozen_rank_ends_the_run_and_is_named(repo):
    p = start(repo, "--freeze", NGPU="2")
    pids = [facts(repo, rank)["pid"] for rank in (0, 1)]
    time.sleep(1.5)
    os.kill(pids[1], signal.SIGSTOP)
    output, _ = p.communicate(timeout=60)
    assert p.returncode == 1 and not any(map(running, pids))
    assert f"error: local rank 1 (host {os.uname().nodename}, pid {pids[1]}) is frozen: no sign of life for" in output
    assert (repo / "failed").read_text() == "rank 1 ended with exit code -9"


def test_a_rank_that_is_stopped_before_its_first_beat_ends_the_run_and_is_named(repo):
    p = start(repo, "--freeze-early", NGPU="2")
    pid = facts(repo, 1)["pid"]
    os.kill(pid, signal.SIGSTOP)
    output, _ = p.communicate(timeout=60)
    assert p.returncode == 1 and not running(pid)
    assert f"error: local rank 1 (host {os.uname().nodename}, pid {pid}) is frozen: stopped for" in output


def test_a_rank_whose_python_takes_long_to_end_is_not_frozen(repo):
    """As on a busy machine, where a soak found it: the run had finished, and the launcher ended it as failed."""
    p = start(repo, "--slow-end", "--end", "0", NGPU="2")
    output, _ = p.communicate(timeout=60)
    assert p.returncode == 0, output


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_signal_while_python_ends_changes_nothing(repo, ranks):
    """The run is over by then."""
    p = start(repo, "--slow-end", "--end", "0", NGPU=ranks)
    pid = facts(repo, int(ranks) - 1)["pid"]
    wait_for((repo / "ending").exists)
    for signum in (signal.SIGHUP, signal.SIGTERM):
        os.kill(pid, signum)
    output, _ = p.communicate(timeout=60)
    assert p.returncode == 0, output


def test_warnings_of_hidden_ranks_are_shown_once_with_the_rank_of_the_whole_run(repo):
    """Two machines on this one: ranks 0 and 1, 2 and 3. Local rank 0 is shown."""
    code = """
import os
rank = os.environ["RANK"]
print("11-30 06:54:06 step of", rank, flush=True)
if rank in "13":
    print("11-30 06:54:06 WARNING a disk of rank", rank, "is full", flush=True)
print("11-30 06:54:07 WARNING all say this", flush=True)
watch.start(60.0)
time.sleep(2.5)
"""
    text = TRAIN.replace("signals.install()\n", "signals.install()\n" + code)
    (repo / "train.py").write_text(text.replace("status(int", "time.sleep(1); status(int"))
    port = 29600 + os.getpid() % 300
    env = {"NGPU": "2", "NNODES": "2", "RDZV_ID": "two", "RDZV_ENDPOINT": f"localhost:{port}"}
    machines = [start(repo, "--end", "0", **env) for _ in range(2)]
    outputs = [p.communicate(timeout=100)[0] for p in machines]
    assert [p.returncode for p in machines] == [0, 0], outputs
    whole = "".join(outputs)
    for rank in "02":
        assert whole.count(f"[rank{rank}]:11-30 06:54:06 step of {rank}\n") == 1, whole
    for rank in "13":
        assert whole.count(f"[rank{rank}]:11-30 06:54:06 WARNING a disk of rank {rank} is full\n") == 1, whole
        assert f"step of {rank}" not in whole
    assert all(output.count("WARNING all say this") == 1 for output in outputs), outputs


@pytest.mark.parametrize("ranks, code", [("1", 0), ("1", 3), ("2", 3), pytest.param("2", 0, marks=pytest.mark.slow)])
def test_exit_code(repo, ranks, code):
    p = start(repo, "--end", str(code), NGPU=ranks)
    p.communicate(timeout=60)
    assert p.returncode == (1 if ranks == "2" and code else code)


@pytest.mark.parametrize(
    "env, message",
    [
        ({"CONFIG_FILE": "no.toml"}, "Configurations: train_configs/shapes.toml"),
        ({"NGPU": "two"}, "NGPU=two is not a number"),
    ],
)
def test_bad_settings(repo, env, message):
    p = start(repo, **env)
    output, _ = p.communicate(timeout=10)
    assert p.returncode == 1 and message in output


def wheel(folder, version):
    """A package that is nowhere else: its wheel, made by hand."""
    folder.mkdir(exist_ok=True)
    info = f"titan_video_stand_in-{version}.dist-info"
    with zipfile.ZipFile(folder / f"titan_video_stand_in-{version}-py3-none-any.whl", "w") as z:
        z.writestr("titan_video_stand_in.py", "")
        z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: titan-video-stand-in\nVersion: {version}\n")
        z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr(f"{info}/RECORD", "")


def train_once(repo, wheels):
    env = environment(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels), PIP_CONFIG_FILE=os.devnull)
    return start_program([str(repo / "run_train.sh"), "--end", "0"], cwd=repo, env=env, **PIPES)


def test_first_use_makes_a_venv(repo, tmp_path):
    wheels, venv = tmp_path / "wheels", repo / ".venv"
    wheel(wheels, "1.0")
    wheel(wheels, "1.5")
    (repo / "constraints.txt").write_text("titan-video-stand-in<1.5\n")
    (repo / "requirements.txt").write_text(
        '# comment\ntitan-video-stand-in>=1.0\nnothing-of-this-name>=1; python_version < "3.0"\n'
    )

    # An earlier installation was interrupted: it is made anew. Two runs start at once: one installs, the other waits.
    venv.mkdir()
    (venv / ".made_by").write_text("installing\n")
    (venv / "debris").touch()
    lock = os.open(repo, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    both = [train_once(repo, wheels) for _ in range(2)]
    time.sleep(1)
    assert (venv / "debris").exists()  # as long as another holds the lock
    os.close(lock)
    outputs = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert sum("Successfully installed titan-video-stand-in-1.0" in o for o in outputs) == 1
    assert all("lacks titan-video-stand-in>=1.0" in o and f"{venv}/bin/python" in o for o in outputs)
    assert facts(repo)["python"] == f"{venv}/bin/python" and not (venv / "debris").exists()

    began = time.monotonic()
    p = train_once(repo, wheels)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == 0 and "install" not in output.lower() and time.monotonic() - began < 5

    # The requirements change: brought up to date in place.
    wheel(wheels, "2.0")
    (repo / "requirements.txt").write_text("titan-video-stand-in==2.0\n")
    (repo / "constraints.txt").write_text("")
    (venv / "kept").touch()
    p = train_once(repo, wheels)
    assert (
        "Successfully installed titan-video-stand-in-2.0" in p.communicate(timeout=60)[0]
        and p.returncode == 0
        and (venv / "kept").exists()
    )

    # Metadata that looks complete does not make an interrupted installation complete.
    complete = ["bash", "-c", f'ROOT="{repo}"; source "$ROOT/ensure_env.sh"; venv_is_complete']
    assert subprocess.run(complete).returncode == 0
    (venv / ".made_by").write_text("installing\n")
    assert subprocess.run(complete).returncode != 0


def test_the_venv_of_another_tool_is_left_alone(repo, tmp_path):
    (repo / ".venv").mkdir()
    (repo / ".venv" / "pyvenv.cfg").touch()
    (repo / "requirements.txt").write_text("titan-video-stand-in\n")
    p = train_once(repo, tmp_path)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == 1 and "was not made by this script" in output and not (repo / "started0").exists()


def test_an_active_python_with_the_requirements_is_used(repo):
    p = train_once(repo, repo)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == 0 and not (repo / ".venv").exists() and "Python:" not in output
    assert Path(facts(repo)["python"]).parent == Path(sys.executable).parent


@pytest.mark.parametrize(
    "have, requirement, fits",
    [
        ("2.13.0+cpu", "==2.13.0", True),
        ("2.11.0", "==2.13.0", False),
        ("2.11.0a0+4f8e2b.nv26.02", ">=2.11", True),
        ("2.0", ">=2.0.0", True),
        ("1.10", ">=1.9", True),
        ("1.9", ">=1.10", False),
        ("4.51.3", ">=4.51,<5", True),
        ("5.0", ">=4.51,<5", False),
        ("1.0", '; python_version >= "3.8"', True),
        ("1.0", "", True),
        (None, "", False),
        (None, "; python_version < '3.8'", True),
        (None, f"; sys_platform == '{sys.platform}' and platform_machine == 'of old'", True),
        (None, f"; sys_platform == '{sys.platform}' and platform_machine != 'of old'", False),
    ],
)
def test_requirements_check(repo, tmp_path, have, requirement, fits):
    if have:
        info = tmp_path / "site" / "some_thing.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: some-thing\nVersion: {have}\n")
        info.rename(info.with_name(f"some_thing-{have}.dist-info"))
    (repo / "requirements.txt").write_text(f"some-thing{requirement}\n".replace("'", '"'))
    script = f'ROOT="{repo}"; source "$ROOT/ensure_env.sh"; missing_requirements "{sys.executable}"'
    p = subprocess.run(
        ["bash", "-c", script], env=environment(PYTHONPATH=str(tmp_path / "site")), capture_output=True, text=True
    )
    assert (p.returncode == 0) == fits, p
    assert fits or p.stdout.startswith("some-thing")


def test_a_package_can_have_the_name_of_a_container(repo, tmp_path):
    info = tmp_path / "site" / "pytorch_triton-3.6.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pytorch-triton\nVersion: 3.6.0\n")
    # -S: without the packages of this environment
    script = f"""
        bare_python() {{ "{sys.executable}" -S "$@"; }}
        ROOT="{repo}"; source "$ROOT/ensure_env.sh"; missing_requirements bare_python
    """
    for requirement, fits in (("triton>=3.6", True), ("triton>=3.7", False)):
        (repo / "requirements.txt").write_text(requirement)
        p = subprocess.run(
            ["bash", "-c", script], env=environment(PYTHONPATH=str(tmp_path / "site")), capture_output=True
        )
        assert (p.returncode == 0) == fits, p


def test_run_tests_passes_arguments_and_exit_code(repo):
    (repo / "test_it.py").write_text(
        "import os\n\ndef test_good():\n    assert os.environ['HF_HUB_OFFLINE'] == '1'\n\n"
        "def test_bad():\n    assert False\n"
    )
    for chosen, code in (("good", 0), ("bad", 1)):
        p = subprocess.run(
            [str(repo / "run_tests.sh"), "-k", chosen, "-p", "no:cacheprovider"],
            cwd="/",
            env=environment(PYTHON=sys.executable),
            capture_output=True,
            text=True,
        )
        assert p.returncode == code and "1 deselected" in p.stdout, p


@pytest.mark.parametrize("failing, code", [("none", 0), ("unit_tests", 1), ("integration_tests", 1)])
def test_the_whole_suite_runs_in_two_parts(repo, failing, code):
    """A failure of either part is one of the whole; the second part runs in any case."""
    python = repo / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >>calls\n[[ "$*" != *"{failing}"* ]] || exit 5\n')
    python.chmod(0o755)
    p = subprocess.run([str(repo / "run_tests.sh")], cwd="/", env=environment(PYTHON=str(python)))
    calls = (repo / "calls").read_text().splitlines()
    assert p.returncode == code and ["tests/unit_tests" in c for c in calls] == [True, False]
    assert all(f"tests/{kind}" in " ".join(calls) for kind in FOLDERS)


FOLDERS = [path.name for path in sorted((ROOT / "tests").glob("*_tests"))]
COMMANDS = ["-m ruff format --check .", "-m ruff check .", "-m pytest -k name"]


@pytest.mark.parametrize("failing, num_started", [("none", 3), ("format", 1), ("ruff check", 2), ("pytest", 3)])
def test_ci_checks_the_format_then_lints_then_tests(repo, failing, num_started):
    python = repo / "python"
    python.write_text(f'#!/bin/bash\necho "$@" >>calls\n[[ "$*" != *"{failing}"* ]] || exit 5\n')
    python.chmod(0o755)
    p = subprocess.run(
        [str(repo / ".ci/run"), "-k", "name"],
        cwd="/",
        env=environment(PYTHON=str(python)),
        capture_output=True,
        text=True,
    )
    assert (repo / "calls").read_text().splitlines() == COMMANDS[:num_started], p
    assert (p.returncode == 0) == (failing == "none") and (failing != "pytest" or p.returncode == 5)
    assert ("CI took 0 min" in p.stdout) == (num_started == 3)


SRUN = """#!/bin/bash
# One node's share of the step: the task gets the signals that srun gets.
printf '%s\\n' "$@" >srun.args
while [[ $1 == --* ]]; do shift; done
NGPU=1 "$@" &
task=$!
trap 'kill -USR2 $task' USR2
wait $task; code=$?
[ $code -le 128 ] || { wait $task; code=$?; }
exit $code
"""
SCONTROL = """#!/bin/bash
echo "$@" >>scontrol.args
[ "$1 $2" != "show hostnames" ] || printf 'node07\\nnode08\\n'
"""
TORCHRUN = """#!/bin/bash
# In place of the interpreter: torchrun would wait for the second node.
case "$*" in
    *titan_video.launch*) printf '%s\\n' "$@" >torchrun.args; exec python3 "${0%/*}/train.py" ;;
    *titan_video.run_status*) printf '%s\\n' "$@" >status.args; echo $STATUS ;;
esac
"""


@pytest.mark.parametrize(
    "signalled, status, code, requeued",
    [
        (True, "stopped 85 0", 85, True),
        (True, "stopped 85 2", 85, True),
        (True, "stopped 85 3", 85, False),  # starts that saved nothing: the next one would not, either
        (True, "failed 1 0", 1, False),
        (False, "failed 1 0", 1, False),
        (False, "unknown 1 0", 1, False),
        (False, "finished 0 0", 5, False),  # a node failed after the run
    ],
)
def test_slurm_script(repo, signalled, status, code, requeued):
    tools = repo / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (repo / "python").write_text(TORCHRUN)
    (repo / "python").chmod(0o755)
    if not signalled:
        (repo / "train.py").write_text("import sys; sys.exit(5)")
    env = environment(
        PYTHON=str(repo / "python"),
        SLURM_SUBMIT_DIR=str(repo),
        SLURM_JOB_ID="4321",
        SLURM_JOB_NODELIST="node[07-08]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_RESTART_COUNT="4",
        STATUS=status,
    )
    env["PATH"] = f"{tools}:{env['PATH']}"
    # Slurm runs a copy of the script from its spool folder.
    spool = repo.parent / "slurm_script"
    shutil.copy(repo / "multinode_trainer.slurm", spool)
    p = start_program(["bash", str(spool), "--training.steps", "9 9"], cwd=repo, env=env, **PIPES)
    if signalled:
        facts(repo)
        p.send_signal(signal.SIGUSR2)
    output, _ = p.communicate(timeout=30)
    assert p.returncode == code, output
    asked = (repo / "scontrol.args").read_text().splitlines()
    assert asked == ["show hostnames node[07-08]", *(["requeue 4321"] if requeued else [])]
    assert ("not queued again" in output) == (signalled and not requeued)
    asked = (repo / "status.args").read_text().splitlines()
    assert asked[1:] == "titan_video.run_status --job.config_file train_configs/shapes.toml".split() + [
        "--training.steps",
        "9 9",
    ]
    words = (repo / "torchrun.args").read_text().splitlines()
    options = dict(zip(words, words[1:], strict=False))
    assert (options["--nnodes"], options["--nproc_per_node"], options["--rdzv_backend"]) == ("2", "1", "c10d")
    assert (options["--rdzv_id"], options["--rdzv_endpoint"]) == ("4321.4", f"node07:{29500 + 321}")
    assert words[-4:] == ["--job.config_file", "train_configs/shapes.toml", "--training.steps", "9 9"]
    if signalled:
        assert (repo / "saved0").exists()


SQUEUE = """#!/bin/bash
[[ "$*" == "--noheader --jobs 4321 --format %o" ]] && echo "$ORIGINAL --training.steps 9"
"""


def submit(repo, cwd, *args, **env):
    """Run the script as Slurm does, on a node whose train.py ends at once; returns its output and train.py's words."""
    tools = repo / "tools"
    tools.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (repo / "python").write_text(TORCHRUN)
    (repo / "python").chmod(0o755)
    (repo / "train.py").write_text("")
    spool = repo.parent / "spool"
    spool.mkdir(exist_ok=True)
    shutil.copy(repo / "multinode_trainer.slurm", spool / "slurm_script")
    env = environment(
        PYTHON=str(repo / "python"),
        SLURM_SUBMIT_DIR=str(cwd),
        SLURM_JOB_ID="4321",
        SLURM_JOB_NODELIST="node[07-08]",
        SLURM_JOB_NUM_NODES="2",
        STATUS="finished 0 0",
        **{"ORIGINAL": str(repo / "multinode_trainer.slurm"), **env},
    )
    env["PATH"] = f"{tools}:{env['PATH']}"
    p = subprocess.run(["bash", str(spool / "slurm_script"), *args], cwd=cwd, env=env, timeout=60, **PIPES)
    seen = [cwd / "torchrun.args", cwd / "status.args"]
    words = [path.read_text().splitlines() for path in seen if path.exists()]
    for path in seen:
        path.unlink(missing_ok=True)
    return p, [w[w.index("--job.config_file") :] for w in words]


def test_sbatch_from_any_folder(repo, tmp_path):
    """The script's own repository is used, also from the folder of another one; paths are relative to that folder."""
    cwd = tmp_path / "work"
    cwd.mkdir()
    p, (run, status) = submit(repo, cwd, "--training.steps", "9")
    assert p.returncode == 0, p.stdout
    assert run == status == ["--job.config_file", f"{repo}/train_configs/shapes.toml", "--training.steps", "9"]
    (cwd / "ensure_env.sh").write_text("echo another repository; exit 3\n")
    (cwd / "my.toml").touch()
    p, (run, status) = submit(repo, cwd, CONFIG_FILE="my.toml")
    assert p.returncode == 0 and run == status == ["--job.config_file", "my.toml"], p.stdout
    (cwd / "ensure_env.sh").unlink()
    p, words = submit(repo, cwd, ORIGINAL="/moved/multinode_trainer.slurm")
    assert p.returncode == 1 and not words and "error: the repository is not found" in p.stdout


def test_tasks_of_an_array_take_their_line(repo, tmp_path):
    lines = (
        "--optimizer.lr 1e-4\r\n# a comment\n--data.buckets '[[17, 64, 64]]' --job.description=\"two $HOME words\"\n"
    )
    (tmp_path / "sweep.txt").write_text(lines + "--job.dump_folder mine --optimizer.lr 3e-4\n--job.description 'open\n")
    toml = ["--job.config_file", f"{repo}/train_configs/shapes.toml"]

    def task(number, *args, **env):
        return submit(repo, tmp_path, *args, SLURM_ARRAY_TASK_ID=str(number), **env)

    env = {"OPTIONS_FILE": "sweep.txt"}
    folder = "--job.dump_folder"
    p, (run, status) = task(1, "--training.steps", "9", **env)
    assert p.returncode == 0, p.stdout
    assert run == status == [*toml, "--training.steps", "9", folder, "outputs/sweep/1", "--optimizer.lr", "1e-4"]
    _, (run, _) = task(3, folder, "there/x", **env)
    buckets = ["--data.buckets", "[[17, 64, 64]]", "--job.description=two $HOME words"]
    assert run == [*toml, folder, "there/x", folder, "there/x/3", *buckets]
    _, (run, _) = task(4, f"{folder}=there", **env)
    assert run[2:5] == [f"{folder}=there", folder, "there/4"] and run[5:] == [folder, "mine", "--optimizer.lr", "3e-4"]
    for number, given, message in (
        (2, env, "has no options on line 2"),
        (9, env, "has no options on line 9"),
        (5, env, "line 5 of sweep.txt has an open quote"),
        (1, {"OPTIONS_FILE": "none.txt"}, "OPTIONS_FILE=none.txt is not a readable file"),
        (1, {}, "a job array needs OPTIONS_FILE"),
    ):
        p, words = task(number, **given)
        assert p.returncode == 1 and message in p.stdout and not words, p.stdout


def test_tomls_of_several_machines_say_how_to_submit_them():
    for path in (ROOT / "train_configs").glob("*.toml"):
        head = path.read_text().partition("[job]")[0]
        ranks = int(head.split()[3])
        command = f"#   CONFIG_FILE=train_configs/{path.name} sbatch --nodes={ranks // 8} multinode_trainer.slurm "
        assert (command in head) == (ranks > 8), path


def test_a_mistake_is_reported_before_torchrun_starts(repo, tmp_path):
    process = start(repo, "--refuse", NGPU="2", TMPDIR=str(tmp_path))
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "refused for 2 ranks: ['--job.config_file', 'train_configs/shapes.toml', '--refuse']" in output
    assert "Traceback" not in output and "The output of all ranks" not in output and not list(repo.glob("started*"))
    assert not list(tmp_path.glob("titan_video.*"))
