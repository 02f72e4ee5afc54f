"""The run's log lines, and a progress bar that they do not break."""

import logging
import os
import sys

from tqdm import tqdm

logger = logging.getLogger()

COLORS = {"red": 31, "green": 32, "yellow": 33, "blue": 34, "magenta": 35, "cyan": 36}
TIME, FORMATS = "%m-%d %H:%M:%S", ("%(message)s", "%(levelname)s %(message)s")  # below and from level WARNING
MAX_COLUMNS, PREFIX_COLUMNS = 120, len("[titan] 12-31 23:59:59 ")  # of a line of a step, and of what is before it


def paint(text: str, color: str) -> str:
    """`text` in a colour of COLORS on a terminal, else, or in another colour, unchanged."""
    return f"\033[{COLORS[color]}m{text}\033[0m" if color in COLORS and sys.stdout.isatty() else text


class _Handler(logging.Handler):
    """prefix: of every line."""

    def __init__(self, prefix: str = "[titan] "):
        super().__init__()
        self.formats = [logging.Formatter(f"{prefix}%(asctime)s {text}", TIME) for text in FORMATS]

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.formats[record.levelno >= logging.WARNING].format(record)
            if record.levelno >= logging.WARNING:
                line = paint(line, "red" if record.levelno >= logging.ERROR else "yellow")
            # Removes the bar from the terminal, writes, and draws it again; without a bar it only writes.
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # the log's own disk is full: the run does not depend on it
            pass
        except Exception:
            self.handleError(record)


def init_logger() -> None:
    """Send the root logger's lines, from level INFO, to standard output. A second call changes nothing.

    The launcher's LOG_RANK selects the local ranks to show, and labels their lines with the global rank. Of the local
    ranks 0 of several machines only the first one has lines of level INFO.
    """
    if any(isinstance(h, _Handler) for h in logger.handlers):
        return
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    # torchrun puts [rankN] before each line.
    logger.addHandler(_Handler("" if "TORCHELASTIC_RUN_ID" in os.environ else "[titan] "))
    logger.setLevel(logging.WARNING if local_rank == "0" and rank != "0" else logging.INFO)
    # torchao, which diffusers imports too, warns at import about features that are not used here.
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


class Progress:
    """A progress bar of `total` steps, the first `initial` already done. It is shown on terminals only.

    enabled: true on the rank that shows it.
    """

    def __init__(self, total: int, initial: int = 0, enabled: bool = True):
        shown = enabled and sys.stdout.isatty() and sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=initial, unit="step", dynamic_ncols=True, disable=not shown)

    def update(self, step: int, postfix: str = "") -> None:
        """Move to `step` (the number of steps done), with a short text after the bar."""
        self._bar.set_postfix_str(postfix, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()
