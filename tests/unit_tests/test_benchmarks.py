"""The benchmarks' own parts: the scorer knows what it reads, and the timing script runs and compares equal steps."""

import os

import numpy as np
import pytest
import torch

from benchmarks import learn_shapes, step_cpu, traffic
from tests.helpers import ROOT, run_ranks
from titan_video.data.shapes import COMBINATIONS, combination, render
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.tensor_parallel import apply_tensor_parallel, collectives_per_block
from titan_video.encoders.debug import DebugEncoders
from titan_video.models.wan import SPEC, WanModel

CLIPS = range(COMBINATIONS)


def test_scorer_reads_every_training_clip_right():
    assert [learn_shapes.score(render(i)) for i in CLIPS] == [combination(i) for i in CLIPS]


def test_scorer_reads_what_the_codec_leaves():
    encoders = DebugEncoders(16)
    frames = torch.stack([torch.from_numpy(render(i)).permute(3, 0, 1, 2) for i in CLIPS])
    decoded = encoders.decode_video(encoders.encode_video(frames)).permute(0, 2, 3, 4, 1).numpy()
    shares = learn_shapes.tally([learn_shapes.score(c) for c in decoded], [combination(i) for i in CLIPS])
    assert shares["colour"] == shares["direction"] == 1.0 and shares["shape"] >= 0.95


def test_scorer_is_not_fooled():
    """A clip played backwards moves the other way, swapped channels are another colour, and nothing is read from noise or an empty clip."""
    assert learn_shapes.score(render(0)) == ("red", "circle", "left")
    assert learn_shapes.score(render(0)[::-1]) == ("red", "circle", "right")
    assert learn_shapes.score(render(0)[..., ::-1]) == ("blue", "circle", "left")
    assert learn_shapes.score(render(0).swapaxes(1, 2)) == ("red", "circle", "up")
    assert learn_shapes.score(np.full((17, 64, 64, 3), 64, np.uint8)) is None
    assert learn_shapes.score(np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)) is None
    assert learn_shapes.tally([None, ("red", "circle", "up")], [("red", "circle", "up")] * 2) == {"colour": 0.5, "shape": 0.5, "direction": 0.5}


def run_step_cpu(argv):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    step_cpu.main(argv)


@pytest.mark.parametrize("case", list(step_cpu.CASES)[:1])
def test_step_cpu_runs_and_writes_its_table(case, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{step_cpu.MARKER}\nold\n{step_cpu.MARKER}\nafter\n")
    run_ranks(run_step_cpu, 1, ["--rounds", "1", "--cases", case, "--write", str(page)], init=False, env={}, timeout=200)
    text = page.read_text()
    assert "old" not in text and f"| {case} |" in text and text.startswith("before\n") and text.endswith("\nafter\n")


def test_page_of_layouts_holds_the_tables_that_the_script_prints():
    page = (ROOT / "docs" / "parallelism.md").read_text()
    assert page.split(traffic.MARKER)[1].strip() == traffic.page("t2v-14B", 75600, 8)


def split_block():
    mesh = ParallelDims().build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(SPEC.flavors["debug"])
    apply_tensor_parallel(model, SPEC.plan, mesh.tp, False)
    return collectives_per_block(SPEC.plan, model.blocks["0"])


def test_table_of_layouts_has_the_counts_of_tensor_parallel():
    """The counts that tests/distributed_tests/test_tensor_parallel.py finds on real ranks."""
    row = next(row for row in traffic.rows(SPEC.flavors["t2v-14B"], 75600, 8) if row[0] == "tensor parallel")
    assert [row[1], row[2]] == [traffic.words(calls) for calls in run_ranks(split_block, 1)[0]]
