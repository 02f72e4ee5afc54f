"""Two small programs.

python -m titan_video.config > docs/config.md
    Print the reference page. It is made from the dataclasses alone.
python -m titan_video.config check WORLD_SIZE [arguments of train.py]
    Exit with 1 and a message if a run on this number of ranks would be refused.
"""

import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import get_args, get_type_hints

from titan_video.config.values import default_text, describe, get_limits, sections

HEAD = """# Configuration

One TOML file describes a run; `--section.field value` on the command line overrides it. Every field has a default. An
unknown name, a wrong type or an illegal combination stops the run before it starts. The resolved TOML is written beside
the checkpoints. `./run_train.sh --help` prints this list.

    python train.py --job.config_file train_configs/debug.toml --training.steps 100 --data.buckets "[[17, 64, 64]]"

Generated from `titan_video/config/job_config.py` by `python -m titan_video.config > docs/config.md`; do not edit.
"""


def markdown() -> str:
    """The page: one table per section, and one per table inside a section."""
    parts = [HEAD]
    for section, cls in sections().items():
        parts += [f"\n## [{section}]\n\n", _table(cls)]
        for name, kind in get_type_hints(cls).items():
            if get_args(kind) and is_dataclass(get_args(kind)[0]):
                parts += [f"\n### [[{section}.{name}]]\n\n", _table(get_args(kind)[0])]
    return "".join(parts)


def _table(cls: type) -> str:
    """One row per field of a dataclass."""
    kinds = get_type_hints(cls)
    rows = [
        (f.name, describe(kinds[f.name], get_limits(f)), f"`{default_text(f)}`", f.metadata["help"])
        for f in fields(cls)
    ]
    return "| field | legal | default | meaning |\n|---|---|---|---|\n" + "".join(_row(row) for row in rows)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    if sys.argv[1:2] == ["check"]:
        from titan_video.launch import check_run  # and torch, without which the page is printed

        check_run(sys.argv[3:], world_size=int(sys.argv[2]))
    else:
        print(markdown(), end="")
