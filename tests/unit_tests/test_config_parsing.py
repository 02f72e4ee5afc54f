"""TOML and command line: nothing wrong is accepted, messages name the field, and a dumped configuration parses back."""

import random
from dataclasses import asdict, replace

import pytest
import tomli_w

from tests.helpers import ROOT
from tests.unit_tests.config_cases import (
    BASE,
    WORLD,
    draw_config,
    get_message,
    out_of_range,
    typo,
    with_values,
    wrong_types,
)
from titan_video.config import ConfigError, JobConfig, dump, from_dict, load, main_guard, parse, parse_args
from titan_video.config.check import check
from titan_video.config.job_config import Data, Source
from titan_video.config.values import get_limits, nearest, options, sections
from titan_video.models import get_spec


def test_what_is_dumped_is_parsed_back():
    rng, default, names = random.Random(0), JobConfig(), [full.split(".") for full in options()]
    for _ in range(100):
        config = draw_config(rng)
        text = dump(config)
        again = parse(text)
        assert again == config
        assert dump(again) == text
        for section, name in names:  # typed as declared
            found, declared = (type(getattr(getattr(c, section), name)) for c in (again, default))
            assert found is declared, f"{section}.{name}"
    assert parse(dump(default)) == default == parse("")
    text, tables = dump(default), [full for full, (kind, _) in options().items() if kind is dict]
    assert text.count(" = ") == len(options()) - len(tables) and all(f"[{full}]\n" in text for full in tables)


def test_mutated_files_are_refused_by_name():
    rng = random.Random(1)
    check(parse(tomli_w.dumps(BASE)), WORLD)  # what follows is wrong for its mutation alone
    count, default = 0, asdict(JobConfig())
    for full, (kind, f) in options().items():
        section, name = full.split(".")
        legal = default[section][name]
        legal = [list(v) if isinstance(v, tuple) else v for v in legal] if isinstance(legal, tuple) else legal
        wrong = typo(name, rng)
        message = get_message(tomli_w.dumps(with_values({f"{section}.{wrong}": legal})))
        assert f"{section}.{wrong}: unknown" in message and f"nearest known name: {full}" in message.splitlines()[0], (
            message
        )
        count += 1
        for value in wrong_types(kind) + out_of_range(kind, get_limits(f)):
            message = get_message(tomli_w.dumps(with_values({full: value})))
            assert message.startswith(f"{full}: ") and "legal: " in message and len(message.splitlines()) == 1, message
            count += 1
    for section in sections():
        wrong = typo(section, rng)
        first = next(iter(default[section]))
        assert f"{wrong}.{first}: unknown section {wrong}; nearest known name: {section}." in get_message(
            f"[{wrong}]\n{first} = 1\n"
        )
        assert get_message(f"{section} = 1").startswith(f"{section}: ")
        count += 2
    assert count >= 300, count


def test_random_damage_to_a_file_is_an_error_or_a_legal_file():
    rng, good, refused = random.Random(1), dump(from_dict(BASE)), 0
    for _ in range(300):
        text = list(good)
        for _ in range(rng.randrange(1, 4)):
            text[rng.randrange(len(text))] = rng.choice(["", "\0", "=", '"', "[", "9", "x", "\n", "é"])
        try:
            config = parse("".join(text))
            check(config, WORLD)
        except ConfigError:
            refused += 1
        else:
            assert parse(dump(config)) == config
    assert refused > 150


def test_all_mistakes_are_reported_at_once():
    lines = get_message(
        "[training]\nsteps = 0\nlr = 1e-4\n[optimizer]\nlr = -1.0\n[emma]\nenable = true\n[[flow]]\nshift = 1\n"
    ).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "training.steps",
        "training.lr",
        "optimizer.lr",
        "emma.enable",
        "flow",
    ]
    lines = get_message('[data]\nbuckets = [[80, 470, 832]]\n[encoder]\nname = "wan"\n[flow]\nmin_t = 1\n').splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "data.buckets",
        "data.buckets",
        "flow.min_t",
        "data.path",
        "model.hf_assets_path",
    ]


