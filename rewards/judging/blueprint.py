"""A local judge from its sizes alone, for the memory plan: nothing of its weights is read, nothing is fetched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rewardgen.errors import CheckpointError
from rewardgen.rewards.judging.preprocess import Preprocess
from rewardgen.rewards.preprocess import CLIP_MEAN, CLIP_STD
from rewardgen.rewards.sizes import LETTERS, config_of, folder_of

_QWEN_PIXELS = (4 * 28**2, 16384 * 28**2)
"""Fewest and most pixels of a picture in Qwen2.5-VL's released processor."""


def take_shapes(model: str, dtype: torch.dtype) -> tuple[Any, Any, Preprocess]:
    """An image-text model of the right sizes, its processor or what stands in for it, and how pictures are prepared.

    Raises:
        CheckpointError: the sizes are not known, or how pictures become tokens.
    """
    from transformers import AutoModelForImageTextToText

    config = config_of(model)
    try:
        weights = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise CheckpointError(f"{model}: a '{config.model_type}' is no image-text model") from error
    folder = folder_of(model)
    processor = None if folder is None else _processor(folder)
    if processor is not None:
        return weights, processor, Preprocess.of_settings(processor.image_processor, name=f"model: '{model}'")
    if config.model_type != "qwen2_5_vl":
        raise CheckpointError(f"{model}: how many tokens a picture has cannot be told before its processor is here")
    vision = config.vision_config
    preprocess = Preprocess(
        size=_QWEN_PIXELS,
        kernel="bicubic",
        crop=(),
        mean=(CLIP_MEAN[0], CLIP_MEAN[1], CLIP_MEAN[2]),
        std=(CLIP_STD[0], CLIP_STD[1], CLIP_STD[2]),
        patches=(int(vision.patch_size), int(vision.spatial_merge_size), int(vision.temporal_patch_size)),
    )
    return weights, QwenStandIn(preprocess, int(config.image_token_id)), preprocess


def _processor(folder: Path) -> Any:
    """The processor in a folder, None where it is not there or something that it needs is not installed."""
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
        if getattr(processor.image_processor, "backend", "pil") != "pil":
            processor.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    except (ImportError, OSError, ValueError, KeyError):
        return None
    return processor


class QwenStandIn:
    """Makes as many tokens as Qwen2.5-VL's processor would, or a few more.

    Args:
        preprocess: says how many patches a picture has.
        image_token_id: of the model.
    """

    image_token = "<|image_pad|>"
    chat_template = "none: texts and pictures stand one after another"

    def __init__(self, preprocess: Preprocess, image_token_id: int) -> None:
        self.preprocess, self.image_token_id = preprocess, image_token_id
        self.tokenizer = _Words()

    def apply_chat_template(self, messages: Sequence[dict[str, Any]], **_: Any) -> str:
        """The question, with its chat marks as 40 letters for each message."""
        parts = [part for message in messages for part in message["content"]]
        texts = [self.image_token if part["type"] == "image" else str(part["text"]) for part in parts]
        return "-" * 40 * (len(messages) + 1) + "".join(texts)

    def __call__(self, images: Sequence[Image.Image], text: Sequence[str], **_: Any) -> dict[str, Tensor]:
        side, merged = (self.preprocess.patches or (1, 1, 1))[:2]
        grids, ids = [], list[int]()
        for index, words in enumerate(text[0].split(self.image_token)):
            if index:
                picture = images[index - 1]
                rows, columns = (size // side for size in self.preprocess.resized(picture.height, picture.width))
                grids.append([1, rows, columns])
                ids += [self.image_token_id] * (rows * columns // merged**2)
            ids += [0] * math.ceil(len(words) / LETTERS)
        ids_1T = torch.tensor([ids])
        return {
            "input_ids": ids_1T,
            "attention_mask": torch.ones_like(ids_1T),
            "mm_token_type_ids": (ids_1T == self.image_token_id).int(),
            "image_grid_thw": torch.tensor(grids),
        }


class _Words:
    """A tokenizer with one token for each word, whatever its case."""

    unk_token_id = None

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}

    def encode(self, text: str, **_: Any) -> list[int]:
        """One number."""
        return [self._ids.setdefault(text.strip().casefold(), len(self._ids) + 1)]
