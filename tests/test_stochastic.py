"""Noisy steps: densities against closed forms, marginals against the analytic ones, seeds and windows."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rewardgen.flow.sampling import sample
from rewardgen.flow.stochastic import (
    Kernel,
    StochasticWindow,
    divergence,
    kernel,
    log_density,
    noisy_steps,
    sample_stochastic,
    step_noise,
)
from rewardgen.flow.window import WindowConfig, run_window
from rewardgen.policy import noise_like_request
from rewardgen.rollout import RolloutWorker
from rewardgen.types import RolloutRequest, Stochastic
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy

MEAN, STD = 0.7, 0.4
"""Of the clean data in the Gaussian toy, element by element."""


def noisy(steps: tuple[int, ...], level: float = 0.7, seeds: int = 1) -> Stochastic:
    return Stochastic(steps=steps, noise_level=level, seed_B=tuple(range(seeds)))


def analytic(t: float) -> tuple[float, float]:
    """The velocity `alpha x + beta` that moves N(0, 1) at time 1 to N(MEAN, STD^2) at time 0, exactly."""
    variance = ((1 - t) * STD) ** 2 + t**2
    gain = (t - (1 - t) * STD**2) / variance
    return gain, -gain * (1 - t) * MEAN - MEAN


def velocity(x_BLC: Tensor, t_B: Tensor) -> Tensor:
    alpha, beta = analytic(float(t_B[0]))
    return alpha * x_BLC + beta


def final_moments(num_steps: int, level: float) -> tuple[float, float]:
    """Mean and variance at time 0: everything is affine and Gaussian, so they obey a recurrence, without sampling."""
    sigmas_T = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    mean, variance = 0.0, 1.0
    for step in range(num_steps):
        t, t_next = float(sigmas_T[step]), float(sigmas_T[step + 1])
        form = Kernel(1.0, t_next - t, 0.0)
        if level and step < num_steps - 1:
            form = kernel(sigmas_T, step, noisy((step,), level))
        alpha, beta = analytic(t)
        factor = form.state + form.velocity * alpha
        mean, variance = factor * mean + form.velocity * beta, factor**2 * variance + form.std**2
    return mean, variance


@pytest.mark.parametrize(("level", "order"), [(0.0, 1.0), (0.7, 0.49), (1.2, 1.0)], ids=["ode", "sde", "noisier"])
def test_sde_and_ode_reach_the_same_analytic_marginal_as_steps_grow(level: float, order: float) -> None:
    """With the order that theory says: that of Euler steps, or what the first noisy step leaves behind."""
    for num_steps in (10, 30, 100, 300, 1000, 10_000):
        mean, variance = final_moments(num_steps, level)
        assert mean == pytest.approx(MEAN, abs=1e-9)
        assert variance == pytest.approx(STD**2, abs=0.35 * STD**2 * (10 / num_steps) ** order)


def test_the_noise_is_what_makes_the_marginal_not_a_detail() -> None:
    """Without the drift's correction the noise would widen the marginal: the recurrence can tell."""
    sigmas_T = torch.linspace(1, 0, 1001, dtype=torch.float64)
    variance = 1.0
    for step in range(999):
        form = kernel(sigmas_T, step, noisy((step,)))
        alpha, _ = analytic(float(sigmas_T[step]))
        variance = (1 - 0.001 * alpha) ** 2 * variance + form.std**2
    assert variance > 2 * STD**2


def test_samples_have_the_moments_of_the_recurrence() -> None:
    sigmas_T = torch.linspace(1, 0, 13)
    x_BLC = torch.randn(1, 1000, 100, generator=torch.Generator().manual_seed(1))
    stochastic = noisy(tuple(range(11)))
    final_BLC, states_SBLC, log_prob_BS = sample_stochastic(velocity, x_BLC, sigmas_T, stop=12, stochastic=stochastic)
    mean, variance = final_moments(12, 0.7)
    assert float(final_BLC.mean()) == pytest.approx(mean, abs=0.01)
    assert float(final_BLC.var()) == pytest.approx(variance, rel=0.03)
    assert (states_SBLC.shape, log_prob_BS.shape) == ((12, 1, 1000, 100), (1, 11))
    # On average a Gaussian's log-density is minus its entropy.
    entropies = [0.5 * math.log(2 * math.pi * math.e * kernel(sigmas_T, i, stochastic).std ** 2) for i in range(11)]
    assert (-log_prob_BS[0] / 1e5).tolist() == pytest.approx(entropies, abs=0.01)


