"""optimizer.name = "package.module.Class": what is imported and what is not, its arguments, and its state."""

import importlib
import re
import sys

import pytest
import torch
from torch import nn

from tests.unit_tests.config_cases import with_values
from titan_video.checkpoint.manager import CheckpointManager
from titan_video.checkpoint.state import ModelState, OptimizerState
from titan_video.config import ConfigError, from_dict, parse
from titan_video.config.check import check
from titan_video.config.job_config import Checkpoint, Optimizer
from titan_video.config.manager import dump, parse_args
from titan_video.optim.optimizer import build_optimizer

MODULE = '''
import pathlib
import torch

(pathlib.Path(__file__).parent / "imported").touch()


class Lion(torch.optim.Optimizer):
    """Keeps a step count as a number of each weight, and a factor as a number of the group."""

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, mode="sign"):
        if mode not in ("sign", "raw"):
            raise ValueError(f"no mode {mode}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "mode": mode, "d": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["d"] *= 1.25
            group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["count"], state["m"], state["nothing"] = 0, torch.zeros_like(p), None
                state["count"] += 1
                state["m"].lerp_(p.grad, 0.1)
                update = state["m"].sign() if group["mode"] == "sign" else state["m"]
                p.add_(update, alpha=-group["lr"] * group["d"] / state["count"])


class Quantized(Lion):
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["codes"] = torch.zeros_like(p, dtype=torch.uint8)


class InItself(Lion):
    calls = 0

    def __init__(self, params, lr=1e-4, weight_decay=0.0):
        super().__init__(params, lr, weight_decay=weight_decay)
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1


class Objects(Lion):
    def step(self, closure=None):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["history"] = [1.0]


class Closure(Lion):
    def step(self, closure):
        pass


class NoDecay(torch.optim.SGD):
    def __init__(self, params, lr, required):
        super().__init__(params, lr)


def function(params):
    pass
'''
NUMBER = iter(range(1000))


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that installs MODULE under a new name in a folder of its own; returns (folder, name)."""

    def install(record=True):
        name = f"stand_in_optimizers_{next(NUMBER)}"
        site = tmp_path / "site"
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(MODULE)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "top_level.txt").write_text(f"{name}\n")
        files = [*([f"{name}.py,,"] if record else []), f"{info.name}/METADATA,,", f"{info.name}/top_level.txt,,"]
        (info / "RECORD").write_text("\n".join(files) + "\n")
        monkeypatch.syspath_prepend(site)
        importlib.invalidate_caches()
        return site, name

    return install


def message(values):
    with pytest.raises(ConfigError) as caught:
        check(from_dict(with_values(values)), 1)
    return str(caught.value)


def test_arguments_come_from_a_table_or_the_command_line(tmp_path):
    text = '[optimizer]\nname = "torch.optim.NAdam"\n[optimizer.args]\nbetas = [0.9, 0.95]\nmomentum_decay = 0.5\n'
    config = parse(text)
    assert config.optimizer.args == {"betas": [0.9, 0.95], "momentum_decay": 0.5} and parse(dump(config)) == config
    (tmp_path / "a.toml").write_text(text)
    words = ["--job.config_file", str(tmp_path / "a.toml"), "--optimizer.args.momentum_decay", "0.1"]
    given = parse_args([*words, "--optimizer.args.decoupled_weight_decay=true", "--optimizer.args.eps", "1e-6"])
    expected = {"betas": [0.9, 0.95], "momentum_decay": 0.1, "decoupled_weight_decay": True, "eps": 1e-6}
    assert given.optimizer.args == expected
    optimizer = build_optimizer(nn.Linear(3, 2), given.optimizer)
    assert type(optimizer) is torch.optim.NAdam and len(optimizer.param_groups) == 2
    matrices, vectors = optimizer.param_groups
    assert (matrices["betas"], matrices["momentum_decay"], matrices["eps"]) == ((0.9, 0.95), 0.1, 1e-6)
    assert (matrices["weight_decay"], vectors["weight_decay"], matrices["lr"]) == (0.01, 0.0, 1e-4)
    assert isinstance(build_optimizer(nn.Linear(3, 2), Optimizer()), torch.optim.AdamW)


@pytest.mark.parametrize(
    "text, words",
    [
        ("args = 3\n", "optimizer.args: given 3; legal: a table"),
        ("args.a.b = 3\n", 'optimizer.args: given {"a": {"b": 3}}; legal: a table of numbers'),
        ("args.a = 2024-01-01\n", 'optimizer.args: given {"a": "2024-01-01"}; legal: a table of numbers'),
    ],
)
def test_what_is_no_table_of_plain_values(text, words):
    with pytest.raises(ConfigError, match=f"^{re.escape(words)}"):
        parse(f"[optimizer]\n{text}")
    with pytest.raises(ConfigError, match="^optimizer.lr.x: unknown option"):
        parse_args(["--optimizer.lr.x", "3"])


@pytest.mark.parametrize(
    "values, words",
    [
        ({"name": "Adam"}, "optimizer.name: given Adam; legal: one of AdamW, AdamW8bit, Muon, or package.module.Class"),
        ({"name": "torch.optim.RAdm"}, "torch.optim has no RAdm; do you mean RAdam?"),
        ({"name": "torch.optim.lr_scheduler.StepLR"}, "no subclass of torch.optim.Optimizer"),
        ({"name": "no_such_package.x.Y"}, "no installed package has no_such_package; install it with pip"),
        ({"name": "os.path.join"}, "no installed package has os"),
        ({"name": "torch.nothing.X"}, "torch has no such module"),
        ({"name": "torch..X"}, "given 'torch..X'; legal"),
        ({"name": "torch.optim.LBFGS", "weight_decay": 0.0}, "doesn't support per-parameter options"),
        ({"name": "torch.optim.RAdam", "args": {"beta": 1}}, "optimizer.args.beta: torch.optim.RAdam has no such"),
        ({"name": "torch.optim.RAdam", "args": {"lr": 1.0}}, "optimizer.args.lr: not for this table; set optimizer.lr"),
        ({"name": "torch.optim.RAdam", "args": {"eps": -1.0}}, "Invalid epsilon value: -1.0"),
        ({"name": "torch.optim.Rprop"}, "optimizer.weight_decay: given 0.01, but torch.optim.Rprop has no"),
        ({"name": "torch.optim.RAdam", "in_backward": True}, "optimizer.in_backward: true, which needs an optimizer"),
        ({"name": "AdamW", "args": {"x": 1}}, "optimizer.args: has no effect with optimizer.name AdamW"),
    ],
)
def test_refusals(values, words):
    assert words in message({f"optimizer.{name}": value for name, value in values.items()})


def test_what_it_does_not_read_is_said(caplog):
    """A TOML's betas are for AdamW; another class is often tried by `--optimizer.name` alone."""
    caplog.set_level("INFO")
    build_optimizer(nn.Linear(3, 2), Optimizer(name="torch.optim.RAdam"))
    assert not caplog.records
    optimizer = build_optimizer(nn.Linear(3, 2), Optimizer(name="torch.optim.RAdam", beta2=0.5, momentum=0.1))
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert "optimizer.beta2, optimizer.momentum of the TOML" in caplog.records[0].getMessage()


