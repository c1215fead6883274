"""Differentiable processors against the PIL image processors of transformers, value for value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from rewardgen.errors import CheckpointError
from rewardgen.rewards.image_processor import ImageProcessor, load_image_processor
from tests.toy_reward_models import clip_processor, dino_processor, dinov2_processor, photo, siglip_processor, to_tensor

RELEASED: dict[str, Any] = {
    "CLIP": clip_processor(),
    "CLIP 224": clip_processor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
    "DINO": dino_processor(),
    "DINOv2": dinov2_processor(),
    "SigLIP": siglip_processor(),
    "bilinear": clip_processor(resample=2),
    "lanczos": clip_processor(resample=1, size={"height": 30, "width": 28}, crop_size={"height": 29, "width": 25}),
    "not resized": clip_processor(do_resize=False, crop_size={"height": 7, "width": 6}),
    "not cut": clip_processor(do_center_crop=False),
    "not normalised": clip_processor(do_normalize=False),
}
SIZES = [(40, 56), (57, 40), (33, 33), (9, 31), (200, 60)]


def pixel_values(processor: Any, picture: Image.Image, **options: Any) -> torch.Tensor:
    values: torch.Tensor = processor(images=picture, return_tensors="pt", **options)["pixel_values"]
    return values


def width_first(picture: Image.Image, width: int, height: int, filter_number: int = 3) -> Image.Image:
    """Resized in the order of Pillow before 13, which resizes some tall pictures the other way round."""
    kernel = Image.Resampling(filter_number)
    return picture.resize((width, picture.height), kernel).resize((width, height), kernel)


@pytest.mark.parametrize("name", RELEASED)
def test_equal_to_the_released_processor(tmp_path: Path, name: str) -> None:
    """The same level everywhere."""
    RELEASED[name].save_pretrained(tmp_path)
    ours = load_image_processor(str(tmp_path))
    for seed, (height, width) in enumerate(SIZES):
        picture = photo(seed, height, width)
        found = ours(to_tensor(picture)[None])
        if height > width and RELEASED[name].do_resize:
            size = RELEASED[name].size
            across = size.width or size.shortest_edge
            down = size.height or int(across * height / width)
            resized = width_first(picture, across, down, RELEASED[name].resample)
            expected = pixel_values(RELEASED[name], resized, do_resize=False)
        else:
            expected = pixel_values(RELEASED[name], picture)
        assert found.shape == expected.shape
        levels = (found - expected) * torch.tensor(ours.std).view(3, 1, 1) * 255
        assert levels.abs().max() < 1e-3, (height, width)


def test_old_files_say_the_same_in_other_words(tmp_path: Path) -> None:
    """As `openai/clip-vit-base-patch32` has it: whole numbers for sizes, no rescaling, a feature extractor."""
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 224, "crop_size": 224, "resample": 3}
    old |= {"do_resize": True, "do_center_crop": True, "do_normalize": True}
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old | {"image_mean": mean, "image_std": std}))
    assert load_image_processor(str(tmp_path)) == ImageProcessor(short_side=224, crop=(224, 224))


def test_gradient_is_that_of_the_unrounded_picture() -> None:
    probe = torch.randn(2, 3, 12, 14, dtype=torch.float64)
    grads = []
    for round_8bit in (False, True):
        pixels = torch.rand(2, 3, 20, 31, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        processor = ImageProcessor(short_side=16, crop=(12, 14), kernel="bilinear", round_8bit=round_8bit)
        pixels.requires_grad_()
        (processor(pixels) * probe).sum().backward()
        grads.append(pixels.grad)
    assert grads[0].abs().max() > 0
    assert torch.equal(*grads)
    smooth = ImageProcessor(size=(6, 5), kernel="lanczos", round_8bit=False)
    pixels = (0.1 + 0.8 * torch.rand(1, 3, 7, 9, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(smooth, pixels)


def test_beyond_the_range_pixels_are_clamped_and_keep_a_gradient() -> None:
    processor = ImageProcessor(short_side=8)
    stray = (3 * torch.rand(1, 3, 16, 16) - 1).requires_grad_()
    found = processor(stray)
    assert torch.equal(found, processor(stray.detach().clamp(0, 1)))
    (grad,) = torch.autograd.grad(found.square().sum(), stray)
    assert (grad[(stray < 0) | (stray > 1)] != 0).float().mean() > 0.9


@pytest.mark.parametrize(("height", "width"), [(20, 31), (31, 20), (16, 16), (16, 9), (1, 40)])
def test_the_long_side_is_fitted_and_the_rest_is_black(height: int, width: int) -> None:
    """By Pillow: resize to the rounded sides, paste on black; the odd pixel is right and below."""
    picture = photo(0, height, width)
    scale = 16 / max(height, width)
    inner = (round(width * scale), round(height * scale))
    square = Image.new("RGB", (16, 16))
    if min(inner):
        place = ((16 - inner[0]) // 2, (16 - inner[1]) // 2)
        square.paste(width_first(picture, *inner), place)
        processor = ImageProcessor(long_side=16, mean=(0, 0, 0), std=(1, 1, 1))
        levels = (processor(to_tensor(picture)[None])[0] - to_tensor(square)) * 255
        assert levels.abs().max() < 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_processor_type": "LlavaNextImageProcessor"}, "known are"),
        ({"size": {"longest_edge": 32}}, "asks for size"),
        ({"do_rescale": False}, "does not scale"),
        ({"resample": 5}, "filter 5"),
        ({"size": {"shortest_edge": 10}}, "cuts"),
    ],
)
def test_what_is_not_done_here_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    clip_processor().save_pretrained(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_image_processor(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_a_folder_without_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot load"):
        load_image_processor(str(tmp_path))
    with pytest.raises(CheckpointError, match="does not exist"):
        load_image_processor(str(tmp_path / "nowhere"))
