"""The benchmarks for a GPU run at toy size and are reported correctly."""

import json
import os
import re
import shutil
from contextlib import nullcontext

import pytest
import torch

import titan_video.kernels.attention
from benchmarks import (
    attention,
    block_bytes,
    common,
    data,
    hsdp,
    kernels,
    memory,
    planner_search,
    planner_shipped,
    planner_strategies,
    profile_step,
    report,
    roof,
    step,
    traffic,
    training,
)
from tests.helpers import ROOT, run_ranks
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.tensor_parallel import apply_tensor_parallel
from titan_video.models.layers import attention_flops
from titan_video.models.wan import SPEC, WanModel
from titan_video.planner.dry_run.traffic import collectives_per_block

# ---- benchmarks for a GPU, at toy size on a CPU ----

TOY = {
    "block_bytes": (block_bytes, []),
    "kernels": (kernels, ["--rounds", "1"]),
    "attention": (attention, ["--rounds", "1"]),
    "step": (
        step,
        ["--rounds", "1", "--variants", "ours, attention saved", "ours, eager, full checkpointing", "diffusers, tuned"],
    ),
    "step_cpu": (step, ["--rounds", "1", "--cases", "toy", "--variants", "ours, float32", "diffusers, float32"]),
    "profile": (profile_step, ["--variant", "ours, eager"]),
    "memory": (memory, []),
    "memory_14b": (memory, ["--14b"]),
}


