"""The objective's mathematics: densities against their closed forms, keyed noise, the solver against an exact flow."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import build_denoising
from titan_video.config.job_config import Flow
from titan_video.data.batch import Batch
from titan_video.flow.matching import FlowMatching, interpolate, time_shift, velocity_target
from titan_video.flow.noise import draw_noise, draw_uniform, drop_caption
from titan_video.flow.solver import euler, guided, sampling_sigmas
from titan_video.models.wan import SPEC, WanArgs

GRID = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000


def empirical_cdf(sigmas, at):
    return [(sigmas <= x).double().mean().item() for x in at]


def test_interpolation_runs_from_data_to_noise_and_velocity_is_its_slope():
    x0, noise = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    assert torch.equal(interpolate(x0, noise, torch.zeros(3)), x0)
    assert torch.equal(interpolate(x0, noise, torch.ones(3)), noise)
    s = torch.tensor([0.1, 0.5, 0.9])
    slope = (interpolate(x0.double(), noise.double(), s + 1e-3) - interpolate(x0.double(), noise.double(), s)) / 1e-3
    torch.testing.assert_close(slope, velocity_target(x0, noise), atol=1e-3, rtol=1e-3)
    assert interpolate(x0.bfloat16(), noise.bfloat16(), s).dtype == torch.float32


def test_uniform_and_logit_normal_have_their_distributions():
    at = [0.1, 0.3, 0.5, 0.7, 0.9]
    uniform = FlowMatching(Flow(timestep_density="uniform", shift="none")).sigmas(GRID, 100)
    assert empirical_cdf(uniform, at) == pytest.approx(at, abs=1e-3)
    mean, std = 0.4, 1.3
    normal = FlowMatching(Flow(timestep_density="logit_normal", logit_mean=mean, logit_std=std, shift="none")).sigmas(
        GRID, 100
    )
    exact = [0.5 * (1 + math.erf((math.log(x / (1 - x)) - mean) / std / math.sqrt(2))) for x in at]
    assert empirical_cdf(normal, at) == pytest.approx(exact, abs=1e-3)


def test_mode_density_follows_the_paper():
    """Esser et al. 2024, eq. 20: s = 1 - u - scale (cos^2(pi u / 2) - 1 + u), for uniform u."""
    scale = 1.29
    u = np.random.default_rng(0).random(200_000)
    paper = np.sort(1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u))
    ours = FlowMatching(Flow(timestep_density="mode", mode_scale=scale, shift="none")).sigmas(GRID, 100)
    assert np.quantile(paper, [0.05, 0.3, 0.5, 0.8]) == pytest.approx(
        ours.double().quantile(torch.tensor([0.05, 0.3, 0.5, 0.8]).double()).numpy(), abs=5e-3
    )
    assert (ours[1:] >= ours[:-1]).all()


@pytest.mark.parametrize("density", ["uniform", "logit_normal", "mode"])
def test_cut_levels_are_the_full_density_conditioned_on_the_interval(density):
    flow = dict(timestep_density=density, shift="constant", shift_value=5.0)
    full = FlowMatching(Flow(**flow)).sigmas(GRID, 100)
    cut = FlowMatching(Flow(**flow, min_t=0.6, max_t=0.9)).sigmas(GRID, 100)
    inside = full[(full >= 0.6) & (full <= 0.9)]
    at = [0.65, 0.7, 0.8, 0.85]
    assert cut.min() >= 0.6 and cut.max() <= 0.9
    assert empirical_cdf(cut, at) == pytest.approx(empirical_cdf(inside, at), abs=5e-3)


def test_shift_by_resolution_follows_the_square_root_of_tokens():
    flow = FlowMatching(Flow(shift="resolution", shift_value=3.0, shift_base_tokens=1000))
    assert flow.alpha(1000) == 3.0 and flow.alpha(4000) == 6.0
    assert FlowMatching(Flow(shift="none")).alpha(4000) == 1.0
    assert time_shift(0.5, 3.0) == 0.75
    assert time_shift(time_shift(0.3, 3.0), 1 / 3.0) == pytest.approx(0.3)
    uniform = FlowMatching(Flow(timestep_density="uniform", shift="constant", shift_value=3.0)).sigmas(
        torch.tensor([0.5]), 10
    )
    assert uniform.item() == pytest.approx(0.75)


def test_bell_weight_has_mean_one_over_the_drawn_levels_and_favours_the_middle():
    flow = FlowMatching(Flow(loss_weighting="bell", shift_value=5.0))
    sigmas = flow.sigmas(GRID, 100)
    w = flow.weights(sigmas, 100)
    assert w.mean().item() == pytest.approx(1.0, abs=1e-3)
    assert (
        flow.weights(torch.tensor([0.5]), 100)
        > flow.weights(torch.tensor([0.9]), 100)
        > flow.weights(torch.tensor([0.999]), 100)
        >= 0
    )
    assert torch.equal(FlowMatching(Flow()).weights(sigmas, 100), torch.ones_like(sigmas))


def test_levels_are_float32_and_distinct():
    sigmas = FlowMatching(Flow()).sigmas(draw_uniform(0, torch.arange(2000)), 100)
    assert sigmas.dtype == torch.float32 and sigmas.unique().numel() == 2000


def test_draws_depend_on_seed_and_sample_id_alone():
    ids = torch.tensor([5, 2**40 + 1, 7])
    noise = draw_noise(3, ids, (2, 3, 4))
    assert torch.equal(noise[1:2], draw_noise(3, ids[1:2], (2, 3, 4)))
    assert torch.equal(draw_uniform(3, ids)[2:], draw_uniform(3, ids[2:]))
    assert not torch.equal(noise, draw_noise(4, ids, (2, 3, 4)))
    assert not torch.equal(noise, draw_noise(3, ids, (2, 3, 4), stream="sampling"))
    assert not torch.equal(draw_noise(3, torch.tensor([1]), (8,)), draw_noise(3, torch.tensor([1 + 2**32]), (8,)))
    many = draw_noise(0, torch.arange(1000), (100,))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01
    correlation = np.corrcoef(many[:50].numpy())
    assert abs(correlation - np.eye(50)).max() < 0.5


def test_caption_dropout_has_its_rate():
    dropped = [drop_caption(0, i, 0.1) for i in range(5000)]
    assert 0.08 < np.mean(dropped) < 0.12
    assert not any(drop_caption(0, i, 0.0) for i in range(100)) and all(drop_caption(0, i, 1.0) for i in range(100))


def test_euler_follows_an_exact_straight_flow():
    """With the true velocity of a flow towards one point, any number of steps ends there."""
    target, noise = torch.randn(2, 3), torch.randn(2, 3)
    for steps, shift in ((1, 1.0), (7, 1.0), (7, 5.0)):
        out = euler(lambda x, s: (x - target) / s[:, None], noise, steps, shift)
        torch.testing.assert_close(out, target, atol=1e-5, rtol=1e-5)
    sigmas = sampling_sigmas(10, 3.0)
    assert sigmas[0] == 1 and sigmas[-1] == 0 and (sigmas[1:] < sigmas[:-1]).all()
    assert sigmas[5] == pytest.approx(0.75)


def test_guidance_extrapolates():
    a, b = torch.tensor([2.0]), torch.tensor([1.0])
    assert guided(a, b, 1.0) == 2 and guided(a, b, 0.0) == 1 and guided(a, b, 5.0) == 6


def test_pseudo_huber_is_the_square_of_small_errors_and_linear_in_large_ones():
    c, error = 0.1, torch.tensor([0.0, 1e-6, -0.1, 0.5, -30.0], dtype=torch.float64)
    penalty = FlowMatching(Flow(), "pseudo_huber", c).penalty
    expected = 2 * c * ((error.square() + c**2).sqrt() - c)
    assert torch.allclose(penalty(error), expected, rtol=1e-4, atol=1e-15)
    assert torch.equal(FlowMatching(Flow()).penalty(error), error.square())
    assert torch.allclose(FlowMatching(Flow(), "pseudo_huber", 1e6).penalty(error), error.square(), rtol=1e-9)
    small = torch.tensor([1e-4, 1e-6])  # where float32 would lose the difference of the formula
    assert torch.allclose(penalty(small), small.square(), rtol=1e-5)
    error = torch.tensor([0.0, 3.0, -3.0], requires_grad=True)
    penalty(error).sum().backward()
    assert torch.allclose(error.grad, torch.tensor([0.0, 2 * c, -2 * c]), rtol=1e-2)


def test_the_loss_of_a_task_is_the_sum_of_its_penalties_and_validation_squares():
    task = build_denoising(SPEC, WanArgs(dim=128, num_heads=2, num_layers=1, ffn_dim=64), seed=3)
    latents, text = torch.randn(2, 16, 3, 4, 4), torch.zeros(2, 1, 1)
    batch = Batch({"video": latents}, text, torch.ones(2, 1, dtype=torch.bool), torch.tensor([4, 5]))
    inputs = task.prepare(batch)
    prediction = torch.randn_like(inputs.target_BLP)
    errors = (prediction - inputs.target_BLP).flatten(1)
    squares = errors.square().sum(1)
    assert torch.equal(task.loss(prediction, inputs), squares)
    task.flow = FlowMatching(Flow(), "pseudo_huber", 0.3)
    expected = (2 * 0.3 * ((errors.square() + 0.09).sqrt() - 0.3)).sum(1)
    assert torch.allclose(task.loss(prediction, inputs), expected, rtol=1e-5)
    assert torch.equal(task.loss(prediction, inputs, penalty=torch.square), squares)
