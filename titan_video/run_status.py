"""How the run of a configuration ended: its status, exit code, and starts in a row that have saved no step.

    python -m titan_video.run_status [the arguments of train.py]

Prints these three; `unknown 1 0` if there is no status.json.
"""

import sys
from pathlib import Path

from titan_video.config.manager import main_guard, parse_args
from titan_video.supervision.run_status import read_status


def main(argv: list[str]) -> None:
    with main_guard():
        config = parse_args(argv)
    status = read_status(Path(config.job.dump_folder))
    code = status.get("exit_code")
    print(status.get("status", "unknown"), 1 if code is None else code, status.get("idle_starts", 0))


if __name__ == "__main__":
    main(sys.argv[1:])
