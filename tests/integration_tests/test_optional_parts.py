"""Optional parts can be deleted: without any of them the debug run trains, and an option that needs one is refused."""

import json
import sys
from functools import partial
from multiprocessing.util import Finalize

import pytest

from benchmarks.house import OPTIONAL_PARTS, PACKAGE, optional_part
from tests.helpers import run_ranks

PROGRAMS = {"convert", "upcycle", "download", "sample", "replay", "ingest.importers"}  # started by hand
ALWAYS = {"supervision", "training.tensorboard_sink"}  # every run uses them where they are there
AFTERWARDS = {"training.out_of_memory"}  # explains an error
ASKING = {
    "models.hunyuan_video": {"model.name": "hunyuan_video"},
    "encoders.hunyuan_video": {"encoder.name": "hunyuan_video"},
    "kernels.grouped": {"model.flavor": "moe-debug"},
    "models.experts": {"model.flavor": "moe-debug"},
    "training.expert_balance": {"experts.balance_rate": 0.01},
    "kernels.triton": {"model.kernels": "triton"},
    "kernels.attention_backends": {"model.attention": "flex"},
    "distributed.float8": {"float8.enable": "true", "float8.emulate": "true"},
    "distributed.async_tensor_parallel": {"parallelism.enable_async_tensor_parallel": "true"},
    "distributed.tensor_parallel": {"parallelism.tensor_parallel_degree": 2},
    "distributed.context_parallel": {"parallelism.context_parallel_degree": 2},
    "distributed.expert_parallel": {"parallelism.expert_parallel_degree": 2},
    "distributed.pipeline_parallel": {"parallelism.pipeline_parallel_degree": 2},
    "training.profiling": {"profiling.enable_profiling": "true"},
    "distributed.offload": {"activation_checkpoint.mode": "full", "activation_checkpoint.offload": "true"},
    "distributed.checkpoint_ranges": {"activation_checkpoint.range": '[{layers = "0"}]'},
    "distributed.block_swap": {"lora.enable": "true", "training.swap_blocks": 3},
    "optim.low_bit": {"optimizer.name": "AdamW8bit"},
    "optim.muon": {"optimizer.name": "Muon"},
    "optim.mixed": {"optimizer.name": "AdamW8bit"},
    "optim.in_backward": {"optimizer.in_backward": "true", "training.max_norm": 0},
    "optim.mup": {"optimizer.parametrization": "mup", "optimizer.base_flavor": "proxy-debug"},
    "optim.by_name": {"optimizer.name": "torch.optim.RAdam"},
    "tasks.validation": {"validation.enable": "true"},
    "tasks.sampling": {"validation.enable": "true"},
    "ingest.shape_scores": {"validation.num_scored": 3},
    "ingest.cache.remote_cache": {"data.cache_url": "memory://cache"},
    "weights.original": {"checkpoint.last_save_in_hf": "true", "checkpoint.export_format": "original"},
    "weights.export": {"checkpoint.export_every": 1},
    "training.wandb_sink": {"metrics.enable_wandb": "true"},
    "training.flight_recorder": {"comm.trace_buf_size": 100},
    "training.faults": {"fault_tolerance.nonfinite": "rollback"},
    "training.gradient_check": {"debug.deterministic": "true", "debug.verify_every": 2},
    "lora": {"lora.enable": "true"},
    "planner": {"planner.cluster": "h100x1"},
    "flow.unipc": {"validation.solver": "unipc"},
    "online": {"encoder.placement": "colocated"},
}


class Hidden:
    """A finder for sys.meta_path: a part's modules do not exist."""

    def __init__(self, part):
        self.name = f"{PACKAGE}.{part}"

    def find_spec(self, name, path=None, target=None):
        if name == self.name or name.startswith(f"{self.name}."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def hide(part):
    """A hook: from here on this process has no such part."""
    finder = Hidden(part)
    for name in [name for name in sys.modules if name == finder.name or name.startswith(f"{finder.name}.")]:
        del sys.modules[name]
    parent, _, last = finder.name.rpartition(".")
    if hasattr(sys.modules.get(parent), last):
        delattr(sys.modules[parent], last)
    sys.meta_path.insert(0, finder)


def note_modules(path):
    """A hook: at its end the program writes the names of the modules that it has loaded."""
    Finalize(None, lambda: path.write_text(json.dumps(sorted(sys.modules))), exitpriority=1)


def test_every_part_is_tried():
    assert set(ASKING) | PROGRAMS | ALWAYS | AFTERWARDS == set(OPTIONAL_PARTS)


def hide_all():
    for part in OPTIONAL_PARTS:
        hide(part)


@pytest.mark.parametrize(
    "part", ["all", *(pytest.param(p, marks=() if p in ALWAYS else pytest.mark.slow) for p in OPTIONAL_PARTS)]
)
def test_the_debug_run_trains_without(part, front):
    """Without all of them, and without each that the run would load; the slow form leaves out each of the others."""
    options = {"training.steps": 2, "metrics.enable_tensorboard": str(part in ALWAYS | {"all"}).lower()}
    run = front.run("run", options, hook=hide_all if part == "all" else partial(hide, part)).ok()
    assert len(run.records) == 2 and not (run.folder / "tb").exists() or part == "supervision"


@pytest.mark.parametrize("part", ASKING)
def test_what_asks_for_a_missing_part_is_refused(part, front):
    path = f"{PACKAGE}.{part}".replace(".", "/")
    named = part.rpartition(".")[2] if part.endswith("hunyuan_video") else path
    front.run("run", ASKING[part], hook=partial(hide, part)).fails_with("config error", named)


@pytest.fixture(scope="module")
def resolved(shared_front):
    """The config.toml that a run of the whole program wrote."""
    return shared_front.run("whole", {"training.steps": 1}).ok().folder / "config.toml"


def read_without(part, path):
    """The configuration of a TOML, where the part is hidden, as train.py reads it."""
    hide(part)
    from titan_video.config.check import check
    from titan_video.config.manager import parse_args

    config = parse_args(["--job.config_file", str(path)])
    check(config, 1)
    return config.training.steps


@pytest.mark.parametrize("part", OPTIONAL_PARTS)
def test_a_resolved_toml_is_read_without(part, resolved):
    assert run_ranks(read_without, 1, part, resolved, init=False) == [1]


def test_the_debug_run_loads_no_optional_part(front, tmp_path):
    options = {"training.steps": 1, "metrics.enable_tensorboard": "true"}
    front.run("run", options, hook=partial(note_modules, tmp_path / "modules.json")).ok()
    loaded = json.loads((tmp_path / "modules.json").read_text())
    ours = [name for name in loaded if name.startswith(f"{PACKAGE}.")]
    assert len(ours) > 40
    assert {optional_part(name) for name in ours} - {None} == ALWAYS
