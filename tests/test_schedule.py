"""Denoising times: properties of the shift, and the released pipeline's token count."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewardgen.flow.schedule import (
    mu_from_tokens,
    official_sigmas,
    official_token_count,
    shift_times,
    token_count_sigmas,
    training_sigmas,
)


def test_mu_passes_through_its_two_points_and_beyond() -> None:
    assert mu_from_tokens(256) == pytest.approx(0.5)
    assert mu_from_tokens(4096) == pytest.approx(1.15)
    assert mu_from_tokens(7936) == pytest.approx(1.8)  # as far again: not clamped
    assert mu_from_tokens(-3584) == pytest.approx(-0.15)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.floats(-1, 3))
def test_shift_keeps_ends_and_order(num_steps: int, mu: float) -> None:
    times = shift_times(torch.linspace(1, 0, num_steps + 1), mu)
    assert times[0] == 1
    assert times[-1] == 0
    assert bool((times.diff() < 0).all())
    assert torch.isfinite(times).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 0.99), st.floats(-1, 3))
def test_shift_adds_mu_to_the_logit(time: float, mu: float) -> None:
    """Closed form: the shift is a translation of log(t / (1 - t))."""
    shifted = float(shift_times(torch.tensor(time, dtype=torch.float64), mu))
    assert math.log(shifted / (1 - shifted)) == pytest.approx(math.log(time / (1 - time)) + mu, abs=1e-9)


def test_unshifted_times_are_evenly_spaced() -> None:
    assert torch.equal(token_count_sigmas(4, 999, shift=False), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


@pytest.mark.parametrize(("image_size", "count"), [((1024, 1024), 64), ((64, 64), 0), ((1039, 1024), 64)])
def test_official_count_is_a_64th_of_the_tokens(image_size: tuple[int, int], count: int) -> None:
    assert official_token_count(image_size) == count
    assert torch.equal(official_sigmas(7, image_size), token_count_sigmas(7, count))


def test_training_grid() -> None:
    grid = training_sigmas(4096)
    assert grid.shape == (1000,)
    assert grid.dtype == torch.float32
    assert (grid[0], grid[-1]) == (1, 0)
    index, mu = 400, 1.15
    time = 1 - index / 999
    assert float(grid[index]) == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / time - 1), abs=1e-6)
