"""What the USO policy knows about a batch, and how examples of equal layout are brought together.

Shape suffixes: B batch, N tokens of one reference, P packed channels, T text tokens, D text width, Q pooled width,
S style tokens, R reference tokens, H width of the DiT, V SigLIP tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewardgen.policies.packing import Grid
from rewardgen.transfer import to_device
from rewardgen.types import Condition


@dataclass(frozen=True, kw_only=True, slots=True)
class Reference:
    """A content reference: packed latents [N, P] and its token grid."""

    tokens_NP: Tensor
    grid: Grid


@dataclass(frozen=True, kw_only=True, slots=True)
class UsoCondition(Condition):
    """Encoded examples, one entry per example, on the CPU and without graph.

    Args:
        text_B: T5 states, each [T, D].
        pooled_B: CLIP pooled text, each [Q].
        references_B: content references of each example.
        styles_B: SigLIP levels of each example's style pictures, each [3, V, width].
    """

    text_B: tuple[Tensor, ...]
    pooled_B: tuple[Tensor, ...]
    references_B: tuple[tuple[Reference, ...], ...]
    styles_B: tuple[tuple[Tensor, ...], ...]

    def __len__(self) -> int:
        return len(self.text_B)


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Examples whose tokens have one layout and run through the DiT as one batch.

    Args:
        members: indices of the examples in the whole batch.
        grids: token grids of the references, in order.
    """

    members: tuple[int, ...]
    text_BTD: Tensor
    pooled_BQ: Tensor
    style_BSH: Tensor
    references_BRP: Tensor
    grids: tuple[Grid, ...]


def group_by_layout(
    condition: UsoCondition, styles_B: Sequence[Tensor], packed_channels: int, device: torch.device
) -> list[Group]:
    """Split a batch into groups of equal layout; no padding, so grouping changes no result.

    Args:
        styles_B: style tokens of each example, [S, H], where S may be 0.
        packed_channels: P, for examples without references.
    """
    members: dict[object, list[int]] = {}
    for index in range(len(condition)):
        grids = tuple(reference.grid for reference in condition.references_B[index])
        layout = (grids, styles_B[index].shape[0], condition.text_B[index].shape[0])
        members.setdefault(layout, []).append(index)
    nothing = torch.zeros(0, packed_channels)
    groups = []
    for indices in members.values():
        references = [
            torch.cat([nothing, *(reference.tokens_NP for reference in condition.references_B[index])])
            for index in indices
        ]
        groups.append(
            Group(
                members=tuple(indices),
                text_BTD=to_device(torch.stack([condition.text_B[index] for index in indices]), device),
                pooled_BQ=to_device(torch.stack([condition.pooled_B[index] for index in indices]), device),
                style_BSH=torch.stack([styles_B[index] for index in indices]),
                references_BRP=to_device(torch.stack(references), device),
                grids=tuple(reference.grid for reference in condition.references_B[indices[0]]),
            )
        )
    return groups
