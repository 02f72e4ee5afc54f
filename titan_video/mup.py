"""muP (docs/mup.md): `python -m titan_video.mup check CONFIG.toml` and `python -m titan_video.mup transfer CONFIG.toml`.

`--section.field value` overrides the TOML, as in train.py. `check --help` and `transfer --help` have the other options.
"""

import sys

from titan_video.tools.parts import resolve

if __name__ == "__main__":
    resolve("titan_video.optim.mup.cli:main", asked_by="python -m titan_video.mup")(sys.argv[1:])
