"""The tiny face detector: from group pictures and portraits with known faces, a part of them autoencoded.

N pictures, K faces of a picture at most, P cells, G outputs of a cell, 4 = (x1, y1, x2, y2), 52 = landmarks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from rewardgen.rewards.faces.centre_detector import (
    STRIDE,
    CentreDetector,
    cells,
    encode,
    load_centre_detector,
    save_centre_detector,
)
from rewardgen.world.faces import MAX_PEOPLE, draw_groups, portraits
from rewardgen.world.people import draw_people
from rewardgen.world.recipes import people_vae
from rewardgen.world.recipes.training import Recipe, fit

RECIPE = Recipe(name="detector", version="1", steps=900, batch=12, lr=2e-3, seed=702)
FILE = "people/detector.safetensors"
GROUPS, REBUILT = 600, 0.4
"""Pictures it learns from, and the share of them that goes through the autoencoder."""
_MIRRORED = [1, 0, 2, 4, 3]
_SPREAD = 1.2
"""Cells over which a middle fades out."""


@dataclass(frozen=True)
class Lesson:
    """Pictures with the faces in them; rows of NaN where a picture has fewer."""

    pixels_N3HW: Tensor
    boxes_NK4: Tensor
    landmarks_NK52: Tensor


def groups(n: int, seed: int, *, held_out: bool = False, least: int = 1) -> Lesson:
    """`n` pictures of one to six people (or of at least `least`)."""
    people = draw_people(MAX_PEOPLE * n, seed, "held_out" if held_out else "train")
    who_NK = torch.arange(MAX_PEOPLE * n).reshape(n, MAX_PEOPLE)
    count_N = torch.randint(least, MAX_PEOPLE + 1, (n,), generator=torch.Generator().manual_seed(seed + 5))
    who_NK = who_NK.masked_fill(torch.arange(MAX_PEOPLE) >= count_N[:, None], -1)
    pixels, known, _ = draw_groups(people, who_NK, seed + 6)
    absent = who_NK < 0
    boxes_NK4 = known.boxes_NK4.masked_fill(absent[..., None], torch.nan)
    return Lesson(pixels, boxes_NK4, known.landmarks_NK52.masked_fill(absent[..., None, None], torch.nan))


def alone(n: int, seed: int, *, held_out: bool = False) -> Lesson:
    """`n` portraits."""
    people = draw_people(n, seed, "held_out" if held_out else "train")
    pixels, boxes_N4, landmarks_N52 = portraits(people, seed + 6)
    return Lesson(pixels, boxes_N4[:, None], landmarks_N52[:, None])


def rebuilt(lesson: Lesson, vae: AutoencoderKL, share: float) -> Lesson:
    """The same with the first `share` of the pictures encoded and decoded."""
    count = round(share * len(lesson.pixels_N3HW))
    through = people_vae.rebuild(vae, lesson.pixels_N3HW[:count]) if count else lesson.pixels_N3HW[:0]
    pixels = torch.cat([through, lesson.pixels_N3HW[count:]])
    return Lesson(pixels, lesson.boxes_NK4, lesson.landmarks_NK52)


def drawn(lesson: Lesson, n: int, rng: torch.Generator) -> Lesson:
    """`n` of the pictures, half of them mirrored, in other colours, blurred a little, with noise."""
    index = torch.randint(len(lesson.pixels_N3HW), (n,), generator=rng)
    pixels, boxes, landmarks = lesson.pixels_N3HW[index], lesson.boxes_NK4[index], lesson.landmarks_NK52[index]
    last = pixels.shape[-1] - 1
    flip = torch.rand(n, generator=rng) < 0.5
    pixels = torch.where(flip[:, None, None, None], pixels.flip(3), pixels)
    turned = torch.stack([last - boxes[..., 2], boxes[..., 1], last - boxes[..., 0], boxes[..., 3]], -1)
    boxes = torch.where(flip[:, None, None], turned, boxes)
    swapped = landmarks[:, :, _MIRRORED] * torch.tensor([-1.0, 1.0]) + torch.tensor([float(last), 0.0])
    landmarks = torch.where(flip[:, None, None, None], swapped, landmarks)
    gain = 1 + 0.15 * torch.randn(n, 3, 1, 1, generator=rng)
    blur = torch.rand(n, 1, 1, 1, generator=rng) * (torch.rand(n, 1, 1, 1, generator=rng) < 0.4)
    pixels = torch.lerp(pixels * gain, F.avg_pool2d(F.pad(pixels * gain, (1, 1, 1, 1), mode="replicate"), 3, 1), blur)
    noise = 0.06 * torch.rand(n, 1, 1, 1, generator=rng) * torch.randn(pixels.shape, generator=rng)
    return Lesson((pixels + noise).clamp(0, 1), boxes, landmarks)


def detection_loss(model: CentreDetector, lesson: Lesson) -> Tensor:
    """Focal loss of the scores, and L1 of boxes and landmarks where a face's middle is or beside it."""
    outputs_NGYX = model(lesson.pixels_N3HW)
    rows, columns = outputs_NGYX.shape[2:]
    middle_P2 = cells(rows, columns)
    boxes_NK4 = lesson.boxes_NK4
    centre_NK2 = (boxes_NK4[..., :2] + boxes_NK4[..., 2:]) / 2
    nearest_NK2 = STRIDE * (centre_NK2 / STRIDE).round()
    far_NKP = ((nearest_NK2[:, :, None] - middle_P2) / STRIDE).square().sum(-1)
    far_NKP = far_NKP.nan_to_num(nan=1e9)
    heat_NP = torch.exp(-far_NKP.amin(1) / (2 * _SPREAD**2))
    logit_NP = outputs_NGYX[:, 0].flatten(1)
    present, chance = heat_NP > 0.99, logit_NP.sigmoid()
    hit = (1 - chance).square() * F.logsigmoid(logit_NP) * present
    miss = (1 - heat_NP) ** 4 * chance.square() * F.logsigmoid(-logit_NP) * ~present
    focal = -(hit + miss).sum() / present.sum().clamp(min=1)
    n, k, p = (far_NKP < 2.5).nonzero(as_tuple=True)
    wanted = encode(boxes_NK4[n, k], lesson.landmarks_NK52[n, k], middle_P2[p])
    found = outputs_NGYX.flatten(2).mT[n, p, 1:]
    value: Tensor = focal + 4 * (found - wanted).abs().mean()
    return value


