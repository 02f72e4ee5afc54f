"""A checkpoint does not depend on the layout: each layout loads what the previous one saved, and nothing changes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.helpers import randomized_init, run_ranks
from titan_video.checkpoint import files
from titan_video.checkpoint.manager import CheckpointManager, load_weights
from titan_video.checkpoint.state import ModelState, OptimizerState
from titan_video.config.job_config import (
    ActivationCheckpoint,
    Checkpoint,
    Compile,
    Ema,
    Flow,
    Optimizer,
    Parallelism,
    Training,
)
from titan_video.data.batch import Batch
from titan_video.distributed.parallel_dims import ParallelDims
from titan_video.distributed.parallelize import parallelize
from titan_video.distributed.pipeline_parallel import Pipeline, keep_stages
from titan_video.distributed.sequence import SequenceShard, whole_sequence
from titan_video.distributed.utils import gather_objects, initialise, reduce_over, to_local
from titan_video.flow.matching import FlowMatching
from titan_video.flow.noise import draw_noise
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.optim.ema import EmaWeights
from titan_video.optim.optimizer import build_optimizer
from titan_video.tasks.denoising import Denoising
from titan_video.weights.export.save import save_hf
from titan_video.weights.hf_storage import load_hf

SIZES = {"num_layers": 2, "text_dim": 20, "text_len": 9, "freq_dim": 32}
# 25 rows of ffn.up on each of two tensor-parallel ranks: FSDP shards them unevenly. Four such ranks need four heads.
ODD = WanArgs(dim=36, num_heads=2, ffn_dim=50, **SIZES)
FOUR = WanArgs(dim=48, num_heads=4, ffn_dim=52, **SIZES)
LAYOUTS = {
    "fsdp2": {"dp_shard": 2},
    "fsdp4": {"dp_shard": 4},
    "hsdp2x2": {"dp_replicate": 2, "dp_shard": 2},
    "tp2 x fsdp2": {"dp_shard": 2, "tp": 2},
    "tp4": {"tp": 4},
    "ulysses2 x fsdp2": {"dp_shard": 2, "ulysses": 2},
    "pp2": {"pp": 2},
    "pp2 of 1 and 2 blocks": {"pp": 2},
    "pp2 of 2 and 1 blocks": {"pp": 2},
    "pp2 x fsdp2": {"pp": 2, "dp_shard": 2},
    "pp2 x tp2": {"pp": 2, "tp": 2},
}
SPLITS = {"pp2 of 1 and 2 blocks": (0, 1), "pp2 of 2 and 1 blocks": (0, 2)}  # others are balanced
# (number of ranks, model, layouts). Each chain starts and ends at one rank without a process group.
CHAINS = {
    "two": (2, replace(ODD, num_layers=3), ("pp2 of 1 and 2 blocks", "fsdp2", "pp2 of 2 and 1 blocks")),
    "four": (4, ODD, ("tp2 x fsdp2", "pp2 x fsdp2", "hsdp2x2")),
}
SLOW_CHAINS = {
    "two, balanced": (2, ODD, ("fsdp2", "pp2")),
    "four, all": (4, ODD, ("tp2 x fsdp2", "fsdp4", "pp2 x fsdp2", "hsdp2x2", "pp2 x tp2", "ulysses2 x fsdp2")),
    "tp4": (4, FOUR, ("tp4",)),
}


class Run:
    """A model in a layout ("one": this process alone), its optimizer, EMA weights and checkpoint manager."""

    def __init__(self, args: WanArgs, layout: str, folder: Path, mode: str = "disabled"):
        self.args, self.meshes = args, None if layout == "one" else ParallelDims(**LAYOUTS[layout]).build_mesh("cpu")
        with torch.device("meta"):
            self.model = WanModel(args)
        self.forward = self.model
        if self.meshes is not None:
            pp, split = self.meshes.pp, SPLITS.get(layout, ())
            section = Parallelism(pipeline_parallel_degree=pp.size(), pipeline_parallel_split=split)
            stages = keep_stages(self.model, SPEC.plan, pp, section, args, 15) if pp.size() > 1 else None
            training = Training(mixed_precision_param="float32")
            parallelize(
                self.model, SPEC.plan, self.meshes, section, training, ActivationCheckpoint(mode="full"), Compile()
            )
            if stages is not None:
                self.forward = Pipeline(self.model, stages, SPEC.plan, pp, section, torch.float32, torch.device("cpu"))
        self.model.to_empty(device="cpu")
        with torch.no_grad():
            for p in self.model.parameters():
                to_local(p).fill_(float("nan"))
        self.optimizer = build_optimizer(self.model, Optimizer(lr=1e-2))
        self.ema = EmaWeights(self.model, Ema(enable=True, decay=0.5))
        states = {
            "model": ModelState(self.model),
            "optimizer": OptimizerState(self.model, self.optimizer),
            "ema": self.ema,
        }
        self.checkpoint = CheckpointManager(
            Checkpoint(interval=1, async_mode=mode, keep_latest_k=0), folder, states, {}
        )

    def loss(self) -> torch.Tensor:
        """Of the same two clips on all data ranks. 15 tokens divide by no number of ranks."""
        ids = torch.tensor([3, 4])
        text = draw_noise(1, ids, (self.args.text_len, self.args.text_dim))
        batch = Batch(
            {"video": draw_noise(2, ids, (16, 1, 6, 10))},
            text,
            torch.ones(2, self.args.text_len, dtype=torch.bool),
            ids,
        )
        shard = SequenceShard.from_meshes(self.meshes) if self.meshes else whole_sequence()
        task = Denoising(SPEC, self.args, FlowMatching(Flow()), shard, torch.device("cpu"))
        noise = draw_noise(0, ids, tuple(batch.streams["video"].shape[1:]))
        inputs = task.add_noise(batch, noise, torch.tensor([0.3, 0.8]))
        loss = task.loss(self.forward(**inputs.kwargs), inputs).sum()
        return reduce_over(self.meshes.sequence, loss, "sum") if self.meshes else loss


def write_reference(folder: Path, args: WanArgs) -> None:
    """Two steps of one process. Saves step-0 of the chain, the same tensors in a file, exports, and the next loss."""
    run = Run(args, "one", folder)
    initialise(run.model, randomized_init(SPEC.init_parameter), 0)
    run.ema.reset()
    for step in (1, 2):
        run.loss().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        run.ema.update(step)
    run.checkpoint.save(0, force=True)
    run.checkpoint.close()
    save_hf(run.model, folder / "hf", SPEC, args, torch.float32, 20_000)
    loaded = {name: p.bfloat16().float() for name, p in ModelState(run.model).state_dict().items()}
    save_hf(run.model, folder / "hf_loaded", SPEC, args, torch.bfloat16)
    torch.save(
        {"tensors": run.checkpoint._live_tensors(), "hf_loaded": loaded, "loss": run.loss().item()},
        folder / "reference.pt",
    )


def equal_parts(mine: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """This rank's shards equal those of the reference bit for bit, and the ranks together have all tensors."""
    for name, tensor in mine.items():
        expected = reference[name]
        if isinstance(tensor, DTensor):
            expected = distribute_tensor(expected, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
        assert tensor.dtype == expected.dtype and torch.equal(to_local(tensor), expected), name
    parts = gather_objects(set(mine)) if dist.is_initialized() else [set(mine)]
    assert set.union(*parts) == reference.keys()


def hop(folder: Path, args: WanArgs, layout: str, step: int, mode: str) -> None:
    """Load what the previous layout saved in all three ways; save and export it."""
    reference = torch.load(folder / "reference.pt")
    tensors = reference["tensors"]
    run = Run(args, layout, folder, mode)
    load_hf(run.model, folder / "hf_loaded", SPEC, args)
    equal_parts(ModelState(run.model).state_dict(), reference["hf_loaded"])
    assert load_weights(files.step_folder(folder, step - 1), run.model, "ema") == step - 1
    equal_parts(
        ModelState(run.model).state_dict(),
        {name.removeprefix("ema."): t for name, t in tensors.items() if name.startswith("ema.")},
    )
    assert run.checkpoint.load() == step - 1
    equal_parts(run.checkpoint._live_tensors(), tensors)
    assert run.checkpoint.save(step)
    run.checkpoint.close()
    with torch.no_grad():
        assert run.loss().item() == pytest.approx(reference["loss"], rel=2e-5)
    save_hf(run.model, folder / layout, SPEC, args, torch.float32, 20_000)


def run_chain(folder: Path, args: WanArgs, layouts: tuple[str, ...]) -> None:
    for step, layout in enumerate(layouts, 1):
        hop(folder, args, layout, step, ("async", "disabled")[step % 2])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("chain", [*CHAINS, *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_CHAINS)])
