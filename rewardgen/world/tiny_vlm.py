"""A LLaVA small enough for a CPU, untrained: the class, files and processor of the released ones."""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from rewardgen.rewards.judging.questions import TEMPLATES

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the processor, as CLIP's."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
CHAT_TEMPLATE = (
    "<s>{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} :{% endif %}"
)
"""One turn of questions and no names of speakers: a small model is told nothing by them."""


def tiny_llava(
    *,
    seed: int = 0,
    image_size: int = 64,
    patch_size: int = 8,
    vision_width: int = 96,
    vision_layers: int = 3,
    text_width: int = 96,
    text_layers: int = 3,
    heads: int = 3,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A random model in evaluation mode, and its processor. Its words are those of the bundled question templates.

    Args:
        seed: of the weights.
        image_size: side of a picture in pixels, a multiple of
        patch_size: side of a patch; each patch is a token.
    """
    processor = _processor(image_size, patch_size)
    vision = CLIPVisionConfig(
        image_size=image_size, patch_size=patch_size, hidden_size=vision_width, intermediate_size=2 * vision_width,
        num_hidden_layers=vision_layers, num_attention_heads=heads,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer), hidden_size=text_width, intermediate_size=2 * text_width,
        num_hidden_layers=text_layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=1024, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=SPECIAL.index("<image>"),
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _scale_for_small_widths(model)
    return model.eval(), processor


def _scale_for_small_widths(model: nn.Module) -> None:
    """First weights that keep a signal's size: transformers' standard deviation of 0.02 is meant for wide models.

    In a narrow one it lets pictures fade on their way to the answer, and nothing is learned for a long time.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.5)


def vocabulary() -> list[str]:
    """Special tokens, answers, and the words and signs of the bundled templates, in lower case."""
    texts = [path.read_text(encoding="utf-8").lower() for path in sorted(TEMPLATES.glob("*.txt"))]
    words = {word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text)}
    return [*SPECIAL, *sorted(words | {"yes", "no", *map(str, range(10)), ":"})]


def _processor(image_size: int, patch_size: int) -> LlavaProcessor:
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped: Any = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], model_max_length=1024,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_mean=list(CLIP_MEAN),
            image_std=list(CLIP_STD),
        ),
        tokenizer=wrapped,
        patch_size=patch_size,
        num_additional_image_tokens=1,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
    )
