"""CLIP-T and CLIP-I: does the picture show what the prompt says, or what the reference shows?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from rewardgen.reward import Reward
from rewardgen.rewards.clip_encoder import ClipEncoder
from rewardgen.rewards.picture_encoder import References
from rewardgen.types import Example, Score


class ClipReward(Reward):
    """Cosine of CLIP embeddings, in [-1, 1]: of picture and prompt (CLIP-T, about 0.3) or of two pictures (CLIP-I).

    With several references it is the mean of the cosines. Valid where there is a prompt, or a reference. Benchmarks of
    subject-driven generation (DreamBench, and USO's and UNO's tables) use `openai/clip-vit-base-patch32`. Prompts
    are cut at 77 tokens.

    Args:
        encoder: both towers.
        against: what the picture is compared with: `prompt`, or pictures of the example.
    """

    differentiable = True

    def __init__(self, encoder: ClipEncoder, *, against: Literal["prompt"] | References = "prompt") -> None:
        super().__init__()
        self.encoder = encoder
        self.against = against

    @classmethod
    def from_pretrained(cls, model: str, *, against: Literal["prompt"] | References = "prompt") -> ClipReward:
        """Read a CLIP folder or hub repository (`ClipEncoder.from_pretrained`)."""
        return cls(ClipEncoder.from_pretrained(model), against=against)

    @classmethod
    def blueprint(cls, model: str, *, against: Literal["prompt"] | References = "prompt") -> ClipReward:
        """A reward of the right sizes whose weights mean nothing; nothing is fetched.

        Raises:
            CheckpointError: the model's sizes are not known.
        """
        return cls(ClipEncoder.blueprint(model), against=against)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        if self.against == "prompt":
            return self.encoder.compare_prompt(pixels_B3HW, examples)
        return self.encoder.pictures.compare(pixels_B3HW, examples, self.against)
