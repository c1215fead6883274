"""Where the bundled rewards, and learning from samples, wait for the device: counted by `test_synchronisation.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewardgen.fleet.inline import InlinePool
from rewardgen.learner import Learner, OptimizerConfig
from rewardgen.objective import Objective, ObjectiveConfig
from rewardgen.reward import Reward
from rewardgen.rewards.aesthetic import AestheticReward, Pooled
from rewardgen.rewards.clip import ClipReward
from rewardgen.rewards.clip_encoder import ClipEncoder
from rewardgen.rewards.dino import ClassToken, DinoReward
from rewardgen.rewards.hpsv2 import Hpsv2Reward
from rewardgen.rewards.image_processor import ImageProcessor
from rewardgen.rewards.image_reward import BlipScorer, ImageReward
from rewardgen.rewards.judging.local import LocalModel
from rewardgen.rewards.judging.questions import load_question
from rewardgen.rewards.pickscore import PickScoreReward
from rewardgen.rewards.picture_encoder import PictureEncoder
from rewardgen.rewards.vlm_judge_local import LocalVlmJudge
from rewardgen.rollout import RolloutWorker
from rewardgen.scoring import ScoringWorker
from rewardgen.trainer import TrainConfig, Trainer
from rewardgen.transfer import score_on_host
from rewardgen.types import Example, Score
from rewardgen.world.tiny_vlm import tiny_llava
from tests.test_synchronisation import (
    END_OF_STEP,
    META,
    Waits,
    on_meta,
    own,
    score_waits,
    step_of,
)
from tests.test_trainer import ROLLOUT, Reports
from tests.toy_reward_models import SIDE, bert_tokenizer, blip_text, blip_vision, clip_model, clip_tokenizer, dino_model
from tests.toys import ToyDataset, ToyPolicy

PROCESSOR = ImageProcessor(short_side=SIDE, crop=(SIDE, SIDE))


def clip() -> ClipEncoder:
    return ClipEncoder(clip_model(), clip_tokenizer(), PROCESSOR)


def blip() -> BlipScorer:
    return BlipScorer(blip_vision(), blip_text(), torch.nn.Linear(24, 1))


def judge() -> LocalVlmJudge:
    sizes = {"image_size": 16, "vision_width": 24, "vision_layers": 2, "text_width": 24, "text_layers": 2}
    model, processor = tiny_llava(**sizes)
    return LocalVlmJudge(LocalModel(model, processor, load_question("style"), checkpointing=False))


REWARDS: dict[str, Callable[[], Reward]] = {
    "clip, prompt": lambda: ClipReward(clip()),
    "clip, pictures": lambda: ClipReward(clip(), against="style"),
    "pickscore": lambda: PickScoreReward(clip()),
    "hpsv2": lambda: Hpsv2Reward(clip()),
    "dino": lambda: DinoReward(PictureEncoder(ClassToken(dino_model()), PROCESSOR)),
    "aesthetic": lambda: AestheticReward(
        PictureEncoder(Pooled(clip_model().vision_model), PROCESSOR), torch.nn.Linear(32, 1)
    ),
    "image_reward": lambda: ImageReward(blip(), bert_tokenizer(), PROCESSOR),
}


WITHIN = {"image_reward": {"rewards/image_reward:forward": 1}}
"""What transformers waits for: BLIP's text model looks whether any token of the prompts is padding."""


@pytest.mark.parametrize("name", REWARDS)
def test_a_step_waits_for_the_score_alone(name: str, tmp_path: Path) -> None:
    reward = REWARDS[name]().requires_grad_(False).eval()
    seen = step_of(ToyPolicy(), {"reward": reward}, ToyDataset(2), tmp_path)
    assert own(seen) == END_OF_STEP | score_waits(1) | WITHIN.get(name, {})


def test_the_local_judge_waits_only_within_the_model() -> None:
    """transformers looks where a picture's tokens stand in the text, by value; what is ours waits for nothing."""
    reward = judge().requires_grad_(False).eval().to(META)
    examples = ToyDataset(2).examples
    with on_meta(), Waits() as waits:
        for _ in range(2):
            waits.seen.clear()
            pixels = torch.zeros(2, 3, 16, 16, device=META, requires_grad=True)
            score = reward.score(pixels, examples)
            torch.autograd.grad(score.value_B.sum(), pixels)
        within = waits.seen.pop("rewards/judging/local:forward", 0)
        assert not waits.seen
        score_on_host(score)
        assert waits.seen == {"rewardgen/transfer:score_on_host": 1}
    assert within % len(examples) == 0


class Opinions(Reward):
    """A judge elsewhere: its values lie on the CPU, and no two are the same."""

    differentiable = False

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        values = torch.arange(self.asked, self.asked + len(examples)).double()
        self.asked += len(examples)
        return Score(value_B=values, valid_B=torch.ones(len(examples), dtype=torch.bool))


