"""Which face is whose: the one-to-one assignment with the largest total similarity.

Suffixes: B pictures, M reference faces, N faces of the picture.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def assign(similarity_MN: Tensor) -> Tensor:
    """The one-to-one assignment of rows to columns with the largest total similarity.

    Returns:
        bool [M, N] with min(M, N) entries True, at most one in each row and column. Nothing is assigned if any
        similarity is not finite.
    """
    matched_MN = torch.zeros(similarity_MN.shape, dtype=torch.bool)
    similarity = similarity_MN.detach().cpu().double().numpy()
    if torch.from_numpy(similarity).isfinite().all():
        rows, columns = linear_sum_assignment(similarity, maximize=True)
        matched_MN[rows, columns] = True
    return matched_MN.to(similarity_MN.device)


def assign_batch(similarity_BMN: Tensor, present_BMN: Tensor) -> Tensor:
    """`assign` for each picture's own rows and columns: bool [B, M, N], False where `present_BMN` is."""
    # One copy to the CPU for the batch, where scipy works.
    similarity, present = similarity_BMN.detach().cpu(), present_BMN.cpu()
    matched_BMN = torch.zeros_like(present)
    for similarity_MN, present_MN, matched_MN in zip(similarity, present, matched_BMN, strict=True):
        m, n = int(present_MN.any(1).sum()), int(present_MN.any(0).sum())
        matched_MN[:m, :n] = assign(similarity_MN[:m, :n])
    return matched_BMN.to(similarity_BMN.device)
