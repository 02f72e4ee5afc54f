"""Configuration: sections (`job_config.py`), TOML and command line (`manager.py`), rules across fields (`check.py`)."""

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import ConfigError, dump, from_dict, load, main_guard, parse, parse_args

__all__ = ["ConfigError", "JobConfig", "dump", "from_dict", "load", "main_guard", "parse", "parse_args"]
