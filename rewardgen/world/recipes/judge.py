"""The tiny judge: a small LLaVA that is asked whether two pictures have the same style.

One bit for a pair of pictures is little to learn seeing and comparing from: for long nothing would happen. So the judge
is made in three stages, each of which finds the work of the one before it done.

1. *Eyes*, as the tiny CSD's: the cosine of two pictures' mean patch features is regressed to the true similarity of
   their styles.
2. *Comparing*, the whole model. The probability of "yes" is regressed to a graded truth, half-way at `HALFWAY`: a
   picture that is nearly right is nearly a yes, so that the judge, used as a reward, still has a slope where pictures
   are half right. Meanwhile both pictures' style parameters are to be read off the state before the last layer, which
   tells attention what to fetch before anything is compared. Every second step half of the pictures are disturbed
   against the judge (one signed-gradient step), so that what raises the score is visible.
3. *Answers*: labelled pairs, by the same `judging.fit` as any judge (`rewardgen judge fit`).

CSD's weights are not used, so that the two can watch each other.

N pictures, K base styles of a lesson, P pairs, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from rewardgen.rewards.judging.fit import Agreement, FitConfig, agreement, fit
from rewardgen.rewards.judging.local import LocalModel, load_model, save_model
from rewardgen.rewards.judging.questions import load_question
from rewardgen.rewards.preprocess import normalise
from rewardgen.types import Example
from rewardgen.world.pairs import StylePairs
from rewardgen.world.recipes.lessons import Lesson, mixed_pairs, rendered
from rewardgen.world.recipes.training import Recipe
from rewardgen.world.recipes.training import fit as fit_module
from rewardgen.world.recipes.vae import load as load_vae
from rewardgen.world.scenes import TEXTURES, Style, oklab
from rewardgen.world.similarity import style_similarity
from rewardgen.world.tiny_vlm import CLIP_MEAN, CLIP_STD, tiny_llava

EYES = Recipe(name="judge-eyes", version="2", steps=500, batch=64, lr=1.5e-3, seed=505)
COMPARING = Recipe(name="judge-comparing", version="1", steps=1200, batch=32, lr=1e-3, seed=507)
ANSWERS = Recipe(name="judge", version="2", steps=400, batch=32, lr=3e-4, seed=506)
STAGES = (EYES, COMPARING, ANSWERS)
LESSONS = 200
"""Batches made beforehand for the first two stages and gone through several times."""
PAIRS, HELD_OUT = 12_000, 600
"""Labelled pairs to learn from, and to be judged by."""
SAME, NEAR = 0.4, 0.35
"""Shares of the compared pairs that show one style twice, and a style and its spoiled or slightly changed self."""
HALFWAY, SOFTNESS = 0.7, 0.1
"""True similarity that is worth P(yes) = 1/2, and the scale of the slope there. Labelled pairs have 1, or below 0.6."""
ADVERSARY = 0.04
"""Largest signed-gradient step, in pixel values of [0, 1]."""
QUESTION = "style"


def teach_eyes(model: LlavaForConditionalGeneration, lessons: Sequence[Lesson], steps: int) -> list[float]:
    """Teach the vision tower what makes styles alike, in place; returns the losses."""
    tower = model.model.vision_tower
    head = nn.Linear(tower.config.hidden_size, 48)
    taught = nn.ModuleList([tower, head])

    def loss(step: int) -> Tensor:
        lesson = lessons[step % len(lessons)]
        truth_NN = style_similarity(lesson.style, lesson.style)
        patches_NTD = tower(normalise(lesson.pixels_N3HW, CLIP_MEAN, CLIP_STD)).last_hidden_state[:, 1:]
        code_ND = F.normalize(head(patches_NTD.mean(1)), dim=-1)
        # Near pairs count more; the diagonal says nothing.
        weight_NN = (0.2 + truth_NN) * (1 - torch.eye(len(truth_NN)))
        return (weight_NN * (code_ND @ code_ND.T - truth_NN).square()).sum() / weight_NN.sum()

    losses = fit_module(taught.train(), loss, EYES, steps)
    taught.eval()
    return losses


def teach_comparing(judge: LocalModel, lessons: Sequence[Lesson], steps: int) -> list[float]:
    """Teach the whole model to compare two pictures, in place; returns the losses."""
    model, pairs = judge.model, COMPARING.batch
    code_size = _style_code(lessons[0].style).shape[1]
    reader = nn.Linear(model.config.text_config.hidden_size, 2 * code_size)
    taught = nn.ModuleList([model, reader])
    parts = judge.question.put(lessons[0].pixels_N3HW[0], Example(id="", style_refs=(lessons[0].pixels_N3HW[0],)))
    assert parts is not None
    text = {name: tensor.expand(pairs, *tensor.shape[1:]) for name, tensor in judge.text_inputs(parts).items()}
    yes, no = judge.tokens["yes"], judge.tokens["no"]

    def loss_of(pixels_P23HW: Tensor, truth_P: Tensor, codes_PC: Tensor) -> Tensor:
        pixels = normalise(pixels_P23HW.flatten(0, 1), CLIP_MEAN, CLIP_STD)
        out = model(**text, pixel_values=pixels, use_cache=False, logits_to_keep=1, output_hidden_states=True)
        log_p_PV = out.logits[:, -1].log_softmax(-1)
        wanted_P = torch.sigmoid((truth_P - HALFWAY) / SOFTNESS)
        said_P = wanted_P * log_p_PV[:, yes].logsumexp(-1) + (1 - wanted_P) * log_p_PV[:, no].logsumexp(-1)
        total: Tensor = F.mse_loss(reader(out.hidden_states[-2][:, -1]), codes_PC) - said_P.mean()
        return total

    def loss(step: int) -> Tensor:
        lesson = lessons[step % len(lessons)]
        rng = torch.Generator().manual_seed(COMPARING.seed * 1_000_003 + step)
        a_P, b_P = choose_pairs(len(lesson.pixels_N3HW), pairs, rng)
        truth_P = style_similarity(lesson.style, lesson.style)[a_P, b_P]
        code_NC = _style_code(lesson.style)
        codes_PC = torch.cat([code_NC[a_P], code_NC[b_P]], 1)
        pixels_P23HW = torch.stack([lesson.pixels_N3HW[a_P], lesson.pixels_N3HW[b_P]], 1)
        if step % 2:
            strength = ADVERSARY * torch.rand(pairs, 2, 1, 1, 1, generator=rng)
            strength *= torch.rand(pairs, 2, 1, 1, 1, generator=rng) < 0.5
            free = pixels_P23HW.clone().requires_grad_()
            (slope,) = torch.autograd.grad(loss_of(free, truth_P, codes_PC), free)
            pixels_P23HW = (pixels_P23HW + strength * slope.sign()).clamp(0, 1)
        return loss_of(pixels_P23HW, truth_P, codes_PC)

    losses = fit_module(taught.train(), loss, COMPARING, steps)
    taught.eval()
    return losses


def choose_pairs(n: int, pairs: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pairs (reference, picture) of a `rendered` lesson of `n` pictures: indices [P] each.

    `SAME` of them are one style in two contents, `NEAR` a style and its spoiled or slightly changed self, and the
    others of two base styles.
    """
    k = n // 4
    style_P = torch.arange(pairs) % k
    style_P = style_P[torch.randperm(pairs, generator=rng)]
    first_P = torch.randint(2, (pairs,), generator=rng)
    kind_P = torch.rand(pairs, generator=rng)
    near_P = torch.randint(2, 4, (pairs,), generator=rng)
    group_P = torch.where(kind_P < SAME, 1 - first_P, torch.where(kind_P < SAME + NEAR, near_P, first_P))
    other_P = (style_P + torch.randint(1, k, (pairs,), generator=rng)) % k
    shown_P = torch.where(kind_P < SAME + NEAR, style_P, other_P)
    return first_P * k + style_P, group_P * k + shown_P


