"""CLIP-T, CLIP-I and PickScore against transformers' own CLIP, on folders as they are released."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPModel

from rewardgen.arguments import check_args
from rewardgen.errors import CheckpointError, ConfigError
from rewardgen.reward import score
from rewardgen.rewards.clip import ClipReward
from rewardgen.rewards.clip_encoder import ClipEncoder
from rewardgen.rewards.image_processor import ImageProcessor
from rewardgen.rewards.pickscore import PickScoreReward
from rewardgen.types import Example
from tests.toy_reward_models import (
    SIDE,
    clip_folder,
    clip_model,
    clip_processor,
    clip_tokenizer,
    photo,
    to_tensor,
)

PROMPTS = ("a red cat on a mat", "Two  dogs", "word " * 100)
PHOTOS = (photo(1), photo(2), photo(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip")
    clip_folder(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> CLIPModel:
    return CLIPModel.from_pretrained(folder).eval()


def encoder(*, round_8bit: bool = True) -> ClipEncoder:
    processor = ImageProcessor(short_side=SIDE, crop=(SIDE, SIDE), round_8bit=round_8bit)
    return ClipEncoder(clip_model(), clip_tokenizer(), processor)


def released_logits(model: CLIPModel) -> Tensor:
    """[pictures, prompts], of transformers' processor, tokenizer and forward."""
    tokens = clip_tokenizer()(list(PROMPTS), padding=True, truncation=True, max_length=77, return_tensors="pt")
    images = clip_processor()(images=list(PHOTOS), return_tensors="pt")
    with torch.no_grad():
        logits: Tensor = model(**tokens, **images).logits_per_image
    return logits


def released_pictures(model: CLIPModel, pictures: list[Image.Image]) -> Tensor:
    images = clip_processor()(images=pictures, return_tensors="pt")
    with torch.no_grad():
        found: Tensor = model.get_image_features(**images).pooler_output
    return found / found.norm(dim=-1, keepdim=True)


def prompted() -> list[Example]:
    return [Example(id=str(i), prompt=prompt) for i, prompt in enumerate(PROMPTS)]


def pixels() -> Tensor:
    return torch.stack([to_tensor(picture) for picture in PHOTOS])


def test_the_folder_is_laid_out_as_the_release(folder: Path) -> None:
    there = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"} <= there
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {
        "logit_scale",
        "text_projection.weight",
        "text_model.embeddings.token_embedding.weight",
        "vision_model.pre_layrnorm.weight",
        "vision_model.encoder.layers.1.self_attn.q_proj.bias",
    } <= names


def test_clip_t_is_the_cosine_of_transformers_forward(folder: Path, model: CLIPModel) -> None:
    found = score(ClipReward.from_pretrained(str(folder)), pixels(), prompted(), enable_grad=False)
    expected = released_logits(model).diagonal() / model.logit_scale.detach().exp()
    assert torch.allclose(found.value_B, expected, atol=1e-5)
    assert found.value_B.std() > 0.01
    assert found.valid_B.all()


def test_pickscore_is_the_scaled_cosine(tmp_path: Path, folder: Path, model: CLIPModel) -> None:
    """The weights alone in one folder, tokenizer and processor in another, as the authors have it."""
    model.save_pretrained(tmp_path)
    reward = PickScoreReward.from_pretrained(str(tmp_path), processor=str(folder))
    found = score(reward, pixels(), prompted(), enable_grad=False)
    assert torch.allclose(found.value_B, released_logits(model).diagonal(), atol=1e-4)
    assert float(model.logit_scale.detach().exp()) > 10
    with pytest.raises(CheckpointError, match=tmp_path.name):
        PickScoreReward.from_pretrained(str(tmp_path))


@pytest.mark.parametrize("against", ["content", "style", "identity", "target"])
def test_clip_i_is_the_mean_cosine_with_the_references(folder: Path, model: CLIPModel, against: str) -> None:
    references = [photo(7, 61, 90), photo(8, 33, 70)]
    reward = ClipReward.from_pretrained(str(folder), against=against)  # type: ignore[arg-type]
    tensors = tuple(map(to_tensor, references))
    if against == "target":
        references = references[:1]
        example = Example(id="a", target=tensors[0])
    else:
        example = Example(id="a", **{f"{against}_refs": tensors})  # type: ignore[arg-type]
    found = score(reward, pixels()[:2], [example, Example(id="b", prompt="x")], enable_grad=False)
    drawn, wanted = (released_pictures(model, pictures) for pictures in (list(PHOTOS[:1]), references))
    assert found.value_B[0].item() == pytest.approx(float((drawn @ wanted.T).mean()), abs=1e-5)
    assert found.valid_B.tolist() == [True, False]


