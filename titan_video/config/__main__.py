"""Two small programs.

python -m titan_video.config > docs/config.md
    Print the reference page. It is made from the dataclasses alone.
python -m titan_video.config check WORLD_SIZE [arguments of train.py]
    Exit with 1 and a message if a run on this number of ranks would be refused.
"""

import sys
import typing
from collections.abc import Iterable
from dataclasses import fields, is_dataclass

from titan_video.config.check import check
from titan_video.config.manager import main_guard, parse_args
from titan_video.config.values import default_text, describe, get_limits, options, sections
from titan_video.distributed.parallel_dims import check_layout
from titan_video.models import get_args, get_spec

HEAD = """# Configuration

One TOML file describes a run; `--section.field value` on the command line overrides it. Every field has a default. An
unknown name, a wrong type or an illegal combination stops the run before it starts. The resolved TOML is written beside
the checkpoints. `./run_train.sh --help` prints this list.

    python train.py --job.config_file train_configs/debug.toml --training.steps 100 --data.buckets "[[17, 64, 64]]"

Generated from `titan_video/config/job_config.py` by `python -m titan_video.config > docs/config.md`; do not edit.
"""


def markdown() -> str:
    """The page: one table per section."""
    parts = [HEAD]
    for section in sections():
        parts.append(f"\n## [{section}]\n\n| field | legal | default | meaning |\n|---|---|---|---|\n")
        tables: dict[str, type] = {}
        for full, (kind, f) in options().items():
            if full.startswith(f"{section}."):
                cells = f.name, describe(kind, get_limits(f)), f"`{default_text(f)}`", f.metadata["help"]
                parts.append(_row(cells))
                if typing.get_args(kind) and is_dataclass(typing.get_args(kind)[0]):
                    tables[full] = typing.get_args(kind)[0]
        for full, item in tables.items():
            parts.append(f"\n### [[{full}]]\n\n| field | legal | default | meaning |\n|---|---|---|---|\n")
            kinds = typing.get_type_hints(item)
            parts += [
                _row((f.name, describe(kinds[f.name], get_limits(f)), f"`{default_text(f)}`", f.metadata["help"]))
                for f in fields(item)
            ]
    return "".join(parts)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        with main_guard():
            config, world_size = parse_args(sys.argv[3:]), int(sys.argv[2])
            check(config, world_size)
        try:
            args = get_args(
                get_spec(config.model.name),
                config.model.flavor,
                config.model.hf_assets_path,
                config.encoder.max_text_length,
            )
            check_layout(config.parallelism, args, world_size)
        except ValueError as e:
            sys.exit(f"error: {e}")
    else:
        print(markdown(), end="")
