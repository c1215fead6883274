"""Frozen networks that say what a picture shows, and the cosine of a picture with its references.

Suffixes: B pictures, D length of an embedding, H and W sides of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.rewards.cache import TensorCache, digest
from rewardgen.transfer import to_device
from rewardgen.types import Example, Score

References: TypeAlias = Literal["content", "style", "identity", "target"]
"""Which pictures of an example a drawn one is compared with."""


class PictureEncoder(nn.Module):
    """A network and how its pictures are prepared; both frozen, in evaluation mode.

    Args:
        network: prepared pictures to features [B, D].
        processor: pictures [B, 3, H, W] in [0, 1] to what the network reads, differentiable.
    """

    def __init__(self, network: nn.Module, processor: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.processor = processor
        self._cache = TensorCache()
        self.requires_grad_(False).eval()

    def features(self, pixels_B3HW: Tensor) -> Tensor:
        """Features [B, D] in float32 or better, with gradient in the pixels, of pictures of any one size."""
        like = next(self.network.parameters())
        # A reward differs between pictures in its third digit; autocast's bfloat16 would drown that.
        with torch.autocast(like.device.type, enabled=False):
            found_BD: Tensor = self.network(self.processor(to_device(pixels_B3HW, like.device)).to(like.dtype))
        return found_BD.to(torch.promote_types(found_BD.dtype, torch.float32))

    def embed(self, pixels_B3HW: Tensor) -> Tensor:
        """Features of unit length [B, D]."""
        return F.normalize(self.features(pixels_B3HW), dim=-1)

    def reference(self, pixels_3HW: Tensor) -> Tensor:
        """The embedding [D] of one picture, without gradient; computed once for each content."""
        like = next(self.network.parameters())
        # One at a time: an embedding must not depend, in its last bits, on what else was new in this batch.
        return self._cache.get(
            (digest(pixels_3HW), like.dtype, like.device), lambda: self.embed(pixels_3HW.detach()[None])[0]
        )

    def compare(self, pixels_B3HW: Tensor, examples: Sequence[Example], against: References) -> Score:
        """Cosine of each picture with its references, the mean over several; without any it is not valid."""
        drawn_BD = self.embed(pixels_B3HW)
        references = [references_of(example, against) for example in examples]
        # The mean of cosines is the cosine with the mean: the embeddings have unit length.
        wanted_BD = torch.stack(
            [
                torch.stack([self.reference(picture) for picture in pictures]).mean(0)
                if pictures
                else torch.zeros_like(drawn_BD[0])
                for pictures in references
            ]
        )
        valid_B = to_device(torch.tensor([bool(pictures) for pictures in references]), drawn_BD.device)
        return Score(value_B=(drawn_BD * wanted_BD).sum(-1), valid_B=valid_B)


def references_of(example: Example, against: References) -> tuple[Tensor, ...]:
    """The pictures [3, H, W] that an example is compared with, maybe none."""
    if against == "target":
        return () if example.target is None else (example.target,)
    by_name = {"content": example.content_refs, "style": example.style_refs, "identity": example.identity_refs}
    return by_name[against]
