"""ID-Sim and ID-Conf, the identity metrics of XVerseBench and UMO (arXiv 2509.06818), as pure functions.

Suffixes: M reference identities, N faces found in the picture. Similarities are cosines; ID-Conf also takes them x100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class IdentityReport:
    """Identity metrics of a set of pictures; None where there is nothing to average.

    Args:
        id_sim: mean over all references of their largest cosine x 100; a reference in a picture without a face
            counts as 0.
        id_conf: mean of the confidences of the references that have one, x 100.
        coverage: share of the references that have a confidence. ID-Conf without it can be bought by drawing one face.
        missing_faces: references more than faces, summed over the pictures.
        extra_faces: faces more than references, summed over the pictures.
        num_references: over all pictures.
        num_pictures: pictures with at least one reference; the others say nothing about identity.
    """

    id_sim: float | None
    id_conf: float | None
    coverage: float | None
    missing_faces: int
    extra_faces: int
    num_references: int
    num_pictures: int


def id_sim(similarity_MN: Tensor) -> Tensor:
    """ID-Sim of each reference, [M]: its largest cosine over the faces, x 100; 0 without a face."""
    if similarity_MN.shape[1] == 0:
        return similarity_MN.new_zeros(len(similarity_MN))
    return 100 * similarity_MN.amax(1)


def id_conf(similarity_MN: Tensor) -> list[float | None]:
    """Confidence of each reference in [0, 1]: `clip(1 - second / first, 0, 1)` over its two most similar faces.

    0 if the first is not positive. None if there are fewer than two faces: with one face there is nothing to confuse,
    and the official metric leaves such a reference out instead of counting it as 0.
    """
    if similarity_MN.shape[1] < 2:
        return [None] * len(similarity_MN)
    top_M2 = similarity_MN.detach().double().topk(2, dim=1).values
    return [min(max(1 - second / first, 0.0), 1.0) if first > 0 else 0.0 for first, second in top_M2.tolist()]


def identity_report(similarities: Sequence[Tensor]) -> IdentityReport:
    """Both metrics over a set of pictures, with what they leave out.

    Args:
        similarities: for each picture the cosines [M, N] of its references with the faces found in it.
    """
    judged = [similarity_MN.detach() for similarity_MN in similarities if len(similarity_MN)]
    sims = [value for similarity_MN in judged for value in id_sim(similarity_MN.double()).tolist()]
    confs = [value for similarity_MN in judged for value in id_conf(similarity_MN) if value is not None]
    surplus = [similarity_MN.shape[1] - similarity_MN.shape[0] for similarity_MN in judged]
    return IdentityReport(
        id_sim=sum(sims) / len(sims) if sims else None,
        id_conf=100 * sum(confs) / len(confs) if confs else None,
        coverage=len(confs) / len(sims) if sims else None,
        missing_faces=sum(max(-count, 0) for count in surplus),
        extra_faces=sum(max(count, 0) for count in surplus),
        num_references=len(sims),
        num_pictures=len(judged),
    )
