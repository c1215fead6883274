"""Local judges whose processors cut pictures into tiles: InternVL, Idefics3 and SmolVLM, told to make a single one.

The processors are transformers' own, at tiny size. The video part of InternVL's and SmolVLM's wants torchvision and is
left out; it takes no part in pictures.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from transformers import (
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor

from rewardgen.errors import ConfigError
from rewardgen.rewards.judging.local import LocalModel, render
from rewardgen.rewards.judging.pictures import to_pil
from rewardgen.rewards.judging.preprocess import Preprocess, one_tile
from rewardgen.rewards.judging.questions import load_question
from rewardgen.types import Example
from rewardgen.world.tiny_vlm import tiny_llava

SIDE, PATCH = 16, 4
"""Of a tile and of a patch, in pixels; four patches become one of the model's tokens."""
TOKENS = (SIDE // PATCH) ** 2 // 4
TILES = {"size": {"longest_edge": 40}, "max_image_size": {"longest_edge": SIDE}}
IMAGE_PROCESSORS: dict[str, Any] = {
    "internvl": lambda: GotOcr2ImageProcessorPil(size={"height": SIDE, "width": SIDE}, crop_to_patches=True),
    "idefics3": lambda: Idefics3ImageProcessorPil(**TILES),
    "smolvlm": lambda: SmolVLMImageProcessorPil(**TILES),
}
VISION = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": SIDE, "patch_size": PATCH}  # fmt: skip


class InternVL(InternVLProcessor):
    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


class SmolVLM(SmolVLMProcessor):
    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def words(image: str, **named: str) -> Any:
    """The tiny LLaVA's tokenizer, which lets special tokens be."""
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=tiny_llava(image_size=SIDE)[1].tokenizer.backend_tokenizer, pad_token="<pad>", bos_token="<s>",
        eos_token="</s>", unk_token="<unk>", model_max_length=1024,
    )  # fmt: skip
    special = [image, *named.values(), "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(special))})
    for name, token in named.items():
        setattr(tokenizer, name, token)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
    return tokenizer


def tiny(kind: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A random model with its processor, which cuts pictures into tiles unless told."""
    template = tiny_llava(image_size=SIDE)[1].chat_template
    processor: Any
    if kind == "internvl":
        named = {"start_image_token": "<img>", "end_image_token": "</img>", "video_token": "<video>"}
        tokenizer = words("<IMG_CONTEXT>", context_image_token="<IMG_CONTEXT>", **named)
        processor = InternVL(
            IMAGE_PROCESSORS[kind](), tokenizer, None, image_seq_length=TOKENS,
            chat_template=template.replace("<image>", "<IMG_CONTEXT>"),
        )  # fmt: skip
    elif kind == "idefics3":
        tokenizer = words("<image>")
        processor = Idefics3Processor(IMAGE_PROCESSORS[kind](), tokenizer, image_seq_len=TOKENS, chat_template=template)
    else:
        monkeypatch.setattr(processing_smolvlm, "num2words", str)
        tokenizer = words("<image>")
        processor = SmolVLM(IMAGE_PROCESSORS[kind](), tokenizer, None, image_seq_len=TOKENS, chat_template=template)
        processor.video_processor = SimpleNamespace(num_frames=1, fps=1)
    text = {"vocab_size": len(tokenizer), "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
            "eos_token_id": 2, "max_position_embeddings": 1024}  # fmt: skip
    image_token_id = tokenizer.convert_tokens_to_ids(processor.image_token)
    torch.manual_seed(0)
    if kind == "internvl":
        config = InternVLConfig(
            vision_config=VISION, text_config={"model_type": "qwen2", **text}, image_token_id=image_token_id,
            image_seq_length=TOKENS,
        )  # fmt: skip
        return InternVLForConditionalGeneration(config).eval(), processor
    classes = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration),
    }
    config_class, model_class = classes[kind]
    config = config_class(
        vision_config=VISION, text_config={"model_type": "llama", **text}, image_token_id=image_token_id, scale_factor=2
    )
    return model_class(config).eval(), processor


def picture(height: int = 20, width: int = 50, seed: int = 0) -> Tensor:
    levels = torch.randint(0, 256, (3, height, width), generator=torch.Generator().manual_seed(seed))
    return levels / 255


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_the_single_tile_is_the_processors_at_any_size(kind: str) -> None:
    whole = {"internvl": {"crop_to_patches": False}}.get(kind, {"do_image_splitting": False})
    processor = IMAGE_PROCESSORS[kind]()
    with pytest.raises(ConfigError, match="cuts pictures into tiles"):
        Preprocess.of(processor, name="x")
    for name, value in whole.items():
        setattr(processor, name, value)
    preprocess = Preprocess.of(processor, name="x")

    @settings(max_examples=25, deadline=None)
    @given(st.integers(3, 90), st.integers(3, 90), st.integers(0, 9999))
    def check(height: int, width: int, seed: int) -> None:
        levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = processor(images=[Image.fromarray(levels)], return_tensors="pt")["pixel_values"]
        ours = preprocess.batch([preprocess(torch.from_numpy(levels).permute(2, 0, 1) / 255)])
        assert ours.shape == expected.shape
        assert (ours - expected).abs().max() * min(preprocess.std) * 255 <= 1.01

    check()


@pytest.mark.parametrize("kind", IMAGE_PROCESSORS)
def test_the_score_is_that_of_the_processors_own_pixels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two wide pictures, which would be several tiles: the model's answer is that of transformers' own path."""
    model, processor = tiny(kind, monkeypatch)
    question = load_question("style")
    local = LocalModel(model, processor, question)
    pixels = picture().requires_grad_()
    parts = question.put(pixels, Example(id="a", style_refs=(picture(48, 18, seed=1),)))
    assert parts is not None
    value, mass = local(parts)
    (grad,) = torch.autograd.grad(value, pixels)
    assert (grad != 0).float().mean() > 0.99
    # What the processor would do by itself, had it been told in the call instead.
    switch = "crop_to_patches" if kind == "internvl" else "do_image_splitting"
    made = tiny(kind, monkeypatch)[1](
        images=[to_pil(part) for part in parts if isinstance(part, Tensor)],
        text=[render(processor, question, parts)],
        return_tensors="pt",
        add_special_tokens=False,
        **{switch: False},
    )
    assert made["pixel_values"].flatten(0, -4).shape == (2, 3, SIDE, SIDE)
    assert int((made["input_ids"] == model.config.image_token_id).sum()) == 2 * TOKENS
    with torch.no_grad():
        p_V = model(**made).logits[0, -1].float().softmax(-1)
    yes, no = (p_V[local.tokens[answer]].sum() for answer in ("yes", "no"))
    assert value.item() == pytest.approx(float(yes / (yes + no)), abs=1e-4)
    assert mass.item() == pytest.approx(float(yes + no), abs=1e-4)


def test_without_being_told_they_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would show nothing."""
    for kind in IMAGE_PROCESSORS:
        processor = tiny(kind, monkeypatch)[1]
        seen = processor(images=[to_pil(picture())], text=[processor.image_token], return_tensors="pt")["pixel_values"]
        assert seen.flatten(0, -4).shape[0] > 2


def test_a_processor_that_goes_on_cutting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stubborn(InternVL):
        def _merge_kwargs(self, *args: Any, **kwargs: Any) -> Any:
            merged = super()._merge_kwargs(*args, **kwargs)
            merged["images_kwargs"]["crop_to_patches"] = True
            return merged

    processor = tiny("internvl", monkeypatch)[1]
    processor.__class__ = Stubborn
    with pytest.raises(ConfigError, match="cuts pictures into tiles whatever crop_to_patches says"):
        one_tile(processor, name="model: 'x'")


def test_a_prompt_cannot_pass_for_a_video(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny("internvl", monkeypatch)
    local = LocalModel(model, processor, load_question("prompt"))
    parts = local.question.put(picture(), Example(id="a", prompt="plums <video> <IMG_CONTEXT>"))
    assert parts is not None
    with torch.no_grad():
        assert local(parts)[0].isfinite()


@pytest.mark.parametrize(
    "changed", [{"size": {"height": 20, "width": 20}}, {"size": {"longest_edge": 5000}}, {"do_normalize": False}]
)
def test_settings_that_cannot_be_followed_are_refused(changed: dict[str, Any]) -> None:
    processor = Idefics3ImageProcessorPil(**{**TILES, "do_image_splitting": False, **changed})
    with pytest.raises(ConfigError, match="has no gradient here"):
        Preprocess.of(processor, name="x")
