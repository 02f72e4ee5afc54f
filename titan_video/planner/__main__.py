"""The fastest layout of a job on a cluster, with its reasons.

    python -m titan_video.planner CONFIG.toml --cluster h100x64 [--out DIR] [--explain [tp=8]] [--what-if tp=8]
        [--fix pp=1] [--room 5] [--allow offload,8bit,host-state] [--shares 81x480x832=0.7,1x480x832=0.3]
        [--section.field value ...]
    python -m titan_video.planner profile ...        measures the machine that it runs on: see profile/machine.py

Nothing is read but the TOMLs, and with model.flavor hf the folder's config.json. --out gets plan.toml, which the
trainer loads, plans.md and plans.csv, plan.json and plan.html, timeline.json. What is modelled: docs/planner.md.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from titan_video.config.manager import main_guard, parse_args, read_file
from titan_video.planner import cluster
from titan_video.planner.plan import ALLOWED, Job, Planned, as_it_is, make_plan, smallest_change
from titan_video.planner.report.files import Source, headline, write
from titan_video.planner.report.table import to_markdown
from titan_video.planner.search.explain import compare, rejections, why_not
from titan_video.planner.search.space import parse_fixed
from titan_video.tools.parts import resolve

ALL = "all"  # --explain without a value


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of the planner itself, and the rest, which overrides the TOML."""
    about = "The fastest layout of a job on a cluster, with its reasons. --section.field VALUE overrides the TOML."
    parser = argparse.ArgumentParser(prog="python -m titan_video.planner", description=about, allow_abbrev=False)
    parser.add_argument("config", type=Path, help="TOML of the run")
    parser.add_argument("--cluster", required=True, help="TOML of the cluster, or a name in train_configs/clusters")
    parser.add_argument("--out", type=Path, help="folder of plan.toml, plans.md, plans.csv, plan.html, timeline.json")
    parser.add_argument(
        "--explain",
        nargs="?",
        const=ALL,
        metavar="NAME=VALUE,...",
        help="what became of all candidates, or why those with these values are not the plan",
    )
    parser.add_argument("--fix", default="", metavar="NAME=VALUE,...", help="values that every plan must have")
    parser.add_argument("--what-if", metavar="NAME=VALUE,...", help="the best plan with these values, beside the best")
    parser.add_argument(
        "--allow", default="", help=f"what a plan may use even if it fits without: {', '.join(ALLOWED)}"
    )
    parser.add_argument("--room", type=float, default=0.0, help="GiB of a GPU to leave free, beside the reserve")
    parser.add_argument("--shares", default="", help="of micro-batches, by bucket; default: equal")
    parser.add_argument("--most", type=int, default=12, help="rows of the printed table")
    parser.add_argument("--no-page", action="store_true", help="no plan.html, whose figures need matplotlib")
    return parser.parse_known_args(argv)


def parse_shares(text: str) -> dict[tuple[int, ...], float] | None:
    """{bucket: share} of "81x480x832=0.7,1x480x832=0.3"; None of "". ValueError: another form, or not summing to 1."""
    if not text:
        return None
    shares: dict[tuple[int, ...], float] = {}
    for part in text.split(","):
        bucket, _, share = part.partition("=")
        sizes = bucket.strip().split("x")
        try:
            shares[tuple(map(int, sizes))] = float(share)
        except ValueError:
            raise ValueError(f"--shares: given {part!r}; legal: FRAMESxHEIGHTxWIDTH=SHARE") from None
    if abs(sum(shares.values()) - 1) > 1e-6 or min(shares.values()) <= 0:
        raise ValueError(
            f"--shares: given {text}, which sum to {sum(shares.values()):g}; legal: positive, summing to 1"
        )
    return shares


def parse_allow(text: str) -> frozenset[str]:
    names = frozenset(name for name in text.replace(" ", "").split(",") if name)
    if unknown := names - set(ALLOWED):
        raise ValueError(f"--allow: given {', '.join(sorted(unknown))}; legal: {', '.join(ALLOWED)}")
    return names


def show(planned: Planned, options: argparse.Namespace) -> str:
    lines = [headline(planned), "", to_markdown(planned.result, options.most)]
    own = as_it_is(planned.job, planned.model)
    if isinstance(own, str):
        lines.append(f"As the TOML is: {own}")
    else:
        lines += ["As the TOML is:", *compare(own, planned.result.chosen)]
    if planned.needed:
        lines.append(f"Without {' and '.join(planned.needed)} nothing fits.\n")
    return "\n".join([*lines, *explained(planned, options.explain)])


def explained(planned: Planned, asked: str | None) -> list[str]:
    """What --explain asks for."""
    if not asked:
        return []
    return rejections(planned.space, planned.result) if asked == ALL else why(planned, asked, "--explain")


def why(planned: Planned, text: str, option: str) -> list[str]:
    allow_offload = "offload" in planned.job.allow
    return why_not(planned.model, planned.space, planned.result, parse_fixed(text, option), allow_offload)


def what_if(planned: Planned, text: str) -> list[str]:
    """The best plan with these values, and how it differs from the chosen one."""
    fixed = {**(planned.job.fixed or {}), **parse_fixed(text, "--what-if")}
    other = make_plan(replace(planned.job, fixed=fixed))
    if other.result.chosen is None:
        return why(planned, text, "--what-if")
    lines = [f"with {text}:", *compare(other.result.chosen, planned.result.chosen)]
    return [*lines, f"  binding: {other.result.chosen.binding}"]


def main(argv: list[str]) -> None:
    if argv[:1] == ["profile"]:
        resolve("titan_video.planner.profile.machine:main", "planner profile")(argv[1:])
        return
    options, rest = parse(argv)
    with main_guard():
        config = parse_args(["--job.config_file", str(options.config), *rest])
        if options.most < 1:
            raise ValueError(f"--most: given {options.most}; legal: at least 1")
        for option, text in (("--what-if", options.what_if), ("--explain", options.explain)):
            if text and text != ALL:
                parse_fixed(text, option)
        shares, allow = parse_shares(options.shares), parse_allow(options.allow)
        fixed = parse_fixed(options.fix, "--fix") if options.fix else None
        machine = cluster.with_room(cluster.load(options.cluster), options.room)
        planned = make_plan(Job(config, machine, shares, allow, fixed))
        if planned.result.chosen is None:
            for line in explained(planned, options.explain):
                print(line)
            raise ValueError("\n".join(smallest_change(planned)))
        print(show(planned, options))
        if options.what_if:
            print("\n".join(what_if(planned, options.what_if)))
        if options.out:
            source = Source(str(options.config), read_file(options.config), rest)
            for path in write(planned, source, options.out, page=not options.no_page):
                print(f"wrote {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
