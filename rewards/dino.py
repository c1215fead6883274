"""DINO (arXiv 2104.14294) and DINOv2 (arXiv 2304.07193): is it the same thing, not merely the same kind of thing?"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.reward import Reward
from rewardgen.rewards.image_processor import load_image_processor
from rewardgen.rewards.loading import load_model, load_pretrained
from rewardgen.rewards.picture_encoder import PictureEncoder, References
from rewardgen.rewards.sizes import config_of, processor_of
from rewardgen.types import Example, Score

_OPTIONS: dict[str, dict[str, bool]] = {"vit": {"add_pooling_layer": False}, "dinov2": {}, "dinov2_with_registers": {}}
"""Kinds of models by `model_type`. DINO's release has no pooling layer; transformers would add a random one."""


class DinoReward(Reward):
    """Cosine of the class tokens (after the last layer norm) of the picture and of a reference, in [-1, 1].

    With several references it is the mean of the cosines. Valid where there is a reference. DreamBench and USO's and
    UNO's tables use DINO ViT-S/16, `facebook/dino-vits16`; DINOv2 is `facebook/dinov2-base` and its kin, also those
    with registers.

    Deviation: pictures are prepared as the model's `preprocessor_config.json` says. For `facebook/dino-vits16` that
    is a resize to 224x224; DreamBooth's own script resized the short side to 256 and cut the centre. A copy of the
    folder with another `preprocessor_config.json` does that.

    Args:
        encoder: the network.
        against: which pictures of the example are the references.
    """

    differentiable = True

    def __init__(self, encoder: PictureEncoder, *, against: References = "content") -> None:
        super().__init__()
        self.encoder = encoder
        self.against = against

    @classmethod
    def from_pretrained(cls, model: str, *, against: References = "content") -> DinoReward:
        """Read a DINO or DINOv2 folder or hub repository with `preprocessor_config.json`.

        Raises:
            CheckpointError: it is missing, incomplete or another kind of model.
        """
        from transformers import AutoConfig, AutoModel

        kind = load_pretrained(AutoConfig, model).model_type
        network = ClassToken(load_model(AutoModel, model, **_options(model, kind)))
        return cls(PictureEncoder(network, load_image_processor(model)), against=against)

    @classmethod
    def blueprint(cls, model: str, *, against: References = "content") -> DinoReward:
        """A reward of the right sizes whose weights mean nothing (`sizes.config_of`); nothing is fetched.

        Raises:
            CheckpointError: the model's sizes are not known, or it is another kind of model.
        """
        from transformers import AutoModel

        config = config_of(model)
        network = ClassToken(AutoModel.from_config(config, **_options(model, config.model_type)))
        return cls(PictureEncoder(network, processor_of(model, config)), against=against)

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        return self.encoder.compare(pixels_B3HW, examples, self.against)


def _options(model: str, kind: str) -> dict[str, bool]:
    if kind not in _OPTIONS:
        raise CheckpointError(f"{model} is a '{kind}'; DINO is a 'vit', DINOv2 a 'dinov2' or 'dinov2_with_registers'")
    return _OPTIONS[kind]


class ClassToken(nn.Module):
    """Pixel values [B, 3, h, w] to the class token [B, D] that a vision transformer of transformers ends with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images_B3HW: Tensor) -> Tensor:
        token_BD: Tensor = self.model(images_B3HW).last_hidden_state[:, 0]
        return token_BD
