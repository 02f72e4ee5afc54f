"""Former names of fields: accepted with a notice, in TOML, in tables inside a section and on the command line."""

from dataclasses import fields

import pytest

from titan_video.config import ConfigError, JobConfig, dump, parse, parse_args
from titan_video.config.job_config import Data, Encoder, Source
from titan_video.config.renames import RENAMED

OLD = """
[encoder]
idle = "keep"
[data]
clip_choice = "chunk"
buckets_per_step = 3
[[data.source]]
path = "a"
[[data.source]]
path = "b"
clip_choice = "slide"
"""
RENAMED_CONFIG = JobConfig(
    encoder=Encoder(offload_policy="keep"),
    data=Data(frame_extraction="chunk", groups_per_step=3, source=(Source("a"), Source("b", frame_extraction="slide"))),
)


def test_every_rename_leads_to_a_field():
    for kind, renamed in RENAMED.items():
        names = {f.name for f in fields(kind)}
        assert set(renamed.values()) <= names and not set(renamed) & names


def test_a_file_with_former_names_is_read(caplog):
    assert parse(OLD) == RENAMED_CONFIG
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        "encoder.idle is now called offload_policy",
        "data.clip_choice is now called frame_extraction",
        "data.buckets_per_step is now called groups_per_step",
        "data.source: item 1: clip_choice is now called frame_extraction",
    ]
    caplog.clear()
    assert parse(dump(RENAMED_CONFIG)) == RENAMED_CONFIG and not caplog.records


def test_former_names_on_the_command_line(caplog, tmp_path):
    source = '[{path = "a"}, {path = "b", clip_choice = "slide"}]'
    argv = [
        "--encoder.idle",
        "keep",
        "--data.clip_choice=chunk",
        "--data.buckets_per_step",
        "3",
        "--data.source",
        source,
    ]
    assert parse_args(argv) == RENAMED_CONFIG
    assert len(caplog.records) == 4
    # The command line overrides the file, whatever the names.
    (tmp_path / "old.toml").write_text(OLD)
    for name in ("idle", "offload_policy"):
        config = parse_args(["--job.config_file", str(tmp_path / "old.toml"), f"--encoder.{name}=free"])
        assert config.encoder.offload_policy == "free"


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--encoder.idle=keep", "--encoder.offload_policy=keep"],
            "encoder.idle: the former name of offload_policy, which is there too; remove one of them",
        ),
        (
            ["--data.source", '[{frame_extraction = "head", clip_choice = "head"}]'],
            "data.source: item 0: clip_choice: the former name of frame_extraction, which is there too; remove one",
        ),
        (["--encoder.idle=off"], 'encoder.offload_policy: given "off"; legal: one of keep, offload, free'),
        (["--encoder.idlee=keep"], "encoder.idlee: unknown option; nearest known name: "),
    ],
)
def test_what_is_refused(argv, message):
    with pytest.raises(ConfigError) as caught:
        parse_args(argv)
    assert str(caught.value).startswith(message) and len(str(caught.value).splitlines()) == 1
    assert "name: encoder.idle" not in str(caught.value)
