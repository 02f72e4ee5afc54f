"""Optional parts and families: what the configuration says where one is not installed."""

import sys
from dataclasses import replace

import pytest

from tests.unit_tests.config_cases import WORLD, with_values
from tests.unit_tests.test_imports import OPTIONAL_PARTS
from titan_video.config import ConfigError, JobConfig, dump, from_dict, parse
from titan_video.config.check import check
from titan_video.config.families import encoder_families, model_families
from titan_video.config.job_config import Experts, Float8, Lora, Planner
from titan_video.config.parts import PARTS, installed_parts, missing_parts
from titan_video.tools.parts import find_module

VALUES = [(option, value, part) for option, values, part in PARTS for value in values]
SECTIONS = [
    ("lora", Lora(rank=4), "titan_video.lora"),
    ("float8", Float8(emulate=True), "titan_video.distributed.float8"),
    ("experts", Experts(balance_rate=0.1), "titan_video.training.expert_balance"),
    ("planner", Planner(cluster="h100x1"), "titan_video.planner"),
]


def hide(monkeypatch, module):
    """Python and `find_module` then find no such module."""
    monkeypatch.setitem(sys.modules, module, None)


def test_the_table_names_optional_parts_that_exist():
    for option, _, part in PARTS:
        assert part.removeprefix("titan_video.") in OPTIONAL_PARTS and find_module(part), option
    assert {option for option, values, _ in PARTS if not values and "." not in option} == {
        section for section, _, _ in SECTIONS
    }
    assert not installed_parts(JobConfig())


@pytest.mark.parametrize("option, value, part", VALUES)
def test_a_value_that_asks_for_a_missing_part_is_refused(monkeypatch, option, value, part):
    config = from_dict(with_values({option: value}))
    assert part in installed_parts(config) and not list(missing_parts(config))
    hide(monkeypatch, part)
    assert from_dict(with_values({option: value})) == config
    with pytest.raises(ConfigError) as caught:
        check(config, WORLD)
    lines = [line for line in str(caught.value).splitlines() if "is not installed" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{option}: given ") and part.replace(".", "/") in lines[0], lines


@pytest.mark.parametrize("section, changed, part", SECTIONS)
def test_a_section_of_a_missing_part_parses_at_its_defaults(monkeypatch, section, changed, part):
    config = replace(JobConfig(), **{section: changed})
    assert parse(dump(config)) == config
    hide(monkeypatch, part)
    assert parse(dump(JobConfig())) == JobConfig()
    with pytest.raises(
        ConfigError, match=f"^{section}: needs the optional part {part.replace('.', '/')}, .* restore it"
    ):
        parse(dump(config))


def test_a_hidden_family_is_unknown(monkeypatch):
    assert {"wan", "hunyuan_video"} <= set(model_families()) and {"wan", "hunyuan_video", "debug"} <= set(
        encoder_families()
    )
    hide(monkeypatch, "titan_video.models.hunyuan_video")
    hide(monkeypatch, "titan_video.encoders.hunyuan_video")
    for section in ("model", "encoder"):
        with pytest.raises(ConfigError, match=f'^{section}.name: given "hunyuan_video"; legal: .*wan$'):
            parse(f'[{section}]\nname = "hunyuan_video"')


def test_a_new_family_is_found_by_its_folder(monkeypatch, tmp_path):
    files = {
        "models/__init__.py": "",
        "models/mine/__init__.py": "",
        "models/layers.py": "",
        "encoders/__init__.py": "",
        "encoders/mine.py": "class MineEncoders:\n    pass\n",
        "encoders/spec.py": "class Encoders(Protocol):\n    pass\n",
        "__init__.py": "",
    }
    for name, text in files.items():
        (tmp_path / "titan_video" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "titan_video" / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert model_families() == encoder_families() == ("mine",)
    config = parse('[model]\nname = "mine"\n[encoder]\nname = "mine"')
    assert (config.model.name, config.encoder.name) == ("mine", "mine")


def test_nothing_is_imported_to_look_for_a_part(monkeypatch):
    part = "titan_video.models.hunyuan_video.model"
    monkeypatch.delitem(sys.modules, part, raising=False)
    assert find_module(part) and part not in sys.modules
    assert find_module("titan_video.no_such.module") is None and find_module("titan_video.launch.sys") is None
