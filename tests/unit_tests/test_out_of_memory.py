"""What an out-of-memory error says, and the table of dry runs that it quotes (planner/ladder.py)."""

import json
import shlex
from dataclasses import replace

import pytest
import torch

from tests.helpers import ROOT
from titan_video.config.manager import parse_args
from titan_video.models import get_spec
from titan_video.planner import ladder as planner_ladder
from titan_video.planner.dry_run.describe import GIB
from titan_video.planner.dry_run.run import dry_run
from titan_video.training.out_of_memory import TABLE, explain, ladder

DEBUG = ["--job.config_file", str(ROOT / "train_configs" / "debug.toml")]
SMALL = ["--data.buckets", "[[9,32,32]]", "--training.local_batch_size", "2"]
ERROR = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore words")
ONLINE = ["--encoder.placement", "colocated", "--encoder.offload_policy", "keep"]
HSDP = ["--parallelism.data_parallel_replicate_degree", "2"]
FULL = ["--activation_checkpoint.mode", "full"]
RANGE = ["--activation_checkpoint.range", '[{layers = "1", mode = "none"}]']


def proposals(*options):
    return [overrides for overrides, _ in ladder(parse_args([*DEBUG, *options]))]


def explained(tmp_path, *options):
    config = parse_args([*DEBUG, "--job.dump_folder", str(tmp_path), *options])
    return explain(ERROR, config, step=7, bucket="9x64x64").splitlines()


@pytest.mark.parametrize("options", [[], ONLINE, HSDP, FULL, RANGE], ids=["debug", "online", "hsdp", "full", "range"])
def test_every_proposal_is_a_change_that_the_command_line_takes(options):
    config = parse_args([*DEBUG, *options])
    changed = [parse_args([*DEBUG, *options, *shlex.split(overrides)]) for overrides in proposals(*options)]
    assert len(changed) >= 5
    assert config not in changed and len(set(map(str, changed))) == len(changed)


def test_only_what_is_not_used_yet_is_proposed():
    assert proposals()[0] == "--activation_checkpoint.mode selective"
    assert proposals(*ONLINE)[0] == "--encoder.offload_policy offload"
    assert proposals(*FULL)[0] == "--activation_checkpoint.mode full --activation_checkpoint.offload"
    assert "--parallelism.data_parallel_replicate_degree 1" in proposals(*HSDP)
    every_block = "--activation_checkpoint.range [] --activation_checkpoint.mode"
    assert proposals(*FULL, *RANGE)[:2] == [f"{every_block} selective", f"{every_block} full"]
    small = [overrides for overrides in proposals("--lora.enable") if overrides not in proposals()]
    assert small == ["--lora.base_dtype int8", "--training.swap_blocks 16"]
    assert not {*small, "--training.enable_cpu_offload"} & {
        *proposals("--lora.enable", "--lora.base_dtype", "int8", "--training.swap_blocks", "3")
    }
    assert "--training.local_batch_size 16" in proposals()
    everything = [
        *FULL,
        "--activation_checkpoint.offload",
        *("--training.local_batch_size", "1"),
        *("--optimizer.name", "AdamW8bit"),
        "--training.enable_cpu_offload",
    ]
    assert proposals(*everything) == ["--parallelism.context_parallel_degree 2"]
    assert not any("batch_size" in overrides for overrides in proposals("--data.tokens_per_microbatch", "4096"))


def test_the_message_without_a_table(tmp_path):
    first, second, *proposed, last = explained(tmp_path)
    assert first == "out of memory in step 7, clips of 9x64x64: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert second == "What needs less memory, cheapest first:"
    assert [line.split(" (")[0].strip() for line in proposed] == proposals()
    assert f"--out {tmp_path}`" in last and "titan_video.planner.ladder" in last


@pytest.mark.parametrize("content", ["", "{", "\x00"], ids=["empty", "cut", "binary"])
def test_a_damaged_table_is_as_none(tmp_path, content):
    without = explained(tmp_path)
    (tmp_path / TABLE).write_text(content)
    assert explained(tmp_path) == without


