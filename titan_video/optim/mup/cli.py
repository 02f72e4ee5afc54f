"""The commands of `python -m titan_video.mup`."""

import argparse
import math
import re
import shlex
import sys
from pathlib import Path

from titan_video.config.check import check
from titan_video.config.job_config import JobConfig
from titan_video.config.manager import ConfigError, main_guard, parse_args
from titan_video.optim.mup import plot, transfer
from titan_video.optim.mup.coordinate_check import BAR, Finding, Probe, coordinate_check
from titan_video.optim.mup.parametrization import rules
from titan_video.tools.files import atomic_write
from titan_video.tools.logging import init_logger


def parse_rate(word: str) -> float:
    """A rate as 1e-3 or 2^-9."""
    match = re.fullmatch(r"2\^(-?\d+)", word)
    try:
        rate = 2.0 ** int(match[1]) if match else float(word)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise argparse.ArgumentTypeError(f"given {word!r}; legal: a positive number, such as 1e-3 or 2^-9")
    return rate


def parse_width(word: str) -> int:
    if not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"given {word!r}; legal: a positive integer")
    return int(word)


def check_command(options: argparse.Namespace, config: JobConfig) -> int:
    """Prints the slopes; the exit code is 1 if one of them is above the bar."""
    if errors := list(rules(config, world_size=1)):
        raise ConfigError("\n".join(errors))
    probe = Probe(tuple(sorted(set(options.widths))), options.steps, options.seeds, options.layers, options.lr)
    if len(probe.widths) == 1:
        raise ValueError(f"--widths: given {probe.widths[0]}; a slope needs two widths or more")
    found = coordinate_check(config, probe)
    section = config.optimizer
    title = f"{config.model.name} {config.model.flavor}, {section.name}, {section.parametrization}"
    print("\n".join(describe(found, title)))
    if options.plot:
        atomic_write(options.plot, plot.picture(found, title), "picture of the coordinate check")
    layer, step, slope = found.worst()
    result = "passed" if abs(slope) <= BAR else "FAILED"
    print(f"{result}: the worst slope is {slope:+.2f}, of {layer} after step {step}; the bar is {BAR}")
    return int(abs(slope) > BAR)


def describe(found: Finding, title: str) -> list[str]:
    """The table of slopes."""
    num_steps = len(next(iter(found.slopes.values())))
    widths = ", ".join(map(str, found.sizes))
    lines = [f"{title}: slope of log2(mean |{found.measure}|) per doubling of the width ({widths})"]
    size = max(map(len, found.slopes))
    lines.append(" " * size + " ".join(f"{'start' if not k else f'step {k}':>7}" for k in range(num_steps)))
    for layer, slopes in found.slopes.items():
        cells = (" zero" if math.isnan(x) else f"{x:+.2f}" for x in slopes)
        lines.append(f"{layer:{size}}" + " ".join(f"{cell:>7}" for cell in cells))
    return lines


def transfer_command(options: argparse.Namespace, config: JobConfig, argv: list[str]) -> int:
    """Prints the losses; the exit code is 1 if the base's best rate is not near the best one of the model."""
    base, flavor = options.base_flavor or config.optimizer.base_flavor, config.model.flavor
    if not base:
        raise ValueError("optimizer.base_flavor: empty; name the narrow flavor, here or as --base-flavor")
    check(config, options.ranks, files=False)
    runs = options.runs or Path(config.job.dump_folder) / "transfer"
    transfer.check_runs(config, runs, (base, flavor), options.rates)  # of both, before any is made
    if options.print:
        for name in (base, flavor):
            for rate in sorted(options.rates):
                print(shlex.join(transfer.command(config, argv, runs, name, rate, options.ranks)))
        return 0
    narrow, wide = (transfer.sweep(config, argv, runs, name, options.rates, options.ranks) for name in (base, flavor))
    print("\n".join(transfer.report(base, narrow, flavor, wide)))
    return int(not transfer.excess(narrow, wide) <= transfer.TOLERANCE)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m titan_video.mup", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", allow_abbrev=False, help="do activations keep their size over widths?")
    one.add_argument("config", metavar="CONFIG.toml")
    one.add_argument("--widths", type=parse_width, nargs="+", default=(), help="default: four from 64 or one head on")
    one.add_argument("--steps", type=parse_width, default=Probe.steps)
    one.add_argument("--seeds", type=parse_width, default=Probe.seeds, help="models of each width")
    one.add_argument("--layers", type=parse_width, default=Probe.layers, help="blocks of a kind, at most")
    one.add_argument("--lr", type=parse_rate, default=Probe.lr, help="rate at the smallest width, 2^-7 by default")
    one.add_argument("--plot", type=Path, help="file of an SVG picture")
    two = commands.add_parser("transfer", allow_abbrev=False, help="does the base's best rate hold for the model?")
    two.add_argument("config", metavar="CONFIG.toml")
    two.add_argument("--rates", type=parse_rate, nargs="+", required=True, help="such as 2^-9 2^-8 2^-7")
    two.add_argument("--base-flavor", default="", help="default: optimizer.base_flavor; for standard there is none")
    two.add_argument("--runs", type=Path, help="folder of the runs; default: transfer in job.dump_folder")
    two.add_argument("--ranks", type=parse_width, default=1, help="processes of a run on this machine")
    two.add_argument("--print", action="store_true", help="print the commands of the runs and start nothing")
    return parser


def main(argv: list[str]) -> None:
    init_logger()
    options, rest = build_parser().parse_known_args(argv)
    config_argv = ["--job.config_file", options.config, *rest]
    with main_guard():
        config = parse_args(config_argv)
        if options.command == "check":
            code = check_command(options, config)
        else:
            code = transfer_command(options, config, config_argv)
    sys.exit(code)
