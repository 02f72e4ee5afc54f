"""A run that is resumed keeps what it was started with (ingest/started.py)."""

from dataclasses import replace

import pytest
import tomli_w
import tomllib

from titan_video.config.job_config import Data, Encoder, Job, JobConfig, Model, Validation
from titan_video.config.manager import ConfigError, dump
from titan_video.ingest.started import KEPT, as_started, load_run


def run_of(folder, family="wan", **sections):
    model, encoder = Model(name=family), Encoder(name=family)
    job, data = Job(dump_folder=str(folder)), Data(path="embedded:shapes-4")
    return replace(JobConfig(job=job, model=model, encoder=encoder, data=data), **sections)


def write(folder, config, without=(), with_checkpoint=True):
    """The files of a run: its resolved TOML, without the options that did not exist, and a checkpoint."""
    tables = tomllib.loads(dump(config))
    for option in without:
        section, _, name = option.partition(".")
        del tables[section][name]
    folder.mkdir(exist_ok=True)
    (folder / "config.toml").write_text(tomli_w.dumps(tables))
    if with_checkpoint:
        (folder / "checkpoint" / "step-2").mkdir(parents=True, exist_ok=True)


OPTIONS = [kept.option for kept in KEPT]


def test_a_run_started_before_the_options_keeps_what_it_did(tmp_path, caplog):
    config = run_of(tmp_path, validation=Validation(enable=True))
    write(tmp_path, config, without=OPTIONS)
    started = as_started(config)
    assert (started.encoder.clip_resize, started.validation.negative_prompt) == ("crop", "")
    assert "encoder.clip_resize stays 'crop'" in caplog.text and "another job.dump_folder" in caplog.text
    assert "temporal" not in caplog.text and "image_dropout" not in caplog.text  # of another family
    assert replace(started, encoder=config.encoder, validation=config.validation) == config

    write(tmp_path, started)  # as the resumed run does; then it is resumed again
    assert as_started(config) == started
    hunyuan = run_of(tmp_path, "hunyuan_video")
    write(tmp_path, hunyuan, without=OPTIONS)
    started = as_started(hunyuan)
    assert started.encoder.vae_temporal_tiling is True and started.data.image_dropout == 0


def test_a_new_run_has_the_new_defaults(tmp_path, caplog):
    config = run_of(tmp_path)
    assert as_started(config) is config
    write(tmp_path, config, without=OPTIONS, with_checkpoint=False)  # stopped before its first checkpoint
    assert as_started(config) is config
    write(tmp_path, config)
    assert as_started(config) is config
    debug = run_of(tmp_path, encoder=Encoder(name="debug"), validation=Validation(enable=True))
    write(tmp_path, debug, without=OPTIONS)
    assert as_started(debug) is debug and not caplog.text  # nothing of this matters there


def test_media_are_read_as_the_run_began(tmp_path, caplog):
    config = run_of(tmp_path, data=Data(path="clips"))
    write(tmp_path, config, without=OPTIONS)
    assert as_started(config).data.media_rules == 1 and "data.media_rules stays 1" in caplog.text
    write(tmp_path, config)
    assert as_started(config).data.media_rules == 2


def test_what_is_encoded_is_fixed_and_how_to_sample_is_not(tmp_path, caplog):
    config = run_of(tmp_path, validation=Validation(enable=True, negative_prompt="blurred"))
    write(tmp_path, config)
    assert as_started(replace(config, encoder=replace(config.encoder, clip_resize="crop"))) == config
    assert "encoder.clip_resize stays 'squeeze'" in caplog.text
    other = replace(config, validation=replace(config.validation, negative_prompt="dull"))
    assert as_started(other) is other
    left = replace(config, validation=Validation(enable=True))
    assert as_started(left).validation.negative_prompt == "blurred"


def test_a_shipped_toml_that_has_changed_does_not_stop_a_run(tmp_path, caplog):
    """HunyuanVideo's TOMLs now encode in spatial tiles, drop images and give the model a guidance of 6: a run that was
    started with them goes on.
    """
    old = run_of(tmp_path, "hunyuan_video")
    write(tmp_path, old, without=[option for option in OPTIONS if option != "encoder.vae_tiling"])
    new = replace(
        old,
        encoder=replace(old.encoder, vae_tiling=True),
        data=replace(old.data, image_dropout=0.1),
        training=replace(old.training, guidance=6.0),
    )
    started = as_started(new)
    assert (started.encoder.vae_tiling, started.encoder.vae_temporal_tiling) == (False, True)
    assert started.data.image_dropout == 0 and started.training.guidance == 1
    assert caplog.text.count(" stays ") == 4 and "training.guidance stays 1.0" in caplog.text
    wan = replace(new, model=replace(new.model, name="wan"))
    write(tmp_path, replace(old, model=wan.model))
    assert as_started(wan).training.guidance == 6  # Wan takes none


def test_programs_that_read_a_run_see_what_it_did(tmp_path):
    """`titan_video.sample` encodes the image as the run did."""
    config = run_of(tmp_path, validation=Validation(enable=True))
    write(tmp_path, config, without=OPTIONS)
    found = load_run(tmp_path / "config.toml")
    assert found.encoder.clip_resize == "crop" and found.encoder.vae_temporal_tiling is True
    assert (
        found.data == replace(config.data, image_dropout=0.0, media_rules=1) and found.validation.negative_prompt == ""
    )
    write(tmp_path, config)
    assert load_run(tmp_path / "config.toml") == config
    (tmp_path / "config.toml").write_text("[encoder]\nclip_resize = 3")
    with pytest.raises(ConfigError, match="encoder.clip_resize"):
        as_started(config)