def test_a_state_goes_through_all_layouts(tmp_path, chain):
    world, args, layouts = (CHAINS | SLOW_CHAINS)[chain]
    write_reference(tmp_path, args)
    run_ranks(run_chain, world, tmp_path, args, layouts, timeout=240)
    hop(tmp_path, args, "one", len(layouts) + 1, "disabled")
    for layout in layouts:
        assert contents(tmp_path / layout) == contents(tmp_path / "hf"), layout
    for step in range(len(layouts) + 2):
        index = files.verify(files.step_folder(tmp_path, step))[1]
        chunks = [chunk for entry in index.state_dict_metadata.values() for chunk in entry.chunks]
        assert len(index.storage_data) == len(chunks), "each chunk is written once"


def refused(folder: Path, others: dict[str, WanArgs]) -> dict[str, str]:
    """The error of this rank for checkpoints of other models, by name."""
    texts = {}
    for name, args in others.items():
        run = Run(args, "pp2", folder)
        with pytest.raises(ValueError) as e:
            run.checkpoint.load()
        texts[name] = str(e.value)
        with pytest.raises(ValueError, match="its `model` tensors are not those of this run"):
            load_weights(files.step_folder(folder, 0), run.model)
    run = Run(ODD, "pp2", folder)
    with pytest.raises(ValueError, match="no rank has: blocks.1.norm_weight, blocks.1.norm_bias"):
        if dist.get_rank() == 1:
            del run.model.blocks["1"]
        save_hf(run.model, folder / "hf_part", SPEC, ODD, torch.float32)
    return texts


def test_ranks_with_different_parameters_refuse_together(tmp_path):
    """The difference is on one pipeline stage only; all ranks raise the same error, and none waits."""
    write_reference(tmp_path, ODD)
    others = {
        "deeper": replace(ODD, num_layers=3),
        "wider": replace(ODD, out_channels=17),
        "other": replace(ODD, ffn_dim=60),
    }
    first, second = run_ranks(refused, 2, tmp_path, others)
    assert first == second
    assert "the checkpoint lacks blocks.2." in first["deeper"] and "step-0" in first["deeper"]
    assert "proj_out.weight has shape [64, 36] in the checkpoint and [68, 36] in the run" in first["wider"]
    assert "blocks.0.ffn.down.weight has shape [36, 50]" in first["other"] and "and 3 more" in first["other"]
