"""A compiled block has the gradients of an eager one, at the length of a real clip. Not run on a GPU yet."""

import pytest
import torch

from tests.helpers import randomized_init
from titan_video import kernels
from titan_video.distributed.compile import apply_compile
from titan_video.distributed.utils import initialise
from titan_video.kernels import attention
from titan_video.models.wan import SPEC, WanArgs, WanModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ARGS = WanArgs(dim=1024, num_heads=8, num_layers=1, ffn_dim=512, text_dim=64, text_len=16, freq_dim=32)


def gradients(device, num_tokens, compiled=False, args=ARGS):
    model = WanModel(args)
    initialise(model, randomized_init(SPEC.init_parameter), 0)
    model.to(device)
    if compiled:
        apply_compile(model, SPEC.plan, "inductor")
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, num_tokens, 64, generator=g), torch.randn(1, args.text_len, args.text_dim, generator=g)
    weight = torch.randn(1, num_tokens, 64, generator=g)
    positions = torch.arange(3 * num_tokens).view(1, num_tokens, 3) % 100
    inputs = {"x_BLP": x, "pos_BL3": positions, "t_B": torch.tensor([500.0]), "text_BSD": text}
    out = model(**{name: t.to(device) for name, t in inputs.items()})
    (out * weight.to(device)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_long_compiled_block_has_the_gradients_of_eager(backend):
    """From some 16,000 tokens on the compiler fuses reductions in another way, and did so wrongly (compile.py)."""
    device = torch.device("cuda")
    torch._dynamo.reset()
    attention.set_backend("efficient", device, torch.float32, ARGS.head_dim)
    kernels.set_backend(backend)
    try:
        compiled = gradients(device, 32_760, compiled=True)
        kernels.set_backend("torch")
        eager = gradients(device, 32_760)
    finally:
        kernels.set_backend("torch")
        attention._order = ()
    for name, expected in eager.items():
        difference = ((compiled[name] - expected).norm() / expected.norm()).item()
        assert difference <= 1e-3, (name, difference)
