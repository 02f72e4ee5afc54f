"""`planner profile` on gloo ranks: its file loads as a cluster, holds every figure, and none is out of this world."""

import pytest
import torch
import torch.distributed as dist

from tests.helpers import ROOT, run_ranks
from titan_video.config.manager import parse_args
from titan_video.planner import cluster
from titan_video.planner.profile import machine
from titan_video.planner.profile.compute import bounded, product_shapes
from titan_video.planner.profile.links import group_rows, message_sizes
from titan_video.planner.profile.stopwatch import MAX_SAMPLES, MIN_SAMPLES, Stopwatch

LARGEST = 2**14
CPU = torch.device("cpu")


def job():
    options = ["--training.local_batch_size", "2", "--training.mixed_precision_param", "bfloat16"]
    return parse_args(["--job.config_file", str(ROOT / "train_configs" / "debug.toml"), *options])


def run_profile(path, part):
    measured = machine.Profile(job(), CPU, seconds=1e-4, largest=LARGEST, part=part)
    machine.write(measured, measured.run(), path)
    return machine.header(measured)


@pytest.mark.parametrize("world", [1, 2])
def test_the_file_is_a_cluster(tmp_path, world):
    path = tmp_path / "here.toml"
    header = run_ranks(run_profile, world, path, machine.cut_of(job()))[0]
    assert f"{world} ranks, gloo" in header and "bfloat16, model wan debug, 48 tokens" in header
    assert path.read_text().startswith(header) and "[encoders]" in header
    found = cluster.load(path)
    assert (found.gpus, found.gpus_per_node) == (world, world) and "CPU" in found.name or found.gpu.name in found.name
    assert {(s.rows, s.inner, s.columns) for s in found.product} >= {(96, 128, 512), (96, 512, 128), (128, 96, 512)}
    assert {s.backend for s in found.attention} == {"flash", "math"}
    assert {(s.tokens, s.head_dim) for s in found.attention} == {(48, 32)}
    for kind in ("all_gather", "reduce_scatter", "all_to_all", "send"):
        sizes = [(s.ranks, s.ranks_per_node, s.bytes) for s in getattr(found, kind)]
        assert sizes == [(2, 2, size) for size in message_sizes(LARGEST)] * (world == 2), kind
    rates = [s.tflops for s in found.product] + [s.forward_tflops for s in found.attention]
    assert all(1e-6 < rate <= found.gpu.peak_tflops for rate in [s.tflops for s in found.product])
    assert all(1e-7 < rate < 100 for rate in rates) and 0.01 < found.gpu.hbm_gb_per_s < 1e4
    assert 0.1 < found.host.operator_us < 1e4 and 0.1 < found.gpu.memory_gib < 1e5
    assert found.host.synchronous and found.host.tensor_us >= 0 and 0 < found.efficiency.model <= 1
    assert "host.collective_us" in header and found.host.compiled_us == cluster.Host().compiled_us
    assert "unit_wait_us" in path.read_text() or world == 1
    assert found.links.pipeline_slowdown >= 1 and found.links.wait_us >= 0
    assert found.links.overlap_slowdown >= 1 and found.gather_seconds(LARGEST, found.group(2, 1)) > 0


def test_groups_of_a_mesh():
    """On two nodes of two ranks: neighbours, one rank of each node, all."""
    assert list(group_rows(4, 2)) == [
        (2, 2, [[0, 1], [2, 3]]),
        (2, 1, [[0, 2], [1, 3]]),
        (4, 2, [[0, 1, 2, 3]]),
    ]
    assert list(group_rows(1, 1)) == []
    assert [(size, here) for size, here, _ in group_rows(6, 6)] == [(2, 2), (3, 3), (6, 6)]


def test_shapes_are_those_of_the_blocks_products():
    block = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4), torch.nn.Linear(4, 8))
    shapes = product_shapes(block, rows=[32, 16], text_rows=3)
    assert len(shapes) == len(set(shapes)) == 12
    assert {(32, 4, 8), (32, 8, 4), (8, 32, 4), (4, 32, 8), (3, 4, 8), (4, 16, 8)} <= set(shapes)
    assert bounded((64, 4, 8), flops=2 * 32 * 4 * 8) == (32, 4, 8) and bounded((64, 4, 8), flops=1e9) == (64, 4, 8)


class Counted(Stopwatch):
    """A stopwatch by whose clock a call takes `duration`."""

    def __init__(self, duration, budget):
        super().__init__(CPU, budget)
        self.duration, self.num_calls = duration, 0

    def _time(self, run, calls, clock):
        self.num_calls += calls
        return calls * self.duration


def counted(duration, budget):
    watch = Counted(duration, budget)
    return watch.seconds(lambda: None), watch.num_calls


def measure_many():
    return [counted(*case) for case in ((10.0, 1.0), (0.1, 1.0), (1e-5, 1.0), (1e-6, 1e-9))], dist.get_world_size()


def test_long_functions_run_seldom_and_short_ones_often():
    found, _ = run_ranks(measure_many, 1)[0]
    assert [seconds for seconds, _ in found] == pytest.approx([10.0, 0.1, 1e-5, 1e-6])
    warm_up = 1 + 2
    assert [calls for _, calls in found] == [
        warm_up + 1 + MIN_SAMPLES,
        warm_up + 1 + 10 - 0,
        warm_up + 100 * (1 + MAX_SAMPLES),
        warm_up + 1000 * (1 + MIN_SAMPLES),
    ]


@pytest.mark.parametrize("options", [["--seconds", "0"], ["--seconds", "inf"], ["--largest", "0"]])
def test_an_illegal_budget_is_refused(options, tmp_path):
    with pytest.raises(SystemExit, match="error: --(seconds|largest): given .*; legal: "):
        machine.main(["--out", str(tmp_path / "x.toml"), *options])
