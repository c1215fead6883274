"""Reward models from their sizes alone, for the memory plan: their weights mean nothing, and nothing is fetched.

Sizes come from a `config.json` that is here, else from the table of released models below.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewardgen.errors import CheckpointError
from rewardgen.rewards.image_processor import ImageProcessor, load_image_processor
from rewardgen.rewards.loading import is_safetensors, read_shapes, read_tensors

_VIT_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
_VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def _dinov2(**sizes: Any) -> dict[str, Any]:
    return {"model_type": "dinov2", "image_size": 518, "patch_size": 14, "mlp_ratio": 4, **sizes}


def _clip(projection: int, text: Mapping[str, Any], vision: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: {**of, "intermediate_size": 4 * of["hidden_size"]} for name, of in (("t", text), ("v", vision))}
    whole = {
        "projection_dim": projection,
        "text_config": sizes["t"],
        "vision_config": {"image_size": 224, **sizes["v"]},
    }
    return {"model_type": "clip", **whole}


CLIP_H = _clip(
    1024,
    {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "gelu"},
    {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "patch_size": 14, "hidden_act": "gelu"},
)
"""ViT-H/14, which PickScore and HPSv2 are."""
_TEXT_B = {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT_L = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_QWEN_VISION = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
_QWEN_ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "rope_theta": 1e6}

_QWEN_7B = {
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    **_QWEN_ROPE,
}

RELEASED: Mapping[str, Mapping[str, Any]] = {
    "facebook/dino-vits16": {"model_type": "vit", "intermediate_size": 1536, **_VIT_S},
    "facebook/dino-vitb16": {"model_type": "vit", **_VIT_B},
    "facebook/dinov2-small": _dinov2(**_VIT_S),
    "facebook/dinov2-base": _dinov2(**_VIT_B),
    "facebook/dinov2-large": _dinov2(**_VIT_L),
    "facebook/dinov2-with-registers-base": {**_dinov2(**_VIT_B), "model_type": "dinov2_with_registers"},
    "openai/clip-vit-base-patch32": _clip(512, _TEXT_B, {**_VIT_B, "patch_size": 32}),
    "openai/clip-vit-base-patch16": _clip(512, _TEXT_B, {**_VIT_B, "patch_size": 16}),
    "openai/clip-vit-large-patch14": _clip(768, _TEXT_L, {**_VIT_L, "patch_size": 14}),
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": CLIP_H,
    "yuvalkirstain/PickScore_v1": CLIP_H,
    "google/siglip-so400m-patch14-384": {
        "model_type": "siglip",
        "vision_config": {
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 27,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
        },
    },
    "Qwen/Qwen2-VL-7B-Instruct": {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": False,
        "text_config": _QWEN_7B,
        "vision_config": {"depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "num_heads": 16},
    },
    "Qwen/Qwen2.5-VL-3B-Instruct": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": True,
        "text_config": {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            **_QWEN_ROPE,
        },
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 2048},
    },
    "Qwen/Qwen2.5-VL-7B-Instruct": {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        "text_config": _QWEN_7B,
        "vision_config": {**_QWEN_VISION, "out_hidden_size": 3584},
    },
}
"""Sizes of released models by hub id, as their `config.json` states them; what is left out is transformers' default."""
LETTERS = 3
"""Of a token, where no tokenizer counts: fewer than in most words, lest a plan is too small."""
_SHORT_SIDES = {"dinov2": 256, "dinov2_with_registers": 256}
_SIDE = 224
"""Of the squares that the encoders of the table read, unless their config says another."""


def folder_of(source: str) -> Path | None:
    """The folder here that holds the `config.json` of a model: the source itself, or the hub's cache of it."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    path = Path(source).expanduser()
    if (path / "config.json").is_file():
        return path
    try:
        found = try_to_load_from_cache(source, "config.json")
    except HFValidationError:  # a path, not a repository
        return None
    return Path(found).parent if isinstance(found, str) else None


def config_of(source: str) -> Any:
    """transformers' config of a model in a folder or a hub repository; no host is contacted.

    Raises:
        CheckpointError: there is no readable `config.json` here, and the table does not know the repository.
    """
    from transformers import CONFIG_MAPPING

    folder = folder_of(source)
    if folder is None and source not in RELEASED:
        known = ", ".join(RELEASED)
        raise CheckpointError(
            f"{source}: its config.json is not here, and it is none of the reward models whose sizes are known: {known}"
        )
    try:
        # A copy to its depths: a config fills in what its mappings leave out.
        found = (
            deepcopy(RELEASED[source]) if folder is None else json.loads((folder / "config.json").read_text("utf-8"))
        )
        return CONFIG_MAPPING[found["model_type"]].from_dict(found)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder or source}: no config of a model of transformers ({error})") from error


def processor_of(source: str, config: Any) -> ImageProcessor:
    """How pictures are prepared for a model: as its folder says where it is here, else as released.

    Args:
        config: of the model, or of its vision tower.
    """
    folder = folder_of(source)
    if folder is not None and (folder / "preprocessor_config.json").is_file():
        return load_image_processor(str(folder))
    short = _SHORT_SIDES.get(config.model_type)
    if short is not None:
        return ImageProcessor(short_side=short, crop=(_SIDE, _SIDE))
    side = int(getattr(config, "image_size", _SIDE))
    return ImageProcessor(size=(side, side))


def shapes_in(what: str, checkpoint: str) -> dict[str, Tensor] | None:
    """The tensors of a file by name, whose values do not count; None where the file is not here."""
    path = Path(checkpoint).expanduser()
    if not path.is_file():
        return None
    return (read_shapes if is_safetensors(what, path) else _read)(what, path)[0]


def _read(what: str, path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    return read_tensors(what, path, under="state_dict")


def head(inputs: int) -> nn.Sequential:
    """The last layers that the aesthetic predictor and ImageReward were released with, from so many features."""
    widths = (inputs, 1024, 128, 64, 16, 1)
    return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))


class LetterTokenizer:
    """Stands in for a tokenizer where only the number of tokens counts, a few too many: one for each three letters.

    Args:
        special: tokens that stand for themselves, with their numbers.
    """

    def __init__(self, special: Mapping[str, int]) -> None:
        self.special = dict(special)

    def get_added_vocab(self) -> dict[str, int]:
        """The special tokens."""
        return self.special

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, Tensor]:
        rows = [self._row(text) for text in texts]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return {"input_ids": ids_BT, "attention_mask": mask_BT}

    def _row(self, text: str) -> list[int]:
        ids = list[int]()
        for part in re.split(f"({'|'.join(map(re.escape, self.special))})", text):
            ids += [self.special[part]] if part in self.special else [0] * math.ceil(len(part) / LETTERS)
        return ids


class BlankTokenizer:
    """Stands in for a tokenizer where only the number of tokens counts, the most there may be: each is number 0."""

    def __call__(self, texts: str | list[str], *, max_length: int, **_: Any) -> dict[str, Tensor]:
        ids_BT = torch.zeros(1 if isinstance(texts, str) else len(texts), max_length, dtype=torch.long)
        return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
