"""What a run was started with, and keeps when it is resumed.

Options came that change what a clip or a text is encoded to, and their defaults follow the models' own code. A run that
was started before such an option, or with another value, goes on as it was: its checkpoints were trained on that, and
its cache holds it. A run also keeps the parametrization for which its weights were drawn. The resolved TOML in its dump
folder says which; an option that is not there did not exist.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from titan_video.config.job_config import JobConfig
from titan_video.config.manager import from_dict, read_file
from titan_video.tools.logging import logger


@dataclass(frozen=True)
class KeptOption:
    """option: `section.field`. before: what runs did before the option existed. matters: whether it does in a run.

    is_fixed: no other value is accepted later; else one that is not the default applies.
    """

    option: str
    before: Any
    matters: Callable[[JobConfig], bool]
    is_fixed: bool = True


KEPT = (
    KeptOption("encoder.clip_resize", "crop", lambda c: c.encoder.name == "wan"),
    # Is older than this table; shipped TOMLs set it now.
    KeptOption("encoder.vae_tiling", False, lambda c: not c.encoder.name.startswith("debug")),
    KeptOption("encoder.vae_temporal_tiling", True, lambda c: c.encoder.name == "hunyuan_video"),
    KeptOption("data.media_rules", 1, lambda c: not c.data.path.startswith("embedded:")),
    KeptOption("optimizer.parametrization", "standard", lambda c: True),
    KeptOption("optimizer.base_flavor", "", lambda c: True),
    KeptOption("data.image_dropout", 0.0, lambda c: c.model.name == "hunyuan_video"),
    KeptOption("training.guidance", 1.0, lambda c: c.model.name == "hunyuan_video"),  # shipped TOMLs set 6 now
    KeptOption(
        "validation.negative_prompt",
        "",
        lambda c: c.validation.enable and c.validation.guidance_scale != 1 and not c.encoder.name.startswith("debug"),
        is_fixed=False,
    ),
)


def load_run(path: Path) -> JobConfig:
    """The resolved TOML of a run; options that it lacks have the value that stood for them then. Raises ConfigError."""
    tables = read_file(path)
    for kept in KEPT:
        section, _, name = kept.option.partition(".")
        table = tables.setdefault(section, {})
        if isinstance(table, dict):
            table.setdefault(name, kept.before)
    return from_dict(tables)


def as_started(config: JobConfig) -> JobConfig:
    """`config`, with what the run in job.dump_folder keeps if that has a checkpoint; one notice for each option.

    Raises ConfigError where the run's resolved TOML cannot be read.
    """
    folder = Path(config.job.dump_folder)
    is_resumed = config.checkpoint.enable and any((folder / config.checkpoint.folder).glob("step-*"))
    if not is_resumed or not (folder / "config.toml").is_file():
        return config
    run = load_run(folder / "config.toml")
    for kept in KEPT:
        section, _, name = kept.option.partition(".")
        now, then = (getattr(getattr(c, section), name) for c in (config, run))
        default = getattr(getattr(JobConfig(), section), name)
        if now == then or not kept.matters(config) or not (kept.is_fixed or now == default):
            continue
        logger.warning(
            f"{kept.option} stays {_shown(then)}, with which {folder} was started, and is not {_shown(now)}; to change "
            f"it, start a new run: another job.dump_folder"
        )
        config = replace(config, **{section: replace(getattr(config, section), **{name: then})})
    return config


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)
