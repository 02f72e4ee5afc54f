"""The commands of muP (docs/mup.md).

    python -m titan_video.mup check CONFIG.toml      do activations keep their size over widths?
    python -m titan_video.mup transfer CONFIG.toml   does the rate of the narrow flavor hold?

`--section.field value` overrides the TOML, as in train.py. `check --help` and `transfer --help` have other options.
"""

import sys

from titan_video.tools.parts import resolve

if __name__ == "__main__":
    resolve("titan_video.optim.mup.cli:main", asked_by="python -m titan_video.mup")(sys.argv[1:])
