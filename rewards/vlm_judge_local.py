"""A vision-language model as a judge on this machine, differentiable; `vlm_judge` asks a service instead."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rewardgen.reward import Reward, RewardWarning
from rewardgen.rewards.judging.blueprint import take_shapes
from rewardgen.rewards.judging.fit import Agreement, FitConfig, agreement, fit
from rewardgen.rewards.judging.local import LocalModel, check_plain, load_model
from rewardgen.rewards.judging.questions import MIN_MASS, check_question, load_question
from rewardgen.types import Example, Score


class LocalVlmJudge(Reward):
    """P(yes) / (P(yes) + P(no)) of a transformers image-text model, or the expected place on a rubric; in [0, 1].

    The gradient goes from the probabilities of the reply's first token through the model and through preprocessing
    that equals the processor's within one 8-bit level. Pictures are judged one at a time, so that a score does not
    depend on padding. `Score.metrics` has `answer_mass`, the mean probability that the reply is an answer at all. A
    picture about which it is below `min_mass` has no valid score: the model was about to say something else.

    `Score.counts` counts pictures: `by_logprob`, all those that the model was asked about, and `not_applicable`.

    Args:
        judge: the model with its question.
        min_mass: in [0, 1]; 0 takes every score.
    """

    differentiable = True
    fit_config: ClassVar[type[FitConfig]] = FitConfig
    """What `fit` is told, for who has this class by its name alone."""

    def __init__(self, judge: LocalModel, *, min_mass: float = MIN_MASS) -> None:
        super().__init__()
        self.judge, self.min_mass = judge, min_mass
        self._looked = False

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        question: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        checkpointing: bool = True,
        round_8bit: bool = True,
        min_mass: Annotated[float, Field(ge=0, le=1)] = MIN_MASS,
    ) -> LocalVlmJudge:
        """Read a model.

        Args:
            model: folder or hub repository; also of an adapter, as `rewardgen judge fit` writes it.
            question: a bundled template or the path of one's own. Templates that ask for reasons are refused.
            dtype: of the weights.
            checkpointing: recompute the model's layers in the backward pass instead of keeping their activations.
            round_8bit: judge the picture as its 8-bit file would look; the gradient is that of the unrounded one.
            min_mass: probability that the reply is an answer at all, below which a picture has no valid score.

        Raises:
            ConfigError: the question or the model's processor cannot be used.
            CheckpointError: there is no such model.
        """
        asked = load_question(question)
        weights, processor = load_model(model, getattr(torch, dtype))
        judge = LocalModel(weights, processor, asked, checkpointing=checkpointing, round_8bit=round_8bit)
        return cls(judge, min_mass=min_mass)

    @classmethod
    def check_arguments(cls, *, question: str, **_: Any) -> None:
        """Refuse a question that cannot be asked, with nothing of the model read. Raises ConfigError."""
        if (asked := check_question(question)) is not None:
            check_plain(asked)

    @classmethod
    def blueprint(
        cls,
        model: str,
        question: str,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        checkpointing: bool = True,
        round_8bit: bool = True,
        min_mass: Annotated[float, Field(ge=0, le=1)] = MIN_MASS,
    ) -> LocalVlmJudge:
        """A judge of the right sizes whose weights mean nothing (`judging.blueprint`); nothing is fetched.

        Raises:
            ConfigError: the question or the model's processor cannot be used.
            CheckpointError: the model's sizes are not known.
        """
        weights, processor, preprocess = take_shapes(model, getattr(torch, dtype))
        asked, options = load_question(question), {"checkpointing": checkpointing, "round_8bit": round_8bit}
        judge = cls(LocalModel(weights, processor, asked, **options, preprocess=preprocess), min_mass=min_mass)
        judge._looked = True  # its answers mean nothing
        return judge

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
        values, masses, judged = [], [], []
        # One that is not finite is judged as black and masked: whether it is finite only the device knows by now.
        finite_B = pixels_B3HW.detach().isfinite().flatten(1).all(1)
        shown_B3HW = pixels_B3HW.where(finite_B[:, None, None, None], 0.0)
        for pixels_3HW, finite, example in zip(shown_B3HW, finite_B, examples, strict=True):
            parts = self.judge.question.put(pixels_3HW, example)
            if parts is None:
                values.append(torch.full((), math.nan, device=pixels_B3HW.device))
                continue
            value, mass = self.judge(parts)
            mass = mass.detach().to(pixels_B3HW.device)
            values.append(value.to(pixels_B3HW.device).where(finite & (mass >= self.min_mass), math.nan))
            masses.append(mass.where(finite, 0.0))
            judged.append(finite)
        value_B = torch.stack(values)
        counts = {"by_logprob": float(len(masses)), "not_applicable": float(len(values) - len(masses))}
        metrics = {}
        if masses:
            metrics["answer_mass"] = torch.stack(masses).sum() / torch.stack(judged).sum()
            self._look(metrics["answer_mass"])
        return Score(value_B=value_B, valid_B=value_B.detach().isfinite(), metrics=metrics, counts=counts)

    def _look(self, mean: Tensor) -> None:
        """Tell once, of the first pictures, where the model does not answer; looking again would wait each time."""
        if self._looked:
            return
        self._looked = True
        if (share := float(mean)) < self.min_mass:
            warnings.warn(
                f"the judge's reply to '{self.judge.question.name}' is one of its answers with a probability of"
                f" {share:.2g} only, and below {self.min_mass:g} a picture has no valid score: the model does not"
                " understand the question; take another one, or fit this one (rewardgen judge fit)",
                RewardWarning,
                stacklevel=3,
            )