def test_densities_are_those_of_torch_and_sum_over_all_elements() -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas_T = torch.linspace(1, 0, 5) ** 0.8
    x, v, after = (torch.randn(3, 4, 6, generator=generator) for _ in range(3))
    for index in range(3):
        form = kernel(sigmas_T, index, noisy((index,)))
        mean = form.state * x.double() + form.velocity * v.double()
        expected = torch.distributions.Normal(mean, form.std).log_prob(after.double()).sum(dim=(1, 2))
        torch.testing.assert_close(log_density(after, x, v, form), expected, rtol=1e-6, atol=1e-4)


@given(st.floats(0.05, 0.95), st.floats(0.1, 0.9), st.floats(0.1, 1.5))
def test_the_coefficients_are_the_papers_formula(t: float, share: float, level: float) -> None:
    t_next = t * share
    sigmas_T = torch.tensor([1.0, t, t_next, 0.0], dtype=torch.float64)
    x, v, h = 0.3, -1.1, t - t_next
    form = kernel(sigmas_T, 1, noisy((1,), level=level))
    g2 = level**2 * t / (1 - t)
    assert form.state * x + form.velocity * v == pytest.approx(x - h * (v + g2 / (2 * t) * (x + (1 - t) * v)))
    assert form.std == pytest.approx(math.sqrt(g2 * h))
    # The first step, where the diffusion would be infinite, takes the first time below 1 for the denominator.
    first = kernel(sigmas_T, 0, noisy((0,), level=level))
    assert first.std == pytest.approx(level)


def test_without_noise_there_is_no_density() -> None:
    sigmas_T = torch.linspace(1, 0, 5)
    for stochastic in (noisy((3,)), noisy((1,), level=0.0)):
        with pytest.raises(ValueError, match="draws no noise"):
            kernel(sigmas_T, stochastic.steps[0], stochastic)


def test_the_divergence_is_that_of_the_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    sigmas_T = torch.linspace(1, 0, 9)
    x, v, base = (torch.randn(2, 4, 6, generator=generator) for _ in range(3))
    form = kernel(sigmas_T, 3, noisy((3,)))
    ours, theirs = (torch.distributions.Normal(form.state * x + form.velocity * u, form.std) for u in (v, base))
    expected = torch.distributions.kl_divergence(ours, theirs).mean(dim=(1, 2))
    torch.testing.assert_close(divergence(v, base, form), expected, rtol=1e-4, atol=1e-6)
    assert divergence(v, v, form).tolist() == [0.0, 0.0]


def request(stochastic: Stochastic | None, examples: int = 3, seed: int = 5) -> RolloutRequest:
    return RolloutRequest(
        step=0,
        examples=ToyDataset(examples).examples,
        seed_B=tuple(range(seed, seed + examples)),
        image_size=IMAGE_SIZE,
        num_steps=6,
        stop_step=6,
        decode=True,
        stochastic=stochastic,
        group_B=tuple(range(examples)),
    )


