"""Scores of pictures that are already there: the true ones, and others to read a table by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from rewardgen.evaluation.evaluate import Evaluation, join, score_pixels
from rewardgen.reward import Reward
from rewardgen.types import Example, Score


def target_scores(examples: Sequence[Example], metrics: Mapping[str, Reward], *, batch_size: int = 16) -> Evaluation:
    """Scores of the true pictures, the ceiling of each metric; an example without a target is not valid."""
    return score_pictures(examples, [example.target for example in examples], metrics, batch_size=batch_size)


def reference_scores(
    examples: Sequence[Example], metrics: Mapping[str, Reward], *, image_size: tuple[int, int], batch_size: int = 16
) -> dict[str, Evaluation]:
    """Scores of pictures that no model drew, to read a table by.

    `content copied` hands back the first content reference (right content, wrong style), `another's target` the true
    picture of the next example that has one (a good picture with unrelated content and style).

    Args:
        examples: at least one.
        metrics: by name.
        image_size: (height, width) to which the pictures are resized.
        batch_size: pictures scored at once.
    """

    def fitted(picture: Tensor | None) -> Tensor | None:
        if picture is None or tuple(picture.shape[1:]) == image_size:
            return picture
        return F.interpolate(picture[None], image_size, mode="bicubic", antialias=True)[0].clamp(0, 1)

    content = [example.content_refs[0] if example.content_refs else None for example in examples]
    having = [place for place, example in enumerate(examples) if example.target is not None]
    others: list[Tensor | None] = [None] * len(examples)
    if len(having) > 1:
        for place, following in zip(having, having[1:] + having[:1], strict=True):
            others[place] = examples[following].target
    rows = {"content copied": content, "another's target": others}
    return {
        name: score_pictures(examples, [fitted(picture) for picture in pictures], metrics, batch_size=batch_size)
        for name, pictures in rows.items()
    }


def score_pictures(
    examples: Sequence[Example],
    pictures: Sequence[Tensor | None],
    metrics: Mapping[str, Reward],
    *,
    batch_size: int = 16,
) -> Evaluation:
    """Score given pictures [3, H, W] in [0, 1], one for each example and of any sizes; None is not valid."""
    parts: dict[str, list[Score]] = {name: [] for name in metrics}
    pairs = list(zip(examples, pictures, strict=True))
    for shape, group in groupby(pairs, key=lambda pair: None if pair[1] is None else pair[1].shape):
        run = list(group)
        for start in range(0, len(run), batch_size):
            batch = [example for example, _ in run[start : start + batch_size]]
            given = [picture for _, picture in run[start : start + batch_size] if picture is not None]
            scored = score_pixels(metrics, torch.stack(given), batch) if shape is not None else {}
            missing = Score(
                value_B=torch.full((len(batch),), torch.nan, dtype=torch.float64),
                valid_B=torch.zeros(len(batch), dtype=torch.bool),
            )
            for name, scores in parts.items():
                scores.append(scored.get(name, missing))
    return Evaluation(
        example_ids=tuple(example.id for example in examples),
        scores={name: join(scores) for name, scores in parts.items()},
    )
