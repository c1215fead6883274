"""Held-out evaluation: draw each example once, by a seed of its own, and score it with every metric.

Shape suffixes: N examples, B micro-batch, K kept pictures.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rewardgen.errors import ConfigError, UserError
from rewardgen.flow.sampling import sample
from rewardgen.policy import Policy, noise_like_request
from rewardgen.reward import Reward, score
from rewardgen.rollout import Precision, device_of, velocity_fn
from rewardgen.seeds import derive_seed
from rewardgen.settings import Plugin, Settings
from rewardgen.types import Example, Score


class EvaluationConfig(Settings):
    """What a run is judged by. The objective's rewards are always among the metrics."""

    every: int = Field(default=0, ge=0)
    """Steps between evaluations; 0 evaluates only before and after training."""
    num_examples: int = Field(default=64, ge=1)
    """How many held-out examples are drawn, the first of the dataset."""
    grid_examples: int = Field(default=6, ge=0)
    """How many of them are shown in the picture grid; 0 makes none."""
    batch_size: int = Field(default=8, ge=1)
    """Examples in one forward pass."""
    seed: int = Field(default=0, ge=0)
    """With an example's id it decides the example's noise, so that all policies draw from the same."""
    num_steps: int | None = Field(default=None, ge=1)
    """Denoising steps; by default those of the rollout."""
    witnesses: dict[str, Plugin] = Field(default_factory=dict)
    """Metrics that no objective uses: they tell whether a rise of the reward was honest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Scores of one policy (or of other pictures) on a list of examples.

    Args:
        example_ids: unique, in the order of the examples.
        scores: by metric, `value_B` float64 [N] and `valid_B` bool [N] on the CPU. A value that is not valid carries
            no meaning: it is counted and never averaged. `counts` are sums over the examples.
        pixels_K3HW: pictures in [0, 1] of the first K examples, float32 on the CPU.
    """

    example_ids: tuple[str, ...]
    scores: Mapping[str, Score]
    pixels_K3HW: Tensor | None = None

    def means(self) -> dict[str, float]:
        """Mean of the valid values of each metric that has any."""
        valid = {name: score.value_B[score.valid_B] for name, score in self.scores.items()}
        return {name: float(values.mean()) for name, values in valid.items() if len(values)}

    def valid_counts(self) -> dict[str, int]:
        """Number of valid values of each metric."""
        return {name: int(score.valid_B.sum()) for name, score in self.scores.items()}

    def counts(self) -> dict[str, dict[str, float]]:
        """What each metric counted beside its values, such as failures by kind; of those alone that count something."""
        return {name: dict(score.counts) for name, score in self.scores.items() if score.counts}

    def to_json(self) -> dict[str, Any]:
        """All but the pictures; a value that is not valid is null. `counts` has the metrics that count something."""
        scores = {
            name: [v if ok else None for v, ok in zip(s.value_B.tolist(), s.valid_B.tolist(), strict=True)]
            for name, s in self.scores.items()
        }
        return {"example_ids": list(self.example_ids), "scores": scores, "counts": self.counts()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Evaluation:
        """Read `to_json()`; older files have no counts.

        Raises:
            UserError: a key is missing, or a metric has not one value for each example.
        """
        try:
            ids = tuple(str(name) for name in data["example_ids"])
            columns = {str(name): [None if v is None else float(v) for v in c] for name, c in data["scores"].items()}
            counted = {name: {k: float(v) for k, v in c.items()} for name, c in data.get("counts", {}).items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"not an evaluation: {type(error).__name__}: {error}") from None
        for name, column in columns.items():
            if len(column) != len(ids):
                raise UserError(f"not an evaluation: metric '{name}' has {len(column)} values for {len(ids)} examples")
        scores = {
            name: Score(
                value_B=torch.tensor([torch.nan if v is None else v for v in column], dtype=torch.float64),
                valid_B=torch.tensor([v is not None for v in column], dtype=torch.bool),
                counts=counted.get(name, {}),
            )
            for name, column in columns.items()
        }
        return cls(example_ids=ids, scores=scores)


def evaluate(
    policy: Policy,
    examples: Sequence[Example],
    metrics: Mapping[str, Reward],
    *,
    image_size: tuple[int, int],
    num_steps: int,
    batch_size: int,
    seed: int,
    keep_pixels: int = 0,
    precision: Precision = "fp32",
) -> Evaluation:
    """Draw one picture for each example and score it, without gradient.

    The noise depends on (seed, example.id) alone: two policies are compared on the same noise, whatever the batch
    size, the order and the number of examples. The policy is in evaluation mode meanwhile.

    Args:
        policy: as it is; the caller sees to averaged weights.
        examples: at least one, with unique ids.
        metrics: by name; each scores pictures clamped to [0, 1]. A picture with non-finite pixels has no valid score.
        image_size: (height, width) in pixels.
        num_steps: denoising steps of the whole schedule.
        batch_size: examples in one forward pass.
        seed: of the evaluation.
        keep_pixels: how many pictures to keep, the first ones.
        precision: arithmetic of the policy's forward pass.

    Raises:
        ConfigError: no examples, or two of one id.
        ScoringError: a metric broke its contract.
    """
    _check_ids(examples)
    sigmas_T = policy.sigmas(num_steps, image_size)
    parts: dict[str, list[Score]] = {name: [] for name in metrics}
    kept: list[Tensor] = []
    with torch.no_grad(), _evaluation_mode(policy):
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            seed_B = [derive_seed(seed, "evaluation", example.id) for example in batch]
            noise_BLC = noise_like_request(policy, seed_B, image_size).to(device_of(policy))
            condition = policy.encode(batch)
            velocity = velocity_fn(policy, condition, mode="sample", image_size=image_size, precision=precision)
            clean_BLC = sample(velocity, noise_BLC, sigmas_T, start=0, stop=num_steps, enable_grad=False)
            pixels_B3HW = policy.decode(clean_BLC, image_size).clamp(0, 1)
            for name, scores in score_pixels(metrics, pixels_B3HW, batch).items():
                parts[name].append(scores)
            kept.append(pixels_B3HW[: max(keep_pixels - start, 0)].float().cpu())
    return Evaluation(
        example_ids=tuple(example.id for example in examples),
        scores={name: join(scores) for name, scores in parts.items()},
        pixels_K3HW=torch.cat(kept) if keep_pixels > 0 else None,
    )


def score_pixels(metrics: Mapping[str, Reward], pixels_B3HW: Tensor, examples: Sequence[Example]) -> dict[str, Score]:
    """Score pictures with every metric, each on its own device, without gradient; results on the CPU in float64."""
    finite_B = torch.isfinite(pixels_B3HW).flatten(1).all(1).cpu()
    # A metric could make a finite value of a broken picture, and a broken picture could spoil its neighbours.
    pixels_B3HW = pixels_B3HW.nan_to_num()
    scores = {}
    for name, metric in metrics.items():
        own = next((tensor.device for tensor in chain(metric.parameters(), metric.buffers())), pixels_B3HW.device)
        result = score(metric, pixels_B3HW.to(own), examples, enable_grad=False)
        scores[name] = Score(
            value_B=result.value_B.double().cpu(), valid_B=result.valid_B.cpu() & finite_B, counts=result.counts
        )
    return scores


def join(scores: Sequence[Score]) -> Score:
    """The scores of consecutive batches as one. What is not valid becomes NaN, so that no average can hide it."""
    value_N, valid_N = (torch.cat([getattr(score, name) for score in scores]) for name in ("value_B", "valid_B"))
    counts: dict[str, float] = {}
    for part in scores:
        add_counts(counts, part.counts)
    return Score(value_B=value_N.masked_fill(~valid_N, torch.nan), valid_B=valid_N, counts=counts)


def add_counts(to: dict[str, float], counts: Mapping[str, float]) -> None:
    """Add counts to their sums, which may not be there yet."""
    for name, value in counts.items():
        to[name] = to.get(name, 0.0) + float(value)


def _check_ids(examples: Sequence[Example]) -> None:
    if not examples:
        raise ConfigError("there are no examples to evaluate on")
    repeated = [name for name, count in Counter(example.id for example in examples).items() if count > 1]
    if repeated:
        raise ConfigError(f"evaluation needs examples with unique ids; '{repeated[0]}' occurs more than once")


@contextlib.contextmanager
def _evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off, and afterwards each part back to what it was."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
