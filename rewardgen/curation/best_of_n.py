"""Best of N: a policy's own best pictures as flow-matching targets.

N pictures are drawn for each example and a reward keeps the best, on which a policy can then be trained without any
gradient of the reward (rejection sampling fine-tuning; RAFT, arXiv 2304.06767, with one round). It is the baseline
that a reward's gradient has to beat. Shape suffixes: H and W pixels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from rewardgen.errors import ConfigError, UserError
from rewardgen.evaluation.evaluate import evaluate
from rewardgen.policy import Policy
from rewardgen.reward import Reward
from rewardgen.rollout import Precision
from rewardgen.seeds import derive_seed
from rewardgen.types import Example

DATASET = "examples.jsonl"
PICTURES = "pictures"


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """An example with the best of its drawn pictures as target.

    Args:
        example: where `score` is None, the example as it came, its own target included.
        score: of the kept picture; None where all scores failed or did not apply.
    """

    example: Example
    score: float | None


def best_of_n(
    policy: Policy,
    reward: Reward,
    examples: Sequence[Example],
    *,
    n: int,
    seed: int,
    image_size: tuple[int, int],
    num_steps: int,
    batch_size: int,
    precision: Precision = "fp32",
) -> list[Choice]:
    """Draw `n` pictures for each example, `n * num_steps` DiT evaluations, and keep the one that the reward likes best.

    A draw's noise depends on (seed, draw, example.id) alone: an example's pictures are the same whatever else is in
    the list, and those of a smaller `n` are among those of a larger one. A failed score never wins, of equal scores
    the first does. The kept picture is rounded to 8 bits, as a file would hold it; it is scored before. Token
    correspondences belong to the old target and are left out with it.

    Args:
        policy: as it is; it draws in evaluation mode and without gradient.
        reward: the judge; it need not be differentiable.
        examples: at least one, with unique ids; their own targets are not looked at.
        n: pictures drawn for each example, at least 1.
        seed: of the draws.
        image_size: (height, width) in pixels.
        num_steps: denoising steps of the whole schedule.
        batch_size: examples in one forward pass. The kept pictures and all of one draw are in memory: cut a long list
            into pieces, the choices are the same.
        precision: arithmetic of the policy's forward pass.

    Raises:
        ConfigError: `n` below 1, no examples, or two of one id.
        ScoringError: the reward broke its contract.
    """
    if n < 1:
        raise ConfigError(f"best of n: {n} pictures for each example; at least 1 is needed")
    best: list[tuple[float, Tensor] | None] = [None] * len(examples)
    for draw in range(n):
        drawn = evaluate(
            policy,
            examples,
            {"reward": reward},
            image_size=image_size,
            num_steps=num_steps,
            batch_size=batch_size,
            seed=derive_seed(seed, "best_of_n", draw),
            keep_pixels=len(examples),
            precision=precision,
        )
        assert drawn.pixels_K3HW is not None
        scores = drawn.scores["reward"]
        found = zip(scores.value_B.tolist(), scores.valid_B.tolist(), drawn.pixels_K3HW, strict=True)
        for place, (value, valid, picture_3HW) in enumerate(found):
            leader = best[place]
            if valid and (leader is None or value > leader[0]):
                # A copy: a view would keep the pictures of the whole draw in memory.
                best[place] = (value, picture_3HW.mul(255).round().div(255))
    return [_choice(example, leader) for example, leader in zip(examples, best, strict=True)]


def save_choices(choices: Sequence[Choice], folder: Path) -> Path:
    """Write the examples as a JSON Lines file and PNG pictures, for `data.train: {use: jsonl}`.

    Pictures are rounded to 8 bits. Of `extras` only what JSON can hold is written (text, numbers, lists, mappings, no
    tensors), and `best_of_n_score` is added.

    Returns:
        The JSON Lines file.

    Raises:
        UserError: the folder cannot be written.
    """
    path = folder / DATASET
    try:
        (folder / PICTURES).mkdir(parents=True, exist_ok=True)
        rows = [_row(choice, f"{number:06d}", folder) for number, choice in enumerate(choices)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: the examples cannot be written: {(error.strerror or str(error)).lower()}") from None
    return path


def _choice(example: Example, leader: tuple[float, Tensor] | None) -> Choice:
    if leader is None:
        return Choice(example=example, score=None)
    return Choice(example=dataclasses.replace(example, target=leader[1], correspondences=()), score=leader[0])


def _row(choice: Choice, stem: str, folder: Path) -> dict[str, Any]:
    example = choice.example

    def saved(name: str, picture_3HW: Tensor) -> str:
        place = f"{PICTURES}/{stem}-{name}.png"
        levels_HW3 = picture_3HW.detach().cpu().clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
        Image.fromarray(levels_HW3.contiguous().numpy()).save(folder / place)
        return place

    refs = {"content": example.content_refs, "style": example.style_refs, "identity": example.identity_refs}
    extras = {name: value for name, value in example.extras.items() if _is_plain(value)}
    row: dict[str, Any] = {"id": example.id, "prompt": example.prompt}
    row |= {kind: [saved(f"{kind}-{i}", picture) for i, picture in enumerate(refs[kind])] for kind in refs}
    if example.target is not None:
        row["target"] = saved("target", example.target)
    return row | {"extras": extras | {"best_of_n_score": choice.score}}


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