def test_nearest_names():
    wanted = {
        "training.lr": "optimizer.lr",
        "training.seed": "debug.seed",
        "training.stepz": "training.steps",
        "trainig.steps": "training.steps",
        "steps": "training.steps",
        "training.warmup_steps": "lr_scheduler.warmup_steps",
        "checkpoint.export_type": "checkpoint.export_dtype",
        "parallelism.dp_shard_degree": "parallelism.data_parallel_shard_degree",
        "training.batch_size": "training.local_batch_size",
        "ema.enabled": "ema.enable",
        "metrics.tb_folder": "metrics.save_tb_folder",
    }
    assert {given: nearest(given, options()) for given in wanted} == wanted
    assert get_message("[trainig]").endswith("nearest known name: training")


def test_integers_become_floats():
    config = parse("[optimizer]\nlr = 1\n[validation]\ntimesteps = [1, 0.5]\n")
    assert (
        type(config.optimizer.lr) is float
        and config.validation.timesteps == (1.0, 0.5)
        and type(config.validation.timesteps[0]) is float
    )


def test_files_that_cannot_be_read(tmp_path):
    def message(content):
        path = tmp_path / "run.toml"
        path.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "line 3" in message(b"[training]\nsteps = 3\nsteps = \n")
    assert "line 2" in message(b"[training]\nsteps =")
    assert "line 3" in message(b"[training]\nsteps = 3\nsteps = 4\n")
    assert "UTF-8" in message(b"\xff\xfe[")
    assert "nested" in message(b"x = " + b"[" * 100_000) or "not valid TOML" in message(b"x = " + b"[" * 100_000)
    message(b"[training]\nsteps = " + b"9" * 5000)
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match="job.config_file: cannot read") as caught:
            load(path)
        assert str(path) in str(caught.value)
    (tmp_path / "windows.toml").write_bytes(b"\xef\xbb\xbf[training]\r\nsteps = 3\r\n")
    assert load(tmp_path / "windows.toml").training.steps == 3


def test_shipped_files_are_legal():
    for path in sorted((ROOT / "train_configs").glob("*.toml")):
        config = load(path)
        assert parse(dump(config)) == config, path


def test_command_line_wins_over_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('[training]\nsteps = 7\nlocal_batch_size = 2\n[job]\ndescription = "from the file"\n')
    for form in (["--job.config_file", str(path)], [f"--job.config_file={path}"]):
        config = parse_args([*form, "--training.steps", "9"])
        assert (config.training.steps, config.training.local_batch_size, config.job.description) == (
            9,
            2,
            "from the file",
        )
        assert parse_args(["--training.steps", "9", *form]) == config
    assert parse_args([]) == JobConfig()
    assert parse_args(["--training.steps", "3", "--training.steps=4"]).training.steps == 4


def test_a_file_of_data_is_between_the_toml_and_the_command_line(tmp_path):
    run, data = tmp_path / "run.toml", tmp_path / "data.toml"
    run.write_text('[data]\npath = "embedded:shapes-9"\nfps = 7\nbuckets = [[5, 64, 64]]\n[training]\nsteps = 3\n')
    data.write_text(
        '[data]\nfps = 8\nuniform_clips = 2\nresolutions = [64]\n[[data.source]]\npath = "clips"\n'
        "[training]\nlocal_batch_size = 5\n"
    )
    c = parse_args(["--data.file", str(data), "--data.uniform_clips=3", "--job.config_file", str(run)])
    assert (c.data.fps, c.data.uniform_clips, c.training.steps, c.training.local_batch_size) == (8, 3, 3, 5)
    assert (c.data.path, c.data.source) == ("", (Source(path="clips"),))  # its clips and sizes replace others
    assert (c.data.buckets, c.data.resolutions) == ((), (64,))
    assert parse(dump(c)) == c and "data.toml" not in dump(c)  # the resolved TOML holds the values
    data.write_text('[data]\npath = "clips"\n')
    c = parse_args(["--job.config_file", str(run), f"--data.file={data}"])
    assert (c.data.path, c.data.buckets) == ("clips", ((5, 64, 64),))
    assert parse_args([f"--data.file={data}"]).data.path == "clips"