SAMPLES: dict[str, dict[str, Any]] = {
    "grpo": {"kind": "grpo", "window": {"size": 2, "range": [0, 1]}},
    "grpo, base": {"kind": "grpo", "window": {"size": 2, "range": [0, 1]}, "beta": 0.1},
    "nft": {"kind": "nft", "times_per_sample": 2},
    "nft, base": {"kind": "nft", "times_per_sample": 2, "beta": 0.1},
}


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("name", SAMPLES)
def test_learning_from_samples_waits_once_more_for_its_metrics(name: str, iterations: int, tmp_path: Path) -> None:
    """Whatever the number of samples and places: the ratios and distances are read together after the update."""
    settings = SAMPLES[name] | {"num_generations": 3, "num_iterations": iterations}
    config = {"rewards": {"judge": {"use": "x"}}, "policy_gradient": settings}
    objective = Objective(ObjectiveConfig.model_validate(config), {"judge": Opinions()}).to(META)
    policy = ToyPolicy().to(META)
    learner = Learner(policy, objective, optimizer=OptimizerConfig(), window=ROLLOUT.window)
    trainer = Trainer(
        learner,
        InlinePool(RolloutWorker(policy)),
        ToyDataset(4),
        rollout=ROLLOUT.model_copy(update={"image_size": (8, 8)}),
        config=TrainConfig.model_validate({"num_steps": 9, "batch_size": 2}),
        seed=0,
        folder=tmp_path,
        reporter=Reports(),
        scoring=InlinePool(ScoringWorker(objective.sampled)),
    )
    with on_meta(), Waits() as waits:
        assert not trainer.step(0).skipped
        waits.seen.clear()
        report = trainer.step(1)
    assert not report.skipped
    assert report.metrics["policy_gradient/taking_part"] == 1.0
    seen: Counter[str] = Counter(own(waits.seen))
    # The judge lies elsewhere: that pictures are finite has to be known there.
    assert dict(seen) == {"rewardgen/transfer:numbers": 3 * iterations, "rewardgen/scoring:_valid_where": 3}


def test_a_picture_that_is_not_finite_spoils_no_other() -> None:
    """It is masked without the host's knowing; value, gradient and metric of the others stay, to the last bit."""
    reward, examples = judge().requires_grad_(False).eval(), ToyDataset(3).examples
    reward.min_mass = 0.0  # a random model hardly means to answer
    drawn = torch.rand(3, 3, 20, 16, generator=torch.Generator().manual_seed(0))
    drawn[1, 0, 3, 4] = torch.inf
    pixels, alone = drawn.clone().requires_grad_(), drawn[[0, 2]].requires_grad_()
    score, wanted = reward.score(pixels, examples), reward.score(alone, [examples[0], examples[2]])
    assert score.valid_B.tolist() == [True, False, True]
    assert bool(score.value_B[1].isnan())
    assert torch.equal(score.value_B[[0, 2]], wanted.value_B)
    assert score_on_host(score).metrics == pytest.approx(dict(score_on_host(wanted).metrics), rel=1e-6)
    (grad,) = torch.autograd.grad(score.value_B, pixels, grad_outputs=torch.ones(3))
    (theirs,) = torch.autograd.grad(wanted.value_B, alone, grad_outputs=torch.ones(2))
    assert torch.equal(grad[[0, 2]], theirs)
    assert not grad[1].any()


def test_numbers_in_place_of_a_mask_choose_the_same_bits() -> None:
    """Sums and gradients over the samples that take part, as `replay` takes them."""
    generator = torch.Generator().manual_seed(0)
    for size in range(1, 70):
        mask_B = torch.rand(size, generator=generator) > 0.3
        values = [torch.randn(size, generator=generator).requires_grad_() for _ in range(2)]
        values[1].data = values[0].data.clone()
        sums = [values[0][mask_B].sum(), values[1][mask_B.nonzero()[:, 0]].sum()]
        assert torch.equal(*sums)
        assert torch.equal(*(torch.autograd.grad(total, value)[0] for total, value in zip(sums, values, strict=True)))


def test_metrics_come_over_with_the_scores() -> None:
    mean = torch.tensor(0.1) / 3
    score = Score(value_B=torch.ones(2), valid_B=torch.tensor([True, False]), metrics={"a": mean, "b": 0.5})
    assert score_on_host(score).metrics == {"a": float(mean), "b": 0.5}
    there = Score(
        value_B=torch.ones(2, device=META), valid_B=torch.ones(2, device=META).bool(), metrics={"a": mean.to(META)}
    )
    with Waits() as waits:
        found = score_on_host(there)
    assert waits.seen == {"rewardgen/transfer:score_on_host": 1}
    assert (found.value_B.tolist(), found.valid_B.tolist(), dict(found.metrics)) == (
        [1.0, 1.0],
        [True, True],
        {"a": 1.0},
    )
