"""Rollouts are pure functions of (request, weights); pools only carry them."""

import pytest
import torch
from pydantic import ValidationError

from rewardgen.fleet.inline import InlinePool
from rewardgen.flow.sampling import sample
from rewardgen.policy import noise_like_request
from rewardgen.rollout import RolloutConfig, RolloutWorker, Weights
from rewardgen.types import Rollout, RolloutRequest
from tests.toys import IMAGE_SIZE, ToyDataset, ToyPolicy


def request(stop_step: int = 3, decode: bool = False) -> RolloutRequest:
    return RolloutRequest(
        step=0,
        examples=ToyDataset(3).examples,
        seed_B=(5, 6, 7),
        image_size=IMAGE_SIZE,
        num_steps=4,
        stop_step=stop_step,
        decode=decode,
    )


def weights_of(policy: ToyPolicy, version: int = 0) -> Weights:
    return Weights(version=version, tensors={name: p.detach() for name, p in policy.trainable().items()})


def test_a_rollout_is_the_sampler_from_seeded_noise() -> None:
    policy = ToyPolicy()
    rollout = RolloutWorker(policy).rollout(request(), weights_of(policy, 9))
    expected = sample(
        policy.velocity_fn(policy.encode(request().examples), mode="sample", image_size=IMAGE_SIZE),
        noise_like_request(policy, (5, 6, 7), IMAGE_SIZE),
        policy.sigmas(4, IMAGE_SIZE),
        start=0,
        stop=3,
        enable_grad=False,
    )
    assert torch.equal(rollout.trajectory.entry_BLC, expected)
    assert not rollout.trajectory.entry_BLC.requires_grad
    assert (rollout.trajectory.entry_step, rollout.trajectory.num_steps, rollout.policy_version) == (3, 4, 9)


def test_the_result_depends_on_the_weights_that_came_not_on_the_workers_past() -> None:
    here, there = ToyPolicy(seed=1), ToyPolicy(seed=2)
    worker = RolloutWorker(ToyPolicy(seed=3))
    wanted = [RolloutWorker(p).rollout(request(), weights_of(p)).trajectory.entry_BLC for p in (here, there)]
    assert not torch.equal(*wanted)
    for version, which in enumerate((0, 1, 0, 1)):
        weights = weights_of((here, there)[which], version)
        assert torch.equal(worker.rollout(request(), weights).trajectory.entry_BLC, wanted[which])
    assert torch.equal(here.inner, ToyPolicy(seed=1).inner)


def test_pixels_are_decoded_on_request_and_only_from_a_finished_picture() -> None:
    policy = ToyPolicy()
    pixels = RolloutWorker(policy).rollout(request(4, decode=True), weights_of(policy)).pixels_B3HW
    assert pixels is not None
    assert pixels.shape == (3, 3, *IMAGE_SIZE)
    assert float(pixels.min()) >= 0
    assert float(pixels.max()) <= 1
    with pytest.raises(ValueError, match="only 3 of 4 steps"):
        RolloutWorker(policy).rollout(request(3, decode=True), weights_of(policy))


def test_bf16_is_close_but_not_equal_and_keeps_float32_latents() -> None:
    policy = ToyPolicy()
    exact = RolloutWorker(policy).rollout(request(), weights_of(policy)).trajectory.entry_BLC
    rough = RolloutWorker(policy, precision="bf16").rollout(request(), weights_of(policy)).trajectory.entry_BLC
    assert rough.dtype == torch.float32
    assert not torch.equal(exact, rough)
    torch.testing.assert_close(exact, rough, atol=0.05, rtol=0.05)


def test_the_inline_pool_delivers_values_and_errors() -> None:
    policy = ToyPolicy()
    pool = InlinePool(RolloutWorker(policy))
    weights = pool.put(weights_of(policy))
    rollout = pool.submit("rollout", request(), weights).result().get()
    assert isinstance(rollout, Rollout)
    direct = RolloutWorker(policy).rollout(request(), weights_of(policy))
    assert torch.equal(rollout.trajectory.entry_BLC, direct.trajectory.entry_BLC)
    failed = pool.submit("rollout", request(3, decode=True), weights)
    assert isinstance(failed.exception(), ValueError)
    pool.close()
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit("rollout", request(), weights)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_steps": 4}, "the last of 4 steps is 3"),
        ({"num_steps": 5, "image_size": [8, 0]}, "must be positive"),
        ({"num_steps": 3, "window": {"kind": "draft", "k": 4}}, "only 3 steps"),
    ],
)
def test_impossible_rollouts_are_refused(fields: dict[str, object], message: str) -> None:
    window = {"kind": "refl", "entry_range": [2, 4]}
    with pytest.raises(ValidationError, match=message):
        RolloutConfig.model_validate({"image_size": [8, 8], "window": window} | fields)
