"""[float8]: the section of the optional part `titan_video/distributed/float8.py`."""

from dataclasses import dataclass
from typing import Literal

from titan_video.config.option import opt


@dataclass(frozen=True)
class Float8:
    enable: bool = opt(
        False, "Run the matmuls of the blocks' Linears in float8, with torchao. Needs compute capability 8.9 or more."
    )
    recipe_name: Literal["tensorwise", "rowwise"] = opt(
        "tensorwise", "Scaling: one scale per tensor, or one per row and column of a matmul."
    )
    filter_fqns: tuple[str, ...] = opt(
        ("modulation",), "Linears are not converted if their dotted name contains one of these strings."
    )
    emulate: bool = opt(False, "Round to float8 but multiply in the original type. For tests, on any device.")
