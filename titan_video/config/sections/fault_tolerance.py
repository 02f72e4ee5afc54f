"""[fault_tolerance]: signals, and steps whose numbers are wrong."""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.option import opt


@dataclass(frozen=True)
class FaultTolerance:
    save_on_signal: bool = opt(
        True,
        "SIGTERM, SIGINT (Ctrl-C), SIGUSR2 and SIGHUP save after the current step and stop; a second one stops at "
        "once. false: they end the run without saving.",
    )
    nonfinite: Literal["stop", "skip", "rollback"] = opt(
        "stop",
        "After a loss or gradient that is not finite: stop the run, skip the update, or load the last checkpoint and "
        "train on with the clips after the bad ones.",
    )
    max_nonfinite_steps: int = opt(10, "The run stops after this many skipped updates in a row.", ge=1)
    max_rollbacks: int = opt(3, "The run stops at the fault after this many rollbacks, counted over the run.", ge=1)
    spike_deviations: float = opt(
        0.0,
        "Skip the update of a step whose loss or gradient norm is above the median of the last good steps by more than "
        "this many robust deviations; 0: never. Try 10.",
        ge=0,
    )
    spike_window: int = opt(
        100, "Good steps from which median and deviation are taken. None is skipped before there are as many.", ge=8
    )
