"""Reward models of every released architecture at toy size, with random weights, and their folders as on the hub."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    BertTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTModel,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SIDE = 32
"""Of the square pictures that the toy encoders read."""
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def clip_tokenizer() -> CLIPTokenizer:
    """One token for each letter; as in the release, the end of the text has the highest number."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: place for place, token in enumerate(tokens)}, merges=[])


def bert_tokenizer() -> BertTokenizer:
    letters = string.ascii_lowercase + ".,"
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    return BertTokenizer(vocab={token: place for place, token in enumerate(tokens)})


def clip_model(**vision: Any) -> CLIPModel:
    torch.manual_seed(0)
    size = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 12}
    end = len(clip_tokenizer()) - 1
    text = {"vocab_size": end + 1, "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 77}
    special = {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": end}
    picture = {"hidden_size": 32, "intermediate_size": 48, "image_size": SIDE, "patch_size": 8}
    return _lively(
        CLIPModel(
            CLIPConfig(
                text_config={**size, **text, **special}, vision_config={**size, **picture, **vision}, projection_dim=12
            )
        )
    )


def clip_folder(folder: Path, *, processor: dict[str, Any] | None = None) -> CLIPModel:
    """As `openai/clip-vit-base-patch32`: config.json, model.safetensors, tokenizer, preprocessor_config.json."""
    model = clip_model()
    model.save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    clip_processor(**(processor or {})).save_pretrained(folder)
    return model


def clip_processor(**options: Any) -> CLIPImageProcessorPil:
    square = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(**{"size": {"shortest_edge": SIDE}, "crop_size": square, **options})


def dino_model() -> ViTModel:
    torch.manual_seed(0)
    return _lively(ViTModel(ViTConfig(**_vit(), layer_norm_eps=1e-12), add_pooling_layer=False))


def dino_folder(folder: Path) -> ViTModel:
    """As `facebook/dino-vits16`: no pooling layer, a square resize."""
    model = dino_model()
    model.save_pretrained(folder)
    dino_processor().save_pretrained(folder)
    return model


def dino_processor() -> ViTImageProcessorPil:
    return ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=3, **IMAGENET)


def dinov2_folder(folder: Path) -> Dinov2Model:
    """As `facebook/dinov2-base`: positions for larger pictures than it is given, short side 8/7 of the crop."""
    torch.manual_seed(0)
    model = _lively(Dinov2Model(Dinov2Config(**{**_vit(), "image_size": SIDE + 16}, mlp_ratio=2)))
    model.save_pretrained(folder)
    dinov2_processor().save_pretrained(folder)
    return model


def dinov2_processor() -> BitImageProcessorPil:
    square = {"height": SIDE, "width": SIDE}
    return BitImageProcessorPil(size={"shortest_edge": SIDE * 8 // 7}, crop_size=square, resample=3, **IMAGENET)


def siglip_model() -> SiglipModel:
    torch.manual_seed(0)
    text = {"vocab_size": 30, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
    return _lively(SiglipModel(SiglipConfig(text_config={**text, "num_attention_heads": 2}, vision_config=_vit())))


def siglip_folder(folder: Path) -> SiglipModel:
    """As `google/siglip-so400m-patch14-384`: both towers in one file."""
    model = siglip_model()
    model.save_pretrained(folder)
    siglip_processor().save_pretrained(folder)
    return model


def siglip_processor() -> SiglipImageProcessorPil:
    return SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE}, resample=3)


def blip_vision() -> BlipVisionModel:
    torch.manual_seed(0)
    return _lively(BlipVisionModel(BlipVisionConfig(**_vit())))


def blip_text() -> BlipTextModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "encoder_hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    config = BlipTextConfig(**sizes, num_attention_heads=2, vocab_size=len(bert_tokenizer()))
    return _lively(BlipTextModel(config, add_pooling_layer=False))


def photo(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    """A picture with coarse shapes and fine noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((width, height))
    noisy = np.asarray(coarse, dtype=np.int64) + rng.integers(-30, 31, (height, width, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _vit() -> dict[str, Any]:
    return {
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": SIDE,
        "patch_size": 8,
    }


def _lively(model: Any) -> Any:
    """Random weights large enough that every layer, also each bias and norm, shows in the output."""
    assert isinstance(model, PreTrainedModel)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim:
                parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()