def test_mistakes_in_a_file_of_data(tmp_path):
    data = tmp_path / "data.toml"
    data.write_text('[data]\nfsp = 8\nfps = "x"\n[model]\nname = "wan"\n[moddel]\nname = "x"\n')
    with pytest.raises(ConfigError) as caught:
        parse_args(["--data.file", str(data), "--training.steps", "0"])
    text = str(caught.value)
    for words in (
        f"{data}: data.fsp: unknown field; nearest known name: data.fps",
        f'{data}: data.fps: given "x"; legal: a number > 0',
        f"{data}: model: legal here: [data] and [training]",
        f"{data}: moddel.name: unknown section",
        "training.steps: given 0",
    ):
        assert words in text, text
    with pytest.raises(ConfigError, match="data.file: cannot read /no/such.toml"):
        parse_args(["--data.file", "/no/such.toml"])
    with pytest.raises(ConfigError, match="data.file: given no value; legal: a TOML file"):
        parse_args(["--data.file"])


def test_help_names_files_and_flavors(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert "--job.config_file" in text and "--data.file  (a TOML file of [data] and [training]" in text
    for name in ("wan", "hunyuan_video"):
        assert f"{name}: {', '.join(get_spec(name).flavors)}" in text


def test_command_line_forms():
    c = parse_args(
        [
            "--compile.enable",
            "--data.shuffle",
            "false",
            "--ema.enable=true",
            "--checkpoint.load_step",
            "-1",
            "--optimizer.lr",
            "3e-4",
            "--optimizer.eps=.5",
            "--data.buckets",
            "[[17,64,64], [1, 128, 64]]",
            "--validation.timesteps",
            "0.1, 1",
            "--job.print_config",
            "--job.description",
            'a "b" = [c] 007',
            "--job.dump_folder=--x=y",
            "--data.path=",
        ]
    )
    assert (c.compile.enable, c.data.shuffle, c.ema.enable, c.job.print_config) == (True, False, True, True)
    assert (c.checkpoint.load_step, c.optimizer.lr, c.optimizer.eps) == (-1, 3e-4, 0.5)
    assert c.data.buckets == ((17, 64, 64), (1, 128, 64)) and c.validation.timesteps == (0.1, 1.0)
    assert (c.job.description, c.job.dump_folder, c.data.path) == ('a "b" = [c] 007', "--x=y", "")
    assert parse_args(["--validation.timesteps", "[0.25]"]).validation.timesteps == (0.25,)
    assert parse_args(["--validation.timesteps="]).validation.timesteps == ()


def test_sources_are_tables():
    text = '[data]\nfps = 8\n[[data.source]]\npath = "a"\nfps = 24\n[[data.source]]\npath = "b"\nnum_repeats = 3\n'
    config = parse(text)
    assert (
        config.data.source == (Source("a", fps=24.0), Source("b", num_repeats=3)) == config.data.sources
        and parse(dump(config)) == config
    )
    assert dump(config).count("[[data.source]]") == 2 and JobConfig(data=Data(path="c")).data.sources == (Source("c"),)
    assert (
        parse_args(["--data.fps", "8", "--data.source", '[{path = "a", fps = 24}, {path = "b", num_repeats = 3}]'])
        == config
    )
    for value, words in (
        ("[{path = 3}]", "item 0: path: given 3; legal: a string"),
        ("a", "legal: a list of tables of path, num_repeats"),
        ('[{path = "a"}, {fps = -1}]', "item 1: fps: given -1; legal: a number >= 0"),
    ):
        with pytest.raises(ConfigError, match=f"data.source: .*{words}"):
            parse_args(["--data.source", value])


def test_derived_buckets():
    data = Data(buckets=(), resolutions=(512,), frame_buckets=(1, 33), min_ar=0.5, max_ar=2.0, num_ar_buckets=3)
    assert data.sizes == ((1, 736, 352), (1, 512, 512), (1, 352, 736), (33, 736, 352), (33, 512, 512), (33, 352, 736))
    assert Data().sizes == Data().buckets
    for side in (256, 480, 720):
        sizes = replace(data, resolutions=(side,), num_ar_buckets=9).sizes
        assert all(h % 32 == w % 32 == 0 and 0.85 < h * w / side**2 < 1.15 for _, h, w in sizes)
    assert replace(data, num_ar_buckets=1).sizes == ((1, 512, 512), (33, 512, 512))


def test_command_line_mistakes_name_the_option():
    wrong = {
        "training.steps": ["3.0", "1e3", " 3", "", "٣", "0", "-1", "9" * 5000],
        "optimizer.lr": ["nan", "inf", "-inf", "1e999", "1_0", "0x1p3", "0"],
        "compile.enable": ["yes", "", "1", "True"],
        "flow.shift": ["constat", "Constant", ""],
        "job.description": ["a\udcff", "a\0"],
        "data.buckets": ["17,64,64", "[17,64,64]", "[[17,64", "[1]\ny = 2", "[[17,64,64.0]]"],
        "validation.timesteps": ["0.1,,0.2", "0.1,2", "0.1 0.2", "[0.1,true]", "nan"],
    }
    for argv, start in [
        *(([f"--{name}={value}"], f"{name}: ") for name, values in wrong.items() for value in values),
        (["--training.steps", "3.0"], "training.steps: "),
        (["--compile.enable", "yes"], "compile.enable: "),
        (["--training.steps"], "training.steps: given no value"),
        (["--training.steps", "--compile.enable"], "training.steps: given no value"),
        (["--trainig.steps", "3"], "trainig.steps: unknown option"),
        (["--training.stepz", "3"], "training.stepz: unknown option"),
        (["--steps", "3"], "steps: unknown option"),
        (["--config", "x"], "config: unknown option"),
        (["--"], "--: stray"),
        (["steps=3"], "steps=3: stray"),
        (["-x"], "-x: stray"),
        (["--job.config_file"], "job.config_file: given no value"),
        (["--job.config_file", "/no/such.toml"], "job.config_file: cannot read /no/such.toml"),
    ]:
        with pytest.raises(ConfigError) as caught:
            parse_args(argv)
        assert str(caught.value).startswith(start) and len(str(caught.value).splitlines()) == 1, (
            argv,
            str(caught.value),
        )
    with pytest.raises(ConfigError) as caught:
        parse_args(["--config", "x", "--training.lr=1", "--training.steps=0", "--job.config_file=/no/such.toml"])
    assert (
        len(str(caught.value).splitlines()) == 4
        and "name: job.config_file" in str(caught.value)
        and "name: optimizer.lr" in str(caught.value)
    )


def test_help_lists_everything(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_args(["--training.steps", "x", "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    for full, (_, f) in options().items():
        assert f"--{full}  (" in text and f.metadata["help"] in text


def test_main_guard_ends_without_a_traceback():
    with pytest.raises(SystemExit) as caught, main_guard():
        parse_args(["--training.stepz", "3"])
    # A text as the code: Python prints it to stderr and exits with 1.
    assert caught.value.code == "config error: training.stepz: unknown option; nearest known name: training.steps"
    with main_guard():
        parse_args(["--training.steps", "3"])
    with pytest.raises(ZeroDivisionError), main_guard():
        raise ZeroDivisionError