def run_data(folder):
    """In a process of its own, as it trains."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        del os.environ[name]
    data.main(["--toy", "--device", "cpu", "--json", str(folder / "data.json")])


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """In this process, which other tests have had import diffusers; that takes longer than most of the benchmarks."""
    folder = tmp_path_factory.mktemp("results")
    run_ranks(run_data, 1, folder, init=False)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(), training.process_group(torch.device("cpu")):
        patch.setattr(titan_video.kernels, "_backend", "torch")  # the scripts choose others
        patch.setattr(titan_video.kernels.attention, "_order", ())
        for name, (script, argv) in TOY.items():
            script.main(["--toy", "--device", "cpu", "--json", str(folder / f"{name}.json"), *argv])
    torch._dynamo.reset()
    shutil.copy(folder / "step.json", folder / "step_14b.json")  # the same script, other cases
    return report.load(folder)


def test_each_benchmark_runs_to_its_end(records):
    assert set(records) == {*TOY, "data", "step_14b"} == set(report.COMMANDS) == set(report.SECTIONS)
    failures = [
        line
        for line in json.dumps(records, indent=0).splitlines()
        if '"failed": ' in line and not line.endswith(("{},", "{}"))
    ]
    assert all("model.attention" in line for line in failures), failures  # backends that a CPU does not have
    assert report.targets(records).count(report.NOT_YET) == 8  # targets for steps at real size
    page = report.page(records)
    assert "Not yet measured" not in page and "| nan" not in page


@pytest.mark.parametrize("name", ["step", "step_cpu"])
def test_timed_variants_compute_the_same(records, name):
    (case,) = records[name]["results"]
    for variant, found in case["agreement"].items():
        assert min(found["velocity cosine"], found["gradient cosine"]) >= step.AGREE, variant
        assert found["loss"] == pytest.approx(found["float32 loss"], rel=1e-5 if name == "step_cpu" else 1e-2)


def test_a_variant_that_fails_leaves_the_others(monkeypatch):
    def build(variant, case, device):
        if isinstance(variant, training.Ours):
            raise torch.OutOfMemoryError
        return training.Step(
            torch.nn.Linear(2, 2),
            lambda data: (torch.zeros(()), torch.ones(3)),
            lambda: None,
            lambda: {"w": torch.ones(2)},
        )

    monkeypatch.setattr(step, "build", build)
    case, variants = step.CASES["toy"], {name: step.VARIANTS[name] for name in ("ours", "diffusers")}
    found = step.time_group(case, variants, torch.device("cpu"), 3, None)
    assert found["ours"] == {"failed": "out of memory"} and len(found["diffusers"]["seconds"]) == 3
    assert step.compare(case, variants, torch.device("cpu"))["ours"] == {"failed": "out of memory"}
    assert "out of memory" in step.step_table(found)


@pytest.mark.parametrize("name", step.DEFAULTS["cuda"])
def test_a_group_of_variants_fits_the_device(name):
    case = step.CASES[name]
    sizes = [step.expected_gib(case, group) for group in case.groups]
    assert max(sizes) <= step.H200_GIB, sizes
    if name == "1.3b":  # the arithmetic: three states beside the activations that `ours` keeps
        assert step.expected_gib(case, ("ours", "diffusers", "diffusers, tuned")) == pytest.approx(129, abs=1)
        assert {v for group in case.groups for v in group} >= {"ours", "ours, eager", "diffusers", "diffusers, tuned"}


def test_what_was_measured_is_kept_when_a_run_is_killed(tmp_path, monkeypatch):
    """The JSON is written after each group of variants, and after each step at a length."""
    done = []

    def killed_after(count, result):
        def run(*args):
            done.append(args)
            if len(done) > count:
                raise KeyboardInterrupt
            return result

        return run

    monkeypatch.setattr(step, "process_group", nullcontext)
    monkeypatch.setattr(step, "compare", lambda *args: {})
    monkeypatch.setattr(step, "measure", lambda *args: None)
    monkeypatch.setattr(step, "time_group", killed_after(3, {}))
    monkeypatch.setattr(step, "environment", lambda device: {})
    with pytest.raises(KeyboardInterrupt):
        step.main(["--device", "cpu", "--cases", "toy", "cpu-256", "1.3b", "--json", str(tmp_path / "step.json")])
    kept = json.loads((tmp_path / "step.json").read_text())["results"]
    assert [(case["case"], len(case["groups"])) for case in kept] == [("toy", 1), ("cpu-256", 1), ("1.3b", 1)]
    # The rest of the groups in another file is a part of the same section.
    done.clear()
    step.main(["--device", "cpu", "--cases", "1.3b", "--groups", "1", "2", "--json", str(tmp_path / "step.2.json")])
    merged = report.load(tmp_path)["step"]["results"]
    assert [(case["case"], len(case["groups"])) for case in merged[2:]] == [("1.3b", 1), ("1.3b", 2)]

    done.clear()
    run = {"latent frames": 2, "tokens": 10, "seconds": 1.0, "loss": 1.0, "peak GiB": 1.0, "reserved GiB": 1.0}
    monkeypatch.setattr(memory, "process_group", nullcontext)
    monkeypatch.setattr(memory, "our_step", lambda *args: None)
    monkeypatch.setattr(memory, "attempt", killed_after(2, run))
    with pytest.raises(KeyboardInterrupt):
        memory.main(["--toy", "--device", "cpu", "--json", str(tmp_path / "memory.json")])
    page = report.page(report.load(tmp_path))
    assert "too few lengths ran to say more" in page and page.count("| 5 | 10 | 1.0 |") == 1


def test_each_command_of_the_plan_takes_at_most_eight_minutes():
    text = (ROOT / "benchmarks" / "run_all.sh").read_text()
    commands = re.findall(r"^(\w+)\)(.*?)^    ;;", text, flags=re.DOTALL | re.MULTILINE)
    assert [name for name, _ in commands] == re.findall(r"run_all.sh (\w+) FOLDER", text)
    for name, body in commands:
        limits = [int(n) for n in re.findall(r"run [\w.]+ (\d+) |timeout (\d+) ", body) for n in n if n]
        assert 0 < sum(limits) <= 480, (name, limits)
    named = re.findall(r"run ([\w.]+) \d+ ", text)
    assert {name.partition(".")[0] for name in named} == set(report.COMMANDS) - {"block_bytes", "step_cpu", "data"}


def test_rounds_alternate_and_ties_are_reported():
    calls = []
    times = common.interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, torch.device("cpu"), rounds=4, budget=0
    )
    assert "".join(calls) == "abbaabba" and len(times["a"].seconds) == 4
    fast, slow, noisy_times = (
        common.Times((1.0, 1.1, 1.0, 1.1)),
        common.Times((2.0, 2.1, 2.0, 2.1)),
        common.Times((0.5, 3.0, 0.6, 2.9)),
    )
    assert (
        fast.speedup(over=slow) == "1.95"
        and fast.ties(noisy_times)
        and fast.speedup(over=noisy_times).endswith("(tie)")
    )


def test_roof_is_the_sum_of_its_parts():
    """At one FLOP and one byte per second, seconds are FLOPs and bytes."""
    args, tokens = SPEC.flavors["t2v-1.3B"], 32760
    ceilings = roof.Ceilings(1.0, dict.fromkeys(roof.gemm_shapes(args, tokens).values(), 1.0), "cudnn", 1.0, 1.0)
    parts = {mode: roof.roof(args, tokens, 1, mode, 1_000, ceilings) for mode in ("none", "selective", "full")}
    own, text = attention_flops(1, tokens, tokens, 1536), attention_flops(1, tokens, 512, 1536)
    assert parts["none"]["attention"] == 30 * 3.5 * (own + text)
    assert parts["none"]["attention"] + parts["none"]["matmuls"] == 3 * args.flops(tokens) + 30 * 0.5 * (own + text)
    assert parts["full"]["attention"] - parts["none"]["attention"] == 30 * (own + text)
    assert parts["selective"]["attention"] - parts["none"]["attention"] == 30 * text
    again = parts["full"]["matmuls"] - parts["none"]["matmuls"]
    assert (
        again
        == parts["selective"]["matmuls"] - parts["none"]["matmuls"]
        == 30 * 2 * tokens * 1536 * (6 * 1536 + 2 * 8960)
    )
    assert parts["none"]["optimizer"] == 44_000
    assert sum(parts["none"].values()) < sum(parts["selective"].values()) < sum(parts["full"].values())


def test_search_for_the_longest_clip_ends_at_it():
    for limit in (81, 82, 200, 399, 1000):
        tried = []
        found = memory.longest(lambda n: tried.append(n) or n <= limit, low=81, high=400, guess=300, step=4)
        assert found <= limit and (limit - found < 4 or limit > 400) and len(tried) <= 9
    assert memory.longest(lambda n: None, low=81, high=400, guess=300, step=4) == 81
    assert memory.fit_line([(1.0, 5.0), (2.0, 7.0), (3.0, 9.0)]) == pytest.approx((2.0, 3.0))


def test_kernels_are_sorted_by_name_and_the_rest_is_gaps():
    names = {
        "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16": "attention",
        "void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>": "attention",
        "nvjet_tst_256x128_64x4_2x1_v_bz_TNT": "matmuls",
        "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n": "matmuls",
        "triton_poi_fused_addmm_gelu_0": "norms and element-wise",
        "layer_norm_backward": "norms and element-wise",
        "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "optimizer",
        "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add>": "norms and element-wise",
    }
    assert {name: profile_step.get_part(name) for name in names} == names
    assert profile_step.busy([(0.0, 1.0), (0.5, 2.0), (3.0, 4.0), (3.2, 3.4)]) == 3.0


def test_page_equals_the_report_of_the_results():
    assert report.PAGE.read_text() == report.page(report.load(report.RESULTS))


def test_page_of_layouts_has_the_tables_that_the_script_prints():
    page = (ROOT / "docs" / "parallelism.md").read_text()
    assert page.split(traffic.MARKER)[1].strip() == traffic.page("t2v-14B", 75600, 8)


def test_page_of_layouts_says_when_hsdp_is_due():
    page = (ROOT / "docs" / "parallelism.md").read_text()
    assert page.split(hsdp.MARKER)[1].strip() == hsdp.page("t2v-14B", 75600, 16, 500e12, hsdp.Network())
    network = hsdp.Network(gpus=8, bandwidth=(10.0, 100.0), hop=(3.0, 1.0))
    assert network.ring(8, 80.0) == 0.7 + 7  # inside a machine
    assert network.ring(32, 32.0) == 3.1 + 3 * 3.0 + 28 * 1.0
    assert network.all_reduce(1, 40.0) == 0 and network.all_reduce(4, 40.0) == 2 * 3 * (1.0 + 3.0)


def split_block():
    mesh = ParallelDims().build_mesh("cpu")
    with torch.device("meta"):
        model = WanModel(SPEC.flavors["debug"])
    apply_tensor_parallel(model, SPEC.plan, mesh.tp, False)
    return collectives_per_block(SPEC.plan, model.blocks["0"])


def test_table_of_layouts_has_the_counts_of_tensor_parallel():
    """The counts that tests/distributed_tests/test_tensor_parallel.py finds on real ranks."""
    row = next(row for row in traffic.rows(SPEC.flavors["t2v-14B"], 75600, 8) if row[0] == "tensor parallel")
    assert [row[1], row[2]] == [traffic.describe(calls) for calls in run_ranks(split_block, 1)[0]]


# ---- the planner's ----


def test_the_planners_scripts_print_their_tables(capsys, tmp_path, monkeypatch):
    """On a small model and a few GPUs: candidates a second; shipped layouts; strategies."""
    figures = planner_search.main(["--config", "shapes", "--gpus", "4", "--clips", "16", "--rounds", "1"])
    assert figures["candidates"] > 100 and figures["solved exactly"] > 0 and figures["step"] > 0
    page = tmp_path / "page.md"
    page.write_text(f"before\n{planner_shipped.MARKER}\nold\n{planner_shipped.MARKER}\nafter\n")
    monkeypatch.setattr(planner_shipped, "num_gpus", lambda path: 2)
    planner_shipped.main(["shapes", "--write", str(page)])
    row = page.read_text().splitlines()[4]
    assert "old" not in page.read_text() and re.match(r"\| `shapes` +\| +2 \|", row), row
    monkeypatch.setattr(
        planner_strategies, "strategies", lambda gpus: {"the plan": {}, "pp": {"pp": 2}, "no": {"tp": 5}}
    )
    two = (ROOT / "train_configs" / "clusters" / "h100x8.toml").read_text()
    two = two.replace("gpus = 8\ngpus_per_node = 8\n", "gpus = 2\ngpus_per_node = 2\n")
    (tmp_path / "two.toml").write_text(two)
    planner_strategies.main(["--config", "shapes", "--cluster", str(tmp_path / "two")])
    printed = capsys.readouterr().out
    assert re.search(r"\| the plan +\| +[\d.]+ \| +\+0.0%", printed) and "not legal with" in printed
    assert re.search(r"\| the fastest +\| +[\d.]+ \| +[+-][01].\d%", printed)
