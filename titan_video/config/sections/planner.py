"""The planner beside a run."""

from dataclasses import dataclass

from titan_video.config.option import opt


@dataclass(frozen=True)
class Planner:
    cluster: str = opt(
        "",
        "A cluster's TOML, or its name in train_configs/clusters. After 20 steps the log compares a step "
        "with what the planner predicts for it there.",
    )
