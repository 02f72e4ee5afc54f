"""The optimizer's kernels against the plain updates: cases for Triton's interpreter and for a GPU.

TRITON_INTERPRET=1 python -m tests.optimizer_cases    runs all cases in the interpreter

The interpreter must be chosen before Triton is imported.
"""

import copy
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from titan_video import kernels  # noqa: E402
from titan_video.config.job_config import Optimizer
from titan_video.kernels.triton import launch
from titan_video.kernels.triton import optimizer as fused_updates
from titan_video.optim.low_bit import codebook, codebooks, quantize
from titan_video.optim.mixed import MixedOptimizer
from titan_video.optim.optimizer import build_optimizer

# Whole blocks of 8-bit state, rows with a short last block, and rows shorter than a block; two tensors of one shape.
SHAPES = {"a": (12, 256), "b": (12, 256), "c": (7, 100), "d": (40, 24), "bias": (96,), "modulation": (2, 3, 64)}
CASES = [(name, dtype) for name in ("AdamW", "AdamW8bit", "Muon") for dtype in (torch.float32, torch.bfloat16)]


def weights(dtype: torch.dtype, device: str) -> nn.ParameterDict:
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    kept = {name: x if x.ndim == 3 else x.to(dtype) for name, x in found.items()}  # modulation stays in float32
    return nn.ModuleDict({"blocks": nn.ParameterDict({name: x.to(device) for name, x in kept.items()})})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """With gradients that differ by orders of magnitude within a block, and a row of zeros."""
    generator = torch.Generator().manual_seed(number)
    for p in model.parameters():
        grad = torch.randn(p.shape, generator=generator) * torch.rand(p.shape, generator=generator) ** 4
        grad[0] = 0 if p.ndim > 1 else grad[0]
        p.grad = grad.to(p)
    optimizer.step()


def check(name: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """From the state of two plain steps, a third one by kernels and one in plain torch."""
    section = Optimizer(name=name, lr=0.01, weight_decay=0.1)
    if name == "AdamW" and dtype == torch.float32:  # with Muon of no blocks, AdamW of float32 weights
        section, blocks = Optimizer(name="Muon", lr=0.01, weight_decay=0.1), ()
    else:
        blocks = ("blocks",)
    model = weights(dtype, device)
    optimizer = build_optimizer(model, section, blocks, seed=3)
    assert isinstance(optimizer, MixedOptimizer)
    kernels.set_backend("torch")
    step(model, optimizer, 1)
    step(model, optimizer, 2)
    twin = copy.deepcopy(model)
    other = build_optimizer(twin, section, blocks, seed=3)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        other.state[q].update({slot: value.clone() for slot, value in optimizer.state[p].items()})
    step(model, optimizer, 3)
    kernels.set_backend("triton")
    try:
        step(twin, other, 3)
    finally:
        kernels.set_backend("torch")
    for key, p in model.named_parameters():
        q = twin.get_parameter(key)
        close(f"{name} {dtype} {key}", q.detach(), p.detach())
        for slot, value in optimizer.state[p].items():
            close(f"{name} {dtype} {key}.{slot}", other.state[q][slot], value)


def close(what: str, found: Tensor, expected: Tensor) -> None:
    """Equal within float32's rounding: a code may be its neighbour, a rounded weight the next one, in few elements."""
    assert found.dtype == expected.dtype, what
    if expected.dtype == torch.uint8:
        apart = (found.int() - expected.int()).abs()
        assert apart.max() <= 1 and (apart > 0).float().mean() < 1e-3, f"{what}: {apart.max()}"
    elif expected.dtype == torch.bfloat16:
        apart = (found.float() - expected.float()).abs() / expected.float().abs().clamp_min(1e-30)
        assert apart.max() <= 2**-7 and (apart > 0).float().mean() < 2e-3, f"{what}: {(apart > 0).float().mean()}"
    else:
        torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7, msg=lambda text: f"{what}: {text}")


def check_codes(device: str = "cpu") -> None:
    """All codes and the middles between them: a moment of one step is the gradient's."""
    for signed in (True, False):
        table = codebook(signed, torch.device("cpu"))
        middles = (table[1:] + table[:-1]) / 2
        away = (table[1:] - table[:-1]) * 1e-4
        drawn = torch.rand(4096, generator=torch.Generator().manual_seed(0)) * (1 + signed) - int(signed)
        between = torch.searchsorted(middles, drawn).clamp_max(len(middles) - 1)
        near = torch.minimum((drawn - middles[between]).abs(), (drawn - middles[(between - 1).clamp_min(0)]).abs())
        drawn = drawn[near > 1e-6]  # the root of a square may be another float, which is over the middle
        values = torch.cat([table, middles - away, middles + away, drawn])
        values = values.clamp(-1.0 if signed else 0.0, 1.0)
        rows = torch.nn.functional.pad(values, (0, -len(values) % 63)).unflatten(0, (-1, 63))
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1).to(device)  # the scale of every block is 1
        codes, scale = torch.empty_like(rows, dtype=torch.uint8), torch.empty(len(rows), 1, device=device)
        quantize(rows, codes, scale, signed)
        zeros = torch.zeros_like(rows)
        state = [torch.zeros_like(codes), torch.zeros_like(scale), torch.zeros_like(codes), torch.zeros_like(scale)]
        # Without decay of the moments, the first moment is the gradient and the root of the second its magnitude.
        part = fused_updates.Part(zeros, rows, tuple(state), step_size=0.0, root_factor=1.0)
        group = {"betas": (0.0, 0.0), "lr": 0.0, "weight_decay": 0.0, "eps": 1e-8, "kind": "AdamW8bit"}
        fused_updates.adamw([part], group, codebooks(rows.device))
        found = state[0] if signed else state[2]
        assert torch.equal(found, codes), (signed, rows[found != codes], found[found != codes], codes[found != codes])
        assert torch.equal(state[1], scale) and torch.equal(state[3], scale) and not zeros.any()


def main() -> None:
    assert launch.interpreted(), "TRITON_INTERPRET=1 is not set"
    check_codes()
    for case in CASES:
        check(*case)
    print(f"{len(CASES)} cases")


if __name__ == "__main__":
    main()
