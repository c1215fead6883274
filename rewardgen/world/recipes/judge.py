"""The tiny judge: a small LLaVA that is asked whether two pictures have the same style.

Its eyes are taught first, as the tiny CSD is: the cosine of two pictures' mean patch features is regressed to the true
similarity of their styles. Then the whole model learns to answer, by the same `judging.fit` as any judge
(`rewardgen judge fit`). CSD's weights are not used, so that the two can watch each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from rewardgen.rewards.judging.fit import Agreement, FitConfig, agreement, fit
from rewardgen.rewards.judging.local import LocalModel, load_model, save_model
from rewardgen.rewards.judging.questions import load_question
from rewardgen.rewards.preprocess import normalise
from rewardgen.world.pairs import StylePairs
from rewardgen.world.recipes.lessons import Lesson, rendered
from rewardgen.world.recipes.training import Recipe
from rewardgen.world.recipes.training import fit as fit_module
from rewardgen.world.recipes.vae import load as load_vae
from rewardgen.world.similarity import style_similarity
from rewardgen.world.tiny_vlm import CLIP_MEAN, CLIP_STD, tiny_llava

EYES = Recipe(name="judge-eyes", version="1", steps=500, batch=64, lr=1.5e-3, seed=505)
ANSWERS = Recipe(name="judge", version="1", steps=2500, batch=32, lr=1.5e-3, seed=506)
STAGES = (EYES, ANSWERS)
LESSONS = 150
"""Batches made beforehand for the eyes and gone through several times."""
PAIRS, HELD_OUT = 12_000, 600
"""Labelled pairs to learn from, and to be judged by."""
QUESTION = "style"


def teach_eyes(model: LlavaForConditionalGeneration, lessons: Sequence[Lesson], steps: int) -> list[float]:
    """Teach the vision tower what makes styles alike, in place; returns the losses."""
    tower = model.model.vision_tower
    head = nn.Linear(tower.config.hidden_size, 48)
    taught = nn.ModuleList([tower, head])

    def loss(step: int) -> Tensor:
        lesson = lessons[step % len(lessons)]
        truth_NN = style_similarity(lesson.style, lesson.style)
        patches_NPD = tower(normalise(lesson.pixels_N3HW, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]
        code_ND = F.normalize(head(patches_NPD.mean(1)), dim=-1)
        # Near pairs count more; the diagonal says nothing.
        weight_NN = (0.2 + truth_NN) * (1 - torch.eye(len(truth_NN)))
        return (weight_NN * (code_ND @ code_ND.T - truth_NN).square()).sum() / weight_NN.sum()

    losses = fit_module(taught.train(), loss, EYES, steps)
    taught.eval()
    return losses


def held_out_agreement(folder: Path, size: int = HELD_OUT, *, disturbed: bool = False) -> Agreement:
    """Of the judge in `folder/judge` with pairs of unseen styles, on pictures as rendered or with artefacts."""
    pairs = StylePairs("held_out", size=size)
    if disturbed:
        pairs.disturb(load_vae(folder), seed=ANSWERS.seed)
    judge = LocalModel(*load_model(str(folder / "judge"), torch.float32), load_question(QUESTION), checkpointing=False)
    return agreement(judge, (pairs[index] for index in range(len(pairs))))


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save in half precision, and report agreement with held-out labels."""
    vae, steps = load_vae(folder), [recipe.scaled(steps_factor) for recipe in STAGES]
    model, processor = tiny_llava(seed=EYES.seed)
    seeds = [EYES.seed * 1_000_003 + 20 * index for index in range(min(LESSONS, steps[0]))]
    teach_eyes(model, [rendered(EYES.batch, seed, vae, photos=i % 2 == 1) for i, seed in enumerate(seeds)], steps[0])

    pairs = StylePairs("train", size=min(PAIRS, steps[1] * ANSWERS.batch))
    pairs.disturb(vae, seed=ANSWERS.seed + 1)
    judge = LocalModel(model, processor, load_question(QUESTION), checkpointing=False)
    config = FitConfig(num_steps=steps[1], batch_size=ANSWERS.batch, lr=ANSWERS.lr, lora_rank=0, seed=ANSWERS.seed)
    place = folder / "judge"
    fit(judge, (pairs[index] for index in range(len(pairs))), place, config)
    model, processor = load_model(str(place), torch.float32)
    save_model(model.half(), processor, place)
    plain, disturbed = held_out_agreement(folder), held_out_agreement(folder, disturbed=True)
    return {
        "balanced_accuracy": plain.balanced_accuracy,
        "balanced_accuracy_with_artefacts": disturbed.balanced_accuracy,
        "recall_of_same": plain.recalls["yes"],
        "recall_of_another": plain.recalls["no"],
    }
