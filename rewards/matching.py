"""MIMR, the multi-identity matching reward of UMO (arXiv 2509.06818): is everybody there, and nobody confused?

Suffixes: B pictures, M reference faces, N faces of the picture, D length of an embedding, W windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rewardgen.errors import ConfigError
from rewardgen.reward import Reward
from rewardgen.rewards.faces.align import crop_boxes
from rewardgen.rewards.faces.assignment import assign as assign
from rewardgen.rewards.faces.assignment import assign_batch as assign_batch
from rewardgen.rewards.faces.detector import Faces
from rewardgen.rewards.faces.encoder import FaceEncoder
from rewardgen.rewards.faces.explain import face_matches
from rewardgen.rewards.faces.onnx_detectors import check_confidence
from rewardgen.rewards.faces.windows import untouched, window_transforms, windows
from rewardgen.types import Example, FaceMatches, Score

Normalise = Literal["pairs", "matches", "each"]
Negatives = Literal["all", "hardest"]


def matching_value(
    similarity_BMN: Tensor,
    matched_BMN: Tensor,
    present_BMN: Tensor,
    *,
    normalise: Normalise = "pairs",
    negatives: Negatives = "all",
    floor: float | None = None,
) -> Tensor:
    """MIMR of each picture, [B]: `1/(MN) * sum_ij s_ij cos_ij`, s = 1 for matched pairs and -1 for all others.

    Args:
        similarity_BMN: cosines; the only argument that carries a gradient.
        matched_BMN: bool, the pairs that belong together, chosen without gradient.
        present_BMN: bool, the pairs that exist: references and faces are padded to the largest picture of the batch.
        normalise: `pairs` divides by MN, as the official code does; perfect matches of people with nothing in common
            are then worth 1 / max(M, N). `matches` divides by min(M, N), which makes them worth 1 for any number; but
            with n people there are n - 1 times as many other pairs as matches, and the push apart outweighs the pull.
            `each` divides matched pairs by their number and the others by theirs: pull and push weigh the same.
        negatives: which other pairs count against it: `all`, as officially, or of each reference only the `hardest`,
            the face most like it among those that are not its own. Who is confused is settled there; the mean of all
            hardly moves it.
        floor: cosines of unmatched pairs below it count as `floor` and carry no gradient. Without it, as officially,
            two different people are pushed on towards a cosine of -1, which no two faces have.

    Returns:
        0, with a gradient of 0, where a picture has no pair.
    """
    others_BMN = present_BMN & ~matched_BMN
    if negatives == "hardest":
        others_BMN = _hardest(similarity_BMN, others_BMN)
    apart_BMN = similarity_BMN if floor is None else similarity_BMN.clamp(min=floor)
    if normalise == "each":
        return _mean(similarity_BMN, matched_BMN) - _mean(apart_BMN, others_BMN)
    counted_BMN = present_BMN if normalise == "pairs" else matched_BMN
    total_B = _sum(similarity_BMN, matched_BMN) - _sum(apart_BMN, others_BMN)
    return total_B / counted_BMN.sum((1, 2)).clamp(min=1)


def _hardest(similarity_BMN: Tensor, others_BMN: Tensor) -> Tensor:
    """Bool [B, M, N]: of each reference the largest cosine among its others, where it has any."""
    if not similarity_BMN.shape[2]:
        return others_BMN
    largest_BM1 = similarity_BMN.detach().masked_fill(~others_BMN, -torch.inf).argmax(2, keepdim=True)
    return torch.zeros_like(others_BMN).scatter(2, largest_BM1, True) & others_BMN


def _sum(values_BMN: Tensor, chosen_BMN: Tensor) -> Tensor:
    """[B], over the chosen. Chosen, not multiplied by 0: padding must stay out even where an embedding is NaN."""
    return torch.where(chosen_BMN, values_BMN, 0).sum((1, 2))


def _mean(values_BMN: Tensor, chosen_BMN: Tensor) -> Tensor:
    """[B], over the chosen; 0 where none is."""
    return _sum(values_BMN, chosen_BMN) / chosen_BMN.sum((1, 2)).clamp(min=1)


class MatchingReward(Reward):
    """Multi-Identity Matching Reward: each reference is matched to one face; matched cosines count for it, all other
    pairs against it (`matching_value`). In [-1, 1] with the defaults.

    The matching maximises the total cosine (Hungarian algorithm) on detached cosines; the gradient reaches the pixels
    through the cosines alone, not through the matching or the places of the faces. References carry no gradient and
    are embedded once each. The defaults are the arithmetic of the released code, with one deviation: there, a picture
    or reference without a face scores 0 and is averaged in; here it is not valid.

    An example is valid if it has an identity reference, each of them shows a face, and the picture shows one (or
    `miss` is on). `counts` are over the batch: `faces`, `missing_faces` (references without a partner),
    `extra_faces` (faces without one), pictures with `no_face`, examples with an `unreadable_reference`.

    **The miss term** costs each reference without a partner `miss * (1 - c) / M`. A count alone would have no gradient,
    for there is no face whose pixels could be changed, so `c` is the fallback that needs no detector: the cosine of
    the reference with the window of the picture most like it (`faces.windows`: squares of three sizes all over the
    picture, given to the face network whole). Windows that touch the crop of a face that was found are left out, lest
    its owner be turned into the one who is missing, and two missing references get two windows. Windows are compared
    without gradient; the chosen one is embedded again with it. `c = 0` where no window is left. Whether it makes real
    faces appear in real pictures has not been tried.

    **The extra term** costs each face without a partner `extra / M`. It is a count: it changes the value (for
    evaluation, filtering and policy gradients), not the gradient in the pixels.

    Args:
        faces: detector and face network.
        normalise: see `matching_value`.
        negatives: see `matching_value`.
        floor: see `matching_value`; in [-1, 1].
        miss: weight of the miss term, 0 (off) or more.
        extra: weight of the extra term, 0 (off) or more.
        references: `all_faces` takes each face of each identity reference as a person, as the released code does with
            its one group photograph; `one_each` takes the largest face of each, for a list of portraits.

    Raises:
        ConfigError: a weight is negative or the floor is no cosine.
    """

    differentiable = True

    def __init__(
        self,
        faces: FaceEncoder,
        *,
        normalise: Normalise = "pairs",
        negatives: Negatives = "all",
        floor: float | None = None,
        miss: float = 0.0,
        extra: float = 0.0,
        references: Literal["all_faces", "one_each"] = "all_faces",
    ) -> None:
        super().__init__()
        _check_options(floor, miss, extra)
        self.faces = faces
        self.normalise: Normalise = normalise
        self.negatives: Negatives = negatives
        self.floor, self.miss, self.extra, self.references = floor, miss, extra, references

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        *,
        detector: str = "given",
        confidence: float | None = None,
        normalise: Normalise = "pairs",
        negatives: Negatives = "all",
        floor: float | None = None,
        miss: float = 0.0,
        extra: float = 0.0,
        references: Literal["all_faces", "one_each"] = "all_faces",
    ) -> MatchingReward:
        """Read an IResNet (`load_iresnet`) and open a detector (`open_detector`); the rest as for the class."""
        _check_options(floor, miss, extra)  # before anything is read
        faces = FaceEncoder.from_pretrained(checkpoint, detector, confidence)
        return cls(
            faces, normalise=normalise, negatives=negatives, floor=floor, miss=miss, extra=extra, references=references
        )

    @classmethod
    def check_arguments(
        cls, *, detector: str, confidence: float | None, floor: float | None, miss: float, extra: float, **_: Any
    ) -> None:
        """Refuse values of `from_pretrained`, with nothing read. Raises ConfigError as it does."""
        check_confidence(detector, confidence)
        _check_options(floor, miss, extra)

    def explain(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> list[FaceMatches]:
        """Who was matched to whom in each picture, without gradient."""
        return face_matches(self.faces, pixels_B3HW, examples, one_each=self.references == "one_each")

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        seen = self.faces.compare(pixels_B3HW, examples, one_each=self.references == "one_each")
        num_wanted, num_drawn = [[len(people) for people in side] for side in (seen.wanted, seen.drawn)]
        similarity_BMN = pad_sequence(seen.wanted, batch_first=True) @ pad_sequence(seen.drawn, batch_first=True).mT
        present_BMN = _present(num_wanted, num_drawn).to(similarity_BMN.device)
        matched_BMN = assign_batch(similarity_BMN, present_BMN)
        value_B = matching_value(
            similarity_BMN,
            matched_BMN,
            present_BMN,
            normalise=self.normalise,
            negatives=self.negatives,
            floor=self.floor,
        )

        num_matched = matched_BMN.sum((1, 2)).tolist()
        extra = [n - k if m else 0 for m, n, k in zip(num_wanted, num_drawn, num_matched, strict=True)]
        per_person_B = value_B.new_tensor([1 / max(m, 1) for m in num_wanted])
        if self.miss:
            alone = [
                people[~matched_MN[: len(people)].any(1)]
                for people, matched_MN in zip(seen.wanted, matched_BMN, strict=True)
            ]
            cost_B = missing_cost(self.faces, pixels_B3HW, seen.found, alone).to(value_B)
            value_B = value_B - self.miss * per_person_B * cost_B
        value_B = value_B - self.extra * per_person_B * value_B.new_tensor(extra)

        applies = [m > 0 and (n > 0 or self.miss > 0) for m, n in zip(num_wanted, num_drawn, strict=True)]
        valid_B = torch.tensor(applies, device=value_B.device) & value_B.detach().isfinite()
        counts = seen.counts() | {
            "missing_faces": float(sum(num_wanted) - sum(num_matched)),
            "extra_faces": float(sum(extra)),
        }
        return Score(value_B=value_B, valid_B=valid_B, counts=counts)


def missing_cost(
    encoder: FaceEncoder, pixels_B3HW: Tensor, found: Sequence[Faces], missing: Sequence[Tensor]
) -> Tensor:
    """`sum (1 - c)` over the missing people of each picture, [B], with a gradient without any detector.

    Args:
        encoder: embeds windows as if they were faces.
        pixels_B3HW: RGB in [0, 1].
        found: the faces of each picture; windows that touch the crop of one are not looked at.
        missing: embeddings [M, D] of the people without a face, for each picture; M may be 0.
    """
    counts_B = pixels_B3HW.new_tensor([len(people_MD) for people_MD in missing])
    if not any(map(len, missing)):
        return counts_B
    size = encoder.crop_size
    everywhere_W4 = windows(*pixels_B3HW.shape[2:])
    free = [
        everywhere_W4[untouched(everywhere_W4, crop_boxes(encoder.align(faces), size))]
        if len(people_MD)
        else everywhere_W4[:0]
        for faces, people_MD in zip(found, missing, strict=True)
    ]
    with torch.no_grad():
        views = encoder.embed(pixels_B3HW, [window_transforms(boxes_W4, size) for boxes_W4 in free])
    pairs = [
        assign(people_MD @ view_WD.T).nonzero(as_tuple=True) for people_MD, view_WD in zip(missing, views, strict=True)
    ]
    looked = encoder.embed(
        pixels_B3HW,
        [window_transforms(boxes_W4[w.cpu()], size) for boxes_W4, (_, w) in zip(free, pairs, strict=True)],
    )
    cosine_B = torch.stack(
        [(people_MD[m] * view_MD).sum() for people_MD, (m, _), view_MD in zip(missing, pairs, looked, strict=True)]
    )
    return counts_B.to(cosine_B) - cosine_B


def _check_options(floor: float | None, miss: float, extra: float) -> None:
    for name, weight in (("miss", miss), ("extra", extra)):
        if weight < 0:
            raise ConfigError(f"{name}: {weight:g} is a cost that cannot be negative; 0 turns it off")
    if floor is not None and not -1 <= floor <= 1:
        raise ConfigError(f"floor: {floor:g} is no cosine; it lies in [-1, 1]")


def _present(num_wanted: Sequence[int], num_drawn: Sequence[int]) -> Tensor:
    """Bool [B, M, N]: the pairs that exist in a batch padded to the most references and the most faces."""
    rows_BM, columns_BN = (
        torch.arange(max(counts, default=0))[None] < torch.tensor(counts)[:, None] for counts in (num_wanted, num_drawn)
    )
    return rows_BM[:, :, None] & columns_BN[:, None, :]
