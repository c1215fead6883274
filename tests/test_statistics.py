"""Statistics of pictures against closed forms."""

import math

import pytest
import torch

from rewardgen.errors import ConfigError
from rewardgen.evaluation import statistics as s
from rewardgen.reward import check_reward


def grey(values_HW: torch.Tensor) -> torch.Tensor:
    return values_HW.expand(1, 3, *values_HW.shape).clone()


def colours(*rgb: tuple[float, float, float], side: int = 16) -> torch.Tensor:
    """Columns of equal width, one for each colour."""
    columns = torch.tensor(rgb).repeat_interleave(side // len(rgb), 0)
    return columns.T[None, :, None].expand(1, 3, side, side)


def test_brightness_and_saturation_of_flat_colours() -> None:
    picture = colours((1.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    assert float(s.brightness(picture)) == pytest.approx((0.299 + 0.5) / 2)
    assert float(s.saturation(picture)) == pytest.approx(0.5)
    assert float(s.brightness(torch.full((1, 3, 4, 4), 1.7))) == pytest.approx(1.0), "a saved picture is clamped"


@pytest.mark.parametrize(("amplitude", "period"), [(0.1, 8), (0.3, 4), (0.3, 16)])
def test_sharpness_of_a_wave(amplitude: float, period: int) -> None:
    side = 2 + 3 * 16  # whole periods inside the border
    omega = 2 * math.pi / period
    wave = 0.5 + amplitude * torch.cos(omega * torch.arange(side, dtype=torch.float64))
    expected = math.log10(amplitude**2 / 2 * (2 - 2 * math.cos(omega)) ** 2)
    assert float(s.sharpness(grey(wave.expand(20, side)))) == pytest.approx(expected, abs=1e-4)
    assert float(s.sharpness(torch.full((1, 3, 8, 8), 0.4))) == pytest.approx(-8, abs=1e-2)


def test_entropy_counts_equally_frequent_colours() -> None:
    assert float(s.colour_entropy(colours((0.1, 0.2, 0.3)))) == pytest.approx(0, abs=1e-6)
    four = colours((0.1, 0.2, 0.3), (0.9, 0.2, 0.3), (0.1, 0.9, 0.3), (0.1, 0.2, 1.0))
    assert float(s.colour_entropy(four)) == pytest.approx(2)
    assert float(s.colour_entropy(torch.rand(1, 3, 256, 256))) == pytest.approx(9, abs=0.02)


def test_a_step_edge_is_two_pixels_wide() -> None:
    step = torch.zeros(12, 22)
    step[:, 11:] = 1
    assert float(s.edge_density(grey(step))) == pytest.approx(2 / 20)
    assert float(s.edge_density(grey(step * 2 * s.EDGE * 0.9))) == 0


def test_grid_peaks_are_the_spectral_energy_at_the_harmonics() -> None:
    rng = torch.Generator().manual_seed(0)
    tile = torch.rand(16, 16, generator=rng)
    assert float(s.grid_peaks(grey(tile.repeat(3, 4)))) == pytest.approx(1, abs=1e-4)
    noise = torch.rand(40, 1, 64, 64, generator=rng).expand(40, 3, 64, 64)
    assert float(s.grid_peaks(noise).mean()) == pytest.approx(1 / 16, rel=0.05)
    picture = torch.rand(64, 48, generator=rng)
    power = torch.fft.fft2(picture - picture.mean()).abs().square()
    assert float(s.grid_peaks(grey(picture))) == pytest.approx(float(power[::4, ::3].sum() / power.sum()), rel=1e-4)
    assert s.grid_peaks(torch.rand(2, 3, 20, 20)).tolist() == [0, 0]
    assert s.grid_peaks(torch.full((1, 3, 64, 64), 0.3)).tolist() == pytest.approx([0], abs=1e-4)


def test_diversity_of_seeds() -> None:
    pixels = torch.zeros(3, 2, 3, 4, 4)
    pixels[1, 0], pixels[2, 0] = 0.3, 0.6
    assert s.diversity(pixels).tolist() == pytest.approx([math.sqrt((0.09 + 0.36 + 0.09) / 3), 0])
    with pytest.raises(ValueError, match="two seeds"):
        s.diversity(pixels[:1])


@pytest.mark.parametrize("name", s.STATISTICS)
def test_each_is_a_metric_that_keeps_the_contract(name: str) -> None:
    check_reward(s.Statistic(name))


def test_an_unknown_statistic_is_named() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'sharpness'"):
        s.Statistic("sharpnes")
