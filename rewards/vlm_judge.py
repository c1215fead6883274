"""A vision-language model as a judge, behind a service; `vlm_judge_local` is its differentiable twin."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from rewardgen.reward import Reward, RewardWarning
from rewardgen.rewards.judging.client import KINDS, check_key_name, check_url
from rewardgen.rewards.judging.questions import check_question, load_question
from rewardgen.rewards.judging.service import JudgeService, Outcome, ServiceConfig
from rewardgen.types import Begun, Example, Score

_EXAMPLES_OF_FAILURES = 3


class VlmJudge(Reward):
    """What a judge thinks of a picture, in [0, 1]: P(yes), or its place on a rubric.

    P(yes) is read from log-probabilities where the service returns them; otherwise the reply's text is taken, if it
    is an answer and nothing else. Every other reply and every failed call leaves its picture without a valid score.
    The first failure of each kind is told in a `RewardWarning`, with its reason.

    `Score.counts` counts pictures: `by_logprob`, `by_text`, `from_cache`, `failed`, `not_applicable`; and calls:
    `attempts`, and the failed ones by kind (`rate_limited`, `timeout`, `server_error`, `connection`, `nonsense`,
    `refused`).

    Args:
        question: a bundled template (`style`, `subject`, `subject_rubric`, `prompt`, `prompt_rubric`) or the path of
            one's own; see `rewardgen.rewards.judging.questions`.
        urls: base URLs of endpoints that serve the same model, such as `http://localhost:8000/v1`.
        served_model: the model's name there.
        key_env: name of the environment variable with the key; never the key. None where none is needed.
        concurrency: calls in flight at each endpoint: the most if `adaptive`, else always.
        adaptive: give each endpoint what it can take (see `endpoints.py`).
        timeout_s: seconds for one call.
        max_attempts: failed calls after which a question is given up. 429s do not count.
        give_up_s: seconds after which it is given up whatever failed, 429s too; counted from its turn to be asked on.
        backoff_s: first wait after a failure, in seconds; it doubles and is drawn at random.
        eject_after: failures in a row after which an endpoint is left alone for a while.
        eject_s: seconds of the first such while.
        cache_dir: folder for answers, keyed by pictures, question, model and settings. None keeps none.
        max_side: longer pictures are made smaller before they are sent; pixels. None sends them as they are.
        request: further fields of every request, such as `{seed: 0}`; null leaves one of ours out.

    Raises:
        ConfigError: a template, URL, variable or folder that cannot be used. No host is contacted.
    """

    differentiable = False
    operational = frozenset(
        {"urls", "key_env", "concurrency", "adaptive", "timeout_s", "max_attempts", "give_up_s", "backoff_s"}
        | {"eject_after", "eject_s", "cache_dir"}
    )

    def __init__(
        self,
        question: str,
        urls: Annotated[tuple[str, ...], Field(min_length=1)],
        served_model: Annotated[str, Field(min_length=1)],
        *,
        key_env: str | None = None,
        concurrency: Annotated[int, Field(ge=1, le=1024)] = 16,
        adaptive: bool = True,
        timeout_s: Annotated[float, Field(gt=0)] = 60.0,
        max_attempts: Annotated[int, Field(ge=1)] = 4,
        give_up_s: Annotated[float, Field(gt=0)] = 300.0,
        backoff_s: Annotated[float, Field(ge=0)] = 0.5,
        eject_after: Annotated[int, Field(ge=1)] = 5,
        eject_s: Annotated[float, Field(ge=0)] = 30.0,
        cache_dir: str | None = None,
        max_side: Annotated[int, Field(ge=8)] | None = 1024,
        request: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.question = load_question(question)
        self._told: set[str] = set()
        self.service = JudgeService(
            ServiceConfig(
                urls=tuple(urls),
                model=served_model,
                key_env=key_env,
                concurrency=concurrency,
                adaptive=adaptive,
                timeout_s=timeout_s,
                max_attempts=max_attempts,
                give_up_s=give_up_s,
                backoff_s=backoff_s,
                eject_after=eject_after,
                eject_s=eject_s,
                cache_dir=cache_dir,
                max_side=max_side,
                request=dict(request or {}),
            )
        )

    @classmethod
    def check_arguments(cls, *, question: str, urls: Sequence[str], key_env: str | None, **_: Any) -> None:
        """Refuse what could not be asked from anywhere. Raises ConfigError.

        Whether the key is set and the cache's folder can be written is the affair of the machine that asks.
        """
        check_question(question)
        for url in urls:
            check_url(url)
        if key_env is not None:
            check_key_name(key_env)

    @classmethod
    def blueprint(cls, *_: Any, **__: Any) -> Reward:
        """What a plan of memory takes for it: nothing of it is here, and nobody is asked."""
        return _Elsewhere()

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return self.begin(pixels_B3HW, examples).finish()

    def begin(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Begun[Score]:
        """Send the questions off. Those of all batches begun share `concurrency`, and are asked in their order."""
        put = [
            self.question.put(pixels_3HW, example) if bool(pixels_3HW.isfinite().all()) else None
            for pixels_3HW, example in zip(pixels_B3HW.detach(), examples, strict=True)
        ]
        asked = [parts for parts in put if parts is not None]
        applies, device = [parts is not None for parts in put], pixels_B3HW.device
        wait = self.service.begin(self.question, asked)
        return Begun(lambda: self._scored(wait(), applies, device))

    def give_up(self) -> None:
        """Questions that wait for their turn are not asked any more."""
        self.service.give_up()

    def _scored(self, outcomes: Sequence[Outcome], applies: Sequence[bool], device: torch.device) -> Score:
        waiting = iter(outcomes)
        answers = [next(waiting).answer if asked else None for asked in applies]
        # NaN where there is no score: no mean can take it for one.
        values = [math.nan if answer is None else answer.value for answer in answers]
        self._warn(outcomes)
        return Score(
            value_B=torch.tensor(values, dtype=torch.float32, device=device),
            valid_B=torch.tensor([answer is not None for answer in answers], device=device),
            counts={**_count(outcomes), "not_applicable": float(applies.count(False))},
        )

    def _warn(self, outcomes: Sequence[Outcome]) -> None:
        """Tell of failures, of each kind once: how many there are, the counts say."""
        failed = [outcome for outcome in outcomes if outcome.answer is None]
        kinds = {str(outcome.kind) for outcome in failed}
        if kinds - self._told:
            reasons = dict.fromkeys(f"{outcome.kind}: {outcome.reason}" for outcome in failed)
            warnings.warn(
                f"the judge failed on {len(failed)} of {len(outcomes)} pictures, which are masked and counted, as"
                f" further ones will be: {'; '.join(list(reasons)[:_EXAMPLES_OF_FAILURES])}",
                RewardWarning,
                stacklevel=2,
            )
            self._told |= kinds


class _Elsewhere(Reward):
    """A judge on another machine as a plan sees it: pictures leave, numbers come back."""

    differentiable = False

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        value_B = pixels_B3HW.detach()[:, 0, 0, 0].float()
        return Score(value_B=value_B, valid_B=torch.ones_like(value_B, dtype=torch.bool))


def _count(outcomes: Sequence[Outcome]) -> dict[str, float]:
    calls: Counter[str] = Counter()
    for outcome in outcomes:
        calls.update(outcome.counts)
    answers = [outcome.answer for outcome in outcomes if outcome.answer is not None]
    by_logprob = sum(answer.by_logprob for answer in answers)
    return {
        "by_logprob": float(by_logprob),
        "by_text": float(len(answers) - by_logprob),
        "failed": float(len(outcomes) - len(answers)),
        **{name: float(calls[name]) for name in ("from_cache", "attempts", *KINDS)},
    }
