"""`torchrun` for train.py that checks the configuration first. One process does both, so torch is imported once.

    python -m titan_video.launch [options of torchrun] --no-python [COMMAND ...] PYTHON .../train.py [its arguments]

torchrun would bury a mistake in the configuration under the reports of its ranks. Here a mistake ends the program with
status 1 and the message alone, before torchrun starts.
"""

import sys
from pathlib import Path

from torch.distributed import run as torchrun

from titan_video.config.check import check
from titan_video.config.manager import main_guard, parse_args
from titan_video.distributed.parallel_dims import check_layout
from titan_video.models import get_args, get_spec


def check_run(argv: list[str], world_size: int) -> None:
    """Ends the program with status 1 and a message if train.py would refuse these arguments on `world_size` ranks."""
    with main_guard():
        config = parse_args(argv)
        check(config, world_size)
        spec, text_length = get_spec(config.model.name), config.encoder.max_text_length
        args = get_args(spec, config.model.flavor, config.model.hf_assets_path, text_length)
        check_layout(config.parallelism, args, config.encoder.num_training_ranks(world_size))


def main(argv: list[str]) -> None:
    options = torchrun.parse_args(argv)
    names = [Path(word).name for word in options.training_script_args]
    train_args = options.training_script_args[names.index("train.py") + 1 :]
    check_run(train_args, int(options.nnodes) * int(options.nproc_per_node))
    torchrun.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
