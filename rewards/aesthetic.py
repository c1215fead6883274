"""Aesthetic Predictor v2.5 (github.com/discus0434/aesthetic-predictor-v2-5): is the picture pleasing?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rewardgen.reward import Reward
from rewardgen.rewards.heads import linear_head
from rewardgen.rewards.image_processor import load_image_processor
from rewardgen.rewards.loading import load_model, read_tensors
from rewardgen.rewards.picture_encoder import PictureEncoder
from rewardgen.rewards.sizes import config_of, processor_of
from rewardgen.rewards.sizes import head as released_head
from rewardgen.types import Example, Score


class AestheticReward(Reward):
    """Predicted rating, 1 to 10 (5.5 and above is good, the authors say); applies to every example.

    A few linear layers on the unit-length pooled feature of SigLIP so400m-patch14-384.

    Args:
        encoder: SigLIP's vision tower, to its pooled feature.
        head: unit-length features [B, D] to ratings [B, 1].
    """

    differentiable = True

    def __init__(self, encoder: PictureEncoder, head: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, head: str, *, model: str) -> AestheticReward:
        """Read the released head and the SigLIP it stands on.

        Args:
            head: the repository's `models/aesthetic_predictor_v2_5.pth`, or its tensors as safetensors.
            model: folder or hub repository of SigLIP with `preprocessor_config.json`:
                `google/siglip-so400m-patch14-384`.
        """
        from transformers import SiglipVisionModel

        tensors, _ = read_tensors("aesthetic head", head)
        siglip = load_model(SiglipVisionModel, model)
        layers = linear_head(f"aesthetic head {head}", tensors, "scoring_head.", int(siglip.config.hidden_size))
        return cls(PictureEncoder(Pooled(siglip), load_image_processor(model)), layers)

    @classmethod
    def blueprint(cls, head: str, *, model: str) -> AestheticReward:
        """A reward of the right sizes whose weights mean nothing; nothing is fetched.

        Raises:
            CheckpointError: the model's sizes are not known.
        """
        from transformers import SiglipVisionModel

        config = config_of(model)
        vision = getattr(config, "vision_config", config)
        encoder = PictureEncoder(Pooled(SiglipVisionModel(vision)), processor_of(model, vision))
        return cls(encoder, released_head(int(vision.hidden_size)))

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        feature_BD = self.encoder.embed(pixels_B3HW)
        like = next(self.head.parameters())
        with torch.autocast(feature_BD.device.type, enabled=False):
            value_B = self.head(feature_BD.to(like.dtype))[:, 0]
        return Score(value_B=value_B, valid_B=torch.ones_like(value_B, dtype=torch.bool))


class Pooled(nn.Module):
    """Pixel values [B, 3, h, w] to the pooled feature [B, D] of a vision model of transformers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor) -> Tensor:
        feature_BD: Tensor = self.model(images_B3HW).pooler_output
        return feature_BD
