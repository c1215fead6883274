"""A vision-language model as a judge on this machine, differentiable; `vlm_judge` asks a service instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rewardgen.reward import Reward
from rewardgen.rewards.judging.blueprint import take_shapes
from rewardgen.rewards.judging.fit import Agreement, FitConfig, agreement, fit
from rewardgen.rewards.judging.local import LocalModel, load_model
from rewardgen.rewards.judging.questions import load_question
from rewardgen.types import Example, Score


class LocalVlmJudge(Reward):
    """P(yes) / (P(yes) + P(no)) of a transformers image-text model, or the expected place on a rubric; in [0, 1].

    The gradient goes from the probabilities of the reply's first token through the model and through preprocessing
    that equals the processor's within one 8-bit level. Pictures are judged one at a time, so that a score does not
    depend on padding. `Score.metrics` has `answer_mass`, the mean probability that the reply is an answer at all: where
    it is small, the model does not understand the question.

    Args:
        judge: the model with its question.
    """

    differentiable = True
    fit_config: ClassVar[type[FitConfig]] = FitConfig
    """What `fit` is told, for who has this class by its name alone."""

    def __init__(self, judge: LocalModel) -> None:
        super().__init__()
        self.judge = judge

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        question: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        checkpointing: bool = True,
        round_8bit: bool = True,
    ) -> LocalVlmJudge:
        """Read a model.

        Args:
            model: folder or hub repository; also of an adapter, as `rewardgen judge fit` writes it.
            question: a bundled template or the path of one's own. Templates that ask for reasons are refused.
            dtype: of the weights.
            checkpointing: recompute the model's layers in the backward pass instead of keeping their activations.
            round_8bit: judge the picture as its 8-bit file would look; the gradient is that of the unrounded one.

        Raises:
            ConfigError: the question or the model's processor cannot be used.
            CheckpointError: there is no such model.
        """
        asked = load_question(question)
        weights, processor = load_model(model, getattr(torch, dtype))
        return cls(LocalModel(weights, processor, asked, checkpointing=checkpointing, round_8bit=round_8bit))

    @classmethod
    def blueprint(
        cls,
        model: str,
        question: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        checkpointing: bool = True,
        round_8bit: bool = True,
    ) -> LocalVlmJudge:
        """A judge of the right sizes whose weights mean nothing (`judging.blueprint`); nothing is fetched.

        Raises:
            ConfigError: the question or the model's processor cannot be used.
            CheckpointError: the model's sizes are not known.
        """
        weights, processor, preprocess = take_shapes(model, getattr(torch, dtype))
        asked, options = load_question(question), {"checkpointing": checkpointing, "round_8bit": round_8bit}
        return cls(LocalModel(weights, processor, asked, **options, preprocess=preprocess))

    def fit(self, examples: Iterable[Example], folder: Path, config: FitConfig) -> None:
        """Teach this judge labelled pictures and save it to a folder; read that for the taught one. See `judging.fit`.

        Raises:
            ConfigError: TRL is not installed, or labels are missing or unknown.
        """
        fit(self.judge, examples, folder, config)

    def agreement(self, examples: Iterable[Example]) -> Agreement:
        """How far this judge agrees with labelled pictures. Raises ConfigError for missing or unknown labels."""
        return agreement(self.judge, examples)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        values, masses = [], []
        for pixels_3HW, example in zip(pixels_B3HW, examples, strict=True):
            parts = self.judge.question.put(pixels_3HW, example)
            if parts is None or not bool(pixels_3HW.isfinite().all()):
                values.append(torch.full((), math.nan, device=pixels_B3HW.device))
                continue
            value, mass = self.judge(parts)
            values.append(value.to(pixels_B3HW.device))
            masses.append(mass.detach())
        value_B = torch.stack(values)
        metrics = {"answer_mass": float(torch.stack(masses).mean())} if masses else {}
        return Score(value_B=value_B, valid_B=value_B.detach().isfinite(), metrics=metrics)