def held_out_agreement(folder: Path, size: int = HELD_OUT, *, disturbed: bool = False) -> Agreement:
    """Of the judge in `folder/judge` with pairs of unseen styles, on pictures as rendered or with artefacts."""
    pairs = StylePairs("held_out", size=size)
    if disturbed:
        pairs.disturb(load_vae(folder), seed=ANSWERS.seed)
    return agreement(_read(folder), (pairs[index] for index in range(len(pairs))))


def rank_correlation(folder: Path, n: int, seed: int = 51) -> float:
    """Spearman correlation of P(yes) and true similarity over held-out pairs: same, near, spoiled and other styles."""
    judge = _read(folder)
    a_N3HW, style, b_N3HW, shown = mixed_pairs(n, seed)
    said = []
    for a_3HW, b_3HW in zip(a_N3HW, b_N3HW, strict=True):
        parts = judge.question.put(b_3HW, Example(id="", style_refs=(a_3HW,)))
        assert parts is not None
        with torch.no_grad():
            said.append(float(judge(parts)[0]))
    return float(spearmanr(said, style_similarity(style, shown).diag().numpy()).statistic)


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save in half precision, and report agreement with held-out labels, also of what was not yet fitted."""
    vae, steps = load_vae(folder), [recipe.scaled(steps_factor) for recipe in STAGES]
    torch.manual_seed(EYES.seed)  # of the heads
    model, processor = tiny_llava(seed=EYES.seed)
    seeds = [EYES.seed * 1_000_003 + 20 * index for index in range(min(LESSONS, max(steps[:2])))]
    lessons = [rendered(EYES.batch, seed, vae, photos=i % 2 == 1) for i, seed in enumerate(seeds)]
    teach_eyes(model, lessons, steps[0])
    judge = LocalModel(model, processor, load_question(QUESTION), checkpointing=False)
    teach_comparing(judge, lessons, steps[1])
    del lessons
    place, number = folder / "judge", max(24, min(HELD_OUT, round(HELD_OUT * steps_factor)))
    save_model(model, processor, place)
    before = held_out_agreement(folder, number)

    pairs = StylePairs("train", size=min(PAIRS, steps[2] * ANSWERS.batch))
    pairs.disturb(vae, seed=ANSWERS.seed + 1)
    config = FitConfig(num_steps=steps[2], batch_size=ANSWERS.batch, lr=ANSWERS.lr, lora_rank=0, seed=ANSWERS.seed)
    fit(judge, (pairs[index] for index in range(len(pairs))), place, config)
    model, processor = load_model(str(place), torch.float32)
    save_model(model.half(), processor, place)
    plain, disturbed = held_out_agreement(folder, number), held_out_agreement(folder, number, disturbed=True)
    return {
        "balanced_accuracy_before_answers": before.balanced_accuracy,
        "balanced_accuracy": plain.balanced_accuracy,
        "balanced_accuracy_with_artefacts": disturbed.balanced_accuracy,
        "recall_of_same": plain.recalls["yes"],
        "recall_of_another": plain.recalls["no"],
        "rank_correlation": rank_correlation(folder, min(256, number)),
    }


def _read(folder: Path) -> LocalModel:
    model, processor = load_model(str(folder / "judge"), torch.float32)
    return LocalModel(model, processor, load_question(QUESTION), checkpointing=False)


def _style_code(style: Style) -> Tensor:
    """What can be read off a picture about its style: three colours, texture and outline, [N, 16], each about 1."""
    colours = [4 * oklab(colour) for colour in (style.background_N3, style.fill_NK3[:, 0], style.ink_N3)]
    texture = F.one_hot(style.texture_N, len(TEXTURES)) * style.amount_N[:, None]
    period = (style.period_N / 10).log() * (style.amount_N > 0)
    return torch.cat([*colours, texture, period[:, None], style.outline_N[:, None]], 1)
