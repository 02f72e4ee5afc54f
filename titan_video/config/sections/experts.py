"""[experts]: the section of the optional part `titan_video/training/expert_balance.py`."""

from dataclasses import dataclass

from titan_video.config.option import opt


@dataclass(frozen=True)
class Experts:
    balance_rate: float = opt(
        1e-3,
        "Flavors with experts that tokens choose: after each optimizer step the bias by which an expert is chosen goes "
        "up by this number if it had fewer tokens than the mean, down if it had more. 0: no balancing.",
        ge=0,
    )
