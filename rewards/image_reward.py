"""ImageReward (Xu et al., arXiv 2304.05977): how well would people rate this picture for this prompt?"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.reward import Reward
from rewardgen.rewards.heads import linear_head
from rewardgen.rewards.image_processor import ImageProcessor
from rewardgen.rewards.loading import load_pretrained, model_from, read_tensors, size_of
from rewardgen.rewards.sizes import BlankTokenizer, head, shapes_in
from rewardgen.transfer import to_device
from rewardgen.types import Example, Score

if TYPE_CHECKING:
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel, PreTrainedTokenizerBase

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw scores, in the authors' code: what is reported is standardised with them."""
MAX_TOKENS = 35
"""Of a prompt, in the authors' code; the rest is cut."""
VISION_HEADS, TEXT_HEADS = 16, 12
"""Of ViT-L/16 and BERT-base, which BLIP is made of; the file does not tell."""
_VISION = (
    (r"cls_token", "embeddings.class_embedding"),
    (r"pos_embed", "embeddings.position_embedding"),
    (r"patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"norm\.", "post_layernorm."),
    (r"blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)
"""Beginnings of BLIP's names and of those of transformers."""


class ImageReward(Reward):
    """The authors' standardised score, about -2.5 to 2. Valid where there is a prompt.

    BLIP reads the prompt while it looks at the picture, so no embedding of the text can be kept, only its tokens.

    Args:
        model: pixel values, token ids and mask to scores.
        tokenizer: BERT's, uncased.
        processor: pictures [B, 3, H, W] in [0, 1] to pixel values, differentiable.
    """

    differentiable = True

    def __init__(
        self, model: BlipScorer, tokenizer: PreTrainedTokenizerBase, processor: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.processor = processor

    @classmethod
    def from_pretrained(cls, checkpoint: str, *, tokenizer: str) -> ImageReward:
        """Read the released file.

        Args:
            checkpoint: `THUDM/ImageReward:ImageReward.pt` or a copy.
            tokenizer: folder or hub repository with BERT's tokenizer: `google-bert/bert-base-uncased`.
        """
        from transformers import AutoTokenizer

        model = load_image_reward(checkpoint)
        side = int(model.vision.config.image_size)
        return cls(model, load_pretrained(AutoTokenizer, tokenizer), ImageProcessor(short_side=side, crop=(side, side)))

    @classmethod
    def blueprint(cls, checkpoint: str, *, tokenizer: str) -> ImageReward:
        """A reward of the right sizes whose weights mean nothing; those of the release where the file is not here.

        Raises:
            CheckpointError: a file of another layout.
        """
        from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        found = shapes_in("ImageReward checkpoint", checkpoint)
        if found is None:
            large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
            seen = BlipVisionConfig(**large, image_size=224, patch_size=16)
            read = BlipTextConfig(vocab_size=30524, encoder_hidden_size=1024, num_attention_heads=TEXT_HEADS)
        else:
            seen, read = _infer_configs(f"ImageReward checkpoint {checkpoint}", found)
        text = BlipTextModel(read, add_pooling_layer=False)
        model, side = BlipScorer(BlipVisionModel(seen), text, head(int(read.hidden_size))), int(seen.image_size)
        return cls(model, cast(Any, BlankTokenizer()), ImageProcessor(short_side=side, crop=(side, side)))

    def score(self, pixels_B3HW: Tensor, examples: Sequence[Example]) -> Score:
        like = next(self.model.parameters())
        says_something = [bool(example.prompt.strip()) for example in examples]
        tokens = self.tokenizer(
            [example.prompt for example in examples],
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        with torch.autocast(like.device.type, enabled=False):
            images = self.processor(pixels_B3HW.to(like.device)).to(like.dtype)
            ids_BT, mask_BT = (to_device(tokens[name], like.device) for name in ("input_ids", "attention_mask"))
            raw_B = self.model(images, ids_BT, mask_BT)
        value_B = (raw_B.to(torch.promote_types(raw_B.dtype, torch.float32)) - MEAN) / STD
        return Score(value_B=value_B, valid_B=to_device(torch.tensor(says_something), value_B.device))


class BlipScorer(nn.Module):
    """BLIP's picture tower, its text tower with cross-attention, and linear layers on the text's first token.

    Args:
        vision: to patch tokens.
        text: reads them by cross-attention.
        head: the first text token [B, D] to [B, 1].
    """

    def __init__(self, vision: BlipVisionModel, text: BlipTextModel, head: nn.Module) -> None:
        super().__init__()
        self.vision = vision
        self.text = text
        self.head = head

    def forward(self, images_B3SS: Tensor, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        patches_BND = self.vision(images_B3SS).last_hidden_state
        read_BTD = self.text(
            input_ids=ids_BT, attention_mask=mask_BT, encoder_hidden_states=patches_BND
        ).last_hidden_state
        raw_B: Tensor = self.head(read_BTD[:, 0])[:, 0]
        return raw_B


def load_image_reward(checkpoint: str) -> BlipScorer:
    """Read the released names (`blip.visual_encoder`, `blip.text_encoder`, `mlp.layers`) from a torch file of weights
    or safetensors. Other tensors of BLIP, which scoring does not use, are passed over, as the authors' code does.

    Raises:
        CheckpointError: the file is missing, damaged or holds code, or a tensor is missing, of a wrong shape or not
            finite.
    """
    from transformers import BlipTextModel, BlipVisionModel

    found, _ = read_tensors("ImageReward checkpoint", checkpoint)
    what = f"ImageReward checkpoint {checkpoint}"
    vision = {_renamed(name): tensor for name, tensor in _below(found, "blip.visual_encoder.").items()}
    text = _below(found, "blip.text_encoder.")
    text.pop("embeddings.position_ids", None)  # 0, 1, 2, ...
    vision_config, text_config = _infer_configs(what, found)
    return BlipScorer(
        model_from(BlipVisionModel, vision_config, vision, what),
        model_from(BlipTextModel, text_config, text, what, add_pooling_layer=False),
        linear_head(what, found, "mlp.layers.", int(text_config.hidden_size)),
    )


def _infer_configs(what: str, tensors: Mapping[str, Tensor]) -> tuple[BlipVisionConfig, BlipTextConfig]:
    from transformers import BlipTextConfig, BlipVisionConfig

    seen, read = "blip.visual_encoder.", "blip.text_encoder."
    width, _, patch_size, _ = size_of(what, tensors, f"{seen}patch_embed.proj.weight", 4, "ImageReward")
    _, positions, _ = size_of(what, tensors, f"{seen}pos_embed", 3)
    vocabulary, text_width = size_of(what, tensors, f"{read}embeddings.word_embeddings.weight", 2)
    max_tokens, _ = size_of(what, tensors, f"{read}embeddings.position_embeddings.weight", 2)
    if width % VISION_HEADS or text_width % TEXT_HEADS:
        raise CheckpointError(
            f"{what}: widths {width} and {text_width} cannot be split into {VISION_HEADS} and {TEXT_HEADS} heads"
        )
    vision = BlipVisionConfig(
        image_size=math.isqrt(positions - 1) * patch_size,
        patch_size=patch_size,
        hidden_size=width,
        intermediate_size=size_of(what, tensors, f"{seen}blocks.0.mlp.fc1.weight", 2)[0],
        num_hidden_layers=_count(tensors, f"{seen}blocks."),
        num_attention_heads=VISION_HEADS,
        layer_norm_eps=1e-6,  # BLIP's own; transformers' default is another
    )
    text = BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=size_of(what, tensors, f"{read}encoder.layer.0.intermediate.dense.weight", 2)[0],
        num_hidden_layers=_count(tensors, f"{read}encoder.layer."),
        num_attention_heads=TEXT_HEADS,
        max_position_embeddings=max_tokens,
        layer_norm_eps=1e-12,
    )
    return vision, text


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _renamed(name: str) -> str:
    for old, new in _VISION:
        if re.match(old, name):
            return re.sub(f"^{old}", new, name)
    return name
