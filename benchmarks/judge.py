"""How far the tiny world's CSD can be trusted as a reward.

Two questions, asked before any policy is tuned against it:

1. On pictures that the *policy* draws, does CSD rank them as the truth does (Spearman, style witness as truth)?
2. How far do 200 steps of gradient ascent on the *pixels* raise CSD, and what does the truth say meanwhile?

    python benchmarks/judge.py [--examples 200] [--out benchmarks/results/judge.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor

from rewardgen.flow.sampling import sample
from rewardgen.policies.uso import UsoPolicy
from rewardgen.policy import noise_like_request
from rewardgen.rewards.csd import CsdReward
from rewardgen.types import Example
from rewardgen.world.build import ASSETS
from rewardgen.world.dataset import TinyWorld
from rewardgen.world.recipes.base import load_policy
from rewardgen.world.witness import StyleWitness

SIZE = (64, 64)


def draw(policy: UsoPolicy, examples: list[Example], num_steps: int = 10) -> Tensor:
    """Pictures [N, 3, 64, 64] in [0, 1] of all examples, seeded by position."""
    pictures = []
    for start in range(0, len(examples), 20):
        batch = examples[start : start + 20]
        noise = noise_like_request(policy, range(start, start + len(batch)), SIZE)
        with torch.no_grad():
            velocity = policy.velocity_fn(policy.encode(batch), mode="sample", image_size=SIZE)
            latents = sample(
                velocity, noise, policy.sigmas(num_steps, SIZE), start=0, stop=num_steps, enable_grad=False
            )
            pictures.append(policy.decode(latents, SIZE).clamp(0, 1))
    return torch.cat(pictures)


def ascend(csd: CsdReward, pixels: Tensor, examples: list[Example], steps: int = 200, rate: float = 0.01) -> Tensor:
    """Gradient ascent on CSD over the pixels alone (Adam)."""
    free = pixels.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        (-csd.score(free, examples).value_B.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            free.clamp_(0, 1)
    return free.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    world = TinyWorld("held_out", arguments.examples, seed=2)
    examples = [world[i] for i in range(len(world))]
    csd, witness = (
        CsdReward.from_pretrained(str(ASSETS / "csd.safetensors")).eval().requires_grad_(False),
        StyleWitness(),
    )
    drawn = draw(load_policy(ASSETS), examples)
    few = examples[:40]
    climbed = ascend(csd, drawn[:40], few)
    result = {
        "examples": len(examples),
        "spearman_csd_truth_on_policy_samples": float(
            spearmanr(csd.score(drawn, examples).value_B, witness.score(drawn, examples).value_B).statistic
        ),
        "csd_before_ascent": float(csd.score(drawn[:40], few).value_B.mean()),
        "csd_after_ascent": float(csd.score(climbed, few).value_B.mean()),
        "truth_before_ascent": float(witness.score(drawn[:40], few).value_B.mean()),
        "truth_after_ascent": float(witness.score(climbed, few).value_B.mean()),
        "csd_of_targets": float(csd.score(torch.stack([e.extras["truth"] for e in examples]), examples).value_B.mean()),
    }
    print(json.dumps(result, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