def test_the_message_quotes_the_table(tmp_path):
    (tmp_path / TABLE).write_text(json.dumps({"": 99.0, "--activation_checkpoint.mode full": 41.26}))
    lines = explained(tmp_path)
    quoted = [line for line in lines if "GiB by the dry run" in line]
    assert len(quoted) == 1 and quoted[0].startswith("  --activation_checkpoint.mode full   41.3 GiB by the dry run;")
    assert not any("planner.ladder" in line for line in lines)


@pytest.fixture
def dry_runs(monkeypatch):
    """{(configuration, ranks, rank): bytes} of the ladder's dry runs, of a model of two blocks."""
    flavors, found = get_spec("wan").flavors, {}
    monkeypatch.setitem(flavors, "debug", replace(flavors["debug"], num_layers=2))

    def noted(config, world_size, rank):
        result = dry_run(config, world_size, rank)
        found[str(config), world_size, rank] = result.total
        return result

    monkeypatch.setattr(planner_ladder, "dry_run", noted)
    return found


def test_the_planner_fills_the_table(tmp_path, capsys, dry_runs):
    used = [*SMALL, *ONLINE, *FULL]
    planner_ladder.main([DEBUG[1], "--world-size", "2", *used, "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / TABLE).read_text())
    rungs = proposals(*used)
    assert list(table) == ["", *rungs[1:]] and len(set(table.values())) == len(table) == len(dry_runs) > 5
    for overrides in table:
        config = parse_args([*DEBUG, *used, *shlex.split(overrides)])
        assert table[overrides] == dry_runs[str(config), 2, 0] / GIB
        assert f"{table[overrides]:8.2f}     0  {overrides or 'as it is'}  (" in printed
    assert " refused        --encoder.offload_policy offload  (a dry run does not count encoders)" in printed
    assert [path.name for path in tmp_path.iterdir()] == [TABLE]

    (tmp_path / TABLE).write_text(json.dumps({name: 1000 * gib for name, gib in table.items()}))  # digits to compare
    text = "\n".join(explained(tmp_path, *used))
    for overrides in rungs[1:]:
        assert f"{overrides}   {1000 * table[overrides]:.1f} GiB by the dry run; (" in text


def test_the_fullest_rank_of_a_pipeline(dry_runs):
    """With data parallel 2 the stages begin at ranks 0 and 2. Rows that cannot be run give the reason."""
    options = [*SMALL, "--parallelism.pipeline_parallel_degree", "2"]
    config = parse_args([*DEBUG, *options])
    gib, rank = planner_ladder.fullest_rank(config, 4)
    totals = {rank: dry_runs[str(config), 4, rank] for rank in (0, 2)}
    assert dry_run(config, 4, 1).total == totals[0] != totals[2] == dry_run(config, 4, 3).total
    assert len(dry_runs) == 2
    assert (gib, rank) == (max(totals.values()) / GIB, max(totals, key=totals.get))
    row = planner_ladder.make_row([*DEBUG, *options], 4, "--training.local_batch_size 1", "cost")
    assert row.gib is None and "legal: 2 or more" in row.note
    assert planner_ladder.show(row).startswith(" refused        --training.local_batch_size 1  (")


@pytest.mark.parametrize(
    "options, words",
    [
        (["--world-size", "0"], "config error: --world-size: given 0"),
        (["--world-size", "2", "--training.stepz", "3"], "config error: training.stepz"),
        (["--world-size", "6", "--parallelism.context_parallel_degree", "4"], "config error: parallelism.context"),
    ],
)
def test_what_the_planner_refuses(tmp_path, options, words):
    with pytest.raises(SystemExit) as caught:
        planner_ladder.main([DEBUG[1], *options, "--out", str(tmp_path)])
    assert str(caught.value).startswith(words) and not list(tmp_path.iterdir())
