"""Compiled blocks compute what they did before; who has none says so."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rewardgen.errors import ConfigError
from rewardgen.optimizer import Optimizer, OptimizerConfig
from rewardgen.policy import noise_like_request
from tests.test_uso_policy import EXAMPLES, SIZE, TIMES, make_policy, velocities
from tests.toys import ToyPolicy


def test_compiled_blocks_give_the_same_velocity_and_gradient() -> None:
    plain, compiled = make_policy("lora"), make_policy("lora")
    programs = 0

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> object:
        nonlocal programs
        programs += 1
        return graph.forward

    names = list(compiled.state_dict())
    compiled.compile_blocks(backend=backend)
    assert list(compiled.state_dict()) == names
    latents = noise_like_request(plain, [3], SIZE)
    found = []
    for policy in (plain, compiled):
        policy.enable_checkpointing()
        velocity = velocities(policy.train(), EXAMPLES[2:3], latents, TIMES[:1])
        found.append([velocity, *torch.autograd.grad(velocity.square().sum(), list(policy.trainable().values()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert programs > 0


def test_who_has_no_blocks_says_so() -> None:
    with pytest.raises(ConfigError, match=r"ToyPolicy has no blocks to compile: leave train\.compile off"):
        ToyPolicy().compile_blocks()


def test_on_the_cpu_the_optimizer_is_the_one_it_was() -> None:
    optimizer = Optimizer({"weight": nn.Parameter(torch.ones(3))}, OptimizerConfig())
    assert optimizer._adamw.param_groups[0]["fused"] is None