def test_a_rollout_carries_what_a_policy_gradient_needs() -> None:
    policy = ToyPolicy()
    stochastic = noisy((1, 2, 3), seeds=3)
    wanted = request(stochastic)
    rollout = RolloutWorker(policy).rollout(wanted, weights_of(policy))
    trajectory = rollout.trajectory
    assert trajectory.stochastic == stochastic
    assert rollout.group_B == (0, 1, 2)
    assert trajectory.steps_SBLC is not None
    assert trajectory.log_prob_BS is not None
    assert rollout.pixels_B3HW is not None
    assert not trajectory.steps_SBLC.requires_grad
    # Before the window and after it the ODE is followed.
    noise_BLC = noise_like_request(policy, wanted.seed_B, IMAGE_SIZE)
    flow = policy.velocity_fn(policy.encode(wanted.examples), mode="sample", image_size=IMAGE_SIZE)
    before_BLC = sample(flow, noise_BLC, trajectory.sigmas_T, start=0, stop=1, enable_grad=False)
    assert torch.equal(before_BLC, trajectory.steps_SBLC[0])
    after_BLC = sample(flow, trajectory.steps_SBLC[-1], trajectory.sigmas_T, start=4, stop=6, enable_grad=False)
    assert torch.equal(after_BLC, trajectory.entry_BLC)
    # And each noisy step is its kernel with the noise of its seeds.
    for place, index in enumerate(stochastic.steps):
        x_BLC, next_BLC = trajectory.steps_SBLC[place], trajectory.steps_SBLC[place + 1]
        form = kernel(trajectory.sigmas_T, index, stochastic)
        v_BLC = flow(x_BLC, trajectory.sigmas_T[index].expand(3))
        eps_BLC = step_noise(stochastic.seed_B, index, x_BLC)
        torch.testing.assert_close(next_BLC, form.state * x_BLC + form.velocity * v_BLC + form.std * eps_BLC)
        assert torch.equal(log_density(next_BLC, x_BLC, v_BLC, form), trajectory.log_prob_BS[:, place])
    # The gradient window still runs from such a trajectory.
    window = WindowConfig(kind="full")
    clean_BLC = run_window(flow, dataclasses.replace(trajectory, entry_step=6), window, enable_grad=False)
    assert torch.equal(clean_BLC, trajectory.entry_BLC)


def test_the_noise_depends_on_its_seed_and_step_alone() -> None:
    policy = ToyPolicy()
    worker, weights = RolloutWorker(policy), weights_of(policy)
    first, again = (worker.rollout(request(noisy((1, 2), seeds=3)), weights) for _ in range(2))
    assert torch.equal(first.trajectory.entry_BLC, again.trajectory.entry_BLC)
    other = worker.rollout(request(dataclasses.replace(noisy((1, 2)), seed_B=(9, 1, 2))), weights)
    equal = [torch.equal(*pair) for pair in zip(first.trajectory.entry_BLC, other.trajectory.entry_BLC, strict=True)]
    assert equal == [False, True, True], "a sample's noise is its own"
    like = torch.zeros(2, 4, 6)
    assert torch.equal(step_noise((3, 4), 2, like)[1], step_noise((4, 3), 2, like)[0])
    assert not torch.equal(step_noise((3, 4), 2, like), step_noise((3, 4), 1, like))


@pytest.mark.parametrize("steps", [(), (1, 3), (2, 1), (5, 6)])
def test_noisy_steps_must_be_consecutive_and_before_the_end(steps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="consecutive and before step 6"):
        sample_stochastic(velocity, torch.zeros(1, 2, 3), torch.linspace(1, 0, 8), stop=6, stochastic=noisy(steps))


def test_windows_are_drawn_or_slide() -> None:
    assert noisy_steps(None, 8, training_step=3, seed=1) == tuple(range(7))
    drawn = [noisy_steps(StochasticWindow(size=2, range=(1, 4)), 8, training_step=0, seed=seed) for seed in range(60)]
    assert set(drawn) == {(1, 2), (2, 3), (3, 4)}
    assert drawn[7] == noisy_steps(StochasticWindow(size=2, range=(1, 4)), 8, training_step=5, seed=7)
    sliding = StochasticWindow(size=3, range=(0, 4), move_every=2)
    firsts = [noisy_steps(sliding, 8, training_step=step, seed=step)[0] for step in range(8)]
    assert firsts == [0, 0, 1, 1, 2, 2, 0, 0]


def test_windows_that_do_not_fit_are_refused() -> None:
    for fields, message in (
        ({"size": 3, "range": (2, 3)}, "3 steps do not fit"),
        ({"size": 1, "range": (3, 2)}, "first <= last"),
        ({"size": 0}, "greater than or equal to 1"),
    ):
        with pytest.raises(ValidationError, match=message):
            StochasticWindow.model_validate(fields)
    for window in (StochasticWindow(size=1, range=(2, 7)), StochasticWindow(size=8)):
        with pytest.raises(ValueError, match=r"would stay in the picture|only 7 can be noisy"):
            window.bounds(8)


def weights_of(policy: ToyPolicy):  # type: ignore[no-untyped-def]
    from rewardgen.rollout import Weights

    return Weights(version=0, tensors={name: p.detach() for name, p in policy.trainable().items()})
