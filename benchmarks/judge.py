"""How far the tiny world's CSD can be trusted as a reward.

Two questions, asked before any policy is tuned against it:

1. On pictures that the *policy* draws, does CSD rank them as the truth does (Spearman, style witness as truth)?
2. How far do 200 steps of gradient ascent on the *pixels* raise CSD, and what does the truth say meanwhile?

    python benchmarks/judge.py [--examples 200] [--write]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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
from rewardgen.world.witness import StyleWitness, palette_distance, texture_distance

SIZE = (64, 64)
RESULTS = Path(__file__).resolve().parent / "results"


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
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/judge.{json,md}")
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
    truth = torch.stack([example.extras["truth"] for example in examples])

    def means(pixels: Tensor, of: list[Example]) -> dict[str, float]:
        target = torch.stack([example.extras["truth"] for example in of])
        return {
            "CSD": float(csd.score(pixels, of).value_B.mean()),
            "style witness": float(witness.score(pixels, of).value_B.mean()),
            "palette distance": float(palette_distance(pixels, target).mean()),
            "texture distance": float(texture_distance(pixels, target).mean()),
        }

    csd_N = csd.score(drawn, examples).value_B
    result = {
        "examples": len(examples),
        "spearman_on_policy_samples": {
            "style witness": _spearman(csd_N, witness.score(drawn, examples).value_B),
            "palette distance": _spearman(csd_N, palette_distance(drawn, truth)),
            "texture distance": _spearman(csd_N, texture_distance(drawn, truth)),
        },
        "policy samples": means(drawn[:40], few),
        "after 200 steps of pixel ascent": means(climbed, few),
        "true pictures": means(truth[:40], few),
    }
    print(render(result))
    if arguments.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "judge.json").write_text(json.dumps(result, indent=1) + "\n")
        (RESULTS / "judge.md").write_text(render(result))


def render(result: dict[str, Any]) -> str:
    """The figures in Markdown."""
    rows = ("policy samples", "after 200 steps of pixel ascent", "true pictures")
    names = list(result[rows[0]])
    lines = ["| 40 held-out pairs | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    lines += [f"| {row} | " + " | ".join(f"{result[row][name]:.3f}" for name in names) + " |" for row in rows]
    ranks = ", ".join(f"{value:+.2f} with the {name}" for name, value in result["spearman_on_policy_samples"].items())
    return "\n".join([*lines, "", f"Rank correlation of CSD on {result['examples']} policy samples: {ranks}."]) + "\n"


def _spearman(a: Tensor, b: Tensor) -> float:
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


if __name__ == "__main__":
    main()
