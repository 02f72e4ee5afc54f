"""torch's flight recorder: each rank keeps its last collectives in memory, and writes them to a file at a timeout.

[comm] trace_buf_size       number of collectives that a rank keeps; 0 turns the recorder off
       save_traces_folder   folder of the files rank_0, rank_1, ..., inside job.dump_folder

`python -m torch.distributed.flight_recorder.fr_trace -p rank_ FOLDER` compares the files, and names the collective in
which the ranks differ.
"""

import os
from pathlib import Path

from titan_video.config.job_config import Comm
from titan_video.tools.files import writing
from titan_video.tools.logging import logger

# Variables that torch's ProcessGroupNCCL and FlightRecorder read. A name of torch before 2.8 is still read, with less
# priority, so it must not be hidden by a value of ours for the new name.
BUFFER_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
FILE_PREFIX = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
DUMP_ON_TIMEOUT = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)


def start(section: Comm, dump_folder: str | Path) -> None:
    """Set the recorder's variables. Call it before the process group is made, which reads them once.

    A variable that the user's environment sets keeps its value.
    """
    size = int(_set_default(BUFFER_SIZE, str(section.trace_buf_size)))
    if size == 0:
        return
    _set_default(DUMP_ON_TIMEOUT, "1")
    folder = (Path(dump_folder) / section.save_traces_folder).absolute()
    prefix = _set_default(FILE_PREFIX, f"{folder}/rank_")
    with writing("traces of collectives", prefix):
        Path(prefix).parent.mkdir(parents=True, exist_ok=True)  # torch does not make it
    logger.info(f"at a timeout each rank writes its last {size:,} collectives to {prefix}RANK")


def _set_default(names: tuple[str, ...], value: str) -> str:
    """The value of the first variable that is set; where none is, the first becomes `value`."""
    found = next((os.environ[name] for name in names if name in os.environ), None)
    if found is None:
        os.environ[names[0]] = found = value
    return found