def train(model: CentreDetector, lessons: Sequence[Lesson], steps: int, batch: int = RECIPE.batch) -> list[float]:
    """In place; returns the losses, summed over one batch of each lesson."""

    def loss(step: int) -> Tensor:
        rng = torch.Generator().manual_seed(RECIPE.seed * 1_000_003 + step)
        return torch.stack([detection_loss(model, drawn(lesson, batch, rng)) for lesson in lessons]).sum()

    model.train()
    losses = fit(model, loss, RECIPE, steps)
    model.eval()
    return losses


def recall(model: CentreDetector, lesson: Lesson) -> dict[str, float]:
    """Share of the faces that were found (`recall`), share of what was found that is one (`precision`), and the mean
    distance of their landmarks in pixels. A face is found by the box with the largest overlap, at least a half."""
    with torch.no_grad():
        found = model.detect(lesson.pixels_N3HW, [None] * len(lesson.pixels_N3HW))
    hits = total = guesses = 0
    error = 0.0
    for faces, boxes_K4, landmarks_K52 in zip(found, lesson.boxes_NK4, lesson.landmarks_NK52, strict=True):
        present = ~boxes_K4.isnan().any(1)
        overlap_MN = overlaps(boxes_K4[present], faces.boxes_N4)
        total, guesses = total + int(present.sum()), guesses + len(faces)
        if overlap_MN.numel():
            best = overlap_MN.max(1)
            good = best.values > 0.5
            hits += int(good.sum())
            apart = (faces.landmarks_N52[best.indices] - landmarks_K52[present]).norm(dim=-1).mean(1)
            error += float(apart[good].sum())
    return {
        "recall": hits / max(total, 1),
        "precision": hits / max(guesses, 1),
        "landmark_error_px": error / max(hits, 1),
    }


def overlaps(boxes_M4: Tensor, boxes_N4: Tensor) -> Tensor:
    """Intersection over union, [M, N]."""
    low = torch.maximum(boxes_M4[:, None, :2], boxes_N4[None, :, :2])
    high = torch.minimum(boxes_M4[:, None, 2:], boxes_N4[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area_M, area_N = ((boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (boxes_M4, boxes_N4))
    return common / (area_M[:, None] + area_N[None] - common)


def load(folder: Path) -> CentreDetector:
    return load_centre_detector(folder / FILE)


def build(folder: Path, steps_factor: float) -> dict[str, float]:
    """Train, save, and report on autoencoded groups of six held-out people and on their portraits."""
    vae, few = people_vae.load(folder), min(1.0, steps_factor)
    lessons = [rebuilt(make(max(12, round(GROUPS * few)), RECIPE.seed), vae, REBUILT) for make in (groups, alone)]
    torch.manual_seed(RECIPE.seed)
    model = CentreDetector()
    train(model, lessons, RECIPE.scaled(steps_factor))
    save_centre_detector(model, folder / FILE)
    model = load(folder)
    crowd = recall(model, rebuilt(groups(32, 31, held_out=True, least=MAX_PEOPLE), vae, 1.0))
    single = recall(model, alone(128, 32, held_out=True))
    return {f"groups_{name}": value for name, value in crowd.items()} | {
        f"portraits_{name}": value for name, value in single.items()
    }
