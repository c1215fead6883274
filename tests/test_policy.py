"""The policy contract: what the engine may rely on without knowing the model."""

from __future__ import annotations

import pytest
import torch

from rewardgen.errors import ConfigError
from rewardgen.policy import noise_like_request
from tests.toys import IMAGE_SIZE, ToyPolicy


def test_a_policy_that_cannot_recompute_says_so() -> None:
    policy = ToyPolicy()
    policy.enable_checkpointing(False)
    with pytest.raises(ConfigError, match="ToyPolicy cannot recompute activations"):
        policy.enable_checkpointing()


def test_noise_belongs_to_its_seed_and_not_to_its_neighbours() -> None:
    policy = ToyPolicy()
    together = noise_like_request(policy, [3, 1, 2], IMAGE_SIZE)
    alone = [noise_like_request(policy, [seed], IMAGE_SIZE)[0] for seed in (3, 1, 2)]
    assert torch.equal(together, torch.stack(alone))
    assert not torch.equal(together[0], together[1])
