"""Sampling and the gradient window: closed forms, finite differences, and equality of window and rollout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from rewardgen.flow.sampling import clean_estimate, sample
from rewardgen.flow.window import WindowConfig, draw_entry, run_window
from rewardgen.types import Trajectory, VelocityFn
from tests.toys import CHANNELS, IMAGE_SIZE, ToyDataset, ToyPolicy

NUM_STEPS = 5
WINDOWS = [
    WindowConfig(kind="refl", entry_range=(2, 4)),
    WindowConfig(kind="draft", k=2),
    WindowConfig(kind="draft", k=2, checkpoint_steps=True),
    WindowConfig(kind="alignprop", k_range=(1, 4)),
    WindowConfig(kind="full"),
    WindowConfig(kind="full", checkpoint_steps=True),
]


def the_velocity(policy: ToyPolicy) -> VelocityFn:
    return policy.velocity_fn(policy.encode(ToyDataset(3).examples), mode="sample", image_size=IMAGE_SIZE)


def noise(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 4, CHANNELS, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(dtype)


def draw(policy: ToyPolicy, stop: int, dtype: torch.dtype = torch.float32) -> Trajectory:
    sigmas_T = policy.sigmas(NUM_STEPS, IMAGE_SIZE)
    entry_BLC = sample(the_velocity(policy), noise(dtype), sigmas_T, start=0, stop=stop, enable_grad=False)
    return Trajectory(sigmas_T=sigmas_T, entry_step=stop, entry_BLC=entry_BLC, seed_B=(0, 1, 2))


def test_euler_is_exact_for_a_straight_path() -> None:
    clean_BLC, noise_BLC = noise(torch.float64) * 2, noise(torch.float64)
    sigmas_T = torch.tensor([1.0, 0.75, 0.5, 0.125, 0.0])
    seen: list[float] = []

    def velocity(x_BLC: Tensor, t_B: Tensor) -> Tensor:
        seen.extend(t_B[:1].tolist())
        return noise_BLC - clean_BLC

    x_BLC = sample(velocity, noise_BLC, sigmas_T, start=0, stop=2, enable_grad=False)
    torch.testing.assert_close(x_BLC, 0.5 * clean_BLC + 0.5 * noise_BLC)
    torch.testing.assert_close(clean_estimate(x_BLC, noise_BLC - clean_BLC, torch.tensor(0.5)), clean_BLC)
    torch.testing.assert_close(sample(velocity, x_BLC, sigmas_T, start=2, stop=4, enable_grad=False), clean_BLC)
    assert seen == [1.0, 0.75, 0.5, 0.125]


def test_clean_estimate_takes_a_time_per_example() -> None:
    t_B = torch.tensor([0.0, 0.5, 1.0])
    both = clean_estimate(noise(), 2 * noise(), t_B)
    for index, t in enumerate(t_B):
        torch.testing.assert_close(both[index], noise()[index] * (1 - 2 * t))


@pytest.mark.parametrize("outer", [True, False])
def test_gradient_is_what_the_argument_says(outer: bool) -> None:
    policy = ToyPolicy()
    sigmas_T = policy.sigmas(NUM_STEPS, IMAGE_SIZE)
    with torch.set_grad_enabled(outer):
        for enable_grad in (True, False):
            x_BLC = sample(the_velocity(policy), noise(), sigmas_T, start=0, stop=2, enable_grad=enable_grad)
            assert x_BLC.requires_grad is enable_grad
            for window in WINDOWS:
                clean_BLC = run_window(the_velocity(policy), draw(policy, 3), window, enable_grad=enable_grad)
                assert clean_BLC.requires_grad is enable_grad


def test_impossible_steps_and_half_precision_are_refused() -> None:
    policy = ToyPolicy()
    sigmas_T = policy.sigmas(NUM_STEPS, IMAGE_SIZE)
    for start, stop in ((-1, 2), (3, 2), (0, NUM_STEPS + 1)):
        with pytest.raises(ValueError, match="schedule of 5 steps"):
            sample(the_velocity(policy), noise(), sigmas_T, start=start, stop=stop, enable_grad=False)
    with pytest.raises(ValueError, match="bfloat16"):
        sample(the_velocity(policy), noise(torch.bfloat16), sigmas_T, start=0, stop=1, enable_grad=False)


@pytest.mark.parametrize("window", [w for w in WINDOWS if w.kind != "refl"], ids=str)
def test_a_chained_window_reproduces_the_rollout_bit_for_bit(window: WindowConfig) -> None:
    policy = ToyPolicy()
    final_BLC = draw(policy, NUM_STEPS).entry_BLC
    low, high = window.entry_bounds(NUM_STEPS)
    for entry in range(low, high + 1):
        clean_BLC = run_window(the_velocity(policy), draw(policy, entry), window, enable_grad=True)
        assert torch.equal(clean_BLC, final_BLC)


def test_the_refl_forward_is_the_rollouts_own() -> None:
    policy = ToyPolicy()
    inner = the_velocity(policy)
    calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def spy(x_BLC: Tensor, t_B: Tensor) -> Tensor:
        calls.append((x_BLC, t_B, inner(x_BLC, t_B)))
        return calls[-1][2]

    sample(spy, noise(), policy.sigmas(NUM_STEPS, IMAGE_SIZE), start=0, stop=NUM_STEPS, enable_grad=False)
    for entry in range(NUM_STEPS):
        run_window(spy, draw(policy, entry), WINDOWS[0], enable_grad=True)
        assert all(torch.equal(a, b) for a, b in zip(calls[entry], calls[-1], strict=True))
    assert len(calls) == 2 * NUM_STEPS


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window_gradients_agree_with_finite_differences(window: WindowConfig) -> None:
    policy = ToyPolicy(dtype="float64")
    trajectory = draw(policy, window.entry_bounds(NUM_STEPS)[0], torch.float64)
    parameters: list[Tensor] = list(policy.parameters())

    def loss() -> Tensor:
        clean_BLC = run_window(the_velocity(policy), trajectory, window, enable_grad=True)
        return policy.decode(clean_BLC, IMAGE_SIZE).square().sum()

    grads = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
        slope, epsilon, values = sum(float((g * d).sum()) for g, d in zip(grads, direction, strict=True)), 1e-6, []
        for sign in (1, -2):
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=sign * epsilon)
            values.append(float(loss().detach()))
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=epsilon)
        assert slope == pytest.approx((values[0] - values[1]) / (2 * epsilon), rel=1e-6, abs=1e-6)


def test_refl_sends_no_gradient_into_the_state() -> None:
    """The gradient is the one forward's, although a chained window from the same entry has a longer path."""
    policy = ToyPolicy(dtype="float64")
    trajectory = draw(policy, 2, torch.float64)
    x_BLC, t = trajectory.entry_BLC, trajectory.sigmas_T[2]
    clean_BLC = run_window(the_velocity(policy), trajectory, WINDOWS[0], enable_grad=True)
    assert not x_BLC.requires_grad
    v_BLC = the_velocity(policy)(x_BLC, t.expand(3))
    expected = torch.autograd.grad(-(t.double() * v_BLC).sum(), list(policy.parameters()))
    for found, wanted in zip(torch.autograd.grad(clean_BLC.sum(), list(policy.parameters())), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@settings(max_examples=60, deadline=None)
@given(low=st.integers(0, 8), span=st.integers(0, 5), seed=st.integers(0, 2**62))
def test_entry_steps_stay_within_their_bounds(low: int, span: int, seed: int) -> None:
    window = WindowConfig(kind="refl", entry_range=(low, low + span))
    entry = draw_entry(window, low + span + 1, seed)
    assert low <= entry <= low + span
    assert entry == draw_entry(window, low + span + 1, seed)
    chained = WindowConfig(kind="alignprop", k_range=(low + 1, low + 1 + span))
    assert low + 1 <= 20 - draw_entry(chained, 20, seed) <= low + 1 + span


def test_both_ends_of_the_entry_range_are_drawn() -> None:
    window = WindowConfig(kind="refl", entry_range=(2, 4))
    assert {draw_entry(window, 5, seed) for seed in range(60)} == {2, 3, 4}
    assert {draw_entry(WindowConfig(kind="draft", k=2), 5, seed) for seed in range(9)} == {3}
    assert {draw_entry(WindowConfig(kind="full"), 5, seed) for seed in range(9)} == {0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "refl"}, "needs 'entry_range'"),
        ({"kind": "draft"}, "needs 'k'"),
        ({"kind": "full", "k": 2}, "'k' does not belong"),
        ({"kind": "draft", "k": 0}, "k must be at least 1"),
        ({"kind": "refl", "entry_range": [3, 2]}, "low <= high"),
        ({"kind": "alignprop", "k_range": [0, 2]}, "1 <= low"),
    ],
)
def test_windows_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        WindowConfig.model_validate(fields)