def test_bfloat16_weights_are_refused():
    assert "training.dtype" in message({"optimizer.name": "torch.optim.RAdam", "training.dtype": "bfloat16"})


def test_an_installed_package_is_used(package):
    site, name = package()
    check(from_dict(with_values({"optimizer.name": f"{name}.Lion", "optimizer.args": {"mode": "raw"}})), 1)
    assert (site / "imported").exists()
    for last, words in {
        "Quantized": "the state of .* cannot be saved: matrix.codes is torch.uint8, which belongs to quantized state",
        "Objects": "matrix.history is a list",
        "InItself": "keeps calls in itself, where no checkpoint finds it",
        "Closure": "cannot make a step here: TypeError",
        "NoDecay": "weight_decay: given 0.01",
        "function": "no subclass",
    }.items():
        with pytest.raises(ConfigError, match=f"^optimizer.[^\n]*{words}"):
            check(from_dict(with_values({"optimizer.name": f"{name}.{last}"})), 1)
    given = {"optimizer.name": f"{name}.NoDecay", "optimizer.weight_decay": 0.0}
    assert "needs required too" in message(given)
    assert "no mode soft" in message({"optimizer.name": f"{name}.Lion", "optimizer.args": {"mode": "soft"}})


def test_the_working_folder_is_never_imported(package, tmp_path, monkeypatch):
    """A file of the package's name in front of it, an editable installation, and metadata in the folder itself."""
    site, name = package()
    work = tmp_path / "work"
    work.mkdir()
    (work / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(work)
    assert f"is no file of the installed {name};" in message({"optimizer.name": f"{name}.Lion"})
    monkeypatch.chdir(site)
    sys.path.remove(str(work))
    assert "is no file of the installed" in message({"optimizer.name": f"{name}.Lion"})  # site is the working folder
    monkeypatch.chdir(tmp_path)
    _, editable = package(record=False)
    assert "pip install -e" in message({"optimizer.name": f"{editable}.Lion"})
    assert not (work / "imported").exists() and not (site / "imported").exists() and name not in sys.modules


def test_numbers_of_weights_and_groups_resume_bitwise(package, tmp_path):
    _, name = package()
    section = Optimizer(name=f"{name}.Lion", lr=0.1)

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        optimizer = build_optimizer(model, section)
        weights = [p.clone() for p in model.parameters()]
        states = {"model": ModelState(model), "optimizer": OptimizerState(model, optimizer)}
        assert all(map(torch.equal, weights, model.parameters())) and not optimizer.state  # the trial leaves no trace
        assert [(g["d"], "k" in g) for g in optimizer.param_groups] == 2 * [(1.0, False)]
        return model, optimizer, CheckpointManager(Checkpoint(async_mode="disabled"), tmp_path / "c" / "d", states, {})

    def step(model, optimizer, i):
        model(torch.full((2, 3), float(i))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, manager = make()
    for i in range(5):
        if i == 2:
            manager.save(2, last=True)
        step(model, optimizer, i)
    again, other, manager = make()
    assert manager.load() == 2
    group = other.param_groups[0]
    assert (group["d"], group["k"], type(group["k"])) == (1.5625, 2, int)
    assert {type(state["count"]) for state in other.state.values()} == {int}
    for i in range(2, 5):
        step(again, other, i)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert other.param_groups[0]["d"] == optimizer.param_groups[0]["d"]
