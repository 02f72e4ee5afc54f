"""The pages of docs/ that are followed: their files are written and their commands run in a copy of the repository."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.unit_tests.test_docs import shell_commands

COPIED = (
    "titan_video",
    "train_configs",
    "train.py",
    "run_train.sh",
    "run_tests.sh",
    "ensure_env.sh",
    "requirements.txt",
)


@pytest.fixture
def clone(tmp_path):
    """The repository without its history, tests and documents, as a newcomer has it in a fresh folder."""
    folder = tmp_path / "titan-video"
    folder.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    return folder
