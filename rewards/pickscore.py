"""PickScore (Kirstain et al., arXiv 2305.01569): which of two pictures would a user of text-to-image pick?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from rewardgen.reward import Reward
from rewardgen.rewards.clip_encoder import ClipEncoder
from rewardgen.types import Example, Score


class PickScoreReward(Reward):
    """The release's score, `exp(logit_scale) * cos(picture, prompt)`: about 17 to 24, in [-100, 100].

    The difference of two pictures' scores is the log-odds of the first being preferred. Valid where there is a prompt.

    Args:
        encoder: CLIP ViT-H/14, fine-tuned on preferences.
    """

    differentiable = True

    def __init__(self, encoder: ClipEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    @classmethod
    def from_pretrained(cls, model: str, *, processor: str | None = None) -> PickScoreReward:
        """Read the folder or hub repository of the release.

        Args:
            model: `yuvalkirstain/PickScore_v1` or a copy.
            processor: where tokenizer and `preprocessor_config.json` are, if not beside the model; the authors take
                those of `laion/CLIP-ViT-H-14-laion2B-s32B-b79K`.
        """
        return cls(ClipEncoder.from_pretrained(model, processor))

    @classmethod
    def blueprint(cls, model: str, *, processor: str | None = None) -> PickScoreReward:
        """A reward of the right sizes whose weights mean nothing; nothing is fetched.

        Raises:
            CheckpointError: the model's sizes are not known.
        """
        return cls(ClipEncoder.blueprint(model))

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        cosine = self.encoder.compare_prompt(pixels_B3HW, examples)
        return replace(cosine, value_B=self.encoder.temperature * cosine.value_B)
