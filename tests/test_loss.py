"""The flow-matching loss against its definition, and its randomness."""

import pytest
import torch
from torch import Tensor

from rewardgen.flow.loss import draw_times_and_noise, flow_matching_loss
from tests.toys import CHANNELS, IMAGE_SIZE, ToyDataset, ToyPolicy

GRID = ToyPolicy().training_sigmas(IMAGE_SIZE)


def clean(batch: int = 3) -> Tensor:
    return torch.randn(batch, 4, CHANNELS, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_the_true_velocity_has_no_loss_and_zero_has_the_targets_power() -> None:
    t_B, noise_BLC = draw_times_and_noise([1, 2, 3], clean(), GRID)

    def true_velocity(x_BLC: Tensor, t: Tensor) -> Tensor:
        # From x_t = (1-t) clean + t noise alone: noise - clean = (x_t - clean) / t.
        return (x_BLC - clean()) / t.double()[:, None, None]

    loss_B = flow_matching_loss(true_velocity, clean(), noise_BLC, t_B)
    torch.testing.assert_close(loss_B, torch.zeros(3, dtype=torch.float64), atol=1e-10, rtol=0)
    loss_B = flow_matching_loss(lambda x, t: torch.zeros_like(x), clean(), noise_BLC, t_B)
    torch.testing.assert_close(loss_B, (noise_BLC - clean()).square().flatten(1).mean(1))


def test_half_precision_is_compared_in_float32() -> None:
    t_B, noise_BLC = draw_times_and_noise([1, 2, 3], clean(), GRID)
    loss_B = flow_matching_loss(lambda x, t: x.bfloat16(), clean().bfloat16(), noise_BLC.bfloat16(), t_B)
    assert loss_B.dtype == torch.float32


def test_draws_depend_on_the_examples_seed_alone() -> None:
    t_B, noise_BLC = draw_times_and_noise([11, 22, 33], clean(), GRID)
    t_alone, noise_alone = draw_times_and_noise([22], clean()[:1], GRID)
    assert torch.equal(t_B[1:2], t_alone)
    assert torch.equal(noise_BLC[1:2], noise_alone)


def test_times_are_uniform_over_the_grid() -> None:
    t_B, noise_BLC = draw_times_and_noise(range(4000), clean(1), GRID)
    assert torch.isin(t_B, GRID).all()
    counts = torch.histc(t_B, bins=10, min=0, max=1)
    assert ((counts - 400).abs() < 5 * 400**0.5).all()
    assert abs(float(noise_BLC.mean())) < 0.02
    assert float(noise_BLC.std()) == pytest.approx(1, abs=0.02)


def test_gradient_agrees_with_finite_differences() -> None:
    policy = ToyPolicy(dtype="float64")
    t_B, noise_BLC = draw_times_and_noise([1, 2, 3], clean(), GRID)
    condition = policy.encode(ToyDataset(3).examples)

    def loss(inner: Tensor) -> Tensor:
        policy.inner.data = inner.detach()
        return flow_matching_loss(
            policy.velocity_fn(condition, mode="train", image_size=IMAGE_SIZE), clean(), noise_BLC, t_B
        ).sum()

    start = policy.inner.detach().clone()
    (grad,) = torch.autograd.grad(loss(start), [policy.inner])
    for index in [(0, 0), (3, 5), (11, 14)]:
        shift = torch.zeros_like(start)
        shift[index] = 1e-6
        slope = float((loss(start + shift) - loss(start - shift)).detach()) / 2e-6
        assert float(grad[index]) == pytest.approx(slope, rel=1e-6, abs=1e-8)