def test_a_picture_resembles_itself() -> None:
    reward = ClipReward(encoder(), against="content")
    found = reward.score(pixels()[:1], [Example(id="a", content_refs=(to_tensor(PHOTOS[0]),))])
    assert found.value_B.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("make", [ClipReward, PickScoreReward])
def test_without_a_prompt_it_is_not_valid_and_gives_no_gradient(make: Callable[[ClipEncoder], ClipReward]) -> None:
    drawn = pixels().requires_grad_()
    examples = [Example(id="a", prompt="a cat"), Example(id="b"), Example(id="c", prompt=" \n")]
    found = make(encoder()).score(drawn, examples)
    assert found.valid_B.tolist() == [True, False, False]
    (grad,) = torch.autograd.grad(found.value_B.sum(), drawn)
    assert grad[0].abs().max() > 0
    assert grad[1:].abs().max() == 0


@pytest.mark.parametrize("against", ["prompt", "content"])
def test_gradient_matches_finite_differences(against: str) -> None:
    example = [Example(id="a", prompt="a cat", content_refs=(to_tensor(photo(9)),))]
    drawn = (0.2 + 0.6 * pixels()[:1]).double().requires_grad_()
    for round_8bit in (False, True):
        rewards = [
            ClipReward(encoder(round_8bit=rounds).double(), against=against)  # type: ignore[arg-type]
            for rounds in (round_8bit, False)
        ]
        (grad,) = torch.autograd.grad(rewards[0].score(drawn, example).value_B.sum(), drawn)
        direction = grad / grad.norm()
        with torch.no_grad():
            ahead, behind = (rewards[1].score(drawn + step * direction, example).value_B for step in (1e-3, -1e-3))
        # Rounding leaves the value within a fraction of a level, so its gradient is close to that of the smooth value.
        assert float(ahead - behind) / 2e-3 == pytest.approx(float(grad.norm()), rel=0.05 if round_8bit else 1e-4)


def test_each_text_and_reference_is_encoded_once() -> None:
    clip = encoder()
    calls: list[tuple[str, int]] = []
    clip.texts.register_forward_hook(lambda _m, args, _out: calls.append(("text", len(args[0]))))
    clip.pictures.network.register_forward_hook(lambda _m, args, _out: calls.append(("picture", len(args[0]))))
    examples = [Example(id=str(i), prompt="a cat", content_refs=(to_tensor(photo(9)),)) for i in range(3)]
    for _ in range(2):
        ClipReward(clip).score(pixels(), examples)
        ClipReward(clip, against="content").score(pixels(), examples)
    assert calls == [("picture", 3), ("text", 1), ("picture", 3), ("picture", 1), ("picture", 3), ("picture", 3)]


def test_texts_encoded_in_inference_mode_serve_gradients_later() -> None:
    reward = ClipReward(encoder())
    with torch.inference_mode():
        reward.score(pixels(), prompted())
    drawn = pixels().requires_grad_()
    reward.score(drawn, prompted()).value_B.sum().backward()
    assert drawn.grad is not None
    assert drawn.grad.abs().max() > 0


def test_autocast_does_not_coarsen_it() -> None:
    expected = ClipReward(encoder()).score(pixels(), prompted()).value_B
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ClipReward(encoder()).score(pixels(), prompted()).value_B, expected)


def test_weights_are_frozen_and_counted_once(folder: Path, model: CLIPModel) -> None:
    reward = ClipReward.from_pretrained(str(folder))
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not any(module.training for module in reward.encoder.modules())
    assert sum(p.numel() for p in reward.parameters()) == sum(p.numel() for p in model.parameters()) - 1


def test_arguments_as_in_an_experiment() -> None:
    check_args(ClipReward.from_pretrained, {"model": "openai/clip-vit-base-patch32", "against": "content"}, "x")
    with pytest.raises(ConfigError, match=r"x\.against"):
        check_args(ClipReward.from_pretrained, {"model": "a", "against": "contents"}, "x")
    with pytest.raises(ConfigError, match=r"x\.model: required"):
        check_args(ClipReward.from_pretrained, {}, "x")
