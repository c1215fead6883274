"""CLIP (Radford et al., arXiv 2103.00020) of transformers: pictures and texts into one space.

`clip`, `pickscore` and `hpsv2` are three sets of weights of it. Suffixes: B pictures, D length of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rewardgen.errors import CheckpointError
from rewardgen.rewards.cache import TensorCache
from rewardgen.rewards.image_processor import load_image_processor
from rewardgen.rewards.loading import load_model, load_pretrained
from rewardgen.rewards.picture_encoder import PictureEncoder
from rewardgen.rewards.sizes import BlankTokenizer, config_of, processor_of
from rewardgen.transfer import to_device
from rewardgen.types import Example, Score

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase


class ClipEncoder(nn.Module):
    """Both towers of a CLIP model, frozen; each text is encoded once.

    Args:
        model: transformers' CLIP; taken apart here.
        tokenizer: of its texts; longer ones are cut to the positions that the model has (77).
        processor: pictures [B, 3, H, W] in [0, 1] to pixel values, differentiable.
    """

    def __init__(
        self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase, processor: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.pictures = PictureEncoder(_Projected(model.vision_model, model.visual_projection), processor)
        self.texts = _Projected(model.text_model, model.text_projection)
        self.tokenizer = tokenizer
        self.register_buffer("logit_scale", model.logit_scale.detach().clone())
        self._max_tokens = int(model.config.text_config.max_position_embeddings)
        self._cache = TensorCache()
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, model: str, processor: str | None = None) -> ClipEncoder:
        """Read a folder or hub repository with model, tokenizer and `preprocessor_config.json`.

        Args:
            model: where the weights and `config.json` are.
            processor: where tokenizer and `preprocessor_config.json` are, if not there.

        Raises:
            CheckpointError: something of it is missing or unreadable.
        """
        from transformers import AutoTokenizer, CLIPModel

        place = model if processor is None else processor
        return cls(load_model(CLIPModel, model), load_pretrained(AutoTokenizer, place), load_image_processor(place))

    @classmethod
    def blueprint(cls, model: str) -> ClipEncoder:
        """Of the right sizes, with weights that mean nothing. Raises CheckpointError where they are not known."""
        from transformers import CLIPModel

        config = config_of(model)
        if config.model_type != "clip":
            raise CheckpointError(f"{model} is a '{config.model_type}', not a 'clip'")
        return cls(CLIPModel(config), cast(Any, BlankTokenizer()), processor_of(model, config.vision_config))

    @property
    def temperature(self) -> Tensor:
        """What CLIP multiplies cosines with, about 100 in the releases; a scalar on the model's device."""
        return self.get_buffer("logit_scale").exp()

    def embed_text(self, text: str) -> Tensor:
        """The embedding [D] of a text, of unit length, without gradient; computed once for each text."""
        like = next(self.texts.parameters())

        def encode() -> Tensor:
            tokens = self.tokenizer(text, truncation=True, max_length=self._max_tokens, return_tensors="pt")
            with torch.autocast(like.device.type, enabled=False):
                found_1D: Tensor = self.texts(to_device(tokens["input_ids"], like.device))
            return F.normalize(found_1D[0].float(), dim=-1)

        return self._cache.get((text, like.dtype, like.device), encode)

    def compare_prompt(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        """Cosine of each picture with its prompt, in [-1, 1]; without a prompt it is not valid."""
        drawn_BD = self.pictures.embed(pixels_B3HW)
        nothing_D = torch.zeros_like(drawn_BD[0])
        says_something = [bool(example.prompt.strip()) for example in examples]
        wanted_BD = torch.stack(
            [
                self.embed_text(example.prompt) if says else nothing_D
                for example, says in zip(examples, says_something, strict=True)
            ]
        )
        valid_B = to_device(torch.tensor(says_something), drawn_BD.device)
        return Score(value_B=(drawn_BD * wanted_BD).sum(-1), valid_B=valid_B)


class _Projected(nn.Module):
    """One tower and its projection into the shared space."""

    def __init__(self, tower: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.projection = projection

    def forward(self, given: Tensor) -> Tensor:
        projected_BD: Tensor = self.projection(self.tower(given).pooler_output)
        return projected_BD
