"""Optimizer, EMA, objective, sampling: each against what it should compute, without ranks."""

import pytest
import torch

from tests.helpers import build_denoising
from titan_video.config.job_config import Ema, Optimizer
from titan_video.data.batch import Batch
from titan_video.distributed.utils import clip_grad_norm, initialise
from titan_video.models.layers import patchify, token_shape, unpatchify
from titan_video.models.wan import SPEC, WanArgs, WanModel
from titan_video.optim.ema import EmaWeights
from titan_video.optim.optimizer import build_optimizer
from titan_video.tasks.sampling import Prompt, SamplerSettings, file_name, sample_latents
from titan_video.tasks.validation import shard_indices

ARGS = WanArgs(dim=24, num_heads=2, num_layers=1, ffn_dim=32, text_dim=8, text_len=5, freq_dim=16)


def tiny_model():
    model = WanModel(ARGS)
    initialise(model, SPEC.init_parameter, 0)
    return model


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_adamw_decays_matrices_only_and_all_implementations_agree(implementation):
    model = tiny_model()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = build_optimizer(model, Optimizer(lr=0.1, weight_decay=0.5, implementation=implementation))
    assert (optimizer.defaults["fused"], optimizer.defaults["foreach"]) == (
        implementation == "fused",
        implementation == "foreach",
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in model.named_parameters():
        decayed = p.ndim == 2 and "modulation" not in n
        torch.testing.assert_close(p.detach(), before[n] * (0.95 if decayed else 1.0), msg=n)


def test_ema_follows_its_formula_and_swaps_exactly():
    model = tiny_model()
    ema = EmaWeights(model, Ema(enable=True, decay=0.9, start_step=1, interval=2))
    name, p = next(iter(model.named_parameters()))
    values = []
    for step in range(1, 6):
        with torch.no_grad():
            p.fill_(float(step))
        ema.update(step)
        values.append(ema.shadow[name].mean().item())
    # a copy at step 1; steps 3 and 5 are averaged, 2 and 4 are between
    assert values == pytest.approx([1.0, 1.0, 0.9 + 0.3, 1.2, 1.2 * 0.9 + 0.5])
    with ema.swapped_in():
        assert p.mean().item() == pytest.approx(values[-1])
        with pytest.raises(RuntimeError), ema.swapped_in():
            raise RuntimeError
    assert torch.equal(p, torch.full_like(p, 5.0)) and ema.shadow[name].mean().item() == pytest.approx(values[-1])


class Oracle(torch.nn.Module):
    """Answers with the true velocity from clean latents to noise, plus a constant error."""

    def __init__(self, x0, noise, error=0.0):
        super().__init__()
        self.v, self.error = patchify(noise - x0, ARGS.patch), error
        self.seen = None

    def forward(self, *, x_BLP, pos_BL3, t_B, text_BSD, text_mask_BS, layout):
        assert layout is None
        self.seen = x_BLP, pos_BL3, t_B
        return self.v + self.error


def test_loss_is_the_weighted_squared_error_per_sample():
    x0, noise = torch.randn(2, 16, 3, 4, 6), torch.randn(2, 16, 3, 4, 6)
    batch = Batch({"video": x0}, torch.zeros(2, 5, 8), torch.ones(2, 5, dtype=torch.bool), torch.arange(2))
    s, w = torch.tensor([0.25, 0.75]), torch.tensor([1.0, 3.0])
    task = build_denoising(SPEC, ARGS)
    inputs = task.add_noise(batch, noise, sigma_B=s, weight_B=w)
    assert task.loss(Oracle(x0, noise)(**inputs.kwargs), inputs).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    model = Oracle(x0, noise, error=0.5)
    assert task.loss(model(**inputs.kwargs), inputs).tolist() == pytest.approx(
        [0.25 * x0[0].numel(), 0.75 * x0[0].numel()]
    )
    assert task.num_loss_elements(batch) == x0.numel()
    x, pos, t = model.seen
    shape = token_shape((3, 4, 6), ARGS.patch)
    assert t.tolist() == [250.0, 750.0] and pos.shape == (1, shape.num_tokens, 3)
    torch.testing.assert_close(unpatchify(x, shape, ARGS.patch)[1], 0.25 * x0[1] + 0.75 * noise[1])


class TowardsPoint(torch.nn.Module):
    """The flow towards `point` for rows with a prompt, towards 0 for rows with the empty one (text all zero)."""

    def __init__(self, point, shape):
        super().__init__()
        self.point, self.calls = patchify(point, ARGS.patch), []

    def forward(self, *, x_BLP, pos_BL3, t_B, text_BSD, text_mask_BS, layout):
        self.calls.append(len(x_BLP))
        has_prompt = (text_BSD.abs().sum((1, 2)) > 0).float()[:, None, None]
        return (x_BLP - has_prompt * self.point) / (t_B / 1000)[:, None, None]


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_sampling_ends_at_the_guided_point(scale):
    shape = (16, 2, 4, 4)
    point = torch.randn(1, *shape)
    model = TowardsPoint(point, shape)
    prompt = Prompt(torch.ones(2, 5, 8), torch.ones(2, 5, dtype=torch.bool))
    null = Prompt(torch.zeros(1, 5, 8), prompt.mask_BL[:1])
    settings = SamplerSettings(num_steps=6, guidance_scale=scale, shift=3.0, seed=0)
    out = sample_latents(model, ARGS, prompt, null, shape, [4, 9], settings)
    torch.testing.assert_close(out, (scale * point).expand(2, *shape), atol=2e-4, rtol=1e-4)
    assert model.calls == [2 if scale == 1 else 4] * 6


def test_clip_returns_the_norm_and_scales():
    model = tiny_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0)
    count = sum(p.numel() for p in model.parameters())
    assert clip_grad_norm(model, 1.0).item() == pytest.approx(2 * count**0.5, rel=1e-5)
    assert clip_grad_norm(model, 0.0).item() == pytest.approx(1.0, rel=1e-4)
    assert clip_grad_norm(model, 10.0).item() == pytest.approx(1.0, rel=1e-4)


def test_items_are_sharded_once_and_evenly():
    for items in (1, 3, 4, 7):
        for world in (1, 2, 4):
            shares = [shard_indices(items, rank, world) for rank in range(world)]
            assert len({len(s) for s in shares}) == 1
            assert sorted(i for s in shares for i, is_counted in s if is_counted) == list(range(items))


def test_file_names_of_prompts():
    assert file_name("A red/blue circle: moves ../left!") == "A_red_blue_circle_moves_left"
    assert file_name("") == "empty" and len(file_name("word " * 100)) <= 60
