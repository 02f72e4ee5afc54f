"""Whole runs and commands on disks that are full or read-only: one plain line, or the run goes on as it would have."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers import Program, diffusers_wan
from tests.integration_tests.test_resume import assert_same_checkpoint
from tests.small_disk import fill, free, small_disk
from titan_video import convert
from titan_video.ingest.__main__ import main as ingest
from titan_video.models.wan import SPEC

FULL = "No space left on device ("
SAVING = {"training.steps": 6, "checkpoint.interval": 2, "checkpoint.keep_latest_k": 1}


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", "size=64m") as path:
        yield path


def full_between(disk, first, last):
    """A hook: the disk is full while steps first to last - 1 are trained and saved."""
    import train

    run_step = train.Trainer.train_step

    def train_step(self, *args):
        if self.step in (first, last) and self.rank == 0:
            if self.checkpoint._thread:
                self.checkpoint._thread.join()
            fill(disk, leave=100_000) if self.step == first else free(disk)
        run_step(self, *args)

    train.Trainer.train_step = train_step


def plain(output):
    assert "Traceback" not in output and "PytorchStreamWriter" not in output and "Exception" not in output, output
    return output


def lines_with(output, *words):
    return [line for line in plain(output).splitlines() if all(word in line for word in words)]


def test_a_full_disk_stops_the_run(front, disk):
    front.root = disk
    run = front.run("run", {**SAVING, "checkpoint.async_mode": "async"}, hook=partial(full_between, disk, 4, 99))
    run.fails_with("error: the checkpoint of step 4 could not be saved: ", "bytes needed", "bytes were free)")
    assert len(lines_with(run.output, FULL)) == 1 and run.output.count("step-4.partial") == 1
    assert [path.name for path in (run.folder / "checkpoint").iterdir()] == ["step-2"]
    free(disk)
    assert len(front.run("run", SAVING).ok().records) == 6


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_run_goes_on(front, disk, tmp_path, world):
    options = {**SAVING, "checkpoint.on_error": "continue", "metrics.enable_tensorboard": "true"}
    whole = front.run("whole", options, world).ok()
    front.root = disk
    run = front.run("run", options, world, hook=partial(full_between, disk, 3, 5)).ok()
    assert len(lines_with(run.output, "WARNING", "checkpoint of step 4 could not be saved", FULL, "goes on")) == 1
    assert run.records == whole.records
    assert_same_checkpoint(run.checkpoint(6), whole.checkpoint(6))


def test_the_last_save_is_an_error(front, disk):
    front.root = disk
    options = {**SAVING, "checkpoint.on_error": "continue"}
    run = front.run("run", options, hook=partial(full_between, disk, 5, 99))
    run.fails_with("error: the checkpoint of step 6 could not be saved: ", FULL)
    assert [path.name for path in (run.folder / "checkpoint").iterdir()] == ["step-4"]


def test_no_room_for_the_export(front, disk):
    front.root = disk
    options = {"training.steps": 1, "checkpoint.enable": "false", "checkpoint.last_save_in_hf": "true"}
    run = front.run("run", options, hook=partial(full_between, disk, 1, 99))
    run.fails_with("error: the weights could not be exported to ", "cannot write the export: " + FULL)
    assert [path for path in (run.folder / "hf").rglob("*") if path.is_file()] == []


def test_no_room_for_the_cache(front, disk, tmp_path):
    fill(disk, leave=200_000)
    run = front.run("run", {"data.cache_folder": disk / "cache"})
    run.fails_with("error: ", f"{disk}/cache", "cannot write the", FULL)
    assert len(lines_with(run.output, FULL)) == 1


def test_a_read_only_folder(front, tmp_path):
    with small_disk(tmp_path / "read_only", "ro") as disk:
        front.root = disk
        (tmp_path / "logs").mkdir()
        program = Program(front.argv("run", {}), tmp_path / "logs")
        assert program.wait() == 1
        output = plain(Path(program.logs[0]).read_text())
        assert len(lines_with(output, f"error: {disk}/run", "Read-only file system")) == 1


# ---- commands ----


def fails(capsys, main, argv, *words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    message = str(stopped.value.code)
    assert message.startswith("error: ") and "\n" not in message, message
    for word in words:
        assert word in message, message


def test_ingest_commands(disk, tmp_path, capsys):
    toml, clips = tmp_path / "x.toml", tmp_path / "cache"
    toml.write_text('[data]\npath = "embedded:shapes-4"\nbuckets = [[9, 64, 64]]\n')
    run = ["--data.cache_folder", clips, "--job.dump_folder"]
    ingest(["plan", str(toml), *map(str, run), str(tmp_path / "run")])
    fill(disk)
    fails(capsys, ingest, ["plan", toml, *run, disk / "run"], "data_plan.jsonl: cannot write the plan: " + FULL)
    fails(capsys, ingest, ["encode", toml, *run, disk / "run"], "data_plan.jsonl: cannot write the plan: " + FULL)
    other = ["--data.cache_folder", disk / "c", "--job.dump_folder", tmp_path / "run"]
    fails(capsys, ingest, ["encode", toml, *other], f"{disk}/c", "cannot write the generated clip", FULL)
    others = tmp_path / "others.toml"
    others.write_text('[[directory]]\npath = "/clips"\nresolutions = [256]\nframe_buckets = [1]\n')
    out = disk / "out.toml"
    fails(capsys, ingest, ["import", others, out], "out.toml: cannot write the configuration: " + FULL, "bytes needed")


def test_convert(disk, tmp_path, capsys):
    args = SPEC.flavors["debug"]
    (tmp_path / "transformer").mkdir()
    model = diffusers_wan(args)
    save_file(model.state_dict(), tmp_path / "transformer/diffusion_pytorch_model.safetensors")
    model.save_config(tmp_path / "transformer")
    fill(disk, leave=100_000)
    for form, out in (("diffusers", "hf"), ("single_file", "x.safetensors")):
        fails(capsys, convert.main, [tmp_path, disk / out, "--format", form], "cannot write the export: " + FULL)
    assert torch.is_tensor(model.state_dict()["proj_out.weight"]) and len(list(disk.rglob("*.tmp"))) == 0


def shards_gone(step):
    """A hook: the shards of the cache vanish at a step, as with a storage that is unmounted."""
    import train

    run_step = train.Trainer.train_step

    def train_step(self, *args):
        if self.step == step:
            for shard in Path(self.config.data.cache_folder).glob("shards/*"):
                shard.unlink()
        run_step(self, *args)

    train.Trainer.train_step = train_step


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cache_that_cannot_be_read_any_more(front, tmp_path, workers):
    options = {"training.steps": 500, "data.num_workers": workers, "data.cache_folder": tmp_path / "cache"}
    run = front.run("run", options, hook=partial(shards_gone, 2))
    run.fails_with("error: ", "safetensors: cannot be read (No such file or directory); start again")
    assert len(lines_with(run.output, "error: ", "cannot be read")) == 1 and "Caught" not in run.output
